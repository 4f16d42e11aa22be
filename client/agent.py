"""The agent: the program of a site that talks to the server. It dials out only, and imports nothing that computes.

One thread polls, always, also while work goes on; one works; one sends answers. An instruction that was verified
(`client/inbox.py`) goes through the policy to the run's worker (`client/work.py`), and what the worker says is checked
to be an answer to that instruction, signed with the site's identity key, and sent until it is taken
(`client/outbox.py`). Nothing is lost when the agent ends at any moment: the server asks again, and the worker gives
the answer that it kept (`client/store.py`).
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from consortium.client.audit import LONGEST, asked, site_audit
from consortium.client.hand import Hand
from consortium.client.heads import Log, Logs
from consortium.client.home import Home
from consortium.client.inbox import Taken
from consortium.client.link import Link
from consortium.client.outbox import Letter, Outbox, Outcome
from consortium.client.poller import Connector, Poller, Renew
from consortium.client.seen import Place, Seen
from consortium.client.work import Answered, Given, Interrupted, Work
from consortium.protocol import endings
from consortium.protocol.connection import Connection
from consortium.protocol.errors import ConsortiumError, IntegrityError, RefusedError
from consortium.protocol.files import sync_folder, write_private
from consortium.protocol.heads import LEDGER, packed
from consortium.protocol.keys import Lock
from consortium.protocol.messages import Answer, encode, parse
from consortium.protocol.sandbox import describe
from consortium.protocol.signing import ANSWER, sign

LONGEST_REASON = 2000
RECENT = 24 * 3600.0
"""Seconds for which a run that asks nothing keeps its copy of the data."""
TIDYING = 60.0
"""Seconds between two looks at what is not needed any more."""
PAUSED = "the site is paused by its operator"
ENDED = "the run has ended"
_ECHOED = ("run", "round", "attempt", "kind", "site", "nonce", "model")

_log = logging.getLogger("consortium.agent")


def paused_file(home: Home) -> Path:
    """The file whose being there says that the site is paused."""
    return home.folder / "paused"


class Agent:
    """One site's agent over its folder. `start` returns at once; `stop` leaves no thread and no process behind.

    work: does what is asked. renew: replaces the certificate in the folder, over a connection that it is given.
    studies: looks at what the server proposes, models: at the models that are used here, each over a connection.
    others: the site's logs beside the audit log, by name (`protocol/heads.py`).

    Raises:
        InputError, IntegrityError: the folder is not in order.
    """

    def __init__(
        self,
        home: Home,
        lock: Lock,
        work: Work,
        *,
        renew: Renew | None = None,
        studies: Callable[[Connection], None] | None = None,
        models: Callable[[Connection], None] | None = None,
        others: Mapping[str, Log] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._home, self._work, self._clock, self._others = home, work, clock, dict(others or {})
        self._identity = home.identity(lock)
        self._audit = site_audit(home, self._identity, clock)
        self._seen = Seen(home.seen_file, clock)
        self._logs = Logs(home, self._identity, self._audit, self._others, lambda: self._seen.epoch, clock)
        self._hand = Hand(clock)
        self._pause_file = paused_file(home)
        self._failed: set[str] = set()  # runs that the server said have failed, and may go on
        self._todo: queue.SimpleQueue[Taken | Callable[[], None] | None] = queue.SimpleQueue()
        self._ended = threading.Event()
        connect = Connector(home, lock)
        self._outbox = Outbox(connect, self._sent, clock)
        self._poller = Poller(
            home,
            lock,
            self._seen,
            self._hand,
            connect,
            paused=lambda: self.paused,
            kept=self._kept,
            put=self._take,
            ended=self._ended_runs,
            renew=renew,
            studies=studies,
            models=models,
            renewed=self._outbox.reconnect,
            note=self._audit.note,
            logs=self._logs,
            clock=clock,
        )
        self._worker = threading.Thread(target=self._work_loop, name="work", daemon=True)

    @property
    def link(self) -> Link:
        """How the agent stands with the server."""
        return self._poller.link

    def recent(self, run: str) -> bool:
        """Whether a run asked something lately."""
        return self._clock() - self._seen.heard(run) < RECENT

    def start(self) -> None:
        """Begin to poll, work and send."""
        self._audit.note("started", {"version": version("consortium"), "paused": self.paused})
        self._work.begin({run for run in self._seen.runs() if self.recent(run)}, self._seen.over())
        self._poller.start()
        self._worker.start()
        self._outbox.start()

    def stop(self, seconds: float = 4.0) -> None:
        """End within about so many seconds. Answers that were not sent are asked for again."""
        end = time.monotonic() + seconds
        self._ended.set()
        self._todo.put(None)
        self._poller.end()
        self._work.stop()
        self._outbox.stop(max(0.1, end - time.monotonic()))
        self._poller.join(max(0.1, end - time.monotonic()))
        if self._worker.is_alive():
            self._worker.join(max(0.1, end - time.monotonic()))
        self._safely(lambda: self._audit.note("stopped", {}))

    # What the operator asks, from any thread

    @property
    def paused(self) -> bool:
        """Whether the operator has paused the site."""
        return self._pause_file.exists()

    def pause(self) -> None:
        """Begin no work, and end what is under way; it lasts until `resume`, over restarts. An answer that is done
        is still sent."""
        if not self.paused:
            write_private(self._pause_file, b"")
            self._audit.note("paused", {})
            _log.info("paused by the operator")
            self._work.interrupt()
            self._poller.nudge()

    def resume(self) -> None:
        """Take part again."""
        if self.paused:
            self._pause_file.unlink(missing_ok=True)
            sync_folder(self._home.folder)
            self._audit.note("resumed", {})
            _log.info("resumed by the operator")
            self._poller.nudge()

    def status(self) -> dict[str, Any]:
        """One document about the agent; its keys stay."""
        config, link = self._home.config, self.link
        return {
            "running": True,
            "pid": os.getpid(),
            "federation": config.federation,
            "site": config.site,
            "server": f"{config.host}:{config.port}",
            "connected": link.up,
            "since": link.since,
            "error": link.error,
            "refused": link.refused,
            "paused": self.paused,
            "runs": self._hand.runs(),
            "certificate_expires": self._home.certificate.not_valid_after_utc.timestamp(),
            "trust_serial": self._poller.inbox.serial,
            "sandbox": describe(),
        }

    # What the poller calls

    def _kept(self) -> dict[str, str]:
        """The runs of which something may be kept here, and what the server said of each."""
        runs = self._seen.runs()[: endings.MOST_RUNS]
        return {run: endings.FAILED if run in self._failed else "" for run in runs}

    def _take(self, taken: Taken) -> None:
        self._failed.discard(taken.about.run)
        self._todo.put(taken)

    def _ended_runs(self, told: dict[str, str]) -> None:
        """Runs have ended: nothing is done for them any more, and what is kept of them goes. That a run has ended for
        good is durable first, so that nothing of it is ever computed again."""
        for run, word in told.items():
            for_good = word == endings.OVER
            if for_good:
                self._seen.end(run)
            self._audit.note("ended", {"run": run, "how": word}, durable=False)
            self._failed.add(run)
            self._work.end(run)
            self._todo.put(partial(self._work.finished, run, for_good))
            self._todo.put(self._poller.inbox.forget)
            _log.info(
                "run %s: has %s", run, "ended; what was kept of it is removed" if for_good else "failed"
            )

    # Working

    def _work_loop(self) -> None:
        while True:
            try:
                item = self._todo.get(timeout=TIDYING)
            except queue.Empty:
                self._safely(partial(self._work.tidy, self.recent))
                continue
            if item is None or self._ended.is_set():
                return
            if isinstance(item, Taken):
                self._do(item)
            else:
                self._safely(item)

    def _safely(self, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception:  # noqa: BLE001 - what it leaves undone is done the next time
            _log.exception("a fault of this program")

    def _do(self, taken: Taken) -> None:
        """Do one instruction; whatever goes wrong, the agent goes on. Nothing is done that the audit log does not tell
        of, so where that cannot be written the server asks again."""
        try:
            self._act(taken)
        except ConsortiumError as error:
            _log.error("run %s, round %d: %s", taken.about.run, taken.about.round, error)
            self._drop(taken, "failed", str(error))

    def _act(self, taken: Taken) -> None:
        """Do one instruction, and put the answer to it into the outbox."""
        about = taken.about
        vain = self._vain(taken)
        said = {"server": dict(self._logs.statement)} if self._logs.statement else {}
        self._audit.note("instruction", asked(about) | _signed_header(taken, vain) | said, durable=False)
        if vain:
            self._drop(taken, "not taken", vain)
            return
        try:
            answered = self._answered(taken)
        except RefusedError as error:
            answered = self._declined(taken, str(error))
        except Exception as error:  # noqa: BLE001 - it costs this instruction only
            if self._ended.is_set():
                return
            if self._clock() > about.expires:
                self._drop(taken, "failed", str(error))
                return
            if self._over(about.run):
                answered = self._declined(taken, ENDED)
            elif isinstance(error, Interrupted):
                answered = self._declined(taken, PAUSED)
            else:
                _log.error("run %s, round %d: %s", about.run, about.round, error, exc_info=_unexpected(error))
                fault = {"error": type(error).__name__, "text": str(error)[:LONGEST]}
                self._audit.note("fault", asked(about) | fault, durable=False)
                answered = self._declined(taken, "the site could not do the work; its log says more")
        if answered.freed and taken.content is not None:
            self._poller.inbox.reuse(taken.content)
        if self._over(about.run):
            self._drop(taken, "not taken", ENDED)
        else:
            self._send(taken, answered)

    def _vain(self, taken: Taken) -> str:
        """Why nobody waits for an answer to an instruction any more, or ""."""
        about, last = taken.about, self._seen.last(taken.about.run)
        if self._over(about.run):
            return ENDED
        if last is not None and Place.of(about) < last:
            return "the run has gone on"
        expired = self._clock() > about.expires and not taken.reason
        return "it expired before its turn" if expired else ""

    def _over(self, run: str) -> bool:
        """Whether the server has said that the run has ended, and it has not gone on since."""
        return run in self._failed or run in self._seen.over()

    def _answered(self, taken: Taken) -> Answered:
        if self.paused:
            raise RefusedError(PAUSED)
        if taken.reason or taken.study is None:
            raise RefusedError(taken.reason)
        self._hand.show(taken, "training" if taken.about.kind == "train" else "working")
        answered = self._work.answer(
            Given(
                taken.header,
                taken.about,
                taken.content,
                taken.study,
                taken.model,
                self._seen.epoch,
                taken.bundle,
                self._seen.latest,
            )
        )
        _check_answer(taken, answered)
        self._hand.show(taken, "sending")
        return answered

    def _spent(self) -> dict[str, str]:
        """The entry of the ledger up to which everything is charged that was computed."""
        return {"ledger": self._others[LEDGER].head.text} if LEDGER in self._others else {}

    def _declined(self, taken: Taken, reason: str) -> Answered:
        reason = reason.partition("\n")[0][:LONGEST_REASON]
        self._hand.show(taken, "declined", reason)
        answer = Answer.to_instruction(taken.about, status="declined", reason=reason)
        return Answered(encode(answer)[0])

    def _send(self, taken: Taken, answered: Answered) -> None:
        about = taken.about
        signature = sign(self._identity, ANSWER, answered.header)
        size = parse(answered.header).length
        said = {"header": answered.header.decode(), "signature": signature.hex(), "bytes": size}
        self._audit.note("answered", asked(about) | said | self._spent())
        self._outbox.put(
            Letter(
                about.nonce,
                about.run,
                answered.header,
                signature,
                answered.content,
                size,
                answered.key,
                about.expires,
                packed(self._logs.show(about.nonce)),
            )
        )

    def _sent(self, letter: Letter, outcome: Outcome, why: str) -> None:
        """The outbox is through with a letter."""
        if letter.content is not None:
            letter.content.close()
        taken = self._hand.done(letter.nonce)
        about = taken.about
        if outcome != "taken":
            self._hand.close(about.nonce)
            gone = {"what": outcome, "why": why[:LONGEST]}
            self._safely(lambda: self._audit.note("not taken", asked(about) | gone, durable=False))
            self._hand.show(taken, "late" if outcome == "late" else "not taken", why)
            return
        if self._hand.state(about.run) != "declined":
            self._hand.show(taken, "answered")

    def _drop(self, taken: Taken, state: str, why: str) -> None:
        """Give an instruction up without an answer."""
        self._hand.show(taken, state, why)
        self._hand.close(taken.about.nonce)


def _signed_header(taken: Taken, vain: str) -> dict[str, Any]:
    """An instruction as it was signed, and why nothing is done for it, where that is so."""
    why = vain or taken.reason
    said = {"header": taken.header.decode(), "signature": taken.signature.hex()}
    return said | {"refused": why} if why else said


def _unexpected(error: Exception) -> Exception | None:
    return None if isinstance(error, ConsortiumError) else error


def _check_answer(taken: Taken, answered: Answered) -> None:
    """Raises IntegrityError where what the work gave is no answer to this very instruction: it is not signed then."""
    parsed = parse(answered.header)
    size = answered.size
    echoed = all(parsed.fields.get(name) == getattr(taken.about, name) for name in _ECHOED)
    if parsed.type != "answer" or not echoed or parsed.length > size:
        raise IntegrityError("what the worker gave is not an answer to the instruction")
