"""A program is killed: what it started does not outlive it, whatever that is at."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from breast_cancer import study_text
from live import children
from site_world import World, program, wait_for

from consortium.client.datasets import Datasets
from consortium.client.site import start
from consortium.client.task import task_of
from consortium.protocol.layout import digest_of
from consortium.protocol.messages import Instruction, Payload
from consortium.protocol.study import Study
from consortium.strategies.chosen import strategy_of

SLOW_CODE = """
import contextlib, time
from pathlib import Path
with contextlib.suppress(OSError):  # confined, it may write nowhere there
    Path(__file__).with_name("begun").touch()
time.sleep(100)
"""
ASKING = """
import sys
from pathlib import Path
from consortium.protocol.study import Study
from consortium.server.worker_process import initial
from consortium.strategies.base import Local
initial(Study.load(Path("study.toml")), Local(), trusted=sys.argv[1] == "trusted")
"""
SLOW_QUERY = (
    "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT count(*) AS mean_radius FROM c"
)


@contextmanager
def started(*words: object, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A program, which is killed in any case."""
    one = subprocess.Popen([sys.executable, *map(str, words)], cwd=folder, stderr=subprocess.DEVNULL)
    try:
        yield one
    finally:
        one.kill()
        one.wait()


def killed(
    parent: subprocess.Popen[bytes] | subprocess.Popen[str],
    find: Callable[[], list[int]],
    at_work: Callable[[], bool] | None = None,
) -> None:
    """Kill a program whose child `find` gives, and see that it ends: at once where it is at work, else as soon as it
    has started, which is when it looks."""
    wait_for(lambda: len(find()) == 1, 30, "no child")
    (child,) = find()
    if at_work is not None:
        wait_for(at_work, 60, "the child does not work")
    parent.kill()
    parent.wait(5)
    wait_for(lambda: gone(child), 2 if at_work is not None else 30, "the child outlives its parent")


def first(world: World) -> Instruction:
    """An instruction to train with the study's first model."""
    task, local = task_of(world.study), strategy_of(world.study).local
    net = start(world.study, task, local)
    vectors = {"shared": np.array(net.vector("shared"))}
    told = {"model": digest_of(vectors["shared"]), "layout": net.layout.digest, "payload": Payload(vectors)}
    return world.instruction("train", 1, **told)


def has(library: str, processes: list[int]) -> bool:
    """Whether a process has loaded a library: the one by which it begins what goes on for ever."""
    return library in Path(f"/proc/{processes[0]}/maps").read_text()


def gone(pid: int) -> bool:
    """Whether a process has ended, also where nobody has asked how."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("Z", "X")
    except OSError:
        return True


@pytest.mark.parametrize("how", ["trusted", "confined"])
def test_a_worker_that_makes_a_model_ends_with_its_process(tmp_path: Path, how: str) -> None:
    """The study's code sleeps while the run's process, here another one, is killed; confined or not."""
    (tmp_path / "slow.py").write_text(SLOW_CODE)
    (tmp_path / "study.toml").write_text(study_text(4, study={"task": "slow:Task"}))
    with started("-c", ASKING, how, folder=tmp_path) as parent:
        at_work = (tmp_path / "begun").exists if how == "trusted" else None
        killed(parent, lambda: children(parent.pid, "consortium.client."), at_work)


def test_a_worker_whose_parent_ended_before_it_began_ends_at_once(tmp_path: Path) -> None:
    """Its parent's number is another's by then: it is killed before it runs any code of the study."""
    (tmp_path / "slow.py").write_text(SLOW_CODE)
    (tmp_path / "study.toml").write_text(study_text(4, study={"task": "slow:Task"}))
    words = [
        "-m",
        "consortium.client.worker",
        "initial",
        tmp_path,
        "--code",
        tmp_path,
        "--parent",
        os.getpid() + 1,
    ]
    with started(*words, folder=tmp_path) as worker:
        assert worker.wait(20) == -signal.SIGKILL
    assert not (tmp_path / "begun").exists()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    one = World(tmp_path)
    yield one
    one.end()


@pytest.mark.parametrize("working", [True, False])
def test_a_sites_worker_ends_with_the_agent(world: World, working: bool) -> None:
    """In the middle of a long training, and while it starts."""
    world.study = Study.parse(study_text(8, training={"local_epochs": 1_000_000}))
    world.studies[world.study.digest] = world.study.text
    world.with_data()
    with program(world) as one:
        world.offer(first(world))
        find = partial(children, one.process.pid, "client.worker")
        killed(one.process, find, (lambda: has("pandas/_libs", find())) if working else None)


@pytest.mark.parametrize("working", [True, False])
def test_a_query_ends_with_the_agent(world: World, working: bool) -> None:
    """A query of the site's database that would go on for ever, and one that has not begun."""
    world.with_data()
    own, database = world.folder / "query.toml", world.folder / "clinic.db"
    own.write_text(f'format = 1\n[source]\nsql = "{SLOW_QUERY}"\nurl = "sqlite:///{database}"\n')
    sqlite3.connect(database).execute("CREATE TABLE patients (radius REAL)").connection.close()
    Datasets(world.home).add("asked", "sql", own)
    world.allow(data="asked")
    with program(world) as one:
        world.offer(world.instruction("query", 0))
        find = partial(children, one.process.pid, "client.sql_snapshot")
        killed(one.process, find, (lambda: has("_sqlite3", find())) if working else None)
