"""Who is connected to a door, and how many more may be: the counts behind `Caps`, safe for all threads."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass

from consortium.server.pace import Pace
from consortium.server.stream import Stream


@dataclass(frozen=True)
class Caps:
    """What connections may take.

    pending, per_address: open connections that are not admitted, in all and of one address (IPv6: of one /64).
        Sixteen addresses together take fewer than all.
    rate, burst: connections of one address a second, and at once, that are not admitted: one that is does not count.
    per_peer: open connections of one admitted peer; the oldest that rests gives way to a new one.
    seconds: for handshake and headers together, and for the headers of each later request.
    idle: between two requests. stall: for each 16 KiB of a body to come, and each 64 KiB of an answer to go.
    body_seconds: for the body, and again for the answer, of a request of an unadmitted peer, however fast it is; such a
    peer may rest for `seconds` only.
    """

    pending: int = 512
    per_address: int = 31
    rate: float = 20.0
    burst: int = 200
    per_peer: int = 8
    seconds: float = 5.0
    idle: float = 60.0
    stall: float = 30.0
    body_seconds: float | None = None


class Places:
    """The open connections of a door.

    A connection counts against all and its address until it is admitted, and against its peer from then on.
    """

    def __init__(self, caps: Caps) -> None:
        self._caps = caps
        self._lock = threading.Lock()
        self._streams: dict[Stream, threading.Thread] = {}
        self._pending: dict[Stream, str] = {}
        self._addresses: Counter[str] = Counter()
        self._pace = Pace(caps.rate, caps.burst)
        self.cuts = 0
        self.ended = False

    def __len__(self) -> int:
        return len(self._streams)

    def enter(self, stream: Stream, key: str, thread: threading.Thread) -> str:
        """Take a place for a connection that is counted under `key`; "", or why there is none."""
        caps = self._caps
        with self._lock:
            if self.ended:
                return "the door is closed"
            if self._addresses[key] >= caps.per_address:
                return f"{caps.per_address} connections of its address are open"
            if len(self._pending) >= caps.pending:
                return f"{caps.pending} connections wait to be admitted"
            if not self._pace.take(key):
                return f"its address opens more than {caps.rate:g} connections a second"
            self._streams[stream] = thread
            self._pending[stream] = key
            self._addresses[key] += 1
            return ""

    def leave(self, stream: Stream) -> None:
        """Give back the place of a connection that is closed."""
        with self._lock:
            self._streams.pop(stream, None)
            self._settle(stream)

    def _settle(self, stream: Stream) -> None:
        key = self._pending.pop(stream, None)
        if key is not None:
            self._addresses[key] -= 1
            if not self._addresses[key]:
                del self._addresses[key]

    def admit(self, stream: Stream, peer: str, cuts: int) -> str | None:
        """Count a connection as its peer's: "", or why it cannot be.

        cuts: what `self.cuts` was before the peer was looked up; None is returned where a cut came in between, and what
        was found may be out of date.
        """
        with self._lock:
            if cuts != self.cuts:
                return None
            others = [one for one in self._streams if one.peer == peer and not one.was_cut]
            if len(others) >= self._caps.per_peer:
                resting = next((one for one in others if one.resting), None)
                if resting is None:
                    return f"{self._caps.per_peer} connections of {peer} are at work"
                resting.cut()
            if stream in self._pending:
                self._pace.give_back(self._pending[stream])
            self._settle(stream)
            stream.peer = peer
            return ""

    def turn(self, stream: Stream, *, busy: bool) -> bool:
        """A request begins or ends; False where the door has closed meanwhile."""
        with self._lock:
            stream.busy, stream.resting = busy, not busy
            stream.until = stream.limit = None
            return not self.ended

    def cut(self, peer: str) -> int:
        """Cut all connections of a peer; how many."""
        with self._lock:
            self.cuts += 1
            streams = [one for one in self._streams if one.peer == peer]
        for stream in streams:
            stream.cut(resetting=True)
        return len(streams)

    def cut_late(self, now: float) -> None:
        """Cut all whose time is over (`now` as of `time.monotonic`)."""
        with self._lock:
            late = [one for one in self._streams if one.late(now)]
        for stream in late:
            stream.cut(resetting=True)

    def end(self) -> bool:
        """Let nobody in any more and cut all that have no request under way; False where that was done before."""
        with self._lock:
            if self.ended:
                return False
            self.ended = True
            resting = [one for one in self._streams if not one.busy]
        for stream in resting:
            stream.cut()
        return True

    def cut_all(self) -> None:
        """Cut every connection."""
        with self._lock:
            streams = list(self._streams)
        for stream in streams:
            stream.cut()

    def threads(self) -> list[threading.Thread]:
        """Those of all connections."""
        with self._lock:
            return list(self._streams.values())
