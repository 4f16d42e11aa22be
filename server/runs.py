"""The runs under way, and how each stands: what the admin door asks.

A study has at most one run under way. Runs that were under way when the server ended, however it ended, are taken up
again when it starts.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from consortium.protocol import bundle
from consortium.protocol.errors import ConsortiumError, InputError, RefusedError
from consortium.protocol.files import private_folder
from consortium.protocol.study import Study
from consortium.server import rerun
from consortium.server.approvals import Approvals
from consortium.server.archive import Archive, Run
from consortium.server.child import COMMAND
from consortium.server.conversation import Seal
from consortium.server.endings import resumable
from consortium.server.exchange import Exchange
from consortium.server.history import History
from consortium.server.run_process import MODEL
from consortium.server.running import Running
from consortium.server.states import FAILED, OVER, PROPOSED

MOST_EVENTS = 1000

_log = logging.getLogger(__name__)


class Runs:
    """For any number of threads.

    folder: the server's; each run works in `runs/NAME` there. federation: its name. seal: signs a model's manifest.
    approvals: what sites decided.
    """

    def __init__(
        self,
        archive: Archive,
        exchange: Exchange,
        folder: Path,
        federation: str,
        command: tuple[str, ...] = COMMAND,
        seal: Seal | None = None,
        approvals: Approvals | None = None,
    ) -> None:
        self._seal, self._approvals = seal, approvals
        self._archive, self._exchange, self._federation = archive, exchange, federation
        self._folder = private_folder(folder / "runs")
        self._command = command
        self._lock = threading.RLock()
        self._running: dict[str, Running] = {}
        self._histories: dict[str, History] = {}
        self._closed = False

    def take_up(self) -> None:
        """Continue every run that has not ended."""
        self._exchange.sweep({run.name for run in self._archive.runs() if run.state not in OVER})
        for run in reversed(self._archive.runs()):
            if run.state not in OVER:
                _log.info("run %s: is taken up again", run.name)
                self._begin(run)

    def close(self) -> None:
        """End all processes; the runs are taken up again when the server starts."""
        with self._lock:
            self._closed = True
            running = list(self._running.values())
        threads = [threading.Thread(target=one.halt) for one in running]
        for thread in threads:
            thread.start()
        for thread, one in zip(threads, running, strict=True):
            thread.join()
            one.join()

    def start(self, study: str) -> str:
        """Begin a new run of a submitted study; returns its name. It waits until enough sites are at hand.

        Raises:
            InputError: there is no such study.
            RefusedError: a run of it is under way.
        """
        return self._start(study).name

    def rerun(self, name: str, without: Sequence[str], members: Collection[str]) -> dict[str, Any]:
        """Begin a run anew of the very study of a run before, without some sites, and without those that the run before
        was made without. name: the run's, or its study's for the latest. members: the sites that have joined. `notes`
        of what it returns says where the model's bits are not those of a run that the sites never joined.

        Raises:
            InputError: there is no such run, no site is named, or one is unknown.
            RefusedError: too few sites would be left, or a run of the study is under way.
        """
        before = self._find(name)
        study = Study.parse(before.text, source=f"the study of run '{before.name}'", code=self._code(before))
        # As if they had never joined the run before, which may itself have been without others: they stay out.
        out = self._archive.without(before.name)
        known = {*members, *out, *self._history(before.name).sites}
        without = sorted({*without, *out}) if without else without
        rerun.check(study, before.name, without, known, members)
        run = self._start(before.study, before, without)
        said = {"run": run.name, "of": before.name, "without": sorted(set(without))}
        return {**said, "notes": rerun.notes(study)}

    def _code(self, run: Run) -> Mapping[str, bytes]:
        content = self._archive.bundle_of(run.digest)
        return bundle.read(content).files if content is not None else {}

    def _start(self, study: str, of: Run | None = None, without: Collection[str] = ()) -> Run:
        with self._lock:
            before = self._archive.latest(study)
            if before is not None and before.state not in OVER:
                raise RefusedError(
                    f"study '{study}': run '{before.name}' is under way ({before.state}); end it first: "
                    f"consortium study stop {study}"
                )
            run = self._archive.propose(study, of, without)
            self._begin(run)
            return run

    def _begin(self, run: Run) -> None:
        with self._lock:
            if self._closed:
                raise ConsortiumError("the server ends; nothing is started any more")
            running = Running(
                run,
                self._archive,
                self._exchange,
                self._folder / run.name,
                self._federation,
                lambda: self._ended(run.name),
                self._command,
                self._seal,
                self._approvals,
            )
            self._running[run.name] = running
            running.start()

    def _ended(self, name: str) -> None:
        with self._lock:
            self._running.pop(name, None)

    def stop(self, name: str) -> None:
        """End a run for good; what was committed stays. name: the run's, or its study's for the latest.

        Raises:
            InputError: there is no such run.
            RefusedError: it has ended.
        """
        self._under_way(name).stop("by the admin")

    def pause(self, name: str) -> None:
        """Let the exchange under way end, and ask for no other. Raises as `stop`."""
        self._under_way(name).pause()

    def resume(self, name: str) -> None:
        """Go on with a paused run, or from the last commit of a failed one. Raises as `stop`."""
        run = self._find(name)
        if run.state != FAILED:
            self._under_way(name).resume()
            return
        with self._lock:
            before = self._running.get(run.name)
        if before is not None:
            before.join()  # it is about to be over
        with self._lock:
            if not resumable(self._archive, run.name):
                raise RefusedError(
                    f"run '{run.name}' failed before anything was committed, or another has begun since; "
                    f"begin a new one: consortium study start {run.study}"
                )
            self._begin(run)

    def _under_way(self, name: str) -> Running:
        with self._lock:
            run = self._find(name)
            running = self._running.get(run.name)
        if running is None or run.state in OVER:
            raise RefusedError(
                f"run '{run.name}' is not under way ({run.state}); "
                f"to begin another: consortium study start {run.study}"
            )
        return running

    def _find(self, name: str) -> Run:
        run = self._archive.latest(name) or self._archive.run(name)
        if run is None:
            known = any(one["name"] == name for one in self._archive.studies())
            what = f"study '{name}' has no run" if known else f"there is no study or run '{name[:80]}'"
            raise InputError(f"{what}; see: consortium study list")
        return run

    def process(self, name: str) -> int | None:
        """The process id of a run's process; None where it has none now."""
        with self._lock:
            running = self._running.get(name)
        return running.pid if running is not None else None

    # How they stand

    def list(self) -> list[dict[str, Any]]:
        """All runs, the newest first."""
        return [self._about(run) for run in self._archive.runs()]

    def show(self, name: str) -> dict[str, Any]:
        """A study's latest run, or the run of that name, as one document.

        Raises:
            InputError: there is neither.
        """
        run = self._archive.latest(name) or self._archive.run(name)
        if run is None:
            for one in self._archive.studies():
                if one["name"] == name:
                    nothing: dict[str, Any] = {
                        "without": [],
                        "sites": {},
                        "last_round": None,
                        "evaluation": None,
                        "model": None,
                        "privacy": None,
                        "round": 0,
                        "rounds": 0,
                    }
                    about = {
                        "study": name,
                        "digest": one["digest"],
                        "run": None,
                        "state": PROPOSED,
                        "why": "",
                    }
                    return {**about, "since": one["submitted"], **nothing}
            raise InputError(f"there is no study or run '{name[:80]}'; see: consortium study list")
        history = self._history(run.name)
        sites = {
            site: history.site(site, self._site_state(run, site))
            for site in sorted(self._sites(run, history))
        }
        folder = self._folder / run.name
        model = str(folder / MODEL) if (folder / MODEL).is_dir() else None
        evaluation = _result(folder).get("evaluation") or history.evaluation
        about = {**self._about(run), "last_round": history.moved}
        privacy = self._archive.published(run.study)
        return {**about, "sites": sites, "evaluation": evaluation, "model": model, "privacy": privacy}

    def events(self, name: str, after: int, seconds: float) -> dict[str, Any]:
        """Events of a study's latest run, or of the run of that name, with numbers above `after`; waits up to so many
        seconds for one while the run is not over. A state that is over came before the events were read.

        Raises:
            InputError: there is neither.
        """
        run = self._archive.latest(name) or self._archive.run(name)
        if run is None:
            about = self.show(name)
            self._archive.wait("", after, min(seconds, 1.0))  # nothing tells when a run begins
            return {"run": None, "state": about["state"], "why": about["why"], "events": []}
        found = self._archive.events(run.name, after, MOST_EVENTS)
        if not found and run.state not in OVER and self._archive.wait(run.name, after, seconds):
            run = self._archive.run(run.name) or run
            found = self._archive.events(run.name, after, MOST_EVENTS)
        return {"run": run.name, "state": run.state, "why": run.why, "events": found}

    def last_error(self, site: str) -> str | None:
        """Why a site was left out last, in the newest run in which it was asked; None where it counted since then."""
        for run in self._archive.runs()[:20]:
            history = self._history(run.name)
            if site in history.errors or site in history.rounds:
                return history.errors.get(site)
        return None

    def _about(self, run: Run) -> dict[str, Any]:
        commit = self._archive.committed(run.name)
        return {
            "run": run.name,
            "study": run.study,
            "digest": run.digest,
            "state": run.state,
            "why": run.why,
            "since": run.since,
            "without": sorted(self._archive.without(run.name)),
            "round": commit.round if commit is not None else 0,
            "rounds": _rounds(run.text),
        }

    def _sites(self, run: Run, history: History) -> set[str]:
        """Those that had a part in a run, and, while it is under way, all that belong to the federation."""
        if run.state in OVER:
            return history.sites
        at_hand = {*self._exchange.connected(), *self._exchange.away()} - self._archive.without(run.name)
        return {*history.sites, *at_hand}

    def _site_state(self, run: Run, site: str) -> str:
        """How a site stands in a run: over, working, ready (it answered, or was not asked), paused, not connected."""
        if run.state in OVER:
            return "over"
        presence = self._exchange.presence(site)
        if not presence.connected:
            return "not connected"
        if presence.paused:
            return "paused"
        return "working" if run.name in self._exchange.open_for(site) else "ready"

    def _history(self, name: str) -> History:
        with self._lock:
            history = self._histories.setdefault(name, History())
            while found := self._archive.events(name, history.last, MOST_EVENTS):
                for event in found:
                    history.add(event)
            return history


@lru_cache(256)
def _rounds(text: str) -> int:
    """How many rounds a study has; 0 where its text is damaged."""
    try:
        return Study.parse(text).rounds
    except InputError:
        return 0


def _result(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / "result.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}
