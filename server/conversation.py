"""What a run's process may ask of the server, and what it is answered (the other end of `server/link.py`).

The process decides what to ask of the sites; what leaves the server is decided here. An instruction is signed only
where it is this run's and this study's, at the round that follows from the last commit, for a site that the process was
told of, and not for longer than the study's deadline. Whoever asks for anything else gets nothing any more.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from consortium.protocol import local, wire
from consortium.protocol.errors import ConsortiumError, IntegrityError
from consortium.protocol.local import ClosedError
from consortium.protocol.messages import parse
from consortium.protocol.sealed import DataKey
from consortium.protocol.study import Study
from consortium.server import run_records
from consortium.server.archive import Archive
from consortium.server.checkpoint import HISTORIES, Added
from consortium.server.child import Child
from consortium.server.offers import SLACK, Received, Spooled
from consortium.server.states import EARLY, FAILED, FINISHED

MOST_NAMES = 20
"""Sites that a reason names."""
MOST_RECORDS = 1 << 31
LATENESS = 60.0
"""Seconds that an instruction may be valid beyond the study's deadline."""

_PLURAL = dict(zip(("round", "evaluation"), HISTORIES, strict=True))

Reply = tuple[dict[str, Any], Spooled | None]
Seal = Callable[[bytes], dict[str, Any]]
"""From the manifest of a model to the document of its signature."""
Missing = Callable[[set[str]], str]
"""Of the sites at hand: why they are not enough, or nothing."""


class Exchange(Protocol):
    """What a run needs of `server/exchange.py`."""

    spool: Path

    def connected(self) -> list[str]: ...
    def away(self) -> dict[str, str]: ...
    def ask(
        self,
        run: str,
        headers: Mapping[str, bytes],
        content: int | None,
        largest: int,
        key: DataKey | None = None,
        asked: dict[str, Any] | None = None,
        done: Collection[str] = (),
    ) -> dict[str, str]: ...
    def interrupted(self, run: str) -> dict[str, Any] | None: ...
    def forget(self, run: str) -> None: ...
    def answers(self, run: str, seconds: float) -> Received | None: ...
    def withdraw(self, run: str) -> None: ...
    def close(self, run: str) -> None: ...
    def wait_more(self, known: set[str], seconds: float) -> bool: ...
    def rouse(self) -> None: ...


class Stage(Protocol):
    """What a conversation needs of its run (`server/running.py`)."""

    def hold(self, child: Child) -> None: ...
    def until(self, child: Child, missing: Missing, seconds: float = math.inf) -> None: ...
    def committed(self, void: str) -> None: ...
    def end(self, state: str, why: str) -> None: ...


class Conversation:
    """With one process of a run, from its start to its end.

    commits: how many it made. approved: the sites that have approved the study now; None where that is not asked.
    without: sites that are never at hand for this run.
    """

    def __init__(
        self,
        run: str,
        federation: str,
        study: Study,
        child: Child,
        archive: Archive,
        exchange: Exchange,
        stage: Stage,
        seal: Seal | None = None,
        approved: Callable[[], set[str]] | None = None,
        without: frozenset[str] = frozenset(),
    ) -> None:
        self._seal_with, self._approved, self._without = seal, approved, without
        self._run, self._federation, self._study = run, federation, study
        self._child, self._archive, self._exchange, self._stage = child, archive, exchange, stage
        self.commits = 0
        self._offered: set[str] = set()  # sites that it was told of
        self._answered: set[str] = set()  # in the last exchange, in whatever way
        self._largest = 0  # bytes of an answer's content
        self._gathered = False  # whether enough sites were at hand once
        self._calls: Mapping[str, Callable[[dict[str, Any], list[int]], Reply]] = {
            "ready": self._ready,
            "load": self._load,
            "commit": self._commit,
            "records": self._records,
            "keep": self._keep,
            "sites": self._sites,
            "interrupted": self._interrupted,
            "ask": self._ask,
            "answers": self._answers,
            "wait": self._wait,
            "released": lambda *_: ({"ledger": self._archive.released_by(self._run)}, None),
            "seal": self._seal,
            "finished": self._finished,
        }

    def hold(self) -> bool:
        """Answer the process until it has said how the run ended (True) or is dead (False).

        Raises:
            ConsortiumError: it asks for what it must not have, or the server could not do what it asks.
        """
        connection = self._child.connection
        while True:
            try:
                document, files = local.receive(connection)
                try:
                    reply, file = self._answer(document, files)
                finally:
                    local.close(files)
                local.send(connection, reply, [file.fd] if file is not None else [])
            except ClosedError:
                return False
            except ConsortiumError as error:
                with suppress(ClosedError):
                    local.send(connection, {"error": str(error), "kind": type(error).__name__})
                raise
            if document["call"] == "finished":
                return True

    def _answer(self, document: dict[str, Any], files: list[int]) -> Reply:
        name = wire.field(document, "call", str)
        if name not in self._calls:
            raise self._wrong(f"asked for {name[:40]!r}, which is nothing")
        return self._calls[name](document, files)

    def _wrong(self, what: str) -> IntegrityError:
        return IntegrityError(f"run '{self._run}': its process {what}; it was stopped")

    # Commits

    def _ready(self, document: dict[str, Any], _: list[int]) -> Reply:
        self._largest = int(wire.field(document, "layout_bytes", int) * SLACK) + (1 << 20)
        return {}, None

    def _load(self, _: dict[str, Any], __: list[int]) -> Reply:
        commit = self._archive.committed(self._run)
        if commit is None:
            return {}, None
        return {"sha256": commit.sha256}, Spooled(self._archive.open(self._run, commit))

    def _commit(self, document: dict[str, Any], files: list[int]) -> Reply:
        at = wire.field(document, "round", int), wire.field(document, "attempt", int)
        done, void = self._at()
        if at not in ((done, void), (done, void + 1), (done, 0), (done + 1, 0)):
            raise self._wrong(f"would commit round and attempt {at} after {(done, void)}")
        if len(files) != 1:
            raise self._wrong(f"would commit {len(files)} files where one is right")
        self._exchange.close(self._run)
        sha256, events = wire.field(document, "sha256", str), wire.field(document, "events", list)
        if any(not isinstance(e, dict) or e.get("kind") not in ("round", "evaluation") for e in events):
            raise self._wrong("reports what is neither round nor evaluation")
        for event in events:
            if event["kind"] == "round":
                self._archive.released(self._run, self._study, event)
        records = self._added(document, Counter(_PLURAL[str(event["kind"])] for event in events))
        self._archive.commit(self._run, *at, files[0], sha256, events, records)
        self._exchange.forget(self._run)
        self.commits += 1
        for event in events:
            if event["kind"] == "round":
                where = f"round {at[0] + 1}, attempt {at[1]}: " if event.get("void") else ""
                self._stage.committed(f"{where}{event.get('void', '')}")
        return {}, None

    def _records(self, document: dict[str, Any], _: list[int]) -> Reply:
        """Lines of the run's records that are kept, as many as fit."""
        kind, start = wire.field(document, "kind", str), wire.field(document, "start", int)
        if not 0 <= start < MOST_RECORDS:
            raise self._wrong(f"asked for record {start} of its {kind[:40]!r}")
        found = run_records.page(self._archive.store, self._run, kind, start)
        return {"records": [base64.b64encode(one).decode() for one in found]}, None

    def _keep(self, document: dict[str, Any], _: list[int]) -> Reply:
        """Keep lines of a run of an earlier version, whose files held them: no more than it has told of as events."""
        told = run_records.told(self._archive.store, self._run)
        run_records.keep(self._archive.store, self._run, self._added(document, told, past=True))
        return {}, None

    def _added(self, document: dict[str, Any], most: Counter[str], *, past: bool = False) -> dict[str, Added]:
        """The lines in a call. most: by kind, how many of them, or, of `past`, up to which place."""
        added = {}
        try:
            for kind, (first, lines) in wire.field(document, "records", dict).items():
                added[str(kind)] = Added(int(first), [base64.b64decode(one, validate=True) for one in lines])
        except (TypeError, ValueError) as error:
            raise self._wrong(f"hands over records that are none ({type(error).__name__})") from error
        for kind, one in added.items():
            kept = run_records.count(self._archive.store, self._run, kind)
            end = len(one.lines) + (one.first if past else 0)
            if kind not in HISTORIES or not 0 <= one.first <= kept or end > most[kind]:
                raise self._wrong(
                    f"hands over {len(one.lines)} records of {kind[:40]!r} from {one.first}, where {kept} are kept"
                )
        return added

    def _at(self) -> tuple[int, int]:
        """Rounds committed, and void attempts at the next."""
        commit = self._archive.committed(self._run)
        return (commit.round, commit.attempt) if commit is not None else (0, 0)

    def _finished(self, document: dict[str, Any], _: list[int]) -> Reply:
        status, why = wire.field(document, "status", str), wire.field(document, "why", str)
        if status not in (FINISHED, EARLY, FAILED):
            raise self._wrong(f"ended it as {status[:40]!r}")
        self._stage.end(status, why)
        return {}, None

    # The model

    def _seal(self, document: dict[str, Any], _: list[int]) -> Reply:
        """Sign the manifest of the exported model, if it lists a lineage that is this run's."""
        manifest = wire.field(document, "manifest", str).encode()
        came = wire.field(document, "lineage", str).encode()
        try:
            listed = json.loads(manifest)
            lineage = json.loads(came)
            found = {
                "federation": (listed["signed_by"], lineage["federation"]),
                "run": lineage["run"],
                "study": lineage["study"]["digest"],
                "lineage": listed["files"]["lineage.json"],
                "number of approvals": listed.get("approvals", 0),
            }
            model = lineage["model"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise self._wrong(f"asked to sign a malformed manifest ({type(error).__name__})") from error
        expected = {
            "federation": (self._federation, self._federation),
            "run": self._run,
            "study": self._study.digest,
            "lineage": hashlib.sha256(came).hexdigest(),
            "number of approvals": self._study.export.approvals,
        }
        for name, right in expected.items():
            if found[name] != right:
                raise self._wrong(f"asked to sign a model of another {name} than its own")
        if model not in self._models():
            raise self._wrong("asked to sign a model that none of its rounds committed")
        return {"signature": self._seal_with and self._seal_with(manifest)}, None

    def _models(self) -> set[str]:
        """Digests of the models that the run committed, as its events say."""
        models: set[str] = set()
        last = 0
        while events := self._archive.events(self._run, last):
            last = events[-1]["id"]
            models.update(str(one["model"]) for one in events if one["kind"] == "round" and not one["void"])
        return models

    # Sites

    def _sites(self, _: dict[str, Any], __: list[int]) -> Reply:
        """The sites at hand: before round 1, and for a process that was started again, once there are enough."""
        self._stage.hold(self._child)
        if not self._gathered:
            # The final evaluation moves nothing: sites that do not come must not keep the model from its end.
            trained = self._at()[0] >= self._study.rounds
            self._stage.until(
                self._child, self._too_few, self._study.cohort.deadline if trained else math.inf
            )
            self._gathered = True
        sites = sorted(self._willing(self._exchange.connected()))
        self._offered.update(sites)
        return {"sites": sites}, None

    def _interrupted(self, _: dict[str, Any], __: list[int]) -> Reply:
        """What the process before asked; its sites may be asked the same again, at hand or not."""
        asked = self._exchange.interrupted(self._run)
        if asked is not None:
            self._offered.update(str(site) for site in asked["cohort"]["sites"])
        return {"asked": asked}, None

    def _ask(self, document: dict[str, Any], files: list[int]) -> Reply:
        """Have the instructions signed and offered, if each is one that this run may send now."""
        headers = {}
        for site, text in wire.field(document, "headers", dict).items():
            headers[site] = str(text).encode()
            self._check(site, headers[site])
        key = self._archive.key_of(self._run)
        asked = document.get("asked")
        if asked is not None and not isinstance(asked, dict):
            raise self._wrong("describes what it asks by something else than a table")
        content = files[0] if files else None
        done = document.get("done", [])
        if not isinstance(done, list):
            raise self._wrong("names what it is done with by something else than a list")
        if not self._study.built_in:
            done = []  # a study's own code may keep hold of the files that it was given
        refused = self._exchange.ask(
            self._run, headers, content, self._largest, key, asked, [str(site) for site in done]
        )
        self._answered = set()
        return {"refused": refused}, None

    def _check(self, site: str, header: bytes) -> None:
        about = parse(header)
        if about.type != "instruction":
            raise self._wrong("asked to sign what is no instruction")
        fields = about.fields
        done, void = self._at()
        expected = {
            "run": self._run,
            "study": self._study.digest,
            "federation": self._federation,
            "round": done + (fields["kind"] == "train"),
            "attempt": void,
            "site": site,
        }
        for name, right in expected.items():
            if fields[name] != right:
                found = str(fields[name])[:80]
                raise self._wrong(
                    f"asked to sign an instruction for {name} {found!r} where {right!r} is right"
                )
        if fields["kind"] == "train" and done >= self._study.rounds:
            raise self._wrong(f"asked to sign round {done + 1} of a study of {self._study.rounds}")
        if site not in self._offered:
            raise self._wrong(f"asked to sign an instruction for site {site[:80]!r}, which is not at hand")
        if float(fields["expires"]) > time.time() + self._study.cohort.deadline + LATENESS:
            raise self._wrong("asked to sign an instruction that is valid beyond the study's deadline")

    def _answers(self, document: dict[str, Any], _: list[int]) -> Reply:
        seconds = float(document["seconds"]) if type(document.get("seconds")) in (int, float) else -1.0
        if not 0 <= seconds <= self._study.cohort.deadline + LATENESS:
            raise self._wrong("would wait for answers beyond the study's deadline")
        received = self._exchange.answers(self._run, seconds)
        if received is None:
            return {}, None
        self._answered.add(received.site)
        if received.reason:
            return {"site": received.site, "reason": received.reason}, None
        header = received.header.decode(errors="replace")
        return {"site": received.site, "header": header}, received.content

    def _wait(self, document: dict[str, Any], _: list[int]) -> Reply:
        """Wait for sites after void rounds; where all that are named are at hand, say whether to try again at once."""
        named = {str(site) for site in wire.field(document, "sites", list)}
        present = self._willing(self._exchange.connected())
        absent = named - present
        if named and not absent and not self._too_few(present):
            # Who was silent or away may do better now. Who answered, but without use, will do so again.
            return {"more": bool(named - self._answered)}, None
        away = self._exchange.away()
        who = "waits for one more site"
        if absent:
            who = "waits for " + ", ".join(f"{site} ({away.get(site, 'away')})" for site in sorted(absent))

        def missing(known: set[str]) -> str:
            return self._too_few(known) or ("" if self._willing(known) - present else who)

        self._stage.until(self._child, missing)
        return {"more": True}, None

    def _too_few(self, known: set[str]) -> str:
        """Why the sites at hand are too few for a round; empty where they are enough."""
        need, known = self._study.cohort.min_sites, self._willing(known)
        if len(known) >= need:
            return ""
        names = f" ({', '.join(sorted(known))})" if known else ""
        others = {site: how for site, how in self._exchange.away().items() if site not in self._without}
        away = [f"{site} ({how})" for site, how in others.items()][:MOST_NAMES]
        missing = f"; away: {', '.join(away)}" if away else ""
        what = "connected" if self._approved is None else "connected and have approved it"
        return f"{len(known)} of at least {need} sites are {what}{names}{missing}"

    def _willing(self, sites: Iterable[str]) -> set[str]:
        """Those that may be asked: all but those that the run is made without, and where the study waits for approvals
        those that have approved it."""
        found = set(sites) - self._without
        return found if self._approved is None else found & self._approved()
