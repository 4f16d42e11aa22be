"""A served model in a process of its own, as `consortium model serve` starts it, and a plain HTTPS client."""

from __future__ import annotations

import http.client
import json
import os
import signal
import ssl
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

COMMAND = Path(sys.executable).with_name("consortium")


@dataclass
class Serving:
    """The running program. tokens: by role. rest: host and port."""

    pid: int
    folder: Path
    rest: tuple[str, int]
    grpc: str
    tokens: Mapping[str, str]
    _kept: list[http.client.HTTPSConnection] = field(default_factory=list)

    @property
    def root(self) -> Path:
        return self.folder / "root.pem"

    def connection(self) -> http.client.HTTPSConnection:
        context = ssl.create_default_context(cafile=str(self.root))
        return http.client.HTTPSConnection(*self.rest, timeout=20, context=context)

    def ask(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        role: str = "admin",
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body, over one kept connection."""
        if not self._kept:
            self._kept.append(self.connection())
        given = {"Authorization": f"Bearer {self.tokens[role]}"} if role else {}
        try:
            self._kept[0].request(method, path, body, {**given, **(headers or {})})
            answer = self._kept[0].getresponse()
            content = answer.read()
        except (http.client.HTTPException, OSError):
            self._kept.clear()
            raise
        if answer.getheader("connection") == "close":
            self._kept.clear()
        return answer.status, {key.lower(): value for key, value in answer.getheaders()}, content

    def post(self, path: str, document: Any, role: str = "admin") -> tuple[int, Any]:
        status, _, content = self.ask("POST", path, json.dumps(document).encode(), None, role)
        return status, json.loads(content)

    def get(self, path: str, role: str = "admin") -> tuple[int, Any]:
        status, _, content = self.ask("GET", path, None, None, role)
        return status, json.loads(content)

    def memory(self) -> int:
        """Resident bytes."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) * 1024


@contextmanager
def serving(
    path: Path, folder: Path, *options: object, program: tuple[str, ...] = (str(COMMAND),)
) -> Iterator[Serving]:
    """Serve what lies at `path`, on free ports, until the block ends; it must then end by itself with exit code 0."""
    from consortium.server.serving import tokens

    made = {role: tokens.new(folder, role, role) for role in ("caller", "monitor", "admin")}
    arguments = ["model", "serve", path, "--dir", folder, "--port", 0, "--grpc-port", 0, "--json", *options]
    with (folder.parent / "serving.log").open("wb") as log:
        process = subprocess.Popen(
            [*program, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, (folder.parent / "serving.log").read_text()
        about = json.loads(line)
        place = urlsplit(about["rest"])
        assert place.hostname is not None
        assert place.port is not None
        yield Serving(process.pid, folder, (place.hostname, place.port), about["grpc"], made)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0, (folder.parent / "serving.log").read_text()
        assert "Traceback" not in (folder.parent / "serving.log").read_text()
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
