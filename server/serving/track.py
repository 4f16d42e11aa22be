"""A registered bundle in MLflow's registry too (extra `track`): a version of a model, with its lineage as tags.

The folder of versions stays what is served from; MLflow gets a copy for whoever looks there. MLflow is imported when it
is asked for and not before (it takes seconds), and its telemetry is turned off.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from consortium.protocol.errors import ConsortiumError, InputError
from consortium.server import seal
from consortium.server.model import verified

EXPERIMENT = "consortium"
BUNDLE = "consortium.bundle"
LONGEST = 5000
"""Letters of a tag that MLflow keeps."""


def tags(folder: Path) -> dict[str, str]:
    """What made the bundle in `folder`, as MLflow's tags: digests, federation, run, sites, rounds, privacy, signer.

    Raises:
        InputError, IntegrityError: it is no bundle, or damaged.
    """
    files, sealed = verified(folder), seal.read(folder)
    came, private = json.loads(files["lineage.json"]), json.loads(files["privacy.json"])
    about: Mapping[str, Any] = {
        "bundle": sealed.digest,
        "model": came["model"],
        "study": came["study"]["digest"],
        "federation": came["federation"],
        "run": came["run"],
        "sites": ",".join(came["sites"]),
        "rounds": len(came["rounds"]),
        "privacy.mechanism": private["mechanism"],
        "privacy.epsilon": private["epsilon"],
        "signer.root": sealed.signer.root if sealed.signer is not None else "nobody",
    }
    return {f"consortium.{key}": str(value)[:LONGEST] for key, value in about.items()}


def record(uri: str, folder: Path, name: str) -> str:
    """Make the verified bundle in `folder` a version of the model `name` in the registry at `uri`; MLflow's number of
    it. A bundle that is there already stays the version that it is.

    uri: MLflow's, such as sqlite:///track.db or https://mlflow.example.org, without a password. name: as in a registry.

    Raises:
        InputError: MLflow is not installed, or the URI holds a password or is none.
        ConsortiumError: MLflow refuses, or cannot be reached.
    """
    _refuse_password(uri)
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    try:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
    except ImportError as error:
        raise InputError("--track: MLflow is not installed; type: pip install 'consortium[track]'") from error
    from sqlalchemy.exc import SQLAlchemyError

    found = tags(folder)
    try:
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        return _version(client, folder, name, found)
    except (MlflowException, SQLAlchemyError, OSError) as error:
        said = (str(error).splitlines() or [""])[0][:300]
        why = f"{type(error).__name__}: {said}"
        raise ConsortiumError(f"--track: MLflow refused ({why}); nothing was registered") from error


def _refuse_password(uri: str) -> None:
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    from consortium.protocol.database import holds_password

    try:
        held = "://" in uri and holds_password(make_url(uri))
    except (ArgumentError, ValueError) as error:
        right = "sqlite:///track.db or https://mlflow.example.org would be right"
        raise InputError(f"--track: is no address of a registry of MLflow's; {right}") from error
    if held:
        raise InputError("--track: holds a password; MLflow takes it from MLFLOW_TRACKING_PASSWORD or _TOKEN")


def _version(client: Any, folder: Path, name: str, found: Mapping[str, str]) -> str:
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    for one in client.search_model_versions(f"name = '{name}'"):
        if one.tags.get(BUNDLE) == found[BUNDLE]:
            return str(one.version)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    number = client.create_experiment(EXPERIMENT) if experiment is None else experiment.experiment_id
    run = client.create_run(number, tags=dict(found), run_name=found["consortium.run"])
    client.log_artifacts(run.info.run_id, str(folder), "bundle")
    client.set_terminated(run.info.run_id)
    source = f"{run.info.artifact_uri}/bundle"
    made = client.create_model_version(name, source, run.info.run_id, tags=dict(found))
    client.set_registered_model_alias(name, "candidate", made.version)
    return str(made.version)
