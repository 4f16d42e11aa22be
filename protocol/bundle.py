"""A bundle: a study file and its code as one file of which every byte is determined, so that sites approve its SHA-256.

It is a Flower App Bundle (FAB), a zip archive:

    pyproject.toml   name, Flower's components, and under [tool.consortium] what the code imports
    study.toml       the study file, as it was written
    *.py             the study's own code, if any (`protocol/code.py` says which files)
    .info/CONTENT    a line a file: path, SHA-256, bits

There is one archive of a study: members sorted and stored without compression, time, mode and order fixed. `read`
takes that one alone: what it finds is packed again and must give the same bytes, so an archive has no room for
links, paths that lead out, two files of one name, bombs, or anything beside its files.
"""

from __future__ import annotations

import hashlib
import hmac
import importlib.util
import io
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from consortium.protocol import code
from consortium.protocol.errors import InputError, IntegrityError
from consortium.protocol.study import Study

FORMAT = 1
MAX_BUNDLE = 4 << 20
"""Bytes of a bundle."""
MAX_STUDY = 1 << 20
"""Bytes of a study file in it."""
SUFFIX = ".fab"
_TIME = (1980, 1, 1, 0, 0, 0)
_MODE = 0o100644 << 16
_PATH = re.compile(r"(?:[A-Za-z_]\w{0,99}/){0,8}[A-Za-z_]\w{0,99}\.py", re.ASCII)
_PROJECT = """\
[project]
name = "{name}"
version = "1.0.0"
dependencies = []

[tool.flwr.app]
publisher = "consortium"

[tool.flwr.app.components]
serverapp = "{serverapp}"
clientapp = "{clientapp}"

[tool.consortium]
format = {format}
imports = [{imports}]
"""


@dataclass(frozen=True)
class Bundle:
    """study: its `folder` is nowhere before `unpack`. files: its code by path. content: the archive."""

    study: Study
    files: Mapping[str, bytes]
    content: bytes

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the archive: what sites approve."""
        return hashlib.sha256(self.content).hexdigest()

    @property
    def imports(self) -> tuple[str, ...]:
        """Top-level packages that the code imports, other than Consortium, sorted."""
        return _imports(self.files)

    def missing(self) -> list[str]:
        """Those of `imports` that are not installed here."""
        return [name for name in self.imports if importlib.util.find_spec(name) is None]

    def check_needs(self) -> None:
        """Returns where all that the code imports is installed.

        Raises:
            InputError: naming what is not.
        """
        if missing := self.missing():
            raise InputError(
                f"study '{self.study.name}': its code imports {', '.join(missing)}, which is not installed here; "
                "nothing is installed for a study, so install it beforehand or write the code without it"
            )

    def unpack(self, folder: Path) -> Study:
        """The study with its code in `folder`, which must be new or empty."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path, content in self.files.items():
            (folder / path).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with (folder / path).open("xb") as file:
                file.write(content)
            (folder / path).chmod(0o400)
        return Study.parse(self.study.text, source="study.toml", folder=folder)


def of(study: Study, files: Mapping[str, bytes] | None = None) -> Bundle:
    """The bundle of a study and its code.

    Raises:
        InputError: it would have more than `MAX_BUNDLE` bytes.
    """
    files = dict(sorted((files or {}).items()))
    if len(study.text.encode()) > MAX_STUDY:
        raise InputError(f"study '{study.name}': the study file has more than {MAX_STUDY} bytes")
    study = Study.parse(study.text, source="study.toml", code=files)
    content = _packed(study, files)
    if len(content) > MAX_BUNDLE:
        raise InputError(
            f"study '{study.name}': its bundle has {len(content)} bytes; at most {MAX_BUNDLE} are taken"
        )
    return Bundle(study, files, content)


def build(path: Path) -> Bundle:
    """The bundle of a study file and the code that lies beside it; nothing of it is run.

    Raises:
        InputError, StudyError: the study has mistakes, or its code is missing, not Python, or imports what is not
            installed.
    """
    study = Study.load(path)
    made = of(study, code.files(study.references, study.folder))
    made.check_needs()
    return made


def load(path: Path) -> Bundle:
    """The bundle in a file, or the one that is built of a study file.

    Raises:
        InputError: it cannot be read, or see `build`.
        IntegrityError: it is no bundle.
    """
    if path.suffix != SUFFIX:
        return build(path)
    try:
        if path.stat().st_size > MAX_BUNDLE:
            raise IntegrityError(f"{path}: has more than {MAX_BUNDLE} bytes, and is no bundle")
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give the path of a bundle") from error
    try:
        return read(content)
    except IntegrityError as error:
        raise IntegrityError(f"{path}: {error}") from error
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


@contextmanager
def opened(path: Path) -> Iterator[Study]:
    """The study of a file: as it is for a study file, with its code in a temporary folder for a bundle.

    Raises:
        As `load`.
    """
    if path.suffix != SUFFIX:
        yield Study.load(path)
        return
    bundle = load(path)
    bundle.check_needs()
    with TemporaryDirectory(prefix="consortium-study-") as folder:
        yield bundle.unpack(Path(folder))


def read(content: bytes, digest: str = "") -> Bundle:
    """The bundle of these bytes. digest: the SHA-256 (hex) that they must have, checked before anything is parsed.

    Raises:
        IntegrityError: they have not, or are not a bundle in the one form that it has.
        InputError: the study in it has mistakes, as this version reads it.
    """
    if len(content) > MAX_BUNDLE:
        raise IntegrityError(f"the bundle has {len(content)} bytes; at most {MAX_BUNDLE} are taken")
    if digest and not hmac.compare_digest(hashlib.sha256(content).hexdigest(), digest):
        raise IntegrityError(f"the bundle is not the one with SHA-256 {digest}")
    members = _members(content)
    if len(members.get("study.toml", b"")) > MAX_STUDY:
        raise IntegrityError(f"the bundle's study.toml has more than {MAX_STUDY} bytes")
    try:
        study = Study.parse(members.pop("study.toml", b"").decode(), source="study.toml", code={})
    except UnicodeDecodeError as error:
        raise IntegrityError("the bundle's study.toml is not UTF-8 text") from error
    files = {path: text for path, text in members.items() if path not in ("pyproject.toml", ".info/CONTENT")}
    for path in files:
        if _PATH.fullmatch(path) is None:
            raise IntegrityError(f"the bundle holds {path[:80]!r}, which is no file of code")
    found = of(study, files)
    if found.content != content:
        raise IntegrityError("the bundle is not in the form that `consortium study build` writes")
    return found


def _members(content: bytes) -> dict[str, bytes]:
    """The archive's files, none larger than the archive: they are stored, not compressed."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = archive.infolist()
            if len(entries) > code.MAX_FILES + 3:
                raise IntegrityError("the bundle holds too many files")
            if any(
                one.compress_type != zipfile.ZIP_STORED or one.file_size > len(content) for one in entries
            ):
                raise IntegrityError("the bundle is compressed; a bundle is not")
            if sum(one.file_size for one in entries) > len(content):
                raise IntegrityError("the bundle's files are larger than it")
            return {one.filename: archive.read(one) for one in entries}
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError, EOFError, RuntimeError) as error:
        raise IntegrityError("the file is no bundle; build one: consortium study build STUDY") from error


def _packed(study: Study, files: Mapping[str, bytes]) -> bytes:
    imports = ", ".join(f'"{name}"' for name in _imports(files))
    apps = {"serverapp": "consortium.server.app:app", "clientapp": "consortium.client.app:app"}
    if study.app is not None:
        apps = {"serverapp": study.app.serverapp, "clientapp": study.app.clientapp}
    project = _PROJECT.format(name=study.name, format=FORMAT, imports=imports, **apps)
    members = {"pyproject.toml": project.encode(), "study.toml": study.text.encode(), **files}
    lines = [
        f"{path},{hashlib.sha256(text).hexdigest()},{len(text) * 8}" for path, text in sorted(members.items())
    ]
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for path, text in [*sorted(members.items()), (".info/CONTENT", "\n".join(lines).encode())]:
            entry = zipfile.ZipInfo(path, _TIME)
            entry.create_system, entry.external_attr = 3, _MODE
            archive.writestr(entry, text)
    return stream.getvalue()


def _imports(files: Mapping[str, bytes]) -> tuple[str, ...]:
    names = {
        name.partition(".")[0]
        for path, text in files.items()
        for _, name, dots in code.imports(path, text)
        if not dots
    }
    return tuple(sorted(names - {"consortium"}))
