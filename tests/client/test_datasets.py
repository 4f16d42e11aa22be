"""Registered data, their read-only copies, and what `data check` says."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from breast_cancer import study_text, table

from consortium.client import tables
from consortium.client.columns import Column
from consortium.client.data_check import check
from consortium.client.datasets import Datasets
from consortium.client.home import Config, Home
from consortium.client.snapshot import Snapshots
from consortium.client.task import Source
from consortium.protocol import configuration
from consortium.protocol.errors import InputError, RefusedError
from consortium.protocol.study import Study

CLIENT: list[str] = [str(Path(sys.executable).with_name("consortium")), "client"]
STUDY = Study.parse(study_text(4))


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """A client's folder, so far as data go."""
    folder = tmp_path / "site"
    folder.mkdir(mode=0o700)
    config = Config(federation="lung", site="hospital-1", host="localhost", port=9440)
    configuration.write(folder / "client.toml", config)
    table(4).to_csv(tmp_path / "patients.csv", index=False)
    return Home(folder)


def mapping(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mapping.toml"
    path.write_text("format = 1\n" + text)
    return path


def test_data_are_added_listed_and_removed_and_the_holdout_key_stays(home: Home, tmp_path: Path) -> None:
    """By the command line; files are private; added again, the same rows are held out."""
    own = mapping(tmp_path, '[columns.mean_radius]\ncolumn = "mean_radius"\n')
    source = str(tmp_path / "patients.csv")
    add = [
        *CLIENT,
        "data",
        "add",
        "patients",
        "--source",
        source,
        "--map",
        str(own),
        "--dir",
        str(home.folder),
    ]
    subprocess.run(add, check=True, timeout=30, capture_output=True)
    (one,) = Datasets(home).all()
    key = one.key()
    assert (one.name, str(one.source), len(key)) == ("patients", source, 32)
    for path in home.data("patients").iterdir():
        assert path.stat().st_mode & 0o077 == 0
    listed = subprocess.run(
        [*CLIENT, "data", "list", "--json", "--dir", str(home.folder)],
        check=True, timeout=30, capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert json.loads(listed) == [{"name": "patients", "source": source, "excluded": 0}]
    again = subprocess.run(add, check=False, timeout=30, capture_output=True, text=True)
    assert (again.returncode, "is there already" in again.stderr) == (2, True)
    Datasets(home).remove("patients")
    assert Datasets(home).all() == []
    assert Datasets(home).add("patients", source, own).key() == key


def test_what_cannot_be_data_is_refused(home: Home, tmp_path: Path) -> None:
    """Files that are not there, names that are none, sql without a query, a query beside a file."""
    data = Datasets(home)
    source = str(tmp_path / "patients.csv")
    query = mapping(tmp_path, '[source]\nsql = "SELECT 1"\nurl = "sqlite:///x.db"\n')
    with pytest.raises(InputError, match="there is no"):
        data.add("patients", str(tmp_path / "nothing.csv"), None)
    with pytest.raises(InputError, match="as a name"):
        data.add("../patients", source, None)
    with pytest.raises(InputError, match="needs sql and url"):
        data.add("patients", "sql", None)
    with pytest.raises(InputError, match="the source is not a file"):
        data.add("patients", source, query)
    assert data.all() == []


def test_a_password_in_a_url_is_refused_and_not_repeated(home: Home, tmp_path: Path) -> None:
    """Neither as a source nor in the mapping; where it lies may be named."""
    data, url = Datasets(home), "postgresql://reader:hunter2@db/clinic"
    with pytest.raises(InputError) as caught:
        data.add("patients", url, None)
    assert "hunter2" not in str(caught.value)
    with pytest.raises(InputError, match="holds a password") as caught:
        data.add("patients", "sql", mapping(tmp_path, f'[source]\nsql = "SELECT 1"\nurl = "{url}"\n'))
    assert "hunter2" not in str(caught.value)


def test_a_copy_is_private_used_again_and_removed(home: Home, tmp_path: Path) -> None:
    """The worker's file is another than the source, read-only; it stays the same until the run ends."""
    source = tmp_path / "patients.csv"
    one = Datasets(home).add("patients", str(source), None)
    snapshots = Snapshots("hospital-1", home.spool)
    copy = snapshots.lay("../run", one)
    content = source.read_bytes()
    assert copy.path.read_bytes() == content
    assert copy.path.stat().st_mode & 0o777 == 0o400
    assert home.spool in copy.path.parents
    source.write_text("other\n")
    assert Snapshots("hospital-1", home.spool).lay("../run", one).path.read_bytes() == content
    snapshots.lay("second", one)
    snapshots.keep_only({"second"})
    assert not copy.path.exists()
    snapshots.remove("second")
    assert list(home.spool.iterdir()) == []


def test_a_query_becomes_a_copy_that_reads_the_same(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers, texts, mixed cells, missing ones and codes are read from the copy as from the database, bit for bit;
    the copy's mapping knows neither query nor address nor password."""
    mixed = [None, 1, 2.5, "x", " y ", 1e300, b"raw", "007", 3.0, ""] * 5
    sexes = ["M", "W", None, 1.0, "NA"] * 10
    rows = zip(*table(4).head(50).to_numpy().T.tolist(), mixed, sexes, strict=True)
    with sqlite3.connect(tmp_path / "clinic.db") as database:
        database.execute(
            "CREATE TABLE patients (mean_radius, texture, perimeter, mean_area, malignant, mixed, sex)"
        )
        database.executemany("INSERT INTO patients VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
    monkeypatch.setenv("CLINIC_URL", f"sqlite:///{tmp_path / 'clinic.db'}")
    own = mapping(
        tmp_path,
        'missing = ["NA"]\n[source]\nsql = "SELECT * FROM patients"\nurl = "env:CLINIC_URL"\n'
        '[columns.s]\ncolumn = "sex"\ncodes = { M = "male", W = "female", "1" = "male" }\n',
    )
    one = Datasets(home).add("patients", "sql", own)
    copy = Snapshots("hospital-1", home.spool).lay("run", one)
    assert copy.mapping["source"] == {}
    columns = [
        *(Column(name) for name in ("mean_radius", "mean_area", "malignant")),
        Column("mixed", text=True),
        Column("s", values=("male", "female")),
    ]
    straight = tables.read(Source("hospital-1", None, mapping=one.mapping(), key=one.key()), columns)
    copied = tables.read(Source("hospital-1", copy.path, mapping=copy.mapping, key=copy.key), columns)
    pd.testing.assert_frame_equal(straight, copied, check_exact=True)
    assert straight["mixed"].notna().sum() > 20


def test_a_database_that_refuses_is_reported(home: Home, tmp_path: Path) -> None:
    """With what it said, for the operator; nothing is left behind."""
    sqlite3.connect(tmp_path / "clinic.db").close()
    url = f"sqlite:///{tmp_path / 'clinic.db'}"
    query = "SELECT * FROM nothing"
    own = mapping(tmp_path, f'[source]\nsql = "{query}"\nurl = "{url}"\n')
    (tmp_path / "clinic.db").touch()
    one = Datasets(home).add("patients", "sql", own)
    with pytest.raises(InputError, match="the database refused"):
        Snapshots("hospital-1", home.spool).lay("run", one)
    assert not list(home.spool.glob("*/snapshot"))


def test_check_names_every_column_that_is_not_there(home: Home, tmp_path: Path) -> None:
    """Of the mapping, and of a study; what fits says so."""
    data = Datasets(home)
    source = str(tmp_path / "patients.csv")
    good = data.add("good", source, None)
    nobody = {"excluded_ids": 0, "excluded_rows": 0}
    assert check(good, "hospital-1", None, home.spool) == {"data": "good", "columns": 5, **nobody}
    read = {"data": "good", "study": "breast-cancer", "rows": 569}
    assert check(good, "hospital-1", STUDY, home.spool) == {**read, **nobody}
    bad = data.add(
        "bad",
        source,
        mapping(
            tmp_path, '[columns.mean_radius]\ncolumn = "radus"\n[columns.malignant]\ncolumn = "befund"\n'
        ),
    )
    with pytest.raises(InputError, match="2 mistakes") as caught:
        check(bad, "hospital-1", None, home.spool)
    assert "'radus'" in str(caught.value)
    assert "'befund'" in str(caught.value)
    (tmp_path / "study.toml").write_text(STUDY.text)
    done = subprocess.run(
        [*CLIENT, "data", "check", "bad", "--study", str(tmp_path / "study.toml"), "--dir", str(home.folder)],
        check=False, timeout=60, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert "radus" in done.stderr


def test_check_runs_no_code_of_a_study(home: Home, tmp_path: Path) -> None:
    """A study with a task of its own is refused; its module is not imported."""
    study = STUDY.with_(
        study={"task": "task:Mine"}, data={"features": None, "target": None}, evaluation={"metric": None}
    )
    one = Datasets(home).add("patients", str(tmp_path / "patients.csv"), None)
    with pytest.raises(RefusedError, match="code of its own"):
        check(one, "hospital-1", study, home.spool)
