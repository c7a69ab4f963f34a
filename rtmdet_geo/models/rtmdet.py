"""RTMDet networks and their builders.

Paper: https://arxiv.org/abs/2212.07784. Original repositories: open-mmlab/mmdetection 3.x and open-mmlab/mmrotate 1.x
(Apache-2.0). Sizes and parameter names are theirs, so that published checkpoints load strictly; the code is our own.
What we changed: images may have any number of channels, and there are two sizes of our own (nano, test).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rtmdet_geo.errors import UnknownModelError
from rtmdet_geo.models.cspnext import CSPNeXt
from rtmdet_geo.models.heads import (
    HorizontalOutputs,
    HorizontalSeparatedBNHead,
    InstanceOutputs,
    RotatedOutputs,
    RotatedSeparatedBNHead,
    SeparatedBNHead,
)
from rtmdet_geo.models.instance_head import InstanceSeparatedBNHead
from rtmdet_geo.models.pafpn import CSPNeXtPAFPN
from rtmdet_geo.structures import Kind

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
        exp_on_reg: distances go through exp before they are multiplied by the stride (instances: always through relu).
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

    def __init__(self, backbone: CSPNeXt, neck: CSPNeXtPAFPN, bbox_head: SeparatedBNHead, *, architecture: str) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = neck
        self.bbox_head = bbox_head
        self.architecture = architecture

    @property
    def kind(self) -> Kind:
        """What the model finds: "horizontal" boxes, "mask" (instances) or "rotated" boxes."""
        return self.bbox_head.kind

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

    def forward(self, images: Tensor) -> HorizontalOutputs | InstanceOutputs | RotatedOutputs:
        """Return the raw outputs of the model's kind; decoding is :mod:`rtmdet_geo.models.decode`'s.

        Args:
            images: (N, in_channels, H, W) floating, normalised; H and W multiples of 32 px.

        Raises:
            TypeError: images are not floating.
            ValueError: shape, channels or sides do not fit.
        """
        check_images(images, self.architecture, self.in_channels, multiple=STRIDE_MULTIPLE)
        return self.bbox_head(self.neck(self.backbone(images)))


def check_images(images: Tensor, architecture: str, in_channels: int, *, multiple: int = 1) -> None:
    """Refuse images that a network cannot take; does nothing while it is traced or compiled.

    Args:
        images: should be (N, in_channels, H, W), floating.
        architecture: named in the message.
        in_channels: of the network.
        multiple: H and W must be multiples of it, px.

    Raises:
        TypeError: images are not floating.
        ValueError: shape, channels or sides do not fit.
    """
    if torch.jit.is_tracing() or torch.compiler.is_compiling():
        return
    if not images.is_floating_point():
        raise TypeError(f"{architecture} takes floating images, got {images.dtype}; normalise them first")
    if images.ndim != 4 or 0 in images.shape:
        raise ValueError(f"{architecture} takes images (N, C, H, W), got shape {tuple(images.shape)!r}")
    if images.shape[1] != in_channels:
        raise ValueError(
            f"{architecture} was built for {in_channels} channels, got {images.shape[1]};"
            " choose other bands or build it with in_channels="
        )
    if images.shape[2] % multiple or images.shape[3] % multiple:
        raise ValueError(f"sides must be multiples of {multiple} px, got (H, W) {tuple(images.shape[2:])!r}; pad first")


def make_backbone(architecture: str, num_classes: int, in_channels: int) -> tuple[ModelSize, CSPNeXt]:
    """Return the size that the last word of ``architecture`` names, and its backbone.

    Raises:
        ValueError: ``num_classes`` or ``in_channels`` below 1.
    """
    if num_classes < 1 or in_channels < 1:
        raise ValueError(
            f"{architecture} needs num_classes and in_channels of at least 1, got {num_classes!r} and {in_channels!r}"
        )
    size = SIZES[architecture.rsplit("_", 1)[1]]
    return size, CSPNeXt(deepen=size.deepen, widen=size.widen, in_channels=in_channels)


def _build(
    head_type: type[SeparatedBNHead],
    architecture: str,
    num_classes: int,
    in_channels: int,
    weights: str | Path | None,
) -> RTMDet:
    size, backbone = make_backbone(architecture, num_classes, in_channels)
    neck = CSPNeXtPAFPN(in_channels=backbone.out_channels, out_channels=size.channels, num_blocks=size.num_neck_blocks)
    head = head_type(
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
        from rtmdet_geo.models.weights import load_into

        load_into(model, weights)
    return model


def rtmdet_test(*, num_classes: int = 80, in_channels: int = 3, weights: str | Path | None = None) -> RTMDet:
    """Build the smallest RTMDet (width 1/8), for tests only; see :func:`rtmdet_tiny`."""
    return _build(HorizontalSeparatedBNHead, "rtmdet_test", num_classes, in_channels, weights)


def rtmdet_nano(*, num_classes: int = 80, in_channels: int = 3, weights: str | Path | None = None) -> RTMDet:
    """Build a RTMDet below tiny (width 1/4), ours, not published; see :func:`rtmdet_tiny`."""
    return _build(HorizontalSeparatedBNHead, "rtmdet_nano", num_classes, in_channels, weights)


def rtmdet_tiny(*, num_classes: int = 80, in_channels: int = 3, weights: str | Path | None = None) -> RTMDet:
    """Build RTMDet-tiny: horizontal boxes.

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
    return _build(HorizontalSeparatedBNHead, "rtmdet_tiny", num_classes, in_channels, weights)


def rtmdet_s(*, num_classes: int = 80, in_channels: int = 3, weights: str | Path | None = None) -> RTMDet:
    """Build RTMDet-s; see :func:`rtmdet_tiny`."""
    return _build(HorizontalSeparatedBNHead, "rtmdet_s", num_classes, in_channels, weights)


def rtmdet_m(*, num_classes: int = 80, in_channels: int = 3, weights: str | Path | None = None) -> RTMDet:
    """Build RTMDet-m; see :func:`rtmdet_tiny`."""
    return _build(HorizontalSeparatedBNHead, "rtmdet_m", num_classes, in_channels, weights)


def rtmdet_l(*, num_classes: int = 80, in_channels: int = 3, weights: str | Path | None = None) -> RTMDet:
    """Build RTMDet-l; see :func:`rtmdet_tiny`."""
    return _build(HorizontalSeparatedBNHead, "rtmdet_l", num_classes, in_channels, weights)


def rtmdet_x(*, num_classes: int = 80, in_channels: int = 3, weights: str | Path | None = None) -> RTMDet:
    """Build RTMDet-x; see :func:`rtmdet_tiny`."""
    return _build(HorizontalSeparatedBNHead, "rtmdet_x", num_classes, in_channels, weights)


def rtmdet_ins_test(*, num_classes: int = 80, in_channels: int = 3, weights: str | Path | None = None) -> RTMDet:
    """Build the smallest RTMDet-Ins (width 1/8), for tests only; see :func:`rtmdet_ins_tiny`."""
    return _build(InstanceSeparatedBNHead, "rtmdet_ins_test", num_classes, in_channels, weights)


def rtmdet_ins_nano(*, num_classes: int = 80, in_channels: int = 3, weights: str | Path | None = None) -> RTMDet:
    """Build a RTMDet-Ins below tiny (width 1/4), ours, not published; see :func:`rtmdet_ins_tiny`."""
    return _build(InstanceSeparatedBNHead, "rtmdet_ins_nano", num_classes, in_channels, weights)


def rtmdet_ins_tiny(*, num_classes: int = 80, in_channels: int = 3, weights: str | Path | None = None) -> RTMDet:
    """Build RTMDet-Ins-tiny: horizontal boxes and instance masks.

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
    return _build(InstanceSeparatedBNHead, "rtmdet_ins_tiny", num_classes, in_channels, weights)


def rtmdet_ins_s(*, num_classes: int = 80, in_channels: int = 3, weights: str | Path | None = None) -> RTMDet:
    """Build RTMDet-Ins-s; see :func:`rtmdet_ins_tiny`."""
    return _build(InstanceSeparatedBNHead, "rtmdet_ins_s", num_classes, in_channels, weights)


def rtmdet_ins_m(*, num_classes: int = 80, in_channels: int = 3, weights: str | Path | None = None) -> RTMDet:
    """Build RTMDet-Ins-m; see :func:`rtmdet_ins_tiny`."""
    return _build(InstanceSeparatedBNHead, "rtmdet_ins_m", num_classes, in_channels, weights)


def rtmdet_ins_l(*, num_classes: int = 80, in_channels: int = 3, weights: str | Path | None = None) -> RTMDet:
    """Build RTMDet-Ins-l; see :func:`rtmdet_ins_tiny`."""
    return _build(InstanceSeparatedBNHead, "rtmdet_ins_l", num_classes, in_channels, weights)


def rtmdet_ins_x(*, num_classes: int = 80, in_channels: int = 3, weights: str | Path | None = None) -> RTMDet:
    """Build RTMDet-Ins-x; see :func:`rtmdet_ins_tiny`."""
    return _build(InstanceSeparatedBNHead, "rtmdet_ins_x", num_classes, in_channels, weights)


def rtmdet_r_test(*, num_classes: int = 15, in_channels: int = 3, weights: str | Path | None = None) -> RTMDet:
    """Build the smallest rotated RTMDet (width 1/8), for tests only; see :func:`rtmdet_r_tiny`."""
    return _build(RotatedSeparatedBNHead, "rtmdet_r_test", num_classes, in_channels, weights)


def rtmdet_r_nano(*, num_classes: int = 15, in_channels: int = 3, weights: str | Path | None = None) -> RTMDet:
    """Build a rotated RTMDet below tiny (width 1/4), ours, not published; see :func:`rtmdet_r_tiny`."""
    return _build(RotatedSeparatedBNHead, "rtmdet_r_nano", num_classes, in_channels, weights)


def rtmdet_r_tiny(*, num_classes: int = 15, in_channels: int = 3, weights: str | Path | None = None) -> RTMDet:
    """Build rotated RTMDet-tiny: rotated boxes.

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
    return _build(RotatedSeparatedBNHead, "rtmdet_r_tiny", num_classes, in_channels, weights)


def rtmdet_r_s(*, num_classes: int = 15, in_channels: int = 3, weights: str | Path | None = None) -> RTMDet:
    """Build rotated RTMDet-s; see :func:`rtmdet_r_tiny`."""
    return _build(RotatedSeparatedBNHead, "rtmdet_r_s", num_classes, in_channels, weights)


def rtmdet_r_m(*, num_classes: int = 15, in_channels: int = 3, weights: str | Path | None = None) -> RTMDet:
    """Build rotated RTMDet-m; see :func:`rtmdet_r_tiny`."""
    return _build(RotatedSeparatedBNHead, "rtmdet_r_m", num_classes, in_channels, weights)


def rtmdet_r_l(*, num_classes: int = 15, in_channels: int = 3, weights: str | Path | None = None) -> RTMDet:
    """Build rotated RTMDet-l; see :func:`rtmdet_r_tiny`."""
    return _build(RotatedSeparatedBNHead, "rtmdet_r_l", num_classes, in_channels, weights)


BUILDERS: dict[str, Callable[..., RTMDet]] = {
    "rtmdet_test": rtmdet_test,
    "rtmdet_nano": rtmdet_nano,
    "rtmdet_tiny": rtmdet_tiny,
    "rtmdet_s": rtmdet_s,
    "rtmdet_m": rtmdet_m,
    "rtmdet_l": rtmdet_l,
    "rtmdet_x": rtmdet_x,
    "rtmdet_ins_test": rtmdet_ins_test,
    "rtmdet_ins_nano": rtmdet_ins_nano,
    "rtmdet_ins_tiny": rtmdet_ins_tiny,
    "rtmdet_ins_s": rtmdet_ins_s,
    "rtmdet_ins_m": rtmdet_ins_m,
    "rtmdet_ins_l": rtmdet_ins_l,
    "rtmdet_ins_x": rtmdet_ins_x,
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
    return find_builder(name, BUILDERS)(**arguments)


_Builder = TypeVar("_Builder")


def find_builder(name: str, builders: Mapping[str, _Builder]) -> _Builder:
    """Return the builder called ``name``.

    Raises:
        UnknownModelError: no such name; the message lists near ones.
    """
    if name not in builders:
        near = difflib.get_close_matches(name, builders, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(builders)}"
        raise UnknownModelError(f"unknown model {name!r}; {hint}")
    return builders[name]
