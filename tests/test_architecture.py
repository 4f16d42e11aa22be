"""The floors of the house: packages, the direction of imports, where Flower stands, a light command line.

What is said of modules is read from the packages as they are installed, be it the source tree or a wheel; what is
said of the source tree skips where that is not at hand.
"""

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import entry_points, packages_distributions
from importlib.util import find_spec
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
NEEDS_REPOSITORY = pytest.mark.skipif(
    not (REPOSITORY / "pyproject.toml").exists(),
    reason="the source tree is not here, only the installed package",
)

MAY_IMPORT = {
    "protocol": set[str](),
    "strategies": {"protocol"},
    "privacy": {"protocol", "strategies"},
    "client": {"protocol", "strategies", "privacy"},
    "server": {"protocol", "strategies", "privacy"},
    "simulations": {"protocol", "strategies", "privacy", "client", "server"},
}
PURE = {"protocol", "strategies", "privacy"}
TOO_HEAVY_FOR_PURE = {"flwr", "torch", "grpc"}
FLOWER_ADAPTERS = {
    "client/app.py", "server/app.py", "server/flower_strategy.py", "server/grid.py",
    "client/flower_app.py", "server/flower_run.py",

}  # fmt: skip
HEAVY = {
    "flwr", "grpc", "matplotlib", "numpy", "onnx", "onnxruntime", "pandas", "pyarrow", "ray", "scipy",
    "sklearn", "sqlalchemy", "torch",
}  # fmt: skip

USED_THROUGH_ANOTHER = {
    "httptools",
    "onnxscript",
    "pyarrow",
}  # by uvicorn, torch.onnx, and pandas for Parquet
BY_EXTRA = {"mlflow": "track"}
"""What is imported only where an extra was installed, by the extra's name."""
COMES_WITH_ANOTHER = {"pydantic-core", "onnx-ir"}  # pydantic and onnxscript pin them


def imported(source: str, package: str) -> set[str]:
    """Absolute names of all that the source imports, also inside functions and by `import_module("...")`.

    `package` is the dotted package that the module lies in. `from a import b` gives `a.b`.
    """
    return {name for node in ast.walk(ast.parse(source)) for name in _names(node, package)}


def _names(node: ast.AST, package: str) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
        base = ".".join([*above, *([node.module] if node.module else [])])
        yield from (f"{base}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        called = ast.unparse(node.func).rsplit(".", 1)[-1]
        if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
            yield node.args[0].value


def rooms() -> dict[str, Path]:
    """The folder of each package that is installed: in the source tree, or where a wheel was unpacked."""
    found = {room: find_spec(f"consortium.{room}") for room in MAY_IMPORT}
    return {room: Path(spec.origin).parent for room, spec in found.items() if spec and spec.origin}


def modules() -> list[Path]:
    """Every module of the namespace, relative to it: `server/coordinator.py`."""
    return sorted(
        path.relative_to(folder.parent) for folder in rooms().values() for path in folder.rglob("*.py")
    )


def imports_of(module: Path) -> set[str]:
    package = ".".join(["consortium", *module.parent.parts])
    return imported((rooms()[module.parts[0]].parent / module).read_text(encoding="utf-8"), package)


def root(name: str) -> str:
    return name.split(".")[0]


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import flwr.server", "flwr.server"),
        ("from torch import nn", "torch.nn"),
        ("def f():\n    import grpc", "grpc"),
        ("from . import grid", "consortium.server.grid"),
        ("from ..client import Task", "consortium.client.Task"),
        ("if TYPE_CHECKING:\n    from consortium.client import Task", "consortium.client.Task"),
        ("importlib.import_module('torch')", "torch"),
    ],
)
def test_every_form_of_import_is_seen(source: str, name: str) -> None:
    """The reader of imports below sees absolute, relative, late and dynamic imports."""
    assert name in imported(source, "consortium.server")


@NEEDS_REPOSITORY
def test_packages_of_the_distribution_are_the_folders() -> None:
    """Exactly the folders that hold an `__init__.py` are listed in pyproject.toml, each with its place."""
    setuptools = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]
    left_out = {"tests", "benchmarks", "docs", "build", "dist"}
    tops = [path for path in REPOSITORY.iterdir() if path.is_dir() and path.name not in left_out]
    found = {
        init.parent.relative_to(REPOSITORY)
        for top in tops
        if not top.name.startswith(".")
        for init in top.rglob("__init__.py")
    }
    assert set(setuptools["packages"]) == {".".join(["consortium", *folder.parts]) for folder in found}
    assert setuptools["package-dir"] == {
        ".".join(["consortium", *folder.parts]): str(folder) for folder in found
    }


def test_every_folder_with_modules_is_a_package() -> None:
    """No module lies in a folder that the wheel would leave out."""
    assert [
        str(path)
        for path in modules()
        if not (rooms()[path.parts[0]].parent / path.parent / "__init__.py").exists()
    ] == []


@NEEDS_REPOSITORY
def test_namespace_has_no_init_and_the_type_checkers_link() -> None:
    """`consortium` is a PEP 420 namespace, and `.typings/consortium` shows it to the type checkers."""
    assert not (REPOSITORY / "__init__.py").exists()
    assert not (REPOSITORY / "consortium").exists()
    link = REPOSITORY / ".typings" / "consortium"
    assert link.is_symlink()
    assert link.readlink() == Path("..")


def test_imports_point_one_way() -> None:
    """protocol <- strategies <- privacy <- client, server <- simulations; client and server stay apart."""
    assert modules(), "no module was found, so nothing was tested"
    wrong = [
        f"{module} imports {name}"
        for module in modules()
        for name in imports_of(module)
        if root(name) == "consortium"
        and name.split(".")[1:2] not in [[room] for room in MAY_IMPORT[module.parts[0]] | {module.parts[0]}]
    ]
    assert wrong == []


def test_bare_names_of_the_folders_are_not_imported() -> None:
    """Nothing imports `server` where `consortium.server` is meant; it would work in the source tree alone."""
    wrong = [
        f"{module} imports {name}"
        for module in modules()
        for name in imports_of(module)
        if root(name) in MAY_IMPORT
    ]
    assert wrong == []


def test_pure_packages_import_no_engine() -> None:
    """protocol, strategies and privacy import no flwr, torch or grpc, also not late."""
    wrong = [
        f"{module} imports {name}"
        for module in modules()
        if module.parts[0] in PURE
        for name in imports_of(module)
        if root(name) in TOO_HEAVY_FOR_PURE
    ]
    assert wrong == []


def test_flower_stands_in_its_adapters_alone() -> None:
    """Exactly the adapters named above, at most eight, import flwr: a Flower release touches those alone."""
    found = {str(module) for module in modules() if any(root(name) == "flwr" for name in imports_of(module))}
    assert found == FLOWER_ADAPTERS
    assert len(FLOWER_ADAPTERS) <= 8


@NEEDS_REPOSITORY
def test_dependencies_are_what_the_code_imports() -> None:
    """Every distribution that the packages import is declared, and every declared one is used."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[^\w.-]", line)[0] for line in project["dependencies"]}
    owners = packages_distributions()
    roots = {root(name) for module in modules() for name in imports_of(module)} - set(sys.stdlib_module_names)
    assert roots >= BY_EXTRA.keys()
    assert project["optional-dependencies"].keys() >= set(BY_EXTRA.values())
    roots -= BY_EXTRA.keys()
    used = {owners[name][0].lower().replace("_", "-") for name in roots - {"consortium"}}
    assert used - declared - COMES_WITH_ANOTHER == set()
    assert declared - used - USED_THROUGH_ANOTHER == set()


def test_help_imports_nothing_heavy() -> None:
    """`consortium --help` answers without torch, flwr, numpy, pandas and the like."""
    command = Path(sys.executable).with_name("consortium")
    environment = os.environ | {"PYTHONPROFILEIMPORTTIME": "1"}
    done = subprocess.run(
        [command, "--help"], capture_output=True, text=True, env=environment, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout
    seen = {
        root(line.rsplit("|", 1)[1].strip())
        for line in done.stderr.splitlines()
        if line.startswith("import time:")
    }
    assert "consortium" in seen, "the import log was not read"
    assert seen & HEAVY == set()


def test_every_command_of_the_entry_points_loads() -> None:
    """Each entry point in the group `consortium.commands` names something that exists."""
    commands = entry_points(group="consortium.commands")
    assert len(commands) > 0
    assert [command.name for command in commands if not callable(command.load())] == []
