"""The README's federation, executed as it is written: an admin's terminal, and one for each of two sites."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from leftovers import living
from sklearn.datasets import load_breast_cancer
from terminals import Terminal

from consortium.simulations.programs import Programs, free_ports

README = Path(__file__).resolve().parents[1] / "README.md"
MAPPING = """\
format = 1
[columns.radius]
column = "Radius"
[columns.malignant]
column = "Befund"
codes = { gut = 0, boese = 1 }
"""


def shown() -> tuple[str, str, list[str], list[str], list[str]]:
    """The study, the policy, and the commands of the admin, of a site, and of the admin again."""
    text = README.read_text(encoding="utf-8")
    study, policy = re.findall(r"```toml\n(.*?)```", text, re.S)
    section = text.split("## A federation")[1].split("\n## ")[0]
    blocks = re.findall(r"```console\n(.*?)```", section, re.S)
    first, site, then = (
        [line[2:] for line in block.splitlines() if line.startswith("$ ")] for block in blocks
    )
    return study, policy, first, site, then


def write_patients(folder: Path, rows: pd.DataFrame) -> None:
    """A site's table, with names and codes of its own, and its mapping."""
    own = rows.rename(columns={"radius": "Radius", "malignant": "Befund"})
    own["Befund"] = np.where(own["Befund"] == 1, "boese", "gut")
    own.to_csv(folder / "patients.csv", index=False)
    (folder / "mapping.toml").write_text(MAPPING)


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.skipif(not README.exists(), reason="the source tree is not here, only the installed package")
def test_a_new_admin_and_new_sites_do_what_the_readme_says(tmp_path: Path) -> None:
    """Its commands, with only address and ports changed, lead from nothing to a finished study and its model."""
    study, policy, first, site, then = shown()
    assert [command.split()[1:3] for command in first] == [
        ["server", one] for one in ("init", "start", "invite")
    ]
    frame = load_breast_cancer(as_frame=True).frame
    columns = {"mean radius": "radius", "mean texture": "texture", "mean concavity": "concavity"}
    patients = frame[list(columns)].rename(columns=columns).assign(malignant=1 - frame["target"])
    port, admin_port, enrol_port = free_ports(3)
    here = f"127.0.0.1 --port {port} --admin-port {admin_port} --enrol-port {enrol_port} --bind 127.0.0.1"
    with Programs() as programs:
        admin = Terminal(programs, tmp_path / "admin")
        (admin.folder / "study.toml").write_text(study)
        for command in first[:2]:
            admin.type(command.replace("fed.example.org", here))
        for name, rows in (("hospital-1", patients[:300]), ("hospital-2", patients[300:])):
            code = admin.type(first[2].replace("hospital-1", name)).splitlines()[0]
            there = Terminal(programs, tmp_path / name)
            write_patients(there.folder, rows)
            for command in site:
                if "client start" in command:
                    (there.folder / "site" / "policy.toml").write_text(policy)
                there.type(command, code)
        said = [admin.type(command) for command in then][-1]
        assert "finished" in said
    assert len(list((tmp_path / "admin" / "fed" / "runs").glob("*/model/model.onnx"))) == 1
    assert living(str(tmp_path)) == []
