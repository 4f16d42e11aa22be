"""Who may come in at the site door of a running server, tried with every kind of certificate but the right one."""

from __future__ import annotations

import ssl
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from attacker import Line, Said, blind, head, once, self_signed, showing
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from realm import Actor, Realm, answer, found, wait_for

from consortium.protocol import credentials, wire
from consortium.protocol.signing import ANSWER, sign
from consortium.server import pki
from consortium.server.federation import SERVER
from consortium.server.pki import Authority, Issued
from consortium.server.roster import Roster
from consortium.server.store import Store

DAY = 86400.0


def knock(siege: Realm, context: ssl.SSLContext | None) -> Said:
    """Ask the site door for what every site may have."""
    return once(siege.port, context, "GET", wire.TRUST)


def test_nobody_without_a_certificate_is_heard(siege: Realm, alba: Actor) -> None:
    """No certificate: the connection ends before any answer, and an honest site is served."""
    assert knock(siege, blind()).status == 0
    assert alba.served()


def test_another_federation_of_the_same_name_opens_nothing(siege: Realm, alba: Actor, tmp_path: Path) -> None:
    """Another root that calls federation and site by the same names: refused."""
    other = found(tmp_path / "other")
    key, chain = credentials.load(other.folder / "issuing.pem", other._lock)
    own = pki.new_key()
    made = pki.site_leaf(own.public_key(), Authority(key, chain[0]), "lung", "alba", time.time())
    context = showing(own, credentials.certificates(made.chain.encode(), "the test"))
    assert knock(siege, context).status == 0
    assert alba.served()


@pytest.mark.parametrize("where", ["its dates", "the roster"])
def test_an_expired_certificate_is_refused(siege: Realm, alba: Actor, where: str) -> None:
    """A certificate of alba's that stands on the roster, and is over by its own dates or by the roster's: refused,
    while alba's certificate of now is good."""
    key, chain = siege.leaf("alba")
    now = time.time()
    if where == "its dates":
        chain = [_over(chain[0], siege.authority, now - 60), *chain[1:]]
    ends = now + DAY if where == "its dates" else now - 60
    store = Store(siege.own / "consortium.db")
    try:
        issued = Issued(
            credentials.pem(chain).decode(), credentials.fingerprint(chain[0]), now - 60 * DAY, ends
        )
        Roster(store, lambda: now - 61 * DAY).renew("alba", lambda site, at: issued)
    finally:
        store.close()
    assert knock(siege, showing(key, chain)).status == 0
    assert alba.served()


def _over(leaf: x509.Certificate, authority: Authority, ends: float) -> x509.Certificate:
    """The same certificate, with other dates."""
    builder = x509.CertificateBuilder(
        leaf.issuer,
        leaf.subject,
        leaf.public_key(),
        leaf.serial_number,
        datetime.fromtimestamp(ends - 600, UTC).replace(tzinfo=None),
        datetime.fromtimestamp(ends, UTC).replace(tzinfo=None),
        list(leaf.extensions),
    )
    return builder.sign(authority.key, hashes.SHA256())


def test_a_stolen_issuing_key_opens_nothing(siege: Realm, alba: Actor) -> None:
    """A flawless certificate of this very authority for alba's name, which is not on the roster: refused."""
    assert knock(siege, showing(*siege.leaf("alba"))).status == 0
    assert alba.served()


def test_a_self_signed_certificate_opens_nothing(siege: Realm, alba: Actor) -> None:
    """With alba's name in it: refused."""
    assert knock(siege, self_signed("alba")).status == 0
    assert alba.served()


def test_the_servers_own_certificate_makes_no_client(siege: Realm, alba: Actor) -> None:
    """The doors' certificate and key, shown as a client's: refused."""
    assert knock(siege, showing(*credentials.load(siege.own / SERVER, siege.lock))).status == 0
    assert alba.served()


def test_a_site_makes_no_certificates_for_others(siege: Realm, alba: Actor, mallory: Actor) -> None:
    """A certificate for alba that mallory issued with its own leaf: refused."""
    key, chain = credentials.load(mallory.home.tls_file, mallory.home.lock())
    own = pki.new_key()
    made = pki.site_leaf(own.public_key(), Authority(key, chain[0]), "lung", "alba", time.time())
    forged = credentials.certificates(made.chain.encode(), "the test")
    assert knock(siege, showing(own, [*forged, *chain[1:]])).status == 0
    assert alba.served()


@pytest.mark.parametrize("door", ["port", "admin_port"])
def test_nothing_below_tls_1_3_is_spoken(siege: Realm, alba: Actor, door: str) -> None:
    """TLS 1.2, with a good certificate, and plain HTTP get no answer at the site door and the admin door."""
    port = getattr(siege.founded.config, door)
    context = showing(*credentials.load(alba.home.tls_file, alba.home.lock()))
    with Line(port, context):
        pass
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError):
        Line(port, context)
    with Line(port, None) as line:
        line.send(head("GET", wire.TRUST))
        assert line.reply("GET").status == 0
    assert alba.served()


def test_a_revoked_site_is_out_within_5_seconds_and_what_it_was_asked_is_taken_back(siege: Realm) -> None:
    """Its resting and its open connection end, also in the middle of an answer; its certificate, a renewed one and its
    answer are worth nothing any more; the round goes on and names it."""
    victim = siege.join("victim")
    resting, within = victim.line(), victim.line()
    assert resting.ask("GET", wire.TRUST).status == 200
    frame = victim.asked()
    header, content = answer(frame)
    body = wire.preamble(header, sign(victim.identity, ANSWER, header)) + content
    within.send(head("PUT", wire.ANSWERS + frame.about.nonce, len(body)) + body[:500])
    begun = time.monotonic()
    assert siege.admin("POST", "/v1/sites/victim/revoke").status == 200
    assert resting.ended(5)
    assert within.ended(5)
    assert time.monotonic() - begun < 5
    assert not victim.served()
    assert victim.put(frame.about.nonce, header, content).status == 0
    event = siege.round(frame.about.round)
    assert "victim" not in event["admitted"]
    assert event["left_out"]["victim"] == "was revoked"
    status = siege.admin("GET", "/v1/status").document
    sites = {one["name"]: one for one in status["sites"]}
    assert (sites["victim"]["status"], sites["victim"]["connected"], sites["victim"]["asked"]) == (
        "revoked", False, [],
    )  # fmt: skip
    siege.goes_on()


def test_a_site_that_left_is_not_served_over_the_connection_that_it_has(siege: Realm) -> None:
    """After `leave`, over the same connection: no study, no trust statement, no renewal, no instruction."""
    leaver = siege.join("leaver")
    csr = "-----BEGIN CERTIFICATE REQUEST-----\n-----END CERTIFICATE REQUEST-----\n"
    digest = siege.admin("GET", "/v1/studies").document["studies"][0]["digest"]
    with leaver.line() as line:
        assert line.ask("GET", wire.STUDIES + digest).status == 200
        assert line.ask("POST", wire.LEAVE, b'{"format": 1}').status == 200
        said = [
            line.ask("GET", wire.STUDIES + digest),
            line.ask("GET", wire.TRUST),
            line.ask("POST", wire.RENEW, f'{{"format": 1, "csr": {csr!r}}}'.encode()),
        ]
        assert [one.status for one in said if one.status not in (0, 403)] == []
    assert not leaver.served()
    wait_for(lambda: "leaver" not in _connected(siege), 5, "it still counts as connected")


def _connected(siege: Realm) -> list[str]:
    return [one["name"] for one in siege.admin("GET", "/v1/sites").document["sites"] if one["connected"]]
