"""A run's process that asks for what it must not have: python lying_run.py LIE DESCRIPTOR."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from consortium.protocol.errors import IntegrityError
from consortium.protocol.messages import Answer, Instruction, encode
from consortium.protocol.study import Study
from consortium.server.link import Link, nameless

LIES: dict[str, Callable[[Instruction], Instruction | Answer]] = {
    "run": lambda one: replace(one, run="other.1"),
    "study": lambda one: replace(one, study="0" * 64),
    "federation": lambda one: replace(one, federation="other"),
    "round": lambda one: replace(one, round=one.round + 5),
    "replayed round": lambda one: replace(one, round=0),
    "attempt": lambda one: replace(one, attempt=7),
    "site": lambda one: replace(one, site="stranger"),
    "of another": lambda one: replace(one, site="b"),
    "expires": lambda one: replace(one, expires=one.expires + 3600),
    "answer": lambda one: Answer.to_instruction(one),
}


def _ask(link: Link, study: Study, first: dict[str, str], lie: str) -> None:
    names = link.call("sites")["sites"]
    honest = Instruction(
        first["federation"], first["run"], 1, 0, "train", study.digest, "m", "l", secrets.token_hex(32),
        time.time() + study.cohort.deadline,
    ).to(names[0])  # fmt: skip
    message = LIES[lie](honest)
    site = "stranger" if lie == "site" else names[0]
    link.call("ask", headers={site: encode(message)[0].decode()})


def _commit(link: Link, first: dict[str, str], lie: str) -> None:
    folder = Path(first["checkpoints"])
    files = [nameless(folder)] if lie != "no file" else []
    events: list[object] = [{"kind": "state", "state": "finished", "why": ""}] if lie == "state event" else []
    number = 5 if lie == "round 5" else 1
    link.call("commit", files, round=number, attempt=0, sha256="0" * 64, events=events)


def _seal(link: Link, study: Study, first: dict[str, str], lie: str) -> None:
    lineage = {
        "federation": "other" if lie == "seal federation" else first["federation"],
        "run": "other.1" if lie == "seal run" else first["run"],
        "study": {"digest": "0" * 64 if lie == "seal study" else study.digest},
        "model": "m",
    }
    text = json.dumps(lineage)
    listed = "0" * 64 if lie == "seal lineage" else hashlib.sha256(text.encode()).hexdigest()
    manifest = {"signed_by": first["federation"], "files": {"lineage.json": listed}}
    link.call("seal", manifest="[]" if lie == "seal nothing" else json.dumps(manifest), lineage=text)


def main(lie: str, descriptor: int) -> None:
    connection = socket.socket(fileno=descriptor)
    link = Link(connection)
    first = link.first()
    if lie == "garbage":
        connection.sendall(b"\xff" + os.urandom(1 << 16))  # no length that is allowed
    elif lie == "a gigabyte":
        connection.sendall((1 << 30).to_bytes(4, "big") + b"x" * (1 << 20))
    elif lie == "not an object":
        connection.sendall((2).to_bytes(4, "big") + b"[]")
    elif lie == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        link.call("nothing of the kind")
    elif lie == "status":
        link.call("finished", status="running", why="")
    elif lie == "forever":
        link.call("answers", seconds=1e9)
    elif lie in ("round 5", "no file", "state event"):
        _commit(link, first, lie)
    elif lie.startswith("seal "):
        _seal(link, Study.parse(first["study"]), first, lie)
    else:
        _ask(link, Study.parse(first["study"]), first, lie)
    time.sleep(60)


if __name__ == "__main__":
    try:
        main(sys.argv[1], int(sys.argv[2]))
    except IntegrityError:
        time.sleep(60)  # it was told no, and does not go by itself
