"""A run's state as one file, exact to the last bit: raw arrays one after the other, then a document that names them.

    model | control | statistics | other arrays
        | document (JSON) | its length, 8 bytes big-endian | "CSCP"

The document holds each part's place, dtype, shape and SHA-256, so the SHA-256 of the document, which `Writer.write`
returns, vouches for the whole file. It begins as the content of the next instruction does, so that it serves as that,
too. Nothing is ever pickled; arrays are little-endian. On disk all of this is encrypted
(`protocol/sealed.py`) under the run's own key.

Records of rounds and evaluations are lines of JSON beside the file: a commit adds its own, and the document names how
many there are by then, and the SHA-256 of all of them, so a round costs the same after ten rounds as after ten
thousand. Lines beyond that number are of a commit that never was. Files of format 1 hold the lines themselves.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from consortium.protocol.errors import ConsortiumError, IntegrityError
from consortium.protocol.files import write_early
from consortium.protocol.layout import Vector
from consortium.protocol.sealed import DataKey, Piece, Sealed, Sealer, is_sealed
from consortium.server.records import Evaluation, Past, Round, RunState

FORMAT = 2
CHUNK = 1 << 20
"""Bytes that are written or hashed at a time."""
MAX_DOCUMENT = 1 << 28

_MAGIC = b"CSCP"
_TRAILER = 8 + len(_MAGIC)
_KINDS = "fiub"
T = TypeVar("T")

Named = tuple[str, str, NDArray[Any], str]
"""Place, name, array, and its SHA-256 where that is known already, else ""."""


History = Callable[[str, int], Iterator[bytes]]
"""Of the lines of a kind (of `HISTORIES`) that are kept beside a run's files, so many from the first on, or fewer where
there are not so many."""
HISTORIES = "rounds", "evaluations"


class Added(NamedTuple):
    """Lines that a commit adds to those of their kind. first: the place of the first of them, from 0."""

    first: int
    lines: Sequence[bytes]


class Written(NamedTuple):
    """sha256: of the document (hex). added: by kind, lines that are to be kept before the file counts."""

    sha256: str
    added: Mapping[str, Added]


class _Kept:
    """How many lines of a kind are kept, and the hash of all of them."""

    def __init__(self, count: int = 0, sha: Any = None) -> None:
        self.count, self.sha = count, sha if sha is not None else hashlib.sha256()

    def and_more(self, lines: Sequence[bytes]) -> _Kept:
        sha = self.sha.copy()
        for line in lines:
            sha.update(line)
        return _Kept(self.count + len(lines), sha)


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


def _nothing(kind: str, count: int) -> Iterator[bytes]:
    return iter(())


class Writer:
    """Reads the state of one run, and writes those that continue it: records that are kept already are not touched.

    key: what files are encrypted under; without one they are not. history: the lines that are kept.
    """

    def __init__(self, run: str, key: DataKey | None = None, history: History = _nothing) -> None:
        self._run, self._key, self._history = run, key, history
        self._kept = {kind: _Kept() for kind in HISTORIES}
        self._next = self._kept

    def begin(self, model: Vector, file: int) -> Begun:
        """Write the model, with which every state begins, into the empty file `file`, a descriptor; for any thread.

        Raises:
            OSError: the disk is full, and the like.
        """
        begun = Begun(model, file, Sealer(self._key) if self._key is not None else None)
        begun.put(_bytes(_checked("the model", model)))
        return begun

    def write(self, state: RunState, file: int, begun: Begun | None = None) -> Written:
        """Write `state` into the empty file `file`, a descriptor.

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
        views: list[Piece] = []
        place = 0
        for kind, name, array, known in _arrays(state):
            view = _bytes(array)
            sha = known or hashlib.sha256(view).hexdigest()
            about = {"place": kind, "name": name, "dtype": array.dtype.str, "shape": list(array.shape)}
            parts.append({**about, "start": place, "sha256": sha})
            if kind != "model":
                views.append(view)
            place += len(view)
        rounds, evaluations = (self._kept[kind].count for kind in HISTORIES)
        added = {
            "rounds": Added(rounds, [_line(_round_document(one)) for one in state.rounds[rounds:]]),
            "evaluations": Added(
                evaluations, [_line(_evaluation_document(one)) for one in state.evaluations[evaluations:]]
            ),
        }
        self._next = {kind: self._kept[kind].and_more(more.lines) for kind, more in added.items()}
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
            "history": {kind: [one.count, one.sha.hexdigest()] for kind, one in self._next.items()},
        }
        content = json.dumps(document, separators=(",", ":")).encode()
        for piece in (*views, content, len(content).to_bytes(8, "big") + _MAGIC):
            begun.put(piece)
        begun.end()
        return Written(hashlib.sha256(content).hexdigest(), added)

    def put_away(self, state: RunState) -> RunState:
        """`state`, which was written last and committed: of its records only the latest of each kind are in memory."""
        self._kept = self._next
        return replace(
            state,
            rounds=self._past("rounds", _round, state.rounds[-1:]),
            evaluations=self._past("evaluations", _evaluation, state.evaluations[-1:]),
        )

    def read(self, file: int, sha256: str) -> RunState:
        """The state in a file, whose document has this SHA-256; what is written from now on continues it. Arrays are
        read-only; those of a file that is not encrypted are mapped.

        Raises:
            IntegrityError: file or lines are not what was written, or the key is not theirs.
        """
        key = self._key
        try:
            if key is not None and is_sealed(file):
                whole = memoryview(Sealed(file, key, "its file").read()).toreadonly()
            else:
                whole = memoryview(mmap.mmap(file, os.fstat(file).st_size, access=mmap.ACCESS_READ))
            document, end = _document(whole, sha256)
            if document["format"] not in (1, FORMAT) or document["run"] != self._run:
                raise IntegrityError("it is of another run or format")
            found = {(part["place"], part["name"]): _part(whole[:end], part) for part in document["parts"]}
            state = _state(document, found)
            if document["format"] == 1:
                rounds, evaluations = (_lines(found[kind, ""]) for kind in HISTORIES)
                return replace(
                    state, rounds=tuple(map(_round, rounds)), evaluations=tuple(map(_evaluation, evaluations))
                )
            last = {kind: self._checked(kind, *document["history"][kind]) for kind in HISTORIES}
            return replace(
                state,
                rounds=self._past("rounds", _round, map(_round, last["rounds"])),
                evaluations=self._past("evaluations", _evaluation, map(_evaluation, last["evaluations"])),
            )
        except IntegrityError as error:
            raise IntegrityError(f"the checkpoint is damaged: {error}") from error
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise IntegrityError(
                f"the checkpoint is damaged: its document is malformed ({type(error).__name__})"
            ) from error

    def _checked(self, kind: str, count: int, sha256: str) -> list[Any]:
        """The last line of a kind, if any, once all that are kept were found as the document has them."""
        count, kept, line = int(count), _Kept(), b""
        for line in self._history(kind, count):
            kept = kept.and_more([line])
        if kept.count != count:
            raise IntegrityError(f"of the records of its {kind} {kept.count} of {count} are there")
        if kept.sha.hexdigest() != sha256:
            raise IntegrityError(f"the records of its {kind} are not those that were committed")
        self._kept = self._next = {**self._kept, kind: kept}
        return [json.loads(line)] if count else []

    def _past(self, kind: str, record: Callable[[Any], T], last: Iterable[T]) -> Past[T]:
        """All records of a kind that are kept. last: the latest."""
        latest, history = tuple(last), self._history
        count = self._kept[kind].count - len(latest)

        def earlier() -> Iterator[T]:
            found = 0
            for line in history(kind, count):
                found += 1
                yield record(json.loads(line))
            if found != count:
                raise IntegrityError(
                    f"of the records of run '{self._run}' ({kind}) {found} of {count} are there"
                )

        return Past(earlier, count, latest)


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
