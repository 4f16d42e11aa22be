"""Runs in real processes: to the end, through kills, pauses and lies, and what is left of them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from sites import World, first_model, study_of, tables, world

from consortium.protocol.errors import InputError, RefusedError
from consortium.protocol.files import private_folder
from consortium.protocol.layout import digest_of
from consortium.protocol.messages import Instruction
from consortium.protocol.study import Study
from consortium.server import plans, running
from consortium.server.child import COMMAND
from consortium.server.model import load_model
from consortium.simulations import simulate

SUPPORT = Path(__file__).parents[1] / "support"
QUICK = (sys.executable, "-s", "-P", "-B", str(SUPPORT / "run_quickly.py"))
STUDY = study_of(study={"rounds": 4})
NAME = "breast-cancer"
RUN = f"{NAME}.1"


@cache
def simulated(study_text: str) -> bytes:
    outcome = simulate(Study.parse(study_text), sites=tables(), processes=0).outcome
    assert outcome.status == "finished"
    return outcome.model.tobytes()


def ends_as_simulated(one: World, run: str = RUN) -> None:
    assert one.until(run, "finished", "failed", "finished early", "stopped") == ("finished", "")
    assert one.model(run).tobytes() == simulated(one.study.text)


@pytest.fixture
def quick(tmp_path: Path) -> Iterator[World]:
    with world(tmp_path, STUDY, QUICK) as one:
        yield one


def lives(pid: int) -> bool:
    """Whether a process is there that has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def dies(pid: int, seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while lives(pid) and time.monotonic() < end:
        time.sleep(0.01)
    return not lives(pid)


def process_of(one: World, run: str = RUN) -> int:
    end = time.monotonic() + 20
    while time.monotonic() < end:
        pid = one.runs.process(run)
        if pid is not None:
            return pid
        time.sleep(0.005)
    raise AssertionError("no process")


# To the end


@pytest.mark.parametrize("strategy", ["fedavg", "fedadam", "fedmedian"])
def test_a_run_ends_with_the_bits_of_a_simulation(strategy: str, tmp_path: Path) -> None:
    """Same study, same rows: the same model, bit for bit, and a record of every round and evaluation."""
    study = study_of(study={"rounds": 3}, strategy={"name": strategy})
    with world(tmp_path, study, QUICK) as one:
        one.sites.join()
        run = one.start()
        ends_as_simulated(one, run)
        events = one.runs.events(run, 0, 0)["events"]
        kinds = [event["kind"] for event in events]
        assert [e["round"] for e in events if e["kind"] == "round"] == [0, 1, 2, 3]
        assert [e["round"] for e in events if e["kind"] == "evaluation"] == [0, 1, 2, 3]
        assert (kinds[0], kinds[-1]) == ("state", "state")
        result = json.loads((tmp_path / "runs" / run / "result.json").read_text())
        assert digest_of([one.model(run)]) == result["model"]
        told = [{k: v for k, v in e.items() if k not in ("id", "at")} for e in events if e["kind"] != "state"]
        assert [one for one in told if one["kind"] == "round"] == result["rounds"]
        assert [one for one in told if one["kind"] == "evaluation"] == result["evaluations"]
        lines = (tmp_path / "runs" / run / "rounds.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == told
        shown = one.runs.show(NAME)
        assert (shown["state"], shown["round"], shown["rounds"]) == ("finished", 3, 3)
        assert (shown["sites"]["a"]["last_round"], shown["sites"]["a"]["last_error"]) == (3, None)
        assert shown["evaluation"] == result["evaluation"]
        last = result["rounds"][-1]
        assert {site: len(sha256) for site, sha256 in last["updates"].items()} == dict.fromkeys(
            last["admitted"], 64
        )
        about = {name: last[name] for name in ("round", "model", "updates")}
        assert shown["last_round"] == about


@pytest.mark.slow
def test_a_run_makes_its_first_model_and_leaves_one_that_serves(tmp_path: Path) -> None:
    """Nothing prepared: the worker makes the first model, and the exported one is what the rounds committed."""
    with world(tmp_path, study_of(), COMMAND, prepared=False) as one:
        one.sites.join()
        run = one.start()
        ends_as_simulated(one, run)
        folder = tmp_path / "runs" / run
        model = load_model(folder / "model")
        assert model.contract["model"] == digest_of([one.model(run)])
        assert one.runs.show(NAME)["model"] == str(folder / "model")
        assert not (folder / "initial.bin").exists()
        made = json.loads((folder / "result.json").read_text())["rounds"]
        listed = json.loads((folder / "model" / "lineage.json").read_text())["rounds"]
        assert [one["updates"] for one in listed] == [one["updates"] for one in made]
        assert all(one["updates"].keys() == one["sites"].keys() for one in listed)
        one.runs.close()
        assert not (folder / ".work").exists()


def test_a_run_waits_for_its_sites_and_says_for_how_many(quick: World) -> None:
    """Before round 1 nothing is asked of anybody until enough are at hand."""
    quick.sites.join("a")
    quick.start()
    assert quick.until(RUN, "waiting for sites") == (
        "waiting for sites",
        "1 of at least 2 sites are connected (a)",
    )
    assert quick.sites.asked == []
    quick.sites.join("b", "c")
    assert quick.until(RUN, "finished")[0] == "finished"


def test_a_run_that_loses_a_site_waits_for_it_and_goes_on(quick: World) -> None:
    """Without a quorum the rounds are void and the model stays; it names who is missing; then it ends as usual."""
    study = study_of(study={"rounds": 4}, cohort={"min_sites": 3})
    with world(private_folder(quick.folder / "w"), study, QUICK) as one:
        left = threading.Event()

        def leave(instruction: Instruction) -> None:
            if instruction.round == 2 and instruction.site == "c" and not left.is_set():
                left.set()
                one.sites.leave("c")

        one.sites.after = leave
        one.sites.join()
        one.start()
        why = one.until(RUN, "waiting for sites", "finished")
        if why[0] != "finished":  # c may be seen as at hand for a moment after it left
            assert why == ("waiting for sites", "2 of at least 3 sites are connected (a, b)")
        one.sites.after = lambda instruction: None
        one.sites.join("c")
        ends_as_simulated(one)


# Kills


def killing(one: World, when: Callable[[Instruction], bool]) -> Callable[[Instruction], None]:
    """Kills the run's process the first time that a site is asked what `when` says."""
    once = threading.Lock()

    def hook(instruction: Instruction) -> None:
        if when(instruction) and once.acquire(blocking=False):
            os.kill(process_of(one), signal.SIGKILL)

    return hook


def never(instruction: Instruction) -> bool:
    return False


PHASES: dict[str, tuple[Callable[[Instruction], bool], Callable[[Instruction], bool]]] = {
    "while statistics are made": (lambda i: i.kind == "query", never),
    "while sites train": (lambda i: i.kind == "train" and i.round == 2, never),
    "after an answer": (never, lambda i: i.kind == "train" and i.round == 3),
    "after all answers": (never, lambda i: i.kind == "train" and i.round == 3 and i.site == "c"),
    "while the last model is judged": (lambda i: i.kind == "evaluate", never),
}


@pytest.mark.parametrize("phase", PHASES)
def test_kill_9_of_a_runs_process_changes_no_bit(phase: str, quick: World) -> None:
    """It is started again, continues from the last commit, and ends with the same model, each event once."""
    before, after = PHASES[phase]
    quick.sites.before, quick.sites.after = killing(quick, before), killing(quick, after)
    quick.sites.join()
    quick.start()
    ends_as_simulated(quick)
    events = quick.runs.events(RUN, 0, 0)["events"]
    assert [e["round"] for e in events if e["kind"] == "round"] == [0, 1, 2, 3, 4]
    assert [e["round"] for e in events if e["kind"] == "evaluation"] == [0, 1, 2, 3, 4]
    lines = (quick.folder / "runs" / RUN / "rounds.jsonl").read_text().splitlines()
    assert len(lines) == 10


@pytest.mark.slow
def test_kill_9_while_a_worker_works_changes_nothing(tmp_path: Path) -> None:
    """While the first model is made, and while the last one is exported: both are made again, and it serves."""
    folder = tmp_path / "runs" / RUN
    with world(tmp_path, study_of(), COMMAND, prepared=False) as one:
        one.sites.join()
        one.start()
        for made in ("log.txt", "result.json"):
            while not (folder / made).exists() or not list(folder.glob(".work/consortium-worker-*/*.txt")):
                time.sleep(0.01)
            pid = process_of(one)
            os.kill(pid, signal.SIGKILL)
            assert dies(pid)
            while one.runs.process(RUN) in (None, pid):
                time.sleep(0.01)
        ends_as_simulated(one)
        assert load_model(folder / "model").contract["model"] == digest_of([one.model(RUN)])


@pytest.mark.parametrize("committed_first", [True, False])
def test_kill_9_around_a_commit_changes_no_bit(
    committed_first: bool, quick: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right before the commit is durable, and right after, before the process is told."""
    kept, once = quick.archive.commit, threading.Lock()

    def commit(run: str, number: int, *rest: Any) -> None:
        if number == 2 and once.acquire(blocking=False):
            if committed_first:
                kept(run, number, *rest)
            pid = process_of(quick)
            os.kill(pid, signal.SIGKILL)
            assert dies(pid)
            return
        kept(run, number, *rest)

    monkeypatch.setattr(quick.archive, "commit", commit)
    quick.sites.join()
    quick.start()
    ends_as_simulated(quick)
    rounds = [e["round"] for e in quick.runs.events(RUN, 0, 0)["events"] if e["kind"] == "round"]
    assert rounds == [0, 1, 2, 3, 4]


def test_a_process_that_keeps_dying_fails_its_run_with_its_last_words(tmp_path: Path) -> None:
    """Three new starts without a commit are enough; the reason is in the state, and the run can be resumed once
    something was committed, not before."""
    script = "import os, sys; print('disk on fire', file=sys.stderr, flush=True); os._exit(3)"
    with world(tmp_path, STUDY, (sys.executable, "-c", script)) as one:
        one.start()
        state, why = one.until(RUN, "failed")
        assert state == "failed"
        assert "ended with exit code 3: disk on fire" in why
        assert "4 times" in why
        assert (tmp_path / "runs" / RUN / "log.txt").read_text().count("disk on fire") == 4
        with pytest.raises(RefusedError, match="consortium study start breast-cancer"):
            one.runs.resume(NAME)


def test_a_process_that_is_killed_again_and_again_is_given_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What kills it may pass: each new start comes later, and the run says so meanwhile; after the last it fails."""
    monkeypatch.setattr(running, "PAUSES", (0.0, 0.2, 0.4, 0.8, 1.6))
    script = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    with world(tmp_path, STUDY, (sys.executable, "-c", script)) as one:
        began = time.monotonic()
        one.start()
        state, why = one.until(RUN, "failed")
        assert (state, time.monotonic() - began > 3.0) == ("failed", True)
        assert why.startswith("its process was ended by SIGKILL; it died 6 times without a commit")
        told = [event["why"] for event in one.runs.events(RUN, 0, 0)["events"] if event["state"] == "running"]
        assert told[-1] == "its process was ended by SIGKILL; it is started again"


def test_a_failed_run_is_resumed_from_its_last_commit(quick: World) -> None:
    """What went wrong is put right, `resume`, and it ends as if nothing had been."""

    def spoil(instruction: Instruction) -> None:
        quick.archive.folder.rename(quick.folder / "away")

    once = threading.Lock()
    quick.sites.after = lambda i: spoil(i) if i.round == 3 and once.acquire(blocking=False) else None
    quick.sites.join()
    quick.start()
    state, why = quick.until(RUN, "failed")
    assert state == "failed"
    assert "checkpoints" in why
    (quick.folder / "away").rename(quick.archive.folder)
    quick.sites.after = lambda instruction: None
    quick.runs.resume(NAME)
    ends_as_simulated(quick)


@pytest.mark.slow
@pytest.mark.parametrize("round", [0, 2])
def test_kill_9_of_the_server_leaves_nothing_running_and_the_run_continues(
    round: int, tmp_path: Path
) -> None:
    """The run's process dies with it; a server that starts over the same folder takes the run up by itself."""
    command = [sys.executable, str(SUPPORT / "a_server.py"), str(tmp_path), *QUICK]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    pid = 0
    while not pid:
        said = server.stdout.readline().split()
        pid = int(said[2]) if said[1] == str(round) else 0
    os.kill(pid, signal.SIGSTOP)  # as one that computes for long, and does not look at its socket
    server.send_signal(signal.SIGKILL)
    server.wait()
    server.stdout.close()
    gone = dies(pid)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    assert gone
    with world(tmp_path, STUDY, QUICK) as one:
        one.sites.join()
        one.runs.take_up()
        ends_as_simulated(one)
        events = one.runs.events(RUN, 0, 0)["events"]
        assert [e["round"] for e in events if e["kind"] == "round"] == [0, 1, 2, 3, 4]


def test_a_server_that_ends_in_order_continues_its_runs_too(tmp_path: Path) -> None:
    """close() leaves the state as it is and no process; the next server goes on."""
    with world(tmp_path, STUDY, QUICK) as one:
        asked = threading.Event()

        def before(instruction: Instruction) -> None:
            if instruction.round == 2:
                asked.set()
                time.sleep(0.5)

        one.sites.before = before
        one.sites.join()
        one.start()
        assert asked.wait(20)
        pid = process_of(one)
        began = time.monotonic()
        one.runs.close()
        assert time.monotonic() - began < 5
        assert not lives(pid)
        run = one.archive.run(RUN)
        assert run is not None
        assert run.state == "running"
    with world(tmp_path, STUDY, QUICK) as one:
        one.sites.join()
        one.runs.take_up()
        ends_as_simulated(one)


# Damage


def test_damaged_runs_are_failed_and_the_others_go_on(tmp_path: Path) -> None:
    """A checkpoint with a flipped bit, one that is gone, a study's text that was changed: each run says what is wrong
    with it, and the one that is well ends as usual."""
    texts = {name: study_of(study={"name": name, "rounds": 4}) for name in ("bit", "gone", "text", "well")}
    with world(tmp_path, texts["well"], QUICK) as one:

        def pause(instruction: Instruction) -> None:
            if (instruction.round, instruction.kind, instruction.site) == (2, "train", "a"):
                one.runs.pause(instruction.run)

        one.sites.before = pause
        one.sites.join()
        for name, study in texts.items():
            one.archive.submit(study)
            plans.keep(study, first_model(study), private_folder(tmp_path / "runs" / f"{name}.1"))
            one.runs.start(name)
            one.until(f"{name}.1", "paused")
            while one.runs.show(name)["round"] < 2:
                time.sleep(0.01)
        one.runs.close()
        files = {name: one.archive.committed(f"{name}.1") for name in texts}
        with one.store.transaction() as db:
            db.execute(
                "UPDATE runs SET text = replace(text, 'rounds = 4', 'rounds = 40') WHERE study = 'text'"
            )
            db.execute("UPDATE runs SET state = 'running'")
    bit, gone = (tmp_path / "checkpoints" / files[name].file for name in ("bit", "gone"))  # type: ignore[union-attr]
    bit.write_bytes(bytes([bit.read_bytes()[0] ^ 1]) + bit.read_bytes()[1:])
    gone.unlink()
    with world(tmp_path, texts["well"], QUICK) as one:
        one.sites.join()
        one.runs.take_up()
        assert "damaged" in one.until("bit.1", "failed")[1]
        assert "restore it from a backup" in one.until("gone.1", "failed")[1]
        assert "does not have the digest" in one.until("text.1", "failed")[1]
        ends_as_simulated(one, "well.1")


def test_a_damaged_plan_is_made_again(quick: World) -> None:
    """plan.json is a convenience: where it is of another study or broken, the worker is asked."""
    folder = quick.folder / "runs" / RUN
    quick.prepared = False
    folder.mkdir(parents=True)
    plans.keep(STUDY.with_(study={"seed": 8}), first_model(STUDY), folder)
    kept = plans.kept(STUDY, folder, begun=False)
    assert kept is None
    plans.keep(STUDY, first_model(STUDY), folder)
    assert plans.kept(STUDY, folder, begun=False) is not None
    (folder / "initial.bin").write_bytes((folder / "initial.bin").read_bytes()[:-1] + b"?")
    assert plans.kept(STUDY, folder, begun=False) is None
    assert plans.kept(STUDY, folder, begun=True) is not None
    (folder / "plan.json").write_text("{}")
    assert plans.kept(STUDY, folder, begun=True) is None


# Lies


@pytest.mark.parametrize(
    ("lie", "words"),
    [
        ("run", "for run 'other.1' where 'breast-cancer.1' is right"),
        ("study", "for study '0000"),
        ("federation", "for federation 'other'"),
        ("round", "for round '6' where 1 is right"),
        ("replayed round", "for round '0' where 1 is right"),
        ("attempt", "for attempt '7' where 0 is right"),
        ("site", "for site 'stranger', which is not at hand"),
        ("of another", "for site 'b' where 'a' is right"),
        ("expires", "beyond the study's deadline"),
        ("answer", "what is no instruction"),
        ("round 5", r"would commit round and attempt (5, 0) after (0, 0)"),
        ("no file", "would commit 0 files"),
        ("state event", "reports what is neither"),
        ("status", "ended it as 'running'"),
        ("forever", "would wait for answers beyond"),
        ("seal federation", "sign a model of another federation"),
        ("seal run", "sign a model of another run"),
        ("seal study", "sign a model of another study"),
        ("seal lineage", "sign a model of another lineage"),
        ("seal nothing", "sign a malformed manifest"),
        ("seal model", "sign a model that none of its rounds committed"),
        ("garbage", "local message"),
        ("a gigabyte", "local message: 1073741824 bytes"),
        ("not an object", "local message: is not a JSON object"),
    ],
)
def test_a_process_that_lies_gets_nothing_signed_and_fails_its_run(
    lie: str, words: str, tmp_path: Path
) -> None:
    """The reason says what it asked for; no site is asked, nothing is committed, and it does not live on."""
    with world(tmp_path, STUDY, (sys.executable, str(SUPPORT / "lying_run.py"), lie)) as one:
        one.sites.join("a", "b")
        one.start()
        pid = process_of(one)
        why = one.until(RUN, "failed")[1]
        assert words in why
        assert dies(pid)
        assert one.sites.asked == []
        assert one.archive.committed(RUN) is None
        assert list(one.archive.folder.iterdir()) == []
        with pytest.raises(RefusedError):
            one.runs.stop(NAME)


@pytest.mark.slow
def test_a_process_that_does_not_go_when_asked_is_killed(tmp_path: Path) -> None:
    """SIGTERM is ignored, SIGKILL is not."""
    with world(tmp_path, STUDY, (sys.executable, str(SUPPORT / "lying_run.py"), "deaf")) as one:
        one.start()
        pid = process_of(one)
        one.until(RUN, "failed")
        assert dies(pid, 20)


def test_a_runs_process_knows_no_secret(quick: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither its arguments nor its environment hold anything but where programs lie; it has no file of the server open
    but its log, its first model, its socket and checkpoints of its own."""
    monkeypatch.setenv("CONSORTIUM_PASSPHRASE", "very secret indeed")
    monkeypatch.setenv("CONSORTIUM_TOKEN", "very secret indeed")
    (quick.folder / "instruction.key").write_text("very secret indeed")
    held = (quick.folder / "instruction.key").open()
    os.set_inheritable(held.fileno(), True)
    seen: dict[str, Any] = {}

    def look(instruction: Instruction) -> None:
        if seen or instruction.round != 1:
            return
        place = Path(f"/proc/{process_of(quick)}")
        seen["environment"] = (place / "environ").read_bytes().split(b"\0")
        seen["arguments"] = (place / "cmdline").read_bytes().split(b"\0")
        seen["files"] = files = []
        for one in (place / "fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed since it was listed
                files.append(str(one.readlink()))

    quick.sites.before = look
    quick.sites.join()
    quick.start()
    ends_as_simulated(quick)
    held.close()
    known = {"PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TZ", "HOME", "TMPDIR", "PYTHONHASHSEED", "PYTHONUTF8",
             "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", ""}  # fmt: skip
    assert {one.partition(b"=")[0].decode() for one in seen["environment"]} <= known
    assert seen["arguments"][-3].endswith(b"run_quickly.py")
    assert seen["arguments"][-2].isdigit()
    named = [
        file
        for file in seen["files"]
        if file.startswith(str(quick.folder)) and not file.endswith("(deleted)")
    ]
    allowed = ("log.txt", "initial.bin")
    assert [file for file in named if not file.endswith(allowed) and "/checkpoints/" not in file] == []
    assert any(file.startswith("socket:") for file in seen["files"])


# Stop, pause, resume


def test_stop_ends_a_run_for_good_and_keeps_what_was_committed(quick: World) -> None:
    """Also in the middle of a round: at once, with nothing left running, and nothing is asked any more."""
    asked = threading.Event()
    go = threading.Event()

    def before(instruction: Instruction) -> None:
        if instruction.round == 3:
            asked.set()
            go.wait(30)

    quick.sites.before = before
    quick.sites.join()
    quick.start()
    assert asked.wait(20)
    pid = process_of(quick)
    began = time.monotonic()
    quick.runs.stop(NAME)
    assert time.monotonic() - began < 4
    assert not lives(pid)
    assert quick.exchange.open_for("a") == []
    go.set()
    shown = quick.runs.show(NAME)
    assert (shown["state"], shown["why"], shown["round"]) == ("stopped", "by the admin", 2)
    assert quick.archive.committed(RUN) is not None
    for action in (quick.runs.stop, quick.runs.pause, quick.runs.resume):
        with pytest.raises(RefusedError, match="not under way"):
            action(NAME)
    quick.runs.take_up()
    assert quick.runs.process(RUN) is None


def test_a_run_that_waits_can_be_stopped(quick: World) -> None:
    """Within a second, though it would wait without end."""
    quick.start()
    quick.until(RUN, "waiting for sites")
    began = time.monotonic()
    quick.runs.stop(RUN)
    assert time.monotonic() - began < 3
    assert quick.runs.show(NAME)["state"] == "stopped"


def test_pause_lets_the_round_end_and_resume_goes_on(tmp_path: Path) -> None:
    """The round under way counts; no other is asked for, across a restart of the server; then the usual end."""
    with world(tmp_path, STUDY, QUICK) as one:

        def pause(instruction: Instruction) -> None:
            if instruction.round == 2 and instruction.site == "a" and instruction.kind == "train":
                one.runs.pause(NAME)

        one.sites.before = pause
        one.sites.join()
        one.start()
        assert one.until(RUN, "paused") == ("paused", "")
        end = time.monotonic() + 10
        while one.runs.show(NAME)["round"] < 2 and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.3)
        assert one.runs.show(NAME)["round"] == 2
        assert max(number for _, _, number, _ in one.sites.asked) == 2
    with world(tmp_path, STUDY, QUICK) as one:
        one.sites.join()
        one.runs.take_up()
        time.sleep(0.5)
        assert one.runs.show(NAME)["state"] == "paused"
        assert one.sites.asked == []
        one.runs.resume(NAME)
        ends_as_simulated(one)


# What the admin door asks


def test_one_run_of_a_study_at_a_time(quick: World) -> None:
    """A second start is refused while one is under way, and gets the next name after."""
    quick.start()
    with pytest.raises(RefusedError, match="consortium study stop breast-cancer"):
        quick.runs.start(NAME)
    quick.runs.stop(NAME)
    assert quick.start() == f"{NAME}.2"
    assert [one["run"] for one in quick.runs.list()] == [f"{NAME}.2", RUN]
    quick.runs.stop(NAME)


def test_unknown_names_are_refused(quick: World) -> None:
    """A study that is not there, and one that was never started."""
    for action in (quick.runs.stop, quick.runs.show, quick.runs.start):
        with pytest.raises(InputError, match="no study"):
            action("other")
    quick.archive.submit(STUDY)
    with pytest.raises(InputError, match="has no run"):
        quick.runs.pause(NAME)
    assert quick.runs.show(NAME)["state"] == "proposed"
    assert quick.runs.events(NAME, 0, 0.05)["events"] == []


def test_why_a_site_is_left_out_is_shown_until_it_counts_again(quick: World) -> None:
    """A site that cannot be used costs itself its place, and its reason is there for the admin."""

    def spoil(instruction: Instruction) -> None:
        if instruction.round == 4 and instruction.site == "c" and instruction.kind == "train":
            quick.exchange.drop("c", "was revoked")

    quick.sites.before = spoil
    quick.sites.join()
    quick.start()
    quick.until(RUN, "finished")
    assert quick.runs.last_error("c") == "was revoked"
    assert quick.runs.last_error("a") is None
    assert quick.runs.last_error("nobody") is None
    about = quick.runs.show(NAME)["sites"]["c"]
    assert (about["last_round"], about["last_error"]) == (3, "was revoked")
