"""How a site joins a federation, and renews its certificate.

Joining goes step by step, each durable before the next: configuration, keys, the root (compared with the code's
fingerprint), the request, then certificate and trust statement. Interrupted anywhere, the same command completes it:
the keys are the same then, and the server gives the same certificate for them.
"""

from __future__ import annotations

import hashlib
import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import NameOID

from consortium.client.audit import site_audit
from consortium.client.certificate import chain_from, request_for
from consortium.client.home import Config, Home
from consortium.protocol import configuration, credentials, keys, signing, wire
from consortium.protocol.connection import (
    Connection,
    StatusError,
    UnreachableError,
    proxy_for,
    trusting,
)
from consortium.protocol.errors import ConsortiumError, InputError, IntegrityError, RefusedError
from consortium.protocol.exclusive import alone
from consortium.protocol.files import private_folder, write_private
from consortium.protocol.joincode import JoinCode, proof_content
from consortium.protocol.keys import Lock

MARK = "code.sha256"
TIMEOUT = 20.0
"""Seconds without a byte before a step fails."""


@dataclass(frozen=True)
class Joined:
    """A site that has joined.

    identity: fingerprint of its identity key, for people to compare. problem: why the site door could not be reached
    with the new certificate, or "".
    """

    home: Home
    identity: str
    problem: str


def join(
    code: str,
    folder: Path,
    lock: Lock | None = None,
    *,
    key_file: Path | None = None,
    use_passphrase: bool = False,
    proxy: str | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Joined:
    """Join the federation that a code (`protocol/joincode.py`) names, from a new or empty folder, or complete that.

    A site that left or was revoked joins again from its old folder, under its old identity, by a new code.

    key_file: what private keys are encrypted under; DIR.key beside the folder where it is left out, and made where it
    is missing. use_passphrase: a passphrase instead. lock: what either gives, where the caller has read it already.
    proxy: URL of an HTTP proxy, "" for none, None for what the environment says.

    Raises:
        InputError: the code is mistyped, or the folder holds something else.
        RefusedError: the code was used, has expired, or is unknown.
        IntegrityError: the server is not the one that the code names.
        UnreachableError: the server cannot be reached.
    """
    read, home = JoinCode.parse(code), Home(folder)
    config = _config(home, read, key_file, use_passphrase, proxy, environment)
    private_folder(home.folder)
    with alone(home.folder):
        if lock is None and config.key_file:
            lock = credentials.lock_at(Path(config.key_file))
        elif lock is None:
            lock = keys.passphrase(home.folder, environment, new=not home.identity_file.exists())
        mark = hashlib.sha256(read.text().encode()).hexdigest()
        if not (home.joined and _mark(home) == mark):
            configuration.write(home.config_file, config)
            _join(home, config, read, lock)
            joined = Home(folder)
            about = {"root": read.root, "certificate": credentials.fingerprint(joined.certificate)}
            site_audit(joined, joined.identity(lock)).note("joined", about)
            write_private(home.folder / MARK, mark.encode())
        home.joining_key.unlink(missing_ok=True)
        home = Home(folder)
        identity = home.identity(lock)
    return Joined(home, signing.fingerprint(identity.public_key()), _arrive(home, lock))


def _mark(home: Home) -> str:
    """SHA-256 (hex) of the code by which the site joined last, or "": by the same code there is nothing left to do."""
    path = home.folder / MARK
    return path.read_text().strip() if path.exists() else ""


def _config(
    home: Home,
    code: JoinCode,
    key_file: Path | None,
    use_passphrase: bool,
    proxy: str | None,
    environment: Mapping[str, str],
) -> Config:
    """What client.toml will say.

    Raises:
        InputError: the folder is another site's, or no client's.
    """
    chosen = str((key_file or home.default_key_file).absolute())
    if home.config_file.exists():
        there = home.config
        if (there.federation, there.site) != (code.federation, code.site):
            raise InputError(
                f"{home.folder}: is the folder of site '{there.site}' of federation '{there.federation}', the code is "
                f"for site '{code.site}' of '{code.federation}'; give another folder"
            )
        if (key_file is not None and chosen != there.key_file) or (use_passphrase and there.key_file):
            raise InputError(
                f"{home.config_file}: key_file is {there.key_file!r}; its keys were made with that, so give the same"
            )
        chosen = there.key_file
        proxy = there.proxy if proxy is None else proxy
    elif home.folder.exists() and (
        not home.folder.is_dir() or any(keys.counts(one) for one in home.folder.iterdir())
    ):
        raise InputError(f"{home.folder}: is not empty; give a new or empty folder")
    elif use_passphrase:
        chosen = ""
    fields = {
        "federation": code.federation,
        "site": code.site,
        "host": code.host,
        "port": code.port,
        "proxy": proxy_for(code.host, environment) if proxy is None else proxy,
        "key_file": chosen,
    }
    return configuration.checked("the client's configuration", Config, fields)


def _join(home: Home, config: Config, code: JoinCode, lock: Lock) -> None:
    if not home.identity_file.exists():
        keys.save_key(home.identity_file, Ed25519PrivateKey.generate(), lock)
    identity = keys.load_ed25519(home.identity_file, lock)
    if not home.joining_key.exists():
        keys.save_key(home.joining_key, ec.generate_private_key(ec.SECP256R1()), lock)
    key = keys.load_ec(home.joining_key, lock)
    _pin(home, config, code)
    answer = _ask(home, config, code, identity, key)
    chain = chain_from(answer, home.root, config.site, key)
    if not isinstance(answer.get("trust"), dict):
        raise IntegrityError("field 'trust': a JSON object was expected")
    home.accept_trust(answer["trust"])
    address = {
        "host": wire.field(answer, "host", str),
        "port": wire.field(answer, "port", int) or config.port,
    }
    final = configuration.checked("the server's answer", Config, {**config.model_dump(), **address})
    configuration.write(home.config_file, final)
    credentials.save(home.tls_file, key, chain, lock)


def _pin(home: Home, config: Config, code: JoinCode) -> None:
    """Keep the root certificate that the code names, fetched from whoever answers.

    Raises:
        IntegrityError: what was fetched, or kept before, is another.
    """
    if home.root_file.exists():
        if credentials.fingerprint(home.root) != code.root:
            raise IntegrityError(
                f"{home.root_file}: is not the root that the code names; the federation was made anew, or the code is "
                "somebody else's. Ask its admin; if it was made anew, give another folder"
            )
        return
    anybody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    anybody.minimum_version = ssl.TLSVersion.TLSv1_3
    anybody.check_hostname, anybody.verify_mode = False, ssl.CERT_NONE
    said = _request(Connection(
        code.host, code.enrol_port, anybody, proxy=config.proxy, timeout=TIMEOUT
    ), "GET", wire.ROOT, None)  # fmt: skip
    root = credentials.certificates(wire.field(said, "root", str).encode(errors="replace"), "the root")[0]
    if credentials.fingerprint(root) != code.root:
        raise IntegrityError(
            f"{code.host}:{code.enrol_port}: its root certificate is not the one that the code names; somebody may be "
            "in between. Nothing was sent; ask the server's admin"
        )
    named = root.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
    if [one.value for one in named] != [code.federation]:
        raise IntegrityError(f"the root certificate is not that of federation '{code.federation}'")
    write_private(home.root_file, credentials.pem([root]))


def _ask(
    home: Home, config: Config, code: JoinCode, identity: Ed25519PrivateKey, key: ec.EllipticCurvePrivateKey
) -> dict[str, Any]:
    csr = request_for(key, code.site)
    proof = signing.sign(identity, signing.JOIN, proof_content(csr, code.federation, code.site))
    document = {
        "format": wire.FORMAT,
        "site": code.site,
        "secret": code.secret,
        "identity": signing.raw(identity.public_key()).hex(),
        "csr": csr,
        "proof": proof.hex(),
    }
    pinned = trusting(home.root_file)
    connection = Connection(code.host, code.enrol_port, pinned, proxy=config.proxy, timeout=TIMEOUT)
    return _request(connection, "POST", wire.JOIN, document)


def _request(
    connection: Connection, method: str, path: str, document: Mapping[str, Any] | None
) -> dict[str, Any]:
    """One request to the enrolment door.

    Raises:
        UnreachableError, InputError, RefusedError, IntegrityError, ConsortiumError: by what went wrong.
    """
    try:
        return connection.request(method, path, document).document()
    except StatusError as error:
        kinds = {400: InputError, 403: RefusedError}
        raise kinds.get(error.status, ConsortiumError)(f"the server says: {error}") from error
    except UnreachableError as error:
        raise UnreachableError(
            f"{error}; enrolment is open only while a code is outstanding, so it may have been used or have expired. "
            "If it has not, try again later with the same code"
        ) from error
    finally:
        connection.close()


def _arrive(home: Home, lock: Lock) -> str:
    """Show the new certificate at the site door once: both sides then know that it works. The problem, or ""."""
    try:
        connection = home.connection(lock, timeout=TIMEOUT)
        try:
            home.accept_trust(connection.request("GET", wire.TRUST).document())
        finally:
            connection.close()
    except ConsortiumError as error:
        return str(error)
    return ""


def renew(home: Home, lock: Lock, connection: Connection | None = None) -> None:
    """Get another certificate, for a fresh key; the one before stays valid until it expires. connection: to the site
    door; it goes on under the old certificate, so make a new one (`Home.connection`) afterwards.

    Raises:
        UnreachableError, StatusError: it did not work now; try again later.
        IntegrityError: the answer is not for this site.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    document = {"format": wire.FORMAT, "csr": request_for(key, home.config.site)}
    answer = at_site_door(home, lock, connection, wire.RENEW, document)
    chain = chain_from(answer, home.root, home.config.site, key)
    with alone(home.folder):
        credentials.save(home.tls_file, key, chain, lock)
    about = {"certificate": credentials.fingerprint(chain[0])}
    site_audit(home, home.identity(lock)).note("renewed", about)


def at_site_door(
    home: Home, lock: Lock, connection: Connection | None, path: str, document: Mapping[str, Any]
) -> dict[str, Any]:
    """What the site door answers to a POST, over a connection or one that is made for it. Raises as `Connection`."""
    used = connection or home.connection(lock, timeout=TIMEOUT)
    try:
        return used.request("POST", path, document).document()
    finally:
        if connection is None:
            used.close()
