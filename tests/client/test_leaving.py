"""What `consortium client leave` says where it cannot be done, and what a broken connection is called."""

from __future__ import annotations

import re
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from founded import HOST, Doors, open_doors

from consortium.client.home import Home
from consortium.client.joining import join
from consortium.protocol import credentials
from consortium.protocol.causes import cause, mistrust
from consortium.server.pki import Authority

CLIENT = (str(Path(sys.executable).with_name("consortium")), "client")
RAW = re.compile(
    r"_ssl\.c|\[SSL|EOF occurred|Remote end|Errno|Connection refused|local issuer|Traceback", re.I
)
"""Words of OpenSSL, Python and the C library."""


@pytest.fixture
def one(tmp_path: Path) -> Iterator[Doors]:
    with open_doors(tmp_path / "fed") as doors:
        yield doors


@pytest.fixture
def home(one: Doors, tmp_path: Path) -> Home:
    joined = join(one.code("alba"), tmp_path / "site", proxy="")
    assert joined.problem == ""
    return joined.home


def type_in(*words: object) -> tuple[int, str]:
    """A command's exit code and what it says to stderr; never in another program's words."""
    done = subprocess.run(
        [*CLIENT, *map(str, words)], capture_output=True, text=True, check=False, timeout=60
    )
    assert not RAW.search(done.stderr), done.stderr
    return done.returncode, done.stderr


def redirect(home: Home, **settings: str | int) -> None:
    """Change settings in client.toml."""
    text = home.config_file.read_text()
    for name, value in settings.items():
        said = f'"{value}"' if isinstance(value, str) else str(value)
        text = re.sub(rf"^{name} = .*\n|\Z", "", text, count=1, flags=re.M) + f"{name} = {said}\n"
    home.config_file.write_text(text)


def test_a_revoked_site_is_told_so(one: Doors, home: Home) -> None:
    """That the federation revoked its certificate, and how to come back, which then works; exit code 3."""
    one.roster.revoke("alba")
    one.site.cut("alba")
    code, said = type_in("leave", "--dir", home.folder)
    assert code == 3
    for part in (
        "has revoked this site's certificate",
        "consortium server invite alba",
        f"join --dir {home.folder}",
    ):
        assert part in said
    assert join(one.code("alba"), home.folder, proxy="").problem == ""
    assert type_in("leave", "--dir", home.folder)[0] == 0


def test_an_expired_site_is_told_so(one: Doors, home: Home) -> None:
    """That its certificate has ended, when, and what the admin types; exit code 3."""
    key, chain = credentials.load(home.tls_file, home.lock())
    signer, issuing = credentials.load(one.federation.folder / "issuing.pem", one.federation._lock)
    credentials.save(
        home.tls_file, key, [_over(chain[0], Authority(signer, issuing[0])), *chain[1:]], home.lock()
    )
    code, said = type_in("leave", "--dir", home.folder)
    assert code == 3
    assert "its certificate has ended" in said
    assert "consortium server revoke alba" in said


def _over(leaf: x509.Certificate, issuing: Authority) -> x509.Certificate:
    """The same certificate, over since a minute."""
    builder = x509.CertificateBuilder(
        leaf.issuer, leaf.subject, leaf.public_key(), x509.random_serial_number(), leaf.not_valid_before_utc,
        leaf.not_valid_before_utc, list(leaf.extensions),
    )  # fmt: skip
    return builder.sign(issuing.key, hashes.SHA256())


@pytest.fixture
def plain() -> Iterator[int]:
    """The port of a program that speaks no TLS, and refuses to be a proxy."""
    listening = socket.create_server((HOST, 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            with connection:
                connection.recv(4096)
                connection.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")

    threading.Thread(target=serve, daemon=True).start()
    yield listening.getsockname()[1]
    listening.shutdown(socket.SHUT_RDWR)
    listening.close()


def test_other_troubles_have_names(one: Doors, home: Home, plain: int, tmp_path: Path) -> None:
    """A closed port, another program, another federation's server, a name that is none, a proxy that is away or
    refuses: each is said in plain words, with what to do next; and where leaving failed the certificate stays."""
    port = one.site.port
    with open_doors(tmp_path / "other", "heart") as other:
        cases: list[tuple[dict[str, str | int], int, str, str]] = [
            ({"port": 1}, 1, "nothing listens there", "consortium server revoke alba"),
            ({"port": plain}, 1, "does not speak TLS 1.3; is the port right?", "Try again later"),
            ({"port": other.site.port}, 4, "not the server that is trusted", "not of this federation"),
            (
                {"port": port, "host": "nowhere.invalid"},
                1,
                "that name has no address here",
                "Try again later",
            ),
            (
                {"host": HOST, "proxy": f"http://{HOST}:1"},
                1,
                f"through the proxy http://{HOST}:1",
                "nothing listens",
            ),
            ({"proxy": f"http://{HOST}:{plain}"}, 1, "through the proxy", "403 Forbidden"),
        ]
        for settings, wanted, *parts in cases:
            redirect(home, **settings)
            code, said = type_in("leave", "--dir", home.folder)
            assert code == wanted, (settings, said)
            assert all(part in said for part in parts), (settings, said)
    redirect(home, proxy="")
    one.site.stop(0.0)
    assert "nothing listens there" in type_in("leave", "--dir", home.folder)[1]
    assert home.tls_file.exists()


def test_a_server_that_is_only_starting_is_asked_again(one: Doors, home: Home) -> None:
    """One that ends a connection unanswered and answers the next is left as it should be."""
    one.site.stop(0.0)
    rude = socket.create_server((HOST, 0))
    redirect(home, port=rude.getsockname()[1])
    waiting = subprocess.Popen([*CLIENT, "leave", "--dir", home.folder], stderr=subprocess.PIPE, text=True)
    connection, _ = rude.accept()
    begun = time.monotonic()
    connection.close()
    again, _ = rude.accept()
    assert time.monotonic() - begun > 0.3
    again.close()
    rude.accept()[0].close()
    assert waiting.wait(20) == 3


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ssl.SSLError(1, "[SSL: X] x (_ssl.c:1)"), "does not speak TLS"),
        (OSError(113, "No route to host"), "No route to host"),
        (TimeoutError(), "no answer in time"),
        (ValueError(), "ValueError"),
    ],
)
def test_a_cause_without_a_name_of_its_own(error: Exception, said: str) -> None:
    """What the system says, where that is plain."""
    assert said in cause(error)


@pytest.mark.parametrize("code", [9, 10, 20, 62])
def test_a_reason_for_mistrust_is_plain(code: int) -> None:
    """Without OpenSSL's words."""
    error = ssl.SSLCertVerificationError(1, "[SSL: CERTIFICATE_VERIFY_FAILED] (_ssl.c:1)")
    error.verify_code, error.verify_message = code, "local issuer"
    assert not RAW.search(mistrust(error))
