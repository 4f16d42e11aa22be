"""`consortium demo`: a whole federation on this machine, from certificates to predictions.

    a federation's keys and doors -> hospitals with tables of their own join by code -> the study's rounds
                 -> export -> a fresh process predicts -> local-only, federated and pooled, side by side

With `serve` the model is then registered, promoted, served and asked (`demo_serving.py`).
Everything lies in one new folder, and nothing of it runs any more when `run_demo` returns or raises.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from consortium.protocol.errors import ConsortiumError, InputError
from consortium.protocol.study import Study
from consortium.server.study_cli import line
from consortium.simulations.deployment import Federation, federation
from consortium.simulations.hospitals import PERSON, RANGES, TARGET, patients, write_hospitals
from consortium.simulations.programs import Programs

if TYPE_CHECKING:
    from consortium.simulations.baselines import Baselines, OneRoom
    from consortium.simulations.demo_serving import Answers

PREDICTED = 6
"""Rows that the fresh process predicts."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Hospital:
    """One row of the table.

    training, test: rows. alone: AUROC, on the union of all test rows, of the model that it trained alone; None where
    none could be trained. here: AUROC of the federated model on its own test rows, as its final evaluation said; None
    where these have one class.
    """

    name: str
    training: int
    test: int
    alone: float | None
    here: float | None


@dataclass(frozen=True)
class Demo:
    """How a demonstration went. local, federated, pooled: AUROC on the union of all test rows; local: the mean."""

    folder: Path
    model: Path
    digest: str
    strategy: str
    rounds: int
    hospitals: Sequence[Hospital]
    local: float
    federated: float
    pooled: float
    predictions: Sequence[tuple[str, float, bool]]
    seconds: float
    served: Answers | None = None

    def document(self) -> dict[str, Any]:
        """What `--json` prints."""
        metrics = {"local": self.local, "federated": self.federated, "pooled": self.pooled}
        return {
            "sites": len(self.hospitals),
            "rounds": self.rounds,
            "strategy": self.strategy,
            "metrics": {name: {"auroc": value} for name, value in metrics.items()},
            "model": str(self.model),
            "seconds": round(self.seconds, 1),
        } | ({} if self.served is None else {"served": self.served.document()})


def run_demo(folder: Path, study: Study, sites: int, say: Say, *, serve: bool = False) -> Demo:
    """Run a study of `hospitals.study_of` live over `sites` made-up hospitals in a new folder under `folder`.

    say: called with a line of progress. serve: go on: gate the model, and serve it at a site.

    Raises:
        InputError: the folder cannot be written.
        ConsortiumError: a process ended by itself, or the run failed or took too long.
    """
    started = time.monotonic()
    own = new_folder(folder)
    (own / "study.toml").write_text(study.text, encoding="utf-8")
    hospitals = write_hospitals(own / "sites", sites)
    with Programs() as programs:
        say(f"{own}: founding a federation, starting its server")
        with federation(programs, own) as live:
            for name, place in hospitals.items():
                live.join(name, place)
            say(f"{sites} hospitals joined by one-time code; their clients connect with certificates")
            live.gather(hospitals)  # all in the first round, as in simulation
            live.start(study)
            compared = _compared(study, hospitals)  # now, as the clients load meanwhile
            say("baselines trained: each hospital alone, and all rows in one room")
            for one in live.events(study):
                say(line(one))
            shown = live.admin.get(f"/v1/studies/{study.name}")
            served = _served(live, Path(shown["model"]), next(iter(hospitals)), say) if serve else None
    say("all processes ended; a fresh process loads the exported model and predicts raw rows")
    results = Path(shown["model"]).parent
    result = json.loads((results / "result.json").read_text(encoding="utf-8"))
    predictions = _predict(results / "model", own)
    done = _demo(own, results, result, *compared, predictions, time.monotonic() - started)
    return replace(done, served=served)


def _served(live: Federation, model: Path, site: str, say: Say) -> Answers:
    """What the model, served at a site, says of the rows that the fresh process will predict."""
    from consortium.simulations.demo_serving import serve

    some = patients().groupby(TARGET).head(PREDICTED // 2)
    rows = [{name: float(row[name]) for name in RANGES} for _, row in some.iterrows()]
    return serve(live, model, site, rows, say)


def new_folder(folder: Path) -> Path:
    """The next of `run-1`, `run-2` ... under `folder`, made; nothing that is there is touched."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for number in range(1, 1000):
            own = folder.resolve() / f"run-{number}"
            if not own.exists():
                own.mkdir(mode=0o700)
                return own
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror}); give another --dir") from error
    raise InputError(f"{folder}: holds 999 demonstrations; remove some, or give another --dir")


def _compared(study: Study, hospitals: Mapping[str, Path]) -> tuple[OneRoom, Baselines]:
    """All rows in one room, and what comes of each hospital alone and of all together, as in `simulate`."""
    from consortium.simulations.baselines import one_room, train
    from consortium.simulations.host import one_thread
    from consortium.simulations.sites import gather

    with one_thread():
        room = one_room(study, gather(study, list(hospitals.values())).sources)
        return room, train(room, study.seed)


_PREDICT = """\
import sys
import pandas as pd
from consortium.server import load_model
model, rows, predictions = sys.argv[1:]
load_model(model).predict(pd.read_csv(rows)).to_csv(predictions, index=False)
training = {"torch", "flwr", "consortium.client"} & set(sys.modules)
sys.exit(f"it imported {training}" if training else 0)
"""


def _predict(model: Path, folder: Path) -> list[tuple[str, float, bool]]:
    """Patient, predicted probability and truth of some raw rows, by a Python that imports no training code."""
    import pandas as pd

    some = patients().groupby(TARGET).head(PREDICTED // 2)
    rows, out = folder / "new-patients.csv", folder / "predictions.csv"
    some[list(RANGES)].to_csv(rows, index=False)
    done = subprocess.run(
        [sys.executable, "-P", "-c", _PREDICT, str(model), str(rows), str(out)],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=120,
        check=False,
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:]
        raise ConsortiumError(f"{model}: a fresh process cannot use it: {' '.join(last)}")
    found = pd.read_csv(out)["probability_1"]
    columns = zip(some[PERSON], found, some[TARGET], strict=True)
    return [(str(person), float(value), bool(truth)) for person, value, truth in columns]


def _demo(
    folder: Path,
    results: Path,
    result: Mapping[str, Any],
    room: OneRoom,
    baselines: Baselines,
    predictions: Sequence[tuple[str, float, bool]],
    seconds: float,
) -> Demo:
    from consortium.simulations.baselines import judge

    model = np.load(results / "model.npy", allow_pickle=False)
    evaluation = result["evaluation"] or {"sites": {}}
    alone = {site: metrics.get("auroc") for site, metrics in baselines.local.items()}
    return Demo(
        folder=folder,
        model=results / "model",
        digest=result["model"],
        strategy=result["strategy"],
        rounds=max(one["round"] for one in result["rounds"]),
        hospitals=[
            Hospital(
                site, len(rows.inputs), len(rows.test_inputs), alone.get(site),
                evaluation["sites"].get(site, {}).get("auroc"),
            )
            for site, rows in room.rows.items()
        ],
        local=float(np.mean([value for value in alone.values() if value is not None])),
        federated=judge(room, model)["auroc"],
        pooled=baselines.pooled["auroc"],
        predictions=predictions,
        seconds=seconds,
    )  # fmt: skip
