"""The worker program: runs a study's code in a process of its own, without keys, for the server as for a site.

    python -m consortium.client.worker initial FOLDER --code CODE [--control-variates] [--parent PID]
    python -m consortium.client.worker export FOLDER --code CODE [--control-variates] [--parent PID]
    python -m consortium.client.worker serve FD

`serve` answers a site's instructions over the socket FD (`client/serving_worker.py`). In the others both sides talk
through files in FOLDER, none of them a pickle. In: `study.toml`; for `export` also `model.bin` (the `shared` vector),
perhaps `local.bin`, and `statistics.npz` (the sums of all sites). Out, of `initial`: `initial.bin`, `layout.json`,
`task.json`. Out, of `export`: `model.onnx`, `model.safetensors`, `signature.json`, and a `probe-N.npz` of N rows for
each batch size by which the graph is to be compared with the model.

Code that a study brings runs in this program behind `protocol/confined.py` alone.

The process ends with the exit code of its error, which stands in `error.json`: `kind` and `message`.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from consortium.protocol.code import is_own
from consortium.protocol.errors import ConsortiumError, InputError
from consortium.protocol.layout import Kind, Layout, Vector, digest_of
from consortium.protocol.lifeline import end_with
from consortium.protocol.messages import canonical
from consortium.protocol.study import Study


def _nothing() -> None:
    """Where the process is not confined."""


@contextmanager
def _loading() -> Iterator[None]:
    """What is imported here stays as long as the process: the search for garbage among its hundreds of thousands of
    objects, while they are made and ever after, would take a seventh of a worker's start."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def main(arguments: Sequence[str] | None = None, confine: Callable[[], None] = _nothing) -> int:
    """Do one thing; returns the exit code. confine: is called when libraries are loaded, before any study's code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) == 2 and arguments[0] == "serve":
        with _loading():
            from consortium.client.serving_worker import serve

        return serve(int(arguments[1]), confine)
    parser = argparse.ArgumentParser(prog="python -m consortium.client.worker")
    parser.add_argument("command", choices=["initial", "export"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--code", type=Path, required=True, help="where the study's own code lies")
    parser.add_argument("--control-variates", action="store_true", help="the strategy is SCAFFOLD-like")
    parser.add_argument("--parent", type=int, help="the process with which this one ends")
    given = parser.parse_args(arguments)
    if given.parent is not None:
        end_with(given.parent)
    try:
        study = _study(given.folder, given.code)
        with _loading():
            import torch  # noqa: F401 - before it is confined

        confine()
        variates = given.control_variates
        if is_own(study.strategy.name):  # only here is it known what it does at the sites
            from consortium.strategies.chosen import strategy_of

            variates = strategy_of(study).local.control_variates
        command = _initial if given.command == "initial" else _export
        command(study, given.folder, variates)
    except ConsortiumError as error:
        return _failed(given.folder, type(error).__name__, str(error), error.exit_code)
    except Exception as error:  # noqa: BLE001 - the study's own code may raise anything; it is reported
        return _failed(given.folder, "InputError", _fault(error, given.code), InputError.exit_code)
    return 0


def _failed(folder: Path, kind: str, message: str, code: int) -> int:
    (folder / "error.json").write_text(json.dumps({"kind": kind, "message": message}), encoding="utf-8")
    print(message, file=sys.stderr)
    return code


def _fault(error: Exception, code: Path) -> str:
    """What went wrong in code that is not ours, with its innermost line."""
    place, step = "", error.__traceback__
    while step is not None:
        path = Path(step.tb_frame.f_code.co_filename)
        if code.resolve() in path.resolve().parents:
            place = f"{path.name}, line {step.tb_lineno}: "
        step = step.tb_next
    return f"study code: {place}{type(error).__name__}: {error}; correct the code, then try again"


def _study(folder: Path, code: Path) -> Study:
    text = (folder / "study.toml").read_text(encoding="utf-8")
    return Study.parse(text, source="study.toml", folder=code)


def _resident(study: Study, task: Any, control_variates: bool) -> Any:
    """The task's model at the study's start, exactly as at a site."""
    import torch

    from consortium.client.site import start
    from consortium.strategies.base import Local

    torch.set_num_threads(1)
    return start(study, task, Local(control_variates=control_variates))


def _initial(study: Study, folder: Path, control_variates: bool) -> None:
    from consortium.client.task import task_of

    task = task_of(study)
    net = _resident(study, task, control_variates)
    vector = net.arrays["shared"]
    if not np.isfinite(vector).all():
        raise InputError(f"{study.task}: the initial model holds NaN or infinite numbers")
    about = {"study": study.digest, "model": digest_of([vector]), "prepares": bool(task.prepares)}
    vector.tofile(folder / "initial.bin")
    _write(folder, "layout.json", canonical(net.layout.document()))
    _write(folder, "task.json", canonical(about))


def _export(study: Study, folder: Path, control_variates: bool) -> None:
    from safetensors.numpy import save_file

    from consortium.client.task import task_of
    from consortium.client.tracing import BATCHES, signature_document, trace

    task = task_of(study)
    net = _resident(study, task, control_variates)
    shared = _vector(folder / "model.bin", net.layout, "shared")
    local = _vector(folder / "local.bin", net.layout, "local") if net.layout["local"].size else None
    net.load(shared, local)
    with np.load(folder / "statistics.npz", allow_pickle=False) as table:
        sums = {name: table[name] for name in table.files}
    digest = digest_of([shared])
    labels = {
        "consortium.study": study.digest,
        "consortium.model": digest,
        "consortium.layout": net.layout.digest,
    }
    tensors = {name: value.contiguous().numpy() for name, value in net.module.state_dict().items()}
    # One key: several would be written in an order that changes from run to run.
    save_file(tensors, folder / "model.safetensors", {"consortium": canonical(labels).decode()})
    del tensors, shared
    if "onnx" in study.export.formats:
        traced = trace(task, net.module, sums, labels)
        with (folder / "model.onnx").open("wb") as file:
            file.writelines(traced.onnx)
        _write(folder, "signature.json", signature_document(traced).encode())
        for rows, probe in zip(BATCHES, traced.probes, strict=True):
            arrays = {f"input/{name}": value for name, value in probe.inputs.items()}
            arrays |= {f"output/{name}": value for name, value in probe.outputs.items()}
            np.savez(folder / f"probe-{rows}.npz", allow_pickle=False, **arrays)


def _vector(path: Path, layout: Layout, kind: Kind) -> Vector:
    segment = layout[kind]
    if not path.is_file():
        names = ", ".join(array.name for array in segment.arrays[:3])
        raise InputError(
            f"the model has parts that stay at the sites ({names}), so the server's model alone is not whole; "
            "export it with a site's own parts"
        )
    count, size = path.stat().st_size, segment.numpy_dtype.itemsize
    if count != segment.size * size:
        raise InputError(f"{path.name}: has {count / size:g} numbers; the study's model has {segment.size}")
    return np.memmap(path, segment.numpy_dtype, "r").view(np.ndarray)


def _write(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)


if __name__ == "__main__":
    raise SystemExit(main())
