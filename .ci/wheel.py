"""What a wheel can get wrong, checked by the Python that it is installed into: `python wheel.py TREE`.

Every file of the packages is there and no other, with the tree's bytes; every module imports, from the environment and
from nowhere else; every command loads.
"""

from __future__ import annotations

import sys
import tomllib
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, as a path relative to it, with its bytes; what Python compiled is left out."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }


def check(tree: Path) -> list[str]:
    """What is wrong, a line each."""
    places = tomllib.loads((tree / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    installed = Path(import_module("consortium.protocol").__file__ or "").parents[1]
    if not installed.is_relative_to(sys.prefix):
        return [f"consortium is imported from {installed}, not from {sys.prefix}"]
    tops = {name.split(".")[1]: tree / place for name, place in places.items() if name.count(".") == 1}
    there = {f"{top}/{name}": data for top, folder in tops.items() for name, data in files(folder).items()}
    here = files(installed)
    wrong = [f"the wheel lacks {name}" for name in sorted(there.keys() - here.keys())]
    wrong += [f"only the wheel has {name}" for name in sorted(here.keys() - there.keys())]
    wrong += [f"{name} differs" for name in sorted(there.keys() & here.keys()) if there[name] != here[name]]
    wrong += [f"{top} has no py.typed" for top in tops if f"{top}/py.typed" not in here]
    modules = [name[: -len(".py")].replace("/", ".") for name in here if name.endswith(".py")]
    for module in modules:
        import_module(f"consortium.{module.removesuffix('.__init__')}")
    commands = [point.load() for point in entry_points(group="consortium.commands")]
    print(f"{len(here)} files, {len(modules)} modules, {len(commands)} commands")
    return wrong if commands else [*wrong, "the wheel has no commands"]


if __name__ == "__main__":
    problems = check(Path(sys.argv[1]))
    print("\n".join(problems))
    raise SystemExit(bool(problems))
