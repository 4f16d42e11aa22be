"""The table between the site door and the runs."""

from __future__ import annotations

import os
import select
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from consortium.protocol.files import MEMORY
from consortium.protocol.messages import Instruction, Payload, encode
from consortium.server import exchange as module
from consortium.server.exchange import Exchange
from consortium.server.offers import Closed, Offer, Received, Spooled

MEMBERS = {"north", "south"}


@pytest.fixture
def exchange(tmp_path: Path) -> Exchange:
    return Exchange(lambda header: b"s" * 64, tmp_path, MEMBERS.__contains__)


def headers(
    run: str = "run", round: int = 1, sites: tuple[str, ...] = ("north", "south")
) -> dict[str, bytes]:
    """The headers of one instruction, by site."""
    payload = Payload({"shared": np.zeros(3, "<f4")})
    one = Instruction(
        "fed", run, round, 0, "train", "study", "model", "layout", f"{round:064}", 1e12, payload
    )
    return {site: encode(one.to(site))[0] for site in sites}


def ask(exchange: Exchange, **values: object) -> dict[str, Offer]:
    """Ask both sites; the offers that they find."""
    content = Spooled.new(exchange.spool)
    os.write(content.fd, bytes(12))
    assert exchange.ask("run", headers(**values), content.fd, 100) == {}  # type: ignore[arg-type]
    found = {site: exchange.offer(site, frozenset()) for site in MEMBERS}
    return {site: offer for site, offer in found.items() if offer is not None}


def test_each_site_finds_the_offer_that_is_its_own(exchange: Exchange) -> None:
    """A site is offered the instruction with its name and nonce, over one content file."""
    offers = ask(exchange)
    assert {site: offer.site for site, offer in offers.items()} == {"north": "north", "south": "south"}
    assert offers["north"].nonce != offers["south"].nonce
    assert offers["north"].content is offers["south"].content
    assert exchange.asked("north", offers["south"].nonce) is None


def test_an_offer_stays_until_it_is_answered(exchange: Exchange) -> None:
    """A site that lost its connection is offered the same again, one that has it is not, nor one that answered."""
    offer = ask(exchange)["north"]
    assert exchange.offer("north", frozenset()) is offer
    assert exchange.offer("north", frozenset([offer.nonce])) is None
    assert exchange.taken(offer, Received("north", b"header"))
    assert exchange.offer("north", frozenset()) is None
    assert not exchange.taken(offer, Received("north", b"header"))


def test_the_same_answer_again_is_known_and_another_is_not_taken(exchange: Exchange) -> None:
    """After an answer was taken, the same bytes are recognised and different ones are told apart."""
    offer = ask(exchange)["north"]
    assert exchange.repeated(offer.nonce, b"header") is None
    exchange.taken(offer, Received("north", b"header"))
    assert exchange.repeated(offer.nonce, b"header") is True
    assert exchange.repeated(offer.nonce, b"another") is False


def test_answers_come_in_any_order_and_end_when_all_are_in(exchange: Exchange) -> None:
    """The run is handed each answer once; when all have come it does not wait for the deadline."""
    offers = ask(exchange)
    for site in ("south", "north"):
        exchange.taken(offers[site], Received(site, b"h"))
    began = time.monotonic()
    came = [exchange.answers("run", 30.0) for _ in range(3)]
    assert [one and one.site for one in came] == ["south", "north", None]
    assert time.monotonic() - began < 5


def test_answers_to_what_is_not_asked_any_more_are_not_taken(exchange: Exchange) -> None:
    """When the run asks anew, what it asked before is closed, and nothing of it is handed over."""
    old, new = ask(exchange)["north"], ask(exchange, round=2)["north"]
    assert exchange.asked("north", old.nonce) is None
    assert not exchange.taken(old, Received("north", b"late"))
    assert exchange.asked("north", new.nonce) is new


def test_what_was_not_answered_in_time_is_known_to_be_late(exchange: Exchange) -> None:
    """When the time for answers is over, what is still open is closed: late for its own site alone, told apart from
    what was answered or never asked, and only the first late answer is news."""
    offers = ask(exchange)
    exchange.taken(offers["south"], Received("south", b"h"))
    assert exchange.late("north", offers["north"].nonce) is None
    assert exchange.answers("run", 0.0) is not None
    assert exchange.answers("run", 0.0) is None
    assert not exchange.taken(offers["north"], Received("north", b"late"))
    assert exchange.late("south", offers["north"].nonce) is None
    assert exchange.late("south", offers["south"].nonce) is None
    first, again = (exchange.late("north", offers["north"].nonce) for _ in range(2))
    assert first == (Closed("run", "north", "train", 1, 0), True)
    assert again == (Closed("run", "north", "train", 1, 0), False)
    assert exchange.repeated(offers["south"].nonce, b"h") is True


def test_few_closed_offers_are_remembered(exchange: Exchange, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rounds a site misses, memory does not grow; one site's do not displace another's."""
    monkeypatch.setattr(module, "MOST_CLOSED", 2)
    old = [ask(exchange, round=number)["north"].nonce for number in range(1, 8)]
    exchange.withdraw("run")
    known = [nonce for nonce in old if exchange.late("north", nonce) is not None]
    assert known == old[-2:]
    assert sum(len(closed) for closed in exchange._closed.values()) == 4


def test_who_is_away_is_named(tmp_path: Path) -> None:
    """Members that never came, went, or are paused, each with how."""
    one = Exchange(
        lambda _: b"", tmp_path, MEMBERS.__contains__, lambda: 0.5 + 86400, lambda: sorted(MEMBERS)
    )
    assert one.away() == {"north": "not connected", "south": "not connected"}
    with one.polling("north", False), one.polling("south", True):
        assert one.away() == {"south": "paused since 1970-01-02 00:00 UTC"}
    one.gone("north")
    assert one.away()["north"] == "not connected since 1970-01-02 00:00 UTC"


def test_withdrawing_wakes_whoever_waits_for_answers(exchange: Exchange) -> None:
    """A run that is stopped does not wait for its deadline."""
    ask(exchange)
    threading.Timer(0.1, exchange.withdraw, ["run"]).start()
    began = time.monotonic()
    assert exchange.answers("run", 30.0) is None
    assert time.monotonic() - began < 5


def test_a_site_that_is_shut_out_is_left_out_with_the_reason(exchange: Exchange) -> None:
    """Dropping a site ends what it is asked, and the run learns why at once."""
    ask(exchange)
    exchange.drop("north", "was revoked")
    received = exchange.answers("run", 5.0)
    assert received == Received("north", reason="was revoked")
    assert exchange.offer("north", frozenset()) is None


def test_who_is_no_member_is_neither_asked_nor_at_hand(exchange: Exchange) -> None:
    """A name that is not on the roster gets nothing, whatever asks for it."""
    refused = exchange.ask("run", headers(sites=("north", "stranger")), None, 100)
    assert set(refused) == {"stranger"}
    with exchange.polling("stranger", False):
        assert exchange.connected() == []
        assert exchange.offer("stranger", frozenset()) is None


def test_an_open_poll_is_woken_by_an_offer(exchange: Exchange) -> None:
    """The descriptor of a poll becomes readable when its site is asked, and not when another is."""
    with exchange.polling("north", False) as north, exchange.polling("south", False) as south:
        exchange.ask("run", headers(sites=("north",)), None, 100)
        assert select.select([north, south], [], [], 1.0)[0] == [north]


def test_presence_follows_polls(exchange: Exchange, monkeypatch: pytest.MonkeyPatch) -> None:
    """A site is at hand during a poll and shortly after it, and no more when its connection ended or time went by."""
    assert exchange.presence("north") == module.Presence(False, False, 0.0)
    with exchange.polling("north", False):
        assert exchange.connected() == ["north"]
    assert exchange.connected() == ["north"]
    exchange.gone("north")
    assert exchange.connected() == []
    with exchange.polling("north", False):
        pass
    monkeypatch.setattr(module, "GRACE", 0.0)
    assert exchange.connected() == []


def test_a_paused_site_is_at_hand_but_not_asked(exchange: Exchange) -> None:
    """A site that pauses says so with its poll, and no cohort is drawn from it."""
    with exchange.polling("north", True), exchange.polling("south", False):
        assert exchange.connected() == ["south"]
        assert exchange.presence("north").paused


def test_waiting_ends_when_another_site_comes(exchange: Exchange) -> None:
    """Whoever waits for more sites than it knows wakes when one comes, and not before."""
    assert not exchange.wait_more(set(), 0.01)
    ended: list[bool] = []
    waiter = threading.Thread(target=lambda: ended.append(exchange.wait_more({"south"}, 30.0)))
    waiter.start()
    with exchange.polling("south", False):
        waiter.join(0.1)
        assert waiter.is_alive()
        with exchange.polling("north", False):
            waiter.join(5.0)
            assert ended == [True]


def test_a_spooled_file_has_no_name_and_closes_by_itself(exchange: Exchange) -> None:
    """Nothing of an answer is left in the spool, nor as an open descriptor, when nobody refers to it; a small one is
    never on disk."""
    small = Path(f"/proc/self/fd/{Spooled.new(exchange.spool, MEMORY).fd}")
    assert not small.exists() or not str(small.readlink()).startswith("/memfd:")
    kept = Spooled.new(exchange.spool, MEMORY)
    assert str(Path(f"/proc/self/fd/{kept.fd}").readlink()).startswith("/memfd:")
    spooled = Spooled.new(exchange.spool, MEMORY + 1)
    place = Path(f"/proc/self/fd/{spooled.fd}")
    assert list(exchange.spool.iterdir()) == []
    assert str(place.readlink()).startswith(str(exchange.spool))
    del spooled
    assert not place.exists() or not str(place.readlink()).startswith(str(exchange.spool))


@pytest.mark.parametrize("done", [("north",), ()], ids=["done with", "still mapped"])
def test_a_large_file_is_written_over_once_its_run_is_done_with_it(
    exchange: Exchange, done: tuple[str, ...]
) -> None:
    """The file of a large answer is the room of a later one of that run, with nothing of what it held; but never while
    the run has it mapped, nor for another run."""
    offer = ask(exchange)["north"]
    content = exchange.room(offer, MEMORY + 9)
    os.pwrite(content.fd, b"before", MEMORY + 3)
    assert exchange.taken(offer, Received("north", offer.header, content))
    received = exchange.answers("run", 1.0)
    assert received is not None
    assert received.content is content
    del received
    exchange.ask("run", headers(round=2), None, 100, done=done)
    exchange.ask("other", headers("other"), None, 100)
    mine = exchange.offer("south", frozenset())
    assert mine is not None
    other = exchange.offer("south", frozenset({mine.nonce}))
    assert other is not None
    assert other.run == "other"
    assert exchange.room(other, MEMORY + 5) is not content
    now = exchange.room(offer_of(exchange, "run"), MEMORY + 5)
    assert (now is content) == bool(done)
    assert os.fstat(now.fd).st_size == (MEMORY + 5 if done else 0)
    assert os.lseek(now.fd, 0, os.SEEK_CUR) == 0
    assert exchange.room(offer_of(exchange, "run"), MEMORY + 5) is not now


def test_a_small_answers_file_is_not_held_back(exchange: Exchange) -> None:
    """It is memory, of which a run that asks nothing must hold none."""
    offer = ask(exchange)["north"]
    content = exchange.room(offer, 5)
    os.write(content.fd, b"small")
    assert exchange.taken(offer, Received("north", offer.header, content))
    exchange.answers("run", 1.0)
    exchange.ask("run", headers(round=2), None, 100, done=["north"])
    assert exchange.room(offer_of(exchange, "run"), 5) is not content


def offer_of(exchange: Exchange, run: str) -> Offer:
    """The open offer of a run to the site north."""
    found = exchange.offer("north", frozenset())
    assert found is not None
    assert found.run == run
    return found
