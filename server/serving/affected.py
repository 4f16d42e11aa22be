"""Which versions hold updates of a site: what must be known when it leaves, or a person of its withdraws."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from consortium.protocol.errors import IntegrityError
from consortium.server import seal
from consortium.server.serving.registry import Registry
from consortium.server.serving.versions import CANDIDATE, CHAMPION, Version


def affected_by(registry: Registry, site: str) -> list[dict[str, Any]]:
    """The versions that hold updates of a site: name, version, aliases, withdrawn, and the rounds in which it counted.

    Raises:
        IntegrityError: a version's lineage is not what was registered.
    """
    found = []
    for name, shelf in sorted(registry.state().models.items()):
        for version in shelf.versions:
            lineage = _lineage(registry.folder / name / str(version.number), version)
            rounds = [
                one["round"]
                for one in lineage["rounds"]
                if site in one["sites"] and not one["void"] and one["round"] > 0
            ]
            if site in lineage["sites"]:
                aliases = [a for a in (CHAMPION, CANDIDATE) if getattr(shelf, a) == version.number]
                about = {"name": name, "version": version.number, "withdrawn": version.withdrawn}
                found.append({**about, "aliases": aliases, "rounds": rounds})
    return found


def _lineage(place: Path, version: Version) -> dict[str, Any]:
    """The lineage in a registered bundle, withdrawn or not, by the digest that the registry keeps."""
    path = place / "lineage.json"
    try:
        manifest, content = (place / seal.MANIFEST).read_bytes(), path.read_bytes()
        listed = json.loads(manifest)["files"]["lineage.json"]
        sound = hashlib.sha256(manifest).hexdigest() == version.bundle
        if not sound or hashlib.sha256(content).hexdigest() != listed:
            raise IntegrityError(f"{path}: is not what was registered; restore it from a backup")
        return dict(json.loads(content))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{path}: cannot be read or is damaged; restore it from a backup") from error
