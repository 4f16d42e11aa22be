"""A registry of models: a folder with versions, of which one may be the champion and one the candidate.

    registry.json                        versions, aliases and every act, whole or not at all
    breast-cancer/1/ breast-cancer/2/    bundles, never changed; a withdrawn one holds withdrawn.json beside its files

A version is registered (and becomes the candidate), promoted (the candidate becomes the champion), rolled back (the
champion before it is champion again), or withdrawn, for good: a withdrawn bundle is refused wherever it is opened, in
a copy too. Every act is kept with who did it, when and why; those on a federation's registry are in its audit log
before they count.
"""

from __future__ import annotations

import fcntl
import getpass
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from consortium.protocol.delivery import MODEL_NAME
from consortium.protocol.errors import InputError, IntegrityError, nearest
from consortium.protocol.files import private_folder, sync_folder, write_private
from consortium.server import seal, vouching
from consortium.server.model import verified
from consortium.server.serving import acts, gate_file, versions
from consortium.server.serving.versions import CANDIDATE, CHAMPION, Act, Shelf, State, Version

STATE = "registry.json"
_LOCK = ".lock"
_UNFINISHED = (
    ".new.*", f".{STATE}.*", f"*/.{seal.SIGNATURE}.*", f"*/.{seal.WITHDRAWN}.*", "*/.*.gate.json.*",
)  # fmt: skip


class Registry:
    """The registry in a folder; one act at a time, by any number of processes.

    clock: seconds since the epoch. by: who acts, else the machine's user. note: writes to the audit log of the
    federation whose registry it is; without it that log is opened for each act.
    """

    def __init__(
        self,
        folder: Path,
        clock: Callable[[], float],
        by: str | None = None,
        note: acts.Note | None = None,
    ) -> None:
        self.folder, self._clock = folder, clock
        self._by, self._note = by, note

    def state(self) -> State:
        """As of now.

        Raises:
            InputError: there is no registry.
            IntegrityError: its file is damaged.
        """
        path = self.folder / STATE
        try:
            return versions.parsed(path.read_bytes())
        except FileNotFoundError as error:
            raise InputError(
                f"{self.folder}: is no registry of models (no {STATE}); it begins with the first: "
                f"consortium model register BUNDLE --registry {self.folder}"
            ) from error
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror}); correct its permissions") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise IntegrityError(f"{path}: is damaged; restore it from a backup") from error

    def stamp(self) -> int:
        """Another number after every act. Raises OSError where there is no registry."""
        return (self.folder / STATE).stat().st_mtime_ns

    def register(self, bundle: Path, name: str, check: Callable[[Path], str]) -> Version:
        """Copy a bundle in as the next version of `name`, the candidate.

        check: verifies the copy and gives its model's digest; the copy that it saw is the one that is kept.

        Raises:
            InputError, IntegrityError, RefusedError: the name or the bundle is not one to keep.
        """
        if not MODEL_NAME.fullmatch(name):
            raise InputError(
                f"--name: got {name[:80]!r}; small letters, digits, '.', '_' and '-' would be right, up to 64"
            )
        with self.held(new=True) as state:
            partial = Path(tempfile.mkdtemp(prefix=".new.", dir=self.folder))
            try:
                copy = partial / "bundle"
                _copy(bundle, copy)
                model = check(copy)
                digest = seal.read(copy).digest
                shelf = versions.registered(state.models.get(name, Shelf()), digest, model, self._clock())
                number = shelf.versions[-1].number
                place = private_folder(self.folder / name) / str(number)
                shutil.rmtree(place, ignore_errors=True)  # of an interrupted call: no state names it
                copy.rename(place)
                sync_folder(place.parent)
                self._keep(self._noted(state, name, shelf, "register", number))
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        return shelf.versions[-1]

    def promote(self, name: str, number: int | None, why: str = "", ungated: bool = False) -> Shelf:
        """See `versions.promoted`. Every byte of the version's bundle is looked at first, and in a federation's
        registry its gate, unless `ungated`, which needs a reason.

        Raises:
            InputError, RefusedError, IntegrityError: there is none such, it was withdrawn, did not pass its gate, or is
                damaged.
        """
        if ungated and not why.strip():
            raise InputError("--why: whoever promotes a version past its gate says why")
        with self.held() as state:
            before = _shelf(state, name)
            shelf = versions.promoted(before, number)
            assert shelf.champion is not None
            place = self.bundle(name, shelf, shelf.champion)
            verified(place)
            seal.check_approved(place, seal.read(place))
            if gate_file.of_federation(self.folder) and not ungated and shelf.champion != before.champion:
                self._check_gate(name, before, shelf.champion, place)
            act = versions.UNGATED if ungated else versions.PROMOTE
            self._keep(self._noted(state, name, shelf, act, shelf.champion, why))
        return shelf

    def _check_gate(self, name: str, before: Shelf, number: int, place: Path) -> None:
        version, signer = before.version(number), seal.read(place).signer
        champion = None if before.champion is None else before.version(before.champion)
        assert version is not None
        held = None if champion is None else champion.bundle
        root = None if signer is None else signer.root
        gate_file.check(self.folder, name, number, version.bundle, held, root)

    def approve(self, name: str, number: int, site: str, change: Callable[[bytes], bytes]) -> tuple[str, ...]:
        """Put a site's approval into a version's signature; the sites that have approved it then. A site that has
        approved it already changes nothing.

        change: from the content of `signature.json` to the new one, which is kept only if it holds.

        Raises:
            InputError, IntegrityError: there is no such version, nobody signed it, or the approval does not hold.
                Nothing has changed.
        """
        with self.held() as state:
            shelf = _shelf(state, name)
            if shelf.version(number) is None:
                raise InputError(f"model '{name}' has no version {number}")
            place = self.bundle(name, shelf, number)
            sealed, path = seal.read(place), place / seal.SIGNATURE
            if sealed.signer is None:
                raise InputError(
                    f"{name}@{number}: is signed by nobody, as a simulation's model is; none approves it"
                )
            done = ("approve", name, number, f"by site {site}")
            if site in sealed.approved:
                if done not in [(act.act, act.model, act.version, act.why) for act in state.history]:
                    self._keep(self._noted(state, name, shelf, "approve", number, done[3]))  # it was cut off
                return sealed.approved
            content = change(path.read_bytes())
            approved = vouching.approved_by(path, json.loads(content), sealed.signer, sealed.digest)
            after = self._noted(state, name, shelf, "approve", number, done[3])
            write_private(path, content, place.parent)
            self._keep(after)
        return approved

    def gated(self, name: str, number: int, result: Mapping[str, Any], sign: gate_file.Sign) -> None:
        """Keep the result of a version's gate, signed, and that there was one."""
        with self.held() as state:
            what = "passed" if result["passed"] else str(result["why"][0])
            after = self._noted(state, name, _shelf(state, name), "gate", number, what)
            gate_file.write(gate_file.place(self.folder, name, number), result, sign)
            self._keep(after)

    def rollback(self, name: str, why: str = "") -> Shelf:
        """See `versions.rolled_back`. Raises RefusedError where there was no champion before, IntegrityError where that
        is damaged."""
        with self.held() as state:
            shelf = versions.rolled_back(_shelf(state, name))
            assert shelf.champion is not None
            verified(self.bundle(name, shelf, shelf.champion))
            self._keep(self._noted(state, name, shelf, versions.ROLLBACK, shelf.champion, why))
        return shelf

    def withdraw(self, name: str, number: int, why: str) -> Shelf:
        """See `versions.withdrawn`. The bundle itself says so first, so that no crash leaves it in use. What was
        withdrawn before stays so, with the reason of then.

        Raises:
            InputError: there is no such version, or no reason is given.
        """
        if not why.strip():
            raise InputError("--why: a withdrawal says why; whoever still asks for the model is told")
        with self.held() as state:
            before = _shelf(state, name)
            shelf = versions.withdrawn(before, number, why)
            version = shelf.version(number)
            assert version is not None
            after = None
            if shelf != before:
                after = self._noted(state, name, shelf, versions.WITHDRAW, number, why)
            place = self.folder / name / str(number)
            if (
                place.is_dir()
            ):  # a bundle that is gone cannot be opened; one that comes back is withdrawn by the state
                marker = {"format": seal.FORMAT, "why": version.why, "at": self._clock()}
                write_private(place / seal.WITHDRAWN, json.dumps(marker).encode(), place.parent)
            if after is not None:
                self._keep(after)
        return shelf

    def bundle(self, name: str, shelf: Shelf, number: int) -> Path:
        """The folder of a version, if it is the bundle that was registered.

        Raises:
            IntegrityError: it is another, damaged, or withdrawn.
        """
        place = self.refuse_withdrawn(name, shelf, number)
        version = shelf.version(number)
        found = seal.read(place).digest
        if version is None or found != version.bundle:
            raise IntegrityError(
                f"{place / seal.MANIFEST}: is not the bundle that was registered; restore it from a backup"
            )
        return place

    def refuse_withdrawn(self, name: str, shelf: Shelf, number: int) -> Path:
        """The folder of a version that neither the registry nor the bundle itself says was withdrawn.

        Raises:
            IntegrityError: it was.
        """
        place, version = self.folder / name / str(number), shelf.version(number)
        if version is not None and version.withdrawn:
            raise IntegrityError(f"{place}: was withdrawn ({version.why}); use another version")
        seal.refuse_withdrawn(place)
        return place

    def resolve(self, name: str, which: str) -> Path:
        """The folder of NAME@WHICH: a version's number, or an alias.

        Raises:
            InputError, IntegrityError: there is none such; or see `bundle`.
        """
        shelf = _shelf(self.state(), name)
        alias = {CHAMPION: shelf.champion, CANDIDATE: shelf.candidate}
        number = alias.get(which, int(which) if which.isascii() and which.isdigit() else None)
        if number is None or shelf.version(number) is None:
            known = [alias_ for alias_, number in alias.items() if number is not None]
            raise InputError(
                f"{self.folder}: there is no {name}@{which}; there are {', '.join(known) or 'no aliases'} and versions "
                f"1 to {len(shelf.versions)}; see: consortium model list {self.folder}"
            )
        return self.bundle(name, shelf, number)

    @contextmanager
    def held(self, new: bool = False) -> Iterator[State]:
        """The state, while nobody else changes it. new: where there is no registry, an empty one."""
        if new:
            private_folder(self.folder)
        elif not (self.folder / STATE).exists():
            self.state()
        descriptor = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            self._sweep()
            yield State() if new and not (self.folder / STATE).exists() else self.state()
        finally:
            os.close(descriptor)

    def _sweep(self) -> None:
        """Remove what a power cut or a crash left of acts that never were."""
        for pattern in _UNFINISHED:
            for path in self.folder.glob(pattern):
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)

    def _noted(self, state: State, name: str, shelf: Shelf, act: str, number: int, why: str = "") -> State:
        """The state with one act more, which the federation's audit log tells of when this returns."""
        done = Act(self._clock(), act, name, number, self._by or getpass.getuser(), why)
        after = State({**state.models, name: shelf}, (*state.history, done))
        if gate_file.of_federation(self.folder):
            version = shelf.version(number)
            note = self._note or acts.log_of(self.folder.resolve().parent)
            note(*acts.entry(len(after.history), done, version.bundle if version else ""))
        return after

    def _keep(self, state: State) -> None:
        write_private(self.folder / STATE, versions.document(state))


def locate(text: str, clock: Callable[[], float]) -> Path:
    """The bundle's folder that a person names: a folder, or REGISTRY/NAME[@VERSION|@champion|@candidate].

    Raises:
        InputError, IntegrityError: see `Registry.resolve`.
    """
    path = Path(text)
    if (path.parent.parent / STATE).exists() and path.name.isdecimal() and path.is_dir():
        return Registry(path.parent.parent, clock).resolve(
            path.parent.name, path.name
        )  # which knows what is withdrawn
    if (path / seal.MANIFEST).exists() or (path / STATE).exists():
        return path
    name, _, which = path.name.partition("@")
    if (path.parent / STATE).exists():
        return Registry(path.parent, clock).resolve(name, which or CHAMPION)
    return path


def split(text: str) -> tuple[str, int | None]:
    """Name and version of NAME or NAME@3.

    Raises:
        InputError: it is neither.
    """
    name, at, which = text.partition("@")
    if not MODEL_NAME.fullmatch(name) or (at and not (which.isascii() and which.isdigit())):
        raise InputError(
            f"got {text[:80]!r}; NAME or NAME@VERSION would be right, for example breast-cancer@2"
        )
    return name, int(which) if at else None


def _shelf(state: State, name: str) -> Shelf:
    if name not in state.models:
        raise InputError(
            f"there is no model '{name}'{nearest(name, state.models)}; see: consortium model list"
        )
    return state.models[name]


def _copy(bundle: Path, copy: Path) -> None:
    copy.mkdir(mode=0o700)
    for path in sorted(bundle.iterdir()) if bundle.is_dir() else ():
        if path.is_file() and not path.is_symlink():
            shutil.copyfile(path, copy / path.name)
            (copy / path.name).chmod(0o600)
    for path in copy.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(copy)
