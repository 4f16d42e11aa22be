"""The round loop against scripted sites: what may be lost, reordered, repeated, late or false never decides a run."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted import Script, Scripted, honest, silent

from consortium.protocol import Layout, Study
from consortium.protocol.layout import Array, Segment, Vector, digest_of
from consortium.protocol.messages import Answer, Instruction, Payload
from consortium.server.coordinator import run
from consortium.server.records import Evaluation, InMemory, Outcome, Plan, Round, RunState
from consortium.server.tally import variate_shares
from consortium.strategies.base import Strategy
from consortium.strategies.named import fedavg, fedmedian, krum, scaffold

STUDY = Study.parse(
    'format = 1\n[study]\nname = "s"\ntask = "task:T"\nrounds = 3\n[cohort]\nmin_sites = 2\ndeadline = "5s"\n'
    'max_weight = 100\n[evaluation]\nmetric = "accuracy"\n'
)
LAYOUT = Layout((Segment("shared", "float32", (Array("w", (3,)),)),))


def plan(strategy: Strategy | None = None, study: Study = STUDY, prepares: bool = False) -> Plan:
    return Plan(study, strategy or fedavg(), LAYOUT, np.zeros(3, np.float32), prepares=prepares)


def play(clients: Scripted, the_plan: Plan | None = None, commits: InMemory | None = None) -> Outcome:
    return run(the_plan or plan(), clients, commits or InMemory(), clock=clients.clock, rng=random.Random(1))


def changed(script: Script, change: Callable[[Answer], Answer | list[Answer]], kind: str = "train") -> Script:
    """A site that spoils its answers of one kind."""

    def answer(instruction: Instruction) -> list[Answer]:
        out: list[Answer] = []
        for one in script(instruction):
            result = change(one) if instruction.kind == kind else one
            out += result if isinstance(result, list) else [result]
        return out

    return answer


def vector(update: object) -> Callable[[Answer], Answer]:
    return lambda answer: replace(answer, payload=Payload({"shared": update}))  # type: ignore[dict-item]


def vectors(given: object) -> Callable[[Answer], Answer]:
    return lambda answer: replace(answer, payload=Payload(given))  # type: ignore[arg-type]


def test_a_run_of_honest_sites_is_the_weighted_mean_each_round() -> None:
    """Three rounds of +1 and +4 with weights 20 and 10 move the model by 2 each; the final model is evaluated."""
    clients = Scripted({"a": honest(1.0, 20.0), "b": honest(4.0, 10.0)})
    told: list[Round | Evaluation] = []
    commits = InMemory()
    outcome = run(plan(), clients, commits, clock=clients.clock, rng=random.Random(1), report=told.append)
    assert outcome.status == "finished"
    assert outcome.model.tolist() == [6.0, 6.0, 6.0]
    assert [instruction.kind for instruction, _ in clients.asked] == ["train", "train", "train", "evaluate"]
    assert outcome.evaluation is not None
    assert outcome.evaluation.model == digest_of([outcome.model]) == outcome.digest
    assert outcome.evaluation.pooled == {"accuracy": 0.25, "n": 20.0}
    assert outcome.evaluation.sites["b"]["accuracy"] == 0.4
    # Each model is judged by the answers to the next instruction, under its own digest, the first model too.
    assert [e.round for e in outcome.state.evaluations] == [0, 1, 2, 3]
    assert [e.model for e in outcome.state.evaluations] == [i.model for i, _ in clients.asked]
    assert told == [
        x for e, r in zip(outcome.state.evaluations, outcome.state.rounds, strict=False) for x in (e, r)
    ] + [outcome.state.evaluations[-1]]
    assert commits.load() == outcome.state


@given(st.permutations(range(5)), st.integers(0, 2**32 - 1))
def test_order_of_answers_never_changes_a_bit(order: list[int], seed: int) -> None:
    """Sites answer in any order with updates of very different size; the model has the same bytes."""
    rng = np.random.default_rng(seed)
    updates = {
        name: (rng.normal(size=3) * 10.0 ** rng.integers(-4, 5)).astype(np.float32) for name in "abcde"
    }
    scripts = {n: changed(honest(1.0, 1.0 + i), vector(updates[n])) for i, n in enumerate("abcde")}
    straight = play(Scripted(scripts)).model
    shuffled = play(Scripted(scripts, order=lambda answers: [answers[i] for i in order])).model
    assert straight.tobytes() == shuffled.tobytes()


FAULTS: dict[str, tuple[Script, str]] = {
    "silent": (silent, "no answer before the deadline"),
    "NaN": (changed(honest(1.0), vector(np.array([1, np.nan, 1], np.float32))), "not finite"),
    "infinite": (changed(honest(1.0), vector(np.array([1, np.inf, 1], np.float32))), "not finite"),
    "overflowing": (changed(honest(1.0), vector(np.full(3, 3e38, np.float32))), "too large to compute with"),
    "shape": (changed(honest(1.0), vector(np.ones(4, np.float32))), "shape (4,), the layout says (3,)"),
    "broadcastable": (changed(honest(1.0), vector(np.ones((1, 3), np.float32))), "shape (1, 3)"),
    "scalar": (changed(honest(1.0), vector(np.float32(1.0).reshape(()))), "shape ()"),
    "dtype": (changed(honest(1.0), vector(np.ones(3, np.float64))), "dtype float64"),
    "integers": (changed(honest(1.0), vector(np.ones(3, np.int32))), "dtype int32"),
    "no vector": (changed(honest(1.0), lambda a: replace(a, payload=Payload())), "sends the vectors []"),
    "extra vector": (
        changed(
            honest(1.0), lambda a: replace(a, payload=Payload({**a.payload.vectors, "local": np.ones(3)}))
        ),
        "'local'",
    ),
    "undeclared statistics": (
        changed(honest(1.0), lambda a: replace(a, payload=replace(a.payload, statistics={"x": np.ones(1)}))),
        "does not declare",
    ),
    "undeclared bytes": (
        changed(honest(1.0), lambda a: replace(a, payload=replace(a.payload, opaque=b"x"))),
        "does not declare",
    ),
    "1e12 examples": (honest(1.0, weight=1e12), "above the study's cohort.max_weight, 100"),
    "negative weight": (honest(1.0, weight=-1.0), "not a positive number"),
    "zero weight": (honest(1.0, weight=0.0), "not a positive number"),
    "NaN weight": (honest(1.0, weight=float("nan")), "not a positive number"),
    "twice": (changed(honest(1.0), lambda a: [a, a]), "answered twice"),
    "declined": (
        changed(honest(1.0), lambda a: replace(a, status="declined", reason="budget\nspent")),
        "declined: budget?spent",
    ),
    "another run": (changed(honest(1.0), lambda a: replace(a, run="old")), "another run"),
    "old round": (changed(honest(1.0), lambda a: replace(a, round=a.round - 1)), "late: answers round"),
    "old attempt": (changed(honest(1.0), lambda a: replace(a, attempt=a.attempt + 1)), "late: answers round"),
    "wrong nonce": (changed(honest(1.0), lambda a: replace(a, nonce="0" * 64)), "nonce"),
    "wrong model": (changed(honest(1.0), lambda a: replace(a, model="0" * 64)), "another question"),
    "wrong kind": (changed(honest(1.0), lambda a: replace(a, kind="query")), "another question"),
    "bad metric": (
        changed(honest(1.0), lambda a: replace(a, metrics={"x": np.array([np.nan, 1.0])})),
        "metric 'x'",
    ),
    "huge metric": (
        changed(honest(1.0), lambda a: replace(a, metrics={"x": np.array([1.0, 1e9])})),
        "counts more",
    ),
    "weight next to zero": (honest(1.0, weight=1e-300), "not a positive number"),
    "4000 long names": (
        changed(honest(1.0), vectors({f"v{i}".ljust(200, "x"): np.ones(1) for i in range(4000)})),
        "sends the vectors",
    ),
    "round of 4000 digits": (
        changed(honest(1.0), lambda a: replace(a, round=10**4000)),
        "late: answers round 1000",
    ),
}

MALFORMED: dict[str, list[Vector]] = {
    "auroc": [np.ones(3), np.ones((3, 5)), np.ones(2), np.array(1.0), np.ones((2, 0)), np.ones((2, 3, 4))],
    "auroc_exact": [np.array(1.0), np.ones(5), np.ones((5, 1)), np.ones((5, 2, 2))],
    "mine_exact": [np.array(1.0)],
    "confusion": [np.ones((2, 3)), np.array(1.0), np.ones(4)],
    "accuracy": [np.ones(3), np.ones((2, 2)), np.array([-1.0, 10.0]), np.array([11.0, 10.0])],
    "brier": [np.array([-1.0, 10.0]), np.array([21.0, 10.0])],
    "rmse": [np.ones(0), np.array([-1.0, 10.0])],
    "log_loss": [np.array([-1.0, 10.0])],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_site_is_left_out_and_named_and_moves_nothing(fault: str) -> None:
    """Whatever one site sends, the model is the honest sites' model to the bit, and the site is named with why."""
    script, reason = FAULTS[fault]
    clean = play(Scripted({"a": honest(1.0), "c": honest(2.0)}))
    outcome = play(Scripted({"a": honest(1.0), "b": script, "c": honest(2.0)}))
    assert outcome.status == "finished"
    assert outcome.model.tobytes() == clean.model.tobytes()
    for record in outcome.state.rounds:
        assert list(record.admitted) == ["a", "c"]
        assert list(record.left_out) == ["b"]
        assert reason in record.left_out["b"]
        assert len(record.left_out["b"]) < 300


@pytest.mark.parametrize("name", MALFORMED)
def test_counts_that_no_metric_has_cost_only_their_site(name: str) -> None:
    """Counts under a known name in a shape or of a size that it cannot have are refused, also where they are the
    first or the only ones: they never reach the arithmetic."""
    for counts in MALFORMED[name]:
        bad = changed(honest(1.0), lambda a, m={name: counts}: replace(a, metrics=m))  # type: ignore[misc]
        alone = changed(honest(1.0), lambda a: replace(a, metrics={}))
        outcome = play(Scripted({"a": bad, "b": alone, "c": alone}))
        assert outcome.status == "finished"
        for record in outcome.state.rounds:
            assert list(record.left_out) == ["a"]
            assert f"metric '{name}'" in record.left_out["a"]


def test_an_answer_in_another_sites_name_does_not_count() -> None:
    """A site that answers as its neighbour does not know the neighbour's nonce: the true answer still counts."""

    def forger(instruction: Instruction) -> list[Answer]:
        own = honest(9.0)(instruction)
        return [*own, *[replace(answer, site="a") for answer in own]]

    outcome = play(Scripted({"a": honest(1.0), "b": forger, "c": honest(2.0)}, order=lambda xs: xs[::-1]))
    assert set(outcome.state.rounds[0].admitted) == {"a", "b", "c"}
    assert outcome.state.rounds[0].left_out == {}
    assert outcome.model.tolist() == [12.0, 12.0, 12.0]


def test_a_late_answer_does_not_cost_the_site_its_timely_one() -> None:
    """Last round's answer arrives with this round's: the stale one is ignored, the right one counts."""
    kept: list[Answer] = []

    def late(instruction: Instruction) -> list[Answer]:
        now = honest(1.0)(instruction)
        stale = list(kept)
        kept[:] = now
        return [*stale, *now]

    outcome = play(Scripted({"a": honest(1.0), "b": late}))
    assert all(set(record.admitted) == {"a", "b"} for record in outcome.state.rounds)


def test_fewer_than_min_sites_void_the_round_and_the_model_does_not_move() -> None:
    """One of two sites is silent in round 2's first attempt: void, tried again under the next attempt, then fine."""
    calls = []

    def flaky(instruction: Instruction) -> list[Answer]:
        calls.append((instruction.round, instruction.attempt))
        return [] if calls[-1] == (2, 0) else honest(3.0)(instruction)

    outcome = play(Scripted({"a": honest(1.0), "b": flaky}))
    assert outcome.status == "finished"
    records = outcome.state.rounds
    assert [(r.round, r.attempt, bool(r.void)) for r in records] == [
        (1, 0, False), (2, 0, True), (2, 1, False), (3, 0, False),
    ]  # fmt: skip
    assert records[1].model == records[0].model
    assert "1 of 2 sites" in records[1].void
    assert "at least 2" in records[1].void


def test_three_void_attempts_make_the_run_wait_and_say_for_whom() -> None:
    """After three voids the loop waits for the missing; if they can come, it goes on with fresh attempts."""
    back: list[bool] = []
    clients = Scripted({"a": honest(1.0), "b": lambda i: honest(3.0)(i) if back else []})

    def more() -> bool:
        back.append(True)
        return True

    clients.more = more
    outcome = play(clients)
    assert outcome.status == "finished"
    assert clients.waited == [("b",)]
    assert [r.attempt for r in outcome.state.rounds] == [0, 1, 2, 3, 0, 0]


def test_a_run_that_never_had_a_quorum_is_failed_and_keeps_its_first_model() -> None:
    """Nothing was ever committed: failed, with the reason, and no final evaluation is asked for."""
    clients = Scripted({"a": honest(1.0), "b": silent})
    outcome = play(clients)
    assert (outcome.status, outcome.evaluation) == ("failed", None)
    assert "round 1: 1 of 2 sites" in outcome.why
    assert outcome.model.tolist() == [0, 0, 0]
    assert {instruction.kind for instruction, _ in clients.asked} == {"train"}


def test_no_sites_at_all_is_failed_not_a_crash() -> None:
    """Nobody is connected: nobody is asked, three attempts are void, the run says so."""
    clients = Scripted({})
    assert play(clients).status == "failed"
    assert clients.asked == []


def test_losing_the_quorum_later_keeps_the_last_good_model() -> None:
    """Two rounds went well, then a site is gone for good: finished early, with the model of round 2, evaluated."""

    def dies(instruction: Instruction) -> list[Answer]:
        return [] if instruction.round > 2 else honest(1.0)(instruction)

    outcome = play(Scripted({"a": honest(1.0), "b": dies}))
    assert outcome.status == "finished early"
    assert outcome.model.tolist() == [2, 2, 2]
    assert outcome.state.round == 2
    assert outcome.evaluation is not None
    assert outcome.evaluation.round == 2


def test_a_robust_rule_below_its_minimum_voids_the_round() -> None:
    """Krum with one liar wants five updates: with four the round is void although min_sites is met."""
    clients = Scripted({name: honest(1.0) for name in "abcd"})
    outcome = play(clients, plan(krum(byzantine=1)))
    assert outcome.status == "failed"
    assert "at least 5" in outcome.why


def test_robust_rules_reduce_what_was_admitted() -> None:
    """The median of 1, 2 and a lie of 1e6 is 2, each round."""
    clients = Scripted({"a": honest(1.0), "b": honest(2.0), "c": honest(1e6 / 1e6)})
    clients.scripts["c"] = changed(honest(1.0), vector(np.full(3, 1e6, np.float32)))
    assert play(clients, plan(fedmedian())).model.tolist() == [6, 6, 6]


def test_a_run_continues_from_its_last_commit() -> None:
    """Killed after round 1 and started again on the same commits: the same model as without the stop."""

    class KilledError(Exception):
        pass

    class Dies(InMemory):
        def commit(self, state: RunState) -> RunState:
            super().commit(state)
            if state.round == 1:
                raise KilledError
            return state

    scripts = {"a": honest(1.0), "b": honest(3.0)}
    commits = Dies()
    with pytest.raises(KilledError):
        play(Scripted(scripts), commits=commits)
    again = InMemory()
    kept = commits.load()
    assert kept is not None
    again.commit(kept)
    clients = Scripted(scripts)
    outcome = play(clients, commits=again)
    assert outcome.model.tobytes() == play(Scripted(scripts)).model.tobytes()
    assert clients.asked[0][0].round == 2


def test_best_selects_the_best_evaluated_model_and_last_the_last() -> None:
    """Accuracy rises to round 2 and falls: `best` returns round 2's model with its own evaluation."""
    scores = {0: 1.0, 1: 4.0, 2: 9.0, 3: 5.0}

    def site(instruction: Instruction) -> list[Answer]:
        judged = instruction.round - (instruction.kind == "train")
        counts = {"accuracy": np.array([scores[judged], 10.0])}
        return [replace(answer, metrics=counts) for answer in honest(1.0)(instruction)]

    best = play(Scripted({"a": site, "b": site}), plan(study=STUDY.with_(evaluation={"select": "best"})))
    assert best.evaluation is not None
    assert (best.evaluation.round, best.evaluation.pooled["accuracy"]) == (2, 0.9)
    assert best.model.tolist() == [2, 2, 2]
    assert best.digest == digest_of([best.model])
    last = play(Scripted({"a": site, "b": site}))
    assert last.model.tolist() == [3, 3, 3]


def test_statistics_are_summed_once_before_round_one_and_sent_with_every_instruction() -> None:
    """Tasks that prepare: one query of all sites first; a site with other shapes is left out and named."""
    odd = changed(
        honest(1.0), lambda a: replace(a, payload=Payload(statistics={"n": np.ones(2)})), kind="query"
    )
    clients = Scripted({"a": honest(1.0, 3.0), "b": honest(1.0, 4.0), "c": odd})
    outcome = play(clients, plan(prepares=True))
    assert [i.kind for i, _ in clients.asked] == ["query", "train", "train", "train", "evaluate"]
    assert all(i.payload.statistics["n"].tolist() == [7.0] for i, _ in clients.asked[1:])
    assert "other names or shapes" in outcome.state.rounds[0].left_out["c"]
    assert outcome.state.rounds[0].round == 0


def test_scaffolds_control_stays_the_mean_of_what_sites_keep() -> None:
    """c += |S|/N * mean for uniform weights; with weights, and sites that drop or come late, c W = sum of w_i c_i."""

    def round_of(number: int, unseen: int, **weights: float) -> Round:
        return Round(number, 0, tuple(weights), weights, {}, "", 0.0, unseen=unseen)

    first, second = round_of(1, 4, a=1.0, b=3.0, c=4.0), round_of(2, 1, a=1.0, c=4.0)
    all_seen = round_of(2, 0, a=1.0, c=4.0)
    uniform, weighted = fedavg(weighted=False).reducer, fedavg().reducer
    assert variate_shares(uniform, [first]) == (1.0, 3 / 4)
    assert variate_shares(uniform, [first, second]) == (1.0, 2 / 4)
    assert variate_shares(weighted, [first, all_seen]) == (1.0, 5 / 8)
    variates = {"a": 2.0, "b": -1.0, "c": 0.5}
    control = 0.0
    for rounds in ([first], [first, second], [first, second, round_of(3, 1, d=2.0, b=3.0)]):
        admitted = rounds[-1].admitted
        changes = {site: 0.1 * (i + 1) for i, site in enumerate(admitted)}
        if len(rounds) == 1:
            changes = {site: variates[site] for site in admitted}
            variates = dict.fromkeys(variates, 0.0)
        mean = sum(admitted[s] * changes[s] for s in admitted) / sum(admitted.values())
        kept, share = variate_shares(weighted, rounds)
        control = kept * control + share * mean
        variates = {s: variates.get(s, 0.0) + changes.get(s, 0.0) for s in {*variates, *admitted}}
        last = {s: w for r in rounds for s, w in r.admitted.items()}
        whole = sum(last.values()) * (
            1 if "d" in last else 4 / 3
        )  # d's weight is the mean one until it is known
        assert control == pytest.approx(sum(last[s] * variates[s] for s in last) / whole)


def test_sites_learn_whether_their_last_answer_counted() -> None:
    """The next instruction names, to each site, the last round in which it was admitted."""
    seen: dict[str, list[int]] = {"a": [], "b": []}

    def watch(name: str, script: Script) -> Script:
        def answer(instruction: Instruction) -> list[Answer]:
            seen[name].append(instruction.admitted)
            return script(instruction)

        return answer

    lost = changed(honest(1.0), lambda a: [] if a.round == 2 else [a])
    play(Scripted({"a": watch("a", honest(1.0)), "b": watch("b", lost), "c": honest(1.0)}))
    assert seen == {"a": [0, 1, 2, 3], "b": [0, 1, 1, 3]}


def test_metrics_of_odd_shape_cost_only_that_sites_metrics() -> None:
    """A site whose own metric has another shape than most is not pooled; the run and the others' metrics go on."""

    def with_shares(shape: tuple[int, ...]) -> Callable[[Answer], Answer]:
        return lambda a: replace(a, metrics={**a.metrics, "shares": np.ones(shape)})

    odd, usual = changed(honest(1.0), with_shares((2, 2))), with_shares((3,))
    outcome = play(
        Scripted({"a": odd, "b": changed(honest(1.0), usual), "c": changed(honest(3.0), usual)}),
    )
    assert outcome.status == "finished"
    assert outcome.state.evaluations[0].pooled["accuracy"] == 0.2
    assert set(outcome.state.evaluations[0].sites) == {"b", "c"}


def test_a_void_attempt_does_not_judge_the_model() -> None:
    """One site of three answers round 2's first attempt: what it says of the model is not the record, the next
    attempt's three are."""

    def flaky(instruction: Instruction) -> list[Answer]:
        return [] if (instruction.round, instruction.attempt) == (2, 0) else honest(3.0)(instruction)

    outcome = play(Scripted({"a": honest(9.0), "b": flaky, "c": flaky}))
    assert [(e.round, sorted(e.sites)) for e in outcome.state.evaluations] == [
        (r, ["a", "b", "c"]) for r in range(4)
    ]


def test_fewer_than_min_sites_do_not_choose_the_best_model() -> None:
    """The final evaluation comes from one site alone: it is recorded, but `best` stays what a quorum said."""

    def leaves(instruction: Instruction) -> list[Answer]:
        return [] if instruction.kind == "evaluate" else honest(1.0)(instruction)

    def praises(instruction: Instruction) -> list[Answer]:
        counts = {"accuracy": np.array([10.0 if instruction.kind == "evaluate" else 1.0, 10.0])}
        return [replace(answer, metrics=counts) for answer in honest(1.0)(instruction)]

    outcome = play(
        Scripted({"a": praises, "b": leaves}), plan(study=STUDY.with_(evaluation={"select": "best"}))
    )
    assert outcome.state.evaluations[-1].pooled["accuracy"] == 1.0
    assert outcome.evaluation is not None
    assert (outcome.evaluation.round, outcome.model.tolist()) == (1, [1, 1, 1])


def test_statistics_too_large_to_add_cost_only_their_site() -> None:
    """Finite statistics whose sum would overflow are refused, so no site can make the federation's sums infinite."""
    huge = changed(
        honest(1.0),
        lambda a: replace(a, payload=Payload(statistics={"n": np.array([1.7e308])})),
        kind="query",
    )
    outcome = play(Scripted({"a": huge, "b": huge, "c": honest(1.0), "d": honest(1.0)}), plan(prepares=True))
    assert outcome.status == "finished"
    assert outcome.state.statistics["n"].tolist() == [20.0]
    assert "counts more than cohort.max_weight" in outcome.state.rounds[0].left_out["a"]


def test_the_run_waits_for_sites_that_counted_and_are_gone() -> None:
    """A site that is no longer at hand is not asked, so it is not left out; the run waits for it all the same."""

    def leaves(instruction: Instruction) -> list[Answer]:
        del clients.scripts["b"]
        return honest(1.0)(instruction)

    clients = Scripted({"a": honest(1.0), "b": leaves})
    assert play(clients).status == "finished early"
    assert clients.waited == [("b",)]


def test_scaffold_counts_sites_that_are_not_at_hand() -> None:
    """c moves by |S|/N of the mean change (arXiv 1910.06378), N all sites that ever counted, not those of now."""
    layout = Layout((LAYOUT["shared"], Segment("control", "float32", (Array("w", (3,)),))))
    ones = np.ones(3, np.float32)

    def site(instruction: Instruction) -> list[Answer]:
        if (instruction.site, instruction.round) == ("d", 2):
            del clients.scripts["d"]
        both = Payload({"shared": ones, "control": ones})
        return [replace(a, payload=both) if a.kind == "train" else a for a in honest(1.0)(instruction)]

    clients = Scripted(dict.fromkeys("abcd", site))
    outcome = play(clients, Plan(STUDY, scaffold(), layout, np.zeros(3, np.float32)))
    assert outcome.state.control is not None
    assert outcome.state.control.tolist() == [2.75, 2.75, 2.75]
