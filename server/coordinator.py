"""The round loop: read this file first.

    select -> ask -> admit -> reduce -> noise -> step -> commit        then once: evaluate the final model

`run` is called with everything that it depends on: the plan of the run, the sites (`Clients`), the place of commits
(`Commits`), a clock and randomness. It is the same in simulation and live; only these differ. Whatever a site does
(silence, delay, nonsense, lies), it costs that site its place in the round and no more.

A model is evaluated by the answers to the next round's instruction, which carries it, so a round is one exchange.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import numpy as np

from consortium.privacy.randomness import Stream
from consortium.protocol.layout import Kind, Vector, digest_of
from consortium.protocol.messages import Ask, Instruction, Payload
from consortium.server import tally
from consortium.server.admission import Gate
from consortium.server.clients import Clients
from consortium.server.interrupted import Asked, Begins
from consortium.server.noise import noised
from consortium.server.records import Commits, Evaluation, Outcome, Plan, Round, RunState, followed
from consortium.server.standing import Cohort, Standings, aside, standings
from consortium.server.tally import Ballot
from consortium.strategies.base import BlockSum, Contribution

ATTEMPTS = 3
"""Void attempts at one round before the run waits for sites."""
MOST_NAMES = 10
"""Sites that a reason names."""
LONGEST_REST = 60.0
"""Seconds between two attempts, at most; the first two are a second apart, and each pause is twice the one before."""

Clock = Callable[[], float]
Rest = Callable[[float], None]
Name = Callable[[Vector], str]
Report = Callable[[Round | Evaluation], None]


def run(
    plan: Plan,
    clients: Clients,
    commits: Commits,
    *,
    clock: Clock,
    rng: random.Random,
    draws: Stream | None = None,
    report: Report = lambda _: None,
    rest: Rest = lambda _: None,
    name: Name = lambda model: digest_of([model]),
    interrupted: Asked | None = None,
    begins: Begins = lambda _: None,
) -> Outcome:
    """Run a study to its end, from where it was last committed.

    clock: seconds since the epoch.
    rng: draws cohorts; live it is `random.SystemRandom`.
    draws: the randomness of the noise; None: the operating system's, the only one that protects anybody.
    report: called with each round, void ones too, and each evaluation, once it is committed.
    rest: waits so many seconds, between two attempts at a round; live, it is `time.sleep`.
    name: the digest of a model; live, it is remembered for the instruction that carries the model.
    interrupted: what was asked last, before this process; where nothing was committed since, the same is asked again of
        the same sites, and answers that came before count.
    begins: told what is asked, before it is.
    """
    draws = draws or Stream.system()
    exchange = partial(_exchange, plan, clients, clock, begins)
    state = commits.load() or _begin(plan, name)
    known, spent = standings(state.rounds, plan.failures), tally.over_budget(state.rounds)
    while state.round < plan.study.rounds:
        if not _enough(plan, clients, spent):
            break
        before, started = state, clock()
        kind: Ask = "query" if _asks_statistics(plan, state) else "train"
        cohort = _select(plan, clients, state, known, rng)  #              select
        ballot = exchange(state, kind, *_resumed(interrupted, state, kind, cohort))  # ask, admit
        if kind == "query":
            state = _prepared(plan, state, ballot, started, clock)
        else:
            state = _trained(plan, clients, state, ballot, started, clock, draws, name)  # reduce, noise, step
        del ballot  # the updates in it take up a disk
        state = commits.commit(state)  #                                   commit
        _tell(report, before, state)
        new = state.rounds[len(before.rounds) :]
        known, spent = standings(new, plan.failures, known), tally.over_budget(new, spent)
        if state.attempt and not _again(plan, clients, state, spent, rest):
            break
    if state.round:
        before = state
        sites = clients.sites()
        resting = aside(known, sites, plan.study.cohort.min_sites)
        cohort = Cohort([site for site in sites if site not in resting])
        ballot = exchange(state, "evaluate", *_resumed(interrupted, state, "evaluate", cohort))
        state = _judged(plan, state, ballot)
        state = commits.commit(state)
        _tell(report, before, state)
    return outcome_of(plan, state)


def _begin(plan: Plan, name: Name) -> RunState:
    control = plan.layout["control"]
    return RunState(
        round=0,
        attempt=0,
        model=plan.initial,
        digest=name(plan.initial),
        control=np.zeros(control.size, control.numpy_dtype) if control.size else None,
        optimizer=plan.strategy.optimizer.init(plan.initial),
        statistics={},
    )


def _select(plan: Plan, clients: Clients, state: RunState, known: Standings, rng: random.Random) -> Cohort:
    sites = clients.sites()
    if _asks_statistics(plan, state):
        return Cohort(sites)  # one preprocessing fits all, so all are asked
    resting = aside(known, sites, plan.study.cohort.min_sites)
    sites = [site for site in sites if site not in resting] if resting else sites
    chosen = sorted(plan.strategy.selector(sites, state.round + 1, rng))
    others = sorted(set(sites) - set(chosen)) if plan.spare else []
    if not others:
        return Cohort(chosen, None, resting)
    more = rng.sample(others, min(plan.spare, len(others)))
    return Cohort(sorted([*chosen, *more]), len(chosen), resting)


def _again(plan: Plan, clients: Clients, state: RunState, spent: Mapping[str, bool], rest: Rest) -> bool:
    """After a void attempt: whether there is another, now that time has passed, or sites are at hand."""
    left = [site for site in clients.sites() if not spent.get(site)]
    if len(left) < max(plan.study.cohort.min_sites, plan.strategy.reducer.minimum) <= len(clients.sites()):
        return False  # no waiting brings a budget back
    if state.attempt % ATTEMPTS == 0:
        return clients.wait(_missing(clients, state))
    rest(min(LONGEST_REST, 2.0 ** (state.attempt - 1)))
    return True


def _enough(plan: Plan, clients: Clients, spent: Mapping[str, bool]) -> bool:
    """Where cohorts are Poisson samples: whether so many sites are at hand that a round is more than noise. No round is
    void then for those that did not answer, as that would tell who was drawn."""
    if not plan.sampled:
        return True
    while sum(not spent.get(site) for site in clients.sites()) < plan.study.cohort.min_sites:
        if len(clients.sites()) >= plan.study.cohort.min_sites or not clients.wait(()):
            return False
    return True


def _asks_statistics(plan: Plan, state: RunState) -> bool:
    return plan.prepares and not state.statistics


def _missing(clients: Clients, state: RunState) -> tuple[str, ...]:
    """For whom a run without a quorum waits: who was left out, and who counted before but is not at hand now."""
    return tuple(sorted({*state.rounds[-1].left_out, *(state.counted.keys() - set(clients.sites()))}))


def _resumed(
    interrupted: Asked | None, state: RunState, kind: Ask, cohort: Cohort
) -> tuple[Cohort, tuple[str, ...]]:
    """Whom to ask: `cohort`, or those of the exchange that was interrupted, and under which nonces they were asked."""
    if interrupted is None or not interrupted.is_of(state, kind):
        return cohort, ()
    return interrupted.cohort, interrupted.nonces


def _exchange(
    plan: Plan,
    clients: Clients,
    clock: Clock,
    begins: Begins,
    state: RunState,
    kind: Ask,
    cohort: Cohort,
    former: tuple[str, ...],
) -> Ballot:
    """Ask the cohort, and count what comes back until the deadline."""
    deadline = clock() + plan.study.cohort.deadline
    instruction = Instruction(
        federation=plan.federation,
        run=plan.run,
        round=state.round + (kind == "train"),
        attempt=state.attempt,
        kind=kind,
        study=plan.study.digest,
        model="" if kind == "query" else state.digest,
        layout=plan.layout.digest,
        nonce=secrets.token_hex(32),
        expires=deadline,
        payload=Payload(_vectors(state, kind), state.statistics),
        counted=state.counted,
    )
    gate = Gate(
        instruction,
        plan.layout,
        plan.study.cohort.max_weight,
        plan.mechanism,
        norms=plan.strategy.reducer.norms,
        former=former,
    )
    count = tally.Count(cohort.sites, gate, cohort.enough)
    if cohort.sites:
        about = instruction.round, instruction.attempt, kind, instruction.model
        begins(Asked(*about, cohort, (*former, instruction.nonce)))
        clients.ask(cohort.sites, instruction)
        for item in clients.answers(deadline):
            count.add(item)
            if count.enough:
                break
    return replace(count.done(), aside=cohort.aside)


def _vectors(state: RunState, kind: Ask) -> dict[str, Vector]:
    if kind == "query":
        return {}
    if state.control is None or kind == "evaluate":
        return {"shared": state.model}
    return {"shared": state.model, "control": state.control}


def _void(plan: Plan, ballot: Ballot, fewest: int) -> str:
    """Why this exchange must not move anything; empty where it may."""
    fewest = max(plan.study.cohort.min_sites, fewest)
    if len(ballot.admitted) >= fewest:
        return ""
    return f"{len(ballot.admitted)} of {len(ballot.asked)} sites gave a valid answer; at least {fewest} are needed"


def _prepared(plan: Plan, state: RunState, ballot: Ballot, started: float, clock: Clock) -> RunState:
    """Statistics of all sites, summed once before round 1."""
    sums, odd = tally.statistics(ballot)
    kept = {site: one for site, one in ballot.admitted.items() if site not in odd}
    ballot = replace(ballot, admitted=kept, left_out={**ballot.left_out, **odd})
    void = _void(plan, ballot, 1)
    record = _record(state, ballot, 0, void, state.digest, clock() - started)
    if void:
        return replace(state, attempt=state.attempt + 1, rounds=followed(state.rounds, record))
    return replace(state, attempt=0, statistics=sums, rounds=followed(state.rounds, record))


def _trained(
    plan: Plan,
    clients: Clients,
    state: RunState,
    ballot: Ballot,
    started: float,
    clock: Clock,
    draws: Stream,
    name: Name,
) -> RunState:
    """The next state after a round of training: reduce and noise what was admitted, step; or a void attempt."""
    void = "" if plan.sampled else _void(plan, ballot, plan.strategy.reducer.minimum)
    number = state.round + 1
    if void:
        record = _record(state, ballot, number, void, state.digest, clock() - started)
        return replace(state, attempt=state.attempt + 1, rounds=followed(state.rounds, record))
    state = _judged(plan, state, ballot)
    update, statistics = noised(
        plan.mechanism,
        plan.strategy.reducer,
        ballot,
        _reduce(plan, ballot, "shared"),
        state.statistics,
        draws,
    )
    moves = plan.strategy.optimizer
    own = plan.strategy.reducer.scale is not None  # a sum, to which nobody else refers
    step = moves.step_over if own and moves.step_over is not None else moves.step
    model, optimizer = step(state.optimizer, state.model, update)
    control = state.control
    digest = name(model)
    record = _record(state, ballot, number, "", digest, clock() - started)
    if plan.sampled:
        record = replace(record, drawn_from=tuple(sorted({*clients.sites(), *ballot.asked})))
    if control is not None:
        at_hand = {*clients.sites(), *ballot.asked}
        record = replace(record, unseen=len(at_hand - state.counted.keys()))
        kept, share = tally.variate_shares(plan.strategy.reducer, followed(state.rounds, record))
        of = control.dtype.type
        control = of(kept) * control + of(share) * _reduce(plan, ballot, "control")
    return replace(
        state,
        round=number,
        attempt=0,
        model=model,
        digest=digest,
        control=control,
        optimizer=optimizer,
        statistics=statistics,
        counted={**state.counted, **dict.fromkeys(ballot.admitted, number)},
        rounds=followed(state.rounds, record),
    )


def _reduce(plan: Plan, ballot: Ballot, kind: Kind) -> Vector:
    """One update from many, in site-name order."""
    segment, reducer = plan.layout[kind], plan.strategy.reducer
    parts: list[Contribution | BlockSum]
    if ballot.blocks:
        sums = [block.shared if kind == "shared" else block.control for block in ballot.blocks]
        parts = [one for one in sums if one is not None]
    else:
        slots = {site: slot for slot, site in enumerate(ballot.asked)}
        parts = [
            Contribution(slots[site], one.answer.payload.vectors[kind], one.answer.weight, one.norm)
            for site, one in ballot.admitted.items()
        ]
    if not parts and plan.sampled:
        return np.zeros(segment.size, segment.numpy_dtype)
    running = reducer.init(segment.size, segment.numpy_dtype)
    for part in parts:
        running = reducer.add(running, part)
    return reducer.finish(running)


def _judged(plan: Plan, state: RunState, ballot: Ballot) -> RunState:
    """The state with the evaluation that the answers bring of the model they received, once a model."""
    found = tally.evaluation(ballot, state.round, state.digest)
    last = state.evaluations[-1] if state.evaluations else None
    if found is None or (last is not None and (last.model, last.round) == (state.digest, state.round)):
        return state
    best = state.best
    chooses = plan.study.evaluation.select == "best" and state.round > 0 and not _void(plan, ballot, 1)
    if chooses and tally.better(plan.study.metric, found, best[0] if best else None):
        best = (found, state.model)
    return replace(state, evaluations=followed(state.evaluations, found), best=best)


def _record(state: RunState, ballot: Ballot, number: int, void: str, digest: str, seconds: float) -> Round:
    weights = {site: one.answer.weight for site, one in ballot.admitted.items()}
    return Round(
        number,
        state.attempt,
        ballot.asked,
        weights,
        ballot.left_out,
        digest,
        seconds,
        void,
        aside=ballot.aside,
        notes=ballot.notes,
        updates={site: one.answer.sha256 for site, one in ballot.admitted.items() if one.answer.sha256},
    )


def _tell(report: Report, before: RunState, state: RunState) -> None:
    for evaluation in state.evaluations[len(before.evaluations) :]:
        report(evaluation)
    for record in state.rounds[len(before.rounds) :]:
        report(record)


def _unfinished(state: RunState) -> str:
    """Why the rounds ended before the last, with the sites that did not answer, or not so that it counts."""
    if not state.rounds or not state.rounds[-1].void:
        return (
            f"round {state.round + 1}: too few sites are at hand, or have a privacy budget that is not spent"
        )
    last = state.rounds[-1]
    named = [f"{site}: {why}" for site, why in last.left_out.items()][:MOST_NAMES]
    return "; ".join([f"round {state.round + 1}: {last.void}", *named])


def outcome_of(plan: Plan, state: RunState) -> Outcome:
    """How a run ended whose last commit is `state`."""
    why = "" if state.round == plan.study.rounds else _unfinished(state)
    if state.round == 0:
        return Outcome("failed", why, state.model, state.digest, None, state)
    model, digest = state.model, state.digest
    chosen = next((e for e in reversed(state.evaluations) if e.model == digest), None)
    if state.best is not None:
        chosen, model = state.best
        digest = chosen.model
    return Outcome("finished early" if why else "finished", why, model, digest, chosen, state)
