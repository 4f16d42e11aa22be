"""The append-only log: what an outsider, a crash and the holder of its key can do to it, and that each is found."""

import hashlib
import json
import multiprocessing
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from consortium.protocol import chain
from consortium.protocol.chain import Head, check_witness, countersign, start_of, verify
from consortium.protocol.chain_writer import Chain
from consortium.protocol.errors import InputError, IntegrityError
from consortium.protocol.messages import canonical
from consortium.protocol.signing import CHAIN, sign

KEY = Ed25519PrivateKey.generate()
NAME = "audit hospitals site-1"


def written(path: Path, count: int, key: Ed25519PrivateKey = KEY, what: str = "event") -> list[Head]:
    """The heads of a new log of `count` entries."""
    log = Chain(path, NAME, key)
    return [log.append(what, {"number": n, "at": n / 7}, float(n)) for n in range(count)]


def lines_of(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def resigned(lines: list[bytes], start: int, change: Callable[[dict[str, object]], None]) -> list[bytes]:
    """The lines with entry `start` (0-based) changed, and everything after it linked and signed again by the holder of
    the key."""
    previous = json.loads(lines[start])["previous"]
    out = lines[:start]
    for position, line in enumerate(lines[start:]):
        fields = json.loads(line)
        fields.pop("signature")
        fields["previous"] = previous
        if not position:
            change(fields)
        text = canonical({**fields, "signature": sign(KEY, CHAIN, canonical(fields)).hex()}) + b"\n"
        previous = hashlib.sha256(text[:-1]).hexdigest()
        out.append(text)
    return out


def named(error: pytest.ExceptionInfo[IntegrityError]) -> int:
    found = re.search(r"entry (\d+)", str(error.value))
    assert found is not None, error.value
    return int(found[1])


def test_what_was_appended_is_read_back_and_verifies(tmp_path: Path) -> None:
    path = tmp_path / "log"
    heads = written(path, 5)
    assert verify(path, NAME, [KEY.public_key()], heads) == heads[-1]
    assert [entry.body["number"] for entry in chain.entries(path, NAME)] == [0, 1, 2, 3, 4]
    assert [entry.head for entry in chain.entries(path, NAME, after=3)] == heads[3:]
    assert Chain(path, NAME, KEY).head == heads[-1]
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_log_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert verify(tmp_path / "log", NAME, [KEY.public_key()]) == start_of(NAME)
    assert Chain(tmp_path / "log", NAME, KEY).head.sequence == 0
    with pytest.raises(IntegrityError, match="entry 1 is missing"):
        verify(tmp_path / "log", NAME, [KEY.public_key()], [Head(3, "0" * 64)])


def test_heads_travel_as_text() -> None:
    head = Head(17, "ab" * 32)
    assert Head.parse(head.text) == head
    for wrong in [
        "",
        "17",
        "17:xy",
        "x:" + "a" * 64,
        "-1:" + "a" * 64,
        "017:" + "a" * 64,
        "1:" + "A" * 64,
        "²:" + "a" * 64,
    ]:
        with pytest.raises(IntegrityError):
            Head.parse(wrong)


def test_a_countersignature_is_for_one_head_of_one_log_by_one_key() -> None:
    head, other = Head(3, "ab" * 32), Ed25519PrivateKey.generate()
    witness = countersign(other, NAME, head)
    check_witness(other.public_key(), NAME, witness)
    with pytest.raises(IntegrityError):
        check_witness(KEY.public_key(), NAME, witness)
    with pytest.raises(IntegrityError):
        check_witness(other.public_key(), NAME + "0", witness)
    with pytest.raises(IntegrityError):
        check_witness(other.public_key(), NAME, chain.Witness(Head(4, head.hash), witness.signature))
    with pytest.raises(IntegrityError):
        check_witness(other.public_key(), NAME, chain.Witness(head, "zz"))


def test_another_log_of_the_same_owner_is_not_taken_for_this_one(tmp_path: Path) -> None:
    Chain(tmp_path / "log", "audit hospitals site-2", KEY).append("event", {}, 0.0)
    with pytest.raises(IntegrityError, match="entry 1 does not begin this log"):
        verify(tmp_path / "log", NAME, [KEY.public_key()])
    with pytest.raises(IntegrityError, match="entry 1 does not begin this log"):
        Chain(tmp_path / "log", NAME, KEY)


def test_a_log_goes_on_under_a_new_key_and_verifies_with_both(tmp_path: Path) -> None:
    path, new = tmp_path / "log", Ed25519PrivateKey.generate()
    written(path, 3)
    head = Chain(path, NAME, new, [KEY.public_key()]).append("event", {}, 9.0)
    assert verify(path, NAME, [new.public_key(), KEY.public_key()]) == head
    with pytest.raises(IntegrityError, match="entry 1 is not signed by the owner"):
        Chain(path, NAME, Ed25519PrivateKey.generate())


def test_any_byte_changed_by_an_outsider_is_found_and_its_entry_named(tmp_path: Path) -> None:
    """Every place of the file, also in signatures and links: the message names the line that was changed."""
    path = tmp_path / "log"
    written(path, 6)
    good = path.read_bytes()
    line_of = [number for number, line in enumerate(lines_of(path), 1) for _ in line]
    draw = random.Random(5)
    for _ in range(700):
        place = draw.randrange(len(good) - 1)
        other = draw.choice([byte for byte in range(256) if byte != good[place]])
        path.write_bytes(good[:place] + bytes([other]) + good[place + 1 :])
        with pytest.raises(IntegrityError) as error:
            verify(path, NAME, [KEY.public_key()])
        assert named(error) == line_of[place], (place, other)


def test_lines_removed_repeated_and_swapped_are_found(tmp_path: Path) -> None:
    path = tmp_path / "log"
    heads = written(path, 6)
    lines = lines_of(path)
    for which, wrong in {
        3: [*lines[:2], *lines[3:]],
        4: [*lines[:3], lines[2], *lines[3:]],
        2: [lines[0], lines[2], lines[1], *lines[3:]],
        1: lines[1:],
        5: lines[:4],
    }.items():
        path.write_bytes(b"".join(wrong))
        with pytest.raises(IntegrityError) as error:
            verify(path, NAME, [KEY.public_key()], heads)
        assert named(error) == which


def test_the_holder_of_the_key_cannot_rewrite_cut_or_fork_what_the_other_side_has_seen(
    tmp_path: Path,
) -> None:
    """A thousand random histories that are sound in themselves: each is told from the one that was countersigned, and
    the first entry that differs is named."""
    path, draw = tmp_path / "log", random.Random(7)
    heads = written(path, 12)
    good = lines_of(path)
    for _ in range(1000):
        place = draw.randrange(12)
        how = draw.choice(["cut", "edit", "fork"])
        if how == "cut":
            wrong = good[:place]
        elif how == "edit":
            wrong = resigned(good, place, lambda fields: fields.update(body={"number": draw.random()}))
        else:
            path.write_bytes(b"".join(good[:place]))
            log = Chain(path, NAME, KEY)
            for _ in range(draw.randint(12 - place, 15)):
                log.append("other", {"number": draw.random()}, 1.0)
            wrong = lines_of(path)
        path.write_bytes(b"".join(wrong))
        with pytest.raises(IntegrityError) as error:
            verify(path, NAME, [KEY.public_key()], heads)
        assert named(error) == place + 1, how
        with pytest.raises(IntegrityError):
            verify(path, NAME, [KEY.public_key()], heads[-1:])  # the last head alone shows it too
        verify(path, NAME, [KEY.public_key()])  # and without a witness, nothing does


def test_two_heads_of_one_number_are_a_fork(tmp_path: Path) -> None:
    heads, other = written(tmp_path / "a", 3), written(tmp_path / "b", 3, what="other")
    with pytest.raises(IntegrityError, match="entry 2 was shown with two contents"):
        verify(tmp_path / "a", NAME, [KEY.public_key()], [*heads, other[1]])


def test_a_torn_last_line_is_passed_over_and_cut_away(tmp_path: Path) -> None:
    path = tmp_path / "log"
    heads = written(path, 3)
    good = path.read_bytes()
    torn = lines_of(path)[-1]
    for length in (1, 20, len(torn) - 1):
        path.write_bytes(good + torn[:length])
        assert verify(path, NAME, [KEY.public_key()], heads) == heads[-1]
        log = Chain(path, NAME, KEY)
        assert log.head == heads[-1]
        head = log.append("event", {}, 3.0)
        assert verify(path, NAME, [KEY.public_key()], [*heads, head]) == head
    path.write_bytes(good[: -len(torn)] + torn[:-1])  # the last line was acknowledged, and lost its end
    with pytest.raises(IntegrityError, match="entry 3 is missing"):
        verify(path, NAME, [KEY.public_key()], heads)


WRITER = """
import sys
from pathlib import Path
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from consortium.protocol.chain_writer import Chain
log = Chain(Path(sys.argv[1]), sys.argv[2], Ed25519PrivateKey.from_private_bytes(bytes.fromhex(sys.argv[3])))
while True:
    print(log.append("event", {"text": "x" * 200}, 0.0).text, flush=True)
"""


def test_every_acknowledged_entry_survives_a_kill_at_any_moment(tmp_path: Path) -> None:
    path, seed = tmp_path / "log", "11" * 32
    key, heads = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(seed)), list[Head]()
    for turn in range(4):
        command = [sys.executable, "-c", WRITER, str(path), NAME, seed]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            heads.append(Head.parse(process.stdout.readline().strip()))
            time.sleep(0.05 + 0.02 * turn)
            process.send_signal(signal.SIGKILL)
            heads += [Head.parse(line[:-1]) for line in process.stdout if line.endswith("\n")]
        assert verify(path, NAME, [key.public_key()], heads).sequence >= heads[-1].sequence


def _append_often(path: Path, seed: str, count: int) -> None:
    log = Chain(path, NAME, Ed25519PrivateKey.from_private_bytes(bytes.fromhex(seed)))
    for _ in range(count):
        log.append("event", {"by": os.getpid()}, 0.0)


def test_processes_append_to_one_log_by_turns(tmp_path: Path) -> None:
    path, seed = tmp_path / "log", "22" * 32
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_append_often, args=(path, seed, 40)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    key = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(seed)).public_key()
    assert verify(path, NAME, [key]).sequence == 120


def test_a_log_that_is_replaced_while_it_is_open_takes_nothing_more(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = Chain(path, NAME, KEY)
    log.append("event", {"number": 1}, 0.0)
    log.append("event", {"number": 2}, 0.0)
    path.write_bytes(lines_of(path)[0])
    with pytest.raises(IntegrityError, match="entry 2 is not what it was"):
        log.append("event", {"number": 3}, 0.0)


def test_a_full_disk_leaves_the_log_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = Chain(path, NAME, KEY)
    head = log.append("event", {}, 0.0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 100, hard))
        with pytest.raises(OSError):
            log.append("event", {"text": "x" * 1000}, 0.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert log.head == head == verify(path, NAME, [KEY.public_key()], [head])
    assert log.append("event", {}, 1.0).sequence == 2


@pytest.mark.parametrize(
    "body",
    [
        {"x": float("nan")},
        {"x": b"bytes"},
        {1: "one"},
        {"x": (1, 2)},
        {"x": "\ud800"},
        {"x": "y" * chain.MAX_LINE},
    ],
)
def test_an_entry_that_would_not_be_read_back_is_refused(tmp_path: Path, body: dict[str, object]) -> None:
    log = Chain(tmp_path / "log", NAME, KEY)
    with pytest.raises(InputError, match="an entry 'event'"):
        log.append("event", body, 0.0)
    assert log.head == start_of(NAME)


@pytest.mark.parametrize(
    "line",
    [b"", b"null", b"[" * 100_000, b"{}", b'{"a":1}', b"x" * (chain.MAX_LINE + 10), b'{"at":1,"at":1}'],
)
def test_lines_that_are_no_entries_are_refused(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "log"
    written(path, 2)
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(IntegrityError, match="entry 3 "):
        verify(path, NAME, [KEY.public_key()])
