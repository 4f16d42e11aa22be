"""Randomness that privacy rests on: a cipher's key stream, uniform numbers, hardened Gaussian noise, Poisson samples.

A `Stream` is AES-256 in counter mode under a key of the operating system, used once. Its seeded form repeats itself,
and so protects nothing: it is for simulation alone, and has to be asked for by name.

Gaussian noise in floating point leaks through its lowest bits (Mironov 2012; Jin et al., arXiv 2112.05307): what a
single Box-Muller draw can reach is sparse, so which sums are reachable tells what was summed. Each number here is
instead the scaled sum of four independent Box-Muller draws (Holohan & Braghin, arXiv 2107.10138, section 4), added in
float64 and rounded once to the vector's dtype: to look for its preimages takes more work than breaking the cipher's
security margin allows. A pair of numbers shares its four draws' radii and angles, of which it is the cosine and the
sine part: 8 x 52 random bits for 2 numbers.
"""

from __future__ import annotations

import hashlib
import math
import os
import secrets
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

Vector = NDArray[Any]

DRAWS = 4
"""Box-Muller draws that are summed into one number."""
_HALF = 1 << 12
"""Pairs of numbers that are made at a time: all that they need fits a core's second-level cache."""
_ONE = np.uint64(0x3FF0000000000000)
"""The exponent of doubles in [1, 2)."""


class Stream:
    """A stream of random bits, for one thread. Make one with `Stream.system` or `Stream.seeded`.

    It cannot be copied or pickled, and takes a new key in a forked process: the same noise twice protects nothing.
    """

    def __init__(self, key: bytes, *, secret: bool) -> None:
        """key: 32 bytes that were never used before. secret: whether it comes from the operating system."""
        self.secret = secret
        self._process = os.getpid()
        self._bits = np.empty(2 * DRAWS * _HALF, np.uint64)
        self._zeros = bytes(self._bits.nbytes)
        self._start(key)

    def _start(self, key: bytes) -> None:
        self._cipher = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()

    @staticmethod
    def system() -> Stream:
        """Unpredictable, and different each time: for everything that leaves a site."""
        return Stream(secrets.token_bytes(32), secret=True)

    @staticmethod
    def seeded(*parts: object) -> Stream:
        """The stream that these values name, always the same: for simulation, where nobody is protected."""
        return Stream(hashlib.sha256("|".join(map(str, parts)).encode()).digest(), secret=False)

    def __reduce__(self) -> str:
        raise TypeError("a stream of randomness is not copied: the same noise twice protects nothing")

    def bits(self, count: int) -> NDArray[np.uint64]:
        """(count,) uniform 64-bit integers. A view: the next call writes over it where count is small."""
        if self.secret and os.getpid() != self._process:
            self._process = os.getpid()
            self._start(secrets.token_bytes(32))
        if count > self._bits.size:
            made = np.empty(count, np.uint64)
            self._cipher.update_into(bytes(made.nbytes), made.data.cast("B"))
            return made
        part = self._bits[:count]
        if count:
            self._cipher.update_into(memoryview(self._zeros)[: part.nbytes], part.data.cast("B"))
        return part

    def uniforms(self, count: int) -> NDArray[np.float64]:
        """(count,) float64 in [0, 1), multiples of 2^-53."""
        whole = (self.bits(count) >> np.uint64(11)).astype(np.float64)
        return np.multiply(whole, 2.0**-53, whole)

    def chosen(self, count: int, rate: float) -> NDArray[np.int64]:
        """A Poisson sample: the indices below `count`, ascending, each there with probability `rate`, independently."""
        return np.flatnonzero(self.uniforms(count) < rate)

    def gaussians(self, count: int) -> NDArray[np.float64]:
        """(count,) independent standard normal float64."""
        result = np.zeros(count)
        self.add_gaussian(result, 1.0)
        return result

    def add_gaussian(self, vector: Vector, deviation: float) -> None:
        """vector += deviation * N(0, 1), in place, each number by itself, rounded once from float64.

        vector: 1-D, contiguous, float32 or float64. deviation: >= 0; 0 changes nothing.
        """
        assert vector.ndim == 1
        assert vector.dtype in (np.float32, np.float64)
        if deviation == 0 or not vector.size:
            return
        half = min(_HALF, -(-vector.size // 2))
        work = np.empty((5, half))
        for start in range(0, vector.size, 2 * half):
            piece = vector[start : start + 2 * half]
            pairs = -(-piece.size // 2)
            cosines, sines = self._pairs(work[:, :pairs], deviation)
            first, second = piece[:pairs], piece[pairs:]
            np.add(first, cosines, cosines)
            first[...] = cosines
            np.add(second, sines[: second.size], sines[: second.size])
            second[...] = sines[: second.size]

    def _pairs(self, work: Vector, deviation: float) -> tuple[Vector, Vector]:
        """Two vectors of independent N(0, deviation^2), each number the sum of `DRAWS` draws; in rows of `work`."""
        cosines, sines, radius, tangent, product = work
        pairs = cosines.size
        bits = self.bits(2 * DRAWS * pairs)
        np.right_shift(bits, np.uint64(12), bits)
        np.bitwise_or(bits, _ONE, bits)
        uniforms = bits.view(np.float64).reshape(DRAWS, 2, pairs)  # in [1, 2), multiples of 2^-52
        cosines.fill(0.0)
        sines.fill(0.0)
        for draw in uniforms:
            np.subtract(2.0, draw[0], radius)  # in (0, 1]
            np.log(radius, radius)
            np.multiply(radius, -2.0 * deviation * deviation / DRAWS, radius)
            np.sqrt(radius, radius)
            # One fast function for two slow ones: with t = tan(half): cos = 2 / (1 + t^2) - 1, sin = 2t / (1 + t^2).
            np.multiply(draw[1], math.pi, tangent)
            np.tan(tangent, tangent)
            np.multiply(tangent, tangent, product)
            np.add(product, 1.0, product)
            np.divide(radius, product, product)
            np.multiply(product, 2.0, product)
            np.add(cosines, product, cosines)
            np.subtract(cosines, radius, cosines)
            np.multiply(product, tangent, product)
            np.add(sines, product, sines)
        return cosines, sines
