"""Building blocks of RTMDet: convolution + norm + SiLU, CSPNeXt block, channel attention, CSP layer, pyramid pooling.

Paper: RTMDet, https://arxiv.org/abs/2212.07784 (section 3.2, large-kernel depth-wise convolutions). Parameter names
equal those of mmdet 3.x's state_dicts (``conv``, ``bn``, ``depthwise_conv``, ``main_conv``, ...); the code is our own.
Batch norm has eps 1e-5 and momentum 0.1 in every published model: their configurations replace the class defaults.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

BATCH_NORM_EPS = 1e-5
BATCH_NORM_MOMENTUM = 0.1


class ConvModule(nn.Module):
    """Convolution without bias, batch norm, SiLU; "same" padding for odd kernels.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: side of the kernel in px.
        stride: step in px.
        groups: convolution groups.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, groups=groups, bias=False
        )
        self.bn: nn.Module = nn.BatchNorm2d(out_channels, eps=BATCH_NORM_EPS, momentum=BATCH_NORM_MOMENTUM)
        self.activate = nn.SiLU()

    def forward(self, images: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H / stride, W / stride)."""
        return self.activate(self.bn(self.conv(images)))


class DepthwiseSeparableConv(nn.Module):
    """Depth-wise convolution, then 1 x 1; both parts with their own batch norm and SiLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.depthwise_conv = ConvModule(in_channels, in_channels, kernel_size, groups=in_channels)
        self.pointwise_conv = ConvModule(in_channels, out_channels, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H, W)."""
        return self.pointwise_conv(self.depthwise_conv(features))


class CSPNeXtBlock(nn.Module):
    """3 x 3 convolution, then a separable 5 x 5 one, with an optional residual (paper fig. 3b)."""

    def __init__(self, channels: int, with_residual: bool, kernel_size: int = 5) -> None:
        super().__init__()
        self.conv1 = ConvModule(channels, channels, 3)
        self.conv2 = DepthwiseSeparableConv(channels, channels, kernel_size)
        self.with_residual = with_residual

    def forward(self, features: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape."""
        out = self.conv2(self.conv1(features))
        return out + features if self.with_residual else out


class ChannelAttention(nn.Module):
    """Gate every channel by a hard sigmoid of a linear map of all channels' means."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.global_avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Conv2d(channels, channels, 1)
        self.act = nn.Hardsigmoid()

    def forward(self, features: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape."""
        return features * self.act(self.fc(self.global_avgpool(features)))


class CSPLayer(nn.Module):
    """Cross-stage-partial layer of CSPNeXt blocks; halves are concatenated in the order (main, short).

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        num_blocks: CSPNeXt blocks on the main path.
        with_residual: blocks add their input (backbone stages 1 to 3 only).
        with_attention: channel attention before the last convolution (backbone only).
        expand_ratio: channels of each half, relative to ``out_channels``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_blocks: int,
        *,
        with_residual: bool,
        with_attention: bool,
        expand_ratio: float = 0.5,
    ) -> None:
        super().__init__()
        middle = int(out_channels * expand_ratio)
        self.main_conv = ConvModule(in_channels, middle, 1)
        self.short_conv = ConvModule(in_channels, middle, 1)
        self.final_conv = ConvModule(2 * middle, out_channels, 1)
        self.blocks = nn.Sequential(*(CSPNeXtBlock(middle, with_residual) for _ in range(num_blocks)))
        self.attention: nn.Module | None = ChannelAttention(2 * middle) if with_attention else None

    def forward(self, features: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H, W)."""
        short = self.short_conv(features)
        joined = torch.cat((self.blocks(self.main_conv(features)), short), dim=1)
        if self.attention is not None:
            joined = self.attention(joined)
        return self.final_conv(joined)


class SpatialPyramidPooling(nn.Module):
    """Concatenate the halved input with its 5, 9 and 13 px maxima (stride 1), then 1 x 1."""

    def __init__(self, channels: int, kernel_sizes: tuple[int, ...] = (5, 9, 13)) -> None:
        super().__init__()
        middle = channels // 2
        self.conv1 = ConvModule(channels, middle, 1)
        self.poolings = nn.ModuleList(nn.MaxPool2d(size, stride=1, padding=size // 2) for size in kernel_sizes)
        self.conv2 = ConvModule(middle * (len(kernel_sizes) + 1), channels, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape."""
        reduced = self.conv1(features)
        return self.conv2(torch.cat([reduced, *(pooling(reduced) for pooling in self.poolings)], dim=1))
