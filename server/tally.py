"""From one exchange's answers to who counted, what the model scored, and which model is best. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from consortium.privacy.ledger import OVER
from consortium.privacy.mechanisms import Mechanism
from consortium.protocol import metrics
from consortium.protocol.messages import Answer, Statistics, sum_statistics
from consortium.protocol.sections import LOWER_IS_BETTER
from consortium.server.admission import Admitted, Gate, clip
from consortium.server.clients import Block
from consortium.server.records import Evaluation, Round
from consortium.server.standing import NOT_NEEDED
from consortium.strategies.base import Contribution, Reducer

_NOBODY: Mapping[str, bool] = {}


@dataclass(frozen=True)
class Ballot:
    """One exchange, counted.

    asked: the cohort in name order. admitted: valid answers by site, in name order. left_out: reasons by site.
    blocks: sums that came in place of vectors, in block order, one a block or folded; empty where every answer brings
        its own.
    aside: by site, why it was not asked. notes: by site, what it said beside an answer that counts.
    """

    asked: tuple[str, ...]
    admitted: Mapping[str, Admitted]
    left_out: Mapping[str, str]
    blocks: tuple[Block, ...]
    aside: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)


class Count:
    """Answers as they come in, one exchange's; `done` gives the ballot.

    most: with so many valid answers there are enough.
    """

    def __init__(self, asked: Sequence[str], gate: Gate, most: int | None = None) -> None:
        self._most = most
        self._asked = tuple(sorted(asked))
        self._waiting = set(self._asked)
        self._gate = gate
        self._admitted: dict[str, Admitted] = {}
        self._left_out: dict[str, str] = {}
        self._blocks: list[Block] = []

    @property
    def enough(self) -> bool:
        """Whether nobody else need be waited for."""
        return self._most is not None and len(self._admitted) >= self._most

    def add(self, item: Answer | Block) -> None:
        """Take one answer or one block of them."""
        if isinstance(item, Block):
            if item.shared is not None:
                self._blocks.append(item)
            self._admitted.update((one.answer.site, one) for one in item.admitted)
            self._left_out.update(item.left_out)
            self._waiting.difference_update(one.answer.site for one in item.admitted)
            self._waiting.difference_update(item.left_out)
            return
        self._one(item)

    def _one(self, answer: Answer) -> None:
        site = answer.site
        astray = self._gate.misaddressed(answer)
        if site in self._waiting and astray:
            self._left_out[site] = astray  # a valid answer may still come
        elif site in self._waiting:
            self._waiting.remove(site)
            self._left_out.pop(site, None)
            verdict = self._gate.content(answer)
            if isinstance(verdict, Admitted):
                self._admitted[site] = verdict
            else:
                self._left_out[site] = verdict
        elif site in self._admitted and not astray:
            # Which of the two is meant nobody can tell, and nothing has been summed yet.
            del self._admitted[site]
            self._left_out[site] = "answered twice in one round"

    def done(self) -> Ballot:
        """The ballot; whoever has not answered by now is left out."""
        for site in self._waiting:
            self._left_out.setdefault(site, NOT_NEEDED if self.enough else "no answer before the deadline")
        admitted = {site: self._admitted[site] for site in sorted(self._admitted)}
        left_out = {site: self._left_out[site] for site in sorted(self._left_out)}
        blocks = sorted(self._blocks, key=lambda b: b.shared.block if b.shared else -1)
        notes = {site: clip(one.answer.reason) for site, one in admitted.items() if one.answer.reason}
        return Ballot(self._asked, admitted, left_out, tuple(blocks), notes=notes)


def judge(gate: Gate, site: str, answers: Sequence[Answer]) -> Admitted | str:
    """The verdict on all that one site sent in an exchange: what counts of it, or why nothing does."""
    if len(answers) == 1:
        return gate.check(answers[0])
    count = Count((site,), gate)
    for answer in answers:
        count.add(answer)
    ballot = count.done()
    return ballot.admitted[site] if site in ballot.admitted else ballot.left_out[site]


def agreeing(tables: Mapping[str, Statistics]) -> dict[str, Statistics]:
    """The tables that have the names and shapes which most sites sent (a tie goes to the first site by name).

    So one site that sends other names or shapes loses its own place, and cannot spoil a sum.
    """
    signatures = {
        site: tuple(sorted((n, _shape(n, a.shape)) for n, a in t.items())) for site, t in tables.items()
    }
    votes: dict[object, int] = {}
    for site in sorted(signatures):
        votes[signatures[site]] = votes.get(signatures[site], 0) + 1
    if not votes:
        return {}
    winner = max(votes, key=lambda signature: votes[signature])
    return {site: tables[site] for site in sorted(tables) if signatures[site] == winner}


def _shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[1:] if name.endswith("_exact") else shape  # one row an example: sites differ


def evaluation(ballot: Ballot, round: int, model: str) -> Evaluation | None:
    """What the admitted answers say of the model that they received; None where no site has a holdout."""
    tables = {site: one.answer.metrics for site, one in ballot.admitted.items() if one.answer.metrics}
    tables = agreeing(tables)
    if not tables:
        return None
    pooled = metrics.pool(list(tables.values()))
    sites = {site: metrics.values(table) for site, table in tables.items()}
    return Evaluation(round, model, metrics.values(pooled), sites, metrics.reliability(pooled))


def statistics(ballot: Ballot) -> tuple[Statistics, dict[str, str]]:
    """Sums of the sites' statistics in name order, and reasons for sites whose names or shapes differ."""
    tables = {site: one.answer.payload.statistics for site, one in ballot.admitted.items()}
    kept = agreeing(tables)
    odd = {
        site: "sends statistics of other names or shapes than most sites"
        for site in tables
        if site not in kept
    }
    return sum_statistics(list(kept.values())), odd


def variate_shares(reducer: Reducer, rounds: Iterable[Round]) -> tuple[float, float]:
    """Factors (kept, share) of SCAFFOLD's c = kept * c + share * mean of the changes, after the last of `rounds`.

    They keep c the mean of all sites' variates c_i under the reducer's own weights, those of sites that were never
    admitted being 0: with uniform weights and the same N sites always, kept = 1 and share = |S|/N, as in
    arXiv 1910.06378, alg. 1 line 17. A site's weight is that of its last admitted answer; the mean one before that.
    Where a site comes that was never there before, kept is off by that site's part, once. All of it follows from the
    records, so that a run that goes on after a restart, or a replay of what it recorded, has the same bits.
    """

    known: dict[
        str, float
    ] = {}  # the weight of each site's last admitted answer, before the last of `rounds`
    last = None
    for record in rounds:  # once: they may have to be read from a file
        if last is not None and last.round and not last.void:
            known.update(last.admitted)
        last = record
    assert last is not None

    def total(known: Mapping[str, float], unseen: int) -> float:
        weights = [_counts(reducer, known[site]) for site in sorted(known)]
        return sum(weights) + unseen * (sum(weights) / len(weights) if weights else 1.0)

    admitted = dict(last.admitted)
    after = {**known, **admitted} if last.round and not last.void else known
    now = total(after, last.unseen - len(admitted.keys() - known.keys()))
    share = sum(_counts(reducer, admitted[site]) for site in sorted(admitted)) / now
    return total(known, last.unseen) / now, share


def _counts(reducer: Reducer, weight: float) -> float:
    """What a contribution of this weight counts in the reducer's mean; 1 where the rule has no weights."""
    if reducer.weight is None:
        return 1.0
    return reducer.weight(Contribution(0, np.empty(0), weight, 0.0))


def releases(rounds: Sequence[Round], mechanism: Mechanism | None) -> dict[str, int]:
    """How often each site released what its privacy is spent on, by site; empty without a mechanism.

    A site that adds its noise itself may have released in every round that it was asked in, whether or not that
    counted; in further attempts at a round it sends the same bytes again. What is noised at the server is released only
    in rounds that moved the model.
    """
    if mechanism is not None and mechanism.sampled:  # a round costs all the same, whoever was drawn
        moved = sum(bool(record.round) for record in rounds)
        return dict.fromkeys(sorted({site for record in rounds for site in record.drawn_from}), moved)
    found: set[tuple[str, int]] = set()
    for record in rounds:
        if mechanism is None or not record.round:
            continue
        central = mechanism.name == "central-gaussian"
        sites = () if central and record.void else record.admitted if central else record.asked
        found |= {(site, record.round) for site in sites}
    return dict(Counter(site for site, _ in found))


def over_budget(rounds: Iterable[Round], before: Mapping[str, bool] = _NOBODY) -> Mapping[str, bool]:
    """By site, whether it declined for its privacy budget when it was last heard. before: as of the rounds before."""
    last = dict(before)
    for record in rounds:
        last |= dict.fromkeys(record.admitted, False)
        last |= {site: why.startswith(f"declined: {OVER}") for site, why in record.left_out.items()}
    return last


def better(metric: str, one: Evaluation, other: Evaluation | None) -> bool:
    """Whether `one` scores strictly better than `other` by the study's metric."""
    score = one.pooled.get(metric, math.nan)
    if math.isnan(score):
        return False
    if other is None or math.isnan(other.pooled.get(metric, math.nan)):
        return True
    rival = other.pooled[metric]
    return score < rival if metric in LOWER_IS_BETTER else score > rival
