"""The power is cut, or the disk fails, at each file operation of what must be durable: the state before or after."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from power_cut import VARIANTS, Disk, How, PowerCut, interrupted
from scripted import Script, Scripted, honest

from consortium.client.seen import Place, Seen
from consortium.client.site import Memory
from consortium.client.store import Kept
from consortium.client.store import Store as SiteStore
from consortium.protocol import Layout, Study
from consortium.protocol.errors import ConsortiumError
from consortium.protocol.files import private_folder, write_private
from consortium.protocol.layout import Array, Segment
from consortium.protocol.messages import Answer, Instruction, Payload, encode
from consortium.protocol.sealed import DataKey, new_data_key
from consortium.protocol.sealed import seal as seal_line
from consortium.protocol.signing import ANSWER, raw, sign
from consortium.server import checkpoint, run_records
from consortium.server.archive import Archive
from consortium.server.checkpoint import Added
from consortium.server.coordinator import run
from consortium.server.export import place
from consortium.server.kept_answers import KeptAnswers
from consortium.server.link import nameless
from consortium.server.offers import Offer, Received, Spooled
from consortium.server.records import Outcome, Plan, RunState
from consortium.server.store import Store
from consortium.strategies.named import fedadam

STUDY = Study.parse(
    'format = 1\n[study]\nname = "s"\ntask = "consortium.client.tasks.tabular:Classifier"\nrounds = 3\n'
    '[data]\ntarget = "y"\nfeatures = { x = { min = 0.0, max = 1.0 } }\n'
    '[cohort]\nmin_sites = 2\ndeadline = "5s"\n'
)
LAYOUT = Layout((Segment("shared", "float32", (Array("w", (3,)),)),))
RUN = "s.1"
KEY = new_data_key()
CUT_ROUND = 2


class Commits:
    """A run's commits in an archive, as `server/link.py` and `server/conversation.py` make them."""

    def __init__(self, archive: Archive, around: Callable[[RunState, Callable[[], None]], None]) -> None:
        self._archive, self._around = archive, around
        self._writer = checkpoint.Writer(RUN, KEY, partial(run_records.history, archive.store, RUN, KEY))

    def load(self) -> RunState | None:
        commit = self._archive.committed(RUN)
        if commit is None:
            return None
        file = self._archive.open(RUN, commit)
        try:
            return self._writer.read(file, commit.sha256)
        finally:
            os.close(file)

    def commit(self, state: RunState) -> RunState:
        self._around(state, lambda: self._commit(state))
        return self._writer.put_away(state)

    def _commit(self, state: RunState) -> None:
        file = nameless(self._archive.folder)
        try:
            sha256, added = self._writer.write(state, file)
            events = [{"kind": "round", "round": state.round}]
            sealed = {
                kind: Added(at, [seal_line(one, KEY) for one in lines]) for kind, (at, lines) in added.items()
            }
            self._archive.commit(RUN, state.round, state.attempt, file, sha256, events, sealed)
        finally:
            os.close(file)


def towards(value: float) -> Script:
    """A site whose update depends on the model that it is sent, so that a third state shows in the end."""

    def answer(instruction: Instruction) -> list[Answer]:
        (one,) = honest(1.0)(instruction)
        if instruction.kind != "train":
            return [one]
        model = instruction.payload.vectors["shared"]
        return [replace(one, payload=Payload({"shared": np.float32(value) - model}))]

    return answer


def play(
    archive: Archive, around: Callable[[RunState, Callable[[], None]], None] = lambda _, do: do()
) -> Outcome:
    clients = Scripted({"a": towards(1.0), "b": towards(3.0)})
    plan = Plan(STUDY, fedadam(), LAYOUT, np.zeros(3, np.float32), run=RUN)
    return run(plan, clients, Commits(archive, around), clock=clients.clock, rng=random.Random(1))


def opened(folder: Path) -> tuple[Archive, Store]:
    store = Store(folder / "db")
    return Archive(store, folder / "checkpoints"), store


def prepared(folder: Path) -> tuple[Archive, Store]:
    archive, store = opened(private_folder(folder))
    archive.submit(STUDY)
    archive.propose(STUDY.name)
    return archive, store


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The model of a run that nothing happens to."""
    archive, store = prepared(tmp_path_factory.mktemp("right") / "server")
    digest = play(archive).digest
    store.close()
    return digest


def server_cut(
    folder: Path, patch: pytest.MonkeyPatch, at: int, how: How, share: float
) -> tuple[Disk, bool, Store]:
    """Break the commit of a round at one operation; whether it was over by then, and the store that was open."""
    archive, store = prepared(folder)
    disks: list[Disk] = []

    def around(state: RunState, commit: Callable[[], None]) -> None:
        if state.round != CUT_ROUND or disks:
            commit()
            return
        disks.append(Disk(folder, at, how, share))
        with disks[0].recording(patch):
            commit()
        raise PowerCut  # just after it

    over = False
    try:
        play(archive, around)
    except PowerCut:
        over = len(disks[0].log) <= at
    except (ConsortiumError, OSError):
        assert how == "fails"
        # The program goes on: the same archive is as before or after, and takes the next commit.
        assert (archive.committed(RUN) or pytest.fail("nothing is committed")).round in (1, 2)
        play(archive)
    return disks[0], over, store


def operations() -> list[tuple[int, How, float]]:
    """Every operation of a commit (there are 9), in every way; the last is after all of them."""
    whole = [(at, how, 0.5) for at in range(10) for how in ("fails", "torn", "cut")]
    sqlite = [(at, "torn", share) for at in range(5, 8) for share in (0.0, 0.01, 0.3, 0.99, 1.0)]
    return [*whole, *sqlite]  # type: ignore[list-item]


@pytest.mark.parametrize(("at", "how", "share"), operations())
def test_a_commit_is_there_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, right: str, at: int, how: How, share: float
) -> None:
    """Whatever happens at any file operation of a round's commit, the server finds the round before or this one at its
    next start, nothing else in the folder, and the run goes on to the very same model. A commit that returned is there.
    """
    disk, over, before = server_cut(tmp_path / "server", monkeypatch, at, how, share)
    if how == "cut":
        assert over == (at == 9), f"a commit has other operations than are tried here: {disk.log}"
    folders = [tmp_path / "server"]
    if how != "fails":
        folders = [disk.after(variant, tmp_path / variant) for variant in VARIANTS]
    before.close()
    for folder in folders:
        archive, store = opened(folder)
        found = archive.committed(RUN)
        assert found is not None
        if how != "fails":
            assert found.round == CUT_ROUND if over else found.round in (CUT_ROUND - 1, CUT_ROUND)
            assert [event["round"] for event in archive.events(RUN)] == list(range(1, found.round + 1))
        assert [path.name for path in archive.folder.iterdir()] == [found.file]
        outcome = play(archive)
        assert (outcome.status, outcome.digest) == ("finished", right)
        assert [one.round for one in outcome.state.rounds] == [1, 2, 3]
        store.close()


# At a site


def instruction(round: int) -> Instruction:
    return Instruction(
        federation="f", run=RUN, round=round, attempt=0, kind="train", study="0" * 64, layout=LAYOUT.digest,
        model="1" * 64, nonce=f"n{round}", site="a", expires=1e12,
        payload=Payload({"shared": np.zeros(3, np.float32)}),
    )  # fmt: skip


def kept(round: int) -> Kept:
    update = np.full(3, round, np.float32)
    answer = Answer.to_instruction(instruction(round), weight=1.0, payload=Payload({"shared": update}))
    return Kept(Memory({"local": update}, {"local": update + 1}, round), answer)


def same(one: Kept, other: Kept) -> bool:
    def plain(it: Kept) -> object:
        if it.last is None:
            return None
        header, views = encode(it.last)
        states = [{k: v.tobytes() for k, v in s.items()} for s in (it.memory.committed, it.memory.pending)]
        return header, [bytes(view) for view in views], states, it.memory.pending_round

    return plain(one) == plain(other)


@pytest.mark.parametrize("how", ["fails", "torn", "cut"])
@pytest.mark.parametrize("first", [True, False])
def test_an_answer_and_the_next_state_are_kept_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: How, first: bool
) -> None:
    """A site's first answer in a folder that is not there yet, and a later one: kept with the state, or neither; what
    `save` returned from is there, and the same instruction gets the same bytes."""
    before, after = (Kept() if first else kept(1)), kept(2)

    def prepare(folder: Path) -> None:
        if not first:
            SiteStore(folder / "state", RUN).save(kept(1))

    def save(folder: Path) -> None:
        SiteStore(folder / "state", RUN).save(after)

    for one in interrupted(tmp_path, monkeypatch, how, prepare, save):
        found = SiteStore(one.folder / "state", RUN).load()
        assert same(found, after) if one.over else same(found, before) or same(found, after)
        again = found.answer_to(instruction(2))
        assert again is None or encode(again)[0] == encode(after.last)[0]  # type: ignore[arg-type]


def accept(folder: Path) -> None:
    assert Seen(folder / "seen.json", lambda: 2e9).accept(RUN, Place(2, 0))


def accepted(folder: Path) -> object:
    return Seen(folder / "seen.json", lambda: 2e9).last(RUN)


def write(folder: Path) -> None:
    write_private(private_folder(folder / "new") / "trust.json", b"new")


def written(folder: Path) -> object:
    path = folder / "new" / "trust.json"
    return path.read_bytes() if path.exists() else None


def export_bundle(folder: Path) -> None:
    place({"contract.json": b"{}", "model.onnx": b"graph"}, folder / "model")


def exported(folder: Path) -> object:
    found = folder / "model"
    return {path.name: path.read_bytes() for path in found.iterdir()} if found.exists() else None


DURABLE = [
    (accept, accepted, Place(2, 0)),
    (write, written, b"new"),
    (export_bundle, exported, {"contract.json": b"{}", "model.onnx": b"graph"}),
]


@pytest.mark.parametrize("how", ["fails", "torn", "cut"])
@pytest.mark.parametrize(("do", "look", "after"), DURABLE)
def test_a_private_file_is_replaced_or_not(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    how: How,
    do: Callable[[Path], None],
    look: Callable[[Path], object],
    after: object,
) -> None:
    """What was asked of a site last, any small file, a bundle: the one before or the new one, and the new one once it
    was said to be there, in a new folder too."""

    def prepare(folder: Path) -> None:
        if do is accept:
            Seen(folder / "seen.json", lambda: 2e9).accept(RUN, Place(1, 0))

    prepare(private_folder(tmp_path / "before"))
    before = look(tmp_path / "before")
    for one in interrupted(tmp_path, monkeypatch, how, prepare, do):
        assert look(one.folder) == after if one.over else look(one.folder) in (before, after)


# Answers on their way

ONE = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
SECRET = DataKey(bytes(range(32)))


def kept_answers(folder: Path) -> KeptAnswers:
    return KeptAnswers(folder, SECRET.of, lambda _: raw(ONE.public_key()).hex())


def asking(round: int) -> bytes:
    return encode(instruction(round))[0]


def answered(folder: Path, round: int) -> None:
    """Keep what was asked, and an answer to it, as the site door does."""
    update = np.full(3, round, np.float32)
    answer = Answer.to_instruction(instruction(round), weight=1.0, payload=Payload({"shared": update}))
    header, views = encode(answer)
    content = Spooled.new(folder)
    os.write(content.fd, b"".join(views))
    spool, offer = kept_answers(folder), Offer(RUN, "a", f"n{round}", asking(round), b"", None, 0, 10_000)
    spool.begin(RUN, {"round": round})
    spool.keep(offer, sign(ONE, ANSWER, header), Received("a", header, content))


@pytest.mark.parametrize("how", ["fails", "torn", "cut"])
def test_an_answer_that_came_counts_whole_or_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: How
) -> None:
    """What is found of a question and of an answer is that of now, or of before, or nothing, and counts as an answer
    to its own question alone, byte for byte."""
    rights = {number: np.full(3, number, np.float32).tobytes() for number in (2, 1)}

    def act(folder: Path) -> None:
        answered(folder, 2)

    for one in interrupted(tmp_path, monkeypatch, how, lambda folder: answered(folder, 1), act):
        asked = kept_answers(one.folder).asked(RUN)
        assert asked in (None, {"round": 1}, {"round": 2})
        for round, right in rights.items():  # what answers no question of now is removed
            found = kept_answers(one.folder).answers(RUN, {"a": asking(round)}, 10_000)
            if round == 2 and one.over and one.variant == "most":
                assert asked == {"round": 2}
                assert found
            if found:
                assert found["a"].content is not None
                assert b"".join(map(bytes, found["a"].content.pieces(len(right)))) == right
