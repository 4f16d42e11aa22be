"""The result of a gate, signed by the federation, beside the version that it is about: NAME/2.gate.json.

    {"format": 1, "gate": {...}, "signature": {...}}

`gate` names both bundles by the digest of their manifests, the terms, what the sites' counts gave, and whether the
version passed. It counts for just that version against just that champion.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from consortium.protocol import signing
from consortium.protocol.errors import InputError, IntegrityError, RefusedError
from consortium.protocol.files import write_private
from consortium.server import seal, vouching

FORMAT = 1
MODELS = "models"
"""A federation's registry, in its folder."""
Sign = Callable[[bytes, str], Mapping[str, Any]]
"""From a content and its purpose to the document of its signature (`Federation.seal`)."""


def place(registry: Path, name: str, number: int) -> Path:
    """Where the result of a version's gate lies."""
    return registry / name / f"{number}.gate.json"


def of_federation(registry: Path) -> bool:
    """Whether a registry is a federation's own, DIR/models: a version must pass its gate there to be the champion."""
    place = registry.resolve()  # by whatever name it is reached
    return place.name == MODELS and (place.parent / "server.toml").exists()


def write(path: Path, gate: Mapping[str, Any], sign: Sign) -> None:
    """Keep a result, signed."""
    signature = sign(seal.plain_json(gate), signing.GATE)
    document = {"format": FORMAT, "gate": gate, "signature": {"format": seal.FORMAT, **signature}}
    write_private(path, seal.plain_json(document))


def read(path: Path) -> tuple[dict[str, Any], vouching.Signer]:
    """A result, and who signed it.

    Raises:
        InputError: there is none, or one of a format that is not known here.
        IntegrityError: it is damaged, or signed by nobody of its federation.
    """
    try:
        content = path.read_bytes()
        document = json.loads(content)
        gate, signature = document["gate"], document["signature"]
        federation = str(gate["federation"])
        sound = seal.plain_json(document) == content and isinstance(signature, dict)
    except FileNotFoundError as error:
        raise InputError(f"{path}: there is no gate") from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise IntegrityError(
            f"{path}: is damaged ({type(error).__name__}); gate the version again"
        ) from error
    if not sound:
        raise IntegrityError(f"{path}: is damaged (another spelling); gate the version again")
    signer = vouching.signer_of(path, signature, seal.plain_json(gate), federation, signing.GATE, "the gate")
    if document.get("format") != FORMAT:
        raise InputError(
            f"{path}: format {document.get('format')} is not known here; this version reads {FORMAT}"
        )
    return gate, signer


def check(
    registry: Path, name: str, number: int, bundle: str, champion: str | None, root: str | None
) -> None:
    """Refuse a version of a federation's registry that has not passed its gate against the champion of now.

    bundle, champion: digests of the two bundles' manifests. root: fingerprint of the root that signed the bundle.

    Raises:
        RefusedError: it was not gated, did not pass, or was held against another champion.
        IntegrityError: the result is damaged, of another version, or signed by somebody else.
    """
    path, again = (
        place(registry, name, number),
        f"consortium model gate {name}@{number} --dir {registry.parent}",
    )
    if not path.exists():
        raise RefusedError(
            f"{name}@{number}: has not been gated at the sites; type: {again} (or promote it --ungated --why TEXT)"
        )
    gate, signer = read(path)
    if gate.get("bundle") != bundle or signer.root != root:
        raise IntegrityError(f"{path}: is the gate of another model; type: {again}")
    against = gate["against"]["bundle"] if gate.get("against") else None
    if against != champion:
        raise RefusedError(f"{name}@{number}: was gated against another champion than now; type: {again}")
    if gate.get("passed") is not True:
        why = "; ".join(map(str, gate.get("why", [])[:3]))
        raise RefusedError(f"{name}@{number}: did not pass its gate: {why}")
