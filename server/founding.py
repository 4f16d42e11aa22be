"""Making a federation's folder, step by step: each step is durable, and done only where it is not done yet.

Called again after it was interrupted anywhere, it completes what there is. It never replaces a root.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import NameOID

from consortium.protocol import configuration, credentials, keys, trust
from consortium.protocol.errors import InputError
from consortium.protocol.exclusive import alone
from consortium.protocol.files import private_folder, write_private
from consortium.protocol.keys import Lock
from consortium.protocol.sealed import DATA_KEY, data_key
from consortium.server import pki
from consortium.server.federation import (
    ADMIN_TOKEN,
    CONFIG,
    DATABASE,
    INSTRUCTION_KEY,
    ISSUING,
    ROOT,
    ROOT_KEY,
    SERVER,
    TRUST,
    Config,
    new_issuing,
    new_leaf,
    root_authority,
    write_trust,
)
from consortium.server.pki import Authority
from consortium.server.roster import Roster
from consortium.server.store import Store

ADMIN = "admin"


def found(
    folder: Path,
    settings: Mapping[str, Any],
    key_file: Path | None,
    use_passphrase: bool,
    now: float,
    environment: Mapping[str, str],
) -> tuple[Path, Config, Lock]:
    """Make what is missing of a federation's folder; what `Federation` is opened with. Raises as `Federation.init`."""
    folder = folder.absolute()
    chosen = "" if use_passphrase else str((key_file or folder.with_name(folder.name + ".key")).absolute())
    wanted = configuration.checked("the federation", Config, {**settings, "key_file": chosen})
    _check_place(folder, wanted)
    private_folder(folder)
    with alone(folder):
        fresh = not (folder / ROOT_KEY).exists() and not (folder / ROOT).exists()
        lock = (
            credentials.lock_at(Path(chosen)) if chosen else keys.passphrase(folder, environment, new=fresh)
        )
        if not (folder / CONFIG).exists():
            configuration.write(folder / CONFIG, wanted)
        _make(folder, wanted, lock, now)
    return folder, wanted, lock


def _check_place(folder: Path, wanted: Config) -> None:
    """The folder is new, empty, or that of this very federation.

    Raises:
        InputError: it is none of these.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InputError(f"{folder}: is a file; give a new or empty folder")
    if (folder / CONFIG).exists():
        there = configuration.read(folder / CONFIG, Config)
        differing = [key for key in Config.model_fields if getattr(there, key) != getattr(wanted, key)]
        if differing:
            lines = [
                f"  {key}: {getattr(there, key)!r} there, {getattr(wanted, key)!r} asked for"
                for key in differing
            ]
            raise InputError(
                "\n".join(
                    [
                        f"{folder}: holds the federation '{there.name}' already, and differs:",
                        *lines,
                        f"Give another folder; or change {folder / CONFIG}, whose values count from the next start on.",
                    ]
                )
            )
    elif (folder / ROOT).exists():
        subject = credentials.chain_in(folder / ROOT)[0].subject
        name = str(subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)[0].value)
        if name != wanted.name:
            raise InputError(
                f"{folder}: holds the root of federation '{name}'; give another folder, or that name"
            )
    elif not (folder / ROOT_KEY).exists() and any(keys.counts(one) for one in folder.iterdir()):
        raise InputError(f"{folder}: is not empty; give a new or empty folder")


def _check_order(folder: Path) -> None:
    """What is missing was not made yet; a file that was lost later is no thing to make anew: sites know the old one.

    Raises:
        InputError: it was.
    """
    files = (ROOT, ISSUING, SERVER, INSTRUCTION_KEY, TRUST, DATABASE, ADMIN_TOKEN)
    there = [(folder / file).exists() for file in files]
    for place, file in enumerate(files):
        if not there[place] and any(there[place + 1 :]):
            raise InputError(f"{folder}: {file} was lost, and cannot be made anew; restore it from a backup")


def _make(folder: Path, config: Config, lock: Lock, now: float) -> None:
    _check_order(folder)
    if not (folder / ROOT).exists():
        if not (folder / ROOT_KEY).exists():
            keys.save_key(folder / ROOT_KEY, pki.new_key(), lock)
        key = keys.load_ec(folder / ROOT_KEY, lock)
        write_private(folder / ROOT, credentials.pem([pki.root(key, config.name, now)]))
    if not (folder / ISSUING).exists():
        new_issuing(folder, root_authority(folder, lock), config.name, now, lock)
    if not (folder / SERVER).exists():
        key, chain = credentials.load(folder / ISSUING, lock)
        new_leaf(folder, Authority(key, chain[0]), config, now, lock)
    if not (folder / INSTRUCTION_KEY).exists():
        keys.save_key(folder / INSTRUCTION_KEY, Ed25519PrivateKey.generate(), lock)
    if not (folder / TRUST).exists():
        root = root_authority(folder, lock)
        first = keys.load_ed25519(folder / INSTRUCTION_KEY, lock).public_key()
        write_trust(folder, trust.state(root.key, config.name, 1, [first], int(now)))
    data_key(folder / DATA_KEY, lock)
    for name in ("checkpoints", "spool", "runs"):
        private_folder(folder / name)
    store = Store(folder / DATABASE)
    try:
        if not (folder / ADMIN_TOKEN).exists():
            token = Roster(store, lambda: now).new_token(ADMIN, "admin")
            write_private(folder / ADMIN_TOKEN, f"{token}\n".encode())
    finally:
        store.close()
