"""A federation's folder: made once, opened, renewed and rotated; never with a key in plain sight."""

import json
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from consortium.protocol import credentials, files, keys, sealed, trust
from consortium.protocol.errors import ConsortiumError, InputError, IntegrityError
from consortium.protocol.signing import raw
from consortium.server import founding, pki
from consortium.server.federation import Config, Federation
from consortium.server.roster import Roster
from consortium.server.store import Store

NOW = time.time()
DAY = 86400.0


def make(folder: Path, **changed: Any) -> Federation:
    settings: dict[str, Any] = {"name": "lung", "host": "fl.example.org", "now": NOW}
    return Federation.init(folder, **{**settings, **changed})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "fed"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_federation_is_made_and_opened(folder: Path) -> None:
    """What was made is opened, with the same root, keys and configuration."""
    made = make(folder, port=1, admin_port=2, enrol_port=3, bind="10.0.0.1")
    opened = Federation.open(folder)
    assert opened.config == Config(
        name="lung", host="fl.example.org", port=1, admin_port=2, enrol_port=3, bind="10.0.0.1",
        key_file=str(folder) + ".key",
    )  # fmt: skip
    assert opened.root_fingerprint == made.root_fingerprint
    assert raw(opened.instruction_key.public_key()) == raw(made.instruction_key.public_key())
    verified = trust.verified(opened.trust(), opened.root, "lung")
    assert (verified.serial, opened.trust_serial) == (1, 1)
    assert [raw(key) for key in verified.keys] == [raw(made.instruction_key.public_key())]


def test_modes_and_plain_keys(folder: Path) -> None:
    """Folders 0700, files 0600 whatever the umask; no private key lies there in plain sight, the token in one file."""
    before = os.umask(0)
    try:
        make(folder).rotate(NOW)
    finally:
        os.umask(before)
    for path in [folder, folder.with_name("fed.key"), *folder.rglob("*")]:
        wanted = 0o700 if path.is_dir() else 0o600
        assert stat.S_IMODE(path.stat().st_mode) == wanted, path
    for name, content in contents(folder).items():
        assert b"BEGIN PRIVATE KEY" not in content, name
        assert b"EC PRIVATE KEY" not in content, name
        encrypted = name in ("root.key", "issuing.pem", "server.pem", "instruction.key")
        assert (b"BEGIN ENCRYPTED PRIVATE KEY" in content) == encrypted, name


def test_the_token_that_init_wrote_is_an_admins(folder: Path) -> None:
    """admin.token opens the admin door."""
    make(folder)
    store = Store(folder / "consortium.db")
    token = (folder / "admin.token").read_text().strip()
    assert Roster(store).role_of(token) == ("admin", "admin")
    store.close()


def test_made_again_it_is_the_same(folder: Path) -> None:
    """The same call again changes no file."""
    make(folder)
    before = contents(folder)
    make(folder, now=NOW + 1000 * DAY)
    assert contents(folder) == before


def test_another_federation_is_not_made_over_it(folder: Path) -> None:
    """Other values are refused, each named, and nothing is touched."""
    make(folder)
    before = contents(folder)
    with pytest.raises(
        InputError, match=r"(?s)holds the federation 'lung'.*name: 'lung' there, 'heart'.*port: 9440"
    ):
        make(folder, name="heart", port=1)
    assert contents(folder) == before


def test_a_folder_with_something_else_is_refused(folder: Path) -> None:
    """A folder that is not empty, or a file, is left alone; its mode too."""
    folder.mkdir(mode=0o755)
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        make(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755
    with pytest.raises(InputError, match="is a file"):
        make(folder / "thesis.txt")


def test_all_mistakes_are_named(folder: Path) -> None:
    """Wrong values are all refused at once, before anything is made."""
    with pytest.raises(InputError, match=r"(?s)3 mistakes.*name: .*host: .*port: "):
        make(folder, name="Lung Cancer", host="http://x", port=70000)
    assert not folder.exists()


def test_mistakes_in_the_file_are_all_named(folder: Path) -> None:
    """server.toml: an unknown key, a wrong type, a missing key and the format, with a hint."""
    make(folder)
    (folder / "server.toml").write_text(
        'format = 2\nname = "lung"\nportt = 1\nport = "9440"\nkey_file = "x.key"\n'
    )
    with pytest.raises(InputError) as caught:
        Federation.open(folder)
    text = str(caught.value)
    for part in ("5 mistakes", "format = 1", "portt", "did you mean 'port'", "port: got '9440'", "host: got nothing",
                 "absolute path"):  # fmt: skip
        assert part in text
    (folder / "server.toml").write_text("name = ")
    with pytest.raises(InputError, match="not valid TOML"):
        Federation.open(folder)


def writes_of_a_founding(tmp_path: Path) -> int:
    counted = 0

    def count(path: Path, content: bytes) -> None:
        nonlocal counted
        counted += 1
        files.write_private(path, content)

    with pytest.MonkeyPatch.context() as patch:
        everywhere(patch, count)
        make(tmp_path / "counted")
    return counted


def everywhere(patch: pytest.MonkeyPatch, write: Callable[[Path, bytes], None]) -> None:
    """Let every file be written by `write`."""
    from consortium.protocol import configuration
    from consortium.server import federation

    for module in (founding, federation, keys, credentials, configuration):
        patch.setattr(module, "write_private", write)


class PowerCutError(Exception):
    """The process is gone."""


def cut_after(count: int, *, torn: bool) -> Callable[[Path, bytes], None]:
    """Write so many files, then stop; torn: leaving a part of the next one under a temporary name."""
    left = count

    def write(path: Path, content: bytes) -> None:
        nonlocal left
        if left == 0:
            if torn:
                path.with_name(f".{path.name}.0000").write_bytes(content[: len(content) // 2])
            raise PowerCutError
        left -= 1
        files.write_private(path, content)

    return write


def test_interrupted_at_every_step_it_is_completed(tmp_path: Path) -> None:
    """Whichever file is the last that was written: the same call completes it, and keeps the root that was there."""
    steps = writes_of_a_founding(tmp_path)
    assert steps >= 9
    for step in range(steps):
        folder = tmp_path / f"fed-{step}"
        with pytest.MonkeyPatch.context() as patch:
            everywhere(patch, cut_after(step, torn=True))
            with pytest.raises(PowerCutError):
                make(folder)
        key = (folder / "root.key").read_bytes() if (folder / "root.key").exists() else None
        root = (folder / "root.pem").read_bytes() if (folder / "root.pem").exists() else None
        if step < steps - 1:
            with pytest.raises(InputError, match="server init"):
                Federation.open(folder)
        made = make(folder)
        assert key in (None, (folder / "root.key").read_bytes())
        assert root in (None, (folder / "root.pem").read_bytes())
        assert Federation.open(folder).root_fingerprint == made.root_fingerprint
        token = (folder / "admin.token").read_text().strip()
        store = Store(folder / "consortium.db")
        assert Roster(store).role_of(token) == ("admin", "admin")
        store.close()


@pytest.mark.parametrize("file", ["root.pem", "issuing.pem", "server.pem", "instruction.key", "trust.json"])
def test_a_lost_file_is_not_made_anew(folder: Path, file: str) -> None:
    """Sites know the old one, so `init` says to restore it."""
    make(folder)
    (folder / file).unlink()
    with pytest.raises(InputError, match=f"{file} is missing"):
        Federation.open(folder)
    with pytest.raises(InputError, match=f"{file} was lost.*backup"):
        make(folder)


def test_the_wrong_key_file(folder: Path) -> None:
    """Opening with another key file names the file that cannot be decrypted; a missing one is named, too."""
    make(folder)
    key_file = folder.with_name("fed.key")
    right = key_file.read_bytes()
    key_file.write_text("0" * 64)
    with pytest.raises(InputError, match=r"issuing\.pem: cannot be decrypted; the key file or passphrase"):
        Federation.open(folder)
    key_file.unlink()
    with pytest.raises(InputError, match=r"fed\.key: the key file cannot be read"):
        Federation.open(folder)
    key_file.write_bytes(right)
    Federation.open(folder)


def test_a_key_file_that_cannot_be_made(folder: Path, tmp_path: Path) -> None:
    """It says so, and a right one then is taken."""
    with pytest.raises(InputError, match="the key file cannot be made"):
        make(folder, key_file=tmp_path / "none" / "k")
    assert make(folder, key_file=tmp_path / "k").config.key_file == str(tmp_path / "k")


def test_a_passphrase(folder: Path) -> None:
    """Instead of a key file: from the environment here; a wrong one is refused, a short one not taken."""
    right = {"CONSORTIUM_PASSPHRASE": "correct horse battery"}
    with pytest.raises(InputError, match="too short"):
        make(folder, use_passphrase=True, environment={"CONSORTIUM_PASSPHRASE": "short"})
    made = make(folder, use_passphrase=True, environment=right)
    assert made.config.key_file == ""
    assert not folder.with_name("fed.key").exists()
    assert Federation.open(folder, keys.passphrase(folder, right)).root_fingerprint == made.root_fingerprint
    with pytest.raises(InputError, match="cannot be decrypted"):
        Federation.open(folder, keys.passphrase(folder, {"CONSORTIUM_PASSPHRASE": "wrong horse battery"}))


def test_a_federation_of_an_earlier_version_is_opened_by_its_passphrase(folder: Path) -> None:
    """Its keys are under the salt of before: all are taken over, one after the other; root.key, which was elsewhere,
    when it is put back to rotate."""
    right = {"CONSORTIUM_PASSPHRASE": "correct horse battery"}
    made = make(folder, use_passphrase=True, environment=right)
    lock = keys.passphrase(folder, right)
    former = keys.Lock(lock.former)
    for file in ("root.key", "instruction.key"):
        keys.save_key(folder / file, keys.load_key(folder / file, lock), former)
    for file in ("issuing.pem", "server.pem"):
        credentials.save(folder / file, *credentials.load(folder / file, lock), former)
    data = made.data_key().secret
    (folder / "data.key").write_bytes(rewrapped(made, former))
    (folder / keys.SALT).unlink()
    kept = folder.with_name("root.key")
    (folder / "root.key").rename(kept)
    for _ in range(2):
        opened = Federation.open(folder, keys.passphrase(folder, right))
        assert opened.root_fingerprint == made.root_fingerprint
        assert opened.data_key().secret == data
        opened.site_context()
    kept.rename(folder / "root.key")
    opened.rotate(NOW)
    with pytest.raises(InputError, match="cannot be decrypted"):
        Federation.open(folder, former)
    with pytest.raises(InputError, match="cannot be decrypted"):
        keys.load_key(folder / "root.key", former)


def rewrapped(made: Federation, lock: keys.Lock) -> bytes:
    """A federation's data key, wrapped under another lock."""
    elsewhere = made.folder.with_name("elsewhere")
    sealed._wrap(elsewhere, made.data_key(), lock)
    return elsewhere.read_bytes()


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    """It says how to make one."""
    with pytest.raises(InputError, match="consortium server init --dir"):
        Federation.open(tmp_path)


# Renewal


def test_the_doors_certificate_is_renewed(folder: Path) -> None:
    """When two thirds of its life are over, with a new key; doors that are open show the new one from then on."""
    made = make(folder)
    before, context = made.certificate, made.site_context()
    assert made.site_context() is context
    assert not made.renew_if_due(NOW + 59 * DAY)
    assert made.renew_if_due(NOW + 61 * DAY)
    assert not made.renew_if_due(NOW + 61 * DAY)
    after = made.certificate
    assert after.public_key() != before.public_key()
    assert after.not_valid_after_utc.timestamp() == pytest.approx(NOW + 151 * DAY, abs=2)
    assert made.site_context() is not context
    assert Federation.open(folder).certificate == after


def test_another_host_is_another_certificate(folder: Path) -> None:
    """A host that was changed in server.toml is in the certificate after the next look."""
    make(folder)
    config = (folder / "server.toml").read_text().replace("fl.example.org", "10.1.2.3")
    (folder / "server.toml").write_text(config)
    opened = Federation.open(folder)
    assert opened.renew_if_due(NOW)
    assert "10.1.2.3" in [str(name.value) for name in pki.names(opened.certificate)]


def test_near_the_authoritys_end_nothing_is_renewed_for_ever(folder: Path) -> None:
    """A certificate that ends with its authority is not renewed again and again; the admin is told to rotate."""
    made = make(folder)
    assert made.advice(NOW) == ""
    late = NOW + 700 * DAY
    assert made.renew_if_due(late)
    assert not made.renew_if_due(late + 29 * DAY)
    assert "server rotate" in made.advice(late)
    with pytest.raises(ConsortiumError, match="rotate"):
        make(folder.with_name("other")).renew_if_due(NOW + 731 * DAY)


# Rotation


def test_rotation(folder: Path) -> None:
    """New authority, certificate and instruction key; the statement has the next serial and names the old key, too,
    until the next rotation."""
    made = make(folder)
    first, root, old = made.instruction_key, made.root_fingerprint, made.certificate
    made.rotate(NOW + 1)
    second = made.instruction_key
    statement = trust.verified(made.trust(), made.root, "lung")
    assert (statement.serial, made.trust_serial, made.root_fingerprint) == (2, 2, root)
    assert [raw(key) for key in statement.keys] == [raw(second.public_key()), raw(first.public_key())]
    assert made.certificate.public_key() != old.public_key()
    assert made.certificate.extensions != old.extensions
    opened = Federation.open(folder)
    assert raw(opened.instruction_key.public_key()) == raw(second.public_key())
    opened.rotate(NOW + 2)
    statement = trust.verified(opened.trust(), opened.root, "lung")
    assert statement.serial == 3
    assert [raw(k) for k in statement.keys] == [
        raw(opened.instruction_key.public_key()),
        raw(second.public_key()),
    ]
    assert "instruction.next" not in contents(folder)


def test_rotation_needs_the_roots_key(folder: Path, tmp_path: Path) -> None:
    """Without it all else works; it says to put root.key back; another root's key is refused."""
    make(folder)
    (folder / "root.key").rename(tmp_path / "safe")
    opened = Federation.open(folder)
    assert opened.renew_if_due(NOW + 61 * DAY)
    before = contents(folder)
    with pytest.raises(InputError, match=r"root\.key: the root's key is not here; put root\.key back"):
        opened.rotate(NOW)
    keys.save_key(folder / "root.key", pki.new_key(), keys.key_file(folder.with_name("fed.key")))
    with pytest.raises(IntegrityError, match="another root"):
        opened.rotate(NOW)
    (folder / "root.key").unlink()
    assert contents(folder) == before
    (tmp_path / "safe").rename(folder / "root.key")
    opened.rotate(NOW)
    assert opened.trust_serial == 2


def test_an_interrupted_rotation_opens_as_before_or_after(tmp_path: Path) -> None:
    """Whichever file is the last that was written, the folder opens, and signs with a key that its statement names
    first; a rotation after that works."""
    for step in range(5):
        folder = tmp_path / f"fed-{step}"
        made = make(folder)
        first = raw(made.instruction_key.public_key())
        with pytest.MonkeyPatch.context() as patch:
            everywhere(patch, cut_after(step, torn=True))
            if step < 4:
                with pytest.raises(PowerCutError):
                    made.rotate(NOW)
            else:
                patch.setattr(Path, "replace", _cut)
                with pytest.raises(PowerCutError):
                    made.rotate(NOW)
        opened = Federation.open(folder)
        statement = trust.verified(opened.trust(), opened.root, "lung")
        assert raw(opened.instruction_key.public_key()) == raw(statement.keys[0])
        assert (raw(statement.keys[0]) == first) == (opened.trust_serial == 1)
        opened.site_context()
        opened.rotate(NOW)
        assert Federation.open(folder).trust_serial == opened.trust_serial


def _cut(path: Path, target: Path) -> None:
    """Renaming works for files that are written whole; the key's successor is where the power fails."""
    if path.name == "instruction.next":
        raise PowerCutError
    os.replace(path, target)  # noqa: PTH105 - the method is the one that is replaced here


def test_files_that_do_not_belong_together(folder: Path, tmp_path: Path) -> None:
    """Keys, authority or statement of another federation in the folder are found when it is opened."""
    make(folder)
    make(tmp_path / "other", key_file=folder.with_name("fed.key"))
    for file in ("issuing.pem", "server.pem", "instruction.key", "trust.json", "root.pem"):
        right = (folder / file).read_bytes()
        (folder / file).write_bytes((tmp_path / "other" / file).read_bytes())
        with pytest.raises(IntegrityError):
            Federation.open(folder)
        (folder / file).write_bytes(right)
    for damaged in (b"", b"[]", b"{", b"{}"):
        (folder / "trust.json").write_bytes(damaged)
        with pytest.raises(IntegrityError):
            Federation.open(folder)


# The statement


def statement(**changed: Any) -> tuple[dict[str, str], Any]:
    """A signed statement with other fields, and the root's certificate."""
    key = pki.new_key()
    fields = {
        "format": 1, "federation": "lung", "serial": 1, "issued": 5,
        "instruction_keys": [raw(Ed25519PrivateKey.generate().public_key()).hex()],
    }  # fmt: skip
    text = json.dumps(fields | changed)
    from consortium.protocol.signing import TRUST, sign

    return {"statement": text, "signature": sign(key, TRUST, text.encode()).hex()}, pki.root(key, "lung", NOW)


@pytest.mark.parametrize(
    "changed",
    [
        {"format": 2}, {"federation": "heart"}, {"serial": 0}, {"serial": "1"}, {"serial": True}, {"issued": None},
        {"instruction_keys": []}, {"instruction_keys": ["ab"]}, {"instruction_keys": ["00" * 32] * 9},
        {"instruction_keys": "00" * 32}, {"instruction_keys": [7]}, {"more": 1},
    ],
)  # fmt: skip
def test_a_statement_that_is_signed_but_malformed_is_refused(changed: dict[str, Any]) -> None:
    """Each field is typed and measured; unknown fields and formats are refused."""
    document, root = statement()
    assert trust.verified(document, root, "lung").serial == 1
    document, root = statement(**changed)
    with pytest.raises(IntegrityError):
        trust.verified(document, root, "lung")


@pytest.mark.parametrize(
    "change",
    [
        {"statement": "{}"}, {"signature": ""}, {"signature": "zz"}, {"signature": "ab" * 64}, {"statement": 7},
        {"signature": None}, {"statement": "x" * 5000}, {"statement": "\ud800"},
    ],
)  # fmt: skip
def test_a_statement_that_is_not_signed_is_refused(change: dict[str, Any]) -> None:
    """Another text, another signature, or another kind of thing."""
    document, root = statement()
    with pytest.raises(IntegrityError):
        trust.verified(document | change, root, "lung")
