"""A live federation for tests of faults: a server and clients as processes that a test kills and starts again.

Nothing is done for a program but starting it where the test ended it.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from leftovers import descriptors, holders, living
from tcp_proxy import TcpProxy

from consortium.client import joining
from consortium.client.control import ask
from consortium.client.home import Home
from consortium.protocol.errors import ConsortiumError
from consortium.protocol.study import Study
from consortium.server.admin_client import Admin, connect
from consortium.server.federation import Federation
from consortium.server.states import OVER
from consortium.simulations.deployment import HOST, allow, environment, register
from consortium.simulations.hospitals import study_of, write_hospitals
from consortium.simulations.programs import Programs, free_ports
from consortium.simulations.simulation import simulate
from consortium.simulations.sites import gather

SUPPORT = Path(__file__).parent
COMMAND: tuple[str | Path, ...] = (Path(sys.executable).with_name("consortium"),)
SHORT_POLLS: tuple[str | Path, ...] = (sys.executable, SUPPORT / "short_polls.py")


def study(
    name: str, sites: int, rounds: int = 4, epochs: int = 400, deadline: str = "1m", least: int = 0
) -> Study:
    """A study of fedavg over `write_hospitals`, in which a round takes about a second. least: min_sites, else all."""
    text = study_of(rounds, deadline=deadline).text
    for key, value in {
        "name": f'"{name}"',
        "local_epochs": str(epochs),
        "min_sites": str(least or sites),
    }.items():
        text = re.sub(rf"^{key} = .*$", f"{key} = {value}", text, count=1, flags=re.M)
    return Study.parse(text)


def simulated(one: Study, places: Sequence[Path]) -> bytes:
    """The model that `simulate` makes of the same study and sites."""
    return simulate(one, sites=gather(one, list(places)).sources, processes=0).outcome.model.tobytes()


@dataclass
class Live:
    """A running federation. pids: of "server" and of each site's client. command: how the programs are started."""

    folder: Path
    programs: Programs
    command: tuple[str | Path, ...] = COMMAND
    pids: dict[str, int] = field(default_factory=dict)
    places: dict[str, Path] = field(default_factory=dict)

    @property
    def admin(self) -> Admin:
        """A new connection to the admin door: one that rests for a minute is closed there."""
        return connect(self.folder / "server", None)

    def home(self, site: str) -> Home:
        """A site's folder."""
        return Home(self.folder / "clients" / site)

    # Starting and ending programs

    def start_server(self) -> None:
        """Start the server, and wait until it answers."""
        self.launch_server()
        self.until(self.answers, 60, "the server does not answer")

    def launch_server(self) -> None:
        """Start the server, and wait for nothing."""
        words: list[str | Path] = [*self.command, "server", "start", "--dir", self.folder / "server"]
        self.pids["server"] = self.programs.start("server", words, environment(), self.folder)

    def answers(self) -> bool:
        """Whether the server does."""
        try:
            return bool(self.admin.get("/v1/status"))
        except ConsortiumError:
            return False

    def start_client(self, site: str, way: str = "") -> None:
        """Start a site's client. way: of `odd_site.py`."""
        folder = self.home(site).folder
        words: list[str | Path] = [*self.command, "client", "start", "--dir", folder]
        if way:
            words = [sys.executable, SUPPORT / "odd_site.py", way, folder]
        self.pids[site] = self.programs.start(f"client-{site}", words, environment(), self.folder)

    def join(
        self, site: str, place: Path, way: str = "", proxy: Callable[[int], TcpProxy] | None = None
    ) -> None:
        """Bring a site in, perhaps through a proxy to the site door, and start its client."""
        joining.join(self.admin.post(f"/v1/sites/{site}/invite")["code"], self.home(site).folder)
        if proxy is not None:
            file = self.home(site).config_file
            between = proxy(self.home(site).config.port)
            file.write_text(re.sub(r"^port = \d+", f"port = {between.port}", file.read_text(), flags=re.M))
        register(self.home(site), place)
        allow(self.home(site))
        self.places[site] = place
        self.start_client(site, way)

    def end(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        """End the server or a client with a signal, and wait until it is gone."""
        self.kill(self.pids[name], number)

    def kill(self, pid: int, number: signal.Signals = signal.SIGKILL) -> None:
        """End any process, and wait until it is gone."""
        os.kill(pid, number)
        self.until(lambda: not _lives(pid), 15, f"process {pid} does not end by {number.name}")

    # Looking at them

    def run_process(self) -> int:
        """The process id of the run under way."""
        return self._child("server", "consortium.server.run_process")

    def worker(self, site: str) -> int:
        """The process id of a site's worker."""
        return self._child(site, "consortium.client.worker")

    def _child(self, of: str, what: str) -> int:
        (found,) = children(self.pids[of], what)
        return found

    def connected(self) -> set[str]:
        """Sites that can be asked now."""
        sites = self.admin.get("/v1/sites")["sites"]
        return {one["name"] for one in sites if one["connected"] and not one["paused"]}

    def gather(self) -> None:
        """Wait until every site is connected."""
        self.until(lambda: self.connected() == set(self.places), 60, "not all sites are connected")

    def training(self, site: str, name: str, round: int) -> bool:
        """Whether a site is at work in a round of a study's first run."""
        run = ask(self.home(site).socket, "status")["runs"].get(f"{name}.1", {})
        return bool(run) and (run["state"], run["round"]) == ("training", round)

    def at_work(self, site: str, name: str, round: int) -> None:
        """Wait until a site trains in a round, and a moment longer."""
        self.until(
            lambda: self.training(site, name, round), 90, f"{site} does not get to round {round}", 0.02
        )
        time.sleep(0.3)
        assert self.training(site, name, round), "a round is too short for this test"

    def until(self, condition: Callable[[], bool], seconds: float, what: str, pause: float = 0.1) -> None:
        """Wait until it is so."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"{what}\n{self.logs()}"
            time.sleep(pause)

    def logs(self) -> str:
        """The last lines of every log."""
        return "\n".join(
            f"-- {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-12:])
            for path in sorted(self.folder.glob("*.log"))
        )

    # Studies

    def start(self, one: Study) -> None:
        """Submit and start a study."""
        self.admin.post("/v1/studies", text=one.text)
        self.admin.post(f"/v1/studies/{one.name}/start")

    def show(self, name: str) -> dict[str, Any]:
        """How a study stands."""
        return self.admin.get(f"/v1/studies/{name}")

    def committed(self, name: str, round: int, seconds: float = 90) -> None:
        """Wait until a round is committed."""
        self.until(lambda: self.show(name)["round"] >= round, seconds, f"no round {round}", 0.1)

    def over(self, name: str, seconds: float = 120) -> dict[str, Any]:
        """Wait until a study is over; how it stands then."""
        self.until(lambda: self.show(name)["state"] in OVER, seconds, "the run does not end")
        return self.show(name)

    def events(self, name: str, kind: str = "round") -> list[dict[str, Any]]:
        """A study's events of one kind."""
        found = self.admin.get(f"/v1/studies/{name}/events?after=0")["events"]
        return [one for one in found if one["kind"] == kind]

    def model(self, name: str) -> bytes:
        """The bytes of the model that a study's last run left."""
        folder = Path(self.show(name)["model"]).parent
        loaded: np.ndarray[Any, Any] = np.load(folder / "model.npy", allow_pickle=False)
        return loaded.tobytes()

    def quiet(self, seconds: float = 20) -> None:
        """Wait until nothing of any run is left: no process, no file that it spooled, no copy of data, no state."""
        homes = [self.home(site) for site in self.places]
        spools = [
            self.folder / "server" / "spool",
            *(place for home in homes for place in (home.spool, home.state)),
        ]

        def left() -> list[str]:
            found = [str(one) for pid in self.pids.values() for one in children(pid)]
            found += [str(path) for spool in spools for path in spool.glob("*")]
            return found + [one for one in holders(self.folder) if "(deleted)" in one]

        end = time.monotonic() + seconds
        while left() and time.monotonic() < end:
            time.sleep(0.1)
        assert left() == []

    def sockets(self, name: str) -> int:
        """How many sockets and pipes a program has open."""
        return sum(":[" in one for one in descriptors(self.pids[name]).values())


@contextmanager
def live(folder: Path, command: tuple[str | Path, ...] = COMMAND) -> Iterator[Live]:
    """A federation whose server answers; afterwards nothing of it runs, and nothing holds a file of it."""
    port, admin_port, enrol_port = free_ports(3)
    Federation.init(
        folder / "server", name="lung", host=HOST, port=port, admin_port=admin_port, enrol_port=enrol_port,
        bind=HOST, key_file=None, use_passphrase=False, now=time.time(),
    )  # fmt: skip
    (folder / "clients").mkdir(mode=0o700)
    with Programs() as programs:
        one = Live(folder, programs, command)
        one.start_server()
        yield one
    assert living(str(folder)) == []
    assert holders(folder) == []


@contextmanager
def hospitals(folder: Path, number: int, command: tuple[str | Path, ...] = COMMAND) -> Iterator[Live]:
    """A federation of made-up hospitals that are connected."""
    with ExitStack() as stack:
        one = stack.enter_context(live(folder, command))
        for name, place in write_hospitals(folder / "sites", number).items():
            one.join(name, place)
        one.gather()
        yield one


def counted(shown: dict[str, Any]) -> dict[str, tuple[int, str | None]]:
    """Of a document of `show`, by site: the last round in which it counted, and its last error."""
    return {site: (about["last_round"], about["last_error"]) for site, about in shown["sites"].items()}


def children(pid: int, what: str = "") -> list[int]:
    """Living child processes whose command line mentions `what`."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            fields = (path / "stat").read_text().rpartition(")")[2].split()
            line = (path / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z" and what in line:
            found.append(int(path.name))
    return found


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False
