"""The commands of whoever runs a federation: `consortium server ...`, `study ...` and `model ...`."""

from __future__ import annotations

from consortium.server.evidence_cli import server
from consortium.server.model_cli import model
from consortium.server.study_cli import study

__all__ = ["model", "server", "study"]
