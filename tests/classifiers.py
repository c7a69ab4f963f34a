"""Small classifiers whose answers are known: model files made by hand, and an untrained network's weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from rtmdet_geo.catalog import SPEC_KEY
from rtmdet_geo.structures import ModelSpec, StretchSpec

SIDE = 32
#: Logits (classes, channels) per grey level of a channel's mean, and their constants: dark below 100, bright above.
WEIGHTS = ((-0.02, -0.02, -0.02), (0.02, 0.02, 0.02))
BIASES = (6.0, -6.0)


def classifier_spec(**changes: object) -> ModelSpec:
    """Return the spec of a classifier of dark and bright images of three bands, 32 px."""
    values: dict[str, object] = {
        "name": "greys",
        "architecture": "cspnext_test",
        "kind": "classification",
        "classes": ("dark", "bright"),
        "mean": (100.0, 100.0, 100.0),
        "std": (50.0, 50.0, 50.0),
        "tile_size": SIDE,
        "overlap": 0,
        "score_threshold": 0.0,
        "stretch": StretchSpec(kind="none"),
    }
    return ModelSpec(**(values | changes))  # type: ignore[arg-type]


def write_classifier(
    path: Path,
    spec: ModelSpec | None = None,
    *,
    weights: Sequence[Sequence[float]] = WEIGHTS,
    biases: Sequence[float] = BIASES,
    output: str = "scores",
    shape: Sequence[int | str] = ("N", 3, "H", "W"),
    has_softmax: bool = True,
    has_spec: bool = True,
) -> Path:
    """Write a model file: softmax of (each channel's mean) @ weights.T + biases; keyword arguments spoil it."""
    nodes = [
        helper.make_node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["pixels"], ["means"], axes=[2, 3], keepdims=0),
        helper.make_node("Gemm", ["means", "weights", "biases"], ["logits"], transB=1),
        helper.make_node("Softmax" if has_softmax else "Identity", ["logits"], [output]),
    ]
    graph = helper.make_graph(
        nodes,
        "greys",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, list(shape))],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["N", len(biases)])],
        [
            numpy_helper.from_array(np.array(weights, np.float32), "weights"),
            numpy_helper.from_array(np.array(biases, np.float32), "biases"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    if has_spec:
        helper.set_model_props(model, {SPEC_KEY: (spec or classifier_spec()).model_dump_json()})
    onnx.save(model, path)
    return path


def expected_scores(
    images: NDArray[np.uint8],
    weights: Sequence[Sequence[float]] = WEIGHTS,
    biases: Sequence[float] = BIASES,
) -> NDArray[np.float64]:
    """Return what the file of :func:`write_classifier` must return for uint8 (N, C, H, W)."""
    logits = images.astype(np.float64).mean(axis=(2, 3)) @ np.array(weights).T + np.array(biases)
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def untrained_network(num_classes: int, in_channels: int = 3) -> Any:
    """Return a cspnext_test in evaluation mode with statistics of real activations, whose logits vary by about 1."""
    import torch
    from torch import nn

    from rtmdet_geo.models import cspnext_test

    torch.manual_seed(0)
    network = cspnext_test(num_classes=num_classes, in_channels=in_channels)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # cumulative average
    images = torch.randn(8, in_channels, 64, 64)
    with torch.no_grad():
        network.train()(images)
        logits = network.eval()(images)
        network.head.fc.weight /= logits.std()
    return network


def write_network(path: Path, spec: ModelSpec | None = None) -> Path:
    """Write the weights of :func:`untrained_network`."""
    from rtmdet_geo.models.weights import save_weights

    spec = spec or classifier_spec()
    save_weights(untrained_network(len(spec.classes), len(spec.bands)), path, spec)
    return path
