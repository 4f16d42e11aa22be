"""The read-only copy of a site's data that one run works on, laid before its first instruction.

The worker reads the copy alone: not the source, not the database, not the mapping's way to it. The copy lies, encrypted
(`client/sealed_copy.py`), in `spool/RUN/snapshot/`, is whole or not there, and is used again when the agent starts
anew, so that a run sees the same rows from its start to its end. A copy from before the machine's last start is made
again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from consortium.client import exclusions
from consortium.client.datasets import Dataset
from consortium.client.exclusions import Exclusions
from consortium.client.sealed_copy import Tree
from consortium.protocol.errors import ConsortiumError, InputError
from consortium.protocol.files import private_folder
from consortium.protocol.keys import PASSPHRASE
from consortium.protocol.sealed import DataKey

FORMAT = 2
ABOUT = "about.json"
_log = logging.getLogger("consortium.agent")
_BOOT = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Snapshot:
    """Data as a worker gets them. path: a file or folder. sealed: how many files of it are encrypted; 0: it is in the
    clear. mapping: without the way to the source. gaps: numbers of the
    source's rows that are not in the file, as they are excluded (`client/exclusions.py`)."""

    path: Path
    mapping: dict[str, Any]
    key: bytes
    gaps: tuple[int, ...] = ()
    sealed: int = 0

    def document(self) -> dict[str, Any]:
        """What is sent to the worker."""
        about = {"path": str(self.path), "mapping": self.mapping, "key": self.key.hex()}
        return {**about, "gaps": list(self.gaps), "sealed": self.sealed}


def place_of(spool: Path, run: str) -> Path:
    """The folder of a run under `spool`. A run's name comes from the server, so it is no part of a path."""
    return spool / hashlib.sha256(run.encode()).hexdigest()[:32]


class Snapshots:
    """Lays and removes copies. `stop` ends one that is being made, for good. key: what copies are encrypted under;
    without one they are not."""

    def __init__(self, site: str, spool: Path, key: DataKey | None = None) -> None:
        self._site, self._spool, self._key = site, spool, key
        self._lock, self._stopped = threading.Lock(), False
        self._child: subprocess.Popen[str] | None = None

    def lay(self, run: str, data: Dataset) -> Snapshot:
        """The copy of `data` for a run: the one that is there, else a new one.

        Raises:
            InputError: the data cannot be read; the text is for the operator.
            IntegrityError: the list of who is excluded is damaged.
        """
        folder = private_folder(place_of(private_folder(self._spool), run))
        whole = folder / "snapshot"
        found = self._found(whole, data)
        if found is not None:
            return found
        key, mapping = data.key(), data.mapping()
        partial = folder / "partial"
        for old in (whole, partial):
            erase(old)
        partial.mkdir(mode=0o700)
        tree = self._tree(run, data, partial)
        name, gaps = self._copied(data, mapping, partial, tree)
        sealed = tree.count if tree is not None else 0
        source = {k: v for k, v in mapping.get("source", {}).items() if k not in ("sql", "url", "password")}
        mapping = {**mapping, "source": source} if "source" in mapping else mapping
        about = {"format": FORMAT, "data": data.name, "file": name, "mapping": mapping, "boot": _boot()}
        about |= {"gaps": gaps, "sealed": sealed}
        (partial / ABOUT).write_text(json.dumps(about), encoding="utf-8")
        partial.replace(whole)
        return Snapshot(whole / name, mapping, key, tuple(gaps), sealed)

    def _tree(self, run: str, data: Dataset, folder: Path) -> Tree | None:
        """What encrypts the copy; None where it is not."""
        if self._key is None:
            return None
        size, most = _size(data.source), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
        if size > most:
            _log.warning(
                "run %s: the data '%s' have %d bytes, more than half of this machine's memory, where a worker holds "
                "what lies encrypted: their copy lies in the clear under %s until the run has ended",
                *(run, data.name, size, self._spool),
            )
            return None
        return Tree(folder, key_of(self._key, run))

    def _found(self, whole: Path, data: Dataset) -> Snapshot | None:
        try:
            about = json.loads((whole / ABOUT).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if [about.get(k) for k in ("format", "data", "boot")] != [FORMAT, data.name, _boot()]:
            return None
        return Snapshot(
            whole / about["file"], about["mapping"], data.key(), tuple(about["gaps"]), about["sealed"]
        )

    def _copied(
        self, data: Dataset, mapping: dict[str, Any], folder: Path, tree: Tree | None
    ) -> tuple[str, list[int]]:
        """Copy the source into `folder`, without who is excluded; the copy's name, which says nothing but its kind, and
        the numbers of the rows that are not in it."""
        excluded = exclusions.read(data.folder)
        if data.source is None:
            return "data.parquet", self._run("sql_snapshot", mapping, folder / "data.parquet", excluded, tree)
        kind = data.source.suffix.lower()
        name = "data" + (Path(data.source.stem).suffix.lower() if kind == ".gz" else "") + kind
        if excluded.digests:
            return name, self._run("copy_without", mapping, folder / name, excluded, tree, data.source)
        try:
            if data.source.is_dir():
                copy = shutil.copy2 if tree is None else tree.copy
                shutil.copytree(data.source, folder / "data", copy_function=copy)
                return "data", []
            if tree is not None:
                tree.copy(data.source, str(folder / name))
                return name, []
            shutil.copyfile(data.source, folder / name)
            (folder / name).chmod(0o400)
            return name, []
        except (OSError, shutil.Error) as error:
            said = getattr(error, "strerror", None) or type(error).__name__
            raise InputError(f"data '{data.name}': {data.source} cannot be copied ({said})") from error

    def _run(
        self,
        name: str,
        mapping: dict[str, Any],
        path: Path,
        excluded: Exclusions,
        tree: Tree | None,
        source: Path | None = None,
    ) -> list[int]:
        """Make the copy at `path` in a program of its own, which alone reads the table, or sees a database's password.
        The numbers of the rows that it left out."""
        place = path if tree is None else tree.link(path)
        key = "" if tree is None else tree.key.secret.hex()
        asked = {
            "site": self._site,
            "mapping": mapping,
            "path": str(place),
            "key": key,
            "parent": os.getpid(),
        }
        request = json.dumps({**asked, "source": str(source), "excluded": excluded.document()})
        program = (sys.executable, "-s", "-P", "-B", "-m", f"consortium.client.{name}")
        environment = {name: value for name, value in os.environ.items() if name != PASSPHRASE}
        with self._lock:
            if self._stopped:
                raise ConsortiumError("the agent is ending")
            child = self._child = subprocess.Popen(
                program,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
                cwd=path.parent,
                start_new_session=True,
            )
        try:
            found, said = child.communicate(request)
        finally:
            self.interrupt()
            self._child = None
        if child.returncode:
            raise InputError(said.strip()[:4000] or f"the snapshot's program ended with {child.returncode}")
        gaps: list[int] = json.loads(found)
        return gaps

    def interrupt(self) -> None:
        """End the copy of a table that is being made, if any."""
        child = self._child
        if child is not None:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()

    def stop(self) -> None:
        """As `interrupt`, and none is begun any more."""
        with self._lock:
            self._stopped = True
        self.interrupt()

    def remove(self, run: str) -> None:
        """Remove all that was laid for a run."""
        erase(place_of(self._spool, run))

    def keep_only(self, runs: set[str]) -> None:
        """Remove what was laid for any run but these."""
        kept = {place_of(self._spool, run) for run in runs}
        for folder in self._spool.iterdir() if self._spool.exists() else ():
            if folder not in kept:
                erase(folder)


def key_of(key: DataKey, run: str) -> DataKey:
    """What the copy for a run is encrypted under. key: the site's."""
    return of_run(key.of(f"run {run}"))


def of_run(key: DataKey) -> DataKey:
    """Likewise, of the run's own key."""
    return key.of("data")


def _size(source: Path | None) -> int:
    """Bytes of a file, or of all in a folder; 0 for a query, of which nobody knows."""
    if source is None or not source.exists():
        return 0
    files = (
        [source] if source.is_file() else (Path(at, one) for at, _, found in os.walk(source) for one in found)
    )
    return sum(one.stat().st_size for one in files if one.exists())


def _boot() -> str:
    try:
        return _BOOT.read_text(encoding="ascii").strip()
    except OSError:
        return ""


def erase(path: Path) -> None:
    """Remove a file or folder; nothing where it is not there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
