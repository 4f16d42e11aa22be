"""The lines that checkpoints leave beside their files, kept in memory."""

from __future__ import annotations

from collections.abc import Iterator

from consortium.server.checkpoint import HISTORIES, Written


class Lines:
    """A `checkpoint.History`, and what adds to it."""

    def __init__(self) -> None:
        self.kept: dict[str, list[bytes]] = {kind: [] for kind in HISTORIES}

    def __call__(self, kind: str, count: int) -> Iterator[bytes]:
        yield from self.kept[kind][:count]

    def take(self, written: Written) -> str:
        """Keep what was written; the SHA-256 of its document."""
        for kind, (first, lines) in written.added.items():
            assert first <= len(self.kept[kind])
            self.kept[kind][first : first + len(lines)] = lines
        return written.sha256
