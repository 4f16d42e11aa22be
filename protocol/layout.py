"""What a model looks like as one flat vector.

A `Layout` declares up to four segments, each a run of named arrays of one dtype:

    shared    trained together: travels to the sites, and back as an update
    control   trained together beside it (SCAFFOLD's variates): same rule, own segment
    local     stays at the site (a personal head, BatchNorm under FedBN)
    frozen    a pre-trained base: part of the study, never sent in a round

On the wire and on disk a vector is little-endian and C-contiguous. What travels is `shared` followed by
`control`. Integer buffers (a BatchNorm's step counter) are not part of a layout: they never travel.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from consortium.protocol.errors import InputError

Kind = Literal["shared", "control", "local", "frozen"]
Vector = NDArray[Any]
"""A 1-D float32 or float64 array."""

KINDS: tuple[Kind, ...] = ("shared", "control", "local", "frozen")
FORMAT = 1


@dataclass(frozen=True)
class Array:
    """One named array of a segment; `shape` may be `()` for a 0-d array of one number."""

    name: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Segment:
    """Named arrays of one dtype that share a destiny (see the module's text)."""

    kind: Kind
    dtype: Literal["float32", "float64"]
    arrays: tuple[Array, ...]

    @cached_property
    def size(self) -> int:
        """How many numbers the segment holds."""
        return sum(array.size for array in self.arrays)

    @cached_property
    def numpy_dtype(self) -> np.dtype[Any]:
        """The little-endian numpy dtype of the segment."""
        return np.dtype("<f4" if self.dtype == "float32" else "<f8")

    def split(self, vector: Vector) -> dict[str, Vector]:
        """Views of `vector` (1-D, `size` numbers), one by array name, in their shapes."""
        views, start = {}, 0
        for array in self.arrays:
            views[array.name] = vector[start : start + array.size].reshape(array.shape)
            start += array.size
        return views

    def join(self, arrays: Mapping[str, Vector]) -> Vector:
        """The inverse of `split`: a fresh vector from arrays by name."""
        vector = np.empty(self.size, self.numpy_dtype)
        for name, view in self.split(vector).items():
            view[...] = arrays[name]
        return vector


@dataclass(frozen=True)
class Layout:
    """The declared segments of one model, at most one of a kind, in the order of `KINDS`."""

    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        kinds = [segment.kind for segment in self.segments]
        if kinds != [kind for kind in KINDS if kind in kinds]:
            raise InputError(
                f"layout: segments must be at most one each of {', '.join(KINDS)}, in that order; got {kinds}"
            )
        if "shared" not in kinds or self["shared"].size == 0:
            raise InputError("layout: the model has nothing to train together (no 'shared' arrays)")
        for segment in self.segments:
            names = [array.name for array in segment.arrays]
            if segment.dtype not in ("float32", "float64"):
                raise InputError(
                    f"layout: segment '{segment.kind}' has dtype {segment.dtype}; float32 or float64 would be right"
                )
            if len(set(names)) != len(names):
                raise InputError(f"layout: segment '{segment.kind}' names an array twice")
            if any(n < 0 for array in segment.arrays for n in array.shape):
                raise InputError(f"layout: segment '{segment.kind}' has a negative dimension")

    def __getitem__(self, kind: Kind) -> Segment:
        """The segment of that kind; an empty one where the layout declares none."""
        for segment in self.segments:
            if segment.kind == kind:
                return segment
        return Segment(kind, "float32", ())

    @property
    def nbytes(self) -> int:
        """Bytes of one travelling vector: `shared` and `control`."""
        return sum(self[k].size * self[k].numpy_dtype.itemsize for k in ("shared", "control"))

    def document(self) -> dict[str, Any]:
        """The layout as plain JSON values, versioned; `parse` is its inverse."""
        return {
            "format": FORMAT,
            "segments": [
                {"kind": s.kind, "dtype": s.dtype, "arrays": [[a.name, list(a.shape)] for a in s.arrays]}
                for s in self.segments
            ],
        }

    @staticmethod
    def parse(document: Mapping[str, Any]) -> Layout:
        """A layout from `document()`.

        Raises:
            InputError: if the document has another format or is not one.
        """
        try:
            if document["format"] != FORMAT:
                raise InputError(
                    f"layout: format {document['format']} is not known here; this version reads {FORMAT}"
                )
            segments = tuple(
                Segment(
                    s["kind"],
                    s["dtype"],
                    tuple(Array(str(n), tuple(int(i) for i in shape)) for n, shape in s["arrays"]),
                )
                for s in document["segments"]
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"layout: the document is malformed ({error!r})") from error
        return Layout(segments)

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the layout's canonical JSON; travels with every vector."""
        text = json.dumps(self.document(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def digest_of(vectors: Iterable[Vector]) -> str:
    """SHA-256 (hex) over the little-endian bytes of vectors, in order: the name of a model or an update."""
    sha = hashlib.sha256()
    for vector in vectors:
        little = vector if vector.dtype.byteorder in "<=|" else vector.astype(vector.dtype.newbyteorder("<"))
        sha.update(np.ascontiguousarray(little).data.cast("B"))
    return sha.hexdigest()
