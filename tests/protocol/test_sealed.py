"""Encrypted files: what comes out is what went in, or nothing does."""

from __future__ import annotations

import os
import tempfile
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consortium.protocol.errors import InputError, IntegrityError
from consortium.protocol.keys import Lock
from consortium.protocol.sealed import CHUNK, DataKey, Sealed, data_key, new_data_key, sealing

KEY = new_data_key()
LOCK = Lock(b"x" * 64)
START, STEP = 36, CHUNK + 16


def sealed(*pieces: bytes, key: DataKey = KEY) -> bytes:
    return b"".join(map(bytes, sealing(pieces, key)))


def opened(content: bytes, key: DataKey = KEY, start: int = 0, stop: int | None = None) -> bytes:
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.flush()
        return b"".join(map(bytes, Sealed(file.fileno(), key).pieces(start, stop)))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from([0, 1, 17, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK]), max_size=4),
    st.integers(0, 3 * CHUNK),
    st.integers(0, 3 * CHUNK),
)
def test_any_part_of_any_content_comes_out(sizes: list[int], start: int, length: int) -> None:
    """In whatever pieces it was given; nothing of it can be seen in the file."""
    pieces = [os.urandom(size) for size in sizes]
    content, file = b"".join(pieces), sealed(*pieces)
    assert opened(file) == content
    assert opened(file, start=start, stop=start + length) == content[start : start + length]
    assert len(file) == START + len(content) + 16 * max(1, -(-len(content) // CHUNK))
    assert len(content) < 17 or content[:17] not in file


def test_the_same_content_is_never_sealed_alike() -> None:
    """Each file has a salt, and so a key and nonces, of its own."""
    assert len({sealed(b"the same") for _ in range(50)}) == 50


def changed(file: bytes, place: int) -> bytes:
    return file[:place] + bytes([file[place] ^ 1]) + file[place + 1 :]


@pytest.fixture(scope="module")
def whole() -> bytes:
    return sealed(b"a" * CHUNK, b"b" * CHUNK, b"c" * 10)


def parts(whole: bytes) -> tuple[bytes, list[bytes]]:
    return whole[:START], [whole[START + n * STEP : START + (n + 1) * STEP] for n in range(3)]


@pytest.mark.parametrize("place", [0, 4, 35, START, START + STEP, -1])
def test_what_was_changed_is_refused(whole: bytes, place: int) -> None:
    """One bit, anywhere."""
    with pytest.raises(IntegrityError):
        opened(changed(whole, place % len(whole)))


@pytest.mark.parametrize("length", [0, 20, START, START + 5, START + STEP, START + 2 * STEP, -1])
def test_what_was_cut_off_is_refused(whole: bytes, length: int) -> None:
    """A file that ends with a whole chunk too early as well."""
    with pytest.raises(IntegrityError):
        opened(whole[:length])


@pytest.mark.parametrize("order", [[1, 0, 2], [0, 2], [0, 0, 2], [0, 1, 2, 2]])
def test_what_was_moved_is_refused(whole: bytes, order: list[int]) -> None:
    """Chunks in another order, left out, twice, or of another file."""
    start, chunks = parts(whole)
    assert opened(start + b"".join(chunks)) == opened(whole)
    for beginning in (start, sealed(b"x")[:START]):
        with pytest.raises(IntegrityError):
            opened(beginning + b"".join(chunks[n] for n in order))


def test_another_key_or_purpose_opens_nothing() -> None:
    """A run's key is of no use for another run's files."""
    file = sealed(b"content", key=KEY.of("run a"))
    assert opened(file, KEY.of("run a")) == b"content"
    for other in (KEY, KEY.of("run b"), new_data_key().of("run a")):
        with pytest.raises(IntegrityError):
            opened(file, other)


def test_the_data_key_opens_under_its_lock_alone(tmp_path: Path) -> None:
    """It is made once, stays the same, shows in no `repr`, and lies nowhere in the clear."""
    path = tmp_path / "data.key"
    with pytest.raises(InputError):
        data_key(path, LOCK, make=False)
    key = data_key(path, LOCK)
    assert data_key(path, LOCK) == key
    assert path.stat().st_mode & 0o777 == 0o600
    assert key.secret not in path.read_bytes()
    assert key.secret.hex() not in repr(key) + str(key)
    with pytest.raises(IntegrityError, match="key file or passphrase"):
        data_key(path, Lock(b"y" * 64))
    path.write_bytes(changed(path.read_bytes(), 60))
    with pytest.raises(IntegrityError, match="restore it from a backup"):
        data_key(path, LOCK)


def test_a_small_file_is_sealed_in_little_memory() -> None:
    """A server does so with each small answer, in as many threads as sites: not a chunk's megabyte in each."""
    sealed(b"x")  # what is loaded once
    tracemalloc.start()
    try:
        sealed(b"x" * 2000)
        assert tracemalloc.get_traced_memory()[1] < 50_000
    finally:
        tracemalloc.stop()
