"""A federation's folder at the server: configuration, certificates, and the keys that a running server needs.

    server.toml       name, host, ports, addresses, key_file
    root.key root.pem       the root; the key may lie elsewhere but for `rotate`
    issuing.pem       the issuing authority: key and certificate
    server.pem        the doors' certificate: key and chain (leaf, issuing)
    instruction.key   Ed25519: signs instructions; trust.json says so, signed by the root
    admin.token       a token of role admin, for whoever works on the server's machine
    epoch.json        the epoch, where the folder was restored from a backup (`protocol/epoch.py`)
    data.key          what checkpoints are encrypted under, itself encrypted
    audit/            what happened, signed (`server/audit.py`)
    consortium.db checkpoints/ spool/ runs/

Keys are encrypted. Key and certificate stand in one file wherever both are replaced together.
"""

from __future__ import annotations

import json
import os
import ssl
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from consortium.protocol import configuration, credentials, keys, trust
from consortium.protocol.configuration import Configuration, Host, KeyFile, Name
from consortium.protocol.errors import InputError, IntegrityError
from consortium.protocol.files import write_private
from consortium.protocol.keys import Lock
from consortium.protocol.sealed import DATA_KEY, DataKey, data_key, sealed_file
from consortium.protocol.signing import MODEL, raw, sign
from consortium.server import pki
from consortium.server.pki import Authority
from consortium.server.roster import Issue, Roster
from consortium.server.sockets import EVERYWHERE

CONFIG = "server.toml"
ROOT_KEY, ROOT, ISSUING, SERVER = "root.key", "root.pem", "issuing.pem", "server.pem"
INSTRUCTION_KEY, NEXT_KEY, TRUST = "instruction.key", "instruction.next", "trust.json"
ADMIN_TOKEN, DATABASE = "admin.token", "consortium.db"
CHECKPOINTS, EPOCH_FILE = "checkpoints", "epoch.json"


class Config(Configuration):
    """server.toml. A port of 0 takes a free one. bind, admin_bind: addresses that the doors listen on.

    key_file: absolute path of what private keys are encrypted under, "" for a passphrase.
    """

    name: Name
    host: Host
    port: configuration.DoorPort = 9440
    admin_port: configuration.DoorPort = 9441
    enrol_port: configuration.DoorPort = 9442
    bind: Host = "0.0.0.0"  # noqa: S104 - sites come from elsewhere
    admin_bind: Host = "127.0.0.1"
    key_file: KeyFile = ""

    @property
    def names(self) -> list[str]:
        """Names and addresses that the doors' certificate is for, beside those of this machine alone."""
        return [self.host, *([] if self.admin_bind in EVERYWHERE else [self.admin_bind])]


class Federation:
    """An opened folder. For any number of threads; `Federation.init` makes one, `Federation.open` opens it."""

    def __init__(self, folder: Path, config: Config, lock: Lock) -> None:
        self.folder, self.config = folder, config
        self._lock = lock
        self._changing = threading.RLock()
        self._contexts: dict[ssl.VerifyMode, ssl.SSLContext] = {}
        self._load()

    @staticmethod
    def init(
        folder: Path,
        *,
        name: str,
        host: str,
        port: int = 9440,
        admin_port: int = 9441,
        enrol_port: int = 9442,
        bind: str = "0.0.0.0",  # noqa: S104 - sites come from elsewhere
        key_file: Path | None = None,
        use_passphrase: bool = False,
        now: float,
        environment: Mapping[str, str] = os.environ,
    ) -> Federation:
        """Make a federation in a new or empty folder. What an interrupted call left is completed, never replaced.

        key_file: what private keys are encrypted under; DIR.key beside the folder where it is left out, and made where
        it is missing. use_passphrase: a passphrase instead.

        Raises:
            InputError: a value is wrong (every one is named), the folder holds something else, or another federation.
        """
        from consortium.server.audit import open_audit
        from consortium.server.founding import found

        settings = {
            "name": name, "host": host, "port": port, "admin_port": admin_port, "enrol_port": enrol_port,
            "bind": bind,
        }  # fmt: skip
        made = Federation(*found(folder, settings, key_file, use_passphrase, now, environment))
        open_audit(made, lambda: now)
        return made

    @staticmethod
    def open(folder: Path, lock: Lock | None = None) -> Federation:
        """The federation in a folder. lock: what its keys are encrypted under, else as its configuration says.

        Raises:
            InputError: there is none, it is incomplete, its configuration has mistakes, or the lock is not its.
            IntegrityError: its files do not belong together.
        """
        folder = folder.absolute()
        if not (folder / CONFIG).exists():
            raise InputError(
                f"{folder}: holds no federation (no {CONFIG}); type: "
                f"consortium server init --dir {folder} --name NAME --host HOST"
            )
        config = configuration.read(folder / CONFIG, Config)
        for file in (ROOT, ISSUING, SERVER, INSTRUCTION_KEY, TRUST, DATABASE):
            if not (folder / file).exists():
                raise InputError(
                    f"{folder}: {file} is missing; restore it from a backup or, where making the federation was "
                    f"interrupted, type again: consortium server init --dir {folder} --name {config.name} "
                    f"--host {config.host}"
                )
        return Federation(folder, config, lock or keys.lock_from(config.key_file, folder))

    def _load(self) -> None:
        """Read the files, and check that they belong together."""
        self.root = credentials.chain_in(self.folder / ROOT)[0]
        self._issuing = self._authority()
        document = _document(self.folder / TRUST)
        self._trust = trust.verified(document, self.root, self.config.name)
        self._trust_document = document
        self._instruction_key = self._newest_key()
        self.epoch = _epoch(self.folder / EPOCH_FILE)
        _, chain = credentials.load(self.folder / SERVER, self._lock)
        credentials.check_issued(chain, self.root, str(self.folder / SERVER))
        self._leaf = chain[0]
        self._contexts.clear()

    def _authority(self) -> Authority:
        path = self.folder / ISSUING
        key, chain = credentials.load(path, self._lock)
        credentials.check_issued(chain, self.root, str(path))
        return Authority(key, chain[0])

    def _newest_key(self) -> Ed25519PrivateKey:
        """The key that the statement names first. An interrupted rotation left it under another name."""
        path, successor = self.folder / INSTRUCTION_KEY, self.folder / NEXT_KEY
        wanted = raw(self._trust.keys[0])
        if successor.exists():
            key = keys.load_ed25519(successor, self._lock)
            if raw(key.public_key()) == wanted:
                successor.replace(path)
        key = keys.load_ed25519(path, self._lock)
        if raw(key.public_key()) != wanted:
            raise IntegrityError(
                f"{path}: is not the key that {TRUST} names; restore both from the same backup"
            )
        return key

    # What the doors ask

    @property
    def root_fingerprint(self) -> str:
        """SHA-256 (hex) of the root certificate's DER: what join codes hold and people compare."""
        return credentials.fingerprint(self.root)

    @property
    def root_pem(self) -> bytes:
        """The root certificate."""
        return credentials.pem([self.root])

    @property
    def instruction_key(self) -> Ed25519PrivateKey:
        """The key that signs instructions now."""
        with self._changing:
            return self._instruction_key

    @property
    def trust_serial(self) -> int:
        """The serial of the statement of now."""
        with self._changing:
            return self._trust.serial

    @property
    def certificate(self) -> x509.Certificate:
        """The doors' certificate of now."""
        with self._changing:
            return self._leaf

    def trust(self) -> dict[str, Any]:
        """The trust statement of now, as it travels."""
        with self._changing:
            return dict(self._trust_document)

    def seal(self, content: bytes, purpose: str = MODEL) -> dict[str, Any]:
        """The signature of a model's manifest, or of another document for its purpose, with all that whoever knows the
        root needs to check it."""
        with self._changing:
            return {
                "federation": self.config.name,
                "root": self.root_pem.decode(),
                "trust": dict(self._trust_document),
                "signature": sign(self._instruction_key, purpose, content).hex(),
            }

    def site_context(self) -> ssl.SSLContext:
        """TLS 1.3 for the site door: the peer shows a certificate of this federation that is for clients."""
        return self._context(ssl.CERT_REQUIRED)

    def open_context(self) -> ssl.SSLContext:
        """TLS 1.3 for the enrolment and the admin door, where nobody has a certificate."""
        return self._context(ssl.CERT_NONE)

    def _context(self, mode: ssl.VerifyMode) -> ssl.SSLContext:
        with self._changing:
            if mode not in self._contexts:
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                context.minimum_version = ssl.TLSVersion.TLSv1_3
                # Each connection shows its certificate anew: a revoked site has no session to come back with.
                context.num_tickets = 0
                context.options |= ssl.OP_NO_TICKET
                credentials.present(context, self.folder / SERVER, self._lock)
                if mode is ssl.CERT_REQUIRED:
                    context.load_verify_locations(cadata=self.root_pem.decode())
                    context.verify_flags |= ssl.VERIFY_X509_STRICT
                    context.verify_mode = mode
                self._contexts[mode] = context
            return self._contexts[mode]

    def issuer_for(self, csr: str) -> Issue:
        """What makes a certificate over the key of a request (PEM), under the name that the roster gives it.

        Raises:
            IntegrityError: the request is malformed, or its key is of another kind than expected.
        """
        key = pki.requested_key(csr)
        with self._changing:
            issuing = self._issuing
        return lambda site, now: pki.site_leaf(key, issuing, self.config.name, site, now)

    def issue(self, roster: Roster, site: str, csr: str) -> str:
        """Another certificate chain (PEM) for a site that has joined. Raises as `issuer_for` and `Roster.renew`."""
        return roster.renew(site, self.issuer_for(csr))

    def data_key(self) -> DataKey:
        """What checkpoints are encrypted under. A federation of an earlier version has none yet: it is made.

        Raises:
            InputError, IntegrityError: it was lost or damaged.
        """
        kept = self.folder / CHECKPOINTS
        fresh = not kept.is_dir() or not any(map(sealed_file, kept.iterdir()))
        return data_key(self.folder / DATA_KEY, self._lock, make=fresh)

    # Successors

    def renew_if_due(self, now: float) -> bool:
        """Replace the doors' certificate where two thirds of its life are over, or it lacks a name of the
        configuration's. New connections get the new one. Whether it was replaced."""
        with self._changing:
            there = pki.names(self._leaf)
            named = all(pki.general_name(one) in there for one in self.config.names)
            longest = self._issuing.certificate.not_valid_after_utc <= self._leaf.not_valid_after_utc
            if named and (longest or not credentials.due(self._leaf, now)):
                return False
            self._new_leaf(now)
            self._load()
        return True

    def advice(self, now: float) -> str:
        """What the admin should do soon, or "": the issuing authority has a successor only by `rotate`."""
        with self._changing:
            certificate = self._issuing.certificate
        if not credentials.due(certificate, now):
            return ""
        last = certificate.not_valid_after_utc.date()
        return f"the issuing authority ends on {last}; before that, type: consortium server rotate --dir {self.folder}"

    def rotate(self, now: float) -> None:
        """New issuing authority, doors' certificate and instruction key, signed by the root.

        Sites go on meanwhile: their certificates stay valid, and the statement names the key of before, too, until the
        next rotation. Interrupted anywhere, the folder opens as before or after it.

        Raises:
            InputError: the root's key is not here.
        """
        with self._changing:
            root = root_authority(self.folder, self._lock)
            new_issuing(self.folder, root, self.config.name, now, self._lock)
            self._issuing = self._authority()
            self._new_leaf(now)
            successor = Ed25519PrivateKey.generate()
            keys.save_key(self.folder / NEXT_KEY, successor, self._lock)
            both = [successor.public_key(), self._instruction_key.public_key()]
            serial = self._trust.serial + 1
            write_trust(self.folder, trust.state(root.key, self.config.name, serial, both, int(now)))
            self._load()

    def _new_leaf(self, now: float) -> None:
        new_leaf(self.folder, self._issuing, self.config, now, self._lock)


def root_authority(folder: Path, lock: Lock) -> Authority:
    """The root with its key.

    Raises:
        InputError: the key is not here.
        IntegrityError: it is another root's.
    """
    path = folder / ROOT_KEY
    if not path.exists():
        raise InputError(
            f"{path}: the root's key is not here; put {ROOT_KEY} back for as long as this takes, then try again"
        )
    key, certificate = keys.load_ec(path, lock), credentials.chain_in(folder / ROOT)[0]
    if not credentials.same_key(key.public_key(), certificate.public_key()):
        raise IntegrityError(f"{path}: is the key of another root than {ROOT}; put the right one there")
    return Authority(key, certificate)


def new_issuing(folder: Path, root: Authority, federation: str, now: float, lock: Lock) -> None:
    """Make the issuing authority, in place of the one before."""
    key = pki.new_key()
    credentials.save(folder / ISSUING, key, [pki.issuing(key, root, federation, now)], lock)


def new_leaf(folder: Path, issuing: Authority, config: Config, now: float, lock: Lock) -> None:
    """Make the doors' certificate and its key, in place of those before."""
    key = pki.new_key()
    leaf = pki.server_leaf(key.public_key(), issuing, config.name, config.names, now)
    credentials.save(folder / SERVER, key, [leaf, issuing.certificate], lock)


def write_trust(folder: Path, document: Mapping[str, str]) -> None:
    """Put a trust statement in place of the one before."""
    write_private(folder / TRUST, json.dumps(document).encode())


def _epoch(path: Path) -> int:
    if not path.exists():
        return 0
    document = _document(path)
    if document.get("format") != 1 or type(document.get("epoch")) is not int:
        raise IntegrityError(f"{path}: is damaged; restore it from a backup")
    return int(document["epoch"])


def _document(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{path}: cannot be read or is damaged; restore it from a backup") from error
    if not isinstance(document, dict):
        raise IntegrityError(f"{path}: is damaged; restore it from a backup")
    return document
