"""A whole federation of processes on this machine's loopback: a server, and a client for each site.

What two people do by hand in two terminals, done by a program: the same calls, files, certificates and processes.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from consortium.client import joining
from consortium.client.datasets import KEY, Datasets
from consortium.client.home import Home
from consortium.protocol.connection import UnreachableError
from consortium.protocol.errors import ConsortiumError
from consortium.protocol.files import private_folder, write_private
from consortium.protocol.study import Study
from consortium.server.admin_client import Admin, connect
from consortium.server.federation import Federation as Founded
from consortium.simulations.programs import Programs, free_ports

HOST = "127.0.0.1"
START = 30.0
"""Seconds in which the server must answer."""
DATA = "patients"
"""The name under which each site registers its data."""
_COMMAND = Path(sys.executable).with_name("consortium")


@dataclass(frozen=True)
class Federation:
    """A server that answers. Sites join, studies are started and followed.

    folder: `server/` and `clients/NAME/` lie in it.
    """

    programs: Programs
    folder: Path
    admin: Admin

    def join(self, site: str, place: Path, *, rounds: int | None = None) -> None:
        """Invite a site, join it by its code, register its data, allow the study's task over them, start its client.

        place: the site's own data: a file, or a folder with one data file and perhaps `mapping.toml` and
        `holdout.key`. rounds: the most that its policy allows.
        """
        home = Home(self.folder / "clients" / site)
        code = self.admin.post(f"/v1/sites/{site}/invite")["code"]
        joining.join(code, home.folder)
        register(home, place)
        allow(home, rounds)
        self.start_client(site)

    def start_client(self, site: str) -> int:
        """Start the client of a site that has joined; its process id."""
        home = Home(self.folder / "clients" / site)
        arguments: list[str | Path] = [_COMMAND, "client", "start", "--dir", home.folder]
        return self.programs.start(f"client-{site}", arguments, environment(), self.folder)

    def gather(self, sites: Iterable[str], seconds: float = START) -> None:
        """Wait until these sites are connected.

        Raises:
            ConsortiumError: some are not in time, or a process ended by itself.
        """
        end = time.monotonic() + seconds
        while absent := set(sites) - self.connected():
            self.programs.check()
            if time.monotonic() > end:
                names = ", ".join(sorted(absent))
                raise ConsortiumError(
                    f"{names}: not connected within {seconds:g} s; see the logs in {self.folder}"
                )
            time.sleep(0.05)

    def connected(self) -> set[str]:
        """Names of the sites that can be asked now."""
        sites = self.admin.get("/v1/sites")["sites"]
        return {one["name"] for one in sites if one["connected"] and not one["paused"]}

    def start(self, study: Study) -> None:
        """Submit a study and start its run."""
        self.admin.post("/v1/studies", text=study.text)
        self.admin.post(f"/v1/studies/{study.name}/start")

    def events(self, study: Study) -> Iterator[dict[str, Any]]:
        """What the study's run reports, as it happens, until it is over.

        Raises:
            ConsortiumError: it failed, or a process ended by itself.
        """
        state, why = "", ""
        for found in self.admin.events(study.name):
            self.programs.check()
            yield from found["events"]
            state, why = found["state"], found["why"]
        if state != "finished":
            raise ConsortiumError(f"the run is {state}: {why}; see the logs in {self.folder}")


@contextmanager
def federation(programs: Programs, folder: Path, name: str = "demo") -> Iterator[Federation]:
    """Found a federation in `folder`, and start its server.

    Raises:
        ConsortiumError: it does not answer.
    """
    own = folder / "server"
    private_folder(folder / "clients")
    port, admin_port, enrol_port = free_ports(3)
    Founded.init(
        own, name=name, host=HOST, port=port, admin_port=admin_port, enrol_port=enrol_port, bind=HOST,
        key_file=None, use_passphrase=False, now=time.time(),
    )  # fmt: skip
    start_server(programs, folder)
    yield Federation(programs, folder, _answering(programs, own))


def start_server(programs: Programs, folder: Path) -> int:
    """Start the server over `folder`/server; its process id."""
    arguments: list[str | Path] = [_COMMAND, "server", "start", "--dir", folder / "server"]
    return programs.start("server", arguments, environment(), folder)


def _answering(programs: Programs, folder: Path) -> Admin:
    end = time.monotonic() + START
    while True:
        programs.check()
        try:
            admin = connect(folder, None)
            admin.get("/v1/status")
            return admin
        except UnreachableError as error:
            if time.monotonic() > end:
                raise ConsortiumError(f"the server did not answer within {START:g} s; {error}") from error
            time.sleep(0.05)


def register(home: Home, place: Path) -> None:
    """Register a site's data, with the mapping and the holdout key that lie beside them."""
    folder = place if place.is_dir() else place.parent
    if (folder / KEY).exists() and place.is_dir():
        private_folder(home.data(DATA).parent)
        private_folder(home.data(DATA))
        write_private(home.data(DATA) / KEY, (folder / KEY).read_bytes())
    mapping = folder / "mapping.toml"
    files = sorted(folder.glob("*.csv")) if place.is_dir() else [place]
    Datasets(home).add(DATA, str(files[0] if files else folder), mapping if mapping.exists() else None)


def allow(home: Home, rounds: int | None = None) -> None:
    """A policy that allows Consortium's own tasks over the registered data."""
    from consortium.protocol.sections import TASKS

    limit = {} if rounds is None else {"rounds": rounds}
    rules = [{"task": task, "data": DATA, **limit} for task in TASKS]
    write_private(home.policy_file, tomli_w.dumps({"format": 1, "allow": rules}).encode())


def environment() -> dict[str, str]:
    """Variables of our programs: ours, less what would lead them elsewhere."""
    kept = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    return kept | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
