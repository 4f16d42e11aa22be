"""Who signed what: a federation by its instruction key, and sites that approve a bundle by their identity keys.

A signature's document carries the root certificate and the root's statement about the key, so whoever knows the root's
fingerprint needs nothing else. An approval also carries the federation's word that the key is that site's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm

from consortium.protocol import delivery, signing, trust
from consortium.protocol.credentials import fingerprint, pem
from consortium.protocol.errors import IntegrityError
from consortium.protocol.messages import canonical

FORMAT = 1
APPROVALS = "approvals"
AGAIN = "get the model again"
DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)


@dataclass(frozen=True)
class Signer:
    """Who signed a bundle. root: SHA-256 (hex) of the federation's root certificate, what people compare."""

    federation: str
    root: str


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
        raise IntegrityError(f"{path}: does not vouch for {what} ({error}); {AGAIN}") from error
    except (*DAMAGE, InvalidSignature, x509.InvalidVersion, UnsupportedAlgorithm) as error:
        raise IntegrityError(f"{path}: is damaged ({type(error).__name__}); {AGAIN}") from error
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


def approved_by(path: Path, document: Mapping[str, Any], signer: Signer, bundle: str) -> tuple[str, ...]:
    """The sites that approved the bundle of this digest, as the signature file at `path` proves.

    Each signed the digest with a key of which the same federation says that it is that site's.

    Raises:
        IntegrityError: an approval does not hold, or the file is damaged.
    """
    if APPROVALS not in document:
        return ()
    try:
        names = [_approving(path, one, signer, bundle) for one in document[APPROVALS]]
        if not names or names != sorted(set(names)):
            raise IntegrityError("the sites are not in order")
    except IntegrityError as error:
        raise IntegrityError(f"{path}: an approval does not hold ({error}); {AGAIN}") from error
    except DAMAGE as error:
        raise IntegrityError(f"{path}: is damaged ({type(error).__name__}); {AGAIN}") from error
    return tuple(names)


def _approving(path: Path, one: Mapping[str, Any], signer: Signer, bundle: str) -> str:
    """The site of an approval that holds."""
    site, identity, given = str(one["site"]), str(one["identity"]), str(one["signature"])
    member = member_text(signer.federation, site, identity)
    vouching = signer_of(path, one["member"], member, signer.federation, signing.MEMBER, f"site {site}")
    text = delivery.approval(signer.federation, site, bundle)
    signing.verify(signing.public_key(identity), signing.APPROVAL, text, bytes.fromhex(given))
    spelled = bytes.fromhex(given).hex() == given and bytes.fromhex(identity).hex() == identity
    if vouching.root != signer.root or not spelled or set(one) != {"site", "identity", "signature", "member"}:
        raise IntegrityError("it is not as it was written")
    return site


def member_text(federation: str, site: str, identity: str) -> bytes:
    """What a federation signs, for the purpose `MEMBER`, to say whose an identity key (hex) is."""
    return canonical({"federation": federation, "site": site, "identity": identity})
