"""The unattended way from a new label file to a gated candidate: the docs' script, on a real federation."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from live import hospitals, study

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT, PAGE = REPOSITORY / "docs" / "examples" / "ci" / "candidate.sh", REPOSITORY / "docs" / "ci.md"
pytestmark = pytest.mark.skipif(
    not SCRIPT.exists(), reason="the docs are not here, only the installed package"
)


def run(folder: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["sh", str(SCRIPT), "study.toml"],
        cwd=folder, env={**os.environ, "PATH": path, **settings}, capture_output=True, text=True, check=False,
        timeout=300,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_new_labels_become_a_gated_candidate_by_one_command(tmp_path: Path) -> None:
    """Twice: the second time beside a champion. Labels that do not fit stop it with 2, before anything is
    asked."""
    one = study("labels", 2, rounds=2, epochs=1)
    (tmp_path / "study.toml").write_text(one.text)
    with hospitals(tmp_path, 2) as live:
        places = list(live.places.items())
        (site, place), fed = places[0], live.folder / "server"
        settings = {
            "FED": str(fed), "SITE": str(live.home(site).folder), "LABELS": "patients",
            "SIMULATE": " ".join(str(place) for _, place in places),
        }  # fmt: skip
        done = run(tmp_path, **settings)
        assert done.returncode == 0, done.stdout + done.stderr + live.logs()
        stages = re.findall(r"^== (.+)$", done.stdout, re.M)
        assert stages == ["check", "simulate", "build", "train, export and sign", "gate"]
        result = json.loads((tmp_path / "candidate" / "gate.json").read_text())
        assert (result["passed"], result["version"], result["against"]) == (True, 1, None)
        assert (fed / "models" / "labels" / "1.gate.json").exists()
        promoted = subprocess.run(
            [*live.command, "model", "promote", "labels", "--registry", fed / "models"],
            check=False,
            timeout=110,
        )
        assert promoted.returncode == 0

        table = next(place.glob("*.csv"))
        content = table.read_bytes()
        lines = content.decode().splitlines()
        table.write_text("\n".join([lines[0], *(line[: len(line) // 2] for line in lines[1:])]))
        spoiled = run(tmp_path, **settings, WORK="spoiled")
        assert spoiled.returncode == 2, spoiled.stdout + spoiled.stderr
        assert "== simulate" not in spoiled.stdout
        table.write_bytes(content)

        again = run(tmp_path, **settings, WORK="again")
        assert again.returncode == 0, again.stdout + again.stderr + live.logs()
        result = json.loads((tmp_path / "again" / "gate.json").read_text())
        assert (result["passed"], result["version"], result["against"]["version"]) == (True, 2, 1)


def test_the_workflow_on_the_page_runs_the_script_that_is_tested() -> None:
    """It is YAML, runs the very file, and sets what the script asks for."""
    yaml = pytest.importorskip("yaml")
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    steps: list[dict[str, Any]] = yaml.safe_load(text)["jobs"]["candidate"]["steps"]
    (step,) = [one for one in steps if "candidate.sh" in one.get("run", "")]
    assert (REPOSITORY / step["run"].split()[1]) == SCRIPT
    asked = set(re.findall(r"^# ([A-Z]+) +\w", SCRIPT.read_text(encoding="utf-8"), re.M))
    assert set(step["env"]) <= asked
    assert {"FED", "SIMULATE"} <= set(step["env"])
