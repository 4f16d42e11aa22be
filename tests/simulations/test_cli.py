"""`consortium simulate`: what it prints and writes, how it ends, and what it says of bad input."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from breast_cancer import study_text, table

from consortium.protocol.cli import main
from consortium.protocol.errors import InputError
from consortium.simulations.cli import parse_fault
from consortium.simulations.faults import Fault

BIN = Path(sys.executable).parent


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with study.toml and all.csv."""
    (tmp_path / "study.toml").write_text(study_text(4))
    table(4).to_csv(tmp_path / "all.csv", index=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shell(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(
        arguments, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=110
    )


def models(folder: Path) -> dict[str, Any]:
    facts = json.loads((folder / "run.json").read_text())
    return {name: one["models"] for name, one in facts["strategies"].items()}


@pytest.mark.slow
def test_a_table_is_split_compared_reported_and_run_again(folder: Path) -> None:
    """The real command: the table on stdout, progress on stderr, every file; and rerun.sh, from the results folder
    moved elsewhere, gives every model the same digest and the same table."""
    done = shell(
        "consortium", "simulate", "study.toml", "--data", "all.csv", "--sites", "3",
        "--partition", "dirichlet:0.5", "--compare", "fedavg,fedprox", "--seeds", "2", "--out", "out", cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for said in (
        "local-only",
        "fedavg",
        "fedprox",
        "pooled",
        "artificially: dirichlet:0.5",
        "exact",
        "report.html",
    ):
        assert said in done.stdout, said
    assert "round" in done.stderr
    assert "Traceback" not in done.stderr
    assert {path.name for path in (folder / "out").iterdir()} == {
        "report.html", "table.csv", "rounds.jsonl", "rounds.png", "sites.png", "run.json", "study.toml", "rerun.sh",
    }  # fmt: skip
    shutil.move(folder / "out", folder / "archive")
    again = shell("sh", "archive/rerun.sh", str(folder / "again"), cwd=folder)
    assert again.returncode == 0, again.stderr
    assert models(folder / "again") == models(folder / "archive")
    assert len(models(folder / "again")["fedprox"]) == 2
    assert (folder / "again" / "table.csv").read_text() == (folder / "archive" / "table.csv").read_text()


QUICK = ("--processes", "0", "--rounds", "2")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command in this process, which spares its start."""
    with pytest.raises(SystemExit) as caught:
        main(["simulate", *arguments])
    captured = capsys.readouterr()
    assert isinstance(caught.value.code, int)
    return caught.value.code, captured.out, captured.err


def test_json_is_one_document_with_the_promised_keys(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing else is on stdout; without --out the results lie in a folder that the document names."""
    code, out, _ = run(capsys, "study.toml", "--data", "all.csv", "--json", *QUICK)
    assert code == 0
    document = json.loads(out)
    assert document["study"] == "breast-cancer"
    assert len(document["digest"]) == 64
    assert list(document["sites"]) == ["site-1", "site-2", "site-3", "site-4"]
    assert (document["rounds"], document["seeds"], document["status"]) == (2, [7], "finished")
    assert document["partition"] == "iid"
    assert 0 < document["strategies"]["fedavg"]["metrics"]["auroc"]["mean"] <= 1
    assert set(document["baselines"]) == {"local", "pooled"}
    assert document["seconds"] > 0
    assert (folder / document["out"] / "report.html").exists()
    assert document["out"].startswith("results/breast-cancer-")


def test_several_files_are_a_site_each(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files after one --data, named by their stem; a folder brings its mapping and its key for the holdout."""
    frame = table(4)
    frame.iloc[:200].to_csv("north.csv", index=False)
    frame.iloc[200:400].to_parquet("south.parquet")
    (folder / "east").mkdir()
    frame.iloc[400:].rename(columns={"malignant": "dx"}).to_csv("east/export.csv", index=False)
    (folder / "east" / "mapping.toml").write_text('format = 1\n[columns.malignant]\ncolumn = "dx"\n')
    arguments = (
        "study.toml",
        "--data",
        "north.csv",
        "south.parquet",
        "east",
        "--json",
        "--no-baselines",
        *QUICK,
    )
    code, out, err = run(capsys, *arguments)
    assert code == 0, err
    document = json.loads(out)
    assert list(document["sites"]) == ["east", "north", "south"]
    assert document["partition"] is None
    assert document["baselines"] == {}
    assert sum(document["sites"]["east"].values()) == 169
    (folder / "east" / "holdout.key").write_bytes(b"another secret")
    _, out, _ = run(capsys, *arguments, "--out", "other")
    other = json.loads(out)
    assert other["sites"]["north"] == document["sites"]["north"]
    assert other["strategies"]["fedavg"]["models"] != document["strategies"]["fedavg"]["models"]


def test_a_site_that_is_left_out_might_as_well_not_be_there(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--without, in the command and again in rerun.sh: the model of the others' data alone, bit for bit."""
    whole = table(4)
    for place, name in enumerate(("north", "south", "east")):
        whole.iloc[place::3].to_csv(folder / f"{name}.csv", index=False)
    options = ("--json", "--no-baselines", *QUICK)
    files = ("north.csv", "south.csv", "east.csv")
    code, out, err = run(
        capsys, "study.toml", "--data", *files, "--without", "south", "--out", "out", *options
    )
    assert code == 0, err
    _, alone, _ = run(capsys, "study.toml", "--data", "north.csv", "east.csv", "--out", "alone", *options)
    one, other = json.loads(out), json.loads(alone)
    assert list(one["sites"]) == list(other["sites"]) == ["east", "north"]
    assert models(folder / "out") == models(folder / "alone")
    assert "--without=south" in (folder / "out" / "rerun.sh").read_text()


def test_a_failed_run_exits_with_1_and_says_why(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three of four sites drop out in every round: results are written, and the reason is on stderr."""
    faults = [option for site in (1, 2, 3) for option in ("--fault", f"site-{site}:decline:1-2")]
    code, out, err = run(
        capsys, "study.toml", "--data", "all.csv", "--json", "--no-baselines", "--out", "out", *faults, *QUICK
    )
    assert code == 1
    document = json.loads(out)
    assert document["status"] == "failed"
    assert list(document["left_out"]) == ["site-1", "site-2", "site-3"]
    assert "fedavg, seed 7: failed: round 1: 1 of 4 sites gave a valid answer; at least 2 are needed" in err
    for site in document["left_out"]:
        assert f"; {site}: declined: scripted fault" in err
    assert (folder / "out" / "report.html").exists()


def test_a_failed_run_is_not_said_to_lack_held_out_rows(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without any model there is no table: that is what is said, and not that no rows are held out."""
    faults = [option for site in range(1, 5) for option in ("--fault", f"site-{site}:decline")]
    code, out, _ = run(
        capsys, "study.toml", "--data", "all.csv", "--no-baselines", "--out", "out", *faults, *QUICK
    )
    assert code == 1
    assert "No model could be judged." in out
    assert "No model could be judged." in (folder / "out" / "report.html").read_text()
    assert "holds out" not in out
    assert "All models are judged" not in out


def without_override() -> None:
    """In a child process: even root obeys the permissions of folders (prctl PR_CAPBSET_DROP, CAP_DAC_OVERRIDE)."""
    ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)


def no_space() -> None:
    """In a child process: no file may hold a byte."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def limited(limit: Callable[[], None], folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(BIN / "consortium"), "simulate", "study.toml", "--data", "all.csv", *QUICK, *arguments]
    return subprocess.run(
        command, cwd=folder, preexec_fn=limit, capture_output=True, text=True, check=False, timeout=110
    )


def test_a_folder_that_cannot_be_written_is_refused_before_anything_runs(folder: Path) -> None:
    """An empty folder without the right to write: exit code 2, and no round was run for nothing."""
    (folder / "out").mkdir(mode=0o555)
    done = limited(without_override, folder, "--out", "out")
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr
        == "consortium: --out: nothing can be written into out; correct its permissions, or give another\n"
    )


@pytest.mark.parametrize("form", ["text", "json"])
def test_results_that_cannot_be_written_are_still_printed(form: str, folder: Path) -> None:
    """The disk is full when the run is over: the table is printed all the same, and exit code 1 says what is wrong."""
    done = limited(no_space, folder, "--out", "out", *(["--json"] if form == "json" else []))
    assert done.returncode == 1, done.stderr
    assert "consortium: the results could not be written into out (File too large)" in done.stderr
    assert "Traceback" not in done.stderr
    if form == "json":
        document = json.loads(done.stdout)
        assert document["report"] is None
        assert document["strategies"]["fedavg"]["metrics"]["auroc"]["mean"] > 0
    else:
        assert "local-only" in done.stdout
        assert "report" not in done.stdout


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_done(folder: Path) -> None:
    """Stopped in the second of many seeds: the first is printed and written, the exit code is 130."""
    command = [str(BIN / "consortium"), "simulate", "study.toml", "--data", "all.csv", "--no-baselines"]
    process = subprocess.Popen(
        [*command, "--processes", "0", "--rounds", "20", "--seeds", "2000", "--out", "out"],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if "seed" in line and "seed 7:" not in line:
            break
    process.send_signal(signal.SIGINT)
    try:
        out, err = process.communicate(timeout=30)
    except (
        subprocess.TimeoutExpired
    ):  # Python drops an interrupt that meets a destructor; a person presses again
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert "stopped" in err
    assert "Traceback" not in err
    assert "fedavg" in out
    facts = json.loads((folder / "out" / "run.json").read_text())
    assert facts["status"] == "stopped"
    assert 1 <= len(facts["seeds"]) < 2000
    assert "Stopped" in (folder / "out" / "report.html").read_text()


MAPPINGS = {
    "two mappings": ('[source]\nseperator = ";"\n', "[source]\ndecimal = 5\n"),
    "query": ('[source]\nsql = "SELECT nope FROM t"\nurl = "sqlite:///ward.db"\n', ""),
    "variable": ('[source]\nsql = "SELECT 1"\nurl = "env:NO_SUCH_WARD"\n', ""),
    "key": ("", ""),
}


def bad_mapping(name: str, folder: Path) -> None:
    """The folders east and west, the first with a mapping, a database or a key that is wrong."""
    sqlite3.connect(folder / "ward.db").execute("CREATE TABLE t (x)").connection.commit()
    for site, text in zip(("east", "west"), MAPPINGS[name], strict=True):
        (folder / site).mkdir()
        (folder / site / "mapping.toml").write_text(f"format = 1\n{text}")
        if "sql" not in text:
            table(4).to_csv(folder / site / "data.csv", index=False)
    if name == "key":
        (folder / "east" / "holdout.key").mkdir()


FILES = {
    "empty": ("all.csv", b""),
    "damaged": ("all.parquet", b"PAR1" + bytes(range(256))),
    "spreadsheet": ("all.csv", b"PK\x03\x04\x14\x00" + bytes(range(256)) * 9),
}


def bad(name: str, folder: Path) -> None:
    """Put the input of a bad-input case into the folder."""
    frame = table(4)
    if name in MAPPINGS:
        bad_mapping(name, folder)
    elif name in FILES:
        file, content = FILES[name]
        (folder / file).write_bytes(content)
    elif name == "study":
        text = study_text(4, study={"rounds": 0}, training={"lr": -1.0}, strategy={"name": "fedavgg"})
        (folder / "study.toml").write_text(text)
    elif name == "column":
        frame.rename(columns={"mean_radius": "mean_radios"}).to_csv("all.csv", index=False)
    elif name == "class":
        frame[frame["malignant"] == 0].to_csv("all.csv", index=False)
    elif name == "header":
        frame.iloc[:0].to_csv("all.csv", index=False)
    elif name == "unreadable":
        (folder / "all.csv").unlink()
        (folder / "all.csv").mkdir()
    elif name == "held out":
        (folder / "study.toml").write_text(study_text(4, data={"split": "part"}))
        frame.iloc[:300].assign(part="test").to_csv("a.csv", index=False)
        frame.iloc[300:].assign(part="train").to_csv("b.csv", index=False)
    elif name == "two sites":
        frame.iloc[:300].drop(columns="mean_area").to_csv("a.csv", index=False)
        frame.iloc[300:].drop(columns="malignant").to_csv("b.csv", index=False)


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("study", "--data all.csv", ["study.rounds", "training.lr", "strategy.name", "'fedavg'", "study check"]),
        ("column", "--data all.csv", ["all.csv", "'mean_radius'", "did you mean 'mean_radios'", "mapping"]),
        ("class", "--data all.csv", ["'malignant'", "same class", "check the column"]),
        ("empty", "--data all.csv", ["all.csv", "empty", "give one"]),
        ("header", "--data all.csv", ["all.csv", "no rows"]),
        ("unreadable", "--data all.csv", ["folder all.csv holds none", "put exactly one"]),
        ("damaged", "--data all.parquet", ["all.parquet", "write the file again"]),
        ("two sites", "--data a.csv b.csv", ["'a', a.csv", "'mean_area'", "'b', b.csv", "'malignant'"]),
        ("", "--data nowhere.csv", ["no file or folder nowhere.csv", "correct the path"]),
        ("", "", ["needs data", "--data a.csv b.csv"]),
        ("", "--data all.csv --compare fedavg,fedporx", ["did you mean 'fedprox'", "consortium strategies"]),
        ("", "--data all.csv --compare fedavg,fedavg", ["twice"]),
        ("", "--data all.csv --partition dirichlt:0.5", ["did you mean 'dirichlet'"]),
        ("", "--data all.csv --partition column:clinic", ["'clinic'", "no such column"]),
        ("", "--data all.csv --sites 1000", ["needs at least 1000 rows", "569"]),
        ("", "--data all.csv --sites 1", ["at least 2 sites", "min_sites"]),
        ("", "--data all.csv --sites 0", ["--sites: 0 given"]),
        ("", "--data all.csv --seeds 0", ["--seeds: 0 given"]),
        ("", "--data all.csv all.csv --sites 3", ["2 files", "leave out --sites"]),
        ("", "--data all.csv all.csv", ["several are called all", "rename"]),
        ("", "--data all.csv --fault site-1:dorp", ["did you mean 'drop'"]),
        ("", "--data all.csv --fault site-11:drop --processes 0", ["no site 'site-11'"]),
        ("", "--data all.csv --fault site-1:drop:5-9", ["site-1", "5 to 9", "no round", "of 3 rounds"]),
        ("", "--data all.csv --without site-9", ["no site 'site-9'", "sites here: site-1, site-2"]),
        ("", "--data all.csv --sites 2 --without site-1", ["at least 2 sites", "there are 1"]),
        ("", "--data all.csv --compare fedavg fedprox", ["--compare fedavg,fedprox"]),
        ("", "--data a.csv,b.csv", ["a.csv,b.csv", "--data a.csv b.csv"]),
        ("spreadsheet", "--data all.csv", ["all.csv", "no text", "spreadsheet"]),
        ("held out", "--data a.csv b.csv", ["1 of 2 sites", "training rows", "'a'", "min_sites"]),
        ("two mappings", "--data east west", ["east/mapping.toml", "seperator", "west/mapping.toml", "decimal"]),
        ("query", "--data east west", ["'east'", "The database said", "no such column: nope"]),
        ("variable", "--data east west", ["'east'", "NO_SUCH_WARD", "set it"]),
        ("key", "--data east west", ["east/holdout.key", "cannot be read", "permissions"]),
        ("", "--data all.csv --out .", ["not empty"]),
        ("", "--data all.csv --rounds 0", ["study.rounds"]),
        ("", "extra.csv", ["--data extra.csv"]),
    ],
)  # fmt: skip
def test_bad_input_exits_with_2_the_cause_and_what_to_do(
    name: str, arguments: str, says: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No traceback, nothing on stdout, no results, every cause named."""
    bad(name, folder)
    before = sorted(path.name for path in folder.iterdir())
    code, out, err = run(capsys, "study.toml", *arguments.split())
    assert code == 2, err
    assert out == ""
    assert "Traceback" not in err
    assert [said for said in says if said not in err] == [], err
    assert sorted(path.name for path in folder.iterdir() if path.name != "results") == before
    assert not [*folder.glob("results/*")]


def test_bad_input_in_a_process_of_its_own(folder: Path) -> None:
    """The same on a real command line: exit code 2, one message on stderr."""
    done = shell("consortium", "simulate", "study.toml", "--data", "nowhere.csv", cwd=folder)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "consortium: --data: there is no file or folder nowhere.csv; correct the path\n"


def test_faults_are_read_from_their_text() -> None:
    """Rounds are numbers and ranges; without rounds a fault is always there; other forms are refused."""
    assert parse_fault("a:drop") == Fault("a", "drop", None)
    assert parse_fault("a:nan:3") == Fault("a", "nan", frozenset({3}))
    assert parse_fault("a b:late:1-3,7") == Fault("a b", "late", frozenset({1, 2, 3, 7}))
    for wrong in (
        "a",
        "a:",
        ":drop",
        "a:drop:x",
        "a:drop:1-",
        "a:drop:-1",
        "a:drop:1;2",
        "a:drop:3-1",
        "a:drop:123456789",
    ):
        with pytest.raises(InputError, match="would be right"):
            parse_fault(wrong)


@pytest.mark.parametrize(
    "command",
    ["simulate", "demo", "strategies", "study", "study check", "model", "model verify", "model show", "model predict"],
)  # fmt: skip
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """--help of every command and subcommand shows how to type it."""
    with pytest.raises(SystemExit) as caught:
        main([*command.split(), "--help"])
    assert caught.value.code == 0
    examples = [line for line in capsys.readouterr().out.splitlines() if "Usage" not in line]
    assert any(f"consortium {command}" in line for line in examples)


def test_what_a_checked_study_says_to_type_next_runs(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`study check` ends with a command for the next step that has what a built-in task needs: data."""
    with pytest.raises(SystemExit):
        main(["study", "check", "study.toml"])
    assert capsys.readouterr().out.splitlines()[-1] == "Next: consortium simulate study.toml --data FILE ..."
