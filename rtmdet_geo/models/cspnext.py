"""CSPNeXt, the backbone of RTMDet (paper section 3.2; arch P5 of mmdet 3.x's ``CSPNeXt``)."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from rtmdet_geo.models.blocks import ConvModule, CSPLayer, SpatialPyramidPooling


class _Stage(NamedTuple):
    in_channels: int
    out_channels: int
    num_blocks: int
    with_residual: bool
    with_pooling: bool


#: Arch P5 before scaling by widen (channels) and deepen (blocks).
_STAGES = (
    _Stage(64, 128, 3, True, False),
    _Stage(128, 256, 6, True, False),
    _Stage(256, 512, 6, True, False),
    _Stage(512, 1024, 3, False, True),
)


class CSPNeXt(nn.Module):
    """Stem and four stages, each halving the side.

    Args:
        deepen: factor on the number of blocks (rounded as Python's ``round`` does, at least 1).
        widen: factor on the channels.
        in_channels: channels of the images.

    Attributes:
        out_channels: channels of stages 2, 3, 4 (strides 8, 16, 32).
    """

    def __init__(self, *, deepen: float, widen: float, in_channels: int = 3) -> None:
        super().__init__()
        stem = int(_STAGES[0].in_channels * widen)
        self.stem = nn.Sequential(
            ConvModule(in_channels, stem // 2, 3, stride=2),
            ConvModule(stem // 2, stem // 2, 3),
            ConvModule(stem // 2, stem, 3),
        )
        channels: list[int] = []
        for number, stage in enumerate(_STAGES, start=1):
            stage_in, stage_out = int(stage.in_channels * widen), int(stage.out_channels * widen)
            layers: list[nn.Module] = [ConvModule(stage_in, stage_out, 3, stride=2)]
            if stage.with_pooling:
                layers.append(SpatialPyramidPooling(stage_out))
            layers.append(
                CSPLayer(
                    stage_out,
                    stage_out,
                    max(round(stage.num_blocks * deepen), 1),
                    with_residual=stage.with_residual,
                    with_attention=True,
                )
            )
            self.add_module(f"stage{number}", nn.Sequential(*layers))
            channels.append(stage_out)
        self.in_channels = in_channels
        self.out_channels: tuple[int, int, int] = (channels[1], channels[2], channels[3])

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map normalised images (N, C, H, W) to features at strides 8, 16, 32, each (N, out_channels[i], h, w)."""
        features = self.get_submodule("stage1")(self.stem(images))
        stride8 = self.get_submodule("stage2")(features)
        stride16 = self.get_submodule("stage3")(stride8)
        return stride8, stride16, self.get_submodule("stage4")(stride16)
