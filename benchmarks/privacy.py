"""Clip and noise of one long vector: ours, hardened and from a cipher, against torch's plain generator; one core."""

import argparse
import sys
from collections.abc import Sequence

import numpy as np
import torch
from report import Row, Target, emit, measure
from threadpoolctl import threadpool_limits

from consortium.privacy.mechanisms import clip
from consortium.privacy.randomness import Stream


def run(size: int, repeats: int) -> tuple[list[Row], list[Target]]:
    """Both on the same vector of `size` float32, which is longer than its bound."""
    update = np.random.default_rng(0).standard_normal(size, dtype=np.float32)
    stream, bound = Stream.system(), 1.0
    plain = torch.from_numpy(update)

    def ours() -> None:
        clipped, _ = clip(update, bound)
        stream.add_gaussian(clipped, 1.0)

    def torchs() -> None:
        clipped = plain * min(1.0, bound / float(plain.norm()))
        clipped += torch.normal(0.0, 1.0, (size,))

    rows = [
        Row.of("clip and plain noise, torch", measure(torchs, repeats), "ms"),
        Row.of("clip and hardened noise, ours", measure(ours, repeats), "ms"),
    ]
    ratio = rows[1].median / rows[0].median
    noise = np.zeros(min(size, 1_000_000), np.float32)
    stream.add_gaussian(noise, 1.0)
    return rows, [
        Target("ours / torch", ratio, "<=", 7.0),
        Target("our deviation, off by", abs(float(noise.std()) - 1.0), "<=", 0.02),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns 0 also where a target is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny: checks that it runs")
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with threadpool_limits(1):
        rows, targets = run(100_000, 2) if given.quick else run(10_000_000, 9)
    emit(rows, targets, given.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
