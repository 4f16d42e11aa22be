"""A trained model as an ONNX graph: raw inputs in, predictions out.

The graph holds all that stands between a caller's row and the answer: the codes of categorical columns, the
federation's preprocessing, the model, the task's output step. It is traced by `torch.export` and converted by the
dynamo exporter, never by the older tracer: that one silently keeps only the branch that its example took.

A task's inputs are either columns (each a graph input of shape [batch, 1]; the task sees them side by side as one
(n, columns) tensor, in the signature's order) or one tensor ([batch, *shape]).
"""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from consortium.client.onnx_file import UNLISTED, codes_of, onnx_file
from consortium.client.task import Task
from consortium.protocol.errors import InputError
from consortium.protocol.messages import Statistics

OPSET = 20
BATCHES = (1, 4, 17)
"""Batch sizes of the probes by which the graph is compared with the model."""

_TRACE_BATCH = 3
_MAX_BYTES = 2_000_000_000
_DTYPES = {"float32": torch.float32, "float64": torch.float64, "int64": torch.int64, "uint8": torch.uint8}

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Probe:
    """Raw inputs by name as a caller sends them, and what the torch model answers, by output name."""

    inputs: Arrays
    outputs: Arrays


@dataclass(frozen=True)
class Traced:
    """A graph, what goes in and comes out (as `contract.json` says it), and probes at the sizes of `BATCHES`.

    onnx: the pieces of its file; large ones are the module's own memory.
    """

    onnx: Sequence[bytes | memoryview]
    inputs: Sequence[Mapping[str, Any]]
    outputs: Sequence[Mapping[str, Any]]
    probes: Sequence[Probe]


class Served(nn.Module):
    """Raw inputs -> preprocessing -> model -> output step, as one module."""

    def __init__(self, columns: bool, dtype: torch.dtype, steps: Sequence[nn.Module]) -> None:
        super().__init__()
        self.columns, self.dtype = columns, dtype
        self.steps = nn.Sequential(*steps)

    def forward(self, *inputs: Tensor) -> Any:
        raw = torch.cat([one.to(self.dtype) for one in inputs], 1) if self.columns else inputs[0]
        return self.steps(raw)


def trace(task: Task, module: nn.Module, sums: Statistics, labels: Mapping[str, str]) -> Traced:
    """The graph of a task's trained `module` with the preprocessing that the sums of all sites give.

    labels: what the file says of itself (digests); readable from the graph without any other file.

    Raises:
        InputError: the graph depends on the values or the number of its rows, holds an operator that ONNX has not,
            or the task does not say what its inputs are.
    """
    inputs, named = signature(task, module)
    size = sum(p.numel() * p.element_size() for p in module.parameters())
    if size > _MAX_BYTES:
        raise InputError(
            f"{task.study.task}: the model has {size} bytes; an ONNX file holds at most {_MAX_BYTES}"
        )
    steps = [step for step in (task.preprocessing(sums), module, task.output()) if step is not None]
    served = Served(inputs[0]["kind"] != "tensor", _DTYPES[task.study.model.dtype], steps).eval()
    probes, outputs = _probes(task, served, inputs, named)
    program = _program(task, served, inputs)
    return Traced(onnx_file(program, inputs, outputs, labels), inputs, outputs, probes)


def signature(task: Task, module: nn.Module) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Inputs and outputs of a task, complete: every input has kind and dtype, tensors have their shape.

    A task that says nothing takes one tensor, whose shape is the study's `data.shape`, or what its first layer
    takes if that is linear.
    """
    given = task.signature()
    dtype = task.study.model.dtype
    inputs = [{"dtype": dtype, **one} for one in given.get("inputs", ())]
    if not inputs:
        inputs = [{"dtype": dtype, "name": "input", "kind": "tensor", "shape": _shape(task, module)}]
    for one in inputs:
        if one["kind"] != "tensor":
            one["missing"] = given.get("missing", "refuse")
        if one["kind"] == "categorical":
            one.pop("dtype")
    names = [one["name"] for one in inputs]
    mixed = len(inputs) > 1 and any(one["kind"] == "tensor" for one in inputs)
    if mixed or len(set(names)) < len(names):
        raise InputError(
            f"{task.study.task}: the inputs must be columns, each once, or one tensor; got {names}"
        )
    return inputs, [dict(one) for one in given.get("outputs", ())]


def _shape(task: Task, module: nn.Module) -> list[int]:
    shape = getattr(task.study.data, "get", lambda _: None)("shape")
    if shape is not None:
        return [int(n) for n in shape]
    first = next((m for m in module.modules() if next(m.parameters(recurse=False), None) is not None), None)
    if isinstance(first, nn.Linear):
        return [first.in_features]
    raise InputError(
        f"{task.study.task}: what shape one input has is not known; set it in the study, for example\n"
        "  [data]\n  shape = [1, 28, 28]\nor define `signature` in the task"
    )


def _probes(
    task: Task, served: Served, inputs: Sequence[Mapping[str, Any]], named: Sequence[Mapping[str, Any]]
) -> tuple[list[Probe], list[dict[str, Any]]]:
    """Probes at each batch size, and the outputs with shape and dtype as they came."""
    probes: list[Probe] = []
    outputs: list[dict[str, Any]] = []
    for rows in BATCHES:
        rng = np.random.Generator(np.random.PCG64(rows))
        raw = {one["name"]: _values(one, rows, rng) for one in inputs}
        tensors = [_tensor(one, raw[one["name"]]) for one in inputs]
        try:
            with torch.inference_mode():
                found = _tuple(task, served(*tensors))
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            shapes = [list(tensor.shape) for tensor in tensors]
            raise InputError(
                f"{task.study.task}: the model fails on inputs of shape {shapes}: {error}"
            ) from error
        if any(one.shape[:1] != (rows,) for one in found):
            raise InputError(
                f"{task.study.task}: {rows} rows gave {len(found[0])} answers; one a row is needed"
            )
        outputs = _outputs(found, named, raw)
        answers = {str(one["name"]): tensor.numpy() for one, tensor in zip(outputs, found, strict=True)}
        probes.append(Probe(raw, answers))
    return probes, outputs


def _outputs(
    found: Sequence[Tensor], named: Sequence[Mapping[str, Any]], inputs: Arrays
) -> list[dict[str, Any]]:
    """Outputs with name, shape of one row and dtype, in order; no input has the name of one."""
    if len(named) != len(found):
        named = [{"name": "output" if len(found) == 1 else f"output_{i}"} for i in range(len(found))]
    return [
        {
            **said,
            "name": f"{said['name']}_of_model" if said["name"] in inputs else said["name"],
            "shape": list(tensor.shape[1:]),
            "dtype": str(tensor.dtype).removeprefix("torch."),
        }
        for said, tensor in zip(named, found, strict=True)
    ]


def _values(one: Mapping[str, Any], rows: int, rng: np.random.Generator) -> NDArray[Any]:
    """Raw values of one input: within and beyond the declared range, missing and unlisted ones among them."""
    shape = (rows, *one["shape"]) if one["kind"] == "tensor" else (rows, 1)
    if one["kind"] == "categorical":
        listed = [str(value) for value in one["values"]]
        choices = np.array([*listed, "", "".join(listed) + "?"])
        return choices[rng.integers(0, len(choices), shape)]
    low, high = float(one.get("min", -2.0)), float(one.get("max", 2.0))
    if np.dtype(one["dtype"]).kind in "iu":
        return rng.integers(int(low), int(high), shape, endpoint=True).astype(one["dtype"])
    reach = 0.1 * (high - low) if one["kind"] == "numeric" else 0.0
    values = rng.uniform(low - reach, high + reach, shape)
    if one.get("missing") == "median" and rows > 1:
        values[rng.random(shape) < 0.2] = np.nan
        values[-1] = np.nan
    return values.astype(one["dtype"])


def _tensor(one: Mapping[str, Any], raw: NDArray[Any]) -> Tensor:
    """A raw input as the torch model takes it."""
    if one["kind"] != "categorical":
        return torch.from_numpy(raw)
    codes = codes_of(one)
    return torch.tensor([[codes.get(str(value), UNLISTED)] for value in raw[:, 0]], dtype=torch.float32)


def _tuple(task: Task, outputs: object) -> tuple[Tensor, ...]:
    found = outputs if isinstance(outputs, tuple) else (outputs,)
    if not all(isinstance(one, Tensor) and one.dim() for one in found):
        raise InputError(
            f"{task.study.task}: a model must return a tensor with one row an example, or a tuple of such"
        )
    return found


def _program(task: Task, served: Served, inputs: Sequence[Mapping[str, Any]]) -> Any:
    """The traced and converted graph (`torch.onnx.ONNXProgram`)."""
    rng = np.random.Generator(np.random.PCG64(0))
    example = tuple(_tensor(one, _values(one, _TRACE_BATCH, rng)) for one in inputs)
    batch = torch.export.Dim("batch", min=1)
    with _quiet():
        try:
            with redirect_stderr(io.StringIO()):  # on failure torch prints all that it has traced so far
                program = torch.export.export(
                    served, example, dynamic_shapes=(tuple({0: batch} for _ in example),), strict=False
                )
        except Exception as error:  # tracing runs the task's own code, which may raise anything
            raise InputError(_reason(task, error)) from error
        try:
            return torch.onnx.export(program, dynamo=True, opset_version=OPSET, verbose=False, optimize=True)
        except torch.onnx.OnnxExporterError as error:
            reason = str(error.__cause__ or error).strip().splitlines()[0]
            raise InputError(f"{task.study.task}: ONNX cannot express the model: {reason}") from error


def _reason(task: Task, error: Exception) -> str:
    """Why a module cannot be traced, with the line of the task's code, and what to do about it."""
    text = str(error)
    if "data-dependent" in text:
        why = "what it computes depends on the values of its inputs; use torch.where in place of `if`"
    elif "Constraints violated" in text:
        lines = [line.strip() for line in text.splitlines()]
        guard = next((line for line in lines if line.startswith("- ")), lines[0]).removeprefix("- ")
        why = f"what it computes depends on the number of rows ({guard})"
    else:
        why = f"{type(error).__name__}: {text.strip().splitlines()[0] if text.strip() else 'no reason given'}"
    return f"{task.study.task}: the model cannot be exported{_line(task, error)}. Make it traceable: {why}"


def _line(task: Task, error: Exception) -> str:
    """The innermost line of the study's or a built-in task's code that the error passed through."""
    own, ours = task.study.folder.resolve(), Path(__file__).resolve().parent / "tasks"
    found, step = "", error.__traceback__
    while step is not None:
        path = Path(step.tb_frame.f_code.co_filename).resolve()
        if ours in path.parents or (own in path.parents and "site-packages" not in path.parts):
            lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
            code = lines[step.tb_lineno - 1].strip() if step.tb_lineno <= len(lines) else ""
            found = f" ({path.name}, line {step.tb_lineno}: {code})"
        step = step.tb_next
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's notes to itself: known warnings and log lines that no reader can act upon."""
    loggers = [
        logging.getLogger(name)
        for name in ("torch.onnx._internal.exporter._registration", "torch.fx.experimental.symbolic_shapes")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message=r"`isinstance\(treespec, LeafSpec\)`", category=FutureWarning
            )
            warnings.filterwarnings(
                "ignore", message="# The axis name: batch will not be used", category=UserWarning
            )
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def signature_document(traced: Traced) -> str:
    """Inputs and outputs as JSON."""
    return json.dumps({"inputs": list(traced.inputs), "outputs": list(traced.outputs)}, sort_keys=True)
