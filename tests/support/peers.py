"""Programs of others that tests ask: tritonclient in a Python of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TRITON = "tritonclient[grpc,http]==2.73.0"


def triton(folder: Path) -> str:
    """A Python that has tritonclient: the one that CONSORTIUM_TRITON names, else made in `folder`."""
    if "CONSORTIUM_TRITON" in os.environ:
        return os.environ["CONSORTIUM_TRITON"]
    made = subprocess.run([sys.executable, "-m", "venv", folder], capture_output=True, check=False)
    python = str(folder / "bin" / "python")
    pip = [python, "-m", "pip", "install", "-qq", "--disable-pip-version-check", TRITON]
    if made.returncode or subprocess.run(pip, capture_output=True, check=False).returncode:
        pytest.skip(f"{TRITON} cannot be installed here; set CONSORTIUM_TRITON to a Python that has it")
    return python
