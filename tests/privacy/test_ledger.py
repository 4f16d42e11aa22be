"""A site's ledger: what it refuses, what it adds up, and what it shows of what was done to it."""

import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from consortium.privacy.accounting import Release, Unit, spent
from consortium.privacy.ledger import OVER, Account, Budget, Charge, Ledger, Question, seen_by
from consortium.protocol.errors import InputError, IntegrityError, RefusedError

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
RELEASE = Release(2.0, 0.1, 10)


def ledger(folder: Path, key: Ed25519PrivateKey = KEY) -> Ledger:
    return Ledger(folder / "ledger.jsonl", "ledger lung a", key)


def charge(round: int, run: str = "r.1", data: str = "patients", **fields: object) -> Charge:
    values = {"study": "s" * 64, "unit": "record", "mechanism": "dp-sgd", "release": RELEASE, **fields}
    return Charge(data, Question(run, round, 0, f"model {round}"), **values)  # type: ignore[arg-type]


def test_what_is_charged_is_added_up_over_studies_and_restarts(tmp_path: Path) -> None:
    """Two studies over one data set compose; another data set has an account of its own."""
    book = ledger(tmp_path)
    for run in ("r.1", "q.1"):
        for number in range(1, 4):
            assert book.charge(charge(number, run), 3, 1.0)
    book.charge(charge(1, data="claims"), 3, 1.0)
    accounts = ledger(tmp_path).accounts()
    expected = spent([Release(2.0, 0.1, 60)], 1e-5, "record", "add or remove one")
    assert accounts["patients"].spent("record", 1e-5) == expected
    assert accounts["claims"].spent("record", 1e-5).epsilon < expected.epsilon


def test_the_same_question_costs_nothing_again(tmp_path: Path) -> None:
    """Also after a restart, and in another attempt at the round; another model is another question."""
    book = ledger(tmp_path)
    assert book.charge(charge(1), 5, 1.0)
    assert not book.charge(charge(1), 5, 2.0)
    assert not ledger(tmp_path).charge(charge(1), 5, 3.0)
    again = replace(charge(1), question=Question("r.1", 1, 1, "model 1"))
    assert not book.charge(again, 5, 4.0)
    assert book.head.sequence == 1
    assert book.charge(replace(charge(1), question=Question("r.1", 1, 1, "other")), 5, 5.0)


def test_other_bytes_for_what_was_answered_before_are_charged_before_they_leave(tmp_path: Path) -> None:
    """Never are there more answers out than charges: a site that lost what it had kept pays again, or sends nothing;
    what never left is not paid twice. All of it survives a restart."""
    book, first = ledger(tmp_path), charge(1)
    again = replace(first, question=Question("r.1", 1, 1, "model 1"))
    book.charge(first, 2, 1.0)  # and killed before it was answered
    assert not book.charge(first, 2, 2.0)
    assert not book.release(first, "a" * 64, 2, 3.0)
    assert not book.release(again, "a" * 64, 2, 4.0)  # the same bytes
    book = ledger(tmp_path)
    assert book.release(again, "b" * 64, 2, 5.0)
    assert len(book.accounts()["patients"].charges) == 2
    assert not book.release(first, "a" * 64, 2, 6.0)
    assert not book.release(first, "b" * 64, 2, 6.0)
    head = book.head
    with pytest.raises(RefusedError, match="2 releases"):
        book.release(again, "c" * 64, 2, 7.0)
    book.allow("patients", Budget(0.01, 1e-5, "record"), 8.0)
    with pytest.raises(RefusedError, match="budget is"):
        book.release(again, "d" * 64, 9, 9.0)
    assert book.head.sequence == head.sequence + 1
    assert book.verify() == book.head


def test_a_server_that_was_restored_pays_anew_for_what_it_noises_anew(tmp_path: Path) -> None:
    """It has published the round before, and does not know it: the same bytes under other noise are a second release. A
    site that adds the noise itself sends what left already, or charges other bytes as ever. No study is asked for more
    rounds than its epsilon is for, a run of secret cohorts, which is charged whole, not twice."""
    book = ledger(tmp_path)
    central: dict[str, Any] = {"unit": "site", "mechanism": "central-gaussian", "release": Release(2.0)}
    one = charge(1, **central)
    assert book.charge(one, 3, 1.0)
    assert not book.release(one, "a" * 64, 3, 1.0)
    restored = replace(one, epoch=7)
    assert book.charge(restored, 3, 2.0)
    assert not book.charge(restored, 3, 2.0)
    assert not book.release(restored, "a" * 64, 3, 2.0)
    assert ledger(tmp_path).accounts()["patients"].charges == (one, restored)
    assert book.charge(charge(2, epoch=7, **central), 3, 3.0)
    with pytest.raises(RefusedError, match="3 releases"):
        book.charge(charge(3, epoch=7, **central), 3, 4.0)
    local = charge(1, "local.1")
    assert book.charge(local, 3, 5.0)
    assert not book.charge(replace(local, epoch=7), 3, 6.0)
    secret = charge(1, "secret.1", **central | {"whole": True, "release": Release(2.0, 0.5, 3)})
    assert book.charge(secret, 3, 7.0)
    assert not book.charge(replace(charge(2, "secret.1", **central), whole=True), 3, 7.0)
    with pytest.raises(RefusedError, match="3 releases"):
        book.charge(replace(secret, epoch=7), 3, 8.0)


def test_a_budget_is_checked_before_anything_is_charged(tmp_path: Path) -> None:
    """The round that would pass it is refused, with the figures; what fits is not, and a later budget counts."""
    book = ledger(tmp_path)
    two = spent([Release(2.0, 0.1, 20)], 1e-5, "record", "add or remove one").epsilon
    book.allow("patients", Budget(two + 1e-6, 1e-5, "record"), 0.0)
    assert book.charge(charge(1), 9, 1.0)
    assert book.charge(charge(2), 9, 1.0)
    head = book.head
    with pytest.raises(RefusedError, match=r"privacy budget: .* at delta 1e-05 per record"):
        book.charge(charge(3), 9, 1.0)
    assert book.head == head
    assert not book.charge(charge(2), 9, 1.0)  # what was charged may still be sent again
    book.allow("patients", Budget(9.0, 1e-5, "record"), 2.0)
    assert book.charge(charge(3), 9, 3.0)


def test_a_budget_that_cannot_pay_one_round_refuses_the_first(tmp_path: Path) -> None:
    """Nothing is charged."""
    book = ledger(tmp_path)
    book.allow("patients", Budget(0.01, 1e-5, "record"), 0.0)
    with pytest.raises(RefusedError, match=r"budget is 0\.01"):
        book.charge(charge(1), 9, 1.0)
    assert book.accounts()["patients"].charges == ()


def test_a_study_never_releases_more_often_than_its_epsilon_is_for(tmp_path: Path) -> None:
    """Rounds that are asked again count; without a budget too."""
    book = ledger(tmp_path)
    for number in range(1, 4):
        book.charge(charge(number), 3, 1.0)
    with pytest.raises(RefusedError, match="3 releases"):
        book.charge(charge(4), 3, 1.0)
    assert book.charge(charge(4, "r.2"), 3, 1.0)


def test_a_run_without_a_mechanism_marks_its_data_unbounded(tmp_path: Path) -> None:
    """Once a run; every figure is infinite from then on; data with a budget refuse it."""
    book = ledger(tmp_path)
    none = charge(1, mechanism="none", release=None)
    assert book.charge(none, 3, 1.0)
    assert not book.charge(charge(2, mechanism="none", release=None), 3, 1.0)
    account = book.accounts()["patients"]
    assert account.unbounded == ("r.1",)
    assert math.isinf(account.spent("record", 1e-5).epsilon)
    book.allow("claims", Budget(3.0, 1e-5, "record"), 1.0)
    with pytest.raises(RefusedError, match="no differential privacy"):
        book.charge(charge(1, data="claims", mechanism="none", release=None), 3, 1.0)


@pytest.mark.parametrize(
    ("unit", "mechanism", "asked", "expected"),
    [
        ("record", "dp-sgd", "record", RELEASE),
        ("record", "dp-sgd", "person", Release(0.0)),
        ("person", "dp-sgd", "record", Release(1.0, 1.0, 10)),
        ("person", "dp-sgd", "person", RELEASE),
        ("person", "dp-sgd", "site", Release(0.0)),
        ("site", "central-gaussian", "site", Release(1.0, 1.0, 10)),
        ("site", "central-gaussian", "record", Release(1.0, 1.0, 10)),
        ("site", "local-gaussian", "site", RELEASE),
        ("site", "local-gaussian", "person", Release(2.0, 1.0, 10)),
    ],
)
def test_what_a_charge_means_for_another_unit(
    unit: Unit, mechanism: str, asked: Unit, expected: Release
) -> None:
    """Nothing is bounded for a larger unit; for a smaller one the unit around it is replaced, and not sampled."""
    assert seen_by(asked, charge(1, unit=unit, mechanism=mechanism)) == expected


def test_a_budget_by_person_refuses_studies_by_record(tmp_path: Path) -> None:
    """A person may have every record."""
    book = ledger(tmp_path)
    book.allow("patients", Budget(100.0, 1e-5, "person"), 0.0)
    with pytest.raises(RefusedError, match="infinite"):
        book.charge(charge(1), 9, 1.0)


@pytest.mark.parametrize("values", [(0.0, 1e-5), (math.inf, 1e-5), (math.nan, 1e-5), (1.0, 0.0), (1.0, 1.0)])
def test_a_budget_out_of_range_is_refused(values: tuple[float, float]) -> None:
    """Epsilon or delta."""
    with pytest.raises(InputError, match="would be right"):
        Budget(*values, "record")


def test_a_clock_set_back_changes_nothing(tmp_path: Path) -> None:
    """Budgets know no time: entries in any order of clocks add up to the same."""
    book = ledger(tmp_path)
    for number, at in enumerate((100.0, 5.0, 0.0), 1):
        book.charge(charge(number), 9, at)
    assert (
        book.accounts()["patients"].spent("record", 1e-5).epsilon
        == Account("patients", tuple(charge(n) for n in (1, 2, 3))).spent("record", 1e-5).epsilon
    )
    book.verify()


def test_a_thousand_edits_and_roll_backs_are_found(tmp_path: Path) -> None:
    """Any byte changed, any line taken out, any older copy, any history that the key's own holder writes anew."""
    book = ledger(tmp_path)
    copies = [b""]
    for number in range(1, 13):
        book.charge(charge(number), 99, float(number))
        copies.append(book.path.read_bytes())
    witnessed = [book.head]
    whole, rng = copies[-1], random.Random(5)
    lines = whole.splitlines(keepends=True)
    for attempt in range(1000):
        kind = attempt % 4
        if kind == 0:
            place = rng.randrange(len(whole) - 1)
            changed = whole[:place] + bytes([whole[place] ^ (1 << rng.randrange(8))]) + whole[place + 1 :]
        elif kind == 1:
            gone = rng.randrange(len(lines))
            changed = b"".join(line for number, line in enumerate(lines) if number != gone)
        elif kind == 2:
            changed = copies[rng.randrange(len(copies) - 1)]
        else:
            keep = rng.randrange(len(copies) - 1)
            other = tmp_path / "other"
            other.mkdir(exist_ok=True)
            (other / "ledger.jsonl").write_bytes(copies[keep])
            forged = ledger(other)
            for number in range(keep + 1, 13 + rng.randrange(3)):
                forged.charge(charge(number, release=Release(1000.0, 0.001, 1)), 99, float(number))
            changed = forged.path.read_bytes()
        book.path.write_bytes(changed)
        with pytest.raises(IntegrityError) as found:
            ledger(tmp_path).verify(witnessed)
        assert found.value.exit_code == 4
    book.path.write_bytes(whole)
    ledger(tmp_path).verify(witnessed)


def test_an_entry_of_another_version_stops_everything(tmp_path: Path) -> None:
    """What cannot be understood may be spent, so nothing is added up without it."""
    book = ledger(tmp_path)
    book._chain.append("surprise", {"data": "patients"}, 1.0)
    with pytest.raises(IntegrityError, match="does not know"):
        book.accounts()


def test_what_one_study_may_spend_is_counted_over_its_runs_and_apart_from_others(tmp_path: Path) -> None:
    """At the data set's own delta and unit where it has a budget; a study without a mechanism is bounded by nothing."""
    book, one = ledger(tmp_path), charge(1)
    alone = Account("patients").spent("record", 1e-5, [one]).epsilon
    twice = Account("patients", (one,)).spent("record", 1e-5, [one]).epsilon
    most = Budget((alone + twice) / 2, 1e-5, "record")
    assert book.charge(replace(charge(1, "other.run"), study="another"), 9, 1.0)
    assert book.charge(one, 9, 1.0, most)
    assert not book.charge(one, 9, 1.0, most), "the same question costs nothing"
    with pytest.raises(RefusedError, match="what the study spends here to epsilon") as error:
        book.charge(charge(1, "another.run"), 9, 1.0, most)
    assert (error.value.exit_code, str(error.value).startswith(OVER)) == (3, True)
    assert len(book.accounts()["patients"].charges) == 2, "nothing is charged"
    book.allow("patients", Budget(100.0, 1e-12, "record"), 1.0)
    with pytest.raises(RefusedError, match="at delta 1e-12"):
        book.charge(charge(2, "third.run"), 9, 1.0, replace(most, epsilon=twice))
    with pytest.raises(RefusedError, match="nothing bounds"):
        book.charge(
            replace(one, question=Question("free.run", 1, 0, "m"), release=None, data="free"), 9, 1.0, most
        )
