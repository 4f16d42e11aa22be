"""What holds a model bundle together: `manifest.json`, the SHA-256 of every file, and `signature.json` over it.

A live run's manifest is signed by the key that signs the federation's instructions. The signature file carries the
root certificate and the root's statement about that key, so whoever knows the root's fingerprint needs nothing else.
A simulation is signed by nobody, and its manifest says so. Both files have one spelling: another is damage.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm

from consortium.protocol import signing, trust
from consortium.protocol.credentials import fingerprint, pem
from consortium.protocol.errors import InputError, IntegrityError

FORMAT = 1
CONTRACT, MANIFEST, SIGNATURE, WITHDRAWN = (
    "contract.json",
    "manifest.json",
    "signature.json",
    "withdrawn.json",
)
_AGAIN = "get the model again"
_DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError)


@dataclass(frozen=True)
class Signer:
    """Who signed a bundle. root: SHA-256 (hex) of the federation's root certificate, what people compare."""

    federation: str
    root: str


@dataclass(frozen=True)
class Sealed:
    """A manifest that was found in order. digest: its SHA-256 (hex), which names the bundle to the byte.

    files: SHA-256 (hex) by name. signer: None for a simulation's.
    """

    digest: str
    files: Mapping[str, str]
    signer: Signer | None


def plain_json(document: Mapping[str, Any]) -> bytes:
    """A document as a bundle holds it: sorted, indented, one spelling."""
    text = json.dumps(document, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False)
    return (text + "\n").encode()


def manifest(hashes: Mapping[str, str], signed_by: str | None) -> bytes:
    """The manifest of files with these SHA-256 (hex). signed_by: the federation, None where nobody signs."""
    return plain_json({"format": FORMAT, "files": dict(hashes), "signed_by": signed_by})


def signature(document: Mapping[str, Any]) -> bytes:
    """`signature.json`: {federation, root, trust, signature}, as `Federation.seal` gives it."""
    return plain_json({"format": FORMAT, **document})


def read(folder: Path, root: str | None = None) -> Sealed:
    """The seal of the bundle in `folder`, after its signature, and the names of its files, were found in order.

    root: the fingerprint that the signer's root must have; any where it is left out.

    Raises:
        InputError: there is no bundle, or one of a format that is not known here.
        IntegrityError: the seal is damaged or another's, a file is missing or too many, or the bundle was withdrawn.
    """
    try:
        content = (folder / MANIFEST).read_bytes()
    except OSError as error:
        raise InputError(
            f"{folder}: is not an exported model (no readable {MANIFEST}); give the folder that holds it"
        ) from error
    refuse_withdrawn(folder)
    document = _document(folder / MANIFEST, content)
    files, signed_by = document.get("files"), document.get("signed_by")
    known = set(document) == {"format", "files", "signed_by"} and isinstance(signed_by, str | None)
    if not known or not _names_files(files):
        raise IntegrityError(f"{folder / MANIFEST}: is damaged (its keys or names of files); {_AGAIN}")
    assert isinstance(files, dict)
    signer = None if signed_by is None else _signer(folder / SIGNATURE, content, signed_by)
    if document.get("format") != FORMAT:
        raise InputError(
            f"{folder / MANIFEST}: format {document.get('format')} is not known here; this version reads {FORMAT}"
        )
    _same_names(folder, {*files, MANIFEST, *([SIGNATURE] if signed_by is not None else [])})
    if root is not None and (signer is None or signer.root != root.lower()):
        raise IntegrityError(f"{folder / (SIGNATURE if signer else MANIFEST)}: {_stranger(signer, root)}")
    return Sealed(hashlib.sha256(content).hexdigest(), files, signer)


def _stranger(signer: Signer | None, root: str) -> str:
    if signer is None:
        return "is signed by nobody (a simulation's model); a signature is asked for"
    return (
        f"is signed by federation '{signer.federation}' of root {signer.root}, not of the expected root {root}; "
        f"{_AGAIN}, or compare the root with that federation's admin: consortium server status"
    )


def check_signer(folder: Path, sealed: Sealed, roots: tuple[str, ...], unsigned: bool) -> None:
    """Refuse what no trusted federation signed. unsigned: whether a simulation's model will do.

    Raises:
        IntegrityError: nobody signed it, or a federation whose root is not among `roots` (fingerprints, hex).
    """
    if sealed.signer is None and not unsigned:
        raise IntegrityError(
            f"{folder / MANIFEST}: is signed by nobody, as a simulation's model is; where that is meant, add --unsigned"
        )
    if sealed.signer is not None and sealed.signer.root not in {one.lower() for one in roots}:
        raise IntegrityError(
            f"{folder / SIGNATURE}: the signer is not known here: federation '{sealed.signer.federation}', root "
            f"{sealed.signer.root}; compare that with its admin (consortium server status), then add --root FINGERPRINT"
        )


def refuse_withdrawn(folder: Path) -> None:
    """Raises IntegrityError where the bundle was withdrawn, with the reason."""
    path = folder / WITHDRAWN
    if not path.exists():
        return
    try:
        why = str(json.loads(path.read_bytes())["why"])
    except (OSError, ValueError, KeyError, TypeError):
        why = "no readable reason"
    raise IntegrityError(f"{path}: this model was withdrawn ({why}); use another version")


def _document(path: Path, content: bytes) -> dict[str, Any]:
    """A JSON object in its one spelling."""
    try:
        document = json.loads(content)
        if not isinstance(document, dict) or plain_json(document) != content:
            raise ValueError("another spelling")
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{path}: is damaged ({type(error).__name__}); {_AGAIN}") from error
    return document


def _names_files(files: object) -> bool:
    if not isinstance(files, dict) or CONTRACT not in files:
        return False
    reserved = {MANIFEST, SIGNATURE, WITHDRAWN}
    return all(Path(name).name == name and name not in reserved for name in files) and all(
        isinstance(value, str) for value in files.values()
    )


def _same_names(folder: Path, right: set[str]) -> None:
    found = {path.name for path in folder.iterdir()}
    for name in sorted(right - found):
        raise IntegrityError(f"{folder / name}: is missing; {_AGAIN}")
    for name in sorted(found - right):
        raise IntegrityError(
            f"{folder / name}: is not part of the model that was exported; remove it, or {_AGAIN}"
        )


def _signer(path: Path, content: bytes, federation: str) -> Signer:
    """Who signed `content`, as the file at `path` proves."""
    try:
        document = _document(path, path.read_bytes())
    except OSError as error:
        raise IntegrityError(f"{path}: is damaged ({type(error).__name__}); {_AGAIN}") from error
    return signer_of(path, document, content, federation, signing.MODEL, MANIFEST)


def signer_of(
    path: Path, document: Mapping[str, Any], content: bytes, federation: str, purpose: str, what: str
) -> Signer:
    """Who signed `content` for a purpose, as a document says that `signature` made. path, what: for errors.

    Raises:
        IntegrityError: nobody of that federation did, or the document is damaged.
    """
    try:
        text = str(document["root"])
        root = x509.load_pem_x509_certificate(text.encode())
        root.verify_directly_issued_by(root)
        given = str(document["signature"])
        spelled = (
            set(document) == {"format", "federation", "root", "trust", "signature"}
            and document["format"] == FORMAT
            and document["federation"] == federation
            and pem([root]).decode() == text
            and bytes.fromhex(given).hex() == given
            and bytes.fromhex(document["trust"]["signature"]).hex() == document["trust"]["signature"]
        )
        if not spelled:
            raise IntegrityError("it is not as it was written")
        named = trust.verified(document["trust"], root, federation)
        _by_any(named, purpose, content, bytes.fromhex(given))
    except IntegrityError as error:
        raise IntegrityError(f"{path}: does not vouch for {what} ({error}); {_AGAIN}") from error
    except (*_DAMAGE, InvalidSignature, x509.InvalidVersion, UnsupportedAlgorithm) as error:
        raise IntegrityError(f"{path}: is damaged ({type(error).__name__}); {_AGAIN}") from error
    return Signer(federation, fingerprint(root))


def _by_any(named: trust.Trust, purpose: str, content: bytes, given: bytes) -> None:
    for place, key in enumerate(named.keys):
        try:
            signing.verify(key, purpose, content, given)
        except IntegrityError:
            if place == len(named.keys) - 1:
                raise
        else:
            return


def fingerprints(roots: tuple[str, ...]) -> tuple[str, ...]:
    """Fingerprints as given on a command line.

    Raises:
        InputError: one is not 64 hexadecimal digits.
    """
    for one in roots:
        if len(one) != 64 or any(letter not in "0123456789abcdefABCDEF" for letter in one):
            raise InputError(
                f"--root: got {one[:80]!r}; the 64 hexadecimal digits of a root's fingerprint would be right, see: "
                "consortium server status"
            )
    return roots
