"""A site's list of persons and records that no run may see: they are in nothing, and everybody else stays in place."""

from __future__ import annotations

import gzip
import json
import sqlite3
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from breast_cancer import study_text, table

from consortium.client import copy_without, exclusions, sql_snapshot
from consortium.client.data_check import check, check_exclusions
from consortium.client.datasets import Dataset, Datasets
from consortium.client.home import Config, Home
from consortium.client.mapping import parse
from consortium.client.serving_worker import Worker
from consortium.client.site import Rows, rows
from consortium.client.snapshot import Snapshot, Snapshots
from consortium.client.task import Source, task_of
from consortium.protocol import configuration
from consortium.protocol.cli import main
from consortium.protocol.errors import InputError, IntegrityError
from consortium.protocol.files import write_private
from consortium.protocol.study import Study

STUDY = Study.parse(study_text(4))
PEOPLE = [f"patient-{number // 2:03d}" for number in range(60)]
OUT = ["patient-003", "patient-017", "patient-029", "nobody-here"]
LEFT = np.array([person not in OUT for person in PEOPLE])


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """A client's folder, so far as data go."""
    folder = tmp_path / "site"
    folder.mkdir(mode=0o700)
    config = Config(federation="lung", site="hospital-1", host="localhost", port=9440)
    configuration.write(folder / "client.toml", config)
    return Home(folder)


def people() -> pd.DataFrame:
    """Sixty rows of thirty persons; a cell of the column of names has all that a CSV can hold."""
    frame = table(4).head(60)
    return frame.assign(patient=PEOPLE, name=['Ann "Nan" O\'Neil,\nß'] * 60)


def registered(home: Home, kind: str) -> Dataset:
    """The table as a data set of some kind."""
    folder, frame = home.folder.parent, people()
    path, text = folder / f"patients.{kind}", ""
    if kind == "parquet":
        frame.to_parquet(path, index=False)
    elif kind == "sql":
        with sqlite3.connect(folder / "clinic.db") as database:
            frame.to_sql("patients", database, index=False)
        url = f'url = "sqlite:///{folder / "clinic.db"}"'
        text = f"[source]\nsql = 'TABLE'\n{url}".replace("TABLE", "SELECT * FROM patients")
    elif kind == "tsv":
        frame.to_csv(path, index=False, sep=";", encoding="latin-1")
        text = '[source]\nseparator = ";"\nencoding = "latin-1"\n'
    else:
        frame.to_csv(path, index=False)
    own = folder / "mapping.toml"
    own.write_text("format = 1\n" + text)
    return Datasets(home).add("patients", "sql" if kind == "sql" else str(path), own)


def copied(home: Home, one: Dataset, run: str = "run") -> Snapshot:
    return Snapshots("hospital-1", home.spool).lay(run, one)


def read(copy: Snapshot, study: Study = STUDY) -> Rows:
    source = Source("hospital-1", copy.path, mapping=copy.mapping, key=copy.key, gaps=copy.gaps)
    return rows(task_of(study), source)


def kept(before: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the whole table's training and held-out rows those of persons who are not excluded."""
    whole = task_of(STUDY).data(Source("hospital-1", table=people()))
    left = whole.inputs[torch.from_numpy(LEFT)]
    lists = [
        [row for row in some if any(torch.equal(row, x) for x in left)]
        for some in (before.inputs, before.test_inputs)
    ]
    return torch.stack(lists[0]), torch.stack(lists[1])


@pytest.mark.parametrize("kind", ["csv", "csv.gz", "tsv", "parquet", "sql"])
def test_who_is_excluded_is_in_no_copy_and_all_others_stay_where_they_were(kind: str, home: Home) -> None:
    """Training and holdout are what they were, but for the rows of these persons: nobody changes sides."""
    one = registered(home, kind)
    listed, _ = exclusions.change(one.folder, "patient", OUT)
    path, mapping = home.folder / f"copy.{kind.replace('sql', 'parquet')}", one.mapping()
    if one.source is None:
        gaps = sql_snapshot.write("hospital-1", mapping, path, listed)
    else:
        gaps = copy_without.copy("here", one.source, path, parse(mapping).source, listed)
    assert gaps == [6, 7, 34, 35, 58, 59]
    before = rows(task_of(STUDY), Source("hospital-1", table=people(), key=one.key()))
    mapping = {} if kind == "sql" else mapping
    after = read(Snapshot(path, mapping, one.key(), tuple(gaps)))
    train, test = kept(before)
    assert torch.equal(after.inputs, train)
    assert torch.equal(after.test_inputs, test)
    assert len(after.inputs) + len(after.test_inputs) == 54
    content = gzip.decompress(path.read_bytes()) if kind == "csv.gz" else path.read_bytes()
    assert not any(name.encode() in content for name in OUT)
    assert path.stat().st_mode & 0o777 == 0o400


def test_a_run_that_begins_after_is_without_them_and_one_under_way_as_it_was(home: Home) -> None:
    """A copy that is there is used again; what the worker is handed over says which rows are missing."""
    one = registered(home, "csv")
    first = copied(home, one, "first")
    exclusions.change(one.folder, "patient", OUT)
    copy = copied(home, one)
    assert len(copy.gaps) == 6
    assert copied(home, one, "first") == first
    assert copied(home, one) == copy
    about = {"study": STUDY.text, "site": "hospital-1", "source": json.loads(json.dumps(copy.document()))}
    worker = Worker({**about, "epoch": 0, "state": str(home.folder / "state"), "key": "00" * 32})
    loaded, (train, test) = worker._site.load(), kept(read(first))
    assert torch.equal(loaded.inputs, train)
    assert torch.equal(loaded.test_inputs, test)


def test_rows_that_are_malformed_stay_so_and_count_in_their_places(home: Home) -> None:
    """The study's tolerance sees the rows that it would have seen, and the others' numbers are those of the file."""
    path = home.folder.parent / "patients.csv"
    people().drop(columns="name").to_csv(path, index=False)
    lines = path.read_text().splitlines()
    lines[3] += ",one,too,many"  # row 2, of nobody who is excluded
    path.write_text("\n".join(lines))
    listed, _ = exclusions.change(home.folder, "patient", OUT)
    study, copy = STUDY.with_(data={"tolerance": 0.1}), home.folder / "copy.csv"
    gaps = copy_without.copy("here", path, copy, parse({}).source, listed)
    examples = task_of(study).data(Source("hospital-1", copy, gaps=tuple(gaps)))
    assert examples.skipped.count == 1
    assert examples.ids is not None
    assert examples.ids.tolist() == [i for i in range(60) if i not in (2, *gaps)]


def test_the_list_is_counted_kept_and_undone_and_holds_no_id(
    home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the command line; it stays when the data set goes and comes back; the ids are in no file of the site's."""
    one = registered(home, "csv")
    (tmp_path / "withdrawn.txt").write_text("\n patient-003 \n\npatient-017\n")

    def client(*words: str) -> str:
        with pytest.raises(SystemExit) as caught:
            main(["client", "data", *words, "--dir", str(home.folder)])
        assert caught.value.code == 0
        return capsys.readouterr().out

    said = client("exclude", "patients", "--column", "patient", "--ids", str(tmp_path / "withdrawn.txt"))
    assert "2 ids new on the list, 2 are excluded, from the next run on" in said
    assert all(b"patient-003" not in path.read_bytes() for path in home.folder.rglob("*") if path.is_file())
    assert json.loads(client("list", "--json"))[0]["excluded"] == 2
    found = check(one, "hospital-1", STUDY, home.spool)
    assert (found["excluded_ids"], found["excluded_rows"], found["rows"]) == (2, 4, 56)
    assert list(home.spool.iterdir()) == []
    Datasets(home).remove("patients")
    again = registered(home, "parquet")
    assert copied(home, again).gaps == (6, 7, 34, 35)
    listed, changed = exclusions.change(one.folder, "", ["patient-017", "patient-999"], undo=True)
    assert (len(listed.digests), changed) == (1, 1)
    assert not listed.covers("patient-017")
    assert listed.covers("patient-003")


def test_nothing_runs_where_the_list_cannot_be_followed(home: Home, tmp_path: Path) -> None:
    """A column that went, a list or key that is damaged or missing, data that are no table: refused, and named."""
    one = registered(home, "csv")
    with pytest.raises(InputError, match="no columns 'pateint'"):
        check_exclusions(one, "hospital-1", "pateint")
    with pytest.raises(InputError, match="name the column"):
        exclusions.change(one.folder, "", OUT)
    exclusions.change(one.folder, "patient", OUT)
    with pytest.raises(InputError, match="the list is of column 'patient'"):
        exclusions.change(one.folder, "name", OUT)
    people().rename(columns={"patient": "id"}).to_csv(tmp_path / "patients.csv", index=False)
    with pytest.raises(InputError, match="no columns 'patient'"):
        copied(home, one)
    key = (one.folder / exclusions.KEY).read_bytes()
    (one.folder / exclusions.KEY).unlink()
    with pytest.raises(IntegrityError, match=r"excluded\.key: is missing"):
        copied(home, one)
    (one.folder / exclusions.KEY).write_bytes(key)
    (one.folder / exclusions.LIST).write_text('{"format": 1}')
    with pytest.raises(IntegrityError, match=r"excluded\.json: is damaged"):
        copied(home, one)
    (one.folder / exclusions.LIST).unlink()
    with pytest.raises(IntegrityError, match=r"excluded\.json: is missing"):
        copied(home, one)
    scans = tmp_path / "scans"
    scans.mkdir()
    with pytest.raises(InputError, match="CSV, Parquet and SQL alone"):
        check_exclusions(Datasets(home).add("scans", str(scans), None), "hospital-1", "patient")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(InputError, match="holds no id"):
        exclusions.ids_in(tmp_path / "empty.txt")


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_first_list_that_was_cut_off_can_be_given_again(
    cut: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever write of the first list fails, what is left is no list that was lost, and the same ids can be given."""
    written: list[Path] = []

    def until_full(path: Path, content: bytes) -> None:
        written.append(path)
        if len(written) >= cut:
            raise OSError(28, "No space left on device")
        write_private(path, content)

    with monkeypatch.context() as full:
        full.setattr(exclusions, "write_private", until_full)
        with pytest.raises(OSError, match="No space"):
            exclusions.change(tmp_path, "patient", OUT)
    assert not exclusions.read(tmp_path).digests
    exclusions.change(tmp_path, "patient", OUT)
    assert all(exclusions.read(tmp_path).covers(one) for one in OUT)


def test_a_key_that_was_cut_short_is_refused_as_nobody_would_be_covered(tmp_path: Path) -> None:
    """A list under a key of another length is not followed: its ids would be found in no row."""
    exclusions.change(tmp_path, "patient", OUT)
    key = tmp_path / exclusions.KEY
    key.write_bytes(key.read_bytes()[:16])
    with pytest.raises(IntegrityError, match=r"excluded\.key: is damaged"):
        exclusions.read(tmp_path)
