"""A bundle in MLflow's registry too, with its lineage; MLflow itself only where it is installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from consortium.protocol.cli import main
from consortium.protocol.errors import InputError
from consortium.server import seal
from consortium.server.serving import track


def register(*words: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["model", "register", *map(str, words), "--unsigned"])
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_a_bundle_is_a_version_there_too_and_once(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its files, its lineage as tags, the alias; registered elsewhere again it is the same version there."""
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)  # where a SQLite store keeps its artifacts
    uri = f"sqlite:///{tmp_path / 'track.db'}"
    for folder in ("one", "two"):
        assert register(exported, "--registry", tmp_path / folder, "--track", uri, "--json") == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["mlflow"] == "1"
    client = mlflow.MlflowClient(uri, uri)
    name = json.loads((exported / "contract.json").read_bytes())["study"]["name"]
    (version,) = client.search_model_versions(f"name = '{name}'")
    assert version.tags == track.tags(exported)
    assert client.get_model_version_by_alias(name, "candidate").version == version.version
    fetched = mlflow.artifacts.download_artifacts(
        version.source, dst_path=str(tmp_path / "got"), tracking_uri=uri
    )
    assert seal.read(Path(fetched)).digest == version.tags[track.BUNDLE]


def test_tags_say_what_made_it(exported: Path) -> None:
    """Digests, federation, run, sites, rounds, privacy and signer."""
    found, came = track.tags(exported), json.loads((exported / "lineage.json").read_bytes())
    assert found[track.BUNDLE] == seal.read(exported).digest
    assert found["consortium.model"] == came["model"]
    assert found["consortium.study"] == came["study"]["digest"]
    assert found["consortium.sites"] == ",".join(came["sites"])
    assert (found["consortium.privacy.mechanism"], found["consortium.signer.root"]) == ("none", "nobody")


def test_a_password_in_the_address_and_a_missing_mlflow_are_wrong_input(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit 2; the password is not repeated, what to type is said, and nothing is registered."""
    for wrong, said in (
        ("https://me:hunter2@mlflow.example.org", "holds a password"),
        ("postgresql://me@host/track?password=hunter2", "holds a password"),
        ("https://hunter2@[::1", "is no address"),
        ("https://host:hunter2/", "is no address"),
    ):
        with pytest.raises(InputError, match=f"--track: {said}") as caught:
            track.record(wrong, exported, "toy")
        assert "hunter2" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "mlflow", None)
    for right in (
        "https://mlflow.example.org",
        "databricks",
        "databricks://profile",
        "file:///srv/track",
        "./mlruns",
    ):
        with pytest.raises(InputError, match="is not installed"):
            track.record(right, exported, "toy")
    uri = f"sqlite:///{tmp_path / 'track.db'}"
    assert register(exported, "--registry", tmp_path / "models", "--track", uri) == 2
    assert "pip install 'consortium[track]'" in capsys.readouterr().err
    assert not (tmp_path / "models").exists()


def test_mlflow_is_not_imported_unless_it_is_asked_for() -> None:
    """It takes seconds."""
    code = (
        "import sys, consortium.server.cli, consortium.server.serving.track; print('mlflow' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=110
    )
    assert done.stdout.strip() == "False"
