"""What privacy costs in time, on one core: clip and noise of one long vector, hardened and from a cipher, against plain
torch; a site's dp-sgd against its plain training, with Opacus's own dp-sgd of the same steps as a peer."""

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from report import Row, Target, emit, measure
from threadpoolctl import threadpool_limits

from consortium.client.private_training import Private
from consortium.client.site import start
from consortium.client.task import task_of
from consortium.client.trainer import TorchTrainer
from consortium.privacy.mechanisms import clip, mechanism_of
from consortium.privacy.randomness import Stream
from consortium.protocol import Study
from consortium.strategies.base import Local

FEATURES, HIDDEN, BATCH = 64, (256, 128), 64
"""Of the model of two hidden layers that is trained, 49,921 weights."""


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


def _study(privacy: str) -> Study:
    features = "\n".join(f"x{number} = {{ min = -4.0, max = 4.0 }}" for number in range(FEATURES))
    return Study.parse(f"""
format = 1
[study]
name = "benchmark"
task = "consortium.client.tasks.tabular:Classifier"
rounds = 10
[data]
target = "y"
[data.features]
{features}
[model]
hidden = {list(HIDDEN)}
[training]
batch_size = {BATCH}
[privacy]
{privacy}
""")


def training(steps: int, repeats: int) -> tuple[list[Row], list[Target]]:
    """A round of so many steps over the same batches: plain, by our dp-sgd, by Opacus's."""
    rng = np.random.default_rng(0)
    rows = BATCH * 10
    inputs = torch.from_numpy(rng.standard_normal((rows, FEATURES), dtype=np.float32))
    targets = torch.from_numpy((inputs[:, :1].numpy() > 0).astype(np.float32))
    batches = [rng.choice(rows, BATCH, replace=False) for _ in range(steps)]
    private = 'mechanism = "dp-sgd"\nepsilon = 3.0\ndelta = 1e-5\nclip_norm = 1.0'
    times = {}
    for name, asked in (("plain training", ""), ("dp-sgd, ours", private)):
        study = _study(asked)
        task, mechanism = task_of(study), mechanism_of(study)
        net = start(study, task, Local())
        trainer = TorchTrainer(task, net, Local(), inputs, targets, inputs[:0], targets[:0])
        model = {"shared": net.vector("shared").copy()}
        how = None if mechanism is None else Private(mechanism, Stream.system())
        times[name] = measure(lambda: trainer.train(model, {}, batches, 1, how), repeats)  # noqa: B023 - called at once
    times["dp-sgd, Opacus"] = measure(_opacus(inputs, targets, batches), repeats)
    found = [Row.of(name, seconds, "ms") for name, seconds in times.items()]
    plain, ours, theirs = (row.median for row in found)
    return found, [
        Target("dp-sgd's slowdown, ours", ours / plain, "<=", 30.0),
        Target("dp-sgd, ours / Opacus", ours / theirs, "<=", 1.5),
    ]


def _opacus(
    inputs: torch.Tensor, targets: torch.Tensor, batches: Sequence[NDArray[np.int64]]
) -> Callable[[], None]:
    """A round of the same steps as Opacus's users write it."""
    from opacus.grad_sample import GradSampleModule
    from opacus.optimizers import DPOptimizer

    sizes = [FEATURES, *HIDDEN]
    layers = [part for a, b in pairwise(sizes) for part in (torch.nn.Linear(a, b), torch.nn.ReLU())]
    module = GradSampleModule(torch.nn.Sequential(*layers, torch.nn.Linear(HIDDEN[-1], 1)))
    optimizer = DPOptimizer(
        torch.optim.SGD(module.parameters(), 0.05),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        expected_batch_size=BATCH,
    )
    loss = torch.nn.BCEWithLogitsLoss()

    def round_() -> None:
        for batch in batches:
            optimizer.zero_grad()
            chosen = torch.from_numpy(batch)
            loss(module(inputs[chosen]), targets[chosen]).backward()
            optimizer.step()

    return round_


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns 0 also where a target is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny: checks that it runs")
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
    with threadpool_limits(1):
        rows, targets = run(100_000, 2) if given.quick else run(10_000_000, 9)
        more, others = training(2, 2) if given.quick else training(100, 9)
    rows, targets = rows + more, targets + others
    emit(rows, targets, given.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
