"""The Grid that a Flower app's ServerApp is given: what it refuses before anything is asked."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
from breast_cancer import study_text
from flwr.app import Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from consortium.protocol.errors import InputError
from consortium.protocol.study import Study
from consortium.server.flower_run import Sites


@pytest.fixture
def grid(monkeypatch: pytest.MonkeyPatch) -> Sites:
    """Of a federation of two sites, which nothing may be asked in these tests."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1, raising=False)
    clients = SimpleNamespace(sites=lambda: ["alba", "bern"])
    return Sites(Study.parse(study_text(2)), "lung", "app.1", None, clients, None, time.time)


def test_two_messages_at_once_to_one_site_are_refused(grid: Sites) -> None:
    """A site answers once in a round: else both would get the answer to the first."""
    node, other = grid.get_node_ids()
    messages = [Message(RecordDict(), one, "train", ttl=10.0) for one in (node, other, node)]
    with pytest.raises(
        InputError, match=r"two 'train' messages at once to site '(alba|bern)'; send one after"
    ):
        grid.send_and_receive(messages)


def test_a_node_that_is_no_site_is_refused(grid: Sites) -> None:
    """Named, before anything is sent."""
    grid.get_node_ids()
    with pytest.raises(InputError, match="node 7, which no site is"):
        grid.send_and_receive([Message(RecordDict(), 7, "query", ttl=10.0)])
