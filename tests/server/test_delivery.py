"""What a site is told of a version of a model, and how that is read."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from founded import found

from consortium.protocol import statement
from consortium.protocol.delivery import Delivery, File, state, verified
from consortium.protocol.errors import IntegrityError
from consortium.protocol.messages import canonical
from consortium.protocol.signing import DELIVERY
from consortium.server import seal
from consortium.server.delivery import Deliveries
from consortium.server.model import load_model
from consortium.server.serving.registry import Registry

NOW = 1_800_000_000.0
GOOD = Delivery("toy", 1, "b", NOW, NOW + 10, {"manifest.json": File(1, "0" * 64)})


def test_a_site_is_told_the_files_that_were_registered(exported: Path, tmp_path: Path) -> None:
    """By the manifest's digests, so a file that was damaged on the server's disk since is accepted by no site."""
    federation = found(tmp_path / "fed")
    registry = Registry(federation.folder / "models", lambda: NOW)
    registry.register(exported, "toy", lambda copy: str(load_model(copy).contract["model"]))
    place = registry.folder / "toy" / "1"
    right = seal.read(place)
    with (place / "model.onnx").open("r+b") as file:
        file.write(b"damaged")
    said = Deliveries(federation, lambda: NOW).said("toy", -1)
    assert {name: one.sha256 for name, one in said.files.items()} == {
        **right.files,
        seal.MANIFEST: right.digest,
    }
    assert said.bundle == right.digest
    assert {name: one.size for name, one in said.files.items()} == {
        path.name: path.stat().st_size for path in place.iterdir()
    }


@pytest.mark.parametrize(
    "changed",
    [
        {"version": float("inf")}, {"version": 0}, {"at": float("nan")}, {"until": float("inf")}, {"until": "later"},
        {"files": {}}, {"files": {"../x": {"size": 1, "sha256": "0" * 64}}}, {"files": {"x": {"size": -1}}},
        {"files": {"x": {"size": float("inf"), "sha256": "0" * 64}}}, {"withdrawn": "why"}, {"files": 3},
        {"until": NOW + 8 * 86400},
    ],
)  # fmt: skip
def test_a_statement_that_says_nonsense_is_refused(changed: dict[str, Any]) -> None:
    """Signed or not: no size, time or name that no bundle has, and none that is good for ever."""
    key = Ed25519PrivateKey.generate()
    keys = [key.public_key()]
    assert verified(state(key, "lung", "a", "n", GOOD), keys, "lung", "a", "toy", "n") == GOOD
    about = {"format": 1, "federation": "lung", "site": "a", "nonce": "n", **asdict(GOOD), **changed}
    text = (
        canonical(about)
        if "inf" not in str(about) and "nan" not in str(about)
        else json.dumps(about).encode()
    )
    with pytest.raises(IntegrityError, match="statement of a model"):
        verified(statement.signed(key, DELIVERY, text), keys, "lung", "a", "toy", "n")


def test_an_answer_to_another_question_is_refused() -> None:
    """Another site's, model's or federation's, or one that was given before; a kept one has no question."""
    key = Ed25519PrivateKey.generate()
    document, keys = state(key, "lung", "a", "n", GOOD), [key.public_key()]
    for asked in (
        ("other", "a", "toy", "n"),
        ("lung", "b", "toy", "n"),
        ("lung", "a", "x", "n"),
        ("lung", "a", "toy", "m"),
    ):
        with pytest.raises(IntegrityError, match="not the answer"):
            verified(document, keys, *asked)
    assert verified(document, keys, "lung", "a", "toy") == GOOD
