"""A site joins, renews and leaves: over real TLS, interrupted at every step, and against servers that lie."""

import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding
from founded import HOST, Doors, found, open_doors

from consortium.client import home as home_module
from consortium.client import joining, leaving
from consortium.client.home import Home
from consortium.protocol import configuration, credentials, files, keys, trust
from consortium.protocol.connection import Connection, StatusError, UnreachableError
from consortium.protocol.errors import ConsortiumError, InputError, IntegrityError, RefusedError
from consortium.protocol.keys import Lock
from consortium.protocol.signing import fingerprint
from consortium.server import pki
from consortium.server.federation import Federation, root_authority
from consortium.server.listener import PeerGone, Request, Response
from consortium.server.pki import Authority

NOW = time.time()
DAY = 86400.0
NOTHING: dict[str, str] = {}


@pytest.fixture
def one(tmp_path: Path) -> Iterator[Doors]:
    with open_doors(tmp_path / "fed") as doors:
        yield doors


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "site"


def join(code: str, folder: Path, **more: Any) -> joining.Joined:
    return joining.join(code, folder, **{"environment": NOTHING, **more})


def trusted(home: Home) -> int:
    """The serial that the server shows at the site door."""
    connection = home.connection(home.lock(), timeout=10)
    try:
        document = connection.request("GET", "/v1/trust").document()
    finally:
        connection.close()
    return trust.verified(document, home.root, home.config.federation).serial


def shut_out(home: Home) -> bool:
    """Whether the site door lets the site in no more."""
    try:
        trusted(home)
    except UnreachableError:
        return True
    return False


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def test_a_site_joins(one: Doors, folder: Path) -> None:
    """By its code alone: configuration, keys, root and trust are there, and the site door knows it."""
    joined = join(one.code("hospital-1"), folder)
    assert joined.problem == ""
    home = Home(folder)
    assert home.joined
    assert (home.config.federation, home.config.site) == ("lung", "hospital-1")
    assert (home.config.host, home.config.port, home.config.proxy) == (HOST, one.site.port, "")
    assert home.config.key_file == str(folder) + ".key"
    assert credentials.fingerprint(home.root) == one.federation.root_fingerprint
    assert credentials.common_name(home.certificate) == "hospital-1"
    assert joined.identity == fingerprint(home.identity(home.lock()).public_key())
    assert home.trust().serial == 1
    assert trusted(home) == 1
    assert (
        one.roster.identity("hospital-1") == home.identity(home.lock()).public_key().public_bytes_raw().hex()
    )
    assert not one.roster.outstanding(), "the site has shown its certificate, so the door may close"


def test_modes_and_plain_keys(one: Doors, folder: Path) -> None:
    """Folders 0700, files 0600 whatever the umask, and no private key in plain sight."""
    before = os.umask(0)
    try:
        home = join(one.code("hospital-1"), folder).home
        joining.renew(home, home.lock())
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(folder.with_name("site.key").stat().st_mode) == 0o600
    for name, content in contents(folder).items():
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600, name
        assert b"BEGIN PRIVATE KEY" not in content, name
        assert b"EC PRIVATE KEY" not in content, name
        assert (b"BEGIN ENCRYPTED PRIVATE KEY" in content) == (name in ("identity.key", "tls.pem")), name
    assert "tls.key" not in contents(folder)


def test_the_secret_is_not_kept(one: Doors, folder: Path) -> None:
    """No file at the site holds the code's secret."""
    secret, _ = one.roster.invite("hospital-1", 60)
    join(one.code_with("hospital-1", secret), folder)
    for name, content in contents(folder).items():
        assert secret.encode() not in content, name


def test_the_same_command_again_changes_nothing(one: Doors, folder: Path) -> None:
    """Not even where enrolment is closed by then."""
    code = one.code("hospital-1")
    join(code, folder)
    before = contents(folder)
    one.enrolment.stop(1.0)
    assert join(code, folder).problem == ""
    assert contents(folder) == before
    assert one.certificates() == 1


class PowerCutError(Exception):
    """The process is gone."""


def cut_after(count: int) -> Callable[[Path, bytes], None]:
    """Write so many files, then stop, leaving a part of the next one under a temporary name."""
    left = count

    def write(path: Path, content: bytes) -> None:
        nonlocal left
        if left == 0:
            path.with_name(f".{path.name}.0000").write_bytes(content[: len(content) // 2])
            raise PowerCutError
        left -= 1
        files.write_private(path, content)

    return write


def everywhere(patch: pytest.MonkeyPatch, write: Callable[[Path, bytes], None]) -> None:
    """Let every file of the client be written by `write`."""
    for module in (joining, home_module, keys, credentials, configuration):
        patch.setattr(module, "write_private", write)


def steps_of_joining(code: str, folder: Path) -> int:
    counted = 0

    def count(path: Path, content: bytes) -> None:
        nonlocal counted
        counted += 1
        files.write_private(path, content)

    with pytest.MonkeyPatch.context() as patch:
        everywhere(patch, count)
        join(code, folder)
    return counted


def test_interrupted_at_every_step_it_is_completed(one: Doors, tmp_path: Path) -> None:
    """Whichever file is the last that was written: the same command completes it, under the identity that was made
    first, and one certificate is issued."""
    steps = steps_of_joining(one.code("counted"), tmp_path / "counted")
    assert steps == 9, "client.toml, key file, two keys, root, trust, client.toml, tls.pem, the mark"
    for step in range(steps):
        site, folder = f"site-{step}", tmp_path / f"site-{step}"
        code, issued = one.code(site), one.certificates()
        with pytest.MonkeyPatch.context() as patch:
            everywhere(patch, cut_after(step))
            with pytest.raises(PowerCutError):
                join(code, folder)
        identity = contents(folder).get("identity.key")
        joined = join(code, folder)
        assert joined.problem == "", step
        assert identity in (None, contents(folder)["identity.key"])
        assert one.certificates() == issued + 1
        assert trusted(Home(folder)) == 1
        assert "tls.key" not in contents(folder)


def test_killed_at_any_moment_it_is_completed(one: Doors, tmp_path: Path) -> None:
    """A real process, killed at various moments of joining; the same command completes what it left."""
    program = (
        "import sys; from pathlib import Path; from consortium.client.joining import join\n"
        "print('ready', flush=True); join(sys.stdin.readline(), Path(sys.argv[1]), environment={})"
    )
    for place, seconds in enumerate((0.001, 0.004, 0.008, 0.016, 0.03)):
        folder, code = tmp_path / f"killed-{place}", one.code(f"killed-{place}")
        child = subprocess.Popen(
            [sys.executable, "-c", program, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        child.stdin.write(code + "\n")
        child.stdin.flush()
        time.sleep(seconds)
        child.kill()
        child.communicate(timeout=20)
        assert join(code, folder).problem == ""
    assert one.certificates() == 5


def test_an_answer_that_is_lost_is_given_again(tmp_path: Path) -> None:
    """The server has let the site in, the connection breaks before it says so; the same command completes it."""
    lost = 1

    def wrap(handler: Callable[[Request], Response]) -> Callable[[Request], Response]:
        def handle(request: Request) -> Response:
            nonlocal lost
            response = handler(request)
            if request.path == "/v1/join" and lost:
                lost -= 1
                raise PeerGone("lost")
            return response

        return handle

    with open_doors(tmp_path / "fed", wrap=wrap) as one:
        code = one.code("hospital-1")
        with pytest.raises(UnreachableError, match="with the same code"):
            join(code, tmp_path / "site")
        assert one.roster.is_member("hospital-1")
        assert one.roster.outstanding(), "the door stays open for the site"
        assert join(code, tmp_path / "site").problem == ""
        assert one.certificates() == 1


# Codes


def test_codes_that_are_refused(one: Doors, tmp_path: Path) -> None:
    """Mistyped: 2. Guessed, expired, used by somebody else: 3. For another root: 4, and the secret stays here."""
    good = one.code("hospital-1")
    with pytest.raises(InputError, match="mistyped") as typo:
        join(good[:-1] + ("0" if good[-1] != "0" else "1"), tmp_path / "typo")
    with pytest.raises(RefusedError, match="was used, has expired") as guessed:
        join(one.code_with("hospital-1", "00" * 16), tmp_path / "guessed")
    with pytest.raises(IntegrityError, match="Nothing was sent") as altered:
        join(one.code_with("hospital-1", "00" * 16, root="ab" * 32), tmp_path / "altered")
    join(good, tmp_path / "site")
    with pytest.raises(RefusedError) as used:
        join(good, tmp_path / "thief")
    late = one.code("hospital-2", 10)
    one.clock.ahead = 11
    with pytest.raises(RefusedError) as expired:
        join(late, tmp_path / "late")
    codes = [caught.value.exit_code for caught in (typo, guessed, altered, used, expired)]
    assert codes == [2, 3, 4, 3, 3]
    assert not (tmp_path / "typo").exists()
    assert one.certificates() == 1


def test_a_server_in_between_learns_nothing(one: Doors, tmp_path: Path) -> None:
    """Whoever shows the right root, but cannot speak for it, is found before the secret is sent."""
    with open_doors(tmp_path / "thief") as thief:
        asked: list[str] = []

        def handle(request: Request) -> Response:
            asked.append(request.path)
            body = json.dumps({"root": one.federation.root_pem.decode()}).encode()
            return Response(200, body, "application/json")

        thief.enrolment._handler = handle
        true = one.code("hospital-1")
        from consortium.protocol.joincode import JoinCode

        read = JoinCode.parse(true)
        bent = JoinCode(
            read.federation, read.site, HOST, thief.site.port, thief.enrolment.port, read.root, read.secret
        )
        with pytest.raises(IntegrityError, match="not the server that is trusted"):
            join(bent.text(), tmp_path / "site")
        assert asked == ["/v1/root"]
        assert one.roster.outstanding()


def test_a_closed_door_is_explained(one: Doors, folder: Path) -> None:
    """Enrolment is open only while a code is outstanding; the error says so."""
    code = one.code("hospital-1")
    one.enrolment.stop(1.0)
    with pytest.raises(UnreachableError, match=r"used or have expired.*same code"):
        join(code, folder)


def test_too_many_failures(one: Doors, tmp_path: Path) -> None:
    """What the server says is passed on."""
    for place in range(20):
        with pytest.raises(RefusedError):
            join(one.code_with("hospital-1", "00" * 16), tmp_path / f"{place}")
    with pytest.raises(ConsortiumError, match="in a minute"):
        join(one.code_with("hospital-1", "00" * 16), tmp_path / "site")
    assert join(one.code("hospital-1"), tmp_path / "site").problem == ""


def test_folders_that_are_not_the_sites(one: Doors, tmp_path: Path) -> None:
    """Another site's folder, one with something else, a file: refused, and untouched."""
    join(one.code("hospital-1"), tmp_path / "site")
    before = contents(tmp_path / "site")
    with pytest.raises(InputError, match="is the folder of site 'hospital-1'"):
        join(one.code("hospital-2"), tmp_path / "site")
    assert contents(tmp_path / "site") == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        join(one.code("hospital-2"), tmp_path / "other")
    with pytest.raises(InputError, match="not empty"):
        join(one.code("hospital-2"), tmp_path / "other" / "thesis.txt")


def test_a_federation_made_anew_is_not_the_old_one(one: Doors, tmp_path: Path) -> None:
    """The pinned root is never replaced."""
    home = join(one.code("hospital-1"), tmp_path / "site").home
    with open_doors(tmp_path / "anew") as anew:
        with pytest.raises(IntegrityError, match="not the root that the code names"):
            join(anew.code("hospital-1"), tmp_path / "site")
        assert anew.certificates() == 0
    assert trusted(home) == 1


# Locks


def test_the_wrong_lock(one: Doors, folder: Path) -> None:
    """A wrong key file or passphrase names the file that it does not open; a missing one is named."""
    home = join(one.code("hospital-1"), folder).home
    wrong = Lock(b"0" * 64)
    for use in (home.identity, home.tls_context, home.connection):
        with pytest.raises(
            InputError, match=r"(identity\.key|tls\.pem): cannot be decrypted; the key file or pass"
        ):
            use(wrong)
    folder.with_name("site.key").unlink()
    with pytest.raises(InputError, match=r"site\.key: the key file cannot be read"):
        home.lock()


def test_a_passphrase_and_another_key_file(one: Doors, tmp_path: Path) -> None:
    """Both are remembered in client.toml; another choice for the same folder is refused."""
    environment = {"CONSORTIUM_PASSPHRASE": "correct horse battery"}
    code = one.code("hospital-1")
    home = join(code, tmp_path / "a", use_passphrase=True, environment=environment).home
    assert home.config.key_file == ""
    assert home.lock(environment) == keys.passphrase(home.folder, environment)
    assert not (tmp_path / "a.key").exists()
    with pytest.raises(InputError, match="key_file is ''"):
        join(code, tmp_path / "a", key_file=tmp_path / "k", environment=environment)
    home = join(one.code("hospital-2"), tmp_path / "b", key_file=tmp_path / "elsewhere").home
    assert home.config.key_file == str(tmp_path / "elsewhere")
    assert trusted(home) == 1
    lock = keys.new_key_file(tmp_path / "c.key")
    assert trusted(joining.join(one.code("hospital-3"), tmp_path / "c", lock).home) == 1


def test_a_folder_without_a_site(tmp_path: Path) -> None:
    """It says how to join."""
    assert not Home(tmp_path / "x").joined
    with pytest.raises(InputError, match="consortium client join --dir"):
        _ = Home(tmp_path / "x").config


def test_mistakes_in_the_configuration(one: Doors, folder: Path) -> None:
    """Every one is named, with a hint; a proxy with a password is refused."""
    join(one.code("hospital-1"), folder)
    (folder / "client.toml").write_text(
        'sitee = "a"\nport = 0\nproxy = "http://me:secret@proxy:1"\nhost = 7\n'
    )
    with pytest.raises(InputError) as caught:
        _ = Home(folder).config
    for part in (
        "format",
        "sitee",
        "did you mean 'site'",
        "port: got 0",
        "password is refused",
        "host",
        "federation",
    ):
        assert part in str(caught.value)
    assert "secret" not in str(caught.value)


# Renewal, leaving, revocation


def test_renewal_overlaps(one: Doors, folder: Path) -> None:
    """A new key and certificate; the old one still opens the door, so that nothing is cut."""
    home = join(one.code("hospital-1"), folder).home
    old = home.connection(home.lock(), timeout=10)
    before, first = home.certificate, home.tls_context(home.lock())
    assert not home.renewal_due(NOW + 59 * DAY)
    assert home.renewal_due(NOW + 61 * DAY)
    joining.renew(home, home.lock(), old)
    assert home.certificate.public_key() != before.public_key()
    assert credentials.common_name(home.certificate) == "hospital-1"
    assert trusted(home) == 1
    assert old.request("GET", "/v1/trust").status == 200
    old.close()
    again = Connection(HOST, one.site.port, first, timeout=10)
    assert again.request("GET", "/v1/trust").status == 200
    again.close()


def test_an_interrupted_renewal_changes_nothing(one: Doors, folder: Path) -> None:
    """Key and certificate are replaced together or not at all."""
    home = join(one.code("hospital-1"), folder).home
    before = contents(folder)
    with pytest.MonkeyPatch.context() as patch:
        everywhere(patch, cut_after(0))
        with pytest.raises(PowerCutError):
            joining.renew(home, home.lock())
    assert contents(folder).items() >= before.items()
    assert trusted(home) == 1
    joining.renew(home, home.lock())
    assert trusted(home) == 1


def test_leave_and_come_back(one: Doors, tmp_path: Path) -> None:
    """A site that left is out at once; by a new code it comes back under the same identity; the old code stays used."""
    folder, code = tmp_path / "site", one.code("hospital-1")
    home = join(code, folder).home
    copy = home.tls_file.read_bytes()
    leaving.leave(home, home.lock())
    leaving.leave(home, home.lock())
    assert not home.joined
    assert [s["status"] for s in one.roster.sites()] == ["left"]
    with pytest.raises(RefusedError):
        join(code, folder)
    back = join(one.code("hospital-1"), folder)
    assert back.problem == ""
    assert back.identity == fingerprint(home.identity(home.lock()).public_key())
    assert trusted(Home(folder)) == 1
    home.tls_file.write_bytes(copy)
    assert shut_out(home), "the certificate of before is over"


def test_leaving_a_server_that_is_not_there(one: Doors, folder: Path) -> None:
    """Nothing changes here, and the error says what the admin can do."""
    home = join(one.code("hospital-1"), folder).home
    one.site.stop(1.0)
    with pytest.raises(UnreachableError, match="consortium server revoke hospital-1"):
        leaving.leave(home, home.lock())
    assert home.joined


def test_a_revoked_site_is_shut_out(one: Doors, folder: Path) -> None:
    """At once, also over a connection that is open; until it joins by a new code."""
    home = join(one.code("hospital-1"), folder).home
    held = home.connection(home.lock(), timeout=10)
    assert held.request("GET", "/v1/trust").document()
    one.roster.revoke("hospital-1")
    begun = time.monotonic()
    one.site.cut("hospital-1")
    with pytest.raises(UnreachableError):
        held.request("GET", "/v1/trust")
    assert time.monotonic() - begun < 5
    assert shut_out(home)
    with pytest.raises((UnreachableError, StatusError)):
        joining.renew(home, home.lock())
    assert join(one.code("hospital-1"), folder).problem == ""
    assert trusted(Home(folder)) == 1


def test_a_certificate_that_the_roster_does_not_know(one: Doors, folder: Path) -> None:
    """Issued by the federation's own authority, but not by its roster: a stolen issuing key opens no door."""
    home = join(one.code("hospital-1"), folder).home
    key = pki.new_key()
    issued = pki.site_leaf(key.public_key(), one.federation._issuing, "lung", "hospital-1", NOW)
    credentials.save(home.tls_file, key, credentials.certificates(issued.chain.encode(), "x"), home.lock())
    assert shut_out(home)


# Servers that lie


@pytest.mark.parametrize(
    "lie",
    [
        {"chain": ""}, {"chain": "x" * 40000}, {"chain": None}, {"chain": "other key"}, {"chain": "other name"},
        {"chain": "other root"}, {"trust": None}, {"trust": {}}, {"trust": "other"}, {"host": "http://x"}, {"host": 1},
        {"port": "1"}, {"port": 70000},
    ],
    ids=str,
)  # fmt: skip
def test_answers_that_are_not_for_this_site(tmp_path: Path, lie: dict[str, Any]) -> None:
    """A chain for another key, name or root, another's statement, a strange address: refused, and the site has not
    joined."""
    other = found(tmp_path / "other")

    def wrap(handler: Callable[[Request], Response]) -> Callable[[Request], Response]:
        def handle(request: Request) -> Response:
            response = handler(request)
            if request.path != "/v1/join":
                return response
            document = json.loads(response.body)
            document |= {name: _lie(value, doors.federation, other, document) for name, value in lie.items()}
            return Response(200, json.dumps(document).encode(), "application/json")

        return handle

    with open_doors(tmp_path / "fed", wrap=wrap) as doors:
        with pytest.raises((IntegrityError, InputError)):
            join(doors.code("hospital-1"), tmp_path / "site")
        assert not Home(tmp_path / "site").joined


def _lie(value: object, own: Federation, other: Federation, true: dict[str, Any]) -> object:
    leaf = credentials.certificates(true["chain"].encode(), "x")[0]
    key: Any = leaf.public_key()
    new = pki.new_key().public_key()
    made: dict[str, Callable[[], object]] = {
        "other key": lambda: pki.site_leaf(new, own._issuing, "lung", "hospital-1", NOW).chain,
        "other name": lambda: pki.site_leaf(key, own._issuing, "lung", "hospital-2", NOW).chain,
        "other root": lambda: pki.site_leaf(key, other._issuing, "lung", "hospital-1", NOW).chain,
        "other": other.trust,
    }
    return made[value]() if isinstance(value, str) and value in made else value


def statement(
    one: Federation, serial: int, federation: str = "lung", root: Authority | None = None
) -> dict[str, str]:
    """A trust statement by the federation's root, or another."""
    signer = root or root_authority(one.folder, one._lock)
    key = Ed25519PrivateKey.generate().public_key()
    return trust.state(signer.key, federation, serial, [key], int(NOW))


def test_trust_only_goes_forward(one: Doors, folder: Path) -> None:
    """A higher serial is accepted and kept; a lower one, another federation's, another root's, and a second one of the
    same serial are refused, and what is held stays."""
    home, made = join(one.code("hospital-1"), folder).home, one.federation
    third = statement(made, 3)
    assert home.accept_trust(third).serial == 3
    assert home.accept_trust(third).serial == 3
    held = home.trust_file.read_bytes()
    key = pki.new_key()
    stranger = Authority(key, pki.root(key, "lung", NOW))
    for document, why in [
        (statement(made, 2), "serial 3 is held"),
        (statement(made, 3), "two statements have serial 3"),
        (statement(made, 4, "heart"), "federation 'heart'"),
        (statement(made, 4, root=stranger), "signature"),
        ({**third, "statement": third["statement"].replace('"serial":3', '"serial":9')}, "signature"),
        ({}, "malformed"),
    ]:
        with pytest.raises(IntegrityError, match=why):
            home.accept_trust(document)
        assert home.trust_file.read_bytes() == held
    assert Home(folder).trust().serial == 3
    assert stat.S_IMODE(home.trust_file.stat().st_mode) == 0o600


def test_a_held_statement_is_verified_each_time(one: Doors, folder: Path) -> None:
    """What was altered on disk is found."""
    home = join(one.code("hospital-1"), folder).home
    right = home.trust_file.read_bytes()
    for damaged in (
        b"",
        b"{",
        b"[]",
        right.replace(b"lung", b"heart"),
        json.dumps(statement(one.federation, 1, "x")).encode(),
    ):
        home.trust_file.write_bytes(damaged)
        with pytest.raises(IntegrityError):
            home.trust()
    home.trust_file.unlink()
    with pytest.raises(InputError, match=r"trust\.json"):
        home.trust()


def test_sites_follow_a_rotation(one: Doors, folder: Path) -> None:
    """After two rotations a site that slept still connects, takes the new statement, and renews under the new
    authority."""
    home = join(one.code("hospital-1"), folder).home
    one.federation.rotate(NOW + 1)
    one.federation.rotate(NOW + 2)
    assert trusted(home) == 3
    assert home.accept_trust(one.federation.trust()).serial == 3
    joining.renew(home, home.lock())
    assert trusted(home) == 3
    below = credentials.chain_in(home.tls_file)[1]
    assert below.public_bytes(Encoding.DER) == one.federation._issuing.certificate.public_bytes(Encoding.DER)
