"""Certificates: what OpenSSL's strictest check accepts, and what the TLS layer refuses."""

import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from founded import HOST, found

from consortium.protocol import credentials
from consortium.protocol.connection import trusting
from consortium.protocol.errors import ConsortiumError, IntegrityError
from consortium.protocol.keys import Lock
from consortium.server import pki
from consortium.server.federation import Federation, root_authority
from consortium.server.pki import Authority

NOW = time.time()
LOCK = Lock(b"x" * 32)
DAY = 86400.0


@dataclass
class World:
    """A root, an issuing authority, and certificates of both kinds."""

    root: Authority
    issuing: Authority
    folder: Path

    def site(self, name: str = "hospital-1", now: float = NOW, issuer: Authority | None = None) -> Path:
        """A file with a site's key and chain."""
        key = pki.new_key()
        issued = pki.site_leaf(key.public_key(), issuer or self.issuing, "lung", name, now)
        chain = x509.load_pem_x509_certificates(issued.chain.encode())
        path = self.folder / f"{name}-{key.private_numbers().private_value % 10**8}.pem"
        credentials.save(path, key, chain, LOCK)
        return path

    def server(self, host: str = HOST, now: float = NOW) -> Path:
        """A file with a server's key and chain."""
        key = pki.new_key()
        leaf = pki.server_leaf(key.public_key(), self.issuing, "lung", [host], now)
        path = self.folder / f"server-{key.private_numbers().private_value % 10**8}.pem"
        credentials.save(path, key, [leaf, self.issuing.certificate], LOCK)
        return path

    def root_file(self) -> Path:
        path = self.folder / "root.pem"
        path.write_bytes(credentials.pem([self.root.certificate]))
        return path


def world(folder: Path, now: float = NOW) -> World:
    folder.mkdir(exist_ok=True)
    key = pki.new_key()
    root = Authority(key, pki.root(key, "lung", now))
    below = pki.new_key()
    return World(root, Authority(below, pki.issuing(below, root, "lung", now)), folder)


@pytest.fixture
def one(tmp_path: Path) -> World:
    return world(tmp_path / "one")


def openssl(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["openssl", *map(str, arguments)], capture_output=True, text=True, check=False, timeout=20
    )


@pytest.mark.skipif(shutil.which("openssl") is None, reason="the program openssl is not installed")
@pytest.mark.parametrize("kind", ["server", "site"])
def test_openssl_accepts_the_chain_strictly(one: World, kind: str) -> None:
    """`openssl verify -x509_strict` finds nothing to object to, for exactly the purpose of the certificate."""
    path = one.server() if kind == "server" else one.site()
    leaf, below = credentials.chain_in(path)
    (one.folder / "leaf.pem").write_bytes(credentials.pem([leaf]))
    (one.folder / "below.pem").write_bytes(credentials.pem([below]))
    files = ("-CAfile", one.root_file(), "-untrusted", one.folder / "below.pem", one.folder / "leaf.pem")
    right, wrong = ("sslserver", "sslclient") if kind == "server" else ("sslclient", "sslserver")
    done = openssl("verify", "-x509_strict", "-purpose", right, *files)
    assert done.returncode == 0, done.stderr
    assert openssl("verify", "-x509_strict", "-purpose", wrong, *files).returncode != 0


def test_names_and_extensions(one: World) -> None:
    """A site's certificate names it in CN and URI; a server's names its host, localhost and 127.0.0.1."""
    site = credentials.chain_in(one.site())[0]
    assert credentials.common_name(site) == "hospital-1"
    assert [name.value for name in pki.names(site)] == ["consortium://lung/site/hospital-1"]
    server = credentials.chain_in(one.server("fl.example.org"))[0]
    assert [str(name.value) for name in pki.names(server)] == ["fl.example.org", "localhost", "127.0.0.1"]
    for authority, length in ((one.root, 1), (one.issuing, 0)):
        found = authority.certificate.extensions.get_extension_for_class(x509.BasicConstraints)
        assert (found.critical, found.value.ca, found.value.path_length) == (True, True, length)


def test_lives(one: World) -> None:
    """90 days a leaf, 2 years the issuing authority, 20 years the root; a leaf never outlives its issuer."""

    def ends(certificate: x509.Certificate) -> float:
        return (certificate.not_valid_after_utc.timestamp() - NOW) / DAY

    assert ends(one.root.certificate) == pytest.approx(7300, abs=0.1)
    assert ends(one.issuing.certificate) == pytest.approx(730, abs=0.1)
    assert ends(credentials.chain_in(one.site())[0]) == pytest.approx(90, abs=0.1)
    late = credentials.chain_in(one.site(now=NOW + 700 * DAY))[0]
    assert late.not_valid_after_utc == one.issuing.certificate.not_valid_after_utc


def test_an_authority_that_has_expired_issues_nothing(one: World) -> None:
    """What it would issue is worth nothing, so it says what to do instead."""
    with pytest.raises(ConsortiumError, match="server rotate"):
        one.site(now=NOW + 731 * DAY)


def test_the_longest_names_fit() -> None:
    """A federation and a site of 63 characters have certificates."""
    key = pki.new_key()
    root = Authority(key, pki.root(key, "f" * 63, NOW))
    issuing = Authority(key, pki.issuing(key, root, "f" * 63, NOW))
    assert pki.site_leaf(key.public_key(), issuing, "f" * 63, "s" * 63, NOW).chain
    assert pki.names(pki.server_leaf(key.public_key(), issuing, "f" * 63, ["h" * 63 + ".example.org"], NOW))


# Requests


def request(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey, name: str = "hospital-1") -> str:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    built = x509.CertificateSigningRequestBuilder().subject_name(subject)
    built = built.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    return built.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM).decode()


def test_subject_and_extensions_of_a_request_count_for_nothing(one: World) -> None:
    """A request for another name and for an authority gives a leaf of the roster's name."""
    key = pki.requested_key(request(pki.new_key(), "root"))
    issued = pki.site_leaf(key, one.issuing, "lung", "hospital-1", NOW)
    leaf = x509.load_pem_x509_certificates(issued.chain.encode())[0]
    assert credentials.common_name(leaf) == "hospital-1"
    assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1()])
def test_requests_on_both_curves_are_taken(curve: ec.EllipticCurve) -> None:
    """P-256 and P-384."""
    key = ec.generate_private_key(curve)
    assert credentials.same_key(pki.requested_key(request(key)), key.public_key())


def altered() -> str:
    """A request whose signature is another's."""
    der = bytearray(x509.load_pem_x509_csr(request(pki.new_key()).encode()).public_bytes(Encoding.DER))
    der[-1] ^= 1
    csr = x509.load_der_x509_csr(bytes(der))
    return csr.public_bytes(Encoding.PEM).decode()


@pytest.mark.parametrize(
    "csr",
    [
        "", "text", "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n",
        request(ec.generate_private_key(ec.SECP521R1())), request(ec.generate_private_key(ec.SECP256K1())),
        request(rsa.generate_private_key(65537, 2048)), altered(), "x" * 8193,
    ],
    ids=["empty", "text", "damaged", "p521", "k1", "rsa", "altered", "long"],
)  # fmt: skip
def test_other_requests_are_refused(csr: str) -> None:
    """Malformed, of another kind of key, not signed by its own key, or too long."""
    with pytest.raises(IntegrityError, match="certificate request"):
        pki.requested_key(csr)


# The TLS layer


def handshake(server: ssl.SSLContext, client: ssl.SSLContext, name: str = HOST) -> str:
    """What goes wrong in a handshake and a first byte each way over loopback; "" where nothing does."""
    listening = socket.create_server((HOST, 0))
    problems: list[str] = []

    def serve() -> None:
        connection, _ = listening.accept()
        connection.settimeout(10)
        try:
            with server.wrap_socket(connection, server_side=True) as tls:
                tls.recv(1)
                tls.sendall(b"y")
        except OSError as error:
            problems.append(f"server: {error}")
            connection.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        connection = socket.create_connection(listening.getsockname(), timeout=10)
        with connection, client.wrap_socket(connection, server_hostname=name) as tls:
            tls.sendall(b"x")
            if tls.recv(1) != b"y":
                problems.append("client: closed")
    except OSError as error:
        problems.append(f"client: {error}")
    thread.join(10)
    listening.close()
    return "; ".join(problems)


@dataclass
class Met:
    """A federation, and the world of its own authorities."""

    federation: Federation
    own: World

    def client(self, shown: Path | None) -> ssl.SSLContext:
        """A strict client that shows a certificate, or none."""
        context = trusting(self.own.root_file())
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        if shown is not None:
            context.load_cert_chain(shown, password=LOCK.secret)
        return context


@pytest.fixture
def met(tmp_path: Path) -> Met:
    made = found(tmp_path / "fed", now=NOW)
    (tmp_path / "own").mkdir()
    return Met(made, World(Authority(made._issuing.key, made.root), made._issuing, tmp_path / "own"))


def test_a_site_and_the_server_meet(met: Met) -> None:
    """TLS 1.3, both certificates, strict on both sides."""
    assert handshake(met.federation.site_context(), met.client(met.own.site())) == ""
    assert handshake(met.federation.site_context(), met.client(met.own.site()), "localhost") == ""
    assert handshake(met.federation.open_context(), met.client(None)) == ""


def test_no_session_is_resumed(met: Met) -> None:
    """No ticket is handed out, so that each connection shows its certificate."""
    context = met.client(met.own.site())
    listening = socket.create_server((HOST, 0))

    def serve() -> None:
        connection, _ = listening.accept()
        with met.federation.site_context().wrap_socket(connection, server_side=True) as tls:
            tls.recv(1)
            tls.sendall(b"y")

    thread = threading.Thread(target=serve)
    thread.start()
    connection = socket.create_connection(listening.getsockname(), timeout=10)
    with connection, context.wrap_socket(connection, server_hostname=HOST) as tls:
        tls.sendall(b"x")
        assert tls.recv(1) == b"y"
        assert tls.version() == "TLSv1.3"
        assert tls.session is None or not tls.session.has_ticket
    thread.join(10)
    listening.close()


def test_older_tls_is_refused(met: Met) -> None:
    """TLS 1.2 is not spoken, at no door."""
    for context in (met.federation.site_context(), met.federation.open_context()):
        client = met.client(met.own.site())
        client.minimum_version = ssl.TLSVersion.TLSv1_2
        client.maximum_version = ssl.TLSVersion.TLSv1_2
        assert "server:" in handshake(context, client)


def self_signed(folder: Path) -> Path:
    """A certificate that a stranger gave itself, with the fields of a site's."""
    key = pki.new_key()
    certificate = pki.root(key, "lung", NOW)
    path = folder / "self.pem"
    credentials.save(path, key, [certificate], LOCK)
    return path


def issued_by_a_site(met: Met) -> Path:
    """A certificate that a site issued with its own leaf."""
    key, chain = credentials.load(met.own.site("hospital-2"), LOCK)
    issued = pki.site_leaf(pki.new_key().public_key(), Authority(key, chain[0]), "lung", "hospital-1", NOW)
    path = met.own.folder / "grandchild.pem"
    mine = pki.new_key()
    leaf = x509.load_pem_x509_certificates(
        pki.site_leaf(mine.public_key(), Authority(key, chain[0]), "lung", "hospital-1", NOW).chain.encode()
    )[0]
    assert issued.chain
    credentials.save(path, mine, [leaf, *chain], LOCK)
    return path


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("none", "did not return a certificate"),
        ("other", "certificate verify failed"),
        ("expired", "certificate has expired"),
        ("future", "not yet valid"),
        ("self-signed", "self-signed certificate"),
        ("server's", "purpose"),
        ("site's", "invalid CA certificate"),
    ],
)
def test_the_site_door_refuses(met: Met, kind: str, reason: str, tmp_path: Path) -> None:
    """No certificate; another federation's of the same name; an expired one; one of tomorrow; a self-signed one; the
    server's own; one that a site issued: the TLS layer refuses each."""
    makers: dict[str, Callable[[], Path | None]] = {
        "none": lambda: None,
        "other": lambda: world(tmp_path / "old").site(),
        "expired": lambda: met.own.site(now=NOW - 91 * DAY, issuer=backdated(met)),
        "future": lambda: met.own.site(now=NOW + DAY),
        "self-signed": lambda: self_signed(tmp_path),
        "server's": lambda: met.own.server(),
        "site's": lambda: issued_by_a_site(met),
    }
    problem = handshake(met.federation.site_context(), met.client(makers[kind]()))
    assert "server:" in problem
    assert reason in problem, problem


def backdated(met: Met) -> Authority:
    """The federation's issuing key under a certificate of its root that began 100 days ago."""
    root = root_authority(met.federation.folder, met.federation._lock)
    early = Authority(root.key, pki.root(root.key, "lung", NOW - 200 * DAY))
    return Authority(met.own.issuing.key, pki.issuing(met.own.issuing.key, early, "lung", NOW - 100 * DAY))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("site's", "purpose"),
        ("other", "certificate verify failed"),
        ("expired", "certificate has expired"),
        ("other host", "Hostname mismatch"),
    ],
)
def test_a_site_refuses(met: Met, kind: str, reason: str, tmp_path: Path) -> None:
    """A site's certificate used by a server; another federation's; an expired one; one for another host."""
    shown = {
        "site's": lambda: met.own.site(),
        "other": lambda: world(tmp_path / "other").server(),
        "expired": lambda: World(met.own.root, backdated(met), met.own.folder).server(now=NOW - 91 * DAY),
        "other host": lambda: met.own.server(),
    }[kind]()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(shown, password=LOCK.secret)
    name = "fl.example.org" if kind == "other host" else HOST
    problem = handshake(context, met.client(None), name)
    assert "client: [SSL: CERTIFICATE_VERIFY_FAILED]" in problem
    assert reason in problem, problem
