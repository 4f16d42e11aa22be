"""Documents and open files between a parent and its child."""

from __future__ import annotations

import os
import socket
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consortium.protocol.errors import ConsortiumError, IntegrityError
from consortium.protocol.local import MAX_MESSAGE, MOST_VALUES, ClosedError, close, receive, send

Pair = tuple[socket.socket, socket.socket]


def framed(content: bytes) -> bytes:
    """A message of any content."""
    return len(content).to_bytes(4, "big") + content


@pytest.fixture
def pair() -> Iterator[Pair]:
    one, other = socket.socketpair()
    with one, other:
        yield one, other


@given(st.dictionaries(st.text(max_size=20), st.integers() | st.text(max_size=200) | st.none(), max_size=5))
def test_a_document_arrives_as_it_was_sent(document: dict[str, object]) -> None:
    """Whatever JSON holds comes out the same."""
    one, other = socket.socketpair()
    with one, other:
        send(one, document)
        assert receive(other) == (document, [])


def test_a_file_arrives_with_its_document(pair: Pair, tmp_path: Path) -> None:
    """A descriptor is handed over: the other end reads the same file, also after the sender closed its own."""
    path = tmp_path / "model"
    path.write_bytes(b"weights")
    with path.open("rb") as file:
        send(pair[0], {"a": 1}, [file.fileno()])
    document, files = receive(pair[1])
    assert document == {"a": 1}
    assert [os.pread(fd, 100, 0) for fd in files] == [b"weights"]
    close(files)


def test_messages_keep_their_files_when_several_wait(pair: Pair, tmp_path: Path) -> None:
    """Of two messages that were both sent before the first was read, each brings its own file."""
    for name in ("one", "two"):
        (tmp_path / name).write_text(name)
        with (tmp_path / name).open("rb") as file:
            send(pair[0], {"name": name}, [file.fileno()])
    for name in ("one", "two"):
        document, files = receive(pair[1])
        assert (document["name"], os.pread(files[0], 10, 0)) == (name, name.encode())
        close(files)


def test_the_end_of_the_other_process_is_an_error_of_its_own(pair: Pair) -> None:
    """A closed socket is told apart from a broken message."""
    pair[0].close()
    with pytest.raises(ClosedError):
        receive(pair[1])


@pytest.mark.parametrize(
    ("sent", "error"),
    [
        (b"\x00\x00\x00\x02[]", IntegrityError),
        (b"\x00\x00\x00\x03{a}", IntegrityError),
        ((MAX_MESSAGE + 1).to_bytes(4, "big"), IntegrityError),
        (b"\x00\x00\x00\x09{", ClosedError),
        (b"\x00\x00", ClosedError),
        (framed(b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}"), IntegrityError),
    ],
)
def test_what_is_no_message_is_refused(pair: Pair, sent: bytes, error: type[Exception]) -> None:
    """No object, no JSON, too long or cut off: an error, and nothing is allocated for what is announced."""
    pair[0].sendall(sent)
    pair[0].shutdown(socket.SHUT_WR)
    with pytest.raises(error):
        receive(pair[1])


@pytest.mark.parametrize("piece", [b"[],", b"{},", b"[[[[[[]]]]]],", b"1,"])
def test_a_document_takes_little_memory(pair: Pair, piece: bytes) -> None:
    """As many small values as fit: refused before they are parsed, at the price of the bytes alone."""
    count = (MAX_MESSAGE - 100) // len(piece)
    content = b'{"a":[' + piece * count + b"0]}"
    assert content.count(b",") + content.count(b"[") + content.count(b"{") > MOST_VALUES
    sending = threading.Thread(target=pair[0].sendall, args=(framed(content),))
    sending.start()
    tracemalloc.start()
    with pytest.raises(IntegrityError, match="values"):
        receive(pair[1])
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    sending.join(10)
    assert most < 3 * MAX_MESSAGE


def test_a_document_that_nobody_would_read_is_not_sent(pair: Pair) -> None:
    """The sender is told, and nothing is on its way."""
    with pytest.raises(ConsortiumError, match="at most"):
        send(pair[0], {"a": "x" * MAX_MESSAGE})
    send(pair[0], {"a": 1})
    assert receive(pair[1]) == ({"a": 1}, [])
