"""What the server asks of a site, and what comes back.

An `Instruction` goes to a cohort; `Instruction.to(site)` is the copy that one site gets. An `Answer` echoes what
it answers: run, round, attempt, kind and the site's nonce. Both carry a `Payload` of three kinds of content:
vectors of the layout, named float64 statistics (counts, sums, Gram matrices) and opaque bytes.

On the wire a message is its header (canonical JSON: sorted keys, no spaces, one encoding for one meaning) and its
content (the payload's parts one after the other). The header names every part and the SHA-256 of the content, so
whoever signs the header signs the whole. Nothing is ever unpickled. Inside one machine nothing is encoded.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from consortium.protocol.errors import IntegrityError
from consortium.protocol.layout import Vector

FORMAT = 1
MAX_HEADER = 1 << 20
"""Bytes; a longer header is refused before it is parsed."""

Ask = Literal["train", "evaluate", "query", "judge"]
Statistics = Mapping[str, NDArray[np.float64]]
"""Named float64 arrays. The server only ever adds them up, name by name, in site-name order."""


@dataclass(frozen=True)
class Payload:
    """The content of a message.

    vectors: 1-D arrays by segment kind, `shared` and perhaps `control`, in the layout's dtypes.
    statistics: named float64 arrays.
    opaque: bytes that only the task understands (trees).
    """

    vectors: Mapping[str, Vector] = field(default_factory=dict)
    statistics: Statistics = field(default_factory=dict)
    opaque: bytes = b""


@dataclass(frozen=True)
class Instruction:
    """One thing to do, for a cohort (`site` empty) or for one site.

    federation, run: durable names, never Flower's.
    round: 1 for the first; the final evaluation and queries before round 1 carry the round they belong to.
    attempt: 0, then 1, 2 ... when a void round is tried again.
    study: SHA-256 (hex) of the study as approved.
    kind: `judge` asks for counts of an exported model, whose ONNX file is the opaque content.
    model: digest of the model in `payload`, empty where there is none; of a file to judge, its SHA-256 (hex).
    layout: `Layout.digest`.
    nonce: 32 random bytes in hex; each site gets its own, derived from it.
    expires: seconds since the epoch after which the site must not act on it.
    admitted: the last round in which this site's answer counted, 0 for none: its pending state of that round
        becomes its state, any other pending state is dropped.
    counted: the same for the whole cohort, by site; only on the copy that has no site.
    """

    federation: str
    run: str
    round: int
    attempt: int
    kind: Ask
    study: str
    model: str
    layout: str
    nonce: str
    expires: float
    payload: Payload = field(default_factory=Payload)
    site: str = ""
    admitted: int = 0
    counted: Mapping[str, int] = field(default_factory=dict)

    def to(self, site: str) -> Instruction:
        """The copy for one site, with that site's own nonce, so that no site can answer for another."""
        admitted = self.counted.get(site, 0)
        return changed(self, nonce=self.nonce_for(site), site=site, admitted=admitted, counted=_NOBODY)

    def nonce_for(self, site: str) -> str:
        """The nonce that `site` must echo: SHA-256 of the cohort's nonce and the site's name."""
        return nonce_for(self.nonce, site)


def nonce_for(nonce: str, site: str) -> str:
    """The nonce of one site of a cohort that has `nonce`."""
    return hashlib.sha256(f"{nonce}|{site}".encode()).hexdigest()


@dataclass(frozen=True)
class Answer:
    """What one site sends back for one instruction.

    status: "done", or "declined" with a `reason` that the admin may read.
    weight: how much the update counts before the study's cap, usually the number of examples; >= 0.
    metrics: counts from which metrics of the *received* model are computed; empty where the site has no holdout.
    sha256: (hex) of the content as it came over the wire, "" where nothing did; no part of what is encoded.
    """

    run: str
    round: int
    attempt: int
    kind: Ask
    site: str
    nonce: str
    model: str
    status: Literal["done", "declined"] = "done"
    reason: str = ""
    weight: float = 0.0
    payload: Payload = field(default_factory=Payload)
    metrics: Statistics = field(default_factory=dict)
    sha256: str = field(default="", compare=False)

    @staticmethod
    def to_instruction(instruction: Instruction, **values: Any) -> Answer:
        """An answer to `instruction` as one site received it."""
        return Answer(
            run=instruction.run,
            round=instruction.round,
            attempt=instruction.attempt,
            kind=instruction.kind,
            site=instruction.site,
            nonce=instruction.nonce,
            model=instruction.model,
            **values,
        )


Message = Instruction | Answer
_NOBODY: Mapping[str, int] = {}
M = TypeVar("M", Instruction, Answer)


def changed(message: M, **values: Any) -> M:
    """`dataclasses.replace` in a fifth of the time: a simulation makes two messages for every client."""
    copy: M = object.__new__(type(message))
    copy.__dict__.update(message.__dict__, **values)
    return copy


_DTYPES = {"vector": ("<f4", "<f8"), "statistic": ("<f8",), "metric": ("<f8",), "opaque": ("|u1",)}


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
    place: Literal["vector", "statistic", "metric", "opaque"]
    name: str = Field(max_length=200)
    dtype: Literal["<f4", "<f8", "|u1"]
    shape: list[int] = Field(max_length=8)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    @property
    def sound(self) -> bool:
        """Whether it is of its place's dtype, and a size that an array can have, zeros among the dimensions too."""
        if self.place == "opaque" and (self.name or len(self.shape) != 1):
            return False
        sized = all(n >= 0 for n in self.shape) and math.prod(max(n, 1) for n in self.shape) < 2**48
        return sized and self.dtype in _DTYPES[self.place]


class Header(BaseModel):
    """The header as it is on the wire; strict, so that one meaning has one encoding."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)
    format: Literal[1]
    type: Literal["instruction", "answer"]
    fields: dict[str, str | int | float]
    parts: list[_Part] = Field(max_length=4096)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")

    @property
    def length(self) -> int:
        """Bytes of the content."""
        return sum(part.nbytes for part in self.parts)


def canonical(document: Mapping[str, Any]) -> bytes:
    """Canonical JSON: sorted keys, no spaces, UTF-8, shortest round-trip floats, no NaN or infinity."""
    return json.dumps(
        document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


_FIELDS: dict[str, dict[str, type]] = {
    "instruction": {
        "federation": str, "run": str, "round": int, "attempt": int, "kind": str, "study": str, "model": str,
        "layout": str, "nonce": str, "expires": float, "site": str, "admitted": int,
    },
    "answer": {
        "run": str, "round": int, "attempt": int, "kind": str, "site": str, "nonce": str, "model": str,
        "status": str, "reason": str, "weight": float,
    },
}  # fmt: skip


def encode(message: Message) -> tuple[bytes, list[memoryview]]:
    """Header bytes and content parts of a message.

    The parts are views, in order; whoever sends them may join or stream them.
    """
    parts = contents(message)
    sha = hashlib.sha256()
    for _, view in parts:
        sha.update(view)
    return header_of(message, [part for part, _ in parts], sha.hexdigest()), [view for _, view in parts]


def contents(message: Message) -> list[tuple[dict[str, Any], memoryview]]:
    """The parts of a message, as the header describes them and as bytes, in order; for whoever hashes them as they go
    out."""
    parts: list[tuple[dict[str, Any], memoryview]] = []
    for place, name, array in _arrays(message):
        flat = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
        view = flat.reshape(-1).data.cast("B") if flat.size else memoryview(b"")
        part = {"place": place, "name": name, "dtype": flat.dtype.str, "shape": list(array.shape)}
        parts.append((part, view))
    return parts


def header_of(message: Message, parts: Sequence[Mapping[str, Any]], sha256: str) -> bytes:
    """The header of a message whose parts are described so, and whose content has this SHA-256 (hex)."""
    kind = "instruction" if isinstance(message, Instruction) else "answer"
    fields = {name: of(getattr(message, name)) for name, of in _FIELDS[kind].items()}
    return canonical(
        {"format": FORMAT, "type": kind, "fields": fields, "parts": list(parts), "sha256": sha256}
    )


def readdressed(header: bytes, nonce: str, attempt: int | None = None) -> bytes:
    """The header of a message with another nonce, and perhaps of another attempt, for the same content.

    Raises:
        IntegrityError: as `parse`.
    """
    document = parse(header).model_dump()
    fields = {**document["fields"], "nonce": nonce}
    if attempt is not None:
        fields["attempt"] = attempt
    return canonical({**document, "fields": fields})


def _arrays(message: Message) -> list[tuple[str, str, NDArray[Any]]]:
    payload = message.payload
    arrays: list[tuple[str, str, NDArray[Any]]] = []
    arrays += [("vector", n, payload.vectors[n]) for n in ("shared", "control") if n in payload.vectors]
    arrays += [("statistic", n, np.asarray(payload.statistics[n], "<f8")) for n in sorted(payload.statistics)]
    if isinstance(message, Answer):
        arrays += [("metric", n, np.asarray(message.metrics[n], "<f8")) for n in sorted(message.metrics)]
    if payload.opaque:
        arrays.append(("opaque", "", np.frombuffer(payload.opaque, np.uint8)))
    return arrays


def decode(header: bytes, content: bytes | memoryview) -> Message:
    """A message from the wire. Vectors are read-only views of `content`.

    Raises:
        IntegrityError: if the header is not canonical, names another format, or does not describe the content,
            byte for byte.
    """
    parsed = parse(header)
    if len(content) == parsed.length and hashlib.sha256(content).hexdigest() != parsed.sha256:
        raise IntegrityError("message: the content's SHA-256 is not what the header says")
    return assemble(parsed, content)


def assemble(parsed: Header, content: bytes | memoryview) -> Message:
    """As `decode`, for a content that was hashed on its way in and found to be the header's.

    Raises:
        IntegrityError: the content's length is not what the header says.
    """
    content = memoryview(content).cast("B") if len(content) else memoryview(b"")
    if parsed.length != len(content):
        raise IntegrityError("message: the content's length is not what the header says")
    vectors: dict[str, Vector] = {}
    tables: dict[str, dict[str, NDArray[np.float64]]] = {"statistic": {}, "metric": {}}
    opaque, start = b"", 0
    for part in parsed.parts:
        piece = content[start : start + part.nbytes]
        start += part.nbytes
        if part.place == "opaque":
            opaque = bytes(piece)
            continue
        array = np.frombuffer(piece, dtype=part.dtype).reshape(part.shape)
        if part.place == "vector":
            vectors[part.name] = array
        else:
            tables[part.place][part.name] = array
    payload = Payload(vectors, tables["statistic"], opaque)
    fields: dict[str, Any] = dict(parsed.fields)
    if parsed.type == "instruction":
        return Instruction(**fields, payload=payload)
    return Answer(**fields, payload=payload, metrics=tables["metric"], sha256=parsed.sha256)


def parse(header: bytes) -> Header:
    """The header, checked: strict types, known fields, one encoding, sane and unrepeated parts.

    Raises:
        IntegrityError: it is not canonical, or of another format.
    """
    if len(header) > MAX_HEADER:
        raise IntegrityError(f"message: the header has {len(header)} bytes; at most {MAX_HEADER} are read")
    try:
        parsed = Header.model_validate_json(header)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise IntegrityError(f"message: the header is malformed at {place[:80]}: {first['msg']}") from error
    expected = _FIELDS[parsed.type]
    if set(parsed.fields) != set(expected):
        raise IntegrityError(
            f"message: an {parsed.type} has the fields {sorted(expected)}, not those of this header"
        )
    for name, of in expected.items():
        if type(parsed.fields[name]) is not of:
            raise IntegrityError(f"message: field '{name}' should be {of.__name__}")
    if parsed.fields["kind"] not in get_args(Ask):
        raise IntegrityError("message: its kind is not known")
    if parsed.type == "answer" and parsed.fields["status"] not in ("done", "declined"):
        raise IntegrityError("message: its status is not known")
    _check_parts(parsed)
    if canonical(parsed.model_dump()) != header:
        raise IntegrityError("message: the header is not in canonical form")
    return parsed


def _check_parts(parsed: Header) -> None:
    places = [(part.place, part.name) for part in parsed.parts]
    if len(set(places)) != len(places):
        raise IntegrityError("message: a part is named twice")
    for part in parsed.parts:
        if not part.sound or (part.place == "metric" and parsed.type == "instruction"):
            raise IntegrityError(
                f"message: an {parsed.type} has no {part.place} of dtype {part.dtype} and that name and shape"
            )


def sum_statistics(tables: Sequence[Statistics]) -> dict[str, NDArray[np.float64]]:
    """Statistics added up name by name, in the order given (site-name order).

    Raises:
        IntegrityError: if two tables disagree on names or shapes.
    """
    total: dict[str, NDArray[np.float64]] = {}
    for table in tables:
        if total and (set(table) != set(total) or any(table[n].shape != total[n].shape for n in total)):
            raise IntegrityError("statistics: sites sent different names or shapes")
        for name, value in table.items():
            total[name] = total[name] + value if name in total else np.array(value, np.float64)
    return total
