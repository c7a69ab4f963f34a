"""RTMDet networks and their builders.

Paper: https://arxiv.org/abs/2212.07784. Original repositories: open-mmlab/mmdetection 3.x and open-mmlab/mmrotate 1.x
(Apache-2.0). Sizes and parameter names are theirs, so that published checkpoints load strictly; the code is our own.
What we changed: images may have any number of channels, and there are two sizes of our own (nano, test).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rtmdet_geo.errors import UnknownModelError
from rtmdet_geo.models.cspnext import CSPNeXt
from rtmdet_geo.models.heads import RotatedOutputs, RotatedSeparatedBNHead
from rtmdet_geo.models.pafpn import CSPNeXtPAFPN

#: Sides of the input must be multiples of this many px.
STRIDE_MULTIPLE = 32


@dataclass(frozen=True, slots=True)
class ModelSize:
    """What distinguishes tiny from x (see the table in the published configurations).

    Attributes:
        deepen: factor on the backbone's blocks.
        widen: factor on the backbone's channels.
        channels: channels of neck outputs and head.
        num_neck_blocks: CSPNeXt blocks in each of the neck's layers.
        exp_on_reg: distances go through exp before they are multiplied by the stride.
    """

    deepen: float
    widen: float
    channels: int
    num_neck_blocks: int
    exp_on_reg: bool


SIZES: dict[str, ModelSize] = {
    "test": ModelSize(0.167, 0.125, 32, 1, False),  # ours, for tests
    "nano": ModelSize(0.167, 0.25, 64, 1, False),  # ours, for processors without accelerator
    "tiny": ModelSize(0.167, 0.375, 96, 1, False),
    "s": ModelSize(0.33, 0.5, 128, 1, False),
    "m": ModelSize(0.67, 0.75, 192, 2, True),
    "l": ModelSize(1.0, 1.0, 256, 3, True),
    "x": ModelSize(1.33, 1.25, 320, 4, True),
}


class RTMDet(nn.Module):
    """Backbone, neck and head.

    Args:
        backbone: gives features at strides 8, 16, 32.
        neck: mixes them.
        bbox_head: turns them into outputs.
        architecture: name of the builder, kept for messages and files.
    """

    def __init__(
        self, backbone: CSPNeXt, neck: CSPNeXtPAFPN, bbox_head: RotatedSeparatedBNHead, *, architecture: str
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = neck
        self.bbox_head = bbox_head
        self.architecture = architecture

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self.bbox_head.num_classes

    @property
    def in_channels(self) -> int:
        """Channels of the images."""
        return self.backbone.in_channels

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels per cell of each output level."""
        return self.bbox_head.strides

    def forward(self, images: Tensor) -> RotatedOutputs:
        """Return raw outputs; decoding is :mod:`rtmdet_geo.models.decode`'s.

        Args:
            images: (N, in_channels, H, W) floating, normalised; H and W multiples of 32 px.

        Raises:
            TypeError: images are not floating.
            ValueError: shape, channels or sides do not fit.
        """
        if not (torch.jit.is_tracing() or torch.compiler.is_compiling()):
            self._check(images)
        return self.bbox_head(self.neck(self.backbone(images)))

    def _check(self, images: Tensor) -> None:
        if not images.is_floating_point():
            raise TypeError(f"{self.architecture} takes floating images, got {images.dtype}; normalise them first")
        if images.ndim != 4 or 0 in images.shape:
            raise ValueError(f"{self.architecture} takes images (N, C, H, W), got shape {tuple(images.shape)!r}")
        if images.shape[1] != self.in_channels:
            raise ValueError(
                f"{self.architecture} was built for {self.in_channels} channels, got {images.shape[1]};"
                " choose other bands or build it with in_channels="
            )
        if images.shape[2] % STRIDE_MULTIPLE or images.shape[3] % STRIDE_MULTIPLE:
            raise ValueError(
                f"sides must be multiples of {STRIDE_MULTIPLE} px, got (H, W) {tuple(images.shape[2:])!r}; pad first"
            )


def _rotated(
    architecture: str, size: ModelSize, num_classes: int, in_channels: int, weights: str | Path | None
) -> RTMDet:
    if num_classes < 1 or in_channels < 1:
        raise ValueError(
            f"{architecture} needs num_classes and in_channels of at least 1, got {num_classes!r} and {in_channels!r}"
        )
    backbone = CSPNeXt(deepen=size.deepen, widen=size.widen, in_channels=in_channels)
    neck = CSPNeXtPAFPN(in_channels=backbone.out_channels, out_channels=size.channels, num_blocks=size.num_neck_blocks)
    head = RotatedSeparatedBNHead(
        num_classes=num_classes,
        in_channels=size.channels,
        feat_channels=size.channels,
        exp_on_reg=size.exp_on_reg,
    )
    # Backbone and neck keep torch's own convolution initialisation: kaiming uniform with a = sqrt(5), fan in, which is
    # also the one of mmdet's CSPNeXt and CSPNeXtPAFPN.
    head.init_weights()
    model = RTMDet(backbone, neck, head, architecture=architecture)
    if weights is not None:
        from rtmdet_geo.models.weights import load_state, load_weights

        load_state(model, load_weights(weights)[0], source=weights)
    return model


def rtmdet_r_test(*, num_classes: int = 15, in_channels: int = 3, weights: str | Path | None = None) -> RTMDet:
    """Build the smallest rotated RTMDet (width 1/8), for tests only; see :func:`rtmdet_r_tiny`."""
    return _rotated("rtmdet_r_test", SIZES["test"], num_classes, in_channels, weights)


def rtmdet_r_nano(*, num_classes: int = 15, in_channels: int = 3, weights: str | Path | None = None) -> RTMDet:
    """Build a rotated RTMDet below tiny (width 1/4), ours, not published; see :func:`rtmdet_r_tiny`."""
    return _rotated("rtmdet_r_nano", SIZES["nano"], num_classes, in_channels, weights)


def rtmdet_r_tiny(*, num_classes: int = 15, in_channels: int = 3, weights: str | Path | None = None) -> RTMDet:
    """Build rotated RTMDet-tiny.

    Args:
        num_classes: number of classes.
        in_channels: channels of the images.
        weights: path of one of our safetensors files, loaded strictly; None initialises for training from scratch.

    Returns:
        The model, in training mode, float32, on the CPU.

    Raises:
        ValueError: ``num_classes`` or ``in_channels`` below 1.
        WeightsError: the file is unreadable, or its keys do not fit the network.
    """
    return _rotated("rtmdet_r_tiny", SIZES["tiny"], num_classes, in_channels, weights)


def rtmdet_r_s(*, num_classes: int = 15, in_channels: int = 3, weights: str | Path | None = None) -> RTMDet:
    """Build rotated RTMDet-s; see :func:`rtmdet_r_tiny`."""
    return _rotated("rtmdet_r_s", SIZES["s"], num_classes, in_channels, weights)


def rtmdet_r_m(*, num_classes: int = 15, in_channels: int = 3, weights: str | Path | None = None) -> RTMDet:
    """Build rotated RTMDet-m; see :func:`rtmdet_r_tiny`."""
    return _rotated("rtmdet_r_m", SIZES["m"], num_classes, in_channels, weights)


def rtmdet_r_l(*, num_classes: int = 15, in_channels: int = 3, weights: str | Path | None = None) -> RTMDet:
    """Build rotated RTMDet-l; see :func:`rtmdet_r_tiny`."""
    return _rotated("rtmdet_r_l", SIZES["l"], num_classes, in_channels, weights)


BUILDERS: dict[str, Callable[..., RTMDet]] = {
    "rtmdet_r_test": rtmdet_r_test,
    "rtmdet_r_nano": rtmdet_r_nano,
    "rtmdet_r_tiny": rtmdet_r_tiny,
    "rtmdet_r_s": rtmdet_r_s,
    "rtmdet_r_m": rtmdet_r_m,
    "rtmdet_r_l": rtmdet_r_l,
}


def get_model(name: str, **arguments: Any) -> RTMDet:
    """Build a model by name.

    Args:
        name: key of :data:`BUILDERS`.
        arguments: of the builder.

    Raises:
        UnknownModelError: no such name; the message lists near ones.
    """
    builder = BUILDERS.get(name)
    if builder is None:
        near = difflib.get_close_matches(name, BUILDERS, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(BUILDERS)}"
        raise UnknownModelError(f"unknown model {name!r}; {hint}")
    return builder(**arguments)
