"""A site's privacy ledger: what each data set has spent, in a log that only grows and shows what was done to it.

Kinds of entries, over `protocol/chain.py`:

    charge      one release that is about to be computed; the entry comes first
    answer      what is about to leave for a charge, by the SHA-256 of its content: the same again costs nothing
    unbounded   a run without a mechanism, over a data set: nothing bounds it any more
    budget      what the operator allows a data set to spend, in place of what was allowed before

Entries hold releases, not epsilons: epsilon is derived, per unit and at a delta, so that a better accountant, or
another delta, needs no other ledger. A data set is named by the operator: the same records under two
names are two accounts, so give them one name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from consortium.privacy import ledger_copy
from consortium.privacy.accounting import Guarantee, Relation, Release, Unit, spent
from consortium.privacy.mechanisms import Mechanism
from consortium.protocol.chain import Entry, Head, verify
from consortium.protocol.chain_writer import Chain
from consortium.protocol.errors import InputError, IntegrityError, RefusedError
from consortium.protocol.signing import fingerprint

OVER = "privacy budget"
"""How the reason begins with which a site declines what would pass a budget."""
RELATIONS: dict[Unit, Relation] = {
    "record": "add or remove one",
    "person": "add or remove one",
    "site": "replace one",
}


CENTRAL = "central-gaussian"
"""The mechanism whose noise the server adds."""

Step = tuple[str, int, str]
"""Run, round and the digest of the model: what is trained once, however often it is asked for."""


@dataclass(frozen=True)
class Question:
    """What a site is asked: the same question again is answered by the same bytes, and costs nothing. Nor does another
    attempt at the same step, which is answered by the bytes of the attempt before."""

    run: str
    round: int
    attempt: int
    model: str

    @property
    def step(self) -> Step:
        """The question, whatever the attempt."""
        return (self.run, self.round, self.model)


@dataclass(frozen=True)
class Charge:
    """One release of a data set. release: None for a run without a mechanism. whole: of all rounds of the run, where
    cohorts are drawn in secret: each round costs a site the same, whether or not it is in it. epoch: of the server
    (`protocol/epoch.py`) that asked: one that was restored noises anew what it has published before."""

    data: str
    question: Question
    study: str
    unit: Unit
    mechanism: str
    release: Release | None
    whole: bool = False
    epoch: int = 0

    def pays(self, other: Charge) -> bool:
        """Whether what `other` would charge was charged by this one, of the same data set: the same step of a run, or
        all of it. Where the server adds the noise, in the same epoch of its."""
        if self.question.run != other.question.run or (
            other.release and other.mechanism == CENTRAL and self.epoch != other.epoch
        ):
            return False
        return self.whole or self.question.step == other.question.step


@dataclass(frozen=True)
class Budget:
    """What a data set may spend, of one unit.

    Raises:
        InputError: a number is out of range.
    """

    epsilon: float
    delta: float
    unit: Unit

    def __post_init__(self) -> None:
        if not 0 < self.epsilon < math.inf:
            raise InputError(f"epsilon: got {self.epsilon}; a number above 0 would be right")
        if not 0 < self.delta < 1:
            raise InputError(
                f"delta: got {self.delta}; a number between 0 and 1, such as 1e-5, would be right"
            )


@dataclass(frozen=True)
class Account:
    """What is known of one data set. charges: in the order in which they were made. left: the SHA-256 of all that left,
    by step; never more of one than it has charges."""

    data: str
    charges: tuple[Charge, ...] = ()
    budget: Budget | None = None
    left: Mapping[Step, frozenset[str]] = field(default_factory=dict)

    @property
    def unbounded(self) -> tuple[str, ...]:
        """Runs without a mechanism that computed on it."""
        return tuple(dict.fromkeys(one.question.run for one in self.charges if one.release is None))

    def spent(self, unit: Unit, delta: float, more: Sequence[Charge] = ()) -> Guarantee:
        """What one unit of it has spent, in all studies together, with `more` on top."""
        releases = [seen_by(unit, charge) for charge in (*self.charges, *more)]
        return spent(releases, delta, unit, RELATIONS[unit])


def seen_by(unit: Unit, charge: Charge) -> Release:
    """What a charge releases of another unit than its own: always as much or more, never less.

    Of a larger unit nothing is bounded: one person may have every record. Of a smaller one: to change a part of a unit
    is to replace the unit, which moves a sum by up to twice what its removal does; and that it is drawn with the rest
    of the unit is not counted in its favour.
    """
    order = ("record", "person", "site")
    if charge.release is None or order.index(charge.unit) < order.index(unit):
        return Release(0.0)
    if charge.unit == unit and not (unit == "site" and charge.mechanism == "central-gaussian"):
        return charge.release
    factor = 1.0 if charge.mechanism == "local-gaussian" else 0.5
    return Release(charge.release.noise_multiplier * factor, 1.0, charge.release.count)


def ledger_name(federation: str, site: str, identity: Ed25519PublicKey) -> str:
    """The name of a site's ledger: of one federation, and of the identity that the site joined with."""
    return f"ledger {federation} {site} {fingerprint(identity)}"


class Ledger:
    """The ledger of one site, in the file at `path`; for one process at a time that charges.

    Raises:
        IntegrityError: it is damaged; the entry is named.
    """

    def __init__(
        self, path: Path, name: str, key: Ed25519PrivateKey, earlier: Sequence[Ed25519PublicKey] = ()
    ) -> None:
        self._chain = Chain(path, name, key, earlier)
        self.path, self.name, self.keys = path, name, (key.public_key(), *earlier)
        self._copy_key = ledger_copy.copy_key(key)

    @property
    def head(self) -> Head:
        """As of the last entry that was read or made here."""
        return self._chain.head

    def verify(self, witnessed: Sequence[Head] = ()) -> Head:
        """Its head, once everything was checked, and that it contains each head in `witnessed`.

        Raises:
            IntegrityError: naming the entry that is not as it was written, or is missing.
        """
        return verify(self.path, self.name, self.keys, witnessed)

    def entries(self) -> Iterator[Entry]:
        """All entries, in order."""
        return self._chain.entries()

    def copies(self, after: int) -> Mapping[int, bytes]:
        """Its lines after that number, by number, sealed for the server to keep; as many as are sent at once."""
        return ledger_copy.sealed_after(self.path, self._copy_key, self.name, after)

    def contains(self, head: Head) -> bool:
        """Whether the ledger once ended with this head."""
        if head.sequence == 0:
            return True
        return any(entry.head == head for entry in self._chain.entries(head.sequence - 1))

    def accounts(self) -> dict[str, Account]:
        """What is known of each data set, by name."""
        return accounts(self._chain.entries())

    def allow(self, data: str, budget: Budget, at: float) -> None:
        """From now on `data` may spend `budget`, what it has spent before included."""
        body = {"data": data, "epsilon": budget.epsilon, "delta": budget.delta, "unit": budget.unit}
        self._chain.append("budget", body, at)

    def charge(self, charge: Charge, rounds: int, at: float, most: Budget | None = None) -> bool:
        """Charge a release before it is computed; False where this step of its run was charged before, in whatever
        attempt: what is sent then is what left before, or `release` charges it.

        rounds: of the study, which never releases more often than its epsilon was calibrated for. most: what this study
        may spend of the data set, all its runs together, at the delta and per unit of the data set's budget where that
        has one.

        Raises:
            RefusedError: the data set's budget, the study's own epsilon or `most` would be passed. Nothing is charged.
            IntegrityError: the file is not what it was.
            OSError: it cannot be written. Nothing may be computed.
        """
        account = self.accounts().get(charge.data, Account(charge.data))
        same_run = [one for one in account.charges if one.question.run == charge.question.run]
        if charge.release is None and same_run:
            return False
        if any(one.pays(charge) for one in same_run):
            return False
        self._spend(account, charge, rounds, at, most)
        return True

    def release(
        self, charge: Charge, sha256: str, rounds: int, at: float, most: Budget | None = None
    ) -> bool:
        """Note an answer that is about to leave; True where it had to be charged, as all that its step was charged for
        has left as other bytes. (The site lost what it had kept, or was asked for something else under the same names.)
        Nothing is written where these very bytes have left before.

        sha256: hex, of the answer's content. rounds, most: as of `charge`.

        Raises as `charge`; the answer must not leave then.
        """
        account, step = self.accounts().get(charge.data, Account(charge.data)), charge.question.step
        before = account.left.get(step, frozenset())
        if sha256 in before or charge.whole:
            return False
        again = len(before) >= sum(one.question.step == step for one in account.charges)
        if again:
            self._spend(account, charge, rounds, at, most)
        run, round, model = step
        body = {"data": charge.data, "run": run, "round": round, "model": model, "sha256": sha256}
        self._chain.append("answer", body, at)
        return again

    def _spend(self, account: Account, charge: Charge, rounds: int, at: float, most: Budget | None) -> None:
        same_run = [one for one in account.charges if one.question.run == charge.question.run]
        _check(account, charge, sum(rounds if one.whole else 1 for one in same_run), rounds)
        if most is not None:
            _check_study(account, charge, most)
        self._chain.append("unbounded" if charge.release is None else "charge", _body(charge), at)


def _check(account: Account, charge: Charge, before: int, rounds: int) -> None:
    budget = account.budget
    if charge.release is None:
        if budget is not None:
            raise RefusedError(
                f"{OVER}: the study asks for no differential privacy, and the site's data have a budget, which "
                "nothing bounds then"
            )
        return
    if before >= rounds:
        raise RefusedError(
            f"{OVER}: the study's own epsilon is for {rounds} releases, and this site has made them"
        )
    if budget is None:
        return
    after = account.spent(budget.unit, budget.delta, [charge])
    if after.epsilon > budget.epsilon:
        shown = "infinite" if math.isinf(after.epsilon) else f"{after.epsilon:.3f}"
        raise RefusedError(
            f"{OVER}: this round would bring epsilon to {shown} at delta {budget.delta:g} per {budget.unit} "
            f"({after.sampling}), and the site's budget is {budget.epsilon:g}"
        )


def _check_study(account: Account, charge: Charge, most: Budget) -> None:
    """Raises RefusedError where the charge would bring what its study spends of the data set beyond `most`."""
    if charge.release is None:
        raise RefusedError(
            f"{OVER}: the study asks for no differential privacy, and is allowed epsilon {most.epsilon:g} here, which "
            "nothing bounds then"
        )
    site = account.budget or most
    own = tuple(one for one in account.charges if one.study == charge.study)
    after = Account(account.data, own).spent(site.unit, site.delta, [charge])
    if after.epsilon > most.epsilon:
        shown = "infinite" if math.isinf(after.epsilon) else f"{after.epsilon:.3f}"
        raise RefusedError(
            f"{OVER}: this round would bring what the study spends here to epsilon {shown} at delta "
            f"{site.delta:g} per {site.unit}, and it is allowed {most.epsilon:g}"
        )


def charge_of(
    data: str, question: Question, study: str, mechanism: Mechanism | None, epoch: int = 0
) -> Charge:
    """What one round of a study charges; the first one charges all where cohorts are Poisson samples."""
    if mechanism is None:
        return Charge(data, question, study, "record", "none", None)
    if mechanism.sampled:
        release = mechanism.release(mechanism.rounds)
        return Charge(data, question, study, mechanism.unit, mechanism.name, release, True, epoch)
    return Charge(data, question, study, mechanism.unit, mechanism.name, mechanism.release(), False, epoch)


def accounts(entries: Iterable[Entry]) -> dict[str, Account]:
    """Accounts from a ledger's entries.

    Raises:
        IntegrityError: an entry is none of a ledger.
    """
    charges: dict[str, list[Charge]] = {}
    budgets: dict[str, Budget] = {}
    left: dict[str, dict[Step, frozenset[str]]] = {}
    for entry in entries:
        try:
            data = str(entry.body["data"])
            charges.setdefault(data, [])
            if entry.kind == "budget":
                budgets[data] = Budget(entry.body["epsilon"], entry.body["delta"], entry.body["unit"])
            elif entry.kind == "answer":
                step = (str(entry.body["run"]), int(entry.body["round"]), str(entry.body["model"]))
                own = left.setdefault(data, {})
                own[step] = own.get(step, frozenset()) | {str(entry.body["sha256"])}
            elif entry.kind in ("charge", "unbounded"):
                charges[data].append(_charge(entry))
            else:
                raise IntegrityError(
                    f"ledger: entry {entry.sequence} is of a kind that this version does not know"
                )
        except (KeyError, TypeError, InputError) as error:
            raise IntegrityError(f"ledger: entry {entry.sequence} is none of a ledger") from error
    return {
        data: Account(data, tuple(made), budgets.get(data), left.get(data, {}))
        for data, made in charges.items()
    }


def _body(charge: Charge) -> dict[str, Any]:
    question, release = charge.question, charge.release
    body: dict[str, Any] = {
        "data": charge.data, "run": question.run, "round": question.round, "attempt": question.attempt,
        "model": question.model, "study": charge.study, "unit": charge.unit, "mechanism": charge.mechanism,
    }  # fmt: skip
    if release is not None:
        body |= {"noise_multiplier": release.noise_multiplier, "rate": release.rate, "count": release.count}
    if charge.whole:
        body["whole"] = True
    if charge.epoch:
        body["epoch"] = charge.epoch
    return body


def _charge(entry: Entry) -> Charge:
    body = entry.body
    release = None
    if entry.kind == "charge":
        release = Release(body["noise_multiplier"], body["rate"], body["count"])
    question = Question(body["run"], body["round"], body["attempt"], body["model"])
    return Charge(
        body["data"],
        question,
        body["study"],
        body["unit"],
        body["mechanism"],
        release,
        body.get("whole", False),
        body.get("epoch", 0),
    )
