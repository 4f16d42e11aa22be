"""The enrolment door over real TLS: what it takes, what it refuses, and how little it says."""

import json
import logging
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from founded import HOST, Doors, open_doors

from consortium.protocol import credentials, trust
from consortium.protocol.connection import Connection, StatusError, trusting
from consortium.protocol.joincode import proof_content
from consortium.protocol.signing import ANSWER, JOIN, raw, sign
from consortium.server.enrolment import MOST_FAILURES, WINDOW, Enrolment
from consortium.server.listener import Request
from consortium.server.roster import NO_ENTRY


@pytest.fixture
def one(tmp_path: Path) -> Iterator[Doors]:
    with open_doors(tmp_path / "fed") as doors:
        yield doors


class Applicant:
    """A site's keys, and the request that it sends."""

    def __init__(self, federation: str = "lung") -> None:
        self.identity = Ed25519PrivateKey.generate()
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.federation = federation

    def csr(self, name: str = "anything") -> str:
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        built = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(self.key, hashes.SHA256())
        return built.public_bytes(Encoding.PEM).decode()

    def request(self, site: str, secret: str, purpose: str = JOIN, csr: str = "") -> dict[str, Any]:
        csr = csr or self.csr()
        proof = sign(self.identity, purpose, proof_content(csr, self.federation, site)).hex()
        identity = raw(self.identity.public_key()).hex()
        return {
            "format": 1, "site": site, "secret": secret, "identity": identity, "csr": csr, "proof": proof,
        }  # fmt: skip


def send(one: Doors, document: Any, method: str = "POST", path: str = "/v1/join") -> dict[str, Any]:
    """One request over a pinned connection of its own; the answer's document."""
    context = trusting(one.federation.folder / "root.pem")
    connection = Connection(HOST, one.enrolment.port, context, timeout=10)
    try:
        return connection.request(method, path, document).document()
    finally:
        connection.close()


def refused(one: Doors, document: Any, method: str = "POST", path: str = "/v1/join") -> tuple[int, str]:
    """Status and text of a refusal."""
    with pytest.raises(StatusError) as caught:
        send(one, document, method, path)
    return caught.value.status, str(caught.value)


def test_an_invited_site_gets_certificate_and_trust(one: Doors) -> None:
    """A chain by the federation's root for the invitation's name over the applicant's key, and the statement."""
    secret, _ = one.roster.invite("hospital-1", 60)
    me = Applicant()
    answer = send(one, me.request("hospital-1", secret))
    chain = x509.load_pem_x509_certificates(answer["chain"].encode())
    credentials.check_issued(chain, one.federation.root, "the chain")
    assert credentials.common_name(chain[0]) == "hospital-1"
    assert credentials.same_key(me.key.public_key(), chain[0].public_key())
    assert trust.verified(answer["trust"], one.federation.root, "lung").serial == 1
    assert (answer["host"], answer["port"]) == (HOST, 0)
    assert one.roster.identity("hospital-1") == raw(me.identity.public_key()).hex()
    assert one.roster.admit(chain[0].public_bytes(Encoding.DER)) == "hospital-1"


def test_the_root_is_shown_to_anybody(one: Doors) -> None:
    """Its fingerprint is what a code holds."""
    said = send(one, None, "GET", "/v1/root")
    root = x509.load_pem_x509_certificate(said["root"].encode())
    assert credentials.fingerprint(root) == one.federation.root_fingerprint


@pytest.mark.parametrize("name", ["server", "hospital-2", "root", "lung"])
def test_no_certificate_is_for_another_name(one: Doors, name: str) -> None:
    """Whatever the request calls itself, the certificate has the invitation's name; a code for one site is none for
    another, not even where that is invited, too."""
    secret, _ = one.roster.invite("hospital-1", 60)
    one.roster.invite("hospital-2", 60)
    me = Applicant()
    assert refused(one, me.request("hospital-2", secret)) == (403, NO_ENTRY)
    answer = send(one, me.request("hospital-1", secret, csr=me.csr(name)))
    leaf = x509.load_pem_x509_certificates(answer["chain"].encode())[0]
    assert credentials.common_name(leaf) == "hospital-1"
    assert one.certificates() == 1


def test_every_refusal_says_the_same(one: Doors) -> None:
    """Unknown, guessed, used, expired: one status, one text, and nothing is issued."""
    used, _ = one.roster.invite("used", 3600)
    send(one, Applicant().request("used", used))
    late, _ = one.roster.invite("late", 10)
    one.clock.ahead = 11
    one.roster.invite("guessed", 3600)
    said = {
        refused(one, Applicant().request(site, secret))
        for site, secret in [("unknown", "ab" * 16), ("guessed", "ab" * 16), ("used", used), ("late", late)]
    }
    assert said == {(403, NO_ENTRY)}
    assert one.certificates() == 1


def test_a_repeated_request_gets_the_same_chain(one: Doors) -> None:
    """Its signatures differ each time; identity and key decide. Another of either is refused."""
    secret, _ = one.roster.invite("hospital-1", 60)
    me = Applicant()
    first = send(one, me.request("hospital-1", secret))
    assert send(one, me.request("hospital-1", secret)) == first
    other = Applicant()
    assert refused(one, other.request("hospital-1", secret)) == (403, NO_ENTRY)
    other.identity = me.identity
    assert refused(one, other.request("hospital-1", secret)) == (403, NO_ENTRY)
    assert one.certificates() == 1


def test_what_a_revoked_site_was_given_is_not_given_again(one: Doors) -> None:
    """The invitation ends with the site."""
    secret, _ = one.roster.invite("hospital-1", 60)
    me = Applicant()
    send(one, me.request("hospital-1", secret))
    one.roster.revoke("hospital-1")
    assert refused(one, me.request("hospital-1", secret)) == (403, NO_ENTRY)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2}, {"format": True}, {"format": "1"}, {"site": "Hospital"}, {"site": 7}, {"site": "a" * 64},
        {"site": "\ud800"}, {"secret": "ab" * 15}, {"secret": "AB" * 16}, {"secret": None}, {"secret": ["ab" * 16]},
        {"identity": "zz" * 32}, {"identity": ""}, {"proof": "00" * 64}, {"proof": "00" * 63}, {"csr": ""},
        {"csr": "é"}, {"csr": 5}, {"csr": "x" * 9000}, {"more": 1},
    ],
)  # fmt: skip
def test_malformed_requests(one: Doors, change: dict[str, Any]) -> None:
    """Each field is typed and measured before use; the code stays usable."""
    secret, _ = one.roster.invite("hospital-1", 60)
    me = Applicant()
    status, text = refused(one, me.request("hospital-1", secret) | change)
    assert status == 400
    assert secret not in text
    assert one.certificates() == 0
    assert send(one, me.request("hospital-1", secret))


def test_proofs_that_prove_nothing(one: Doors) -> None:
    """A proof for another request, federation, site or purpose, or by another identity."""
    secret, _ = one.roster.invite("hospital-1", 60)
    me, other = Applicant(), Applicant()
    good = me.request("hospital-1", secret)
    wrong = [
        good | {"csr": other.csr()},
        Applicant("heart").request("hospital-1", secret),
        good | {"proof": me.request("hospital-2", secret)["proof"]},
        me.request("hospital-1", secret, purpose=ANSWER),
        good | {"identity": raw(other.identity.public_key()).hex()},
    ]
    assert [refused(one, one_of_them)[0] for one_of_them in wrong] == [400] * len(wrong)
    assert one.certificates() == 0


def raw_request(one: Doors, body: bytes) -> int:
    context = trusting(one.federation.folder / "root.pem")
    connection = Connection(HOST, one.enrolment.port, context, timeout=10)
    try:
        return connection.request("POST", "/v1/join", body=[body], length=len(body)).status
    except StatusError as error:
        return error.status
    finally:
        connection.close()


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b"7", b"\xff\xfe", b"[" * 15000, b'{"format":1}', b"9" * 5000],
)
def test_bodies_that_are_no_request(one: Doors, body: bytes) -> None:
    """Not JSON, another kind of JSON, nested without end, incomplete."""
    assert raw_request(one, body) == 400


def test_a_large_body_is_not_read(one: Doors) -> None:
    """Beyond 16 KiB it is refused by its length."""
    assert raw_request(one, b" " * 16385) == 413


def test_other_routes_and_methods(one: Doors) -> None:
    """There are two routes, and nothing of the other doors."""
    assert refused(one, {}, "POST", "/v1/root")[0] == 405
    assert refused(one, None, "GET", "/v1/join")[0] == 405
    for path in ("/", "/v1/poll", "/v1/trust", "/v1/renew", "/v1/leave", "/v1/sites", "/v1/root/"):
        assert refused(one, None, "GET", path)[0] == 404


class Asked:
    """A request as the listener gives it to a handler."""

    method, path, address = "POST", "/v1/join", HOST

    def __init__(self, document: Any) -> None:
        self._content = json.dumps(document).encode()

    def read(self, limit: int) -> bytes:
        assert len(self._content) <= limit
        return self._content


def status(door: Enrolment, document: Any) -> int:
    request: Any = Asked(document)
    assert not isinstance(request, Request)
    return door.handle(request).status


def test_failures_are_limited(one: Doors) -> None:
    """So many a minute in all, of whatever kind; then no wrong secret is listened to, and a minute later all again.
    What succeeds does not count, and the right secret is served all the while."""
    now = 0.0
    door = Enrolment(one.federation, one.roster, clock=lambda: now)
    for place in range(30):
        secret, _ = one.roster.invite(f"s{place}", 60)
        assert status(door, Applicant().request(f"s{place}", secret)) == 200
    secret, _ = one.roster.invite("late", 3600)
    bad = Applicant().request("late", "ab" * 16)
    for place in range(MOST_FAILURES):
        now += 1
        assert status(door, bad if place % 2 else {"format": 1}) in (400, 403)
    assert [status(door, one) for one in (bad, Applicant().request("unknown", "ab" * 16))] == [429, 429]
    now += WINDOW - MOST_FAILURES
    assert status(door, bad) == 429
    assert status(door, Applicant().request("late", secret)) == 200
    now += 1
    assert status(door, bad) == 403


def test_a_right_secret_that_is_over_is_limited_as_a_wrong_one(one: Doors) -> None:
    """Where too many have failed, one that was used up and one that has expired are not looked at further."""
    door = Enrolment(one.federation, one.roster, clock=lambda: 0.0)
    used, _ = one.roster.invite("used", 3600)
    chain = send(one, Applicant().request("used", used))["chain"]
    leaf = x509.load_pem_x509_certificates(chain.encode())[0]
    assert one.roster.admit(leaf.public_bytes(Encoding.DER)) == "used"  # the invitation is over
    late, _ = one.roster.invite("late", 10)
    one.clock.ahead = 11
    for _ in range(MOST_FAILURES):
        assert status(door, {"format": 1}) == 400
    for site, secret in (("used", used), ("late", late)):
        assert status(door, Applicant().request(site, secret)) == 429


def test_many_at_once_get_no_further(one: Doors) -> None:
    """Attempts count from their beginning, so parallel ones do not pass the limit."""
    door = Enrolment(one.federation, one.roster)
    bad = Applicant().request("hospital-1", "ab" * 16)
    statuses: list[int] = []
    gate = threading.Barrier(60)

    def attempt() -> None:
        gate.wait(10)
        statuses.append(status(door, bad))

    threads = [threading.Thread(target=attempt) for _ in range(60)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(statuses) == [403] * MOST_FAILURES + [429] * (60 - MOST_FAILURES)


def test_refusals_take_the_same_time(one: Doors) -> None:
    """The medians for an unknown site, a guessed, a used and an expired code lie within a factor of two."""
    now = 0.0
    door = Enrolment(one.federation, one.roster, clock=lambda: now)
    used, _ = one.roster.invite("used", 3600)
    assert status(door, Applicant().request("used", used)) == 200
    late, _ = one.roster.invite("late", 10)
    one.clock.ahead = 11
    one.roster.invite("guessed", 3600)
    me = Applicant()
    asked = [
        me.request(site, secret)
        for site, secret in [("unknown", "ab" * 16), ("guessed", "ab" * 16), ("used", used), ("late", late)]
    ]
    taken: list[list[float]] = [[] for _ in asked]
    for _ in range(60):
        for times, document in zip(taken, asked, strict=True):
            now += WINDOW
            begun = time.perf_counter()
            assert status(door, document) == 403
            times.append(time.perf_counter() - begun)
    medians = [statistics.median(times) for times in taken]
    assert max(medians) < 2 * min(medians), medians


def test_the_secret_is_in_no_log(one: Doors, caplog: pytest.LogCaptureFixture) -> None:
    """Neither where it is taken nor where it is refused."""
    secret, _ = one.roster.invite("hospital-1", 60)
    with caplog.at_level(logging.DEBUG):
        refused(one, Applicant().request("hospital-2", secret))
        send(one, Applicant().request("hospital-1", secret))
    assert "hospital-1: joined" in caplog.text
    assert secret not in caplog.text


def test_somebody_is_told(one: Doors) -> None:
    """The server learns that a site has joined, so that it can close the door."""
    told: list[int] = []
    door = Enrolment(one.federation, one.roster, lambda: told.append(1))
    secret, _ = one.roster.invite("hospital-1", 60)
    assert status(door, Applicant().request("hospital-1", "ab" * 16)) == 403
    assert told == []
    assert status(door, Applicant().request("hospital-1", secret)) == 200
    assert told == [1]
