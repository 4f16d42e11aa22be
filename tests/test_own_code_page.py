"""The walkthrough of a study with code of its own, executed as it is written: a researcher, an admin and two sites."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from leftovers import living
from terminals import Terminal

from consortium.protocol import sandbox
from consortium.simulations.programs import Programs, free_ports

PAGE = Path(__file__).resolve().parents[1] / "docs" / "own-code.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)


def commands(block: str) -> list[str]:
    return [line[2:] for line in block.splitlines() if line.startswith("$ ")]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(not PAGE.exists(), reason="the docs are not here, only the installed package")
@pytest.mark.skipif(bool(sandbox.missing()), reason="no sandbox here")
def test_a_task_is_written_simulated_handed_over_reviewed_approved_and_run(tmp_path: Path) -> None:
    (study,), (task, layers) = blocks("toml"), blocks("python")
    build, hand_over, at_site, watch = (commands(block) for block in blocks("console"))
    rng = np.random.default_rng(0)
    port, admin_port, enrol_port = free_ports(3)
    with Programs() as programs:
        admin = Terminal(programs, tmp_path / "admin")
        for name, text in {"study.toml": study, "task.py": task, "layers.py": layers}.items():
            (admin.folder / name).write_text(text)
        for name in ("north", "south"):
            age, weight = rng.uniform(20, 90, 120), rng.uniform(45, 130, 120)
            table = pd.DataFrame({"age": age, "weight": weight, "high": (age + weight > 140).astype(int)})
            table.to_csv(admin.folder / f"{name}.csv", index=False)
        for command in build:
            admin.type(command)
        admin.type(
            f"consortium server init --dir fed --name fed --host 127.0.0.1 --bind 127.0.0.1 --port {port} "
            f"--admin-port {admin_port} --enrol-port {enrol_port}"
        )
        admin.type("consortium server start --dir fed")
        sites = []
        for name in ("north", "south"):
            code = admin.type(f"consortium server invite {name} --dir fed").splitlines()[0]
            there = Terminal(programs, tmp_path / name)
            (there.folder / "table.csv").write_bytes((admin.folder / f"{name}.csv").read_bytes())
            there.type("consortium client join --dir site", code)
            there.type("consortium client data add patients --source table.csv --dir site")
            there.type("consortium client start --dir site")
            sites.append(there)
        said = [admin.type(command) for command in hand_over][-1]
        assert "waiting for approvals: 0 of at least 2 sites have approved it; missing: north, south" in said
        assert "sandbox      Landlock" in sites[0].type("consortium client status --dir site")
        for number, there in enumerate(sites):
            listed, reviewed, approved = [there.type(command) for command in at_site]
            assert "blood-pressure" in listed
            assert "not decided" in listed
            for shown in (
                "task.py, line 2: pandas",
                "table = pd.read_csv(source.path)",
                "layers.py, 5 lines",
                "Landlock",
            ):
                assert shown in reviewed
            assert ("north" in reviewed) is False
            assert "approved over data 'patients'" in approved
            if not number:
                assert "1 of at least 2 sites have approved it (north); missing: south" in admin.type(
                    hand_over[-1]
                )
                assert "initial.bin" not in {path.name for path in (tmp_path / "admin/fed/runs").rglob("*")}
        said = admin.type(watch[0], seconds=120)
        assert said.count("2 of 2 answers") == 3, said
        assert "finished" in said
        changed = task.replace("/ 100", "/ 101")
        (admin.folder / "task.py").write_text(changed)
        admin.type("consortium study submit study.toml --dir fed")
        new = sites[0].type(at_site[1])
        assert '+        inputs = torch.tensor(table[["age", "weight"]].to_numpy(np.float32)) / 101' in new
        assert "not decided" in new
    assert len(list((tmp_path / "admin" / "fed" / "runs").glob("*/model/model.onnx"))) == 1
    assert living(str(tmp_path)) == []
