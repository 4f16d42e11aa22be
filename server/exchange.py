"""What is asked of which site now, and what came back: the table between the site door and the runs.

A run asks its cohort (`ask`), each site's poll takes the offer that is meant for it (`offer`), and its answer is
spooled to a file and handed to the run (`taken`, `answers`). An offer stays until it is answered, the run asks anew or
ends, so a connection that breaks, or a site that starts anew, costs nothing but time. All of it is in memory; what was
asked, and the answers, are kept beside (`server/kept_answers.py`), and an interrupted run goes on with them.

What a site did not answer before the round was closed is remembered for a while, so that its answer, when it comes, is
known to be late: it is noted and never counted, and the site is told.

A site is at hand while a poll of its is open, and for a moment after one, or after an answer: after a cut its answer
may be here before its next poll.
"""

from __future__ import annotations

import hashlib
import os
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from consortium.protocol.files import MEMORY
from consortium.protocol.messages import Header, parse
from consortium.protocol.sealed import DataKey
from consortium.server.kept_answers import KeptAnswers
from consortium.server.offers import Closed, Offer, Received, Spooled

GRACE = 10.0
"""Seconds between two polls in which a site still counts as at hand."""
MOST_CLOSED = 16
"""Closed offers to one site that are remembered, the latest: an answer that is later than so many others is not told
from one to nothing."""


@dataclass
class _Asked:
    """What one run asks at the moment. waiting: offers by site. answered: digests of headers by nonce.
    kept: whether answers are kept until they are committed. read: large contents that the run was handed, by site.
    spare: large files of the run that nobody reads any more, to be written over."""

    waiting: dict[str, Offer]
    answered: dict[str, str] = field(default_factory=dict)
    came: queue.SimpleQueue[Received | None] = field(default_factory=queue.SimpleQueue)
    handed: int = 0
    total: int = 0
    kept: bool = False
    read: dict[str, Spooled] = field(default_factory=dict)
    spare: list[Spooled] = field(default_factory=list)


@dataclass
class _Closed:
    """An offer that was closed, and whether an answer to it has come since."""

    about: Closed
    answered: bool = False


@dataclass
class _Presence:
    """One site: descriptors that wake its open polls, and when one was last open."""

    wakes: set[int] = field(default_factory=set)
    last: float = 0.0
    since: float = 0.0
    paused: bool = False


@dataclass(frozen=True)
class Presence:
    """How a site stands. since: when it came or went, seconds since the epoch; 0 where it never came."""

    connected: bool
    paused: bool
    since: float


class Exchange:
    """For any number of threads.

    sign: gives the signature of an instruction's header. spool: a folder on the disk that answers are written to.
    member: whether a site belongs to the federation now. members: the names of all that do. asked: is told
    what a run is about to ask, and raises where that may not be.
    kept: where answers are kept until they are committed; without it, none are.
    """

    def __init__(
        self,
        sign: Callable[[bytes], bytes],
        spool: Path,
        member: Callable[[str], bool],
        clock: Callable[[], float] = time.time,
        members: Callable[[], Iterable[str]] = tuple,
        asked: Callable[[str, Sequence[Offer]], None] = lambda run, offers: None,
        kept: KeptAnswers | None = None,
    ) -> None:
        self._members, self._note_asked, self._kept = members, asked, kept
        self._sign, self.spool, self._member, self._clock = sign, spool, member, clock
        self._lock = threading.RLock()
        self._moved = threading.Condition(self._lock)
        self._sites: dict[str, _Presence] = {}
        self._asked: dict[str, _Asked] = {}
        self._closed: dict[str, OrderedDict[str, _Closed]] = {}  # by site and nonce

    # What the site door calls

    @contextmanager
    def polling(self, site: str, paused: bool) -> Iterator[int]:
        """While the block lasts the site is at hand; gives a descriptor that is readable when there is news for it."""
        wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        with self._lock:
            one = self._sites.setdefault(site, _Presence())
            if not self._at_hand(one) or one.paused != paused:
                one.since = self._clock()
            one.wakes.add(wake)
            one.paused = paused
            self._moved.notify_all()
        try:
            yield wake
            with self._lock:
                one.last = time.monotonic()
        finally:
            with self._lock:
                one.wakes.discard(wake)
                os.close(wake)

    def gone(self, site: str) -> None:
        """The site's connection ended: it is not at hand, unless another poll of its is open."""
        with self._lock:
            one = self._sites.get(site)
            if one is not None and not one.wakes:
                one.last, one.since = 0.0, self._clock()
                self._moved.notify_all()

    def offer(self, site: str, have: frozenset[str]) -> Offer | None:
        """An instruction that waits for this site and is not among the nonces that it has."""
        with self._lock:
            if not self._member(site):
                return None
            for asked in self._asked.values():
                offer = asked.waiting.get(site)
                if offer is not None and offer.nonce not in have:
                    return offer
            return None

    def open_for(self, site: str) -> list[str]:
        """Names of the runs whose instruction this site has not answered yet."""
        with self._lock:
            return [run for run, asked in self._asked.items() if site in asked.waiting]

    def asked(self, site: str, nonce: str) -> Offer | None:
        """The open offer of that nonce to that site."""
        with self._lock:
            for asked in self._asked.values():
                offer = asked.waiting.get(site)
                if offer is not None and offer.nonce == nonce:
                    return offer
            return None

    def repeated(self, nonce: str, header: bytes) -> bool | None:
        """Whether this very answer was taken before; None where that nonce was not answered."""
        with self._lock:
            for asked in self._asked.values():
                if nonce in asked.answered:
                    return asked.answered[nonce] == _digest(header)
            return None

    def taken(self, offer: Offer, received: Received, signature: bytes = b"") -> bool:
        """Hand an answer, or the reason why it is none, to the run; False where the offer is not open any more.

        signature: of an answer, which is kept with it.

        Raises:
            ConsortiumError: it cannot be kept: the disk is full, and the like. It may be sent again.
        """
        if self._kept is not None and not received.reason and self._keeps(offer):
            self._kept.keep(offer, signature, received)  # not under the lock: it may be long
        with self._lock:
            asked = self._asked.get(offer.run)
            if asked is None or asked.waiting.get(offer.site) is not offer:
                return False
            del asked.waiting[offer.site]
            asked.answered[offer.nonce] = _digest(received.header)
            self._sites.setdefault(offer.site, _Presence()).last = time.monotonic()
            asked.came.put(received)
            return True

    def room(self, offer: Offer, size: int) -> Spooled:
        """A file for the `size` bytes of an answer to `offer`; a large one is one of the run's own from before.

        Raises:
            OSError: the disk is full, and the like.
        """
        with self._lock:
            asked = self._asked.get(offer.run)
            spare = asked.spare.pop() if size > MEMORY and asked is not None and asked.spare else None
        return spare.over(size) if spare is not None else Spooled.new(self.spool, size)

    def _keeps(self, offer: Offer) -> bool:
        """Whether an answer to the offer is to be kept: it is open, and its run can be interrupted."""
        with self._lock:
            asked = self._asked.get(offer.run)
            return asked is not None and asked.kept and asked.waiting.get(offer.site) is offer

    def late(self, site: str, nonce: str) -> tuple[Closed, bool] | None:
        """The closed offer of that nonce to that site, and whether this is the first answer to it; None for no such."""
        with self._lock:
            of_site = self._closed.get(site)
            found = of_site.get(nonce) if of_site is not None else None
            if found is None:
                return None
            first, found.answered = not found.answered, True
            return found.about, first

    def drop(self, site: str, reason: str) -> None:
        """Take back all that is asked of a site: it does not belong to the federation any more."""
        with self._lock:
            for asked in self._asked.values():
                if asked.waiting.pop(site, None) is not None:
                    asked.came.put(Received(site, reason=reason))
            self._sites.pop(site, None)
            self._closed.pop(site, None)
            self._moved.notify_all()

    # What the runs call

    def connected(self) -> list[str]:
        """Names of the sites that can be asked now, sorted."""
        with self._lock:
            return sorted(
                name
                for name, one in self._sites.items()
                if self._at_hand(one) and not one.paused and self._member(name)
            )

    def away(self) -> dict[str, str]:
        """Members that cannot be asked now, by name, and since when or why."""
        here = set(self.connected())
        with self._lock:
            return {name: _how(self._sites.get(name)) for name in self._members() if name not in here}

    def presence(self, site: str) -> Presence:
        """How a site stands."""
        with self._lock:
            one = self._sites.get(site, _Presence())
            return Presence(self._at_hand(one), one.paused, one.since)

    def ask(
        self,
        run: str,
        headers: Mapping[str, bytes],
        content: int | None,
        largest: int,
        key: DataKey | None = None,
        asked: dict[str, Any] | None = None,
        done: Collection[str] = (),
    ) -> dict[str, str]:
        """Sign and offer each site its instruction; what the run asked before is withdrawn. A site whose answer to the
        same is kept is not asked: that answer is handed on.

        headers: of `messages.encode(instruction.to(site))`, by site. content: the descriptor of a file that all of them
        share; it is duplicated. key: what that file is encrypted under. largest: bytes of an answer's content.
        asked: what `interrupted` gives, where the run is interrupted. done: sites whose last answers' contents the run
        has no use for any more, nor a mapping of, so that their files may be written over.

        Returns reasons by site of those that cannot be asked.
        """
        shared = Spooled(os.dup(content), key) if content is not None else None
        offers, refused = {}, {}
        for site, header in headers.items():
            if not self._member(site):
                refused[site] = "does not belong to the federation any more"
                continue
            about: Header = parse(header)
            nonce = str(about.fields["nonce"])
            signature = self._sign(header)
            offers[site] = Offer(run, site, nonce, header, signature, shared, about.length, largest)
        before: dict[str, Received] = {}
        if self._kept is not None and asked is not None:
            before = self._kept.answers(run, {site: one.header for site, one in offers.items()}, largest)
            self._kept.begin(run, asked)
        self._note_asked(run, [one for site, one in offers.items() if site not in before])
        with self._lock:
            spare = self._spared(run, done)[: len(offers)]
            self.withdraw(run)
            waiting = {site: one for site, one in offers.items() if site not in before}
            now = self._asked[run] = _Asked(waiting, total=len(offers), kept=asked is not None, spare=spare)
            for received in before.values():
                now.answered[str(parse(received.header).fields["nonce"])] = _digest(received.header)
                now.came.put(received)
            for site in waiting:
                self._wake(site)
        return refused

    def answers(self, run: str, seconds: float) -> Received | None:
        """The next answer to what a run asked; None when all have come, time is over or the run asks no more."""
        with self._lock:
            asked = self._asked.get(run)
        if asked is None or asked.handed == asked.total:
            return None
        try:
            received = asked.came.get(timeout=max(0.0, seconds))
        except queue.Empty:
            self.close(run)
            with self._lock:  # one may have come at the last moment
                received = asked.came.get_nowait() if not asked.came.empty() else None
        asked.handed += received is not None
        if received is not None and received.content is not None and received.content.reusable:
            asked.read[received.site] = received.content
        return received

    def _spared(self, run: str, done: Collection[str]) -> list[Spooled]:
        """Files of a run that may be written over, once it is `done` with the contents of these sites' answers."""
        asked = self._asked.get(run)
        if asked is None:
            return []
        return [*(asked.read[site] for site in done if site in asked.read), *asked.spare]

    def asks(self, run: str) -> bool:
        """Whether something is asked in that name now."""
        with self._lock:
            return run in self._asked

    def interrupted(self, run: str) -> dict[str, Any] | None:
        """What the run asked last, where that is not over."""
        return self._kept.asked(run) if self._kept is not None else None

    def sweep(self, runs: set[str]) -> None:
        """Of all other runs than these nothing is kept any more."""
        if self._kept is not None:
            self._kept.sweep(runs)

    def forget(self, run: str) -> None:
        """What the run asked, and was answered, is over."""
        if self._kept is not None:
            self._kept.forget(run)

    def close(self, run: str) -> None:
        """What a run asked and was not answered is late from now on."""
        with self._lock:
            asked = self._asked.get(run)
            for offer in asked.waiting.values() if asked is not None else ():
                fields = parse(offer.header).fields
                place = int(fields["round"]), int(fields["attempt"])
                about = Closed(run, offer.site, str(fields["kind"]), *place)
                closed = self._closed.setdefault(offer.site, OrderedDict())
                closed[offer.nonce] = _Closed(about)
                while len(closed) > MOST_CLOSED:
                    closed.popitem(last=False)
            if asked is not None:
                asked.waiting.clear()

    def withdraw(self, run: str) -> None:
        """Take back what a run asked; whoever waits for its answers stops."""
        with self._lock:
            self.close(run)
            asked = self._asked.pop(run, None)
            if asked is not None:
                asked.came.put(None)

    def rouse(self) -> None:
        """Have every open poll look again at what it may answer."""
        with self._lock:
            for site in self._sites:
                self._wake(site)

    def wait_more(self, known: set[str], seconds: float) -> bool:
        """Wait until a site is at hand that is not among `known`; False where time is over first."""
        with self._moved:
            return self._moved.wait_for(lambda: bool(set(self.connected()) - known), seconds)

    def _at_hand(self, one: _Presence) -> bool:
        return bool(one.wakes) or (one.last > 0 and time.monotonic() - one.last < GRACE)

    def _wake(self, site: str) -> None:
        one = self._sites.get(site)
        for wake in one.wakes if one is not None else ():
            os.eventfd_write(wake, 1)


def _digest(header: bytes) -> str:
    return hashlib.sha256(header).hexdigest()


def _how(one: _Presence | None) -> str:
    """Why a site that is not at hand is not."""
    if one is None or not one.since:
        return "not connected"
    since = time.strftime("%Y-%m-%d %H:%M", time.gmtime(one.since))
    return f"{'paused' if one.paused and one.wakes else 'not connected'} since {since} UTC"
