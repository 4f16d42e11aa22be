"""What holds a model bundle together: `manifest.json`, the SHA-256 of every file, and `signature.json` over it.

Sites may sign the manifest, too: their approvals stand in `signature.json`, which the manifest does not list.

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

from consortium.protocol import signing
from consortium.protocol.errors import InputError, IntegrityError
from consortium.server.vouching import AGAIN, APPROVALS, Signer, approved_by, signer_of

FORMAT = 1
CONTRACT, MANIFEST, SIGNATURE, WITHDRAWN = (
    "contract.json",
    "manifest.json",
    "signature.json",
    "withdrawn.json",
)


@dataclass(frozen=True)
class Sealed:
    """A manifest that was found in order. digest: its SHA-256 (hex), which names the bundle to the byte.

    files: SHA-256 (hex) by name. signer: None for a simulation's. required: how many sites must have approved it.
    approved: names of those that have.
    """

    digest: str
    files: Mapping[str, str]
    signer: Signer | None
    required: int = 0
    approved: tuple[str, ...] = ()


def plain_json(document: Mapping[str, Any]) -> bytes:
    """A document as a bundle holds it: sorted, indented, one spelling."""
    text = json.dumps(document, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False)
    return (text + "\n").encode()


def manifest(hashes: Mapping[str, str], signed_by: str | None, approvals: int = 0) -> bytes:
    """The manifest of files with these SHA-256 (hex). signed_by: the federation, None where nobody signs.

    approvals: how many sites must have approved the bundle before it is used.
    """
    asked = {"approvals": approvals} if approvals else {}
    return plain_json({"format": FORMAT, "files": dict(hashes), "signed_by": signed_by, **asked})


def signature(document: Mapping[str, Any]) -> bytes:
    """`signature.json`: {federation, root, trust, signature}, as `Federation.seal` gives it."""
    return plain_json({"format": FORMAT, **document})


def read(folder: Path, root: str | None = None, *, even_withdrawn: bool = False) -> Sealed:
    """The seal of the bundle in `folder`, after its signature, and the names of its files, were found in order.

    root: the fingerprint that the signer's root must have; any where it is left out. even_withdrawn: for whoever asks
    what it was, and does not use it.

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
    if not even_withdrawn:
        refuse_withdrawn(folder)
    document = _document(folder / MANIFEST, content)
    files, signed_by = document.get("files"), document.get("signed_by")
    required = document.get("approvals", 0)
    known = {*document} - {"approvals"} == {"format", "files", "signed_by"} and isinstance(
        signed_by, str | None
    )
    if type(required) is not int or not known or not _names_files(files):
        raise IntegrityError(f"{folder / MANIFEST}: is damaged (its keys or names of files); {AGAIN}")
    assert isinstance(files, dict)
    digest = hashlib.sha256(content).hexdigest()
    signer, approved = None, tuple[str, ...]()
    if signed_by is not None:
        signer, approved = _vouching(folder / SIGNATURE, content, signed_by)
    if document.get("format") != FORMAT:
        raise InputError(
            f"{folder / MANIFEST}: format {document.get('format')} is not known here; this version reads {FORMAT}"
        )
    gone = [WITHDRAWN] if (folder / WITHDRAWN).exists() else []
    _same_names(folder, {*files, MANIFEST, *([SIGNATURE] if signed_by is not None else []), *gone})
    if root is not None and (signer is None or signer.root != root.lower()):
        raise IntegrityError(f"{folder / (SIGNATURE if signer else MANIFEST)}: {_stranger(signer, root)}")
    return Sealed(digest, files, signer, required, approved)


def _stranger(signer: Signer | None, root: str) -> str:
    if signer is None:
        return "is signed by nobody (a simulation's model); a signature is asked for"
    return (
        f"is signed by federation '{signer.federation}' of root {signer.root}, not of the expected root {root}; "
        f"{AGAIN}, or compare the root with that federation's admin: consortium server status"
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


def check_approved(folder: Path, sealed: Sealed) -> None:
    """Refuse what fewer sites have approved than its manifest asks for.

    Raises:
        IntegrityError: naming who has approved it, and how many are missing.
    """
    missing = sealed.required - len(sealed.approved)
    if missing > 0:
        have = ", ".join(sealed.approved) or "none"
        raise IntegrityError(
            f"{folder / SIGNATURE}: {len(sealed.approved)} of {sealed.required} sites have approved this model "
            f"({have}); {missing} more must: consortium client model approve NAME"
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


def content(folder: Path, sealed: Sealed, name: str) -> bytes:
    """The bytes of a file of a bundle.

    Raises:
        IntegrityError: they are not those that the manifest lists.
    """
    path = folder / name
    try:
        found = path.read_bytes()
    except OSError as error:
        raise IntegrityError(f"{path}: is missing or unreadable ({error.strerror}); {AGAIN}") from error
    if hashlib.sha256(found).hexdigest() != sealed.files.get(name):
        raise IntegrityError(f"{path}: is not what was exported (SHA-256 differs); {AGAIN}")
    return found


def _document(path: Path, content: bytes) -> dict[str, Any]:
    """A JSON object in its one spelling."""
    try:
        document = json.loads(content)
        if not isinstance(document, dict) or plain_json(document) != content:
            raise ValueError("another spelling")
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{path}: is damaged ({type(error).__name__}); {AGAIN}") from error
    return document


def with_approval(
    content: bytes, site: str, identity: str, signature: str, member: Mapping[str, Any]
) -> bytes:
    """`signature.json` with the approval of one more site. member: of `Federation.seal`, over `member_text`."""
    document = json.loads(content)
    entry = {
        "site": site,
        "identity": identity,
        "signature": signature,
        "member": {"format": FORMAT, **member},
    }
    document[APPROVALS] = sorted([*document.get(APPROVALS, []), entry], key=lambda one: str(one["site"]))
    return plain_json(document)


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
        raise IntegrityError(f"{folder / name}: is missing; {AGAIN}")
    for name in sorted(found - right):
        raise IntegrityError(
            f"{folder / name}: is not part of the model that was exported; remove it, or {AGAIN}"
        )


def _vouching(path: Path, content: bytes, federation: str) -> tuple[Signer, tuple[str, ...]]:
    """Who signed the manifest `content`, and which sites approved it, as the file at `path` proves."""
    try:
        document = _document(path, path.read_bytes())
    except OSError as error:
        raise IntegrityError(f"{path}: is damaged ({type(error).__name__}); {AGAIN}") from error
    own = {key: value for key, value in document.items() if key != APPROVALS}
    signer = signer_of(path, own, content, federation, signing.MODEL, MANIFEST)
    return signer, approved_by(path, document, signer, hashlib.sha256(content).hexdigest())


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
