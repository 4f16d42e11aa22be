"""A federation as people run it: the real command in a process of its own, and sites that joined by real codes.

The sites have no process: their keys lie in real client folders, and the test speaks for them, truly or not.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from attacker import HERE, NOTHING, Line, Said, blind, head, once
from breast_cancer import study_text
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from consortium.client import joining
from consortium.client.home import Home
from consortium.protocol import credentials, wire
from consortium.protocol.layout import Array, Layout, Segment
from consortium.protocol.messages import Answer, Instruction, Payload, decode, encode
from consortium.protocol.signing import ANSWER, sign
from consortium.protocol.study import Study
from consortium.server import pki
from consortium.server.federation import ISSUING, Federation
from consortium.server.pki import Authority
from consortium.server.plans import keep
from consortium.server.worker_process import Initial
from consortium.simulations.programs import descendants, free_ports

COMMAND = Path(sys.executable).with_name("consortium")
SIZE = 1000
"""Numbers of the model."""
DEADLINE = 2.0
"""Seconds that a round waits for a site that does not answer."""


def wait_for(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Wait until it is so."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.02)


@dataclass
class Realm:
    """A federation whose server runs. folder: `server/`, `clients/NAME/` and `server.log` lie in it."""

    folder: Path
    founded: Federation
    server: subprocess.Popen[bytes]
    events: list[dict[str, Any]] = field(default_factory=list)
    run: str = ""
    study: str = ""

    @property
    def own(self) -> Path:
        """The server's folder."""
        return self.founded.folder

    @property
    def port(self) -> int:
        """Of the site door."""
        return self.founded.config.port

    @property
    def token(self) -> str:
        """The admin's."""
        return (self.own / "admin.token").read_text().strip()

    @property
    def log(self) -> str:
        """What the server wrote."""
        return (self.folder / "server.log").read_text(errors="replace")

    @property
    def authority(self) -> Authority:
        """The issuing authority, as a thief of the server's folder has it."""
        key, chain = credentials.load(self.own / ISSUING, self.lock)
        return Authority(key, chain[0])

    @property
    def lock(self) -> Any:
        """What the server's keys are encrypted under."""
        return self.founded._lock

    def admin(
        self,
        method: str,
        path: str,
        document: Mapping[str, Any] | None = None,
        *,
        token: str | None = None,
        body: bytes | None = None,
    ) -> Said:
        """One request to the admin door, with the admin's token unless another is given ("" for none). An address that
        opens many connections in a second is turned away for a moment, as this is by quick tests: it tries again."""
        token = self.token if token is None else token
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        content = body if body is not None else json.dumps(document).encode() if document is not None else b""
        said = NOTHING
        for pause in (0.0, 0.2, 0.5, 1.0):
            time.sleep(pause)
            said = once(self.founded.config.admin_port, blind(), method, path, body=content, headers=headers)
            if said != NOTHING or self.server.poll() is not None:
                break
        return said

    def invited(self, site: str, hours: float = 1.0) -> str:
        """A join code."""
        said = self.admin("POST", f"/v1/sites/{site}/invite", {"hours": hours})
        assert said.status == 200, said
        return str(said.document["code"])

    def join(self, site: str) -> Actor:
        """A site that has joined by its code."""
        joined = joining.join(self.invited(site), self.folder / "clients" / site, proxy="")
        assert joined.problem == ""
        return Actor(self, site, joined.home)

    def actor(self, site: str) -> Actor:
        """A site that joined before."""
        return Actor(self, site, Home(self.folder / "clients" / site))

    def leaf(
        self, site: str, now: float | None = None
    ) -> tuple[ec.EllipticCurvePrivateKey, list[x509.Certificate]]:
        """A certificate of the issuing authority for any name, which the roster knows nothing of."""
        key = pki.new_key()
        made = pki.site_leaf(
            key.public_key(), self.authority, self.founded.config.name, site, now or time.time()
        )
        return key, credentials.certificates(made.chain.encode(), "the test")

    def begin(self, name: str = "siege", min_sites: int = 2, deadline: float = DEADLINE) -> str:
        """Begin a run that goes on for ever, over a model that the test makes, so that nothing loads torch. deadline:
        seconds that a round waits for a site."""
        text = study_text(
            4,
            study={"name": name, "rounds": 1_000_000},
            cohort={"min_sites": min_sites, "deadline": f"{deadline:g}s"},
        )
        study, self.study = Study.parse(text), text
        folder = self.own / "runs" / f"{name}.1"
        folder.mkdir(mode=0o700, parents=True)
        layout = Layout((Segment("shared", "float32", (Array("w", (SIZE,)),)),))
        keep(study, Initial(layout, np.zeros(SIZE, np.float32), prepares=False), folder)
        assert self.admin("POST", "/v1/studies", {"text": text}).status == 200
        said = self.admin("POST", f"/v1/studies/{name}/start")
        assert said.status == 200, said
        self.run = str(said.document["run"])
        return self.run

    def latest(self) -> int:
        """The last round that was committed."""
        return int(self.admin("GET", f"/v1/studies/{self.run}").document["round"])

    def round(self, number: int, seconds: float = 20.0) -> dict[str, Any]:
        """The event of a round, once it has come."""
        end = time.monotonic() + seconds
        while True:
            for event in self.events:
                if event["kind"] == "round" and event["round"] == number and not event["void"]:
                    return event
            assert time.monotonic() < end, f"round {number} does not end"
            after = self.events[-1]["id"] if self.events else 0
            self.events += self.admin("GET", f"/v1/studies/{self.run}/events?after={after}").document[
                "events"
            ]

    def goes_on(self, seconds: float = 15.0) -> None:
        """See that rounds are committed as before."""
        before = self.latest()
        wait_for(lambda: self.latest() > before, seconds, "the run does not go on")
        assert self.server.poll() is None

    def spooled(self) -> int:
        """Bytes in the server's spool, in which a run's files come and go."""
        total = 0
        for path in (self.own / "spool").iterdir():
            with suppress(FileNotFoundError):
                total += path.stat().st_size if path.is_file() else 0
        return total

    def processes(self) -> list[int]:
        """The server and all that it started."""
        return descendants([self.server.pid])


@dataclass(frozen=True)
class Frame:
    """An instruction as it came."""

    header: bytes
    signature: bytes
    content: bytes

    @property
    def about(self) -> Instruction:
        """It, decoded."""
        message = decode(self.header, self.content)
        assert isinstance(message, Instruction)
        return message


@dataclass
class Actor:
    """Whoever holds a site's keys."""

    realm: Realm
    site: str
    home: Home

    def __post_init__(self) -> None:
        lock = self.home.lock()
        self.identity: Ed25519PrivateKey = self.home.identity(lock)
        self.context = self.home.tls_context(lock)

    def line(self) -> Line:
        """A new connection to the site door."""
        return Line(self.realm.port, self.context)

    def ask(self, method: str, path: str, document: Mapping[str, Any] | None = None) -> Said:
        """One request over a connection of its own."""
        body = json.dumps(document).encode() if document is not None else b""
        return once(self.realm.port, self.context, method, path, body=body)

    def served(self) -> bool:
        """Whether the site door answers it."""
        return self.ask("GET", wire.TRUST).status == 200

    def poll(self, line: Line | None = None, have: tuple[str, ...] = ()) -> Frame | None:
        """The next instruction, None where there is none for a while."""
        one = line or self.line()
        document = {"format": wire.FORMAT, "have": list(have), "paused": False}
        said = one.ask("POST", wire.POLL, json.dumps(document).encode())
        if line is None:
            one.close()
        return _frame(said.body) if said.status == 200 else None

    def asked(self) -> Frame:
        """The instruction of now, for training."""
        end = time.monotonic() + 30
        while time.monotonic() < end:
            frame = self.poll()
            if frame is not None and frame.about.kind == "train":
                return frame
        raise AssertionError("nothing is asked")

    def put(
        self,
        nonce: str,
        header: bytes,
        content: bytes = b"",
        *,
        key: Ed25519PrivateKey | None = None,
        signature: bytes | None = None,
        line: Line | None = None,
    ) -> Said:
        """Send a frame as the answer to a nonce, signed by this site's key unless another key or signature is given."""
        made = signature if signature is not None else sign(key or self.identity, ANSWER, header)
        body = wire.preamble(header, made) + content
        if line is not None:
            return line.ask("PUT", wire.ANSWERS + nonce, body)
        return once(self.realm.port, self.context, "PUT", wire.ANSWERS + nonce, body=body)


def answer(frame: Frame, vector: Any = None, weight: float = 10.0, **changes: Any) -> tuple[bytes, bytes]:
    """Header and content of an answer to a frame: a small update, or whatever is given."""
    update = np.full(SIZE, 1e-3, np.float32) if vector is None else vector
    about = frame.about
    payload = Payload({"shared": update}) if about.kind == "train" else Payload()
    made = replace(Answer.to_instruction(about, weight=weight, payload=payload), **changes)
    header, views = encode(made)
    return header, b"".join(views)


def _frame(body: bytes) -> Frame:
    rest = memoryview(body)
    place = 0

    def read(count: int) -> bytes:
        nonlocal place
        piece = bytes(rest[place : place + count])
        place += len(piece)
        return piece

    header, signature = wire.read_preamble(read)
    return Frame(header, signature, bytes(rest[place:]))


@dataclass
class Honest:
    """A site that does what it is asked, in a thread. slowest: seconds of its slowest poll or answer."""

    actor: Actor
    answered: int = 0
    slowest: float = 0.0
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Poll no more."""
        self._ended.set()
        self._thread.join(40)

    def _loop(self) -> None:
        line: Line | None = None
        while not self._ended.is_set():
            try:
                line = line or self.actor.line()
                frame = self.actor.poll(line)
                if frame is None:
                    continue
                begun = time.monotonic()
                said = self.actor.put(frame.about.nonce, *answer(frame), line=line)
                self.slowest = max(self.slowest, time.monotonic() - begun)
                if said == NOTHING:
                    raise OSError("the connection ended")
                if said.status not in (200, 410):
                    self.problems.append(f"{said.status} {said.body!r}")
                self.answered += said.status == 200
                self._ended.wait(0.1)
            except OSError as error:
                self.problems.append(str(error))
                if line is not None:
                    line.close()
                line = None
                self._ended.wait(0.2)
        if line is not None:
            line.close()


def found(folder: Path, name: str = "lung", *, passphrase: str = "") -> Federation:
    """Found a federation on free ports of the loopback."""
    port, admin_port, enrol_port = free_ports(3)
    return Federation.init(
        folder, name=name, host=HERE, port=port, admin_port=admin_port, enrol_port=enrol_port, bind=HERE,
        use_passphrase=bool(passphrase), now=time.time(),
        environment={**os.environ, "CONSORTIUM_PASSPHRASE": passphrase},
    )  # fmt: skip


@contextmanager
def realm(folder: Path, name: str = "lung", *, passphrase: str = "") -> Iterator[Realm]:
    """A federation whose server runs while the block lasts."""
    folder.mkdir(parents=True, exist_ok=True)
    founded = found(folder / "server", name, passphrase=passphrase)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if passphrase:
        environment["CONSORTIUM_PASSPHRASE"] = passphrase
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(
            [COMMAND, "server", "start", "--dir", folder / "server"],
            env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    one = Realm(folder, founded, server)
    try:
        wait_for(lambda: one.admin("GET", "/v1/status").status == 200, 30, "the server does not answer")
        yield one
    finally:
        # A test may have started it anew.
        server = one.server
        family = descendants([server.pid])
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            for pid in family:
                with suppress(ProcessLookupError):
                    os.kill(pid, 9)
            server.wait(5)
        finally:
            assert not [pid for pid in family if Path(f"/proc/{pid}/fd").exists() and pid != server.pid]


__all__ = ["Actor", "Frame", "Honest", "Realm", "answer", "found", "head", "realm", "wait_for"]
