"""A server of one version and a client of the next, each installed from a wheel of its own, run a study together."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from live import live, simulated, study

from consortium.simulations.hospitals import write_hospitals

TREE = Path(__file__).parents[2]
HERE, LATER = "0.1.0", "0.2.0"


def installed(folder: Path, version: str) -> tuple[str | Path, ...]:
    """Build this tree as a wheel of that version, and install it into an environment of its own, which takes the
    libraries from the environment of the tests; the command of what was installed."""
    tree, place = folder / f"tree-{version}", folder / f"env-{version}"
    left_out = shutil.ignore_patterns(
        ".git", ".venv", ".*_cache", "__pycache__", "tests", "benchmarks", "*.egg-info"
    )
    shutil.copytree(TREE, tree, ignore=left_out, symlinks=True)
    about = tree / "pyproject.toml"
    about.write_text(re.sub(r'^version = ".*"$', f'version = "{version}"', about.read_text(), flags=re.M))
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True)
    (found,) = (place / "lib").glob("python*/site-packages")
    site = str(found)
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-build-isolation", "--no-compile", "--target", site]
    subprocess.run([*pip, "install", *options, tree], check=True, timeout=300)
    # Plain paths after our own: whatever installs the tree itself into that environment is not run.
    (found / "libraries.pth").write_text("\n".join(libraries()) + "\n")
    script = place / "bin" / "consortium"
    script.write_text(
        f"#!{place}/bin/python\nfrom consortium.protocol.cli import main\nraise SystemExit(main())\n"
    )
    script.chmod(0o755)
    return (script,)


def libraries() -> list[str]:
    return sorted({sysconfig.get_path("purelib"), *(p for p in sys.path if p.endswith("site-packages"))})


def says(command: tuple[str | Path, ...]) -> str:
    code = (
        "import consortium.protocol as one; from importlib.metadata import version; "
        "print(version('consortium'), one.__file__)"
    )
    python = Path(command[0]).with_name("python")
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True, cwd="/").stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not (TREE / "pyproject.toml").exists(), reason="needs the source tree")
@pytest.mark.parametrize("later", ["server", "client"])
def test_neighbouring_versions_work_together(tmp_path: Path, later: str) -> None:
    """Whichever side is upgraded first: joining, a whole study and its model as in one version."""
    older, newer = installed(tmp_path, HERE), installed(tmp_path, LATER)
    assert says(newer).startswith(f"{LATER} {tmp_path}")
    assert says(older).startswith(f"{HERE} {tmp_path}")
    server, client = (newer, older) if later == "server" else (older, newer)
    (tmp_path / "fed").mkdir()
    with live(tmp_path / "fed", server) as federation:
        federation.command = client
        for name, place in write_hospitals(tmp_path / "sites", 2).items():
            federation.join(name, place)
        federation.gather()
        assert federation.admin.get("/v1/status")["version"] == (LATER if later == "server" else HERE)
        one = study("versions", 2, rounds=2, epochs=1)
        federation.start(one)
        assert federation.over(one.name)["state"] == "finished"
        assert federation.model(one.name) == simulated(one, list(federation.places.values()))
