"""Join codes at a running server: used, expired, altered, guessed, and requests that want more than a code gives."""

from __future__ import annotations

import json
import os
import random
import secrets
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from attacker import Line, Said, blind, closed, once, showing
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from realm import Realm, found, realm, wait_for

from consortium.client import joining
from consortium.client.certificate import request_for
from consortium.protocol import credentials, wire
from consortium.protocol.errors import InputError, IntegrityError
from consortium.protocol.joincode import JoinCode, proof_content
from consortium.protocol.signing import JOIN, raw, sign
from consortium.server import pki

# In order: the last test uses up the wrong attempts of a minute, and all before it less than that.


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Realm]:
    """A federation of its own, since guessing has its enrolment door refuse what is wrong for a minute."""
    with realm(tmp_path_factory.mktemp("gate")) as one:
        yield one


def attempt(gate: Realm, code: JoinCode, **changes: Any) -> Said:
    """A request to join as a program sends it, with fields changed."""
    identity, key = Ed25519PrivateKey.generate(), pki.new_key()
    csr = changes.pop("csr", None) or request_for(key, code.site)
    proof = sign(identity, JOIN, proof_content(csr, code.federation, code.site))
    document = {
        "format": 1, "site": code.site, "secret": code.secret, "identity": raw(identity.public_key()).hex(),
        "csr": csr, "proof": proof.hex(), **changes,
    }  # fmt: skip
    return knock(gate, json.dumps(document).encode())


def knock(gate: Realm, body: bytes) -> Said:
    """A request to join of any bytes."""
    return once(gate.founded.config.enrol_port, blind(), "POST", wire.JOIN, body=body)


def code(gate: Realm, site: str, hours: float = 1.0) -> JoinCode:
    """Invite a site; its code, read."""
    return JoinCode.parse(gate.invited(site, hours))


def test_enrolment_listens_only_while_a_code_is_outstanding(gate: Realm) -> None:
    """No invitation: connections are refused. An invitation: open. Joined: refused again, within housekeeping's pace;
    and a code that is revoked closes it at once."""
    port = gate.founded.config.enrol_port
    assert closed(port)
    given = gate.invited("first")
    assert not closed(port)
    joined = joining.join(given, gate.folder / "clients" / "first", proxy="")
    assert joined.problem == ""
    wait_for(lambda: closed(port), 8, "still open after the join")
    gate.invited("unwanted")
    assert not closed(port)
    assert gate.admin("POST", "/v1/sites/unwanted/revoke").status == 200
    wait_for(lambda: closed(port), 2, "still open after the code was revoked")


@pytest.mark.slow
def test_enrolment_closes_when_the_last_code_expires(gate: Realm) -> None:
    """Nobody used it: within housekeeping's pace connections are refused."""
    gate.invited("brief", 1.0 / 3600)
    assert not closed(gate.founded.config.enrol_port)
    wait_for(lambda: closed(gate.founded.config.enrol_port), 8, "still open after the code expired")


def test_the_door_opens_anew_at_once_after_it_closed(gate: Realm) -> None:
    """Revoke and invite one right after the other, ten times: each code comes, and the door is open for it."""
    for _ in range(10):
        gate.invited("again")
        assert not closed(gate.founded.config.enrol_port)
        assert gate.admin("POST", "/v1/sites/again/revoke").status == 200
    gate.invited("again")
    assert not closed(gate.founded.config.enrol_port)
    assert gate.admin("POST", "/v1/sites/again/revoke").status == 200


def test_used_expired_foreign_and_misused_codes_get_one_answer(gate: Realm, tmp_path: Path) -> None:
    """A code used by another, an expired one, one of another federation, one for another site, a revoked one, one that
    was replaced: 403 with the very same text, and nobody has joined by it."""
    used = code(gate, "used")
    joining.join(used.text(), gate.folder / "clients" / "used", proxy="")
    expired = code(gate, "expired", 0.3 / 3600)
    revoked = code(gate, "shut-out")
    gate.admin("POST", "/v1/sites/shut-out/revoke")
    replaced = code(gate, "target")
    target = code(gate, "target")
    own = code(gate, "own")
    foreign = replace(target, secret=secrets.token_bytes(16).hex(), federation="lung")
    time.sleep(0.3)
    said = [
        attempt(gate, used), attempt(gate, expired), attempt(gate, revoked), attempt(gate, replaced),
        attempt(gate, foreign), attempt(gate, replace(target, secret=own.secret)),
        attempt(gate, replace(own, site="first")), attempt(gate, replace(own, site="nobody")),
    ]  # fmt: skip
    assert {(one.status, one.body) for one in said} == {(403, said[0].body)}
    sites = {one["name"]: one["status"] for one in gate.admin("GET", "/v1/sites").document["sites"]}
    assert (sites["target"], sites["own"], sites["shut-out"]) == ("invited", "invited", "revoked")
    assert attempt(gate, target).status == 200
    assert attempt(gate, own).status == 200


def test_a_code_altered_by_one_character_is_noticed_before_anything_is_sent(gate: Realm) -> None:
    """Each character of a code, changed into another: it is mistyped, and the error does not show it."""
    text = gate.invited("typo")
    random_ = random.Random(1)
    for place in range(len(text)):
        other = random_.choice([c for c in "abcXYZ019-_." if c.lower() != text[place].lower()])
        with pytest.raises(InputError) as error:
            JoinCode.parse(text[:place] + other + text[place + 1 :])
        assert JoinCode.parse(text).secret not in str(error.value)
        assert text[20:60] not in str(error.value)


def test_a_code_of_another_root_sends_no_secret_here(gate: Realm, tmp_path: Path) -> None:
    """Another federation's code whose address was bent to this server: the client sees the other root, and ends."""
    other = found(tmp_path / "other")
    bent = replace(code(gate, "bent"), root=other.root_fingerprint)
    with pytest.raises(IntegrityError) as error:
        joining.join(bent.text(), tmp_path / "bent", proxy="")
    assert error.value.exit_code == 4
    assert bent.secret not in str(error.value)
    assert "attempt to join" not in gate.log[-200:]


def _named(site: str, *, authority: bool = False, key: Any = None) -> str:
    builder = x509.CertificateSigningRequestBuilder().subject_name(
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, site)])
    )
    if authority:
        alternative = x509.SubjectAlternativeName(
            [x509.DNSName("localhost"), x509.UniformResourceIdentifier("consortium://lung/site/first")]
        )
        usage = x509.ExtendedKeyUsage([x509.oid.ExtendedKeyUsageOID.SERVER_AUTH])
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=5), critical=True)
        builder = builder.add_extension(alternative, critical=False).add_extension(usage, critical=False)
    request = builder.sign(key or pki.new_key(), hashes.SHA256())
    return request.public_bytes(Encoding.PEM).decode()


def test_a_request_gets_the_invitations_name_and_no_authority(gate: Realm) -> None:
    """A request in another site's name, for an authority, for a server, for other names: the certificate is a site's
    leaf with the invitation's name, and none of that opens anything."""
    for number, csr in enumerate((_named("first"), _named("first", authority=True))):
        given = code(gate, f"modest-{number}")
        said = attempt(gate, given, csr=csr)
        assert said.status == 200
        leaf = credentials.certificates(said.document["chain"].encode(), "the test")[0]
        assert credentials.common_name(leaf) == given.site
        extension = leaf.extensions.get_extension_for_class
        assert extension(x509.BasicConstraints).value.ca is False
        assert list(extension(x509.ExtendedKeyUsage).value) == [x509.oid.ExtendedKeyUsageOID.CLIENT_AUTH]
        names = extension(x509.SubjectAlternativeName).value
        assert [str(one.value) for one in names] == [f"consortium://lung/site/{given.site}"]


def test_weak_huge_and_broken_requests_are_refused(gate: Realm) -> None:
    """RSA, P-192, a request of 15 KB, one of 20 KB, one whose signature is another's, noise, nesting: 400 or 413, and
    the code is as good as before."""
    given = code(gate, "weak")
    weak = rsa.generate_private_key(65537, 1024)  # noqa: S505 - that is the point
    other = _named("weak").splitlines()
    requests = {
        "RSA": (_named("weak", key=weak), 400),
        "P-192": (_named("weak", key=ec.generate_private_key(ec.SECP192R1())), 400),
        "huge": (_named("x" * 60) + "#" * 12_000, 400),
        "larger": ("#" * 20_000, 413),
        "garbage": (os.urandom(200).hex(), 400),
        "damaged": ("\n".join([other[0], *reversed(other[1:-1]), other[-1]]), 400),
    }
    found = {name: attempt(gate, given, csr=csr).status for name, (csr, _) in requests.items()}
    assert found == {name: status for name, (_, status) in requests.items()}
    assert attempt(gate, given).status == 200
    assert gate.server.poll() is None


def test_what_joined_by_a_code_is_let_in_by_no_other_key(gate: Realm) -> None:
    """The chain that a join gave, shown with another key: the handshake fails."""
    said = attempt(gate, code(gate, "chain"))
    chain = credentials.certificates(said.document["chain"].encode(), "the test")
    with pytest.raises(Exception, match="KEY_VALUES_MISMATCH"):
        showing(pki.new_key(), chain)


def test_guessing_is_stopped_after_20_tries(gate: Realm) -> None:
    """A hundred random secrets for an invited site: at most 20 are looked at, the rest are told 429; nobody has
    joined, the sites that belong to the federation are served as ever, and whoever has the code joins meanwhile."""
    honest = gate.actor("first")
    given = code(gate, "guessed")
    said = [attempt(gate, replace(given, secret=secrets.token_bytes(16).hex())).status for _ in range(100)]
    assert set(said) <= {403, 429}
    assert said.count(403) <= 20
    assert said[20:] == [429] * 80
    assert honest.served()
    sites = {one["name"]: one["status"] for one in gate.admin("GET", "/v1/sites").document["sites"]}
    assert sites["guessed"] == "invited"
    assert given.secret not in gate.log
    with Line(gate.founded.config.enrol_port, blind()) as line:
        assert line.ask("GET", wire.ROOT).status == 200
    assert attempt(gate, given).status == 200
    assert attempt(gate, replace(given, secret=secrets.token_bytes(16).hex())).status == 429  # still
