"""A strategy that a study brings, live: confined at the server, the same bits as in simulation, and closed in."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from approving import approve, hand_in
from live import Live, children, hospitals, study

from consortium.protocol import sandbox
from consortium.protocol.study import Study
from consortium.simulations.simulation import simulate
from consortium.simulations.sites import gather

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(sandbox.missing()), reason=f"no sandbox here: {sandbox.missing()}"),
]

OWN = """
import ctypes, os, socket, sys, time
from dataclasses import replace

from consortium.strategies import Strategy
from consortium.strategies.means import norm_bounded
from consortium.strategies.optimizers import momentum

LIBC = ctypes.CDLL(None, use_errno=True)


def bounded(bound):
    moves = momentum(lr=1.0, beta=0.9)

    def step(state, model, update):
        escape(sys.argv)
        return moves.step(state, model, update)

    return Strategy("bounded", norm_bounded(bound, weighted=True), replace(moves, step=step))


def escape(argv):
    if "consortium.server.own_rounds" not in " ".join(argv):
        pass
    BODY
"""


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with hospitals(tmp_path_factory.mktemp("live"), 2) as one:
        yield one


def written(folder: Path, name: str, body: str = "pass", epochs: int = 1) -> Path:
    """A study of the built-in task with a strategy of its own, whose every step runs `body`."""
    text = re.sub(r"^\[strategy\]\n(?:.+\n)*", "", study(name, 2, 3, epochs).text, flags=re.M)
    (folder / "mine.py").write_text(
        OWN.replace("BODY", textwrap.indent(textwrap.dedent(body), "    ").strip())
    )
    path = folder / "study.toml"
    path.write_text(text + '\n[strategy]\nname = "mine:bounded"\nbound = 0.5\n')
    return path


def test_it_waits_for_approvals_and_gives_the_bits_of_the_simulation_also_where_it_is_killed(
    federation: Live, tmp_path: Path
) -> None:
    path = written(tmp_path, "own-strategy", epochs=200)
    one = Study.load(path)
    assert not one.built_in
    right = simulate(one, sites=gather(one, list(federation.places.values())).sources, processes=0)
    made = hand_in(federation, path)
    name = made.study.name
    federation.until(
        lambda: federation.show(name)["state"] == "waiting for approvals", 60, "it does not wait"
    )
    assert children(federation.pids["server"], "run_process") == []
    approve(federation, made)
    federation.until(
        lambda: federation.show(name)["round"] >= 1 or "failed" in federation.show(name)["state"],
        90,
        "no round",
    )
    assert federation.show(name)["state"] == "running", federation.show(name)["why"]
    (inner,) = children(federation.run_process(), "own_rounds")
    federation.kill(inner)  # a stranger's kill costs time alone
    assert federation.over(name)["state"] == "finished", federation.show(name)
    assert federation.model(name) == right.outcome.model.tobytes()
    assert (Path(federation.show(name)["model"]) / "model.onnx").is_file()
    rounds = [one["round"] for one in federation.events(name) if not one["void"]]
    assert rounds == [0, 1, 2, 3]
