"""The demonstration goes on: the exported model is gated at the hospitals, promoted, pulled by one, and served there.

What an admin and an operator do by hand, by the same commands' calls and the same programs.
"""

from __future__ import annotations

import json
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPSConnection
from pathlib import Path
from typing import Any

from consortium.protocol.credentials import chain_in, fingerprint
from consortium.protocol.errors import ConsortiumError
from consortium.server.gate_cli import judged
from consortium.server.model import load_model
from consortium.server.serving import tokens
from consortium.server.serving.registry import Registry
from consortium.simulations.deployment import Federation, environment
from consortium.simulations.programs import Programs, free_ports

COMMAND = Path(sys.executable).with_name("consortium")
HOST = "127.0.0.1"
START = 60.0
"""Seconds in which the serving program must answer."""


@dataclass(frozen=True)
class Answers:
    """What a served model said. registry: the federation's. site: where it was served. gate: what the sites judged.

    probabilities: of class 1, a row each. seconds: of the request.
    """

    registry: Path
    site: str
    gate: Mapping[str, Any]
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
            "site": self.site,
            "gate": {
                "passed": self.gate["passed"],
                "sites": self.gate["sites"],
                "metric": self.gate["metric"],
            },
            "version": self.version,
            "bundle": self.bundle,
            "prediction": self.prediction,
            "probabilities": list(self.probabilities),
            "sites": self.lineage["sites"],
            "rounds": len(rounds),
        }


def serve(
    live: Federation, model: Path, site: str, rows: Sequence[Mapping[str, float]], say: Callable[[str], None]
) -> Answers:
    """Register the signed model with the federation, gate and promote it, serve it at a site, and ask about `rows`.

    Raises:
        IntegrityError: the model is not what the federation signed.
        ConsortiumError: a program does not answer, or not as it should.
    """
    server, own = live.folder / "server", live.folder / "clients" / site
    root = fingerprint(chain_in(server / "root.pem")[0])
    name = str(load_model(model, root=root).contract["study"]["name"])
    registry = Registry(server / "models", time.time)
    registry.register(model, name, lambda copy: str(load_model(copy, root=root).contract["model"]))
    gate = judged(live.admin, name, None)
    if not gate["passed"]:
        raise ConsortiumError(f"{name}: did not pass its gate: {'; '.join(gate['why'])}")
    whole = next(one for one in gate["cells"] if (one["site"], one["group"]) == ("all", "all"))
    say(
        f"gate: {len(gate['sites'])} hospitals judged the exported bytes, {gate['metric']} {whole['candidate']:.4f}"
    )
    registry.promote(name, None)
    _command("client", "model", "pull", name, "--dir", own)
    say(f"{name}@1 is the champion; {site} pulled it and serves it")
    token = tokens.new(own / "serving", "demo", "admin")
    (rest,) = free_ports(1)
    words = (
        "client",
        "model",
        "serve",
        name,
        "--dir",
        own,
        "--host",
        HOST,
        "--port",
        rest,
        "--grpc-port",
        -1,
    )
    live.programs.start("serving", [COMMAND, *map(str, words)], environment(), live.folder)
    line = _Line(rest, own / "serving" / "root.pem", token)
    _wait(live.programs, line)
    started = time.monotonic()
    answer = line.ask("POST", f"/v2/models/{name}/infer", _request(rows))
    seconds = time.monotonic() - started
    lineage = line.ask("GET", f"/v2/models/{name}/lineage")
    (output,) = answer["outputs"]
    said = answer["parameters"]
    return Answers(
        registry.folder, site, gate, f"{name}@{answer['model_version']}", said["bundle_digest"], said["prediction_id"],
        output["data"][1::2], seconds, lineage,
    )  # fmt: skip


def _command(*words: object) -> None:
    """Run a command of Consortium's to its end."""
    done = subprocess.run(
        [COMMAND, *map(str, words)],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=START,
        check=False,
    )
    if done.returncode:
        raise ConsortiumError(f"consortium {' '.join(map(str, words[:3]))}: {done.stderr.strip()}")


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
