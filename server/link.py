"""The round loop's way out of a run's own process: sites and commits, over a socket to the server that started it.

The process calls, the server (`server/conversation.py`) answers, one call at a time, as `protocol/local.py` has it.
Models travel as open files, never through the socket; what the process writes is encrypted under the run's key:

    ready {layout_bytes}                          -> {}
    load {}                                       -> {sha256} + file, or {} where nothing is committed
    records {kind, start}                         -> {records}: lines that are kept, as many as fit
    keep {records}                                -> {}, once they are durable: of files of an earlier version
    commit {round, attempt, sha256, events, records} + file -> {}, once it is durable
    sites {}                                      -> {sites}
    interrupted {}                                -> {asked}: what was asked last, or null
    ask {headers by site, asked, done: sites whose last answers are not mapped here any more} + file or none
                                                  -> {refused: reasons by site}
    answers {seconds}                             -> {site, header} + file or none, {site, reason}, or {}: no more
    wait {sites}                                  -> {more}
    released {}                                   -> {ledger}: `StudyLedger.of_run`
    seal {manifest, lineage}                      -> {signature}: of the exported model's manifest, or null
    finished {status, why}                        -> {}

Where the server cannot do what is asked it says {error, kind}, which is raised here.
"""

from __future__ import annotations

import base64
import hashlib
import mmap
import os
import socket
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from consortium.protocol import local
from consortium.protocol.errors import ConsortiumError, InputError, IntegrityError, RefusedError
from consortium.protocol.files import write_early
from consortium.protocol.layout import Vector
from consortium.protocol.messages import (
    Answer,
    Instruction,
    Statistics,
    assemble,
    contents,
    header_of,
    parse,
)
from consortium.protocol.sealed import DataKey, is_sealed, seal, sealing, unseal
from consortium.server import checkpoint
from consortium.server.checkpoint import Begun
from consortium.server.clients import Block
from consortium.server.interrupted import Asked
from consortium.server.records import Evaluation, Round, RunState
from consortium.server.results import document

_ERRORS: Mapping[str, type[ConsortiumError]] = {
    one.__name__: one for one in (InputError, RefusedError, IntegrityError)
}
Part = tuple[dict[str, Any], memoryview]
"""As `messages.contents` gives it."""
BATCH = 16
"""Records of a file of an earlier version that are handed over at once."""
LARGE = 8 << 20
"""Bytes of a model from which on a second thread pays."""
_NOTHING = np.empty(0, np.float32)


class Link:
    """Calls to the server."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def first(self) -> dict[str, Any]:
        """What the server says before any call: which run this is."""
        found, files = local.receive(self._connection)
        local.close(files)
        return found

    def call(self, name: str, files: Sequence[int] = (), **fields: Any) -> dict[str, Any]:
        """Call without a file in the answer. Raises as `call_for_file`."""
        reply, file = self.call_for_file(name, files, **fields)
        if file is not None:
            os.close(file)
        return reply

    def call_for_file(
        self, name: str, files: Sequence[int] = (), **fields: Any
    ) -> tuple[dict[str, Any], int | None]:
        """Call, and give the answer and its file, which the caller must close.

        Raises:
            ClosedError: the server has ended.
            ConsortiumError: the server could not do it.
        """
        local.send(self._connection, {"call": name, **fields}, files)
        reply, found = local.receive(self._connection)
        if "error" in reply:
            local.close(found)
            raise _ERRORS.get(str(reply.get("kind")), ConsortiumError)(str(reply["error"]))
        local.close(found[1:])
        return reply, found[0] if found else None


class LinkCommits:
    """`Commits` in the server's archive. folder: where checkpoint files without a name are made. key: the run's."""

    def __init__(self, link: Link, run: str, folder: Path, key: DataKey) -> None:
        self._link, self._run, self._folder, self.key = link, run, folder, key
        self._writer = checkpoint.Writer(run, key, self._history)
        self._shown = (0, 0)
        self._held: tuple[RunState, int] | None = None  # without its model and what else is large
        self._named: tuple[str, Any] = ("", None)  # a model's digest, and the hash that gave it
        self._begun: Begun | None = None  # the file of the next commit, with its model in it

    def name(self, model: Vector) -> str:
        """The digest of a model, remembered for the instruction that carries it: it is hashed once. A large one is
        written meanwhile, as the beginning of the next commit's file."""
        self._drop_begun()
        content = np.ascontiguousarray(model, model.dtype.newbyteorder("<")).view(np.uint8).data
        if len(content) < LARGE:
            sha = hashlib.sha256(content)
        else:
            with ThreadPoolExecutor(1) as thread:
                file = nameless(self._folder)
                begun = thread.submit(self._writer.begin, model, file)
                sha = hashlib.sha256(content)
            try:
                self._begun = begun.result()
            except BaseException:
                os.close(file)
                raise
        self._named = (sha.hexdigest(), sha)
        return self._named[0]

    def _drop_begun(self) -> None:
        if self._begun is not None:
            os.close(self._begun.file)
            self._begun = None

    def load(self) -> RunState | None:
        reply, file = self._link.call_for_file("load")
        if file is None:
            return None
        state = self._writer.read(file, str(reply["sha256"]))
        if is_sealed(file):
            self._keep(state, file)
        else:
            os.close(file)
        self._shown = (len(state.rounds), len(state.evaluations))
        return state

    def commit(self, state: RunState) -> RunState:
        begun, self._begun = self._begun, None
        if begun is not None and begun.model is not state.model:
            os.close(begun.file)
            begun = None
        file = begun.file if begun is not None else nameless(self._folder)
        try:
            sha256, added = self._writer.write(state, file, begun)
            rounds, evaluations = self._shown
            new: list[Round | Evaluation] = [*state.evaluations[evaluations:], *state.rounds[rounds:]]
            events = [document(one) for one in new]
            about = {"round": state.round, "attempt": state.attempt, "sha256": sha256, "events": events}
            self._link.call("commit", [file], **about, records=self._sealed(added))
        except BaseException:
            os.close(file)
            raise
        state = self._writer.put_away(state)
        self._keep(state, file)
        self._shown = (len(state.rounds), len(state.evaluations))
        return state

    def _history(self, kind: str, count: int) -> Iterator[bytes]:
        """A `checkpoint.History` over the link."""
        place = 0
        while place < count:
            found = self._link.call("records", kind=kind, start=place)["records"]
            for sealed in found[: count - place]:
                yield unseal(base64.b64decode(sealed), self.key, f"record {place} of its {kind}")
                place += 1
            if not found:
                return

    def _sealed(self, added: Mapping[str, checkpoint.Added]) -> dict[str, list[Any]]:
        """The lines that a commit hands over. Those of which was told before are handed over at once: the file before
        held them, as an earlier version made it."""
        kept = {}
        for (kind, (first, lines)), shown in zip(added.items(), self._shown, strict=True):
            own = max(0, shown - first)
            for start in range(0, own, BATCH):
                batch = [self._seal(line) for line in lines[start : min(own, start + BATCH)]]
                self._link.call("keep", records={kind: [first + start, batch]})
            kept[kind] = [first + own, [self._seal(line) for line in lines[own:]]]
        return kept

    def _seal(self, line: bytes) -> str:
        return base64.b64encode(seal(line, self.key)).decode()

    def beginning(self, instruction: Instruction, parts: Sequence[Part]) -> tuple[str, int] | None:
        """The SHA-256 of the instruction's content, which has these parts, and a duplicate of the last commit's file,
        if that begins with just this content; else None."""
        if self._held is None or not instruction.model or instruction.model != self._held[0].digest:
            return None
        kept, file = self._held
        payload = instruction.payload
        alone = set(payload.vectors) == {"shared"} and not payload.statistics
        if not alone and not (
            payload.vectors.get("control") is kept.control and _same(payload.statistics, kept.statistics)
        ):
            return None
        if alone:  # the content is the model
            return instruction.model, os.dup(file)
        digest, sha = self._named
        if digest != instruction.model:  # another process named it
            return None
        sha = sha.copy()
        for part, view in parts:
            if part["name"] != "shared" or part["place"] != "vector":
                sha.update(view)
        return sha.hexdigest(), os.dup(file)

    def _keep(self, state: RunState, file: int) -> None:
        if self._held is not None:
            os.close(self._held[1])
        self._held = (replace(state, model=_NOTHING, optimizer={}, best=None), file)


class LinkClients:
    """`Clients` behind the server's site door. spool: where content files without a name are made."""

    def __init__(self, link: Link, commits: LinkCommits, spool: Path, clock: Callable[[], float]) -> None:
        self._link, self._commits, self._spool, self._clock = link, commits, spool, clock
        self._refused: dict[str, str] = {}
        self._open = 0
        self._begun: Asked | None = None
        self._maps: dict[str, weakref.ref[mmap.mmap]] = {}  # of the answers to the last exchange, by site
        self._asked = (0.0, 0.0)  # by the clock, and by one that nobody sets

    def sites(self) -> Sequence[str]:
        return [str(site) for site in self._link.call("sites")["sites"]]

    def interrupted(self) -> Asked | None:
        """What the run asked last and did not commit, as far as it was kept."""
        found = self._link.call("interrupted")["asked"]
        return Asked.parse(found) if found is not None else None

    def begins(self, asked: Asked) -> None:
        """Said with the next `ask`."""
        self._begun = asked

    def ask(self, sites: Sequence[str], instruction: Instruction) -> None:
        parts = contents(instruction)
        sha256, file = self._commits.beginning(instruction, parts) or self._written(parts)
        about = [part for part, _ in parts]
        headers = {site: header_of(instruction.to(site), about, sha256).decode() for site in sites}
        del parts
        try:
            done = [site for site, one in self._maps.items() if one() is None]
            self._maps.clear()
            asked = self._begun.document() if self._begun is not None else None
            reply = self._link.call(
                "ask", [] if file is None else [file], headers=headers, asked=asked, done=done
            )
        finally:
            if file is not None:
                os.close(file)
        self._asked = (self._clock(), time.monotonic())
        self._refused = {str(site): str(why) for site, why in reply["refused"].items()}
        self._open = len(sites) - len(self._refused)

    def _written(self, parts: Sequence[Part]) -> tuple[str, int | None]:
        """SHA-256 and file of the content; the file is None where there is no content."""
        sha = hashlib.sha256()
        for _, view in parts:
            sha.update(view)
        if not parts:
            return sha.hexdigest(), None
        file = nameless(self._spool)
        write_early(file, sealing([view for _, view in parts], self._commits.key))
        return sha.hexdigest(), file

    def answers(self, deadline: float) -> Iterator[Answer | Block]:
        if self._refused:
            yield Block((), self._refused, None)
        asked, since = self._asked  # so that a clock that is set meanwhile neither ends nor lengthens a round
        while self._open:
            left = deadline - asked - (time.monotonic() - since)
            reply, file = self._link.call_for_file("answers", seconds=max(0.0, left))
            if "site" not in reply:
                return
            self._open -= 1
            site = str(reply["site"])
            if "reason" in reply:
                found: Answer | str = str(reply["reason"])
            else:
                found = _answer(site, str(reply["header"]), self._mapped(site, file))
            yield found if isinstance(found, Answer) else Block((), {site: found}, None)

    def _mapped(self, site: str, file: int | None) -> memoryview:
        """The content of a site's answer in a file, which is closed. That it is mapped is remembered: once nobody
        refers to it any more, the server may write the file over."""
        if file is None:
            return memoryview(b"")
        try:
            size = os.fstat(file).st_size
            if not size:
                return memoryview(b"")
            mapping = mmap.mmap(file, size, access=mmap.ACCESS_READ)
            self._maps[site] = weakref.ref(mapping)
            return memoryview(mapping)
        finally:
            os.close(file)

    def wait(self, sites: Sequence[str]) -> bool:
        return bool(self._link.call("wait", sites=list(sites))["more"])


def _same(some: Statistics, others: Statistics) -> bool:
    """Whether two tables have the same bytes, as they travel and as they are kept."""
    if list(others) != sorted(others):  # in a message they are sorted, in a commit as they came
        return False
    return some.keys() == others.keys() and all(
        some[name].dtype == others[name].dtype == np.dtype("<f8")
        and some[name].shape == others[name].shape
        and some[name].tobytes() == others[name].tobytes()
        for name in some
    )


def nameless(folder: Path) -> int:
    """A new file on the disk of `folder` of which nothing is left when it is closed."""
    return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)


def _answer(site: str, header: str, content: memoryview) -> Answer | str:
    """A site's answer, its vectors views of `content`; or why it is none. It was hashed before."""
    try:
        answer = assemble(parse(header.encode()), content)
    except IntegrityError as error:
        return str(error)
    if not isinstance(answer, Answer):
        return "sends an instruction in place of an answer"
    return answer if answer.site == site else "answers in the name of another site"
