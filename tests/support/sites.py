"""Sites in threads of this process, over the server's real exchange: `client/site.py`, and no network."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from select import select
from typing import Any

import numpy as np
import pandas as pd
from breast_cancer import study_text, table
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from consortium.client.site import Site, open_site, start
from consortium.client.store import Kept
from consortium.client.task import Source, task_of
from consortium.protocol.messages import Answer, Instruction, decode, encode
from consortium.protocol.sealed import DataKey
from consortium.protocol.signing import ANSWER, raw, sign
from consortium.protocol.study import Study
from consortium.server import plans
from consortium.server.archive import Archive
from consortium.server.exchange import Exchange
from consortium.server.kept_answers import KeptAnswers
from consortium.server.offers import Offer, Received, Spooled
from consortium.server.runs import Runs
from consortium.server.store import Store
from consortium.server.worker_process import Initial
from consortium.simulations.host import one_thread
from consortium.strategies.chosen import strategy_of

FEATURES = 4
NAMES = ("a", "b", "c")
Hook = Callable[[Instruction], None]
IDENTITY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
"""Of all sites."""


def study_of(**sections: Mapping[str, Any]) -> Study:
    """A small study of logistic regression that asks for statistics first; three rounds, two sites."""
    return Study.parse(study_text(FEATURES, **{"model": {"hidden": [4]}, **sections}))


def tables(names: tuple[str, ...] = NAMES) -> dict[str, pd.DataFrame]:
    """Rows of each site."""
    whole = table(FEATURES)
    return {name: whole.iloc[place :: len(names)] for place, name in enumerate(names)}


def first_model(study: Study) -> Initial:
    """What a worker makes of the study, made here."""
    task, strategy = task_of(study), strategy_of(study)
    with one_thread():
        net = start(study, task, strategy.local)
        return Initial(net.layout, net.vector("shared").copy(), task.prepares)


@dataclass
class Sites:
    """Sites of one study. before, after: called in a site's thread around each answer, before it is made and after
    it was taken. Asked the same again, a site gives the same answer, as live."""

    exchange: Exchange
    study: Study
    names: tuple[str, ...] = NAMES
    before: Hook = lambda instruction: None
    after: Hook = lambda instruction: None
    asked: list[tuple[str, str, int, int]] = field(default_factory=list)
    _left: dict[str, threading.Event] = field(default_factory=dict)
    _threads: list[threading.Thread] = field(default_factory=list)
    _one: threading.Lock = field(default_factory=threading.Lock)

    def join(self, *names: str) -> None:
        """Bring sites online."""
        rows = tables(self.names)
        task, strategy = task_of(self.study), strategy_of(self.study)
        for name in names or self.names:
            with one_thread():
                net = start(self.study, task, strategy.local)
                site = open_site(self.study, task, strategy.local, net, Source(name, table=rows[name]))
            self._left[name] = threading.Event()
            thread = threading.Thread(target=self._serve, args=(name, site), daemon=True)
            self._threads.append(thread)
            thread.start()

    def leave(self, *names: str) -> None:
        """Take sites offline."""
        for name in names or tuple(self._left):
            self._left[name].set()
        for thread in self._threads:
            if not names:
                thread.join(20)

    def _serve(self, name: str, site: Site) -> None:
        kept, left = Kept(), self._left[name]
        while not left.is_set():
            with self.exchange.polling(name, False) as wake:
                offer = self.exchange.offer(name, frozenset())
                if offer is None:
                    select([wake], [], [], 0.05)
                    continue
            kept = self._one_answer(name, site, offer, kept)
        self.exchange.gone(name)

    def _one_answer(self, name: str, site: Site, offer: Offer, kept: Kept) -> Kept:
        instruction = decode(
            offer.header, b"".join(map(bytes, offer.content.pieces(offer.length))) if offer.content else b""
        )
        assert isinstance(instruction, Instruction)
        self.asked.append((name, instruction.kind, instruction.round, instruction.attempt))
        self.before(instruction)
        answer = kept.answer_to(instruction)
        if answer is None:
            with self._one, one_thread():
                site.memory = kept.memory
                answer = site.answer(instruction)
            kept = Kept(site.memory, answer)
        one = received(self.exchange.spool, answer)
        self.exchange.taken(offer, one, sign(IDENTITY, ANSWER, one.header))
        self.after(instruction)
        return kept


def received(spool: Path, answer: Answer) -> Received:
    """An answer as the site door hands it over."""
    header, views = encode(answer)
    content = Spooled.new(spool)
    os.write(content.fd, b"".join(views))
    return Received(answer.site, header, content if views else None)


@dataclass
class World:
    """A server's runs over a folder, with sites in this process."""

    folder: Path
    study: Study
    command: tuple[str, ...]
    prepared: bool = True

    def __post_init__(self) -> None:
        self.store = Store(self.folder / "consortium.db")
        self.archive = Archive(self.store, self.folder / "checkpoints", key=DataKey(bytes(range(32))))
        (self.folder / "spool").mkdir(exist_ok=True)
        spool = self.folder / "spool"
        kept = KeptAnswers(spool, self.archive.key_of, lambda site: raw(IDENTITY.public_key()).hex())
        self.exchange = Exchange(lambda header: b"s" * 64, spool, lambda site: True, kept=kept)
        self.runs = Runs(self.archive, self.exchange, self.folder, "fed", self.command)
        self.sites = Sites(self.exchange, self.study)

    def start(self) -> str:
        """Submit and start the study."""
        self.archive.submit(self.study)
        if self.prepared:
            folder = self.folder / "runs" / f"{self.study.name}.{len(self.archive.runs()) + 1}"
            folder.mkdir(parents=True, exist_ok=True)
            plans.keep(self.study, first_model(self.study), folder)
        return self.runs.start(self.study.name)

    def until(self, run: str, *states: str, seconds: float = 60.0) -> tuple[str, str]:
        """Wait until the run is in one of the states; its state and why."""
        after = 0
        while True:
            found = self.runs.events(run, after, seconds)
            if found["state"] in states:
                return found["state"], found["why"]
            assert found["events"], f"still {found['state']}: {found['why']}"
            after = found["events"][-1]["id"]

    def model(self, run: str) -> np.ndarray[Any, np.dtype[Any]]:
        """The model that a finished run left."""
        loaded: np.ndarray[Any, np.dtype[Any]] = np.load(self.folder / "runs" / run / "model.npy")
        return loaded

    def close(self) -> None:
        """End everything."""
        self.runs.close()
        self.sites.leave()
        self.store.close()


@contextmanager
def world(folder: Path, study: Study, command: tuple[str, ...], **settings: Any) -> Iterator[World]:
    """A world that is closed in any case."""
    one = World(folder, study, command, **settings)
    try:
        yield one
    finally:
        one.close()
