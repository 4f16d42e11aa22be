"""A Flower ServerApp, run in a federation: a confined program (`server/own_code.py`).

The app gets a `Grid` whose nodes are the sites at hand. What it sends with `send_and_receive`, or `push_messages` and
`pull_messages`, goes to the sites as signed instructions (`protocol/records.py`), and the same gate is before what
comes back: one answer a site, to that very instruction, whole, within the size of what was asked. Messages of type
`train` that go out together are a round; one of which fewer than `cohort.min_sites` gave a valid answer (or all that
were asked, where the app asked fewer) is void, and asked again, as in our own round loop.

A ServerApp keeps its state in its own memory and offers no place where that could be committed. So a run whose process
ends after its first round cannot go on: it ends as failed, and says so.

What it leaves in its scratch folder, `result.bin`: the records of the app's `Context.state`, and as the record
`consortium.last` the arrays that it sent last.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"

import flwr.app
import numpy as np
from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.task_identity import TaskIdentity

from consortium.protocol import code
from consortium.protocol.errors import ConsortiumError, InputError, IntegrityError
from consortium.protocol.messages import Answer, Ask, Instruction, Payload
from consortium.protocol.records import Packed, Records, from_flower, pack, to_flower, unpack
from consortium.protocol.sealed import DataKey
from consortium.protocol.study import Study
from consortium.server.link import Link, LinkClients, LinkCommits
from consortium.server.own_code import run_inside
from consortium.server.plans import CODE
from consortium.server.records import Evaluation, Round, RunState

RESULT, LAST = "result.bin", "consortium.last"
ATTEMPTS = 3
KINDS: dict[str, Ask] = {"train": "train", "evaluate": "evaluate", "query": "query"}
LOST = (
    "its process ended in the middle of the run: a Flower ServerApp has no place where a round could be committed, so "
    "that it cannot go on; start the study anew"
)


def main(arguments: Sequence[str], confine: Callable[[], None]) -> int:
    """Run the app; returns the exit code: 0 where it was said how it ended."""
    return run_inside(arguments, confine, _run)


def _run(link: Link) -> None:
    first = link.first()
    study = Study.parse(str(first["study"]), source="the run's study", folder=Path(first["folder"]) / CODE)
    assert study.app is not None
    for name in ("_task_id", "_run_id", "_node_id"):  # without them Flower makes no message
        setattr(TaskIdentity, name, 1)
    key = DataKey(bytes.fromhex(first["key"]))
    commits = LinkCommits(link, str(first["run"]), Path.cwd(), key)
    if commits.load() is not None:
        raise ConsortiumError(LOST)
    app = code.load(study.app.serverapp, study.folder)
    if not isinstance(app, ServerApp):
        raise InputError(f"{study.app.serverapp}: is a {type(app).__name__}, not a flwr ServerApp")
    clients = LinkClients(link, commits, Path.cwd(), time.time)
    grid = Sites(study, str(first["federation"]), str(first["run"]), link, clients, commits, time.time)
    context = Context(1, 1, {}, RecordDict(), dict(study.app.config))
    app(grid, context)
    if not grid.state.round:
        raise InputError(f"{study.app.serverapp}: ended without a round of training")
    found = {name: one for name, one in from_flower(context.state).items() if name != LAST}
    Path(RESULT).write_bytes(pack(Packed({**found, LAST: ("arrays", grid.last)})))


class Sites(Grid):
    """The sites of one run as the nodes of a Grid."""

    def __init__(
        self,
        study: Study,
        federation: str,
        run: str,
        link: Any,
        clients: Any,
        commits: Any,
        clock: Callable[[], float],
    ) -> None:
        self._study, self._names, self._link, self._clock = study, (federation, run), link, clock
        self._clients, self._commits = clients, commits
        self._nodes: dict[int, str] = {}
        self._pushed: dict[str, Message] = {}
        self._replies: dict[str, Message] = {}
        self.last: dict[str, Any] = {}
        """The arrays that were sent last."""
        self.state = RunState(0, 0, np.zeros(1, np.float32), "", None, {}, {})

    # What Flower asks of a Grid

    @property
    def run(self) -> Any:
        raise InputError("a Grid in a federation has no Flower run; take the run config from the Context")

    def set_run(self, run: Any) -> None:
        raise InputError("a Grid in a federation has no Flower run")

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
        *unused: Any,
        **more: Any,
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        found = {_node(site): site for site in self._clients.sites()}
        self._nodes.update(found)
        return sorted(found)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        names = []
        for message in messages:
            name = secrets.token_hex(16)
            message.metadata.__dict__["_message_id"] = name
            self._pushed[name] = message
            names.append(name)
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        waiting, self._pushed = list(self._pushed.values()), {}
        if waiting:
            for reply in self.send_and_receive(waiting):
                self._replies[reply.metadata.reply_to_message_id] = reply
        return [self._replies.pop(name) for name in message_ids if name in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Ask the sites; a reply of each, an error for a site that gave no valid answer.

        Raises:
            InputError: a message is none that can go out, or the app trains for more rounds than the study has.
            ConsortiumError: `ATTEMPTS` times too few sites gave a valid answer to a round of training.
        """
        given = list(messages)
        replies: list[Message] = []
        for kind in KINDS:
            chosen = [one for one in given if one.metadata.message_type.partition(".")[0] == kind]
            if chosen:
                replies += self._round(kind, chosen, timeout)
        return replies

    # How it is done

    def _round(self, kind: str, messages: list[Message], timeout: float | None) -> list[Message]:
        number = self.state.round + (kind == "train")
        if number > self._study.rounds:
            raise InputError(
                f"the app asks for round {number} of training, and the study has {self._study.rounds}"
            )
        for message in messages:
            if message.metadata.dst_node_id not in self._nodes:
                raise InputError(f"the app sends to node {message.metadata.dst_node_id}, which no site is")
        nodes = [message.metadata.dst_node_id for message in messages]
        twice = next((node for node in nodes if nodes.count(node) > 1), None)
        if twice is not None:  # a site answers once in a round
            raise InputError(
                f"the app sends two '{kind}' messages at once to site '{self._nodes[twice]}'; send one after the other"
            )
        while True:
            started, good, bad = self._clock(), dict[int, Packed](), dict[int, str]()
            digest = ""
            for records, content, some in _by_content(messages):
                self._remember(records)
                digest = digest or hashlib.sha256(content).hexdigest()
                self._exchange(KINDS[kind], content, some, timeout, good, bad)
            fewest = min(self._study.cohort.min_sites, len({one.metadata.dst_node_id for one in messages}))
            void = ""
            if kind == "train" and len(good) < fewest:
                void = f"{len(good)} of {len(good) + len(bad)} sites gave a valid answer; at least {fewest} are needed"
            self._commit(kind, number, digest, good, bad, self._clock() - started, void)
            if not void:
                return [self._reply(one, good, bad) for one in messages]
            if self.state.attempt >= ATTEMPTS:
                why = [f"{self._nodes[node]}: {what}" for node, what in sorted(bad.items())][:10]
                raise ConsortiumError("; ".join([f"round {number}: {void}", *why]))
            self._clients.wait(())

    def _exchange(
        self,
        kind: Ask,
        content: bytes,
        messages: list[Message],
        timeout: float | None,
        good: dict[int, Packed],
        bad: dict[int, str],
    ) -> None:
        """Send one content to the nodes of these messages; answers go to `good`, reasons to `bad`."""
        self._link.call("ready", layout_bytes=len(content))
        seconds = min(self._study.cohort.deadline, timeout or self._study.cohort.deadline)
        deadline = self._clock() + seconds
        federation, run = self._names
        sites = {self._nodes[one.metadata.dst_node_id]: one.metadata.dst_node_id for one in messages}
        instruction = Instruction(
            federation=federation,
            run=run,
            round=self.state.round + (kind == "train"),
            attempt=self.state.attempt,
            kind=kind,
            study=self._study.digest,
            model=hashlib.sha256(content).hexdigest(),
            layout="",
            nonce=secrets.token_hex(32),
            expires=deadline,
            payload=Payload(opaque=content),
        )
        self._clients.ask(sorted(sites), instruction)
        for item in self._clients.answers(deadline):
            if not isinstance(item, Answer):
                bad.update({sites[site]: why for site, why in item.left_out.items() if site in sites})
            elif item.site in sites and sites[item.site] not in good:
                found = _checked(item, instruction)
                if isinstance(found, str):
                    bad[sites[item.site]] = found
                else:
                    good[sites[item.site]] = found
        for node in sites.values():
            if node not in good:
                bad.setdefault(node, "no answer before the deadline")

    def _reply(self, message: Message, good: dict[int, Packed], bad: dict[int, str]) -> Message:
        node = message.metadata.dst_node_id
        if node in good:
            made = Message(to_flower(good[node].records, flwr.app), reply_to=message)
        else:
            made = Message(Error(1, bad.get(node, "no answer")), reply_to=message)
        made.metadata.__dict__["_message_id"] = secrets.token_hex(16)
        return made

    def _commit(
        self,
        kind: str,
        number: int,
        digest: str,
        good: dict[int, Packed],
        bad: dict[int, str],
        seconds: float,
        void: str,
    ) -> None:
        """Show what was done; and that the run has begun, for a process that would start it again."""
        left = {self._nodes[node]: why for node, why in bad.items()}
        if kind != "train":
            sites = {self._nodes[node]: _numbers(one.records) for node, one in good.items()}
            found = Evaluation(self.state.round, digest, _pooled(sites), sites)
            self.state = replace(self.state, evaluations=(*self.state.evaluations, found))
            if kind == "evaluate" and self.state.round:
                self._commits.commit(self.state)
            return
        asked = tuple(sorted([*left, *(self._nodes[node] for node in good)]))
        weights = {
            self._nodes[node]: _numbers(one.records).get("num-examples", 1.0) for node, one in good.items()
        }
        record = Round(number, self.state.attempt, asked, weights, left, digest, seconds, void)
        rounds = (*self.state.rounds, record)
        if void:
            self.state = replace(self.state, attempt=self.state.attempt + 1, rounds=rounds)
        else:
            self.state = replace(self.state, round=number, attempt=0, rounds=rounds)
        self._commits.commit(self.state)

    def _remember(self, records: Records) -> None:
        """Keep the arrays that go out now."""
        for kind, entries in records.values():
            if kind == "arrays":
                self.last = dict(entries)


def _node(site: str) -> int:
    """A site's node id in a run: the same each time."""
    return int.from_bytes(hashlib.sha256(site.encode()).digest()[:6], "big") + 2


def _by_content(messages: list[Message]) -> Iterator[tuple[Records, bytes, list[Message]]]:
    """What messages carry, and which do; one a node and content."""
    found: dict[bytes, tuple[Records, bytes, list[Message]]] = {}
    seen: dict[int, bytes] = {}  # most strategies send one RecordDict to all
    for message in messages:
        about = message.metadata
        content = seen.get(id(message.content))
        if content is None:
            records = from_flower(message.content)
            content = pack(Packed(records, about.message_type, about.group_id))
            seen[id(message.content)] = content
            found.setdefault(content, (records, content, []))
        found[content][2].append(message)
    yield from found.values()


def _checked(answer: Answer, instruction: Instruction) -> Packed | str:
    """What a site answered, or why that does not count."""
    right = instruction.nonce_for(answer.site)
    if answer.nonce != right or (answer.round, answer.attempt) != (instruction.round, instruction.attempt):
        return "answers another instruction"
    if answer.status != "done":
        return answer.reason or "declined"
    try:
        return unpack(answer.payload.opaque)
    except IntegrityError as error:
        return str(error)


def _numbers(records: Records) -> dict[str, float]:
    """The single numbers among a message's metrics."""
    return {
        key: float(value)
        for kind, entries in records.values()
        if kind == "metrics"
        for key, value in entries.items()
        if isinstance(value, int | float)
    }


def _pooled(sites: dict[str, dict[str, float]]) -> dict[str, float]:
    """Means of what all sites gave, weighted by `num-examples`, as Flower's strategies do it."""
    total = sum(one.get("num-examples", 0.0) for one in sites.values())
    if not sites or not total:
        return {}
    names = set.intersection(*(set(one) for one in sites.values())) - {"num-examples"}
    return {
        name: sum(one[name] * one["num-examples"] for one in sites.values()) / total for name in sorted(names)
    }
