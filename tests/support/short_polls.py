"""`consortium` with polls of two seconds, so that what takes a minute elsewhere takes seconds: python FILE WORDS..."""

from __future__ import annotations

import sys

from consortium.client import poller
from consortium.protocol import wire
from consortium.protocol.cli import main
from consortium.server import exchange

if __name__ == "__main__":
    wire.POLL_SECONDS = 2.0
    poller.SILENCE = 4.0
    exchange.GRACE = 5.0
    main(sys.argv[1:])
