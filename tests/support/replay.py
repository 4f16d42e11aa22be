"""A run made again from what it recorded: in this process, by the same trainers, without a server.

Each round that moved the model is done again by exactly the sites that were admitted in it, whatever was asked, late,
lost or killed in between. So the result is what the run must have come to, if its records are true: every model, every
answer that counted, and what each site keeps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from consortium.client.site import Memory, Site, open_site, start
from consortium.client.store import Question, fingerprint, question
from consortium.client.task import task_of
from consortium.client.trainer import SiteState
from consortium.protocol.layout import Kind, Vector, digest_of
from consortium.protocol.messages import (
    Answer,
    Instruction,
    Payload,
    Statistics,
    encode,
    parse,
    sum_statistics,
)
from consortium.protocol.study import Study
from consortium.server.admission import norm
from consortium.server.records import Round
from consortium.server.tally import variate_shares
from consortium.simulations.host import one_thread
from consortium.simulations.sites import source_of
from consortium.strategies.base import Contribution, Strategy
from consortium.strategies.chosen import strategy_of


@dataclass
class Replayed:
    """What a run must have come to.

    model: the `shared` vector after the last round. states: what each site keeps.
    answers: by site, the fingerprint of each answer that counted, by its question.
    """

    model: Vector
    control: Vector | None
    states: dict[str, SiteState]
    answers: dict[str, dict[Question, str]] = field(default_factory=dict)


def rounds_of(result: Mapping[str, Any]) -> list[Round]:
    """The rounds in a run's `result.json`, void ones too."""
    found = []
    for one in result["rounds"]:
        about = {name: value for name, value in one.items() if name != "kind"}
        found.append(Round(**{**about, "asked": tuple(one["asked"])}))
    return found


def replay(study: Study, run: str, places: Mapping[str, Path], rounds: Sequence[Round]) -> Replayed:
    """Do the rounds again that `rounds` record.

    places: each site's data. run: the run's name, which its answers carry.

    Raises:
        AssertionError: a round's model is another one than was recorded.
    """
    with one_thread():
        return _replay(study, run, places, rounds)


def _replay(study: Study, run: str, places: Mapping[str, Path], rounds: Sequence[Round]) -> Replayed:
    task, strategy = task_of(study), strategy_of(study)
    net = start(study, task, strategy.local)
    sites = {
        name: open_site(study, task, strategy.local, net, source_of(study, path))
        for name, path in places.items()
    }
    segment = net.layout["control"]
    first = net.vector("shared")
    control = np.zeros(segment.size, segment.numpy_dtype) if segment.size else None
    found = Replayed(first, control, {name: {} for name in places}, {name: {} for name in places})
    optimizer, sums = strategy.optimizer.init(first), dict[str, Any]()
    for number, record in enumerate(rounds):
        if not record.void:
            asked = _instruction(study, run, record, found, sums)
            answers = _answers(found, sites, record, asked)
            if asked.kind == "query":
                sums = dict(sum_statistics([one.payload.statistics for one in answers.values()]))
            else:
                update = _reduced(strategy, record, answers, "shared")
                found.model, optimizer = strategy.optimizer.step(optimizer, found.model, update)
                if found.control is not None:
                    kept, share = variate_shares(strategy.reducer, rounds[: number + 1])
                    change, of = _reduced(strategy, record, answers, "control"), found.control.dtype.type
                    found.control = of(kept) * found.control + of(share) * change
        assert digest_of([found.model]) == record.model, f"round {record.round} came to another model"
    return found


def _instruction(study: Study, run: str, record: Round, found: Replayed, sums: Statistics) -> Instruction:
    vectors = {"shared": found.model}
    if found.control is not None:
        vectors["control"] = found.control
    return Instruction(
        federation="",
        run=run,
        round=record.round,
        attempt=record.attempt,
        kind="train" if record.round else "query",
        study=study.digest,
        model=digest_of([found.model]) if record.round else "",
        layout="",
        nonce="",
        expires=0.0,
        payload=Payload(vectors if record.round else {}, sums),
    )


def _answers(
    found: Replayed, sites: Mapping[str, Site], record: Round, asked: Instruction
) -> dict[str, Answer]:
    """What the admitted sites answer, in name order; what they keep moves on, as they were admitted."""
    answers = {}
    for name in sorted(record.admitted):
        site = sites[name]
        site.memory = Memory(found.states[name])
        answer = answers[name] = site.answer(replace(asked, site=name))
        assert (answer.status, answer.weight) == ("done", record.admitted[name])
        found.answers[name][question(answer)] = fingerprint(answer)
        sha256 = parse(encode(answer)[0]).sha256
        assert record.updates.get(name, sha256) == sha256, (
            f"round {record.round}: {name} sent another update than was recorded"
        )
        if site.memory.pending_round:
            found.states[name] = site.memory.pending
    return answers


def _reduced(strategy: Strategy, record: Round, answers: Mapping[str, Answer], kind: Kind) -> Vector:
    reducer = strategy.reducer
    size, dtype = next(
        (one.size, one.dtype) for one in (answer.payload.vectors[kind] for answer in answers.values())
    )
    running = reducer.init(size, dtype)
    for slot, site in enumerate(record.asked):
        if site in answers:
            vectors, weight = answers[site].payload.vectors, answers[site].weight
            one = Contribution(slot, vectors[kind], weight, norm(vectors["shared"]))
            running = reducer.add(running, one)
    return reducer.finish(running)
