"""What a site keeps on disk for one run: its memory, and its last answer.

Both are one file, replaced whole: after a crash at any moment the site has either done an instruction, and gives the
same answer again without computing it, or it has not.

    content of the answer | arrays of the memory | document (JSON) | its length, 8 bytes big-endian | "CSKA"

encrypted under the run's own key (`protocol/sealed.py`). The content stands first, and is hashed while it is written:
the file is also what the agent sends. The document holds the answer's header and names the arrays. Numbers are
little-endian; nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from consortium.client.site import Memory
from consortium.protocol.errors import IntegrityError, RefusedError
from consortium.protocol.files import private_folder, write_pieces
from consortium.protocol.layout import Vector
from consortium.protocol.messages import (
    Answer,
    Instruction,
    Payload,
    assemble,
    canonical,
    contents,
    encode,
    header_of,
    parse,
    readdressed,
)
from consortium.protocol.sealed import DataKey, Sealed, sealing

FORMAT = 2
MOST_GIVEN = 256
"""What came before is older than what the site accepts (`client/seen.py`)."""
PIECE = 8 << 20
"""Bytes that are hashed and then written at a time: they are still in the processor's cache."""
MAX_DOCUMENT = 1 << 24
"""Bytes; the header of an answer is most of it."""

_MAGIC = b"CSKA"
_TRAILER = 8 + len(_MAGIC)


@dataclass(frozen=True)
class Kept:
    """A site's memory in one run, and the last answer that it gave there.

    last: with its content where it was loaded, without where it was just saved.
    given: what it answered so far, the latest last, at most `MOST_GIVEN`: question and the answer's `fingerprint`. The
        last answer is among them once it is saved.
    header: of the last answer, as it was saved. asked: the `asked_for` of what it answers, "" where that is not kept.
    """

    memory: Memory = field(default_factory=Memory)
    last: Answer | None = None
    given: tuple[tuple[Question, str], ...] = ()
    header: bytes = b""
    asked: str = ""

    def answer_to(self, instruction: Instruction, content: str = "") -> Answer | None:
        """The answer that was given to this very question before, with the nonce of now; None if it is new.

        content: where noise makes every answer another release, the `asked_for` of the instruction: a void round that
            is tried again, otherwise the same, gets the answer of the attempt before.

        Raises:
            RefusedError: it was given before the last one, and is not there any more.
        """
        one, asked = self.last, question(instruction)
        if one is not None and one.run == instruction.run and question(one) == asked:
            return replace(one, nonce=instruction.nonce)
        if one is not None and content and content == self.asked and _tried_again(one, instruction):
            return replace(one, nonce=instruction.nonce, attempt=instruction.attempt)
        if any(asked == before for before, _ in self.given):
            raise RefusedError(
                "this was answered before, and something else since; nothing is computed twice"
            )
        return None

    def header_to(self, instruction: Instruction, content: str = "") -> bytes | None:
        """As `answer_to`, as the header that goes with the content in the file."""
        if self.answer_to(instruction, content) is None:
            return None
        return readdressed(self.header, instruction.nonce, instruction.attempt)

    def without_content(self) -> Kept:
        """The same without the last answer's content, for whoever needs its header alone."""
        last = replace(self.last, payload=Payload()) if self.last is not None else None
        return replace(self, last=last)

    def after(self, memory: Memory, answer: Answer, asked: str = "") -> Kept:
        """What is to be saved once `answer` was made, which left the site with `memory`."""
        return Kept(memory, answer, self.given, asked=asked)


Question = tuple[int, int, str, str]
"""Round, attempt, kind, and the digest of the model: what of one run is answered once."""


def question(message: Answer | Instruction) -> Question:
    """What a message of a run asks or answers."""
    return (message.round, message.attempt, message.kind, message.model)


def _tried_again(answer: Answer, instruction: Instruction) -> bool:
    """Whether the instruction is a later attempt at the answer's round of training, from the same model."""
    names = ("run", "round", "kind", "model")
    same = all(getattr(answer, name) == getattr(instruction, name) for name in names)
    return same and instruction.kind == "train" and answer.attempt < instruction.attempt


def asked_for(instruction: Instruction, content: str) -> str:
    """SHA-256 (hex) of all in an instruction that decides what is computed. content: SHA-256 (hex) of its content."""
    about = {
        "study": instruction.study,
        "layout": instruction.layout,
        "admitted": instruction.admitted,
        "content": content,
    }
    return hashlib.sha256(canonical(about)).hexdigest()


def fingerprint(answer: Answer) -> str:
    """SHA-256 (hex) of an answer, whatever the nonce that it carries."""
    return _fingerprint(encode(answer)[0])


def _fingerprint(header: bytes) -> str:
    return hashlib.sha256(readdressed(header, "")).hexdigest()


class Store:
    """The file of one site and one run in `folder`, which is made where it is missing.

    key: what it is encrypted under; without one it is not. epoch: of the server (`protocol/epoch.py`); answers of an
    earlier one are not given again, since what was asked for then is forgotten there.
    """

    def __init__(self, folder: Path, run: str, key: DataKey | None = None, epoch: int = 0) -> None:
        self._key, self._epoch = key, epoch
        # A run's name comes from the server, so it is no part of a path.
        self._path = folder / f"{hashlib.sha256(run.encode()).hexdigest()[:32]}.kept"

    def open(self) -> int:
        """A descriptor of the file, to read: it begins with the content of the last answer."""
        return os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)

    def load(self) -> Kept:
        """What was kept; nothing where the run is new here.

        Raises:
            IntegrityError: the file is damaged, or the key is not its.
        """
        try:
            file = self.open()
        except FileNotFoundError:
            return Kept()
        except OSError as error:
            raise self._damaged(error) from error
        try:
            return _read(self._whole(file), self._epoch)
        except (KeyError, TypeError, ValueError, IntegrityError) as error:
            raise self._damaged(error) from error
        finally:
            os.close(file)

    def _whole(self, file: int) -> memoryview:
        if self._key is not None:
            return memoryview(Sealed(file, self._key, "the file").read()).toreadonly()
        return memoryview(mmap.mmap(file, 0, access=mmap.ACCESS_READ))

    def _damaged(self, error: Exception) -> IntegrityError:
        why = str(error) if isinstance(error, IntegrityError) else type(error).__name__
        return IntegrityError(
            f"{self._path}: is damaged ({why}); move it away to take part without this state"
        )

    def save(self, kept: Kept) -> Kept:
        """Keep `kept`, which has an answer, in place of what was there; returns when it would survive.

        What it gives holds no array of the answer.

        Raises:
            OSError: the disk is full, and the like; what was there is untouched then.
        """
        assert kept.last is not None
        private_folder(self._path.parent)
        content = _Content(kept, self._epoch)
        pieces = content.pieces()
        write_pieces(self._path, sealing(pieces, self._key) if self._key is not None else pieces)
        return Kept(kept.memory, kept.last, content.given, content.header, kept.asked).without_content()


class _Content:
    """What the file holds. given, header: known once all pieces were written."""

    def __init__(self, kept: Kept, epoch: int) -> None:
        self._kept, self._epoch, self.given, self.header = kept, epoch, kept.given, b""

    def pieces(self) -> Iterator[bytes | memoryview]:
        last, memory = self._kept.last, self._kept.memory
        assert last is not None
        parts, sha = contents(last), hashlib.sha256()
        for _, view in parts:
            for start in range(0, len(view), PIECE):
                piece = view[start : start + PIECE]
                sha.update(piece)
                yield piece
        self.header = header_of(last, [part for part, _ in parts], sha.hexdigest())
        self.given = (*self.given, (question(last), _fingerprint(self.header)))[-MOST_GIVEN:]
        arrays: list[Mapping[str, Any]] = []
        for version, state in (("committed", memory.committed), ("pending", memory.pending)):
            for kind, vector in state.items():
                little = np.ascontiguousarray(vector, vector.dtype.newbyteorder("<"))
                arrays.append(
                    {"version": version, "kind": kind, "dtype": little.dtype.str, "size": little.size}
                )
                yield little.view(np.uint8).data
        document = {
            "format": FORMAT,
            "epoch": self._epoch,
            "pending_round": memory.pending_round,
            "header": self.header.decode(),
            "asked": self._kept.asked,
            "given": [[*asked, sha] for asked, sha in self.given],
            "arrays": arrays,
        }
        content = json.dumps(document, separators=(",", ":")).encode()
        yield content + len(content).to_bytes(8, "big") + _MAGIC


def _read(whole: memoryview, epoch: int) -> Kept:
    trailer = whole[-_TRAILER:]
    length = int.from_bytes(trailer[:8], "big")
    end = len(whole) - _TRAILER - length
    if trailer[8:] != _MAGIC or end < 0 or length > MAX_DOCUMENT:
        raise IntegrityError("it does not end as it was written")
    about = json.loads(bytes(whole[end:-_TRAILER]))
    if about["format"] != FORMAT:
        raise IntegrityError(f"format {about['format']} is not known to this version")
    header = about["header"].encode()
    parsed = parse(header)
    place = parsed.length
    content = whole[:place]
    if place > end or hashlib.sha256(content).hexdigest() != parsed.sha256:
        raise IntegrityError("the answer's SHA-256 is not what its header says")
    last = assemble(parsed, content)
    if not isinstance(last, Answer):
        raise IntegrityError("what was kept is no answer")
    states: dict[str, dict[str, Vector]] = {"committed": {}, "pending": {}}
    for part in about["arrays"]:
        dtype = np.dtype(part["dtype"])
        place, start = place + part["size"] * dtype.itemsize, place
        if place > end:
            raise IntegrityError("an array lies outside of it")
        states[part["version"]][part["kind"]] = np.frombuffer(whole[start:place], dtype).copy()
    memory = Memory(states["committed"], states["pending"], int(about["pending_round"]))
    if about.get("epoch", 0) != epoch:
        return Kept(memory)
    given = tuple(((r, a, k, m), sha) for r, a, k, m, sha in about["given"])
    return Kept(memory, last, given, header, str(about.get("asked", "")))
