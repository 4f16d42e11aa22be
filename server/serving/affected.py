"""Which versions hold updates of a site: what must be known when it leaves, or a person of its withdraws.

Every bundle is read, withdrawn or not, and each must be the one that was registered and, where it is signed, as it was
signed. In a federation's registry the registry itself must be what its audit log says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from consortium.protocol.errors import InputError, IntegrityError
from consortium.server import seal
from consortium.server.serving import acts, gate_file
from consortium.server.serving.registry import Registry
from consortium.server.serving.versions import CANDIDATE, CHAMPION, Version

LINEAGE = "lineage.json"


@dataclass(frozen=True)
class Affected:
    """versions: those that hold updates of the site: name, version, aliases, withdrawn, the rounds in which it counted
    (none where its statistics alone did, or where it is not told), and `told`: whether its rounds can be told, which
    those of drawn cohorts cannot. sites: all that any version holds something of. damaged: what could not be read, and
    may hold updates of it too.
    """

    versions: tuple[Mapping[str, Any], ...]
    sites: tuple[str, ...]
    damaged: tuple[str, ...]


def affected_by(registry: Registry, site: str) -> Affected:
    """The versions that hold updates of a site.

    Raises:
        IntegrityError: the registry is not what the audit log of its federation says.
        InputError: there is no registry.
    """
    state = registry.state()
    if gate_file.of_federation(registry.folder):
        acts.check_registry(registry)
    found, sites, damaged = list[Mapping[str, Any]](), set[str](), list[str]()
    for name, shelf in sorted(state.models.items()):
        for version in shelf.versions:
            try:
                lineage = _lineage(registry.folder / name / str(version.number), version)
                held, rounds, told = set(map(str, lineage["sites"])), _rounds(lineage, site), _told(lineage)
            except (InputError, IntegrityError) as error:
                damaged.append(str(error))
                continue
            except (KeyError, TypeError, AttributeError) as error:
                place = registry.folder / name / str(version.number) / LINEAGE
                damaged.append(f"{place}: is damaged ({type(error).__name__}); restore it from a backup")
                continue
            sites |= held
            if site in held or rounds:
                aliases = [a for a in (CHAMPION, CANDIDATE) if getattr(shelf, a) == version.number]
                about = {"name": name, "version": version.number, "withdrawn": version.withdrawn}
                found.append({**about, "aliases": aliases, "rounds": rounds, "told": told})
    return Affected(tuple(found), tuple(sorted(sites)), tuple(damaged))


def _rounds(lineage: Mapping[str, Any], site: str) -> list[int]:
    """The rounds in which a site counted, without that of the statistics."""
    rounds = lineage["rounds"]
    return [one["round"] for one in rounds if site in one["sites"] and not one["void"] and one["round"] > 0]


def _told(lineage: Mapping[str, Any]) -> bool:
    """Whether the lineage says who was in which round: of drawn cohorts it does not."""
    return any(one["sites"] for one in lineage["rounds"] if not one["void"] and one["round"] > 0)


def _lineage(place: Path, version: Version) -> dict[str, Any]:
    """The lineage in a registered bundle, withdrawn or not."""
    sealed = seal.read(place, even_withdrawn=True)
    if sealed.digest != version.bundle:
        raise IntegrityError(
            f"{place / seal.MANIFEST}: is not the bundle that was registered; restore it from a backup"
        )
    return dict(json.loads(seal.content(place, sealed, LINEAGE)))
