"""A run's state as one file, exact to the last bit: raw arrays one after the other, then a document that names them.

    model | control | statistics | other arrays | lines of rounds, of evaluations
        | document (JSON) | its length, 8 bytes big-endian | "CSCP"

The document holds each part's place, dtype, shape and SHA-256, so the SHA-256 of the document, which `Writer.write`
returns, vouches for the whole file. It begins as the content of the next instruction does, so that it serves as that,
too. Nothing is ever pickled; arrays are little-endian. On disk all of this is encrypted
(`protocol/sealed.py`) under the run's own key.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from consortium.protocol.errors import ConsortiumError, IntegrityError
from consortium.protocol.files import write_early
from consortium.protocol.layout import Vector
from consortium.protocol.sealed import DataKey, Piece, Sealed, Sealer, is_sealed
from consortium.server.records import Evaluation, Past, Round, RunState

FORMAT = 1
CHUNK = 1 << 20
"""Bytes that are written or hashed at a time."""
MAX_DOCUMENT = 1 << 28

_MAGIC = b"CSCP"
_TRAILER = 8 + len(_MAGIC)
_KINDS = "fiub"
T = TypeVar("T")

Named = tuple[str, str, NDArray[Any], str]
"""Place, name, array, and its SHA-256 where that is known already, else ""."""


class _More(NamedTuple):
    """What a file is to hold of one kind of record.

    about: its part in the document, without its place. length: bytes. lines: how many. sha: of all of them.
    """

    about: Mapping[str, Any]
    pieces: Iterable[Piece]
    length: int
    lines: int
    sha: Any


class _Lines(Generic[T]):
    """The lines of one kind of record in a checkpoint file that stays open: in memory they would grow with the run."""

    def __init__(self, file: _File, start: int, held: _More, record: Callable[[Any], T]) -> None:
        self._file, self._start, self._record = file, start, record
        self.length, self.count, self.sha = held.length, held.lines, held.sha

    def pieces(self) -> Iterator[memoryview]:
        return self._file.pieces(self._start, self._start + self.length)

    def records(self) -> Iterator[T]:
        left = b""
        for piece in self.pieces():
            *lines, left = (left + bytes(piece)).split(b"\n")
            for line in lines:
                yield self._record(json.loads(line))


class _File:
    """A duplicate of a descriptor, closed when nobody refers to it any more."""

    def __init__(self, fd: int, key: DataKey | None) -> None:
        self._fd, self._key = os.dup(fd), key
        self._closed = weakref.finalize(self, os.close, self._fd)

    def pieces(self, start: int, stop: int) -> Iterator[memoryview]:
        if self._key is not None:
            yield from Sealed(self._fd, self._key, "the checkpoint").pieces(start, stop)
            return
        while start < stop:
            piece = os.pread(self._fd, min(CHUNK, stop - start), start)
            if not piece:
                raise IntegrityError("the last checkpoint is shorter than it was; start the server again")
            yield memoryview(piece)
            start += len(piece)


class Begun:
    """A file that is being written, of which `model` is the beginning."""

    def __init__(self, model: Vector, file: int, sealer: Sealer | None) -> None:
        self.model, self.file = model, file
        self._sealer, self._place = sealer, 0

    def put(self, content: Piece) -> None:
        """Add content. Raises OSError: the disk is full, and the like."""
        pieces = self._sealer.take(content) if self._sealer is not None else [content]
        self._place = write_early(self.file, pieces, self._place)

    def end(self) -> None:
        """Add what is left of it."""
        if self._sealer is not None:
            self._place = write_early(self.file, [self._sealer.end()], self._place)


class Writer:
    """Writes states of one run, each of which continues the one before: records are encoded once, and copied from the
    file before from then on.

    key: what files are encrypted under; without one they are not.
    """

    def __init__(self, run: str, key: DataKey | None = None) -> None:
        self._run, self._key = run, key
        self._rounds: _Lines[Round] | None = None
        self._evaluations: _Lines[Evaluation] | None = None

    def begin(self, model: Vector, file: int) -> Begun:
        """Write the model, with which every state begins, into the empty file `file`, a descriptor; for any thread.

        Raises:
            OSError: the disk is full, and the like.
        """
        begun = Begun(model, file, Sealer(self._key) if self._key is not None else None)
        begun.put(_bytes(_checked("the model", model)))
        return begun

    def write(self, state: RunState, file: int, begun: Begun | None = None) -> str:
        """Write `state` into the empty file `file`, a descriptor; returns the SHA-256 (hex) of its document.

        begun: what was written of it already, where the file is not empty any more.

        `state.digest` and that of the best evaluation are taken for what they say, and so not computed again.

        Raises:
            ConsortiumError: the strategy keeps something else than arrays of numbers.
            OSError: the disk is full, and the like.
        """
        begun = begun or self.begin(state.model, file)
        assert begun.model is state.model
        assert begun.file == file
        parts: list[dict[str, Any]] = []
        pieces: list[Iterable[Piece]] = []
        place = 0
        for kind, name, array, known in _arrays(state):
            view = _bytes(array)
            sha = known or hashlib.sha256(view).hexdigest()
            about = {"place": kind, "name": name, "dtype": array.dtype.str, "shape": list(array.shape)}
            parts.append({**about, "start": place, "sha256": sha})
            if kind != "model":
                pieces.append([view])
            place += len(view)
        rounds = _more(self._rounds, "rounds", state.rounds, _round_document)
        evaluations = _more(self._evaluations, "evaluations", state.evaluations, _evaluation_document)
        starts = place, place + rounds.length
        for lines, start in zip((rounds, evaluations), starts, strict=True):
            parts.append({**lines.about, "start": start})
            pieces.append(lines.pieces)
        best = None
        if state.best is not None:
            own = any(part["place"] == "best" for part in parts)
            best = {"evaluation": _evaluation_document(state.best[0]), "own": own}
        document = {
            "format": FORMAT,
            "run": self._run,
            "round": state.round,
            "attempt": state.attempt,
            "digest": state.digest,
            "counted": dict(state.counted),
            "best": best,
            "parts": parts,
        }
        content = json.dumps(document, separators=(",", ":")).encode()
        pieces.append([content, len(content).to_bytes(8, "big") + _MAGIC])
        for piece in chain.from_iterable(pieces):
            begun.put(piece)
        begun.end()
        held = _File(file, self._key)
        self._rounds = _Lines(held, starts[0], rounds, _round)
        self._evaluations = _Lines(held, starts[1], evaluations, _evaluation)
        return hashlib.sha256(content).hexdigest()

    def put_away(self, state: RunState) -> RunState:
        """`state`, which was written last, with its records in that file but for the latest of each kind."""
        rounds, evaluations = self._rounds, self._evaluations
        assert rounds is not None
        assert evaluations is not None
        return replace(
            state,
            rounds=_past(rounds, state.rounds),
            evaluations=_past(evaluations, state.evaluations),
        )


def _past(lines: _Lines[T], records: Sequence[T]) -> Sequence[T]:
    assert lines.count == len(records)
    last = tuple(records[-1:])
    return Past(lines.records, len(records) - len(last), last)


def _more(
    before: _Lines[T] | None, kind: str, records: Sequence[T], document: Callable[[T], dict[str, Any]]
) -> _More:
    """The lines of the file before, and those of the records since."""
    count = before.count if before is not None else 0
    new = b"".join(_line(document(one)) for one in records[count:])
    length = (before.length if before is not None else 0) + len(new)
    sha = before.sha.copy() if before is not None else hashlib.sha256()
    sha.update(new)
    about = {"place": kind, "name": "", "dtype": "|u1", "shape": [length], "sha256": sha.hexdigest()}
    pieces: Iterable[Piece] = chain[Piece](before.pieces() if before is not None else (), [new])
    return _More(about, pieces, length, len(records), sha)


def read(file: int, sha256: str, run: str, key: DataKey | None = None) -> RunState:
    """The state of `run` in a file, whose document has this SHA-256. Arrays are read-only; those of a file that is not
    encrypted, as earlier versions left it, are mapped.

    Raises:
        IntegrityError: it is not what was written, or the key is not its.
    """
    try:
        if key is not None and is_sealed(file):
            whole = memoryview(Sealed(file, key, "its file").read()).toreadonly()
        else:
            whole = memoryview(mmap.mmap(file, os.fstat(file).st_size, access=mmap.ACCESS_READ))
        document, end = _document(whole, sha256)
        if document["format"] != FORMAT or document["run"] != run:
            raise IntegrityError("it is of another run or format")
        found = {(part["place"], part["name"]): _part(whole[:end], part) for part in document["parts"]}
        return _state(document, found)
    except IntegrityError as error:
        raise IntegrityError(f"the checkpoint is damaged: {error}") from error
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise IntegrityError(
            f"the checkpoint is damaged: its document is malformed ({type(error).__name__})"
        ) from error


def _arrays(state: RunState) -> Iterator[Named]:
    yield "model", "", _checked("the model", state.model), state.digest
    if state.control is not None:
        yield "control", "", _checked("the control variate", state.control), ""
    for name, values in state.statistics.items():
        yield "statistic", name, _checked(f"statistic '{name}'", values), ""
    for name, array in state.optimizer.items():
        yield "optimizer", name, _checked(f"the server optimizer's '{name}'", array), ""
    if state.best is not None and state.best[0].model != state.digest:
        yield "best", "", _checked("the best model", state.best[1]), state.best[0].model


def _checked(what: str, array: object) -> NDArray[Any]:
    """The array in little-endian order."""
    if not isinstance(array, np.ndarray | np.generic) or array.dtype.kind not in _KINDS:
        raise ConsortiumError(
            f"{what} is {type(array).__name__}, which cannot be kept; numpy arrays of numbers would be right"
        )
    little = np.asarray(array)
    return little.astype(little.dtype.newbyteorder("<"), copy=False)


def _bytes(array: NDArray[Any]) -> memoryview:
    if not array.size:
        return memoryview(b"")
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _document(whole: memoryview, sha256: str) -> tuple[dict[str, Any], int]:
    """The document, and where it begins."""
    trailer = whole[-_TRAILER:]
    length = int.from_bytes(trailer[:8], "big")
    start = len(whole) - _TRAILER - length
    if trailer[8:] != _MAGIC or start < 0 or length > MAX_DOCUMENT:
        raise IntegrityError("it does not end as it was written")
    content = bytes(whole[start : start + length])
    if hashlib.sha256(content).hexdigest() != sha256:
        raise IntegrityError("its SHA-256 is not the one that was committed")
    document = json.loads(content)
    if not isinstance(document, dict):
        raise IntegrityError("its document is none")
    return document, start


def _part(whole: memoryview, part: Mapping[str, Any]) -> NDArray[Any]:
    dtype, shape, start = np.dtype(part["dtype"]), tuple(part["shape"]), part["start"]
    end = start + math.prod(shape) * dtype.itemsize
    if dtype.kind not in _KINDS or not 0 <= start <= end <= len(whole):
        raise IntegrityError("a part lies outside of it")
    view, sha = whole[start:end], hashlib.sha256()
    for place in range(0, len(view), CHUNK):
        sha.update(view[place : place + CHUNK])
    if sha.hexdigest() != part["sha256"]:
        raise IntegrityError(f"the SHA-256 of its part '{part['place']}' is not the one that was committed")
    array = np.frombuffer(view, dtype).reshape(shape)
    return array if array.flags.aligned else array.copy()


def _state(document: Mapping[str, Any], found: Mapping[tuple[str, str], NDArray[Any]]) -> RunState:
    def of(place: str) -> dict[str, NDArray[Any]]:
        return {name: array for (kind, name), array in found.items() if kind == place}

    model, best = found["model", ""], document["best"]
    return RunState(
        round=int(document["round"]),
        attempt=int(document["attempt"]),
        model=model,
        digest=str(document["digest"]),
        control=found.get(("control", "")),
        optimizer=of("optimizer"),
        statistics=of("statistic"),
        counted={site: int(number) for site, number in document["counted"].items()},
        rounds=tuple(_round(one) for one in _lines(found["rounds", ""])),
        evaluations=tuple(_evaluation(one) for one in _lines(found["evaluations", ""])),
        best=best and (_evaluation(best["evaluation"]), found["best", ""] if best["own"] else model),
    )


def _line(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode() + b"\n"


def _lines(array: NDArray[Any]) -> list[Any]:
    return [json.loads(line) for line in array.tobytes().splitlines()]


def _number(value: float) -> float | str:
    """A float as JSON has it; what is no number as a word."""
    return value if math.isfinite(value) else repr(float(value))


def _numbers(values: Mapping[str, float]) -> dict[str, float | str]:
    return {name: _number(value) for name, value in values.items()}


def _floats(values: Mapping[str, float | str]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}


def _round_document(one: Round) -> dict[str, Any]:
    return {
        "round": one.round,
        "attempt": one.attempt,
        "asked": one.asked,
        "admitted": _numbers(one.admitted),
        "left_out": dict(one.left_out),
        "model": one.model,
        "seconds": _number(one.seconds),
        "void": one.void,
        "unseen": one.unseen,
        "aside": dict(one.aside),
        "notes": dict(one.notes),
        "updates": dict(one.updates),
        **({"drawn_from": one.drawn_from} if one.drawn_from else {}),
    }


def _round(document: Mapping[str, Any]) -> Round:
    return Round(
        round=document["round"],
        attempt=document["attempt"],
        asked=tuple(document["asked"]),
        admitted=_floats(document["admitted"]),
        left_out=document["left_out"],
        model=document["model"],
        seconds=float(document["seconds"]),
        void=document["void"],
        unseen=document.get("unseen", 0),
        aside=document.get("aside", {}),
        notes=document.get("notes", {}),
        updates=document.get("updates", {}),
        drawn_from=tuple(document.get("drawn_from", ())),
    )


def _evaluation_document(one: Evaluation) -> dict[str, Any]:
    sites = {site: _numbers(values) for site, values in one.sites.items()}
    return {
        "round": one.round,
        "model": one.model,
        "pooled": _numbers(one.pooled),
        "sites": sites,
        "reliability": one.reliability,
    }


def _evaluation(document: Mapping[str, Any]) -> Evaluation:
    return Evaluation(
        round=document["round"],
        model=document["model"],
        pooled=_floats(document["pooled"]),
        sites={site: _floats(values) for site, values in document["sites"].items()},
        reliability=tuple((float(n), float(k), float(p)) for n, k, p in document.get("reliability", ())),
    )
