"""Copies of data lie encrypted on disk, and a worker opens them by a path all the same."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from consortium.client import exclusions
from consortium.client.datasets import Datasets
from consortium.client.home import Config, Home
from consortium.client.sealed_copy import SEALED
from consortium.client.snapshot import Snapshot, Snapshots, key_of
from consortium.protocol import configuration
from consortium.protocol.sealed import DataKey, new_data_key

KEY = new_data_key()
RUN = "study.1"
ROWS = "patient,x\nAdelheid Quandt,1\nBerthold Rabe,2\n"

READER = """
import hashlib, json, resource, sys
from pathlib import Path
from consortium.client.sealed_copy import most_open, open_all
from consortium.protocol.errors import ConsortiumError
from consortium.protocol import configuration
from consortium.protocol.sealed import DataKey
path, count, key = Path(sys.argv[1]), int(sys.argv[2]), DataKey(bytes.fromhex(sys.stdin.read()))
if len(sys.argv) > 3:
    resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[3]),) * 2)
try:
    open_all(path.parent, count, key)
except ConsortiumError as error:
    raise SystemExit(f"{type(error).__name__}: {error}")
files = sorted(path.rglob("*")) if path.is_dir() else [path]
found = {str(one.relative_to(path)): hashlib.sha256(one.read_bytes()).hexdigest() for one in files if one.is_file()}
refused = 0
for one in files:
    if one.is_file():
        try:
            one.open("r+b", buffering=0).write(b"x")
        except OSError:
            refused += 1
print(json.dumps([found, refused]))
"""


@pytest.fixture
def home(tmp_path: Path) -> Home:
    folder = tmp_path / "site"
    folder.mkdir(mode=0o700)
    configuration.write(
        folder / "client.toml", Config(federation="lung", site="hospital-1", host="localhost", port=9440)
    )
    return Home(folder)


def read(copy: Snapshot, key: DataKey = KEY, *limit: int) -> tuple[dict[str, str], int]:
    """The SHA-256 of each file as another program opens it, and how many of them it could not write to."""
    command = [sys.executable, "-c", READER, str(copy.path), str(copy.sealed), *map(str, limit)]
    secret = key_of(key, RUN).secret.hex()
    done = subprocess.run(command, input=secret, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise ValueError(done.stderr)
    found, refused = json.loads(done.stdout)
    return found, refused


def in_the_clear(home: Home, *words: bytes) -> list[Path]:
    """Files of the spool that hold one of these words."""
    files = [path for path in home.spool.rglob("*") if path.is_file() and not path.is_symlink()]
    assert files
    return [path for path in files if any(word in path.read_bytes() for word in words)]


def test_a_copied_file_is_read_by_its_worker_and_nobody_else(home: Home, tmp_path: Path) -> None:
    """Its bytes are the source's, it cannot be changed, the disk shows none of it, and it is used again by the agent's
    next start; another key, or a changed byte, opens nothing."""
    source = tmp_path / "patients.csv"
    source.write_text(ROWS)
    one = Datasets(home).add("patients", str(source), None)
    copy = Snapshots("hospital-1", home.spool, KEY).lay(RUN, one)
    assert (copy.path.name, copy.sealed) == ("data.csv", 1)
    assert read(copy) == ({".": hashlib.sha256(ROWS.encode()).hexdigest()}, 1)
    assert in_the_clear(home, b"Quandt", b"patient,x") == []
    source.write_text("other\n")
    assert Snapshots("hospital-1", home.spool, KEY).lay(RUN, one) == copy
    with pytest.raises(ValueError, match="IntegrityError: the copy of the data: cannot be decrypted"):
        read(copy, new_data_key())
    sealed = copy.path.parent / SEALED / "0"
    sealed.chmod(0o600)
    sealed.write_bytes(sealed.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="IntegrityError: the copy of the data: cannot be decrypted"):
        read(copy)


def test_a_copied_folder_keeps_its_shape(home: Home, tmp_path: Path) -> None:
    """Images in folders by class: each by its name, also where they are more than a program opens by default; where
    there are more than it may open, the reason says what to do."""
    right = {}
    for number in range(7):
        folder = tmp_path / "images" / f"class-{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), number).save(folder / f"{number}.png")
        name = f"class-{number % 2}/{number}.png"
        right[name] = hashlib.sha256((folder / f"{number}.png").read_bytes()).hexdigest()
    one = Datasets(home).add("images", str(tmp_path / "images"), None)
    copy = Snapshots("hospital-1", home.spool, KEY).lay(RUN, one)
    assert copy.sealed == 7
    assert read(copy) == (right, 7)
    assert in_the_clear(home, b"PNG") == []
    with pytest.raises(
        ValueError, match="InputError: the data are 7 files, more than a program may open here"
    ):
        read(copy, KEY, 606)


def test_a_query_and_a_table_without_the_excluded_are_copied_encrypted(home: Home, tmp_path: Path) -> None:
    """The programs that make them encrypt what they write, as they write it."""
    with sqlite3.connect(tmp_path / "clinic.db") as database:
        database.execute("CREATE TABLE patients (patient, x)")
        database.executemany(
            "INSERT INTO patients VALUES (?, ?)", [("Adelheid Quandt", 1), ("Berthold Rabe", 2)]
        )
    own = tmp_path / "mapping.toml"
    url = f"sqlite:///{tmp_path / 'clinic.db'}"
    own.write_text(
        f'format = 1\n[source]\nsql = "TABLE patients"\nurl = "{url}"\n'.replace("TABLE", "SELECT * FROM")
    )
    (tmp_path / "patients.csv").write_text(ROWS)
    for name, source, mapping in (("asked", "sql", own), ("table", str(tmp_path / "patients.csv"), None)):
        one = Datasets(home).add(name, source, mapping)
        clear = Snapshots("hospital-1", tmp_path / "clear" / name)
        exclusions.change(one.folder, "patient", ["Berthold Rabe"])
        copy = Snapshots("hospital-1", home.spool / name, KEY).lay(RUN, one)
        plain = clear.lay(RUN, one)
        assert (copy.sealed, plain.sealed, copy.gaps, plain.gaps) == (1, 0, (1,), (1,))
        assert read(copy)[0] == {".": hashlib.sha256(plain.path.read_bytes()).hexdigest()}
        assert in_the_clear(home, b"Quandt", b"PAR1") == []
