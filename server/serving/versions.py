"""The versions of models and what an act makes of them: registered, promoted, rolled back, withdrawn. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from consortium.protocol.errors import InputError, RefusedError

FORMAT = 1
CHAMPION, CANDIDATE = "champion", "candidate"
PROMOTE, UNGATED, ROLLBACK, WITHDRAW = "promote", "promote ungated", "rollback", "withdraw"
"""Acts that put a version to use or take it out of it."""


@dataclass(frozen=True)
class Version:
    """One registered bundle. bundle: the SHA-256 of its manifest; model: its model's digest. why: it was withdrawn."""

    number: int
    bundle: str
    model: str
    registered: float
    withdrawn: bool = False
    why: str = ""


@dataclass(frozen=True)
class Shelf:
    """The versions of one model, oldest first. before: champions of before, the latest last."""

    versions: tuple[Version, ...] = ()
    champion: int | None = None
    candidate: int | None = None
    before: tuple[int, ...] = ()

    def version(self, number: int) -> Version | None:
        """The version of that number."""
        return next((one for one in self.versions if one.number == number), None)


@dataclass(frozen=True)
class Act:
    """Something that was done. version: the number that is meant, or that became the champion."""

    at: float
    act: str
    model: str
    version: int
    by: str
    why: str = ""


@dataclass(frozen=True)
class State:
    """All of a registry but the bundles."""

    models: Mapping[str, Shelf] = field(default_factory=dict)
    history: tuple[Act, ...] = ()


def registered(shelf: Shelf, bundle: str, model: str, at: float) -> Shelf:
    """One more version, which is the candidate now."""
    for one in shelf.versions:
        if one.bundle == bundle:
            gone = f", withdrawn: {one.why}" if one.withdrawn else ""
            raise RefusedError(f"version {one.number} is this very bundle already{gone}; export another run")
    number = len(shelf.versions) + 1
    return replace(shelf, versions=(*shelf.versions, Version(number, bundle, model, at)), candidate=number)


def promoted(shelf: Shelf, number: int | None) -> Shelf:
    """A version, the candidate where none is named, is the champion."""
    number = shelf.candidate if number is None else number
    if number is None:
        raise InputError("there is no candidate; name a version: NAME@2")
    version = shelf.version(number)
    if version is None:
        raise InputError(f"there is no version {number}; there are {len(shelf.versions)}")
    if version.withdrawn:
        raise RefusedError(f"version {number} was withdrawn ({version.why}); promote another one")
    if number == shelf.champion:
        return replace(shelf, candidate=None if shelf.candidate == number else shelf.candidate)
    before = shelf.before if shelf.champion is None else (*shelf.before, shelf.champion)
    candidate = None if shelf.candidate == number else shelf.candidate
    return replace(shelf, champion=number, candidate=candidate, before=before)


def rolled_back(shelf: Shelf) -> Shelf:
    """The champion of before is champion again; the one of now stays as candidate."""
    others = [n for n in shelf.before if n != shelf.champion]  # it may have been champion before, too
    sound = [n for n in others if (found := shelf.version(n)) and not found.withdrawn]
    if not sound:
        raise RefusedError("there is no champion of before to go back to; promote a version: NAME@1")
    return replace(shelf, champion=sound[-1], candidate=shelf.champion, before=tuple(sound[:-1]))


def withdrawn(shelf: Shelf, number: int, why: str) -> Shelf:
    """A version is out of use for good, under whatever alias."""
    if shelf.version(number) is None:
        raise InputError(f"there is no version {number}; there are {len(shelf.versions)}")
    versions = tuple(
        replace(one, withdrawn=True, why=why) if one.number == number and not one.withdrawn else one
        for one in shelf.versions
    )
    champion = None if shelf.champion == number else shelf.champion
    candidate = None if shelf.candidate == number else shelf.candidate
    before = tuple(one for one in shelf.before if one != number)
    return Shelf(versions, champion, candidate, before)


def document(state: State) -> bytes:
    """The state as `registry.json` holds it."""
    models = {name: asdict(shelf) for name, shelf in state.models.items()}
    whole = {"format": FORMAT, "models": models, "history": [asdict(one) for one in state.history]}
    return (json.dumps(whole, indent=1, sort_keys=True) + "\n").encode()


def parsed(content: bytes) -> State:
    """The inverse of `document`.

    Raises:
        ValueError, KeyError, TypeError, AttributeError, RecursionError: it is anything else.
    """
    whole = json.loads(content)
    if whole["format"] != FORMAT:
        raise ValueError("format")
    models = {name: _parsed_shelf(one) for name, one in whole["models"].items()}
    return State(models, tuple(Act(**one) for one in whole["history"]))


def _parsed_shelf(found: Mapping[str, Any]) -> Shelf:
    versions: Sequence[Mapping[str, Any]] = found["versions"]
    return Shelf(
        tuple(Version(**one) for one in versions),
        found["champion"],
        found["candidate"],
        tuple(found["before"]),
    )
