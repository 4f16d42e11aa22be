"""Flower's stock processes on this machine's loopback: one SuperLink, a SuperNode for each site.

TLS by a certificate authority of a day, and node authentication: a SuperNode is let in by its registered key only.
Settings as Flower documents them: state in memory and `--isolation subprocess`, its defaults; no installation of
dependencies at run time. SuperExec's look for tasks, 1 s apart by default, is 50 ms apart, which is in Flower's favour.
"""

from __future__ import annotations

import hashlib
import os
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
from flwr.cli.build import build_fab_from_files
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import ListRunsRequest, RegisterNodeRequest, StartRunRequest
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

from consortium.protocol.errors import ConsortiumError
from consortium.protocol.study import Study
from consortium.simulations.programs import Programs, descendants, free_ports
from contenders.flower_certificates import (
    AUTHORITY,
    CERTIFICATE,
    HOST,
    KEY,
    write_certificates,
    write_node_key,
)

START = 60.0
"""Seconds in which the SuperLink must answer."""
LOOK_EVERY = 0.5
_BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class App:
    """A Flower app. server, client: its components, "module:name". files: what it holds, by name."""

    name: str
    server: str
    client: str
    files: Mapping[str, bytes | Path]
    config: Mapping[str, str | int | float]

    def pyproject(self) -> bytes:
        """The file that makes a folder a Flower app."""
        components = {"serverapp": self.server, "clientapp": self.client}
        flower = {"publisher": "consortium", "components": components, "config": dict(self.config)}
        project = {"name": self.name[:32], "version": "0.1.0"}
        return tomli_w.dumps({"project": project, "tool": {"flwr": {"app": flower}}}).encode()


def study_app(study: Study, run: str, sites: int, patience: float) -> App:
    """A study over Flower, by `server/app.py` and `client/app.py`, whose docstrings say what these mean."""
    files: dict[str, bytes | Path] = {"study.toml": study.text.encode()}
    files |= {path.name: path for path in sorted(study.folder.glob("*.py"))} if not study.built_in else {}
    config: dict[str, str | int | float] = {"run": run, "sites": sites, "patience": patience}
    return App(study.name, "consortium.server.app:app", "consortium.client.app:app", files, config)


class FlowerFederation:
    """A SuperLink that answers; sites join, apps are run."""

    def __init__(self, programs: Programs, folder: Path, port: int, client: ControlHttpClient) -> None:
        self._programs, self._folder, self._port, self._client = programs, folder, port, client

    def join(self, site: str, folder: Path, config: Mapping[str, Any]) -> None:
        """Register a site's key, and start its SuperNode; logs, key and Flower's files go into `folder`, a new one.

        config: what its ClientApps find in `context.node_config`.
        """
        folder.mkdir(mode=0o700, parents=True)
        public = write_node_key(folder / "node.key")
        self._client.RegisterNode(RegisterNodeRequest(public_key=public, name=site))
        (folder / "node.toml").write_text(tomli_w.dumps(config), encoding="utf-8")
        (runtime,) = free_ports(1)
        # fmt: off
        node: list[str | Path] = [
            _BIN / "flower-supernode", "--superlink", f"{HOST}:{self._port}",
            "--root-certificates", self._folder / AUTHORITY, "--auth-supernode-private-key", folder / "node.key",
            "--host", HOST, "--port", str(runtime), "--node-config", folder / "node.toml",
        ]
        # fmt: on
        self._programs.start("supernode", node, _environment(folder), folder)

    def run(self, app: App, seconds: float) -> None:
        """Run an app from start to end.

        Raises:
            ConsortiumError: it failed or took longer than `seconds`, or a process ended by itself.
        """
        fab, _ = build_fab_from_files({"pyproject.toml": app.pyproject(), **app.files})
        sent = fab_to_proto(Fab(hashlib.sha256(fab).hexdigest(), fab, {}))
        answer = self._client.StartRun(StartRunRequest(fab=sent, override_config=user_config_to_proto({})))
        run, end = int(answer.run_id), time.monotonic() + seconds
        while time.monotonic() < end:
            self._programs.check()
            status = self._client.ListRuns(ListRunsRequest(run_id=run)).run_dict[run].status
            if status.status == "finished":
                if status.sub_status != "completed":
                    raise ConsortiumError(f"the run failed: {status.details or status.sub_status}")
                return
            time.sleep(LOOK_EVERY)
        raise ConsortiumError(f"the run took longer than {seconds:g} s; see the logs in {self._folder}")

    def server_pids(self) -> Sequence[int]:
        """The SuperLink and all that it started, the ServerApp too; of the moment."""
        link = [pid for pid in descendants([os.getpid()]) if self._is_superlink(pid)]
        return descendants(link[:1])

    def _is_superlink(self, pid: int) -> bool:
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            return False
        return (
            any(word.endswith(b"/flower-superlink") for word in words) and str(self._port).encode() in words
        )


@contextmanager
def flower_federation(
    programs: Programs, folder: Path, environment: Mapping[str, str] | None = None
) -> Iterator[FlowerFederation]:
    """Start a SuperLink over `folder`, a new one. environment: variables for it and its ServerApps.

    Raises:
        ConsortiumError: it does not answer.
    """
    folder.mkdir(mode=0o700, parents=True)
    write_certificates(folder)
    (port,) = free_ports(1)
    # fmt: off
    link: list[str | Path] = [
        _BIN / "flower-superlink", "--host", HOST, "--port", str(port),
        "--ssl-certfile", folder / CERTIFICATE, "--ssl-keyfile", folder / KEY, "--ssl-ca-certfile", folder / AUTHORITY,
        "--enable-supernode-auth", "--disable-runtime-dependency-installation",
    ]
    # fmt: on
    programs.start("superlink", link, _environment(folder) | dict(environment or {}), folder)
    _await(programs, f"https://{HOST}:{port}/health", folder / AUTHORITY)
    client = ControlHttpClient.from_server_address(
        server_address=f"{HOST}:{port}",
        insecure=False,
        root_certificates=(folder / AUTHORITY).read_bytes(),
        interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
    )
    try:
        yield FlowerFederation(programs, folder, port, client)
    finally:
        client.close()  # before the SuperLink is ended: it waits for open connections


def _environment(folder: Path) -> dict[str, str]:
    """Variables of a Flower process: nothing inherited from another Flower, nothing sent home, its own folder."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FLWR_")}
    return kept | {
        "FLWR_HOME": str(folder / "flwr"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.05",
        "PATH": f"{_BIN}:{os.environ.get('PATH', '')}",  # Flower finds its other programs by bare name
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
    }


def _await(programs: Programs, url: str, authority: Path) -> None:
    trust = ssl.create_default_context(cafile=str(authority))
    end = time.monotonic() + START
    while time.monotonic() < end:
        programs.check()
        try:
            with urllib.request.urlopen(url, timeout=2, context=trust):  # noqa: S310 - https, loopback
                return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.1)
    raise ConsortiumError(f"flower-superlink did not answer within {START:g} s; is this machine very busy?")
