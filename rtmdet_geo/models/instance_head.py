"""The head of instance segmentation: boxes, a dynamic mask kernel per prior, and the features it is applied to.

Paper section 3.4. Parameter names equal those of mmdet 3.x's ``RTMDetInsSepBNHead``; the code is our own. Its distance
branch has no modules of its own: ``reg_convs`` are the very modules of ``cls_convs``, batch norms included, so a
state_dict names them twice. How masks come out of kernels and features: :mod:`rtmdet_geo.masks`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from rtmdet_geo.masks import NUM_KERNEL_PARAMETERS, NUM_MASK_FEATURES
from rtmdet_geo.models.blocks import ConvModule
from rtmdet_geo.models.heads import STRIDES, InstanceOutputs, SeparatedBNHead, at_least_float32, make_towers, through
from rtmdet_geo.structures import Kind


class MaskFeatures(nn.Module):
    """Fuse all levels at the finest one's size and reduce them to the mask features (mmdet's ``MaskFeatModule``).

    Args:
        channels: of the neck's levels and of the layers here.
        num_levels: levels to fuse.
        num_convs: 3 x 3 convolutions after the fusion.
    """

    def __init__(self, channels: int, num_levels: int, num_convs: int = 4) -> None:
        super().__init__()
        self.fusion_conv = nn.Conv2d(num_levels * channels, channels, 1)
        self.stacked_convs = nn.Sequential(*(ConvModule(channels, channels, 3) for _ in range(num_convs)))
        self.projection = nn.Conv2d(channels, NUM_MASK_FEATURES, 1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Map levels (N, channels, h_i, w_i), fine to coarse, to (N, 8, h_0, w_0)."""
        finest = features[0]
        size = finest.shape[2:]
        coarse = (nn.functional.interpolate(level, size=size, mode="bilinear") for level in features[1:])
        return self.projection(self.stacked_convs(self.fusion_conv(torch.cat((finest, *coarse), dim=1))))


class InstanceSeparatedBNHead(SeparatedBNHead):
    """Classes, distances and kernels per cell, and the mask features of the image (``RTMDetInsSepBNHead``).

    Distances are ``relu(x) * stride`` in every size: ``exp_on_reg`` is taken for the common signature and not used.
    The kernels' towers share nothing between levels.
    """

    kind: ClassVar[Kind] = "mask"

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int,
        feat_channels: int,
        exp_on_reg: bool = False,
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
        self.reg_convs = self.cls_convs
        self.kernel_convs = make_towers(in_channels, feat_channels, num_convs, len(self.strides), is_shared=False)
        self.rtm_kernel = self._predictors(NUM_KERNEL_PARAMETERS)
        self.mask_head = MaskFeatures(in_channels, len(self.strides))

    def _branches(self, level: int, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.training:  # the common batch norms see every batch twice, as in the reference
            return super()._branches(level, features)
        shared = through(self.cls_convs[level], features)
        return at_least_float32(self.rtm_cls[level](shared)), self._distances(level, shared), shared

    def _distances(self, level: int, reg_features: Tensor) -> Tensor:
        return at_least_float32(self.rtm_reg[level](reg_features)).relu() * self.strides[level]

    def forward(self, features: Sequence[Tensor]) -> InstanceOutputs:
        """Map the neck's levels (N, in_channels, h, w) to :class:`InstanceOutputs`."""
        outputs = InstanceOutputs([], [], [], at_least_float32(self.mask_head(features)))
        for level, level_features in enumerate(features):
            logits, distances, _ = self._branches(level, level_features)
            outputs.cls.append(logits)
            outputs.reg.append(distances)
            kernels = self.rtm_kernel[level](through(self.kernel_convs[level], level_features))
            outputs.kernel.append(at_least_float32(kernels))
        return outputs
