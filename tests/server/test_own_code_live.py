"""What studies bring beside a task, live and confined: a strategy of their own, and whole Flower apps."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from approving import approve, hand_in, ran, run_log
from live import COMMAND, Live, children, hospitals, study
from numpy.typing import NDArray
from safetensors.numpy import load_file

from consortium.client.datasets import Datasets
from consortium.protocol import sandbox
from consortium.protocol.study import Study
from consortium.protocol.watching import FORBIDDEN
from consortium.simulations.simulation import simulate
from consortium.simulations.sites import gather

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(sandbox.missing()), reason=f"no sandbox here: {sandbox.missing()}"),
]

OWN = """
from dataclasses import replace

from consortium.strategies import Strategy
from consortium.strategies.means import norm_bounded
from consortium.strategies.optimizers import momentum


def bounded(bound):
    moves = momentum(lr=1.0, beta=0.9)

    def step(state, model, update):
        return moves.step(state, model, update)

    return Strategy("bounded", norm_bounded(bound, weighted=True), replace(moves, step=step))
"""


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with hospitals(tmp_path_factory.mktemp("live"), 2) as one:
        yield one


def written(folder: Path, name: str, epochs: int = 1) -> Path:
    """A study of the built-in task with a strategy of its own."""
    text = re.sub(r"^\[strategy\]\n(?:.+\n)*", "", study(name, 2, 3, epochs).text, flags=re.M)
    (folder / "mine.py").write_text(OWN)
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


VECTORS = "vectors"
FLOWER = Path(__file__).parents[1] / "studies" / "flower"


@pytest.fixture(scope="module")
def vectors(federation: Live) -> list[NDArray[np.float64]]:
    """A data set of each site that the Flower app reads: two inputs and a class."""
    rng, made = np.random.default_rng(5), []
    for number, site in enumerate(federation.places):
        inputs = rng.normal(size=(60 + 40 * number, 2))
        rows = np.column_stack([inputs, inputs @ [2.0, -1.0] + rng.normal(size=len(inputs)) > 0]).round(6)
        path = federation.folder / f"{site}-vectors.csv"
        path.write_text("a,b,c\n" + "\n".join(",".join(map(str, row)) for row in rows.tolist()) + "\n")
        Datasets(federation.home(site)).add(VECTORS, str(path), None)
        made.append(rows)
    return made


def app(folder: Path, name: str, **files: str) -> Path:
    """The Flower app of the test tree under another name, perhaps with other files."""
    shutil.copytree(FLOWER, folder, dirs_exist_ok=True)
    path = folder / "study.toml"
    path.write_text(path.read_text().replace("flower-heart", name))
    for file, text in files.items():
        (folder / "heart" / f"{file}.py").write_text(text)
    return path


def expected(sites: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    """FedAdam by its paper's equations (arXiv 2003.00295, algorithm 2) with Flower's bias correction, by hand."""
    model, m, v = np.zeros(3), np.zeros(3), np.zeros(3)
    for number in (1, 2, 3):
        got = []
        for rows in sites:
            inputs, weights = np.column_stack([rows[:, :2], np.ones(len(rows))]), model.copy()
            for _ in range(20):
                chance = 1 / (1 + np.exp(-inputs @ weights))
                weights -= 0.5 * (inputs.T @ (chance - rows[:, 2]) / len(rows))
            got.append(weights)
        step = np.average(got, axis=0, weights=[len(rows) for rows in sites]) - model
        m, v = 0.9 * m + 0.1 * step, 0.99 * v + 0.01 * step**2
        rate = 0.1 * np.sqrt(1 - 0.99 ** (number + 1)) / (1 - 0.9 ** (number + 1))
        model = model + rate * m / (np.sqrt(v) + 1e-3)
    return model


def test_a_flower_app_is_approved_and_runs_with_flowers_own_strategy(
    federation: Live, vectors: list[NDArray[np.float64]], tmp_path: Path
) -> None:
    shown = ran(federation, app(tmp_path, "flower-heart"), VECTORS)
    assert shown["state"] == "finished", run_log(federation, "flower-heart")
    left = federation.folder / "server" / "runs" / "flower-heart.1" / "app"
    found = load_file(left / "model.safetensors")
    np.testing.assert_allclose(found["weights"], expected(vectors), rtol=1e-9)
    result = json.loads((left / "result.json").read_text())
    assert result["model"]["arrays"] == "Context.state"
    assert 0.7 < result["state"]["metrics"]["accuracy"] <= 1
    rounds = federation.events("flower-heart")
    assert [(one["round"], one["admitted"]) for one in rounds] == [
        (number, {"hospital-1": 60, "hospital-2": 100}) for number in (1, 2, 3)
    ]
    judged = federation.events("flower-heart", "evaluation")
    assert judged[-1]["pooled"]["accuracy"] == pytest.approx(result["state"]["metrics"]["accuracy"])
    assert federation.show("flower-heart")["sites"]["hospital-1"]["last_round"] == 3


def test_a_flower_app_whose_process_dies_ends_as_failed_and_says_why(
    federation: Live, vectors: list[NDArray[np.float64]], tmp_path: Path
) -> None:
    slow = (FLOWER / "heart" / "client_app.py").read_text().replace("range(20)", "range(50_000)")
    made = hand_in(federation, app(tmp_path, "flower-killed", client_app=slow))
    approve(federation, made, data=VECTORS)
    federation.until(lambda: federation.show("flower-killed")["round"] >= 1, 120, "no round", 0.2)
    federation.kill(federation.run_process())
    shown = federation.over("flower-killed")
    assert shown["state"] == "failed"
    assert "has no place where a round could be committed" in shown["why"]


ESCAPES = """
import ctypes, os
from flwr.serverapp import ServerApp

app = ServerApp()
LIBC = ctypes.CDLL(None, use_errno=True)
TRIED = {
    "keys": lambda: open("SERVER/ca.key").read(),
    "the store": lambda: os.listdir("SERVER"),
    "another run": lambda: os.listdir("SERVER/runs"),
    "checkpoints": lambda: os.listdir("SERVER/checkpoints"),
    "home": lambda: os.listdir(os.path.expanduser("~root")),
    "its own plan": lambda: open("SERVER/runs/NAME.1/study.fab", "ab"),
    "elsewhere": lambda: open("/tmp/consortium-app-escape", "w"),
    "the parent's memory": lambda: open(f"/proc/{os.getppid()}/mem"),
    "a unix socket": lambda: __import__("socket").socket(1),
}


@app.main()
def main(grid, context):
    got = []
    for what, attempt in TRIED.items():
        try:
            attempt()
            got.append(what)
        except OSError:
            pass
    print("\\x1b[31m" + "x" * 100_000, file=__import__("sys").stderr)
    raise ValueError("got: " + ", ".join(got) + "; " + "y" * 100_000)
"""


def test_a_server_app_reaches_nothing_and_what_it_says_is_bounded(
    federation: Live, vectors: list[NDArray[np.float64]], tmp_path: Path
) -> None:
    server = str(federation.folder / "server")
    text = ESCAPES.replace("SERVER", server).replace("NAME", "flower-escape")
    shown = ran(federation, app(tmp_path, "flower-escape", server_app=text), VECTORS)
    assert shown["state"] == "failed"
    assert "ValueError: got: ; yyy" in shown["why"]
    assert len(shown["why"]) < 2500
    log = run_log(federation, "flower-escape")
    assert "sandbox: the study's code asked for" in log
    assert server in log
    assert "\x1b" not in log
    assert len(log) < 200_000
    assert not Path("/tmp/consortium-app-escape").exists()


@pytest.mark.parametrize(
    "what",
    ["LIBC.socket(2, 1, 0)", "os.fork()", "os.kill(os.getppid(), 9)", "LIBC.ptrace(16, os.getppid(), 0, 0)"],
)
def test_what_no_server_app_needs_ends_it_and_the_run_says_so(
    federation: Live, vectors: list[NDArray[np.float64]], tmp_path: Path, what: str
) -> None:
    name = "flower-" + "".join(c for c in what if c.isalpha()).lower()
    text = ESCAPES.replace("    got = []\n", f"    {what}\n")
    shown = ran(federation, app(tmp_path, name, server_app=text), VECTORS)
    assert shown["state"] == "failed"
    assert shown["why"] == FORBIDDEN
    assert FORBIDDEN in run_log(federation, name)


PAGE = Path(__file__).parents[2] / "docs" / "flower.md"


@pytest.mark.skipif(not PAGE.exists(), reason="the docs are not here, only the installed package")
def test_the_page_shows_the_app_that_runs_and_commands_that_work(
    federation: Live, vectors: list[NDArray[np.float64]], tmp_path: Path
) -> None:
    """The app's files are those of the test tree; each command is typed in its place."""
    text = PAGE.read_text(encoding="utf-8").partition("## Over Flower's processes")[0]
    shown = re.findall(r"^```(?:toml|python)\n(.*?)^```", text, re.M | re.S)
    files = [
        FLOWER / "study.toml",
        *(FLOWER / "heart" / f"{one}.py" for one in ("server_app", "client_app", "model")),
    ]
    assert shown == [path.read_text() for path in files]
    shutil.copytree(FLOWER, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "study.toml"
    path.write_text(path.read_text().replace("flower-heart", "flower-page"))
    commands = re.findall(r"^\$ consortium (.*)$", text, re.M)
    assert len(commands) == 6

    def typed(command: str, site: str = "") -> str:
        words = command.replace("flower-heart", "flower-page").replace("patients", VECTORS).split()
        where = federation.home(site).folder if site else federation.folder / "server"
        words = [str(where) if word in ("fed", "site") else word for word in words]
        done = subprocess.run(
            [*COMMAND, *words], capture_output=True, text=True, check=False, timeout=120, cwd=tmp_path
        )
        assert done.returncode == 0, done
        return done.stdout

    for command in commands[:3]:
        typed(command)
    for site in federation.places:
        reviewed = typed(commands[3], site)
        assert "the app controls what leaves" in reviewed
        assert "heart/client_app.py" in reviewed
        assert "no differential privacy" in reviewed
        typed(commands[4], site)
    assert "finished" in typed(commands[5])
    assert (federation.folder / "server/runs/flower-page.1/app/result.json").is_file()
