"""A thousand random roll-backs, truncations, forks and edits of the logs, by outsiders and by the holder of the key."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from founded import open_doors
from pair import SITE, Pair

from consortium.client.audit import verify_all
from consortium.protocol.audit import segments
from consortium.protocol.chain import Head, start_of
from consortium.protocol.chain_writer import Chain
from consortium.protocol.errors import IntegrityError
from consortium.protocol.heads import APPROVALS, AUDIT
from consortium.protocol.messages import canonical
from consortium.protocol.signing import CHAIN, sign
from consortium.server.audit import restores, verify
from consortium.server.audit_check import check
from consortium.server.heads import witnessed

ENTRIES = 90
TRIES = 250
"""Of each store; there are four."""


@dataclass
class Logbook:
    """One log on disk: its file, name and key, and what checks it."""

    path: Path
    name: str
    key: Ed25519PrivateKey
    check: Callable[[], object]


@pytest.fixture(scope="module")
def realm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Logbook]]:
    """A federation whose logs have `ENTRIES` entries and more, exchanged as they grew."""
    place = tmp_path_factory.mktemp("tampering")
    with open_doors(place / "fed") as doors:
        pair = Pair(doors, place / "site")
        for number in range(ENTRIES):
            pair.site.note("answered", {"number": number, "text": "x" * (number % 7)})
            pair.server.note("asked", {"number": number, "text": "x" * (number % 5)})
            if number % 3 == 0 or number == ENTRIES - 1:
                pair.say()
        identity = pair.home.identity(pair.home.lock())
        approvals = pair.home.folder / "approvals.log"
        decisions = Chain(approvals, f"approvals lung {SITE}", identity)
        for number in range(ENTRIES):
            body = {"federation": "lung", "site": SITE, "bundle": "b" * 64, "number": number}
            decisions.append("approved", body, float(number))
        earlier = [Head.parse(one) for one in pair.logs.history(SITE, doors.roster.identity(SITE))]
        seen = {AUDIT: pair.site.head, APPROVALS: decisions.head}
        federation, public = doors.federation, identity.public_key()
        heads = list(witnessed(doors.store, federation, restores(federation)).values())
        (site_file,), (server_file,) = segments(pair.home.audit), segments(pair.server_folder)

        def check_site() -> object:
            return verify_all(pair.home, public, seen, earlier)

        yield {
            "audit at the site": Logbook(site_file, pair.site.name, identity, check_site),
            "approvals at the site": Logbook(approvals, decisions.name, identity, check_site),
            "audit at the server": Logbook(
                server_file,
                pair.server.name,
                federation.instruction_key,
                lambda: verify(federation, heads),
            ),
        }


def resigned(lines: list[bytes], start: int, log: Logbook) -> list[bytes]:
    """The lines from `start` on, signed anew over what they say now, each over the one before."""
    previous = sha256(lines[start - 1]).hexdigest() if start else start_of(log.name).hash
    made = lines[:start]
    for number, line in enumerate(lines[start:], start + 1):
        fields = json.loads(line) | {"sequence": number, "previous": previous}
        del fields["signature"]
        made.append(canonical({**fields, "signature": sign(log.key, CHAIN, canonical(fields)).hex()}))
        previous = sha256(made[-1]).hexdigest()
    return made


def other(line: bytes) -> bytes:
    fields = json.loads(line)
    return canonical({**fields, "body": {**fields["body"], "other": True}})


def tampered(way: str, lines: list[bytes], log: Logbook, draw: random.Random) -> tuple[bytes, int]:
    """What is put in place of the log, and the number of the first entry that is not as it was."""
    at = draw.randrange(len(lines))
    if way == "one byte":
        changed = bytearray(lines[at])
        place = draw.randrange(len(changed))
        changed[place] ^= 1 << draw.randrange(7)
        lines = [*lines[:at], bytes(changed), *lines[at + 1 :]]
    elif way == "rolled back":
        lines = lines[:at]
    elif way == "cut within a line":
        return b"".join(line + b"\n" for line in lines[:at]) + lines[at][
            : draw.randrange(len(lines[at]))
        ], at + 1
    elif way == "an entry removed":
        lines = lines[:at] + lines[at + 1 :]
    elif way == "two exchanged":
        at = draw.randrange(len(lines) - 1)
        lines = [*lines[:at], lines[at + 1], lines[at], *lines[at + 2 :]]
    elif way == "edited by the owner":
        lines = resigned([*lines[:at], other(lines[at]), *lines[at + 1 :]], at, log)
    elif way == "an entry removed by the owner":
        lines = resigned(lines[:at] + lines[at + 1 :], at, log)
    elif way == "forked by the owner":
        more = draw.randrange(len(lines))
        lines = resigned([*lines[:at], *[other(one) for one in lines[at:]], *lines[:more]], at, log)
    return b"".join(line + b"\n" for line in lines), at + 1


WAYS = [
    "one byte", "rolled back", "cut within a line", "an entry removed", "two exchanged", "edited by the owner",
    "an entry removed by the owner", "forked by the owner",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("store", ["audit at the site", "approvals at the site", "audit at the server"])
def test_whatever_is_done_to_a_log_is_found_and_the_entry_named(
    realm: dict[str, Logbook], store: str
) -> None:
    """Every random change is found. What an outsider did is named to the entry; what the holder of the key rewrote, to
    those between two heads that the other side has kept."""
    log, draw = realm[store], random.Random(store)
    right = log.path.read_bytes()
    lines = right.splitlines()
    log.check()
    try:
        for _ in range(TRIES):
            way = draw.choice(WAYS)
            content, first = tampered(way, list(lines), log, draw)
            log.path.write_bytes(content)
            with pytest.raises(IntegrityError) as error:
                log.check()
            _assert_named(str(error.value), first, way)
    finally:
        log.path.write_bytes(right)
    log.check()


def _assert_named(text: str, first: int, way: str) -> None:
    found = re.search(r"one of the entries (\d+) to (\d+)", text)
    low, high = (int(found[1]), int(found[2])) if found else (0, 0)
    if not found:
        one = re.search(r"entry (\d+)", text)
        assert one, text
        low = high = int(one[1])
    if way == "an entry removed by the owner" and "is missing" in text:
        assert first <= low  # it is shorter than what was seen, and no head between tells more
        return
    # A line that was broken in two, or exchanged with the next, may be named by the one that follows it.
    assert low - 1 <= first <= high, f"{way} at {first}: {text}"
    if "owner" not in way:
        assert high - low <= 1, f"{way} at {first}: {text}"


@pytest.mark.slow
def test_decisions_that_the_server_keeps_are_found_changed_or_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines of the database that were edited, removed, cut off or exchanged: the entry is named."""
    monkeypatch.setattr("consortium.server.audit_check.PAUSE", 0.0)
    draw = random.Random(1)
    with open_doors(tmp_path / "fed") as doors:
        pair = Pair(doors, tmp_path / "site")
        key = pair.home.identity(pair.home.lock())
        decisions = Chain(tmp_path / "log", f"approvals lung {SITE}", key)
        for number in range(30):
            about = {"federation": "lung", "site": SITE, "bundle": f"{number:064x}"}
            decisions.append("approved", about, 1.0)
        lines = decisions.path.read_bytes().decode().splitlines()
        pair.logs._approvals._note = pair.server.note
        pair.logs._approvals.take(SITE, lines)
        assert check(doors.federation).decisions == 30
        rows = [tuple(row) for row in doors.store.rows("SELECT * FROM approvals ORDER BY sequence")]
        for _ in range(TRIES):
            at = draw.randrange(30)
            changed = [list(row) for row in rows]
            way = draw.choice(["edited", "removed", "rolled back", "exchanged"])
            if way == "edited":
                text = str(changed[at][-1])
                place = draw.randrange(len(text))
                changed[at][-1] = text[:place] + ("0" if text[place] != "0" else "1") + text[place + 1 :]
            elif way == "removed":
                del changed[at]
            elif way == "rolled back":
                del changed[at:]
            else:
                to = (at + 1 + draw.randrange(29)) % 30
                changed[at][-1], changed[to][-1], at = changed[to][-1], changed[at][-1], min(at, to)
            with doors.store.transaction() as db:
                db.execute("DELETE FROM approvals")
                db.executemany("INSERT INTO approvals VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", changed)
            with pytest.raises(IntegrityError) as error:
                check(doors.federation)
            named = [int(one) for one in re.findall(r"(?:entry|decision) (\d+)", str(error.value))]
            assert at + 1 in named or at + 2 in named, f"{way} at {at + 1}: {error.value}"
