"""A prediction from request to answer, whatever door it came through: find, check, compute, write down, count."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from consortium.protocol.errors import ConsortiumError
from consortium.server.serving.counters import Counters
from consortium.server.serving.desk import Desk
from consortium.server.serving.engine import AbsentError, Arrays, Engine, Loaded, OverloadedError
from consortium.server.serving.features import Features
from consortium.server.serving.tensors import Given, RequestError, datatype, shape
from consortium.server.serving.tokens import Caller

SERVER = "consortium"
EXTENSIONS = ["binary_tensor_data"]


@dataclass(frozen=True)
class Predicted:
    """An answer. outputs: those that were asked for."""

    by: Loaded
    id: str
    outputs: Arrays


@dataclass
class Service:
    """What both doors share. callers: by the SHA-256 of their token; replaced whole. features: where those of
    predictions are kept, None where they are not."""

    engine: Engine
    desk: Desk
    counters: Counters
    callers: Mapping[str, Caller]
    features: Features | None = None

    async def predict(
        self,
        caller: Caller,
        door: str,
        name: str,
        version: str,
        given: Sequence[Given],
        wanted: Sequence[str],
    ) -> Predicted:
        """Predictions for the rows of `given`; all outputs where none is `wanted`.

        Raises:
            AbsentError: there is no such model or version.
            RequestError: the request does not fit the model's contract.
            OverloadedError: too much waits.
            ConsortiumError: the audit, or the features that must be kept, cannot be written, so nothing is answered.
        """
        started = time.perf_counter()
        found: Loaded | None = None
        try:
            found = self.engine.find(name, version)
            if wanted:
                _check_wanted(found, wanted)
            arrays = found.check(given)
            outputs = await found.lane.predict(arrays)
            rows = len(next(iter(arrays.values())))
            identity = self.desk.new_id(name, found.version)
            if self.features is not None:
                self.features.keep(identity, name, found.version, arrays)
            taken = time.perf_counter() - started
            self.desk.note(
                {
                    "caller": caller.name,
                    "door": door,
                    "model": name,
                    "version": found.version,
                    "digest": found.digest,
                    "status": "ok",
                    "rows": rows,
                    "prediction": identity,
                    "ms": round(taken * 1e3, 3),
                }
            )
        except ConsortiumError as error:
            status = status_of(error)
            self.counters.requests.labels(
                name if found else "", found.version if found else "", door, status
            ).inc()
            if status < 500:
                self.desk.note(
                    {
                        "caller": caller.name,
                        "door": door,
                        "model": name[:80],
                        "version": found.version if found else version[:20],
                        **({"digest": found.digest} if found else {}),
                        "status": status,
                    }
                )
            raise
        self.counters.answered(name, found.version, door, rows, taken)
        return Predicted(found, identity, {one: outputs[one] for one in wanted} if wanted else outputs)


def _check_wanted(found: Loaded, wanted: Sequence[str]) -> None:
    known = [str(one["name"]) for one in found.contract["outputs"]]
    for one in wanted:
        if one not in known:
            raise RequestError(f"output '{one[:80]}': the model has none such; it has {', '.join(known)}")


def status_of(error: ConsortiumError) -> int:
    """HTTP's status for an error."""
    if isinstance(error, AbsentError):
        return 404
    if isinstance(error, RequestError):
        return 400
    return 429 if isinstance(error, OverloadedError) else 503


def metadata(one: Loaded, versions: Sequence[str]) -> dict[str, Any]:
    """What the protocol says of a model."""

    def tensors(ends: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        return [{"name": end["name"], "datatype": datatype(end), "shape": shape(end)} for end in ends]

    return {
        "name": one.name,
        "versions": sorted(versions),
        "platform": "onnx",
        "inputs": tensors(one.contract["inputs"]),
        "outputs": tensors(one.contract["outputs"]),
    }


def parameters(one: Predicted) -> dict[str, str]:
    """What stands in every answer besides the outputs."""
    return {
        "prediction_id": one.id,
        "bundle_digest": one.by.digest,
        "model_digest": str(one.by.contract["model"]),
    }
