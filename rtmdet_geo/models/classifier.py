"""CSPNeXt as a classifier of images: backbone, global average pooling, one linear layer.

Paper: https://arxiv.org/abs/2212.07784 (section 4.1, ImageNet pretraining). Original: mmpretrain's ``ImageClassifier``
with ``GlobalAveragePooling`` and ``LinearClsHead`` (Apache-2.0), whose parameter names these are; the code is our own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rtmdet_geo.models.cspnext import CSPNeXt
from rtmdet_geo.models.heads import at_least_float32
from rtmdet_geo.models.rtmdet import check_images, find_builder, make_backbone


class LinearHead(nn.Module):
    """Average over the image, then linear."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(in_channels, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        """Map (N, in_channels, h, w) to logits (N, num_classes)."""
        return self.fc(features.mean(dim=(2, 3)))


class CSPNeXtClassifier(nn.Module):
    """Backbone and linear head.

    Args:
        backbone: its coarsest level is classified.
        num_classes: number of logits.
        architecture: name of the builder, kept for messages and files.
    """

    kind: ClassVar[Literal["classification"]] = "classification"

    def __init__(self, backbone: CSPNeXt, *, num_classes: int, architecture: str) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = LinearHead(backbone.out_channels[-1], num_classes)
        self.architecture = architecture

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self.head.fc.out_features

    @property
    def in_channels(self) -> int:
        """Channels of the images."""
        return self.backbone.in_channels

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, num_classes), at least float32.

        Args:
            images: (N, in_channels, H, W) floating, normalised; any H and W (published: 224 px).

        Raises:
            TypeError: images are not floating.
            ValueError: shape or channels do not fit.
        """
        check_images(images, self.architecture, self.in_channels)
        return at_least_float32(self.head(self.backbone(images)[-1]))


class ClassificationGraph(nn.Module):
    """What a model file of a classifier holds: uint8 pixels in, probabilities out; normalisation and softmax inside.

    Args:
        model: images (N, C, H, W) to logits (N, num_classes), such as :class:`CSPNeXtClassifier`.
        mean: per channel, on the uint8 scale.
        std: per channel, on the uint8 scale.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(tuple(mean), dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(tuple(std), dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Map uint8 images (N, C, H, W) to ``scores`` (N, num_classes), which sum to 1 along each row."""
        logits: Tensor = self.model((images.to(self.mean.dtype) - self.mean) / self.std)
        return logits.softmax(dim=1)

    def predict(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Run the graph on numpy's pixels, uint8 (N, C, H, W), where its parameters are; return its scores."""
        with torch.inference_mode():
            return self(torch.from_numpy(np.ascontiguousarray(images)).to(self.mean.device)).cpu().numpy()


def _build(architecture: str, num_classes: int, in_channels: int, weights: str | Path | None) -> CSPNeXtClassifier:
    _, backbone = make_backbone(architecture, num_classes, in_channels)
    model = CSPNeXtClassifier(backbone, num_classes=num_classes, architecture=architecture)
    nn.init.normal_(model.head.fc.weight, std=0.01)  # mmpretrain's LinearClsHead
    nn.init.zeros_(model.head.fc.bias)
    if weights is not None:
        from rtmdet_geo.models.weights import load_into

        load_into(model, weights)
    return model


def cspnext_test(
    *, num_classes: int = 1000, in_channels: int = 3, weights: str | Path | None = None
) -> CSPNeXtClassifier:
    """Build the smallest CSPNeXt classifier (width 1/8), for tests only; see :func:`cspnext_tiny`."""
    return _build("cspnext_test", num_classes, in_channels, weights)


def cspnext_tiny(
    *, num_classes: int = 1000, in_channels: int = 3, weights: str | Path | None = None
) -> CSPNeXtClassifier:
    """Build the CSPNeXt-tiny classifier.

    Args:
        num_classes: number of classes.
        in_channels: channels of the images.
        weights: name in the catalogue, or path of a safetensors or .pth file, loaded strictly; None initialises for
            training from scratch.

    Returns:
        The model, in training mode, float32, on the CPU.

    Raises:
        ValueError: ``num_classes`` or ``in_channels`` below 1.
        WeightsError: the file cannot be found or read, or its keys do not fit the network.
    """
    return _build("cspnext_tiny", num_classes, in_channels, weights)


def cspnext_s(*, num_classes: int = 1000, in_channels: int = 3, weights: str | Path | None = None) -> CSPNeXtClassifier:
    """Build the CSPNeXt-s classifier; see :func:`cspnext_tiny`."""
    return _build("cspnext_s", num_classes, in_channels, weights)


def cspnext_m(*, num_classes: int = 1000, in_channels: int = 3, weights: str | Path | None = None) -> CSPNeXtClassifier:
    """Build the CSPNeXt-m classifier; see :func:`cspnext_tiny`."""
    return _build("cspnext_m", num_classes, in_channels, weights)


def cspnext_l(*, num_classes: int = 1000, in_channels: int = 3, weights: str | Path | None = None) -> CSPNeXtClassifier:
    """Build the CSPNeXt-l classifier; see :func:`cspnext_tiny`."""
    return _build("cspnext_l", num_classes, in_channels, weights)


def cspnext_x(*, num_classes: int = 1000, in_channels: int = 3, weights: str | Path | None = None) -> CSPNeXtClassifier:
    """Build the CSPNeXt-x classifier; see :func:`cspnext_tiny`."""
    return _build("cspnext_x", num_classes, in_channels, weights)


CLASSIFIERS: dict[str, Callable[..., CSPNeXtClassifier]] = {
    "cspnext_test": cspnext_test,
    "cspnext_tiny": cspnext_tiny,
    "cspnext_s": cspnext_s,
    "cspnext_m": cspnext_m,
    "cspnext_l": cspnext_l,
    "cspnext_x": cspnext_x,
}


def get_classifier(name: str, **arguments: Any) -> CSPNeXtClassifier:
    """Build a classifier by name.

    Args:
        name: key of :data:`CLASSIFIERS`.
        arguments: of the builder.

    Raises:
        UnknownModelError: no such name; the message lists near ones.
    """
    return find_builder(name, CLASSIFIERS)(**arguments)
