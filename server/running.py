"""One run while it is under way: its process, started again where it dies, and its state.

A process that dies is started again and continues from the last commit. One that asks for what it must not have
(`server/conversation.py`) has its run failed.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from consortium.protocol import bundle
from consortium.protocol.errors import ConsortiumError, IntegrityError, RefusedError
from consortium.protocol.files import private_folder, write_private
from consortium.protocol.local import ClosedError
from consortium.protocol.study import Study
from consortium.server.approvals import Approvals
from consortium.server.archive import Archive, Run, waits
from consortium.server.child import COMMAND, Child
from consortium.server.conversation import Conversation, Exchange, Missing, Seal
from consortium.server.states import APPROVALS, FAILED, PAUSED, RUNNING, STOPPED, VOIDED, WAITING

BUNDLE = "study.fab"
"""The file of a run's folder with its study."""
RESTARTS = 3
"""How often in a row a process is started again that ended by itself without having committed anything."""
PAUSES = (0.0, 0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
"""Seconds before one is started again that was killed, by how often in a row; after the last the run fails. What passes
by itself (memory that others need for a while) must not cost a run."""
LOOK_EVERY = 0.5
"""Seconds between two looks, while a run waits for sites, at whether it is to stop."""
_LEAVING = 10.0
"""Seconds that a process has to end after it has said how its run ended."""

_log = logging.getLogger(__name__)


class _Halted(Exception):  # noqa: N818 - it is no error
    """The run is to stop, or the server ends."""


class Running:
    """One run, in a thread of its own from `start` to its end.

    folder: the run's. over: called at the end, whatever it is. seal: signs the manifest of its model.
    approvals: what sites decided; without them nothing is waited for.
    """

    def __init__(
        self,
        run: Run,
        archive: Archive,
        exchange: Exchange,
        folder: Path,
        federation: str,
        over: Callable[[], None],
        command: tuple[str, ...] = COMMAND,
        seal: Seal | None = None,
        approvals: Approvals | None = None,
    ) -> None:
        self._seal, self._approvals = seal, approvals
        self._run, self._name = run, run.name
        self._archive, self._exchange = archive, exchange
        self._folder, self._federation, self._over = folder, federation, over
        self._command = command
        self._changed = threading.Condition()
        self._paused = run.state == PAUSED
        self._halted = self._ended = self._troubled = False
        self._child: Child | None = None
        self._thread = threading.Thread(target=self._main, name=f"run {run.name}", daemon=True)

    # What people ask

    def start(self) -> None:
        """Begin, or continue from the last commit."""
        if not self._paused:
            self._move(RUNNING)
        self._thread.start()

    def pause(self) -> None:
        """Let the exchange under way end and ask for no other; it survives a restart of the server."""
        with self._changed:
            self._refuse_if_ended()
            self._paused = True
            self._archive.move(self._name, PAUSED)

    def resume(self) -> None:
        """Go on after a pause."""
        with self._changed:
            self._refuse_if_ended()
            if self._paused:
                self._paused = False
                self._archive.move(self._name, RUNNING)
                self._changed.notify_all()

    def stop(self, why: str) -> None:
        """End the run for good; what was committed stays."""
        with self._changed:
            self._refuse_if_ended()
            self.end(STOPPED, why)
        self.halt()
        self.join()

    def halt(self) -> None:
        """Begin to end the process, without a word about the run: it continues when it is started again."""
        with self._changed:
            self._halted = True
            self._changed.notify_all()
            child = self._child
        if child is not None:
            child.end()

    def join(self, seconds: float | None = None) -> None:
        """Wait until nothing of it is left."""
        if self._thread.is_alive():
            self._thread.join(seconds)

    @property
    def pid(self) -> int | None:
        """The process id of its process, None where it has none now."""
        child = self._child
        return child.pid if child is not None and not child.ended.is_set() else None

    def _refuse_if_ended(self) -> None:
        if self._ended:
            raise RefusedError(f"run '{self._name}' has ended; see: consortium study show {self._run.study}")

    # Its thread

    def _main(self) -> None:
        try:
            self._supervise()
        except _Halted:
            pass
        except ConsortiumError as error:
            self._fail(str(error))
        except Exception as error:  # noqa: BLE001 - a fault of ours in one run must not end the others
            _log.exception("run %s: a fault in Consortium", self._name)
            self._fail(f"a fault in Consortium ({type(error).__name__}); the server's log says more")
        finally:
            self._exchange.withdraw(self._name)
            self._over()

    def _supervise(self) -> None:
        """Start the process, and again where it dies, until the run is over."""
        study = self._study()
        deaths = 0
        while True:
            self.hold()
            self._await_approvals(study)
            child = Child(private_folder(self._folder), self._first(), self._wake, self._command)
            try:
                with self._changed:
                    self._child = child
                    if self._halted:
                        raise _Halted
                talk = Conversation(
                    self._name,
                    self._federation,
                    study,
                    child,
                    self._archive,
                    self._exchange,
                    self,
                    self._seal,
                    self._approved(study),
                    self._archive.without(self._name),
                )
                if talk.hold():
                    child.ended.wait(_LEAVING)
                    return
            finally:
                child.close()
                self._exchange.withdraw(self._name)
            with self._changed:
                if self._halted:
                    raise _Halted
            deaths = 1 if talk.commits else deaths + 1
            how = child.death()
            _log.warning("run %s: %s", self._name, how)
            if deaths > (len(PAUSES) if child.killed else RESTARTS):
                again = f"consortium study resume {self._run.study}"
                raise ConsortiumError(
                    f"{how}; it died {deaths} times without a commit. Correct that, then: {again}"
                )
            self._rest(PAUSES[deaths - 1], f"{how}; it is started again")

    def _rest(self, seconds: float, why: str) -> None:
        """Wait before the process is started again, unless the run is to stop."""
        if seconds:
            self._move(RUNNING, why)
            self._troubled = True
        with self._changed:
            if self._changed.wait_for(lambda: self._halted, seconds):
                raise _Halted

    def _approved(self, study: Study) -> Callable[[], set[str]] | None:
        approvals, digest = self._approvals, self._archive.bundle_digest(self._run.digest)
        if approvals is None or digest is None or not waits(study):
            return None
        return lambda: approvals.approved(digest)

    def _await_approvals(self, study: Study) -> None:
        """Wait until enough sites have approved the study; nothing of it runs before, not even here."""
        digest = self._archive.bundle_digest(self._run.digest)
        if self._approvals is None or digest is None or not waits(study):
            return
        while why := self._approvals.missing(digest, study.cohort.approvals):
            self._move(APPROVALS, why)
            with self._changed:
                self._changed.wait(LOOK_EVERY)
            self.hold()
        self._move(RUNNING)

    def _study(self) -> Study:
        content = self._archive.bundle_of(self._run.digest)
        files = bundle.read(content).files if content is not None else {}
        study = Study.parse(self._run.text, source=f"the study of run '{self._name}'", code=files)
        if content is not None:
            write_private(private_folder(self._folder) / BUNDLE, content)
        if study.digest != self._run.digest:
            raise IntegrityError(
                f"run '{self._name}': the text of its study does not have the digest {self._run.digest} that sites "
                "approved; restore the database from a backup"
            )
        return study

    def _first(self) -> dict[str, Any]:
        return {
            "study": self._run.text,
            "bundle": BUNDLE if (self._folder / BUNDLE).exists() else "",
            "run": self._name,
            "federation": self._federation,
            "spool": str(self._exchange.spool.absolute()),
            "checkpoints": str(self._archive.folder.absolute()),
            "key": self._archive.key_of(self._name).secret.hex(),
        }

    def _wake(self) -> None:
        """The process has ended: whoever waits in its name stops."""
        with self._changed:
            self._changed.notify_all()
        self._exchange.withdraw(self._name)

    # State

    def _fail(self, why: str) -> None:
        try:
            self.end(FAILED, why)
        except ConsortiumError as error:  # a full disk: the run is taken up when the server starts again
            _log.error("run %s: failed, which cannot be kept: %s; %s", self._name, why, error)

    def until(self, child: Child, missing: Missing, seconds: float = math.inf) -> None:
        """Wait until `missing`, of the sites at hand, says nothing; what it says is why the run waits."""
        end = time.monotonic() + seconds
        while True:
            self.hold(child)
            known = set(self._exchange.connected())
            why = missing(known)
            if not why or time.monotonic() >= end:
                self._move(RUNNING)
                return
            self._move(WAITING, why)
            self._exchange.wait_more(known, LOOK_EVERY)

    def hold(self, child: Child | None = None) -> None:
        """Wait while the run is paused.

        Raises:
            _Halted: it is to stop.
            ClosedError: its process has died.
        """
        with self._changed:
            while self._paused and not self._halted and not (child and child.ended.is_set()):
                self._changed.wait()
            if self._halted:
                raise _Halted
        if child is not None and child.ended.is_set():
            raise ClosedError("the run's process has ended")

    def committed(self, void: str) -> None:
        """An attempt at a round is over. void: why it moved nothing, empty where it did."""
        if void or self._troubled:
            self._move(VOIDED if void else RUNNING, void)
        self._troubled = bool(void)

    def _move(self, state: str, why: str = "") -> None:
        with self._changed:
            if not (self._paused or self._ended or self._halted):
                self._archive.move(self._name, state, why)

    def end(self, state: str, why: str) -> None:
        """The run is over: its last state, unless it has one."""
        with self._changed:
            if not self._ended:
                self._archive.move(self._name, state, why)
                self._ended = True
        self._exchange.forget(self._name)
        self._exchange.rouse()
