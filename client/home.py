"""The folder of a site's client: where everything lies, its configuration, its keys, and whom it trusts.

    client.toml       federation, site, host, port, proxy, key_file
    identity.key      Ed25519: who the site is; it stays the same when certificates change
    tls.pem           the private key of connections and its certificate chain, in one file
    root.pem          the federation's root certificate, pinned at joining
    trust.json        the keys that may sign instructions, signed by the root
    policy.toml       what may run; data.toml and data/NAME/: over which data
    data.key          what is kept of runs is encrypted under, itself encrypted
    audit/            what happened here, signed (`client/audit.py`)
    heads.json        what the server said last of its log and of ours
    state/ seen.json spool/ agent.sock log

Folders have mode 0700, files 0600, private keys are encrypted. `client/joining.py` fills the folder.
"""

from __future__ import annotations

import json
import os
import ssl
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from consortium.protocol import configuration, credentials, keys
from consortium.protocol.configuration import Configuration, Host, KeyFile, Name, Port, Proxy
from consortium.protocol.connection import Connection, trusting
from consortium.protocol.errors import InputError, IntegrityError
from consortium.protocol.files import write_private
from consortium.protocol.keys import Lock
from consortium.protocol.sealed import DATA_KEY, DataKey, data_key, sealed_file
from consortium.protocol.trust import Trust, verified


class Config(Configuration):
    """client.toml. key_file: absolute path of what private keys are encrypted under, "" for a passphrase."""

    federation: Name
    site: Name
    host: Host
    port: Port
    proxy: Proxy = ""
    key_file: KeyFile = ""


class Home:
    """A client's folder. Making one reads nothing; what is missing or wrong shows where it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder).absolute()
        self.config_file = self.folder / "client.toml"
        self.identity_file = self.folder / "identity.key"
        self.tls_file = self.folder / "tls.pem"
        self.joining_key = self.folder / "tls.key"  # only while joining is under way
        self.root_file = self.folder / "root.pem"
        self.trust_file = self.folder / "trust.json"
        self.policy_file = self.folder / "policy.toml"
        self.data_file = self.folder / "data.toml"
        self.ledger_file = self.folder / "ledger.jsonl"
        self.witness_file = self.folder / "ledger.witness.json"
        self.audit = self.folder / "audit"
        self.heads_file = self.folder / "heads.json"
        self.state = self.folder / "state"
        self.seen_file = self.folder / "seen.json"
        self.spool = self.folder / "spool"
        self.socket = self.folder / "agent.sock"
        self.log = self.folder / "log"

    def data(self, name: str) -> Path:
        """Where mapping and holdout key of a data set lie."""
        return self.folder / "data" / name

    @property
    def default_key_file(self) -> Path:
        """Beside the folder, so that a copy of the folder alone opens no key."""
        return self.folder.with_name(self.folder.name + ".key")

    @property
    def joined(self) -> bool:
        """Whether joining was completed here."""
        return all(file.exists() for file in (self.config_file, self.identity_file, self.tls_file))

    @cached_property
    def config(self) -> Config:
        """The configuration; read once.

        Raises:
            InputError: it is missing (the site has not joined), or every mistake in it.
        """
        if not self.config_file.exists():
            raise InputError(
                f"{self.folder}: no site has joined from here; type: consortium client join --dir {self.folder}"
            )
        return configuration.read(self.config_file, Config)

    def lock(self, environment: Mapping[str, str] = os.environ) -> Lock:
        """What the private keys are encrypted under: the key file of the configuration, else a passphrase."""
        return keys.lock_from(self.config.key_file, self.folder, environment)

    @property
    def root(self) -> x509.Certificate:
        """The federation's root certificate."""
        return credentials.chain_in(self.root_file)[0]

    @property
    def certificate(self) -> x509.Certificate:
        """The site's certificate of now."""
        return credentials.chain_in(self.tls_file)[0]

    def renewal_due(self, now: float) -> bool:
        """Whether two thirds of the certificate's life are over (`client/joining.py` renews it)."""
        return credentials.due(self.certificate, now)

    def identity(self, lock: Lock) -> Ed25519PrivateKey:
        """The key that signs answers."""
        return keys.load_ed25519(self.identity_file, lock)

    def data_key(self, lock: Lock) -> DataKey:
        """What answers and state are encrypted under; made where nothing is encrypted yet.

        Raises:
            InputError, IntegrityError: it was lost or damaged, or the lock is not its.
        """
        fresh = not self.state.is_dir() or not any(map(sealed_file, self.state.glob("*.kept")))
        return data_key(self.folder / DATA_KEY, lock, make=fresh)

    def tls_context(self, lock: Lock) -> ssl.SSLContext:
        """TLS 1.3 towards the federation's server alone, showing the site's certificate of now.

        Raises:
            InputError: a file is missing, or the lock is not its.
            IntegrityError: a file is damaged.
        """
        credentials.chain_in(self.root_file)
        context = trusting(self.root_file)
        credentials.present(context, self.tls_file, lock)
        return context

    def connection(self, lock: Lock, *, timeout: float = 60.0) -> Connection:
        """A new connection to the site door."""
        one = self.config
        return Connection(one.host, one.port, self.tls_context(lock), proxy=one.proxy, timeout=timeout)

    def trust(self) -> Trust:
        """The statement that is held here, verified: `.keys` may sign instructions, `.serial` is its number.

        Raises:
            InputError: it cannot be read.
            IntegrityError: it is not the root's, or another federation's.
        """
        return verified(self._held(), self.root, self.config.federation)

    def accept_trust(self, document: Mapping[str, Any]) -> Trust:
        """Hold a statement from the server in place of the one before; durable when it returns.

        Raises:
            IntegrityError: it is not the root's, another federation's, older than the one that is held, or differs
                from that under the same serial. What is held stays then.
        """
        new = verified(document, self.root, self.config.federation)
        if self.trust_file.exists():
            held = self._held()
            before = verified(held, self.root, self.config.federation)
            if new.serial < before.serial:
                raise IntegrityError(
                    f"trust statement: got serial {new.serial}, serial {before.serial} is held; the server "
                    "shows an old one, ask its admin whether it was restored from a backup"
                )
            if new.serial == before.serial:
                if document["statement"] != held["statement"]:
                    raise IntegrityError(
                        f"trust statement: two statements have serial {new.serial}; ask the server's admin"
                    )
                return before
        kept = {"statement": document["statement"], "signature": document["signature"]}
        write_private(self.trust_file, json.dumps(kept).encode())
        return new

    def _held(self) -> dict[str, Any]:
        try:
            document = json.loads(self.trust_file.read_bytes())
        except OSError as error:
            raise InputError(f"{self.trust_file}: cannot be read ({error.strerror})") from error
        except ValueError as error:
            raise IntegrityError(f"{self.trust_file}: is damaged; restore it from a backup") from error
        if not isinstance(document, dict):
            raise IntegrityError(f"{self.trust_file}: is damaged; restore it from a backup")
        return document
