"""Static int8 of an exported network: ranges of its activations, and the graph with 8-bit weights and activations.

Ranges are the smallest and largest number of each tensor over calibration rows. They merge by minimum and maximum, so
the ranges of several sites, merged, are those of their rows together. Weights are symmetric int8, one scale a channel;
activations are uint8, one scale a tensor (Jacob et al. 2018, https://arxiv.org/abs/1712.05877). Quantisation stands in
the graph as pairs of QuantizeLinear and DequantizeLinear (QDQ), which onnxruntime fuses with what is between them.

It needs the packages `onnx` and `onnxruntime` where it is made, and onnxruntime alone where it is served.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from consortium.protocol.errors import ConsortiumError, InputError

OPERATORS = ("Conv", "Gemm", "MatMul")
"""What is computed in 8 bits; preprocessing and the output's probabilities stay as they are."""
LARGEST_LOSS = 0.01
"""Share of the rows that the 8-bit graph may get right less often than the graph that it is made of."""
LEAST_SHRINKING = 3.0
"""How many times smaller than that graph it must be."""

_LARGEST = float(np.finfo(np.float32).max)

Ranges = dict[str, tuple[float, float]]
"""Smallest and largest number by tensor."""


def prepared(graph: bytes) -> Any:
    """The graph as it is calibrated and quantised: its constants folded, its shapes known. The same for the same graph.

    Raises:
        InputError: it has nothing that is computed in 8 bits.
    """
    import onnx
    from onnxruntime.quantization import shape_inference

    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder, "given.onnx"), Path(folder, "made.onnx")
        given.write_bytes(graph)
        shape_inference.quant_pre_process(given, made, skip_symbolic_shape=True)
        model = onnx.load(made)
    if not any(node.op_type in OPERATORS for node in model.graph.node):
        raise InputError(f"the graph has none of {', '.join(OPERATORS)}; there is nothing to quantise")
    return model


def ranges(graph: bytes, batches: Iterable[Mapping[str, NDArray[Any]]]) -> Ranges:
    """The range of every activation that quantisation needs, over batches of the graph's inputs.

    Raises:
        InputError: there is no row, or an activation is not finite.
    """
    from onnxruntime.quantization import CalibrationDataReader
    from onnxruntime.quantization.calibrate import CalibrationMethod, create_calibrator

    class Reader(CalibrationDataReader):  # type: ignore[misc] # no types
        def __init__(self) -> None:
            self._batches = iter(batches)

        def get_next(self) -> Mapping[str, NDArray[Any]] | None:
            return next(self._batches, None)

    import onnx

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, "prepared.onnx")
        onnx.save(prepared(graph), place)
        calibrator = create_calibrator(
            place, list(OPERATORS), str(Path(folder, "augmented.onnx")), CalibrationMethod.MinMax,
            providers=["CPUExecutionProvider"],
        )  # fmt: skip
        calibrator.collect_data(Reader())
        try:
            found = calibrator.compute_data()
        except ValueError as error:
            raise InputError("there is no row to find ranges by; give some") from error
    lows_highs = {name: one.range_value for name, one in found.items()}
    return checked({name: (float(np.min(a)), float(np.max(b))) for name, (a, b) in lows_highs.items()})


def checked(found: Ranges) -> Ranges:
    """The ranges, if each is of finite numbers of 32 bits and runs upwards.

    Raises:
        InputError: naming the tensor that is not so.
    """
    for name, (low, high) in found.items():
        if not -_LARGEST <= low <= high <= _LARGEST:
            raise InputError(
                f"ranges: tensor '{name}' goes from {low} to {high}; finite numbers, upwards, are right"
            )
    return found


def merged(several: Sequence[Ranges]) -> Ranges:
    """The ranges of all together.

    Raises:
        InputError: they are not of the same tensors, so not of the same graph.
    """
    first, *others = several
    if any(one.keys() != first.keys() for one in others):
        raise InputError("ranges: they are of different graphs; make all of them over the same bundle")
    return {
        name: (min(one[name][0] for one in several), max(one[name][1] for one in several)) for name in first
    }


def quantized(graph: bytes, found: Ranges) -> bytes:
    """The graph in 8 bits; the same bytes for the same graph and ranges.

    Raises:
        InputError: the ranges are another graph's.
        ConsortiumError: onnxruntime cannot quantise it.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantType
    from onnxruntime.quantization.calibrate import TensorData, TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    model = prepared(graph)
    labels = {one.key: one.value for one in model.metadata_props}
    limits = {
        name: TensorData(lowest=np.float32(low), highest=np.float32(high))
        for name, (low, high) in found.items()
    }
    try:
        maker = QDQQuantizer(
            model,
            per_channel=True,
            reduce_range=False,
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QUInt8,
            tensors_range=TensorsData(CalibrationMethod.MinMax, limits),
            nodes_to_quantize=[],
            nodes_to_exclude=[],
            op_types_to_quantize=list(OPERATORS),
            extra_options={},
        )
        maker.quantize_model()
        made = maker.model.model
    except (ValueError, KeyError) as error:
        raise ConsortiumError(
            f"onnxruntime cannot quantise the graph with these ranges ({str(error).splitlines()[0][:200]}); make them "
            "over this very bundle"
        ) from error
    del made.metadata_props[:]
    for key, value in sorted(labels.items()):
        made.metadata_props.add(key=key, value=value)
    made.graph.ClearField("value_info")  # shapes in between, which nobody needs to run it
    content: bytes = made.SerializeToString(deterministic=True)
    return content
