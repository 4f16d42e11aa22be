"""A site and a server that speaks to it over real TLS: real certificates, roster and doors; offers are the test's."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from breast_cancer import study_text, table

from consortium.client.control import ask
from consortium.client.datasets import Datasets
from consortium.client.home import Home
from consortium.client.joining import join
from consortium.client.work import Answered, Given
from consortium.privacy.ledger import ledger_name
from consortium.protocol import endings, wire
from consortium.protocol.chain import Head
from consortium.protocol.joincode import JoinCode
from consortium.protocol.messages import Answer, Instruction, Payload, decode, encode
from consortium.protocol.signing import ANSWER, INSTRUCTION, public_key, sign, verify
from consortium.protocol.study import Study
from consortium.server import ledger_heads
from consortium.server.enrolment import Enrolment
from consortium.server.federation import Federation
from consortium.server.listener import Caps, Listener, Request, Response, error_response, json_response
from consortium.server.roster import Roster
from consortium.server.store import Store

SITE = "hospital-1"
CONSORTIUM = Path(sys.executable).with_name("consortium")


def no_endings(poll: dict[str, Any]) -> dict[str, Any] | None:
    """No run has ended."""
    return None


@dataclass
class World:
    """A federation with one site that has joined, and the site door that the test plays.

    studies: texts by digest.
    offers: frames by nonce; those that a poll does not name are sent. answers: what came, by nonce.
    refuse: HTTP status by nonce that a PUT gets in place of being taken. late: nonces whose PUT is refused unread.
    polls: what each poll said. endings: the document that a poll is answered with, None for none.
    """

    folder: Path
    study: Study = field(default_factory=lambda: Study.parse(study_text(8)))
    studies: dict[str, str] = field(default_factory=dict)
    offers: dict[str, bytes] = field(default_factory=dict)
    answers: dict[str, Answer] = field(default_factory=dict)
    headers: dict[str, bytes] = field(default_factory=dict)
    refuse: dict[str, int] = field(default_factory=dict)
    late: set[str] = field(default_factory=set)
    polls: list[dict[str, Any]] = field(default_factory=list)
    endings: Callable[[dict[str, Any]], dict[str, Any] | None] = no_endings
    notice: str = ""
    reason: str = "refused by the test"
    trusts: int = 0
    puts: int = 0

    def __post_init__(self) -> None:
        self.federation = Federation.init(
            self.folder / "server", name="lung", host="127.0.0.1", port=0, bind="127.0.0.1", now=time.time()
        )
        self._store = Store(self.folder / "server" / "consortium.db")
        self.roster = Roster(self._store)
        self.key = self.federation.instruction_key
        self.port = 0
        self.studies[self.study.digest] = self.study.text
        self.open()
        self.home = self._joined()

    def open(self) -> None:
        """Open the site door, on the port of before."""
        self._listener = Listener(
            "127.0.0.1", self.port, self.federation.site_context, self._handle, Caps(), self.roster.admit
        )
        self._listener.start()
        self.port = self._listener.port

    def close(self) -> None:
        """Close it at once: polls break."""
        self._listener.stop(0.0)

    def cut(self) -> None:
        """Cut the site's connections."""
        self._listener.cut(SITE)

    def end(self) -> None:
        """Close all."""
        self.close()
        self._store.close()

    def _joined(self) -> Home:
        context, door = self.federation.open_context, Enrolment(self.federation, self.roster)
        enrolment = Listener("127.0.0.1", 0, context, door.handle, Caps())
        enrolment.start()
        secret, _ = self.roster.invite(SITE, 60)
        root = self.federation.root_fingerprint
        code = JoinCode("lung", SITE, "127.0.0.1", self.port, enrolment.port, root, secret)
        joined = join(code.text(), self.folder / "site", proxy="")
        enrolment.stop(0.0)
        assert joined.problem == ""
        return joined.home

    def with_data(self) -> World:
        """The site has the table, in its own names of two columns, and a policy that allows the study."""
        frame = table(8).rename(columns={"mean_radius": "radius_mm", "malignant": "befund"})
        frame["befund"] = frame["befund"].map({0: "gut", 1: "bös"})
        frame.to_csv(self.folder / "patienten.csv", index=False)
        (self.folder / "mapping.toml").write_text(
            'format = 1\n[columns.mean_radius]\ncolumn = "radius_mm"\n'
            '[columns.malignant]\ncolumn = "befund"\ncodes = { gut = 0, "bös" = 1 }\n'
        )
        Datasets(self.home).add("patients", str(self.folder / "patienten.csv"), self.folder / "mapping.toml")
        self.allow()
        return self

    def allow(self, task: str = "consortium.client.tasks.tabular:Classifier", data: str = "patients") -> None:
        """Write the policy."""
        self.home.policy_file.write_text(f'format = 1\n[[allow]]\ntask = "{task}"\ndata = "{data}"\n')

    # What the test offers

    def instruction(self, kind: str = "train", round: int = 1, **fields: Any) -> Instruction:
        """An instruction to the site, of run "r" and this world's study."""
        said: dict[str, Any] = {
            "federation": "lung", "run": "r", "round": round, "attempt": 0, "kind": kind,
            "study": self.study.digest, "model": "", "layout": "", "nonce": os.urandom(32).hex(),
            "expires": time.time() + 100.0, "site": SITE,
        }  # fmt: skip
        return Instruction(**{**said, **fields})

    def frame(self, instruction: Instruction, key: Any = None) -> bytes:
        """It as a frame, signed."""
        header, views = encode(instruction)
        return wire.preamble(header, sign(key or self.key, INSTRUCTION, header)) + b"".join(views)

    def offer(self, instruction: Instruction, frame: bytes | None = None) -> str:
        """Offer it to the site; gives its nonce."""
        self.offers[instruction.nonce] = self.frame(instruction) if frame is None else frame
        return instruction.nonce

    def ended(self, poll: dict[str, Any], word: str, run: str = "r", **changed: Any) -> dict[str, str]:
        """What the server says to a poll, with fields of the statement changed."""
        about = {
            "key": self.key,
            "federation": "lung",
            "site": SITE,
            "nonce": poll["nonce"],
            "runs": {run: word},
        }
        return endings.state(**{**about, **changed})

    def answer(self, nonce: str, seconds: float = 60.0) -> Answer:
        """The answer to what was offered."""
        wait_for(lambda: nonce in self.answers, seconds, "no answer came")
        return self.answers[nonce]

    def answer_to(self, instruction: Instruction, seconds: float = 60.0) -> Answer:
        """Offer, and wait for the answer."""
        return self.answer(self.offer(instruction), seconds)

    def quiet(self, polls: int = 3) -> None:
        """Wait until the site has polled so many times more, and so has looked at all offers."""
        before = len(self.polls)
        wait_for(lambda: len(self.polls) >= before + polls, 30, "the site does not poll")

    # The site door

    def _handle(self, request: Request) -> Response:
        if request.path == wire.POLL:
            return self._poll(request)
        if request.path.startswith(wire.ANSWERS):
            return self._put(request, request.path.removeprefix(wire.ANSWERS))
        if request.path.startswith(wire.STUDIES):
            text = self.studies.get(request.path.removeprefix(wire.STUDIES))
            return Response(200, text.encode()) if text is not None else error_response(404, "no such study")
        if request.path == wire.TRUST:
            self.trusts += 1
            return json_response(self.federation.trust())
        if request.path == wire.LEDGER:
            head = Head.parse(json.loads(request.read(wire.MAX_DOCUMENT))["head"])
            name = ledger_name("lung", SITE, public_key(self.roster.identity(SITE)))
            seen = ledger_heads.countersigned(self._store, self.key, name, head)
            return json_response({"head": seen.head.text, "signature": seen.signature})
        if request.path == wire.RENEW:
            csr = json.loads(request.read(wire.MAX_DOCUMENT))["csr"]
            return json_response({"chain": self.federation.issue(self.roster, SITE, csr)})
        return error_response(404, "no such route")

    def _poll(self, request: Request) -> Response:
        said = json.loads(request.read(wire.MAX_DOCUMENT))
        self.polls.append(said)
        end, never = time.monotonic() + 1.0, os.eventfd(0)
        try:
            while time.monotonic() < end:
                for nonce, frame in list(self.offers.items()):
                    if nonce not in said["have"] and nonce not in self.answers and not said["paused"]:
                        return Response(200, frame, headers={wire.NOTICE: self.notice})
                ended = self.endings(said)
                if ended is not None:
                    notice = f"{self.notice} {wire.RUNS}".strip()
                    return Response(200, json.dumps(ended).encode(), headers={wire.NOTICE: notice})
                request.wait(never, 0.01)
        finally:
            os.close(never)
        return Response(204, headers={wire.NOTICE: self.notice})

    def _put(self, request: Request, nonce: str) -> Response:
        self.puts += 1
        if nonce in self.late:
            return error_response(410, "too late")
        header, signature = wire.read_preamble(request.read_exactly)
        verify(public_key(self.roster.identity(SITE)), ANSWER, header, signature)
        content = request.read(1 << 30)
        if nonce in self.refuse:
            return error_response(self.refuse[nonce], self.reason)
        answer = decode(header, content)
        assert isinstance(answer, Answer)
        assert answer.nonce == nonce
        self.answers[nonce], self.headers[nonce] = answer, header
        return json_response({"taken": True})


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Wait until it is so."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.01)


@dataclass
class Trivial:
    """Work without torch: an update of ones. given: what it was given; before: called first, with it; changes: fields
    of the answers that are set to something else."""

    before: Callable[[Given], None] = lambda given: None
    given: list[Given] = field(default_factory=list)
    interrupts: int = 0
    size: int = 1000
    ends: list[str] = field(default_factory=list)
    finishes: list[tuple[str, bool]] = field(default_factory=list)
    changes: Mapping[str, Any] = field(default_factory=dict)

    def begin(self, runs: set[str], over: set[str]) -> None:
        return

    def answer(self, given: Given) -> Answered:
        self.given.append(given)
        self.before(given)
        update = Payload({"shared": np.ones(self.size, np.float32)})
        answer = Answer.to_instruction(given.about, weight=1.0, payload=update)
        header, views = encode(replace(answer, **self.changes))
        file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - the agent closes it
        file.write(b"".join(views))
        return Answered(header, file)

    def end(self, run: str) -> None:
        self.ends.append(run)

    def finished(self, run: str, for_good: bool) -> None:
        self.finishes.append((run, for_good))

    def tidy(self, recent: Callable[[str], bool]) -> None:
        return

    def interrupt(self) -> None:
        self.interrupts += 1

    def stop(self) -> None:
        return


class Program:
    """The agent as a process: `consortium client start`."""

    def __init__(self, world: World, environment: Mapping[str, str] | None = None) -> None:
        self.world, self.folder = world, world.home.folder
        before = len(world.polls)
        self.process = subprocess.Popen(
            [CONSORTIUM, "client", "start", "--dir", self.folder],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        self.lines: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()
        wait_for(
            lambda: len(world.polls) > before or self.process.poll() is not None, 30, f"no poll: {self.lines}"
        )
        assert self.process.poll() is None, self.lines

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.lines.extend(self.process.stderr)

    @property
    def log(self) -> str:
        """What it wrote to stderr so far."""
        return "".join(self.lines)

    def status(self) -> dict[str, Any]:
        """What it says of itself."""
        return ask(self.world.home.socket, "status")

    def state(self, run: str = "r") -> str:
        """How a run stands there."""
        return str(self.status()["runs"].get(run, {}).get("state", ""))

    def children(self) -> list[int]:
        """Processes of the session of each of its workers."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                parent = int(stat.read_text().rpartition(")")[2].split()[1])
            except (OSError, ValueError):
                continue
            if parent == self.process.pid:
                found.append(int(stat.parent.name))
        return found

    def end(self) -> float:
        """SIGTERM; how many seconds it took."""
        started = time.monotonic()
        self.process.terminate()
        assert self.process.wait(20) == 0, self.log
        return time.monotonic() - started


@contextmanager
def program(world: World, environment: Mapping[str, str] | None = None) -> Iterator[Program]:
    """The agent as a process, which is ended in any case."""
    one = Program(world, environment)
    try:
        yield one
    finally:
        one.process.kill()
        one.process.wait()


def retold(answer: Answer) -> bytes:
    """All of an answer but its nonce, as bytes: what must be the same."""
    header, views = encode(replace(answer, nonce=""))
    return header + b"".join(views)


class ConnectProxy:
    """An HTTP proxy that knows CONNECT alone. seen: what was asked of it."""

    def __init__(self) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self.seen: list[str] = []
        threading.Thread(target=self._loop, daemon=True).start()

    def _loop(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            head += connection.recv(4096)
        line = head.split(b"\r\n")[0].decode()
        self.seen.append(line)
        host, _, port = line.split()[1].rpartition(":")
        other = socket.create_connection((host, int(port)))
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        for one, two in ((connection, other), (other, connection)):
            threading.Thread(target=self._pipe, args=(one, two), daemon=True).start()

    def _pipe(self, one: socket.socket, two: socket.socket) -> None:
        try:
            while piece := one.recv(65536):
                two.sendall(piece)
        except OSError:
            pass
        for end in (one, two):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue

    def close(self) -> None:
        """Accept no more."""
        self._listening.close()
