"""Detection heads with convolutions shared over levels and separate batch norms (paper section 3.2).

Parameter names equal those of mmdet 3.x's ``RTMDetSepBNHead`` and mmrotate 1.x's ``RotatedRTMDetSepBNHead``; the shared
convolutions appear under each level's name and are the same tensors. The code is our own. The head of instance
segmentation is in :mod:`rtmdet_geo.models.instance_head`; the outputs of all kinds are here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from rtmdet_geo.models.blocks import ConvModule
from rtmdet_geo.structures import Kind
from rtmdet_geo.variants import STRIDES as STRIDES

#: Every class starts at this probability (focal loss, arXiv 1708.02002 section 3.3).
PRIOR_PROBABILITY = 0.01


class HorizontalOutputs(NamedTuple):
    """Raw outputs of a model of horizontal boxes, one tensor per level (strides 8, 16, 32), all at least float32.

    Attributes:
        cls: (N, num_classes, h, w) logits.
        reg: (N, 4, h, w) distances left, top, right, bottom in px; may be negative where the size has no exp (tiny, s).
    """

    cls: list[Tensor]
    reg: list[Tensor]


class InstanceOutputs(NamedTuple):
    """Raw outputs of a model of instance masks, all at least float32.

    Attributes:
        cls: per level (N, num_classes, h, w) logits.
        reg: per level (N, 4, h, w) distances left, top, right, bottom in px, never negative.
        kernel: per level (N, 169, h, w): the parameters of each prior's mask (layout: :mod:`rtmdet_geo.masks`).
        mask_features: (N, 8, H / 8, W / 8), what the kernels are applied to.
    """

    cls: list[Tensor]
    reg: list[Tensor]
    kernel: list[Tensor]
    mask_features: Tensor


class RotatedOutputs(NamedTuple):
    """Raw outputs of a rotated model, one tensor per level (strides 8, 16, 32), all at least float32.

    Attributes:
        cls: (N, num_classes, h, w) logits.
        reg: (N, 4, h, w) distances left, top, right, bottom in px along the box's own axes; may be negative where the
            size has no exp (tiny, s).
        angle: (N, 1, h, w) rad, unwrapped.
    """

    cls: list[Tensor]
    reg: list[Tensor]
    angle: list[Tensor]


def at_least_float32(values: Tensor) -> Tensor:
    """Return half-precision values as float32 and leave others alone, so that autocast never reaches the decoding."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def make_towers(
    in_channels: int, channels: int, num_convs: int, num_levels: int, *, is_shared: bool = True
) -> nn.ModuleList:
    """Build one tower of ``num_convs`` per level; if shared, level 0 has the convolutions of all, norms are its own."""
    towers = nn.ModuleList(
        nn.ModuleList(ConvModule(in_channels if i == 0 else channels, channels, 3) for i in range(num_convs))
        for _ in range(num_levels)
    )
    if not is_shared:
        return towers
    first = towers[0]
    for tower in list(towers)[1:]:
        for layer, canonical in zip(tower.children(), first.children(), strict=True):
            layer.conv = canonical.conv
    return towers


def through(tower: nn.Module, features: Tensor) -> Tensor:
    """Run the layers of a tower: (N, in_channels, h, w) to (N, channels, h, w)."""
    for layer in tower.children():
        features = layer(features)
    return features


class SeparatedBNHead(nn.Module):
    """Class and distance branches, common to the heads of all kinds.

    Args:
        num_classes: number of logits.
        in_channels: channels of the neck's levels.
        feat_channels: channels of the towers.
        exp_on_reg: distances are ``exp(x) * stride`` (m, l, x) or ``x * stride`` (tiny, s).
        num_convs: 3 x 3 convolutions in each tower.
        strides: px per cell of each level.

    Attributes:
        kind: what the head's boxes are.
    """

    kind: ClassVar[Kind]

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int,
        feat_channels: int,
        exp_on_reg: bool,
        num_convs: int = 2,
        strides: Sequence[int] = STRIDES,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.feat_channels = feat_channels
        self.exp_on_reg = exp_on_reg
        self.strides = tuple(strides)
        self.cls_convs = make_towers(in_channels, feat_channels, num_convs, len(self.strides))
        self.reg_convs = make_towers(in_channels, feat_channels, num_convs, len(self.strides))
        self.rtm_cls = self._predictors(num_classes)
        self.rtm_reg = self._predictors(4)

    def _predictors(self, num_outputs: int) -> nn.ModuleList:
        return nn.ModuleList(nn.Conv2d(self.feat_channels, num_outputs, 1) for _ in self.strides)

    def init_weights(self) -> None:
        """Initialise for training from scratch, as mmdet's ``RTMDetSepBNHead.init_weights``.

        Convolutions normal with std .01; class biases for :data:`PRIOR_PROBABILITY`; distance biases 1, so that every
        box starts two strides wide. (mmrotate's rotated head starts distances at 0: about half of all sizes would begin
        negative, without overlap to learn from; kept only where pretrained weights hide it, which is not our case.)
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for classifier, regressor in zip(self.rtm_cls, self.rtm_reg, strict=True):
            nn.init.constant_(classifier.bias, -math.log((1 - PRIOR_PROBABILITY) / PRIOR_PROBABILITY))
            nn.init.constant_(regressor.bias, 1.0)

    def _branches(self, level: int, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits (N, C, h, w), distances (N, 4, h, w) in px and the regression features of one level."""
        logits = self.rtm_cls[level](through(self.cls_convs[level], features))
        reg_features = through(self.reg_convs[level], features)
        return at_least_float32(logits), self._distances(level, reg_features), reg_features

    def _distances(self, level: int, reg_features: Tensor) -> Tensor:
        """Return distances (N, 4, h, w) in px of one level."""
        distances = at_least_float32(self.rtm_reg[level](reg_features))
        return (distances.exp() if self.exp_on_reg else distances) * self.strides[level]


class HorizontalSeparatedBNHead(SeparatedBNHead):
    """Classes and distances, nothing else (``RTMDetSepBNHead``)."""

    kind: ClassVar[Kind] = "horizontal"

    def forward(self, features: Sequence[Tensor]) -> HorizontalOutputs:
        """Map the neck's levels (N, in_channels, h, w) to :class:`HorizontalOutputs`."""
        outputs = HorizontalOutputs([], [])
        for level, level_features in enumerate(features):
            logits, distances, _ = self._branches(level, level_features)
            outputs.cls.append(logits)
            outputs.reg.append(distances)
        return outputs


class RotatedSeparatedBNHead(SeparatedBNHead):
    """Adds one angle per cell, in raw radians, from the regression features (``RotatedRTMDetSepBNHead``)."""

    kind: ClassVar[Kind] = "rotated"

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int,
        feat_channels: int,
        exp_on_reg: bool,
        num_convs: int = 2,
        strides: Sequence[int] = STRIDES,
    ) -> None:
        super().__init__(
            num_classes=num_classes,
            in_channels=in_channels,
            feat_channels=feat_channels,
            exp_on_reg=exp_on_reg,
            num_convs=num_convs,
            strides=strides,
        )
        self.rtm_ang = self._predictors(1)

    def forward(self, features: Sequence[Tensor]) -> RotatedOutputs:
        """Map the neck's levels (N, in_channels, h, w) to :class:`RotatedOutputs`."""
        outputs = RotatedOutputs([], [], [])
        for level, level_features in enumerate(features):
            logits, distances, reg_features = self._branches(level, level_features)
            outputs.cls.append(logits)
            outputs.reg.append(distances)
            outputs.angle.append(at_least_float32(self.rtm_ang[level](reg_features)))
        return outputs
