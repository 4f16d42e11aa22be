"""The features of predictions: kept only where that was asked for, sealed, for their time, and deleted when told."""

import contextlib
import json
import os
import resource
import signal
import sqlite3
from pathlib import Path

import numpy as np
import pytest
from served import Serving, serving

from consortium.protocol import cli
from consortium.protocol.errors import ConsortiumError, InputError, IntegrityError
from consortium.protocol.keys import Lock
from consortium.server.serving.features import DAY, Features, expire

INFER = "/v2/models/toy/infer"
LOCK = Lock(b"k" * 64)
ARRAYS = {
    "age": np.array([[61.5], [np.nan]], np.float32),
    "code": np.array([["2"], [""]], object),
}
INPUTS = [
    {"name": "age", "datatype": "FP32", "shape": [2, 1], "data": [61.5, None]},
    {"name": "code", "datatype": "BYTES", "shape": [2, 1], "data": ["2", ""]},
]


class Clock:
    """Seconds since the epoch, as the test says."""

    now = 1e9

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def kept(tmp_path: Path, clock: Clock) -> Features:
    return Features(tmp_path, LOCK, clock, 10)


def on_disk(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def test_what_was_kept_comes_back_and_lies_there_sealed(kept: Features, tmp_path: Path, clock: Clock) -> None:
    """Missing values, codes and numbers, as the protocol has them; no bytes of them are on the disk."""
    odd = {"code": np.array([["a-code-that-is-seldom"]], object)}
    kept.keep("1-b", "lung", "1", odd)
    kept.keep("1-a", "lung", "1", ARRAYS)
    found = kept.read("1-a")
    assert (found.model, found.version, found.at, found.until) == ("lung", "1", 1e9, 1e9 + 10 * DAY)
    assert found.inputs == INPUTS
    assert kept.read("1-b").inputs[0]["data"] == ["a-code-that-is-seldom"]
    assert b"1-a" in on_disk(tmp_path)
    assert b"a-code-that-is-seldom" not in on_disk(tmp_path)
    assert (tmp_path / "features/features.sqlite").stat().st_mode & 0o77 == 0


def test_time_ends_it(kept: Features, tmp_path: Path, clock: Clock) -> None:
    """After its days it is handed out no more, and then deleted, without the key; what is younger stays."""
    kept.keep("1-old", "lung", "1", ARRAYS)
    clock.now += 9 * DAY
    kept.keep("1-new", "lung", "1", ARRAYS)
    assert expire(tmp_path, clock) == 0
    clock.now += DAY
    with pytest.raises(InputError, match="1-old"):
        kept.read("1-old")
    assert b"1-old" in on_disk(tmp_path)
    assert expire(tmp_path, clock) == 1
    assert b"1-old" not in on_disk(tmp_path)
    assert kept.read("1-new").inputs == INPUTS
    clock.now += 365 * DAY
    assert expire(tmp_path, clock) == 1


def test_more_than_one_batch_ends(kept: Features, tmp_path: Path, clock: Clock) -> None:
    """However many have had their time, all go."""
    for number in range(1001):
        kept.keep(f"1-{number}", "lung", "1", {"x": np.ones((1, 1), np.float32)})
    clock.now += 10 * DAY
    assert expire(tmp_path, clock) == 1001


def test_a_shorter_time_holds_for_what_is_there(kept: Features, tmp_path: Path, clock: Clock) -> None:
    """A start with fewer days shortens the time of what was kept before; one with more lengthens nothing."""
    kept.keep("1-a", "lung", "1", ARRAYS)
    Features(tmp_path, LOCK, clock, 3).close()
    assert kept.read("1-a").until == 1e9 + 3 * DAY
    Features(tmp_path, LOCK, clock, 30).close()
    assert kept.read("1-a").until == 1e9 + 3 * DAY


def test_purged_is_gone_all_or_none(kept: Features, tmp_path: Path, clock: Clock) -> None:
    """Nothing of it is in the database or its log; where one id is unknown, nothing is deleted."""
    for one in ("1-a", "1-b", "1-c"):
        kept.keep(one, "lung", "1", ARRAYS)
    with pytest.raises(InputError, match="1-zzz"):
        kept.purge(["1-a", "1-zzz"])
    assert kept.read("1-a").inputs == INPUTS
    Features(tmp_path, LOCK, clock, None).purge(["1-a", "1-b", "1-a"])
    assert b"1-a" not in on_disk(tmp_path)
    assert kept.read("1-c").inputs == INPUTS


def test_a_changed_row_or_another_key_is_refused(kept: Features, tmp_path: Path, clock: Clock) -> None:
    """A row under another's id, a flipped byte, a key that is not its own: exit 4, and never a wrong answer."""
    kept.keep("1-a", "lung", "1", ARRAYS)
    kept.keep("1-b", "lung", "1", {"age": ARRAYS["age"] + 1})
    with sqlite3.connect(tmp_path / "features/features.sqlite") as db:
        db.execute("UPDATE kept SET inputs = (SELECT inputs FROM kept WHERE prediction = '1-b')")
    db.close()
    assert kept.read("1-b").inputs[0]["data"] == [62.5, None]
    with pytest.raises(IntegrityError, match="1-a"):
        kept.read("1-a")
    with pytest.raises(IntegrityError, match=r"data\.key"):
        Features(tmp_path, Lock(b"o" * 64), clock, None)


def test_a_full_disk_keeps_nothing_and_says_so(kept: Features, tmp_path: Path) -> None:
    """What cannot be kept is an error; what was kept stays, and the next is kept when there is room."""
    kept.keep("1-a", "lung", "1", ARRAYS)
    large = {"x": np.arange(100_000, dtype=np.float64).reshape(-1, 1)}
    kept._db.execute("PRAGMA max_page_count = 20")
    with pytest.raises(ConsortiumError, match="nothing is answered"):
        kept.keep("1-b", "lung", "1", large)
    assert kept.read("1-a").inputs == INPUTS
    kept._db.execute("PRAGMA max_page_count = 100000")
    kept.keep("1-b", "lung", "1", large)
    assert len(kept.read("1-b").inputs[0]["data"]) == 100_000


def consortium(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        cli.main([str(one) for one in arguments])
    return int(end.value.code or 0)


def request() -> bytes:
    """A row within the contract, with a number that no other file here holds."""
    return json.dumps(
        {
            "inputs": [
                {"name": "linear", "datatype": "FP32", "shape": [1, 1], "data": [123.4375]},
                {"name": "cat", "datatype": "FP32", "shape": [1, 1], "data": [1.25]},
                {"name": "smokes?", "datatype": "BYTES", "shape": [1, 1], "data": ["yes"]},
            ]
        }
    ).encode()


def predicted(served: Serving) -> tuple[int, str]:
    status, _, content = served.ask("POST", INFER, request())
    return status, json.loads(content).get("parameters", {}).get("prediction_id", content.decode())


def test_served_features_are_read_purged_and_audited(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Off by default; then by id while the program serves, with who and why in the audit; no feature stands in it."""
    folder = tmp_path / "serving"
    with serving(exported, folder, "--unsigned", "--grpc-port", -1) as served:
        assert predicted(served)[0] == 200
        assert "nothing of it is kept" in served.ask("GET", "/", role="")[2].decode()
    assert not (folder / "features").exists()
    assert consortium("model", "features", "read", "1-x", "--dir", folder, "--why", "w") == 2
    assert "--keep-features" in capsys.readouterr().err
    with serving(exported, folder, "--unsigned", "--grpc-port", -1, "--keep-features", 30) as served:
        assert "kept, encrypted, for 30 days" in served.ask("GET", "/", role="")[2].decode()
        _, one = predicted(served)
        _, other = predicted(served)
        assert consortium("model", "features", "read", one, "--dir", folder, "--why", "complaint 17") == 0
        found = json.loads(capsys.readouterr().out)
        assert found["inputs"] == json.loads(request())["inputs"]
        assert (found["model"], found["version"]) == ("toy", "1")
        assert found["until"] - found["at"] == pytest.approx(30 * DAY)
        assert consortium("model", "features", "purge", one, "--dir", folder, "--why", "asked for") == 0
        assert consortium("model", "features", "read", one, "--dir", folder, "--why", "again") == 2
        assert one in capsys.readouterr().err
        assert predicted(served)[0] == 200
        assert one.encode() not in on_disk(folder / "features")
    lines = [
        json.loads(line)
        for path in sorted((folder / "records").glob("audit-*"))
        for line in path.read_text().splitlines()
    ]
    acts = [
        (line["act"], line["prediction"], line["why"], bool(line["by"])) for line in lines if "act" in line
    ]
    assert acts == [
        ("features read", one, "complaint 17", True),
        ("features purge", one, "asked for", True),
        ("features read", one, "again", True),
    ]
    assert b"123.4375" not in on_disk(folder)
    assert consortium("model", "features", "read", other, "--dir", folder, "--why", "w") == 0


@pytest.mark.slow
def test_features_outlive_a_kill_and_a_full_disk_stops_answers(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was answered is there after SIGKILL. Where a file cannot grow, 503 and no prediction, health and the page go
    on; where it can again, so do answers."""
    folder = tmp_path / "serving"
    with (
        contextlib.suppress(AssertionError),  # it does not end by itself
        serving(exported, folder, "--unsigned", "--grpc-port", -1, "--keep-features", 30) as served,
    ):
        ids = [predicted(served)[1] for _ in range(20)]
        os.kill(served.pid, signal.SIGKILL)
    assert len(set(ids)) == 20
    for one in (ids[0], ids[-1]):
        assert consortium("model", "features", "read", one, "--dir", folder, "--why", "w") == 0
    capsys.readouterr()
    with serving(exported, folder, "--unsigned", "--grpc-port", -1, "--keep-features", 30) as served:
        assert predicted(served)[0] == 200
        before = resource.prlimit(served.pid, resource.RLIMIT_FSIZE)
        size = (folder / "features/features.sqlite-wal").stat().st_size
        resource.prlimit(served.pid, resource.RLIMIT_FSIZE, (size, before[1]))
        status, said = predicted(served)
        assert status == 503
        assert "features" in said
        assert served.get("/v2/health/ready", role="")[0] == 200
        resource.prlimit(served.pid, resource.RLIMIT_FSIZE, before)
        status, one = predicted(served)
        assert status == 200
    assert consortium("model", "features", "read", one, "--dir", folder, "--why", "w") == 0
