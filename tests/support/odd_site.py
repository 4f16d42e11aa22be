"""The agent of a site that does not do as it should: python FILE WAY FOLDER.

dead   takes what it is asked, and never answers
slow   answers, well after the deadline
lying  sends an update of NaN at once, properly signed
"""

from __future__ import annotations

import mmap
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from consortium.client import program
from consortium.client.home import Home
from consortium.client.work import Answered, Given, SiteWork
from consortium.protocol.messages import Answer, Payload, assemble, encode, parse

LATE = 1.5
"""Seconds after the deadline at which the slow one answers."""


class Odd(SiteWork):
    """A site's work, with a way of its own at training."""

    way = ""

    def answer(self, given: Given) -> Answered:
        """As `Work.answer`."""
        if given.about.kind != "train":
            return super().answer(given)
        if self.way == "dead":
            threading.Event().wait()
        if self.way == "slow":
            time.sleep(given.about.expires - time.time() + LATE)
        return _nonsense(given)


def _nonsense(given: Given) -> Answered:
    assert given.content is not None
    content = mmap.mmap(given.content.fileno(), 0, access=mmap.ACCESS_READ)
    model = assemble(parse(given.header), memoryview(content)).payload.vectors["shared"]
    payload = Payload({"shared": np.full_like(model, np.nan)})
    header, views = encode(Answer.to_instruction(given.about, weight=10.0, payload=payload))
    file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - the agent closes it
    file.write(b"".join(views))
    return Answered(header, file)


if __name__ == "__main__":
    Odd.way = sys.argv[1]
    vars(program)["SiteWork"] = Odd
    program.run(Home(Path(sys.argv[2])))
