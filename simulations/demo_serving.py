"""The demonstration goes on: the exported model is registered, promoted, served over TLS, and asked for predictions.

What an operator does by hand, by the same commands' calls and the same program.
"""

from __future__ import annotations

import json
import ssl
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPSConnection
from pathlib import Path
from typing import Any

from consortium.protocol.credentials import chain_in, fingerprint
from consortium.protocol.errors import ConsortiumError
from consortium.server.model import load_model
from consortium.server.serving import tokens
from consortium.server.serving.registry import Registry
from consortium.simulations.deployment import environment
from consortium.simulations.programs import Programs, free_ports

HOST = "127.0.0.1"
START = 60.0
"""Seconds in which the serving program must answer."""


@dataclass(frozen=True)
class Answers:
    """What a served model said. probabilities: of class 1, a row each. seconds: of each request."""

    registry: Path
    version: str
    bundle: str
    prediction: str
    probabilities: Sequence[float]
    seconds: float
    lineage: Mapping[str, Any]

    def document(self) -> dict[str, Any]:
        """What `--json` prints."""
        rounds = [one for one in self.lineage["rounds"] if not one["void"]]
        return {
            "registry": str(self.registry),
            "version": self.version,
            "bundle": self.bundle,
            "prediction": self.prediction,
            "probabilities": list(self.probabilities),
            "sites": self.lineage["sites"],
            "rounds": len(rounds),
        }


def serve(folder: Path, model: Path, rows: Sequence[Mapping[str, float]]) -> Answers:
    """Register the signed model in `folder`/models, make it the champion, serve it, and ask about `rows`.

    Raises:
        IntegrityError: the model is not what the federation in `folder`/server signed.
        ConsortiumError: the program does not answer, or not as it should.
    """
    root = fingerprint(chain_in(folder / "server" / "root.pem")[0])
    name = str(load_model(model, root=root).contract["study"]["name"])
    registry = Registry(folder / "models", time.time)
    registry.register(model, name, lambda copy: str(load_model(copy, root=root).contract["model"]))
    registry.promote(name, None)
    token = tokens.new(folder / "serving", "demo", "admin")
    rest, rpc = free_ports(2)
    command: list[str | Path] = [
        *(Path(sys.executable).with_name("consortium"), "model", "serve", registry.folder),
        *(
            "--dir",
            folder / "serving",
            "--host",
            HOST,
            "--port",
            str(rest),
            "--grpc-port",
            str(rpc),
            "--root",
            root,
        ),
    ]
    with Programs() as programs:
        programs.start("serving", command, environment(), folder)
        line = _Line(rest, folder / "serving" / "root.pem", token)
        _wait(programs, line)
        started = time.monotonic()
        answer = line.ask("POST", f"/v2/models/{name}/infer", _request(rows))
        seconds = time.monotonic() - started
        lineage = line.ask("GET", f"/v2/models/{name}/lineage")
    (output,) = answer["outputs"]
    said = answer["parameters"]
    return Answers(
        registry.folder, f"{name}@{answer['model_version']}", said["bundle_digest"], said["prediction_id"],
        output["data"][1::2], seconds, lineage,
    )  # fmt: skip


@dataclass(frozen=True)
class _Line:
    port: int
    root: Path
    token: str

    def ask(self, method: str, path: str, document: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The JSON of an answer."""
        context = ssl.create_default_context(cafile=str(self.root))
        line = HTTPSConnection(HOST, self.port, timeout=30, context=context)
        try:
            body = None if document is None else json.dumps(document)
            line.request(method, path, body, {"Authorization": f"Bearer {self.token}"})
            answer = line.getresponse()
            found: dict[str, Any] = json.loads(answer.read())
        finally:
            line.close()
        if answer.status != 200:
            raise ConsortiumError(f"the served model: {found.get('error', answer.status)}")
        return found


def _wait(programs: Programs, line: _Line) -> None:
    end = time.monotonic() + START
    while True:
        programs.check()
        try:
            line.ask("GET", "/v2/health/ready")
        except OSError as error:  # nobody listens yet, or the certificate is not made
            if time.monotonic() > end:
                raise ConsortiumError(
                    f"the served model did not answer within {START:g} s ({error})"
                ) from error
            time.sleep(0.05)
        else:
            return


def _request(rows: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    names = list(rows[0])
    inputs = [
        {
            "name": name,
            "datatype": "FP32",
            "shape": [len(rows), 1],
            "data": [float(row[name]) for row in rows],
        }
        for name in names
    ]
    return {"inputs": inputs}
