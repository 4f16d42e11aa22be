"""A study's own code: which files it is, and loading what a study names.

`module:Name` is a name in Consortium, or in a module that lies beside the study. Such a module imports others beside
it by relative imports (`from .layers import Head`), which is also how its files are found without running anything.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any

from consortium.protocol.errors import InputError, nearest

MAX_FILES = 200
MAX_FILE = 1 << 20
"""Bytes of one file of code."""
PRIVATE = "consortium_study_"
"""How the names of modules that lie beside a study begin."""


def is_own(reference: str) -> bool:
    """Whether `reference` ("module:Name", or a plain name of ours) is into a study's own code."""
    return ":" in reference and not reference.startswith("consortium.")


def load(reference: str, folder: Path) -> Any:
    """The object that `reference` ("module:Name") names.

    A module that lies in `folder` (module.py) is read from there, under a private name, so that it can never hide or
    replace an installed one; any other reference must be into Consortium itself.

    Raises:
        InputError: there is no such module or name, or importing it fails.
    """
    module_name, _, name = reference.partition(":")
    module = _module(module_name, folder)
    if not hasattr(module, name):
        hint = nearest(name, [n for n in vars(module) if not n.startswith("_")])
        raise InputError(f"{reference}: module '{module_name}' has no '{name}'{hint}")
    return getattr(module, name)


def files(references: Sequence[str], folder: Path) -> dict[str, bytes]:
    """The files of the code that `references` name, by path below `folder`: their modules, and all that these import
    relatively. Nothing is run.

    Raises:
        InputError: one is missing, too large, or not Python, naming file and line.
    """
    found: dict[str, bytes] = {}
    wanted = [_path(one.partition(":")[0]) for one in references if is_own(one)]
    for path in wanted:
        if not (folder / path).is_file():
            raise InputError(
                f"study code: there is no {path} in {folder}; put the file that defines it beside the study"
            )
    while wanted:
        path = wanted.pop()
        if str(path) in found:
            continue
        if len(found) >= MAX_FILES:
            raise InputError(f"study code: has more than {MAX_FILES} files; a bundle holds no more")
        found[str(path)] = _read(folder, path)
        packages = [parent / "__init__.py" for parent in path.parents if parent.name]
        wanted += [one for one in packages if (folder / one).is_file()]
        wanted += _relative(folder, path, found[str(path)])
    return dict(sorted(found.items()))


def imports(path: str, content: bytes) -> Iterator[tuple[int, str, int]]:
    """Every import of a file: its line, the dotted name ("" of `from . import x`), and how many dots are before it.

    Raises:
        InputError: the file is not Python.
    """
    for node in ast.walk(parse(path, content)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, node.module or "", node.level


def parse(path: str, content: bytes) -> ast.Module:
    """The syntax tree of a file of code.

    Raises:
        InputError: it is not Python.
    """
    try:
        return ast.parse(content, path)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        raise InputError(f"study code: {path}{line}: is not Python ({error}); correct that") from error


def _path(module: str) -> PurePosixPath:
    return PurePosixPath(*module.split(".")).with_suffix(".py")


def _read(folder: Path, path: PurePosixPath) -> bytes:
    place = folder / path
    if not place.resolve().is_relative_to(folder.resolve()):
        raise InputError(f"study code: {path} leads out of {folder}; put the file itself there")
    try:
        content = place.read_bytes()
    except OSError as error:
        raise InputError(f"study code: {place} cannot be read ({error.strerror})") from error
    if len(content) > MAX_FILE:
        raise InputError(f"study code: {path} has {len(content)} bytes; at most {MAX_FILE} are taken")
    return content


def _relative(folder: Path, path: PurePosixPath, content: bytes) -> list[PurePosixPath]:
    """The files that a file imports relatively."""
    found: list[PurePosixPath] = []
    for node in ast.walk(parse(str(path), content)):
        if isinstance(node, ast.Import):
            names = [alias.name.partition(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [(node.module or "").partition(".")[0]]
        elif isinstance(node, ast.ImportFrom):
            found += _of_node(folder, path, node)
            continue
        else:
            continue
        for name in names:
            if (folder / f"{name}.py").is_file() and name not in sys.stdlib_module_names:
                dots = "." * (len(path.parts))
                raise InputError(
                    f"study code: {path}, line {node.lineno}: {name}.py lies beside the study and is not installed; "
                    f"write: from {dots} import {name}"
                )
    return found


def _of_node(folder: Path, path: PurePosixPath, node: ast.ImportFrom) -> list[PurePosixPath]:
    if node.level > len(path.parts):
        raise InputError(f"study code: {path}, line {node.lineno}: imports from above the study's folder")
    base = PurePosixPath(*path.parts[: len(path.parts) - node.level], *(node.module or "").split("."))
    if node.module and (file := _file(folder, base)) and file.name != "__init__.py":
        return [file]
    found = [file for alias in node.names if (file := _file(folder, base / alias.name))]
    package = _file(folder, base) if node.module else None
    if package is None and len(found) < len(node.names) and not (folder / base / "__init__.py").is_file():
        raise InputError(
            f"study code: {path}, line {node.lineno}: there is no {base}.py in {folder}; put it there"
        )
    return [*found, *([package] if package else [])]


def _file(folder: Path, base: PurePosixPath) -> PurePosixPath | None:
    """The file of a module or package."""
    for one in (base.with_name(base.name + ".py") if base.name else base, base / "__init__.py"):
        if (folder / one).is_file():
            return one
    return None


def _module(name: str, folder: Path) -> ModuleType:
    if name.startswith("consortium."):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise InputError(
                f"there is no module '{name}'; a built-in one, or one beside the study, would be right"
            ) from error
    path = folder.joinpath(*name.split(".")).with_suffix(".py").resolve()
    if not path.is_file():
        raise InputError(
            f"study code: there is no {path.name} in {folder}; put the file that defines it beside the study"
        )
    package = _package(folder.resolve())
    try:
        return importlib.import_module(f"{package}.{name}")
    except Exception as error:
        raise InputError(
            f"{path}: the study's code fails on import: {type(error).__name__}: {error}"
        ) from error


def _package(folder: Path) -> str:
    """The private package whose modules lie in `folder`."""
    name = PRIVATE + hashlib.sha256(str(folder).encode()).hexdigest()[:16]
    if name not in sys.modules:
        package = ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules[name] = package
    return name
