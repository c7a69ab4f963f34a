"""A detector as it runs: batch norms folded, in its device's layout of memory, convolutions in fp32, fp16 or bf16.

The same division as in model files of half precision: the convolutions of backbone, neck and head are in half,
normalisation, the channel attention's average over the image, and everything after the head's last convolutions (exp,
decoding, sigmoid, top-K) are in fp32 (:func:`rtmdet_geo.models.heads.at_least_float32`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rtmdet_geo.models.blocks import ChannelAttention
from rtmdet_geo.models.rtmdet import RTMDet
from rtmdet_geo.models.weights import fuse_batch_norm
from rtmdet_geo.structures import Kind


class InferenceNetwork(nn.Module):
    """A copy of a detector for inference alone; its outputs are those of the detector, in fp32.

    Args:
        network: in fp32, trained; it stays as it is.
        dtype: of its convolutions.
        layout: of its features, see :func:`choose_layout`.

    Attributes:
        kind: of the network.
    """

    def __init__(
        self,
        network: RTMDet,
        dtype: torch.dtype = torch.float32,
        layout: torch.memory_format = torch.channels_last,
    ) -> None:
        super().__init__()
        self.kind: Kind = network.kind
        self.dtype, self.layout = dtype, layout
        fused = fuse_batch_norm(network)
        for module in fused.modules():
            if isinstance(module, nn.SiLU):
                module.inplace = True  # what it overwrites is a convolution's output, which nothing else reads
            if isinstance(module, ChannelAttention):
                module.global_avgpool = _MeanInFloat32()
        self.network = fused.to(dtype=dtype, memory_format=layout)

    def forward(self, images: Tensor) -> tuple:
        """Map normalised fp32 images (N, C, H, W) to the network's outputs, see its kind's."""
        return self.network(images.to(dtype=self.dtype, memory_format=self.layout))


def choose_layout(device: torch.device, dtype: torch.dtype) -> torch.memory_format:
    """Return the layout of features in which a device computes convolutions.

    oneDNN and tensor cores have channels last: on a CPU it makes the network, with activations in place, a fifth to a
    third quicker. CUDA in fp32, where tensor cores have no part, has kernels for channels first
    (https://github.com/pytorch/pytorch/issues/44943).
    """
    is_first = device.type == "cuda" and dtype == torch.float32
    return torch.contiguous_format if is_first else torch.channels_last


class _MeanInFloat32(nn.Module):
    """The mean of each channel (N, C, 1, 1), summed in fp32 whatever the features are; fp16 would overflow."""

    def forward(self, features: Tensor) -> Tensor:
        return features.mean(dim=(2, 3), keepdim=True, dtype=torch.float32).to(features.dtype)
