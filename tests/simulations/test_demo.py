"""The demonstration: a whole federation on this machine, and nothing left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from leftovers import holders, living

from consortium.client.site import rows
from consortium.client.task import task_of
from consortium.protocol.credentials import chain_in, fingerprint
from consortium.protocol.errors import ConsortiumError, InputError
from consortium.server import load_model
from consortium.simulations.demo import new_folder, run_demo
from consortium.simulations.demo_cli import _page
from consortium.simulations.hospitals import HABITS, patients, study_of, write_hospitals
from consortium.simulations.programs import Programs
from consortium.simulations.sites import gather

COMMAND = Path(sys.executable).with_name("consortium")


def test_hospitals_differ_in_form_and_agree_in_content(tmp_path: Path) -> None:
    """Read through their mappings, the tables are together exactly the 569 patients, in the study's units."""
    folders = write_hospitals(tmp_path, 4)
    study = study_of(1)
    task = task_of(study)
    headers = {folder.joinpath("patients.csv").read_text().splitlines()[0] for folder in folders.values()}
    assert len(headers) == len(HABITS) == 4
    sources = gather(study, list(folders.values())).sources
    found = [rows(task, source) for source in sources]
    sizes = [len(one.inputs) + len(one.test_inputs) for one in found]
    assert sum(sizes) == 569
    assert max(sizes) > 4 * min(sizes)
    radii = sorted(round(float(x), 3) for one in found for x in [*one.inputs[:, 0], *one.test_inputs[:, 0]])
    assert radii == pytest.approx(sorted(patients()["radius"].round(3)), abs=2e-3)
    areas = sorted(float(x) for one in found for x in [*one.inputs[:, 3], *one.test_inputs[:, 3]])
    assert areas == pytest.approx(sorted(patients()["area"]), rel=1e-4)
    malignant = sum(int(one.targets.sum() + one.test_targets.sum()) for one in found)
    assert malignant == patients()["malignant"].sum() == 212


def test_the_same_call_writes_the_same_hospitals(tmp_path: Path) -> None:
    """Tables, mappings and keys are the same bytes each time, so that the demonstration's figures repeat."""
    one, two = write_hospitals(tmp_path / "one", 3), write_hospitals(tmp_path / "two", 3)
    for name in one:
        for path in one[name].iterdir():
            assert path.read_bytes() == (two[name] / path.name).read_bytes()


def test_a_second_run_takes_a_new_folder_and_touches_nothing(tmp_path: Path) -> None:
    """What lies in the folder already stays, whoever put it there."""
    (tmp_path / "run-1").write_text("mine")
    assert [new_folder(tmp_path).name for _ in range(2)] == ["run-2", "run-3"]
    assert (tmp_path / "run-1").read_text() == "mine"


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """A file where the folder should be is refused with its name, before anything starts."""
    (tmp_path / "taken").write_text("")
    with pytest.raises(InputError, match="taken"):
        new_folder(tmp_path / "taken")


FAMILY = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import signal,time; signal.signal(15, 1); time.sleep(99)", "{marker}"],
                 start_new_session=True)
open("ready", "w").close()
time.sleep(99)
"""


def test_programs_end_with_all_that_they_started(tmp_path: Path) -> None:
    """A child of a child, in a session of its own and deaf to SIGTERM, is gone when the block is left by an error."""
    marker = f"family-{os.getpid()}"
    code = FAMILY.format(marker=marker)

    def crash() -> None:
        with Programs() as programs:
            for place in ("one", "two"):  # programs of one name, in two folders
                (tmp_path / place).mkdir()
                programs.start("parent", [sys.executable, "-c", code], dict(os.environ), tmp_path / place)
            end = time.monotonic() + 20
            while len(list(tmp_path.glob("*/ready"))) < 2 and time.monotonic() < end:
                time.sleep(0.05)
            assert len(living(marker)) == 4
            programs.check()
            raise KeyError("anything")

    with pytest.raises(KeyError):
        crash()
    assert living(marker) == []


def checked(programs: Programs) -> None:
    """Check for ten seconds."""
    for _ in range(200):
        programs.check()
        time.sleep(0.05)


def test_a_program_that_ends_by_itself_is_reported_with_its_last_words(tmp_path: Path) -> None:
    """The name, the exit code and the last lines of the log are in the error."""
    with Programs() as programs:
        arguments = [sys.executable, "-c", "print('no port for me'); raise SystemExit(3)"]
        programs.start("nameless", arguments, dict(os.environ), tmp_path)
        with pytest.raises(
            ConsortiumError, match=r"nameless ended by itself \(exit code 3\)(?s:.*)no port for me"
        ):
            checked(programs)


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_the_whole_demonstration(tmp_path: Path) -> None:
    """Three hospitals join and train; a fresh process predicts, keys are encrypted and private, nothing is left; the
    table has a row for each, and what they reach alone, together and pooled."""
    said: list[str] = []
    done = run_demo(tmp_path, study_of(2), 3, said.append, serve=True)
    assert living(str(tmp_path)) == []
    assert [line for line in said if "left out" in line] == []
    assert 0.9 < done.federated <= 1
    assert [truth for _, _, truth in done.predictions] == [value > 0.5 for _, value, _ in done.predictions]
    keys = [path for path in done.folder.rglob("*") if path.suffix in (".key", ".pem") and path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in keys} == {0o600}
    assert not [path for path in keys if re.search(rb"BEGIN (EC |RSA )?PRIVATE KEY", path.read_bytes())]
    assert [one.name for one in done.hospitals] == ["hospital-1", "hospital-2", "hospital-3"]
    assert sum(one.training + one.test for one in done.hospitals) == 569
    assert done.local < done.federated
    assert abs(done.pooled - done.federated) < 0.05
    page = _page(done)
    assert [line.split()[0] for line in page.splitlines() if line.startswith("hospital-")] == [
        one.name for one in done.hospitals
    ]
    assert all(word in page for word in ("local-only", "federated", "pooled", str(done.model), done.digest))
    assert done.served is not None
    assert done.served.probabilities == pytest.approx([value for _, value, _ in done.predictions], abs=1e-5)
    assert done.served.lineage["model"] == done.digest
    assert done.served.version == "breast-cancer-demo@1"
    assert "Served over TLS as breast-cancer-demo@1: 6 rows" in page
    assert done.served.gate["passed"]
    assert done.served.gate["sites"] == ["hospital-1", "hospital-2", "hospital-3"]
    root = fingerprint(chain_in(done.folder / "server" / "root.pem")[0])
    came = json.loads((load_model(done.model, root=root).path / "lineage.json").read_text())
    assert came["sites"] == ["hospital-1", "hospital-2", "hospital-3"]
    assert [one["model"] for one in came["rounds"] if not one["void"]][-1] == done.digest
    judged = json.loads((done.model / "evaluation.json").read_text())
    assert judged["calibration"]["expected_error"] < 0.5


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_command_prints_one_document(tmp_path: Path) -> None:
    """`consortium demo --json`: the agreed keys on stdout, progress on stderr, exit code 0."""
    done = subprocess.run(
        [COMMAND, "demo", "--dir", tmp_path / "d", "--sites", "2", "--rounds", "1", "--json"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert set(document) == {"sites", "rounds", "strategy", "metrics", "model", "seconds"}
    assert (document["sites"], document["rounds"], document["strategy"]) == (2, 1, "fedavg")
    assert {name: list(value) for name, value in document["metrics"].items()} == {
        "local": ["auroc"],
        "federated": ["auroc"],
        "pooled": ["auroc"],
    }
    assert (Path(document["model"]) / "model.onnx").is_file()
    assert "round 1: 2 of 2 answers" in done.stderr
    assert living(str(tmp_path)) == []


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_leaves_nothing_running(number: signal.Signals, tmp_path: Path) -> None:
    """Ctrl-C (or SIGTERM) in the middle: exit code 130, no traceback, no process left, within 20 s."""
    log = tmp_path / "log"
    with log.open("w") as file:
        demo = subprocess.Popen(
            [COMMAND, "demo", "--dir", tmp_path / "d", "--sites", "2", "--rounds", "1000"],
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        end = time.monotonic() + 120
        while "round 1:" not in log.read_text() and time.monotonic() < end:
            time.sleep(0.2)
        assert len(living(str(tmp_path))) == 7, (
            log.read_text()
        )  # it, server, run, two clients and their workers
        sent = time.monotonic()
        demo.send_signal(number)
        assert demo.wait(30) == 130, log.read_text()
        assert time.monotonic() - sent < 20
    finally:
        demo.kill()
        demo.wait()
    assert living(str(tmp_path)) == []
    assert holders(tmp_path) == []
    assert "Traceback" not in log.read_text()
    assert log.read_text().endswith("stopped\n")
