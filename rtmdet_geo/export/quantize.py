"""Post-training int8: a model file whose convolutions compute with whole numbers, calibrated on tiles. No torch.

Static, by :mod:`onnxruntime.quantization`: weights are int8, symmetric, with a scale for each output channel;
activations are uint8, with the range that the calibration tiles fill. The file holds QuantizeLinear and
DequantizeLinear pairs (QDQ), which onnxruntime and OpenVINO turn into int8 kernels. int8 is the trunk: everything from
the first convolution to those before the last ones. fp32 stay normalisation, channel attention (a mean over a whole
map, and the gate made of it), the last convolutions of each head, and all after them (exp, decoding, top-K).

Ranges go from the lowest to the highest value seen (percentiles and entropy gained nothing), activations are uint8
(int8 ones took onnxruntime more than three times as long on x86). Weights have 7 bits of the 8: x86 processors without
VNNI add two products in 16 bits, which 8 would overflow, so that a file's answer would depend on the processor. What
int8 gains and costs is in ``tests/benchmarks/results/int8.csv``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.backends import require_package
from rtmdet_geo.backends.onnxrt import open_model_file
from rtmdet_geo.errors import ConfigError, OutputError
from rtmdet_geo.outputs import check_folder, check_not_input, staged_output
from rtmdet_geo.structures import ModelSpec

if TYPE_CHECKING:
    import onnx

#: Operators that int8 kernels exist for, of those between two convolutions.
OPERATORS = ("Add", "Concat", "Conv", "MaxPool", "Mul", "Resize", "Sigmoid")


def quantize_model(
    model_file: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    calibration: Iterable[NDArray[np.uint8]],
    overwrite: bool = False,
) -> ModelSpec:
    """Write an int8 model file from a fp32 one.

    Args:
        model_file: ``.onnx`` file in fp32 of any kind; weights may be stored as fp16.
        out: file to write; written under a temporary name and renamed when it is whole.
        calibration: batches of tiles, uint8 (N, C, H, W), channels as ``spec.bands``, as the engine would get them: of
            the scenes that the model is for, a dozen or more that show what it looks for. Taken one at a time, run
            image by image and forgotten.
        overwrite: replace an existing file.

    Returns:
        The ModelSpec as stored, ``precision`` "int8".

    Raises:
        ModelFileError: ``model_file`` is missing, corrupt or foreign.
        ConfigError: it is fp16 or int8 already, there are no calibration tiles, or one has another dtype or shape.
        OutputError: ``out`` exists or cannot be written, or is ``model_file``.
        MissingDependencyError: onnx is not installed.

    Example:
        >>> quantize_model("ships.onnx", "ships_int8.onnx", calibration=tiles).precision  # doctest: +SKIP
        'int8'
    """
    onnx = require_package("onnx", extra="export")
    onnxruntime = require_package("onnxruntime")
    from rtmdet_geo.export import graph

    source, target = Path(model_file), Path(out)
    if target.suffix.lower() != ".onnx":
        raise OutputError(f"{str(target)!r} must end in .onnx")
    check_not_input(target, source)
    check_folder(target, overwrite)
    session, spec = open_model_file(source)
    proto = graph.fold_weights(onnx.load(source))
    _check_is_fp32(proto, spec, source)
    tiles = _Tiles(calibration, spec, session.get_inputs()[0].shape[2:])
    spec = spec.model_copy(
        update={
            "precision": "int8",
            "differences": {},
            "exporter": f"{spec.exporter}, int8 by onnxruntime {onnxruntime.__version__}".removeprefix(", "),
        }
    )
    with staged_output(target) as staged:
        _quantize(proto, staged, tiles)
        proto = onnx.load(staged)
        del proto.graph.value_info[:]
        graph.write_metadata(proto, spec)
        onnx.checker.check_model(proto, full_check=True)
        onnx.save(proto, staged)
        open_model_file(staged)  # still by the contract, and onnxruntime has kernels for it
    return spec


def _check_is_fp32(proto: onnx.ModelProto, spec: ModelSpec, path: Path) -> None:
    operators = {node.op_type for node in proto.graph.node}
    precision = "int8" if operators & {"QuantizeLinear", "DequantizeLinear"} else spec.precision
    if precision != "fp32":
        raise ConfigError(
            f"{str(path)!r} is {precision} already; int8 is made from a fp32 model file: export the weights again "
            "with `rtmdet-geo export`"
        )
    if "Conv" not in operators:
        raise ConfigError(f"{str(path)!r} holds no convolution, so int8 would gain nothing; keep it fp32")


def _quantize(proto: onnx.ModelProto, out: Path, tiles: _Tiles) -> None:
    """Run the tiles and write the graph with its trunk in int8; nothing but each tensor's range is kept of a tile."""
    from onnx import helper
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    # Or it advises to fold, which is done.
    helper.set_model_props(proto, {"onnx.quant.pre_process": "onnxruntime.quant"})
    quantize_static(
        proto,
        out,
        tiles,
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=list(OPERATORS),
        nodes_to_quantize=find_trunk(proto.graph),
        per_channel=True,
        reduce_range=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod.MinMax,
    )


def find_trunk(graph: onnx.GraphProto) -> list[str]:
    """Return the names of the nodes that are to be int8.

    They lie between two convolutions, or are one that another follows. What is made of nothing but means over whole
    maps (channel attention) is left out.
    """
    below: set[str] = set()  # tensors that a convolution has gone into
    means: set[str] = set()
    stored = {tensor.name for tensor in graph.initializer}
    after = set()
    for index, node in enumerate(graph.node):
        inputs = {name for name in node.input if name not in stored}
        if node.op_type == "GlobalAveragePool" or (inputs and inputs <= means):
            means.update(node.output)
        elif node.op_type == "Conv" or inputs & below:
            below.update(node.output)
            after.add(index)
    above: set[str] = set()  # tensors that go into a convolution
    names = []
    for index, node in reversed(list(enumerate(graph.node))):
        if above.intersection(node.output):
            if index in after and node.op_type in OPERATORS:
                names.append(node.name)
            above.update(node.input)
        elif node.op_type == "Conv":
            above.update(node.input)
    return names[::-1]


class _Tiles:
    """Calibration tiles as onnxruntime asks for them, one image at a time; the first one is looked at here already.

    Args:
        batches: uint8 (N, C, H, W) each.
        spec: what the model file says of itself.
        sides: height and width in px that its input demands; what is no number is open.

    Raises:
        ConfigError: there is none, or it does not fit the model; later ones raise it when their turn comes.
    """

    def __init__(self, batches: Iterable[NDArray[np.uint8]], spec: ModelSpec, sides: Sequence[Any]) -> None:
        wanted = [spec.tile_size] * 2 if spec.kind == "classification" else sides
        self._sides = [side if isinstance(side, int) else None for side in wanted]
        self._spec = spec
        self._images = self._split(batches)
        self._next = next(self._images, None)
        if self._next is None:
            raise ConfigError("there are no calibration tiles; give a dozen or more of scenes that the model is for")

    def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
        """Return the next image as the graph's input; None: there are no more."""
        image = self._next if self._next is not None else next(self._images, None)
        self._next = None
        return None if image is None else {"images": image}

    def _split(self, batches: Iterable[NDArray[np.uint8]]) -> Iterator[NDArray[np.uint8]]:
        for batch in batches:
            self._check(batch)
            for index in range(len(batch)):
                yield np.ascontiguousarray(batch[index : index + 1])

    def _check(self, batch: NDArray[np.uint8]) -> None:
        bands, multiple = len(self._spec.bands), self._spec.stride_multiple
        fits = batch.dtype == np.uint8 and batch.ndim == 4 and batch.shape[1] == bands
        for size, side in zip(batch.shape[2:], self._sides, strict=False):
            fits &= size == side if side else size > 0 and size % multiple == 0
        if not fits:
            shape = ", ".join(str(side) if side else name for side, name in zip(self._sides, "HW", strict=True))
            also = "" if all(self._sides) else f", sides multiples of {multiple} px"
            raise ConfigError(
                f"calibration tiles must be uint8 (N, {bands}, {shape}){also}, not {batch.dtype} {batch.shape}; "
                "cut them as detection would"
            )
