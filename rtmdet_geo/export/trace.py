"""torch -> ONNX: the network with its batch norms folded, traced once for any batch, height and width.

The graph is :class:`rtmdet_geo.models.decode.DetectionGraph`, or :class:`rtmdet_geo.models.classifier.
ClassificationGraph`. What is rewritten afterwards: :mod:`rtmdet_geo.export.graph`.
"""

from __future__ import annotations

import copy
import io
import os
import warnings
from typing import NamedTuple

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from rtmdet_geo import __version__
from rtmdet_geo.backends.contract import OUTPUTS
from rtmdet_geo.errors import ConfigError
from rtmdet_geo.export.check import Outputs, Pixels
from rtmdet_geo.export.graph import (
    HalfWeight,
    declare_outputs,
    fix_size,
    fold_weights,
    make_top_k_dynamic,
    store_half,
)
from rtmdet_geo.export.half import FP16_MAX
from rtmdet_geo.export.operators import OPSET
from rtmdet_geo.models.blocks import ConvModule
from rtmdet_geo.models.classifier import ClassificationGraph
from rtmdet_geo.models.decode import DetectionGraph
from rtmdet_geo.models.identify import load_network
from rtmdet_geo.models.weights import fuse_batch_norm, weights_sha256
from rtmdet_geo.structures import ModelSpec
from rtmdet_geo.variants import MAX_CANDIDATES

#: Side in px of the images that a graph is traced with; the graph takes any.
_TRACED_SIDE = 128
#: What the names of a network's parameters begin with in the graph.
_PREFIX = "graph.model."


class Traced(NamedTuple):
    """A network as a graph, and as torch runs it.

    Attributes:
        proto: fp32 graph that takes any batch, height and width, without metadata.
        spec: what it says of itself; the weights' SHA-256 and the exporter are filled in.
        reference: torch's answer to the same images.
    """

    proto: onnx.ModelProto
    spec: ModelSpec
    reference: TorchReference


class TorchReference:
    """The torch graph as a function of numpy's pixels."""

    name = "torch"

    def __init__(self, graph: nn.Module, spec: ModelSpec) -> None:
        """Remember the graph."""
        self.graph = graph
        self._names = list(OUTPUTS[spec.kind])

    def __call__(self, images: Pixels) -> Outputs:
        """Return the outputs by name, fp32, for uint8 (N, C, H, W)."""
        with torch.inference_mode():
            outputs: Tensor | tuple[Tensor, ...] = self.graph(torch.from_numpy(np.ascontiguousarray(images)))
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        return {name: output.float().numpy() for name, output in zip(self._names, outputs, strict=True)}


def trace_model(
    model: nn.Module | str | os.PathLike[str], spec: ModelSpec | None, *, half_weights: bool = False
) -> Traced:
    """Load a network and trace it.

    Args:
        model: network, or weights: see :func:`rtmdet_geo.models.identify.load_network`.
        spec: what the graph says of itself; needed with a network, replaces the file's own with weights.
        half_weights: round weights to fp16 and store them so, with the factors of their batch norms in fp32.

    Raises:
        ConfigError: the spec is missing or contradicts the network; a weight is beyond fp16's range.
        WeightsError: the weights file is unreadable or does not fit.
    """
    network, spec = _load(model, spec)
    check_spec(network, spec)
    spec = spec.model_copy(
        update={
            "weights_sha256": weights_sha256(network.state_dict()),
            "exporter": f"rtmdet-geo {__version__}, torch {torch.__version__}",
            "precision": "fp32",
            "differences": {},
        }
    )
    network = copy.deepcopy(network).float().cpu().eval()
    weights = _round_to_half(network) if half_weights else {}
    graph = make_graph(fuse_batch_norm(network), spec)
    proto = fold_weights(_trace(graph, spec))
    declare_outputs(proto, _output_shapes(spec))
    if spec.kind != "classification":
        make_top_k_dynamic(proto, MAX_CANDIDATES[spec.kind])
    proto = fix_size(proto)
    store_half(proto, {f"{_PREFIX}{name}": weight for name, weight in weights.items()})
    return Traced(proto, spec, TorchReference(graph, spec))


def make_graph(network: nn.Module, spec: ModelSpec) -> nn.Module:
    """Return what a model file holds of a network, in torch."""
    graph_type = ClassificationGraph if spec.kind == "classification" else DetectionGraph
    return graph_type(network, spec.mean, spec.std).eval()


def _load(model: nn.Module | str | os.PathLike[str], spec: ModelSpec | None) -> tuple[nn.Module, ModelSpec]:
    """Return the network and its spec."""
    if isinstance(model, nn.Module):
        if spec is None:
            raise ConfigError("export_model needs spec= when it gets a network instead of a weights file")
        return model, spec
    network, own_spec = load_network(model)
    return network, spec if spec is not None else own_spec


def check_spec(network: nn.Module, spec: ModelSpec) -> None:
    """Refuse a spec that is not the network's.

    Raises:
        ConfigError: kind, number of classes or number of bands differ.
    """
    kind = getattr(network, "kind", spec.kind)
    if kind != spec.kind:
        raise ConfigError(
            f"the network is of kind {kind!r}, its spec says {spec.kind!r}; pass the spec it was built by"
        )
    for what, built, stated in (
        ("classes", getattr(network, "num_classes", len(spec.classes)), len(spec.classes)),
        ("bands", getattr(network, "in_channels", len(spec.bands)), len(spec.bands)),
    ):
        if built != stated:
            raise ConfigError(f"the network has {built} {what}, its spec names {stated}; pass the spec it was built by")


def _round_to_half(network: nn.Module) -> dict[str, HalfWeight]:
    """Round weights to fp16 in place, so that torch computes what the file will hold, and return them as stored.

    Weights are rounded before norms are folded into them: those of half-precision weight files are then exact.

    Returns:
        By the names of the weights in the network whose norms are folded; a shared convolution has several.

    Raises:
        ConfigError: a weight is beyond fp16's range.
    """
    rounded: dict[str, HalfWeight] = {}
    sources: dict[int, str] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        if parameter.ndim < 2:
            continue
        if parameter.abs().max() > FP16_MAX:
            raise ConfigError(f"weight {name!r} exceeds the range of fp16; export without half weights")
        parameter.data = parameter.data.half().float()
        source = sources.setdefault(id(parameter), f"{_PREFIX}{name}")
        rounded[name] = HalfWeight(source, parameter.detach().half().numpy(), None)
    for name, module in network.named_modules(remove_duplicate=False):
        if isinstance(module, ConvModule) and isinstance(module.bn, nn.BatchNorm2d):
            norm, weight = module.bn, rounded[f"{name}.conv.weight"]
            variances = norm.running_var
            if variances is not None:
                factors = norm.weight.detach().double() / torch.sqrt(variances.double() + norm.eps)
                rounded[f"{name}.conv.weight"] = weight._replace(factors=factors.float().numpy())
    return rounded


def _trace(graph: nn.Module, spec: ModelSpec) -> onnx.ModelProto:
    """Return the plain ONNX graph; tracing by TorchScript, whose graphs TensorRT and opset 17 readers take."""
    outputs = _output_shapes(spec)
    axes = {"images": {0: "batch", 2: "height", 3: "width"}}
    for name, shape in outputs.items():
        axes[name] = {axis: size for axis, size in enumerate(shape) if isinstance(size, str)}
    side = _TRACED_SIDE
    images = torch.zeros((2, len(spec.bands), side, side), dtype=torch.uint8)  # batch 1 would be taken for broadcasting
    file = io.BytesIO()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer's remarks; the comparison with torch is what decides
        torch.onnx.export(
            _FloatLabels(graph),
            (images,),
            file,
            opset_version=OPSET,
            input_names=["images"],
            output_names=list(outputs),
            dynamic_axes=axes,
            dynamo=False,
        )
    return onnx.load_model_from_string(file.getvalue())


def _output_shapes(spec: ModelSpec) -> dict[str, list[int | str]]:
    """Return the outputs' shapes: numbers, or names where they depend on the images."""
    known: dict[int | str, int | str] = {"K": "rows", "H/8": "feature_height", "W/8": "feature_width"}
    known["classes"] = len(spec.classes)
    return {name: ["batch", *(known.get(size, size) for size in sizes)] for name, sizes in OUTPUTS[spec.kind].items()}


class _FloatLabels(nn.Module):
    """A graph whose whole-number outputs, the labels, come out as fp32 like all others (the model-file contract)."""

    def __init__(self, graph: nn.Module) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        outputs = self.graph(images)
        return tuple(output.float() for output in ((outputs,) if isinstance(outputs, Tensor) else outputs))
