"""Studies with code of their own in a live federation: built, handed in, approved at each site, run to their end."""

from __future__ import annotations

import base64
import subprocess
from pathlib import Path
from typing import Any

from live import COMMAND, Live

from consortium.protocol import bundle
from consortium.protocol.bundle import Bundle
from consortium.simulations.deployment import DATA


def hand_in(one: Live, path: Path) -> Bundle:
    """Build the study, submit its bundle and start it."""
    made = bundle.build(path)
    one.admin.post("/v1/studies", bundle=base64.b64encode(made.content).decode())
    one.admin.post(f"/v1/studies/{made.study.name}/start")
    return made


def approve(one: Live, made: Bundle, *more: str, data: str = DATA) -> None:
    """Approve a bundle at every site, as an operator does."""
    for site in one.places:
        words = [*COMMAND, "client", "approve", made.study.name, "--bundle", made.digest[:16], "--data", data]
        where = ["--dir", str(one.home(site).folder), *more]
        done = subprocess.run([*words, *where], capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done


def ran(one: Live, path: Path, data: str = DATA) -> dict[str, Any]:
    """How a study stands that was handed in, approved and run to its end."""
    made = hand_in(one, path)
    approve(one, made, data=data)
    return one.over(made.study.name)


def run_log(one: Live, name: str) -> str:
    """What stands in the log of a study's first run at the server."""
    return (one.folder / "server" / "runs" / f"{name}.1" / "log.txt").read_text()
