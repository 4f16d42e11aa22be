"""The files that contents from the server are written to."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from site_world import World

from consortium.client.inbox import Inbox
from consortium.client.seen import Seen
from consortium.protocol.connection import Connection
from consortium.protocol.files import MEMORY


def nowhere() -> Connection:
    raise AssertionError("nothing is asked")


@pytest.fixture(scope="module")
def inbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Inbox]:
    world = World(Path(tmp_path_factory.mktemp("world")))
    yield Inbox(world.home, Seen(world.home.seen_file), nowhere, lambda nonce: False)
    world.end()


def test_a_large_content_is_written_over_the_one_before(inbox: Inbox) -> None:
    """Once nobody reads that any more; it has the new one's size, and one content alone lies in it."""
    before = inbox.room(MEMORY + 9)
    os.pwrite(before.fileno(), b"before", MEMORY + 3)
    before.seek(7)
    assert inbox.room(MEMORY + 5) is not before
    inbox.reuse(before)
    assert inbox.room(12) is not before
    now = inbox.room(MEMORY + 5)
    assert now is before
    assert os.fstat(now.fileno()).st_size == MEMORY + 5
    assert now.tell() == 0
    assert inbox.room(MEMORY + 5) is not now


def test_small_and_forgotten_files_are_not_used_again(inbox: Inbox) -> None:
    """A small one is memory; after the end of a run nothing of it stays on the disk."""
    small, large = inbox.room(5), inbox.room(MEMORY + 5)
    small.write(b"small")
    os.pwrite(large.fileno(), b"large", MEMORY)
    inbox.reuse(small)
    assert inbox.room(5) is not small
    assert inbox.room(MEMORY + 5) is not small
    inbox.reuse(large)
    inbox.forget()
    assert inbox.room(MEMORY + 5) is not large
