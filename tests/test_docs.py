"""What the README and the docs show is executed here, and what they claim of size is counted."""

from __future__ import annotations

import difflib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.datasets import load_breast_cancer, load_digits

REPOSITORY = Path(__file__).resolve().parents[1]
DOCS = REPOSITORY / "docs"
pytestmark = pytest.mark.skipif(not DOCS.exists(), reason="the docs are not here, only the installed package")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


def run(command: list[str], folder: Path) -> str:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_everything_the_readme_shows_runs(tmp_path: Path) -> None:
    """Its study is checked and simulated by its commands, and its Python runs, in a folder with the named files."""
    table = load_breast_cancer(as_frame=True).frame
    columns = {"mean radius": "radius", "mean texture": "texture", "mean concavity": "concavity"}
    patients = table[list(columns)].rename(columns=columns).assign(malignant=1 - table["target"])
    for name, rows in {"patients": patients, "north": patients[:300], "south": patients[300:]}.items():
        pd.DataFrame(rows).to_csv(tmp_path / f"{name}.csv", index=False)
    readme = REPOSITORY / "README.md"
    (tmp_path / "study.toml").write_text(blocks(readme, "toml")[0])
    alone = readme.read_text().split("## A federation")[0]  # what follows takes two terminals
    commands = re.findall(r"^\$ (consortium .*?)(?:\s+#.*)?$", alone, re.M)
    assert len(commands) == 3
    for command in commands:
        run(shlex.split(command), tmp_path)
    assert (tmp_path / "results" / "report.html").exists()
    (code,) = blocks(readme, "python")
    assert "finished" in run([sys.executable, "-c", code], tmp_path)


def test_a_sixty_line_script_federates_with_at_most_eight_changed_lines() -> None:
    """The diff that the docs show is the diff of the two files; it changes at most eight lines, blank ones aside."""
    plain, task = (
        (DOCS / "examples" / "digits" / name).read_text().splitlines() for name in ("plain.py", "task.py")
    )
    diff = list(difflib.unified_diff(plain, task, lineterm="", n=1))[2:]
    changed = [line for line in diff if line[0] in "+-" and line[1:].strip()]
    assert len(plain) <= 60
    assert 0 < len(changed) <= 8
    (shown,) = blocks(DOCS / "pytorch.md", "diff")
    assert shown.rstrip("\n").splitlines() == diff


@pytest.mark.slow
def test_the_digits_example_learns(tmp_path: Path) -> None:
    """The script runs by itself, and its federated form, as the docs call it, passes three quarters."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    for name, part in zip(("north", "south", "west"), np.array_split(order, 3), strict=True):
        np.savez(tmp_path / f"{name}.npz", images=digits.images[part], labels=digits.target[part])
    for name in ("plain.py", "task.py", "study.toml"):
        shutil.copy(DOCS / "examples" / "digits" / name, tmp_path)
    assert "epoch 5" in run([sys.executable, "plain.py", "north.npz"], tmp_path)
    (code,) = blocks(DOCS / "pytorch.md", "python")
    last = run([sys.executable, "-c", code], tmp_path).splitlines()[-1]
    assert float(last.split()[-1]) > 0.75


def test_links_between_pages_lead_somewhere() -> None:
    """Every relative link of the README and the docs is a file that is there."""
    for page in [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *DOCS.rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
