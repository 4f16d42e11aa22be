"""Answers of a site that lies to a running server, over the wire, with its own true keys and with others'."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from attacker import NOTHING, head
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from realm import SIZE, Actor, Frame, Realm, answer, wait_for

from consortium.protocol import heads, wire
from consortium.protocol.chain import Head
from consortium.protocol.heads import AUDIT, Shown
from consortium.protocol.messages import Payload, canonical, encode
from consortium.protocol.signing import ANSWER, INSTRUCTION, sign

MIB = 1 << 20


def nonce_of(siege: Realm, site: str) -> str:
    """The nonce that another site is asked with: what nobody but it and the server knows (here: the test)."""
    return siege.actor(site).asked().about.nonce


def left_out(siege: Realm, frame: Frame, why: str) -> None:
    """See that the round of `frame` counted the honest sites, and left mallory out for that reason."""
    event = siege.round(frame.about.round)
    assert set(event["admitted"]) >= {"alba", "bern"}
    assert "mallory" not in event["admitted"]
    assert why in event["left_out"]["mallory"]


@pytest.fixture(scope="module", autouse=True)
def goes_on(siege: Realm) -> Iterator[None]:
    """After all of it the run goes on, within what a round waits for a silent site."""
    yield
    siege.goes_on()


@pytest.fixture(autouse=True)
def amends(siege: Realm, mallory: Actor) -> Iterator[None]:
    """Answer honestly once after each test: a site that fails three times in a row is set aside for ever more rounds,
    and the next test would wait for it to be asked again."""
    yield
    frame = mallory.asked()
    assert mallory.put(frame.about.nonce, *answer(frame)).status == 200
    counted(siege, frame)


def counted(siege: Realm, frame: Frame) -> None:
    """See that mallory's answer counted in the round of `frame`, like the others'."""
    event = siege.round(frame.about.round)
    assert set(event["admitted"]) >= {"alba", "bern", "mallory"}
    assert event["left_out"].get("mallory") is None


# Whom an answer is from, and what it answers


def test_a_site_is_never_shown_what_another_is_asked(siege: Realm, mallory: Actor) -> None:
    """Whatever a poll names, the instruction that comes is mallory's own; paths that name alba get nothing."""
    frame = mallory.asked()
    assert frame.about.site == "mallory"
    with mallory.line() as line:
        for extra in ({"site": "alba"}, {"peer": "alba"}, {"have": [frame.about.nonce], "site": "alba"}):
            document = {"format": 1, "have": [], "paused": False, **extra}
            if not document["have"]:
                said = line.ask(
                    "POST", wire.POLL, json.dumps(document).encode(),
                    {"X-Site": "alba", "X-Forwarded-For": "10.0.0.1", "X-Client-Cert": "alba"},
                )  # fmt: skip
                assert said.status == 200
                assert b'"site":"alba"' not in said.body
                assert b'"site":"mallory"' in said.body
        assert (
            mallory.put(frame.about.nonce, *answer(frame)).status == 200
        )  # so that the next round begins at once
        other = nonce_of(siege, "alba")
        for path in (f"/v1/instructions/{other}", f"{wire.ANSWERS}{other}", f"{wire.POLL}?site=alba"):
            said = line.ask("GET", path)
            assert said.status in (404, 405)
            assert b"alba" not in said.body


def test_an_answer_for_another_sites_nonce_is_not_taken(siege: Realm, mallory: Actor, alba: Actor) -> None:
    """Mallory knows what alba is asked, and answers it first, in its own name and in alba's: 410 each time, or it is
    over; and alba's own answer counts in that round."""
    own = mallory.asked()
    assert mallory.put(own.about.nonce, *answer(own)).status == 200  # so that the next round begins at once
    theirs = alba.asked()
    names: list[dict[str, Any]] = [{"site": "mallory"}, {}]
    for changes in names:
        said = mallory.put(theirs.about.nonce, *answer(theirs, np.full(SIZE, 9, np.float32), **changes))
        assert said.status in (409, 410)
    assert "alba" in siege.round(theirs.about.round)["admitted"]


FORGED: dict[str, Callable[[Frame], dict[str, Any]]] = {
    "another site": lambda frame: {"site": "alba"},
    "the server's id as source": lambda frame: {"site": "server"},
    "the federation's name as source": lambda frame: {"site": frame.about.federation},
    "nobody": lambda frame: {"site": ""},
    "another nonce": lambda frame: {"nonce": os.urandom(32).hex()},
}


@pytest.mark.parametrize("what", list(FORGED))
def test_an_answer_in_another_name_is_left_out(siege: Realm, mallory: Actor, what: str) -> None:
    """For its own nonce, by its own key, but with another's name or nonce in it: 400, and mallory is left out."""
    frame = mallory.asked()
    said = mallory.put(frame.about.nonce, *answer(frame, **FORGED[what](frame)))
    assert said.status == 400
    left_out(siege, frame, "is not the answer to what this site was asked")


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "another run": ({"run": "other.1"}, "answers another run"),
    "a later round": ({"round": 10**9}, "late: answers round"),
    "another attempt": ({"attempt": 5}, "late: answers round"),
    "another kind": ({"kind": "evaluate"}, "answers another question"),
    "another model": ({"model": "0" * 64}, "answers another question"),
    "control characters": ({"run": "\x1b[2J\x07\n" + "x" * 100_000}, "answers another run"),
}


@pytest.mark.parametrize("what", list(WRONG))
def test_an_answer_to_something_else_is_left_out(siege: Realm, mallory: Actor, what: str) -> None:
    """A signed answer to its own nonce that says that it is about another run, round or model: the gate names it, on
    one short line without control characters."""
    changes, why = WRONG[what]
    frame = mallory.asked()
    assert mallory.put(frame.about.nonce, *answer(frame, **changes)).status == 200
    left_out(siege, frame, why)
    reason = siege.round(frame.about.round)["left_out"]["mallory"]
    assert reason.isprintable()
    assert len(reason) < 1000


def test_an_answer_of_a_site_that_lacks_what_was_seen_of_it_does_not_count(
    siege: Realm, mallory: Actor
) -> None:
    """Its own statement says that an older copy of its folder was put back: its answer is refused, and named, until
    the newest copy speaks."""

    def shown(sequence: int, *lacks: str) -> dict[str, str]:
        config = mallory.home.config
        about = Shown(
            "site", config.federation, "mallory", "0" * 64, time.time(), 0,
            {AUDIT: Head(sequence, f"{sequence:064x}")}, {}, lacks,
        )  # fmt: skip
        return heads.state(mallory.identity, about)

    frame = mallory.asked()
    header, content = answer(frame)
    body = wire.preamble(header, sign(mallory.identity, ANSWER, header)) + content
    with mallory.line() as line:
        said = line.ask(
            "PUT", wire.ANSWERS + frame.about.nonce, body, headers={wire.SHOWN: heads.packed(shown(5, AUDIT))}
        )
    assert said.status == 400
    left_out(siege, frame, "an older copy was put back")
    question = {"format": wire.FORMAT, "heads": shown(6), "nonce": "1" * 64}
    assert mallory.ask("POST", wire.HEADS, question).status == 200


def test_what_was_not_asked_is_not_taken(siege: Realm, mallory: Actor) -> None:
    """A nonce that nobody was given, and one that is no nonce: 410, and mallory can still answer what it was asked."""
    frame = mallory.asked()
    for nonce in (os.urandom(32).hex(), "0", "", "x" * 5000, "..;a=1", "alba"):
        assert mallory.put(nonce, *answer(frame, nonce=nonce)).status in (400, 410)
    assert mallory.put(frame.about.nonce, *answer(frame)).status == 200
    counted(siege, frame)


def test_the_first_of_two_answers_stands(siege: Realm, mallory: Actor) -> None:
    """Twice the same: taken once, 200 both times. Others after it: 409, and the first one counts."""
    frame = mallory.asked()
    with mallory.line() as line:
        first = answer(frame, weight=11.0)
        assert mallory.put(frame.about.nonce, *first, line=line).status == 200
        again = mallory.put(frame.about.nonce, *first, line=line)
        other = mallory.put(frame.about.nonce, *answer(frame, weight=77.0), line=line)
    # The round may be over by then, and with it what was asked.
    assert again.status in (200, 410)
    assert other.status in (409, 410)
    counted(siege, frame)
    assert siege.round(frame.about.round)["admitted"]["mallory"] == 11.0


def test_a_recorded_answer_counts_in_no_later_round(siege: Realm, mallory: Actor) -> None:
    """The very bytes of an earlier round, to their own nonce and to that of now: 410, and 400."""
    before = mallory.asked()
    recorded = answer(before)
    assert mallory.put(before.about.nonce, *recorded).status == 200
    counted(siege, before)
    wait_for(lambda: siege.latest() >= before.about.round, 10, "the round does not end")
    frame = mallory.asked()
    assert frame.about.round > before.about.round
    assert mallory.put(before.about.nonce, *recorded).status == 410
    assert mallory.put(frame.about.nonce, *recorded).status == 400
    left_out(siege, frame, "is not the answer to what this site was asked")


# Signatures


@pytest.mark.parametrize("signer", ["alba", "instruction key", "own, for another purpose", "fresh", "none"])
def test_only_the_sites_identity_signs_its_answers(
    siege: Realm, mallory: Actor, alba: Actor, signer: str
) -> None:
    """An otherwise perfect answer over mallory's connection, signed by another key or for another purpose: 400."""
    frame = mallory.asked()
    header, content = answer(frame)
    signatures = {
        "alba": sign(alba.identity, ANSWER, header),
        "instruction key": sign(siege.founded.instruction_key, ANSWER, header),
        "own, for another purpose": sign(mallory.identity, INSTRUCTION, header),
        "fresh": sign(Ed25519PrivateKey.generate(), ANSWER, header),
        "none": bytes(64),
    }
    said = mallory.put(frame.about.nonce, header, content, signature=signatures[signer])
    assert said.status == 400
    left_out(siege, frame, "signature")


@pytest.mark.parametrize("what", ["weight", "content", "signature"])
def test_one_changed_byte_is_noticed(siege: Realm, mallory: Actor, what: str) -> None:
    """Header, content or signature of a signed answer, changed on the way: 400, and it does not count."""
    frame = mallory.asked()
    header, content = answer(frame)
    signature = sign(mallory.identity, ANSWER, header)
    if what == "weight":
        header = header.replace(b'"weight":10.0', b'"weight":99.0')
    elif what == "content":
        content = bytes([content[0] ^ 1]) + content[1:]
    else:
        signature = bytes([signature[0] ^ 1]) + signature[1:]
    assert mallory.put(frame.about.nonce, header, content, signature=signature).status == 400
    left_out(siege, frame, "SHA-256" if what == "content" else "signature")


def test_an_answer_that_is_an_instruction_is_none(siege: Realm, mallory: Actor) -> None:
    """The instruction itself, sent back under a site's signature: 400."""
    frame = mallory.asked()
    assert mallory.put(frame.about.nonce, frame.header, frame.content).status == 400
    left_out(siege, frame, "is not the answer")


# Sizes


def test_a_content_beyond_what_the_model_needs_is_not_read(siege: Realm, mallory: Actor) -> None:
    """A header that announces 100 GB, or a little more than the cap: refused before any of it, named, and nothing of it
    is on the disk, where the others' small answers may be."""
    for numbers in (25 * 10**9, (MIB + 2 * 4 * SIZE) // 4):
        frame = mallory.asked()
        header, _ = answer(frame)
        about = json.loads(header)
        about["parts"][0]["shape"] = [numbers]
        said = mallory.put(frame.about.nonce, canonical(about))
        assert said.status == 400
        left_out(siege, frame, "the study's layout allows")
    assert siege.spooled() < MIB


def test_more_bytes_than_the_header_says_are_never_part_of_an_answer(siege: Realm, mallory: Actor) -> None:
    """A correct answer with 10 KB, or with 50 MB, behind it: 400; what follows is not taken for another request, and
    the same answer as it should be counts."""
    for extra in (10_000, 50 * MIB):
        frame = mallory.asked()
        header, content = answer(frame)
        smuggled = head("POST", wire.LEAVE, 13) + b'{"format": 1}'
        body = wire.preamble(header, sign(mallory.identity, ANSWER, header)) + content
        with mallory.line() as line:
            line.send(head("PUT", wire.ANSWERS + frame.about.nonce, len(body) + extra) + body)
            line.send(smuggled)
            line.flood(extra - len(smuggled))
            assert line.reply().status == 400
        assert mallory.put(frame.about.nonce, header, content).status == 200
        counted(siege, frame)


@pytest.mark.parametrize("cut", ["in the preamble", "in the header", "in the content", "by its length"])
def test_an_answer_that_broke_off_may_be_sent_again(siege: Realm, mallory: Actor, cut: str) -> None:
    """The connection ends within an answer, or its Content-Length is too short: nothing is taken, and the whole answer
    counts when it comes."""
    frame = mallory.asked()
    header, content = answer(frame)
    body = wire.preamble(header, sign(mallory.identity, ANSWER, header)) + content
    ends = {
        "in the preamble": 30,
        "in the header": 200,
        "in the content": len(body) - 1000,
        "by its length": len(body) - 1000,
    }
    with mallory.line() as line:
        length = ends[cut] if cut == "by its length" else len(body)
        line.send(head("PUT", wire.ANSWERS + frame.about.nonce, length) + body[: ends[cut]])
        if cut == "by its length":
            assert line.reply().status == 400
    assert mallory.put(frame.about.nonce, header, content).status == 200
    counted(siege, frame)


# Headers


def _deep(frame: Frame) -> bytes:
    return b'{"fields":' + b"[" * 200_000 + b"]" * 200_000 + b"}"


def _changed(**changes: Any) -> Callable[[Frame], bytes]:
    return lambda frame: canonical({**json.loads(answer(frame)[0]), **changes})


def _field(name: str, text: str) -> Callable[[Frame], bytes]:
    """A header in which a field's value is this JSON."""

    def made(frame: Frame) -> bytes:
        about = json.loads(answer(frame)[0])
        about["fields"][name] = "@"
        return canonical(about).replace(b'"@"', text.encode())

    return made


HEADERS: dict[str, Callable[[Frame], bytes]] = {
    "nested 200,000 deep": _deep,
    "no JSON": lambda frame: os.urandom(5000),
    "empty": lambda frame: b"",
    "a megabyte of spaces": lambda frame: b" " * MIB,
    "spaces in it": lambda frame: json.dumps(json.loads(answer(frame)[0])).encode(),
    "another key": _changed(more=1),
    "another format": _changed(format=2),
    "a part twice": lambda frame: _changed(parts=json.loads(answer(frame)[0])["parts"] * 2)(frame),
    "5,000 parts": _changed(
        parts=[{"place": "metric", "name": str(n), "dtype": "<f8", "shape": [0]} for n in range(5000)]
    ),
    "a negative shape": _changed(
        parts=[{"place": "vector", "name": "shared", "dtype": "<f4", "shape": [-1]}]
    ),
    "a huge shape": _changed(
        parts=[{"place": "vector", "name": "shared", "dtype": "<f4", "shape": [10**4000, 10**4000]}]
    ),
    "another dtype": _changed(parts=[{"place": "vector", "name": "shared", "dtype": "|O8", "shape": [1]}]),
    "a weight of NaN": _field("weight", "NaN"),
    "a weight of 1e999": _field("weight", "1e999"),
    "a weight without end": _field("weight", "1" * 100_000),
    "a round without end": _field("round", "9" * 4000),
    "a round with 100,000 digits": _field("round", "9" * 100_000),
    "half a surrogate": _field("reason", r'"\ud800"'),
    "a text for a number": _field("weight", '"10"'),
}


@pytest.mark.parametrize("what", list(HEADERS))
def test_a_malformed_header_costs_its_sender_alone(siege: Realm, mallory: Actor, what: str) -> None:
    """Signed by mallory and sent for its nonce: 400 (or, where the form is right, left out by the gate), never 500."""
    frame = mallory.asked()
    header = HEADERS[what](frame)
    said = mallory.put(frame.about.nonce, header, answer(frame)[1])
    assert said.status in ((400, 200) if what.startswith("a round without") else (400,))
    assert len(said.body) < 2000
    event = siege.round(frame.about.round)
    assert set(event["admitted"]) >= {"alba", "bern"}
    assert "mallory" in event["left_out"]
    assert event["left_out"]["mallory"].isprintable()


def test_a_header_beyond_its_limit_is_not_read(siege: Realm, mallory: Actor) -> None:
    """One of 4 GB is announced: 400 on its first bytes, and mallory may still answer."""
    frame = mallory.asked()
    with mallory.line() as line:
        line.send(
            head("PUT", wire.ANSWERS + frame.about.nonce, 1 << 33) + b"CSM1\xff\xff\xff\xff" + bytes(64)
        )
        assert line.reply().status == 400
    assert mallory.put(frame.about.nonce, *answer(frame)).status == 200
    counted(siege, frame)


# Contents that are well formed

POISON: dict[str, tuple[dict[str, Any], str]] = {
    "a NaN": ({"vector": np.full(SIZE, np.nan, np.float32)}, "not finite"),
    "one infinity": ({"vector": np.r_[np.zeros(SIZE - 1), np.inf].astype(np.float32)}, "not finite"),
    "huge numbers": ({"vector": np.full(SIZE, 3e38, np.float32)}, "too large"),
    "a number too few": ({"vector": np.zeros(SIZE - 1, np.float32)}, "shape"),
    "no number": ({"vector": np.zeros(0, np.float32)}, "shape"),
    "two dimensions": ({"vector": np.zeros((2, SIZE // 2), np.float32)}, "shape"),
    "another dtype": ({"vector": np.zeros(SIZE, np.float64)}, "dtype"),
    "a weight of 1e18": ({"weight": 1e18}, "above the study's cohort.max_weight"),
    "no weight": ({"weight": 0.0}, "weight"),
    "a negative weight": ({"weight": -5.0}, "weight"),
    "a tiny weight": ({"weight": 5e-324}, "weight"),
    "another vector": ({"payload": Payload({"control": np.zeros(SIZE, np.float32)})}, "vectors"),
    "statistics": (
        {"payload": Payload({"shared": np.zeros(SIZE, np.float32)}, {"n": np.ones(3)})}, "does not declare",
    ),
    "bytes": ({"payload": Payload({"shared": np.zeros(SIZE, np.float32)}, opaque=b"x" * 1000)}, "does not declare"),
    "metrics of NaN": ({"metrics": {"accuracy": np.array([math.nan, 10.0])}}, "not finite"),
    "impossible metrics": ({"metrics": {"accuracy": np.array([11.0, 10.0])}}, "metric"),
    "unknown metrics": ({"metrics": {"\x1b]0;x\x07" + "y" * 150: np.ones(2)}}, "has no name"),
    "a thousand metrics": ({"metrics": {f"m{n}": np.ones(2) for n in range(1000)}}, "sends 1000 metrics"),
    "no answer": ({"status": "declined", "reason": "\x1b[31m" + "spam\n" * 100_000}, "declined"),
}  # fmt: skip


@pytest.mark.parametrize("what", list(POISON))
def test_what_the_gate_refuses_is_left_out_and_named_while_the_run_goes_on(
    siege: Realm, mallory: Actor, what: str
) -> None:
    """Signed, whole and in form, and still no update: taken at the door, left out by the gate with a short reason, and
    the model stays finite."""
    changes, why = POISON[what]
    frame = mallory.asked()
    assert mallory.put(frame.about.nonce, *answer(frame, **changes)).status == 200
    event = siege.round(frame.about.round)
    assert set(event["admitted"]) >= {"alba", "bern"}
    assert why in event["left_out"]["mallory"]
    assert event["left_out"]["mallory"].isprintable()
    assert len(event["left_out"]["mallory"]) < 1000
    after = mallory.asked()
    assert np.isfinite(after.about.payload.vectors["shared"]).all()


def test_reasons_are_as_short_in_the_status_as_in_the_log(siege: Realm, mallory: Actor) -> None:
    """A reason of half a megabyte with escape sequences: what people are shown is one short line everywhere."""
    frame = mallory.asked()
    changes, _ = POISON["no answer"]
    assert mallory.put(frame.about.nonce, *answer(frame, **changes)).status == 200
    siege.round(frame.about.round)
    told = siege.admin("GET", "/v1/status").body + siege.admin("GET", f"/v1/studies/{siege.run}").body
    told += siege.log.encode()
    assert b"spam" in told
    assert b"spam" * 60 not in told.replace(b"?", b"")
    assert rb"\u001b" not in told
    assert b"\x1b" not in told


def test_nobody_polls_for_more_than_it_may(siege: Realm, mallory: Actor) -> None:
    """Polls that are no polls: 400 or 413, never 500, and the next one is answered."""
    polls: dict[bytes, int] = {
        b"": 400,
        b"[]": 400,
        b"nonsense": 400,
        b'{"format": 1, "have": "x", "paused": false}': 400,
        b'{"format": 1, "have": [1], "paused": false}': 400,
        b'{"format": 1, "have": [], "paused": 0}': 400,
        b'{"format": 2, "have": [], "paused": false}': 400,
        b'{"format": 1, "have": [' + b'"x",' * 64 + b'"x"], "paused": false}': 400,
        b'{"format": 1, "have": ["' + b"x" * 65 + b'"], "paused": false}': 400,
        b"[" * 60_000: 400,
        b'{"format": ' + b"9" * 60_000 + b"}": 400,
        b" " * (wire.MAX_DOCUMENT + 1): 413,
    }
    for body, status in polls.items():
        with mallory.line() as line:
            assert line.ask("POST", wire.POLL, body).status == status, body[:60]
    assert mallory.asked().about.site == "mallory"


def test_a_ninth_connection_of_a_site_takes_the_place_of_its_own(
    siege: Realm, mallory: Actor, alba: Actor
) -> None:
    """A site that opens 30 connections holds 8 of them; others are not touched."""
    lines = [mallory.line() for _ in range(30)]
    alive = sum(line.ask("GET", wire.TRUST) != NOTHING for line in reversed(lines))
    for line in lines:
        line.close()
    assert 1 <= alive <= 8
    assert alba.served()
    siege.goes_on()


def test_encode_is_what_the_test_thinks(siege: Realm, mallory: Actor) -> None:
    """The honest answer of these tests is a correct one: it counts."""
    frame = mallory.asked()
    assert encode(frame.about)[0] == frame.header
    assert mallory.put(frame.about.nonce, *answer(frame)).status == 200
    counted(siege, frame)
