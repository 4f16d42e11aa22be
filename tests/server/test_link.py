"""What a run's process sends with its calls: the content of an instruction, from the file of the last commit."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from consortium.protocol import local
from consortium.protocol.layout import Vector, digest_of
from consortium.protocol.messages import Answer, Instruction, Payload, contents, encode, parse
from consortium.protocol.sealed import Sealed, new_data_key
from consortium.server import checkpoint, link
from consortium.server.link import Link, LinkClients, LinkCommits
from consortium.server.records import RunState

KEY = new_data_key()


@pytest.fixture
def commits(tmp_path: Path) -> Iterator[LinkCommits]:
    """Commits to an end that takes every call."""
    ours, its = socket.socketpair()

    def serve() -> None:
        try:
            while True:
                _, files = local.receive(its)
                local.close(files)
                local.send(its, {})
        except local.ClosedError:
            return

    thread = threading.Thread(target=serve)
    thread.start()
    yield LinkCommits(Link(ours), "r", tmp_path, KEY)
    ours.close()
    thread.join()
    its.close()


def state(commits: LinkCommits, control: Vector | None = None) -> RunState:
    model = np.arange(700_000, dtype=np.float32)  # more than one chunk, and not whole ones
    sums = {"a": np.full((2, 2), 0.5), "b": np.ones(3), "c": np.array(2.0)}
    return RunState(1, 0, model, commits.name(model), control, {"v": np.ones(5)}, sums)


def asked(kept: RunState, vectors: Mapping[str, Vector], statistics: Mapping[str, Any]) -> Instruction:
    return Instruction("f", "r", 2, 0, "train", "s", kept.digest, "l", "n", 0.0, Payload(vectors, statistics))


@pytest.mark.parametrize("control", [None, np.full(7, 0.25, np.float32)], ids=["mean", "scaffold"])
def test_an_instruction_is_sent_from_the_committed_file(commits: LinkCommits, control: Vector | None) -> None:
    """The file begins with the content, byte for byte, and the hash is its: nothing is written or hashed again."""
    kept = state(commits, control)
    commits.commit(kept)
    vectors = {"shared": kept.model} | ({} if control is None else {"control": control})
    instruction = asked(kept, vectors, dict(kept.statistics))
    found = commits.beginning(instruction, contents(instruction))
    assert found is not None
    header, views = encode(instruction)
    content = b"".join(views)
    assert found[0] == parse(header).sha256
    assert Sealed(found[1], KEY).read()[: len(content)] == content
    os.close(found[1])


def test_the_model_alone_is_sent_from_the_committed_file(commits: LinkCommits) -> None:
    """The last evaluation carries no statistics where there are none."""
    kept = state(commits, np.ones(7, np.float32))
    commits.commit(kept)
    instruction = asked(kept, {"shared": kept.model}, {})
    found = commits.beginning(instruction, contents(instruction))
    assert found is not None
    assert found[0] == parse(encode(instruction)[0]).sha256
    os.close(found[1])


def test_content_that_the_committed_file_does_not_begin_with_is_not_sent_from_it(
    commits: LinkCommits,
) -> None:
    """Another model, another control variate or one left out, other statistics or
    in another order, and none committed yet."""
    control = np.ones(7, np.float32)
    kept = state(commits, control)
    both = {"shared": kept.model, "control": control}
    right = asked(kept, both, kept.statistics)
    assert commits.beginning(right, contents(right)) is None
    commits.commit(kept)
    for other in (
        replace(right, model="0" * 64),
        asked(kept, {"shared": kept.model}, kept.statistics),
        asked(kept, {**both, "control": np.zeros(7, np.float32)}, kept.statistics),
        asked(kept, both, {**kept.statistics, "c": np.array(3.0)}),
        asked(kept, both, {"a": kept.statistics["a"]}),
    ):
        assert commits.beginning(other, contents(other)) is None
    commits.commit(replace(kept, statistics={name: kept.statistics[name] for name in "cba"}))
    assert commits.beginning(right, contents(right)) is None
    commits.commit(kept)
    commits.name(np.zeros(1, np.float32))  # the hash of the committed model is not at hand any more
    assert commits.beginning(right, contents(right)) is None


def test_a_model_that_was_written_while_it_was_named_is_committed_whole(
    commits: LinkCommits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So is one that was not named last; a file that was begun in vain is given back."""
    monkeypatch.setattr(link, "LARGE", 0)
    named, before = state(commits), 0
    other = replace(named, model=named.model * 2, digest=digest_of([named.model * 2]))
    for number, kept in enumerate((named, named, other, named)):
        if number == 3:
            commits.name(other.model)
            assert commits.name(kept.model) == kept.digest
        sent: dict[str, str] = {}
        monkeypatch.setattr(commits, "_link", Recording(sent))
        commits.commit(kept)
        assert commits._held is not None
        found = checkpoint.Writer("r", KEY).read(commits._held[1], sent["sha256"])
        assert found.model.tobytes() == kept.model.tobytes()
        assert found.digest == kept.digest
        open_files = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - names alone
        before = before or open_files
        assert open_files == before


class Recording(Link):
    """Keeps the last commit's fields in `sent`."""

    def __init__(self, sent: dict[str, str]) -> None:
        self._sent = sent

    def call(self, name: str, files: Sequence[int] = (), **fields: Any) -> dict[str, Any]:
        self._sent.update(fields)
        return {}


def test_what_is_still_mapped_is_not_given_back(tmp_path: Path) -> None:
    """With its next question a run names the answers of which nothing is mapped any more, and no other."""
    ours, its = socket.socketpair()
    calls: list[dict[str, Any]] = []

    def serve() -> None:
        try:
            while True:
                call, files = local.receive(its)
                local.close(files)
                calls.append(call)
                if call["call"] != "answers":
                    local.send(its, {"refused": {}})
                    continue
                site = ("kept", "gone")[sum(one["call"] == "answers" for one in calls) - 1]
                update = Payload({"shared": np.ones(5, np.float32)})
                header, views = encode(
                    Answer.to_instruction(instruction.to(site), weight=1.0, payload=update)
                )
                file = link.nameless(tmp_path)
                os.write(file, b"".join(views))
                local.send(its, {"site": site, "header": header.decode()}, [file])
                os.close(file)
        except local.ClosedError:
            return

    thread = threading.Thread(target=serve)
    thread.start()
    to = Link(ours)
    clients = LinkClients(to, LinkCommits(to, "r", tmp_path, KEY), tmp_path, lambda: 0.0)
    vectors = {"shared": np.ones(5, np.float32)}
    instruction = Instruction("f", "r", 2, 0, "train", "s", "m", "l", "n", 0.0, Payload(vectors))
    clients.ask(["gone", "kept"], instruction)
    held = [one.payload for one in clients.answers(60.0) if isinstance(one, Answer) and one.site == "kept"]
    for _ in range(2):
        clients.ask(["gone", "kept"], instruction)
    assert [one["done"] for one in calls if one["call"] == "ask"] == [[], ["gone"], []]
    assert np.array_equal(held[0].vectors["shared"], np.ones(5))
    ours.close()
    thread.join()
    its.close()
