"""The neck: path-aggregation pyramid of CSP layers (paper section 3.2; mmdet 3.x's ``CSPNeXtPAFPN``)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rtmdet_geo.models.blocks import ConvModule, CSPLayer


class CSPNeXtPAFPN(nn.Module):
    """Mix features top-down, then bottom-up; every level leaves with the same number of channels.

    Args:
        in_channels: channels of the backbone's levels, fine to coarse.
        out_channels: channels of every output level.
        num_blocks: CSPNeXt blocks in each CSP layer (no residuals, no attention).
    """

    def __init__(self, *, in_channels: Sequence[int], out_channels: int, num_blocks: int) -> None:
        super().__init__()
        channels = list(in_channels)
        steps = range(len(channels) - 1, 0, -1)  # coarse to fine

        def layer(layer_in: int, layer_out: int) -> CSPLayer:
            return CSPLayer(layer_in, layer_out, num_blocks, with_residual=False, with_attention=False)

        self.upsample = nn.Upsample(scale_factor=2, mode="nearest")
        self.reduce_layers = nn.ModuleList(ConvModule(channels[i], channels[i - 1], 1) for i in steps)
        self.top_down_blocks = nn.ModuleList(layer(2 * channels[i - 1], channels[i - 1]) for i in steps)
        self.downsamples = nn.ModuleList(ConvModule(width, width, 3, stride=2) for width in channels[:-1])
        self.bottom_up_blocks = nn.ModuleList(layer(2 * fine, coarse) for fine, coarse in itertools.pairwise(channels))
        self.out_convs = nn.ModuleList(ConvModule(width, out_channels, 3) for width in channels)
        self.out_channels = out_channels

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Map levels (N, in_channels[i], h_i, w_i), fine to coarse, to levels (N, out_channels, h_i, w_i)."""
        laterals: list[Tensor] = []  # reduced coarse levels, coarse to fine
        current = features[-1]
        for fine, reduce, block in zip(reversed(features[:-1]), self.reduce_layers, self.top_down_blocks, strict=True):
            reduced = reduce(current)
            laterals.append(reduced)
            current = block(torch.cat((self.upsample(reduced), fine), dim=1))
        levels = [current]
        for lateral, downsample, block in zip(reversed(laterals), self.downsamples, self.bottom_up_blocks, strict=True):
            levels.append(block(torch.cat((downsample(levels[-1]), lateral), dim=1)))
        return [conv(level) for conv, level in zip(self.out_convs, levels, strict=True)]
