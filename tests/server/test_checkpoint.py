"""Checkpoints: what is read back is what was written, to the last bit, or is refused."""

from __future__ import annotations

import gc
import hashlib
import math
import os
import weakref
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kept_lines import Lines

from consortium.protocol.errors import ConsortiumError, IntegrityError
from consortium.protocol.layout import Vector, digest_of
from consortium.protocol.sealed import DataKey, Sealed, new_data_key
from consortium.server import checkpoint
from consortium.server.checkpoint import Writer
from consortium.server.link import nameless
from consortium.server.records import Evaluation, Past, Round, RunState, followed
from consortium.strategies.catalogue import CATALOGUE, Entry

KEY = new_data_key()
names = st.text(max_size=12)
numbers = st.floats(width=64)
counts = st.dictionaries(names, numbers, max_size=4)


def vector(seed: int, size: int, dtype: str) -> Vector:
    """Any bits that are floats: subnormals, infinities and NaN with payloads too."""
    return np.frombuffer(np.random.default_rng(seed).bytes(size * np.dtype(dtype).itemsize), dtype)


vectors = st.builds(vector, st.integers(0, 2**32), st.integers(0, 40), st.sampled_from(["<f4", "<f8"]))
rounds = st.builds(
    Round, st.integers(0, 10**6), st.integers(0, 99), st.lists(names, max_size=4).map(tuple), counts,
    st.dictionaries(names, names, max_size=3), names, numbers, names, st.integers(0, 99),
    st.dictionaries(names, names, max_size=2), st.dictionaries(names, names, max_size=2),
    st.dictionaries(names, names, max_size=2),
)  # fmt: skip


@st.composite
def evaluations(draw: st.DrawFn, model: str | None = None) -> Evaluation:
    digest = draw(names) if model is None else model
    sites = draw(st.dictionaries(names, counts, max_size=3))
    return Evaluation(draw(st.integers(0, 10**6)), digest, draw(counts), sites)


@st.composite
def states(draw: st.DrawFn) -> RunState:
    model = draw(vectors)
    digest = digest_of([model])
    best = None
    if draw(st.booleans()):
        seed = draw(
            st.integers(0, 2**32)
        )  # one layout: the best model has the size and dtype of the current one
        other = model if draw(st.booleans()) else vector(seed, model.size, model.dtype.str)
        best = (draw(evaluations(digest_of([other]))), other)
    shapes = st.sampled_from([(), (0,), (3,), (2, 3)])
    tables = {name: np.asarray(vector(i, math.prod(draw(shapes)), "<f8")) for i, name in enumerate("xy")}
    return RunState(
        round=draw(st.integers(0, 10**6)),
        attempt=draw(st.integers(0, 10**6)),
        model=model,
        digest=digest,
        control=draw(st.none() | vectors),
        optimizer=draw(st.dictionaries(names, vectors, max_size=3)),
        statistics={**tables, "n": np.array(3.0), "scalar": np.float64(0.1)},  # type: ignore[dict-item]
        counted=draw(st.dictionaries(names, st.integers(0, 10**6), max_size=4)),
        rounds=tuple(draw(st.lists(rounds, max_size=4))),
        evaluations=tuple(draw(st.lists(evaluations(), max_size=4))),
        best=best,
    )


def read(
    file: int, sha256: str, run: str, key: DataKey | None = None, lines: Lines | None = None
) -> RunState:
    return Writer(run, key, lines or Lines()).read(file, sha256)


def there_and_back(
    state: RunState, folder: Path, writer: Writer | None = None, lines: Lines | None = None
) -> RunState:
    file, lines = nameless(folder), lines or Lines()
    writer = writer or Writer("r.1", None, lines)
    try:
        sha256 = lines.take(writer.write(state, file))
        writer.put_away(state)
        return read(file, sha256, "r.1", None, lines)
    finally:
        os.close(file)


def exact(value: Any) -> Any:
    """A value in which equal means equal bits, order of keys included."""
    if isinstance(value, np.ndarray | np.generic):
        return (value.dtype.str, value.shape, value.tobytes())
    if isinstance(value, float):
        return "NaN" if math.isnan(value) else (value, math.copysign(1, value))
    if isinstance(value, Mapping):
        return [(key, exact(one)) for key, one in value.items()]
    if isinstance(value, list | tuple | Past):
        return [exact(one) for one in value]
    if isinstance(value, RunState | Round | Evaluation):
        return [exact(one) for one in vars(value).values()]
    return value


@given(state=states())
@settings(max_examples=150, deadline=None)
def test_any_state_comes_back_bit_for_bit(state: RunState, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Every field: odd floats, 0-d and empty arrays, any names, and a best model that is or is not the current one."""
    assert exact(there_and_back(state, tmp_path_factory.getbasetemp())) == exact(state)


@pytest.mark.parametrize("entry", CATALOGUE, ids=lambda entry: entry.name)
@given(seed=st.integers(0, 2**32), size=st.integers(1, 50), dtype=st.sampled_from(["<f4", "<f8"]))
@settings(max_examples=15, deadline=None)
def test_every_strategy_goes_on_from_a_checkpoint_as_it_would_have(
    entry: Entry, seed: int, size: int, dtype: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A step from the state that was read gives the bits of a step from the state that was written."""
    rng = np.random.default_rng(seed)
    optimizer = entry.make().optimizer
    model, first, second = (rng.normal(size=size).astype(dtype) for _ in range(3))
    model, kept = optimizer.step(optimizer.init(model), model, first)
    state = RunState(1, 0, model, digest_of([model]), first, kept, {})
    again = there_and_back(state, tmp_path_factory.getbasetemp())
    straight, broken = (
        optimizer.step(kept, model, second),
        optimizer.step(again.optimizer, again.model, second),
    )
    assert exact(straight) == exact(broken)
    assert exact(again.control) == exact(first)


def state_of(size: int = 1000, records: int = 3) -> RunState:
    model = np.arange(size, dtype=np.float32)
    record = Round(1, 0, ("a", "b"), {"a": 1.0}, {"b": "declined"}, "m", 0.5)
    judged = Evaluation(1, "m", {"accuracy": 0.5}, {})
    return RunState(
        1, 0, model, digest_of([model]), None, {"v": model + 1}, {"n": np.array([2.0])},
        rounds=(record,) * records, evaluations=(judged,) * records,
    )  # fmt: skip


def test_a_writer_that_wrote_before_writes_the_same_state(tmp_path: Path) -> None:
    """Records that are encoded once are all there in every later file."""
    lines = Lines()
    writer = Writer("r.1", None, lines)
    for records in (0, 1, 1, 5):
        assert exact(there_and_back(state_of(records=records), tmp_path, writer, lines)) == exact(
            state_of(records=records)
        )


def test_the_file_begins_with_the_model(tmp_path: Path) -> None:
    """So it serves as the content of an instruction."""
    state, file = state_of(), nameless(tmp_path)
    Writer("r.1").write(state, file)
    assert hashlib.sha256(os.pread(file, state.model.nbytes, 0)).hexdigest() == state.digest
    os.close(file)


def test_an_encrypted_file_begins_with_the_model_and_shows_nothing(tmp_path: Path) -> None:
    """Whoever has the run's key reads the model from its start; the file holds no trace of what it is about."""
    state, file = state_of(), nameless(tmp_path)
    lines = Lines()
    sha256 = lines.take(Writer("r.1", KEY).write(state, file))
    first = b"".join(map(bytes, Sealed(file, KEY).pieces(0, state.model.nbytes)))
    assert hashlib.sha256(first).hexdigest() == state.digest
    whole = os.pread(file, os.fstat(file).st_size, 0)
    assert not [word for word in (state.model.tobytes()[:8], b"CSCP", b"sha256", b"r.1") if word in whole]
    assert read(file, sha256, "r.1", KEY, lines).digest == state.digest
    with pytest.raises(IntegrityError, match="the checkpoint is damaged"):
        read(file, sha256, "r.1", KEY.of("another run"), lines)
    os.close(file)


@pytest.mark.parametrize("key", [None, KEY], ids=["plain", "encrypted"])
def test_whatever_byte_changes_is_found(tmp_path: Path, key: DataKey | None) -> None:
    """One flipped bit anywhere, a shorter or a longer file: refused as damaged, never read otherwise."""
    file, lines = nameless(tmp_path), Lines()
    sha256 = lines.take(Writer("r.1", key).write(state_of(40, 1), file))
    whole = os.pread(file, os.fstat(file).st_size, 0)
    for place in range(len(whole)):
        os.pwrite(file, bytes([whole[place] ^ 1]), place)
        with pytest.raises(IntegrityError, match="the checkpoint is damaged"):
            read(file, sha256, "r.1", key, lines)
        os.pwrite(file, whole[place : place + 1], place)
    assert read(file, sha256, "r.1", key, lines).round == 1
    for length in (0, 5, 12, len(whole) - 1, len(whole) + 1):
        os.ftruncate(file, length)
        with pytest.raises(IntegrityError, match="the checkpoint is damaged"):
            read(file, sha256, "r.1", key, lines)
    os.close(file)


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    """Files that were swapped between two runs are found, though each is whole."""
    file = nameless(tmp_path)
    sha256 = Writer("r.2").write(state_of(), file).sha256
    with pytest.raises(IntegrityError, match="another run"):
        read(file, sha256, "r.1")
    os.close(file)


def test_what_is_no_array_is_refused_by_name(tmp_path: Path) -> None:
    """A strategy that keeps Python objects is told so, instead of losing them."""
    model = np.zeros(2, np.float32)
    for odd in ([1.0], np.array([object()]), "text"):
        state = RunState(0, 0, model, digest_of([model]), None, {"m": odd}, {})  # type: ignore[dict-item]
        with pytest.raises(ConsortiumError, match="the server optimizer's 'm'"):
            there_and_back(state, tmp_path)


def test_large_arrays_are_mapped_and_not_read(tmp_path: Path) -> None:
    """What comes back does not lie in this process's own memory."""
    back = there_and_back(state_of(3 * checkpoint.CHUNK), tmp_path)
    assert not back.model.flags.owndata
    assert not back.model.flags.writeable


@pytest.mark.parametrize("key", [None, KEY], ids=["plain", "sealed"])
def test_records_are_put_away_and_read_again(tmp_path: Path, key: DataKey | None) -> None:
    """After each commit only the latest record of a kind is in memory; all are there, in order, for who asks and who
    goes on; a file and what a commit adds are as long after sixty rounds as after two, and the document is that of a
    state that was written at once."""
    model = np.arange(3, dtype=np.float32)
    lines, made, sizes = Lines(), list[Round](), list[int]()
    state, writer = RunState(0, 0, model, digest_of([model]), None, {}, {}), Writer("r", key, lines)
    for number in range(60):
        updates = {f"s{site}": f"{number:032}{site:032}" for site in range(20)}
        made.append(
            Round(number, 0, tuple(updates), dict.fromkeys(updates, 1.0), {}, "m", 0.5, updates=updates)
        )
        judged = Evaluation(number, "m", {"n": float(number)}, {"s1": {"n": 1.0}})
        state = replace(
            state, rounds=followed(state.rounds, made[-1]), evaluations=followed(state.evaluations, judged)
        )
        file = nameless(tmp_path)
        written = writer.write(state, file)
        assert [(one.first, len(one.lines)) for one in written.added.values()] == [(number, 1)] * 2
        sha256 = lines.take(written)
        sizes.append(os.fstat(file).st_size)
        state = writer.put_away(state)
        whole = read(file, sha256, "r", key, lines)
        at_once = nameless(tmp_path)
        assert Writer("r", key).write(whole, at_once).sha256 == sha256
        if number == 30:  # another process takes it up
            writer = Writer("r", key, lines)
            state = writer.read(file, sha256)
        os.close(at_once)
        os.close(file)
    assert max(sizes) - sizes[1] < 8  # a count has more digits
    assert isinstance(state.rounds, Past)
    assert [*state.rounds] == made == [*whole.rounds]
    assert [*reversed(state.rounds)] == made[::-1]
    assert (state.rounds[-1], state.rounds[0], len(state.rounds)) == (made[-1], made[0], 60)
    assert state.rounds[59:] == (made[-1],)
    assert state.rounds[57:] == tuple(made[57:])
    assert state.rounds[60:] == ()
    assert [one.pooled["n"] for one in state.evaluations] == list(range(60))
    held = [weakref.ref(one) for one in made]
    made.clear()
    gc.collect()
    assert [one() is not None for one in held] == [False] * 59 + [True]
