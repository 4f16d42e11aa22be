"""The audit log: a chain over bounded files, which shows every repair."""

from __future__ import annotations

import gc
import json
import threading
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from consortium.protocol import audit, audit_view
from consortium.protocol.audit import Audit, segments
from consortium.protocol.chain import Head, start_of
from consortium.protocol.errors import ConsortiumError, InputError, IntegrityError

NAME = "audit hospitals alba"
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OTHER = Ed25519PrivateKey.from_private_bytes(bytes(32))


def opened(folder: Path, key: Ed25519PrivateKey = KEY, segment: int = 1500) -> Audit:
    public = (KEY.public_key(), OTHER.public_key())
    return Audit(folder, NAME, lambda: key, lambda: public, clock=lambda: 1e9, segment=segment)


def filled(folder: Path, count: int, segment: int = 1500) -> list[Head]:
    one = opened(folder, segment=segment)
    return [one.note("event", {"number": number}) for number in range(count)]


def test_a_log_goes_on_over_bounded_files_and_verifies_as_one(tmp_path: Path) -> None:
    """Each file begins where the one before ended, and none grows much beyond its bound."""
    heads = filled(tmp_path, 40)
    files = segments(tmp_path)
    assert len(files) > 5
    assert all(path.stat().st_size < 2200 for path in files)
    assert audit.verify(tmp_path, NAME, [KEY.public_key()], heads) == heads[-1]
    assert [one.body["number"] for one in opened(tmp_path).entries()] == list(range(40))
    assert [one.sequence for one in opened(tmp_path).backwards()] == list(range(40, 0, -1))
    assert opened(tmp_path).note("event", {}).sequence == 41


@pytest.mark.parametrize("which", [0, 2, -1])
def test_a_file_that_is_missing_is_found(tmp_path: Path, which: int) -> None:
    """Without one of its files the log does not verify: the first missing entry is named."""
    heads = filled(tmp_path, 40)
    files = segments(tmp_path)
    first = int(files[which].stem)
    files[which].unlink()
    with pytest.raises(IntegrityError, match=f"entry {first}\\b"):
        audit.verify(tmp_path, NAME, [KEY.public_key()], [heads[-1]])


def test_a_torn_line_is_cut_away_and_the_log_says_so(tmp_path: Path) -> None:
    """What a crash left of a line is gone, and an entry names its length and digest."""
    head = filled(tmp_path, 3)[-1]
    path = segments(tmp_path)[-1]
    path.write_bytes(path.read_bytes() + b'{"at":1,"bo')
    one = opened(tmp_path)
    assert one.head == head
    one.note("event", {})
    assert [entry.kind for entry in one.entries(3)] == ["repaired", "event"]
    assert next(one.entries(3)).body["bytes"] == 11
    audit.verify(tmp_path, NAME, [KEY.public_key()], [head])


def test_what_waits_is_not_shown_until_it_is_durable(tmp_path: Path) -> None:
    """The head that others are shown never names an entry that a power cut could take."""
    one = opened(tmp_path)
    first = one.note("event", {})
    waiting = one.note("event", {}, durable=False)
    assert one.head == first
    one.flush()
    assert one.head == waiting


def test_it_knows_what_it_once_ended_with(tmp_path: Path) -> None:
    """A head is contained where the log has that very entry, also in an older file and for another program."""
    heads = filled(tmp_path, 30)
    for one in (opened(tmp_path), opened(tmp_path)):
        one.note("event", {})
        assert all(one.contains(head) for head in [start_of(NAME), *heads, one.head])
        assert not one.contains(Head(3, heads[3].hash))
        assert not one.contains(Head(99, heads[3].hash))


def test_a_long_log_takes_no_more_memory_than_a_short_one(tmp_path: Path) -> None:
    """An agent and a server write for months: what is kept of entries is on the disk alone."""
    one = opened(tmp_path)
    kept = []
    for number in range(150):
        one.note("event", {"number": number}, durable=False)
        if number % 50 == 49:
            gc.collect()
            kept.append(sum(_held(one).values()))
    assert kept[1] == kept[2]


def _held(one: object) -> Counter[str]:
    """How many things of each kind an object keeps, and what these keep; modules, classes and functions left out."""
    found, seen, todo = Counter[str](), set[int](), [one]
    while todo:
        this = todo.pop()
        if id(this) in seen or isinstance(this, type | ModuleType | FunctionType):
            continue
        seen.add(id(this))
        found[type(this).__name__] += 1
        todo += gc.get_referents(this)
    return found


def test_a_log_whose_key_is_replaced_goes_on(tmp_path: Path) -> None:
    """It verifies where the last entry is signed by a key of now, and every entry by a key of then."""
    filled(tmp_path, 3)
    head = opened(tmp_path, OTHER).note("keys", {})
    assert audit.verify(tmp_path, NAME, [OTHER.public_key()], earlier=[KEY.public_key()]) == head
    with pytest.raises(IntegrityError, match="entry 4 is not signed"):
        audit.verify(tmp_path, NAME, [KEY.public_key()])


def test_a_body_that_is_too_long_is_kept_by_its_digest(tmp_path: Path) -> None:
    """Nothing that is to be noted is refused for its length."""
    one = opened(tmp_path)
    one.note("round", {"run": "a.1", "left_out": {"site": "x" * 300_000}})
    (entry,) = one.entries()
    assert entry.body["run"] == "a.1"
    assert entry.body["cut"]["bytes"] > 300_000


def test_a_disk_that_cannot_be_written_is_an_error_that_names_the_folder(tmp_path: Path) -> None:
    """Whoever acts learns that nothing was noted."""
    one = opened(tmp_path / "audit")
    one.note("event", {})
    (tmp_path / "audit").rename(tmp_path / "gone")
    with pytest.raises(ConsortiumError, match="audit log cannot be written"):
        one.note("event", {})


def _note_often(folder: Path) -> None:
    one = opened(folder)
    for number in range(25):
        one.note("event", {"number": number})


def test_processes_note_by_turns_over_files(tmp_path: Path) -> None:
    """Two programs write one log, over many files, and no entry is lost."""
    with ProcessPoolExecutor(2) as pool:
        for job in [pool.submit(_note_often, tmp_path) for _ in range(2)]:
            job.result(120)
    assert audit.verify(tmp_path, NAME, [KEY.public_key()]).sequence == 50


def test_entries_are_chosen_by_time_run_kind_and_number(tmp_path: Path) -> None:
    """The filters of `audit show` and `export`; a line that is exported is as it was signed."""
    one = opened(tmp_path)
    for run, kind in [("a.1", "round"), ("a.2", "round"), ("b.1", "state"), ("a.1", "state")]:
        one.note(kind, {"run": run})

    def numbers(**how: Any) -> list[int]:
        return [entry.sequence for entry in audit_view.Filter(**how).of(one.entries())]

    assert numbers(run="a") == [1, 2, 4]
    assert numbers(run="a.1") == [1, 4]
    assert numbers(kind="state") == [3, 4]
    assert numbers(limit=1) == [4]
    assert numbers(since=2e9) == []
    assert audit_view.export(tmp_path, tmp_path / "out", audit_view.Filter(run="a.1"), NAME) == 2
    assert (tmp_path / "out").read_bytes().splitlines()[0] in segments(tmp_path)[0].read_bytes()
    with pytest.raises(InputError, match="there already"):
        audit_view.export(tmp_path, tmp_path / "out", audit_view.Filter(), NAME)
    assert audit_view.since("2h", 10_000.0) == 2800.0
    with pytest.raises(InputError, match="--since"):
        audit_view.since("yesterday", 0.0)


def test_a_line_for_people_holds_nothing_that_steers_a_terminal(tmp_path: Path) -> None:
    """What a site or study said is shown without control characters."""
    one = opened(tmp_path)
    one.note("fault", {"text": "a\x1b[31mb\n"})
    (entry,) = one.entries()
    assert "\x1b" not in audit_view.line(entry)
    assert "\n" not in audit_view.line(entry)
    assert json.loads(json.dumps(audit_view.document(entry)))["body"]["text"] == "a\x1b[31mb\n"


def test_a_slow_reader_does_not_hold_up_the_owner(tmp_path: Path) -> None:
    """Somebody pages through the log: entries are added meanwhile, and the reader ends where the log ended."""
    log = opened(tmp_path / "log", segment=1 << 20)
    for number in range(3):
        log.note("one", {"n": number})
    reading = log.entries()
    next(reading)
    writing = threading.Thread(target=lambda: log.note("two", {}), daemon=True)
    writing.start()
    writing.join(20)
    assert not writing.is_alive()
    assert [entry.kind for entry in reading] == ["one", "one"]


def test_an_export_of_a_damaged_log_leaves_nothing(tmp_path: Path) -> None:
    """It is refused with the entry named, and once more when it is tried again."""
    log = opened(tmp_path / "log", segment=1 << 20)
    for number in range(4):
        log.note("one", {"n": number})
    (path,) = segments(log.folder)
    path.write_bytes(path.read_bytes().replace(b'"n":2', b'"n":7'))
    for _ in range(2):
        with pytest.raises(IntegrityError, match="entry 3"):
            audit_view.export(log.folder, tmp_path / "out.jsonl", audit_view.Filter(), log.name)
        assert not (tmp_path / "out.jsonl").exists()
