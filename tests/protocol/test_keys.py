"""Private keys on disk, signatures, frames, private files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hypothesis import given
from hypothesis import strategies as st

from consortium.protocol import files, keys, signing, wire
from consortium.protocol.errors import InputError, IntegrityError
from consortium.protocol.messages import MAX_HEADER
from consortium.protocol.sealed import data_key

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


def test_a_key_is_encrypted_on_disk_and_opens_with_its_lock_alone(tmp_path: Path) -> None:
    """The file holds no plain key, is for its owner alone, and another key file does not open it."""
    lock = keys.new_key_file(tmp_path / "one.key")
    keys.save_key(tmp_path / "identity.key", KEY, lock)
    content = (tmp_path / "identity.key").read_bytes()
    assert content.startswith(b"-----BEGIN ENCRYPTED PRIVATE KEY-----")
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}
    loaded = keys.load_ed25519(tmp_path / "identity.key", keys.key_file(tmp_path / "one.key"))
    assert loaded.private_bytes_raw() == KEY.private_bytes_raw()
    with pytest.raises(InputError, match=r"identity\.key: cannot be decrypted"):
        keys.load_key(tmp_path / "identity.key", keys.new_key_file(tmp_path / "two.key"))


def test_a_key_that_is_not_encrypted_is_refused(tmp_path: Path) -> None:
    """A plain key in the file is not taken, so that nobody comes to rely on one."""
    form = (Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (tmp_path / "identity.key").write_bytes(KEY.private_bytes(*form))
    with pytest.raises(InputError, match=r"identity\.key: cannot be decrypted"):
        keys.load_key(tmp_path / "identity.key", keys.new_key_file(tmp_path / "one.key"))


def test_a_key_of_another_kind_is_named(tmp_path: Path) -> None:
    """A connection's key where a signing key belongs is refused with the file's name."""
    lock = keys.new_key_file(tmp_path / "one.key")
    keys.save_key(tmp_path / "tls.key", ec.generate_private_key(ec.SECP256R1()), lock)
    with pytest.raises(InputError, match=r"tls\.key: holds a key of another kind"):
        keys.load_ed25519(tmp_path / "tls.key", lock)


PHRASE = {keys.PASSPHRASE: "correct horse battery"}


def test_each_folder_has_a_salt_of_its_own(tmp_path: Path) -> None:
    """The same passphrase is another secret elsewhere; a salt that is damaged or of a later format is said so and stays
    as it is."""
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
    one, other = (keys.passphrase(folder, PHRASE).secret for folder in folders)
    assert one != other
    assert one == keys.passphrase(folders[0], PHRASE).secret
    assert [path.name for path in folders[0].iterdir()] == [keys.SALT]
    salt = folders[0] / keys.SALT
    assert salt.stat().st_mode & 0o777 == 0o600
    for text in ("", '{"format": 3, "salt": "00"}', '{"format": 2, "salt": "00"}', "[]"):
        salt.write_text(text)
        with pytest.raises(InputError, match=r"passphrase\.salt: is damaged"):
            keys.passphrase(folders[0], PHRASE)
        assert salt.read_text() == text


def former_lock() -> keys.Lock:
    """What version 1 made of the passphrase: one salt for all."""
    secret = Scrypt(b"consortium passphrase 1", 32, n=1 << 16, r=8, p=1).derive(
        PHRASE[keys.PASSPHRASE].encode()
    )
    return keys.Lock(secret.hex().encode())


def test_what_an_earlier_version_wrote_is_opened_and_written_anew(tmp_path: Path) -> None:
    """A key, a key with its certificates, and a data key: the same comes out, afterwards the former secret opens none
    of them, and what stood behind the key stands there still. Another passphrase opens and changes nothing."""
    former, key = former_lock(), ec.generate_private_key(ec.SECP256R1())
    identity, tls, data = (tmp_path / name for name in ("identity.key", "tls.pem", "data.key"))
    keys.save_key(identity, KEY, former)
    keys.save_key(tls, key, former)
    tls.write_bytes(tls.read_bytes() + b"a certificate\n")
    made = data_key(data, former)
    before = {path: path.read_bytes() for path in (identity, tls, data)}
    wrong = keys.passphrase(tmp_path, {keys.PASSPHRASE: "correct horse batterz"})
    for path in (identity, tls):
        with pytest.raises(InputError, match="cannot be decrypted"):
            keys.load_key(path, wrong)
    with pytest.raises(IntegrityError, match="cannot be opened"):
        data_key(data, wrong)
    assert {path: path.read_bytes() for path in before} == before
    for _ in range(2):
        lock = keys.passphrase(tmp_path, PHRASE)
        assert keys.load_ed25519(identity, lock).private_bytes_raw() == KEY.private_bytes_raw()
        assert keys.load_ec(tls, lock).private_numbers() == key.private_numbers()
        assert data_key(data, lock).secret == made.secret
    assert tls.read_bytes().endswith(b"-----END ENCRYPTED PRIVATE KEY-----\na certificate\n")
    for path in (identity, tls):
        with pytest.raises(InputError, match="cannot be decrypted"):
            keys.load_key(path, former)
    with pytest.raises(IntegrityError, match="cannot be opened"):
        data_key(data, former)


def test_a_passphrase_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is stretched, the same each time; a short new one and none at all are refused with what to do."""
    one = keys.passphrase(tmp_path, {keys.PASSPHRASE: "correct horse battery"}).secret
    assert one == keys.passphrase(tmp_path, {keys.PASSPHRASE: "correct horse battery"}).secret
    assert b"horse" not in one
    assert one != keys.passphrase(tmp_path, {keys.PASSPHRASE: "correct horse batterz"}).secret
    with pytest.raises(InputError, match="at least 12"):
        keys.passphrase(tmp_path, {keys.PASSPHRASE: "short"}, new=True)
    monkeypatch.setattr("sys.stdin", Path(os.devnull).open())  # noqa: SIM115 - closed with the process
    with pytest.raises(InputError, match=keys.PASSPHRASE):
        keys.passphrase(tmp_path, {})


def test_a_lock_does_not_show_its_secret() -> None:
    """Neither a log line nor an error can print it by accident."""
    assert "horse" not in repr(keys.Lock(b"correct horse battery")) + f"{keys.Lock(b'correct horse battery')}"


def test_signatures_are_those_of_rfc_8032() -> None:
    """The second test vector of RFC 8032, section 7.1, so that Ed25519 is what signs."""
    key = Ed25519PrivateKey.from_private_bytes(
        bytes.fromhex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb")
    )
    assert key.sign(b"\x72").hex() == (
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
        "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
    )


@pytest.mark.parametrize("key", [KEY, ec.generate_private_key(ec.SECP256R1())])
def test_a_signature_holds_for_its_purpose_key_and_content_alone(
    key: Ed25519PrivateKey | ec.EllipticCurvePrivateKey,
) -> None:
    """An answer's signature is none for an instruction, and one bit off is refused."""
    signature = signing.sign(key, signing.ANSWER, b"content")
    signing.verify(key.public_key(), signing.ANSWER, b"content", signature)
    wrong = [
        (key.public_key(), signing.INSTRUCTION, b"content", signature),
        (key.public_key(), signing.ANSWER, b"contenu", signature),
        (key.public_key(), signing.ANSWER, b"content", signature[:-1] + bytes([signature[-1] ^ 1])),
        (key.public_key(), signing.ANSWER, b"content", b""),
        (Ed25519PrivateKey.generate().public_key(), signing.ANSWER, b"content", signature),
    ]
    for case in wrong:
        with pytest.raises(IntegrityError):
            signing.verify(*case)


@given(st.binary(max_size=300), st.binary(min_size=64, max_size=64))
def test_a_frame_gives_back_header_and_signature(header: bytes, signature: bytes) -> None:
    """What `preamble` wrote, `read_preamble` reads, and nothing of the content."""
    sent = bytearray(wire.preamble(header, signature) + b"content")

    def read(length: int) -> bytes:
        piece = bytes(sent[:length])
        del sent[:length]
        return piece

    assert wire.read_preamble(read) == (header, signature)
    assert sent == b"content"


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"CSM1",
        b"CSM2" + bytes(68),
        b"CSM1" + (MAX_HEADER + 1).to_bytes(4, "big") + bytes(64),
        b"CSM1" + (10).to_bytes(4, "big") + bytes(64) + b"short",
    ],
)
def test_what_is_no_frame_is_refused(sent: bytes) -> None:
    """Another format, an absurd length or an early end: an error, before anything is parsed."""
    rest = bytearray(sent)

    def read(length: int) -> bytes:
        piece = bytes(rest[:length])
        del rest[:length]
        return piece

    with pytest.raises(IntegrityError):
        wire.read_preamble(read)


def test_a_private_file_is_replaced_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where writing fails, what was there is untouched and nothing is left beside it."""
    path = tmp_path / "seen.json"
    files.write_private(path, b"before")

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            files.write_private(path, b"after")
    assert path.read_bytes() == b"before"
    assert [one.name for one in tmp_path.iterdir()] == ["seen.json"]


def test_a_private_folder_is_closed_to_others(tmp_path: Path) -> None:
    """It is made with mode 0700, and closed where it was open."""
    (tmp_path / "open").mkdir(mode=0o755)
    for name in ("open", "new"):
        assert files.private_folder(tmp_path / name).stat().st_mode & 0o777 == 0o700
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="inside: cannot be used as a folder"):
        files.private_folder(tmp_path / "file" / "inside")


@pytest.mark.parametrize("name", ["hospital-1", "a", "0", "a" * 63])
def test_site_names_are_those_of_hosts(name: str) -> None:
    """Small letters, digits, inner hyphens, at most 63."""
    assert wire.site_name(name) == name


@pytest.mark.parametrize("name", ["", "A", "-a", "a-", "a/b", "a.b", "ä", "a" * 64, "a\n", "../x"])
def test_other_site_names_are_refused(name: str) -> None:
    """A name becomes part of certificates and logs, so nothing else is one."""
    with pytest.raises(InputError):
        wire.site_name(name)
