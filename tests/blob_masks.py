"""An engine of instances whose masks are known: bright areas, each with kernels that make its own pixels its mask."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray
from synthetic import BlobBackend, make_spec

from rtmdet_geo.masks import KERNEL_LAYERS, MASK_STRIDE, NUM_KERNEL_PARAMETERS, NUM_MASK_FEATURES
from rtmdet_geo.structures import Detections, MaskKernels, MaskView, ModelSpec

#: Logit per share of a cell that is covered; a pixel belongs to the mask where the interpolated share exceeds 1/2.
SLOPE = 40.0


def channel_kernel(channel: int) -> NDArray[np.float32]:
    """Return a kernel whose logit is SLOPE * (feature of that channel - 1/2)."""
    kernel = np.zeros(NUM_KERNEL_PARAMETERS, np.float32)
    start = 0
    for layer, (inputs, outputs) in enumerate(KERNEL_LAYERS):
        kernel[start + (2 + channel if layer == 0 else 0)] = SLOPE if layer == 2 else 1.0
        start += inputs * outputs
    kernel[-1] = -SLOPE / 2
    return kernel


class BlobMaskBackend(BlobBackend):
    """Calls each bright connected area an instance; neighbours up to eight use channels of their own."""

    def __init__(self, spec: ModelSpec | None = None) -> None:
        """Remember the spec."""
        super().__init__(spec or make_spec(kind="mask", architecture="rtmdet_ins_test", iou_threshold=0.6))

    def _find(self, image: NDArray[np.uint8]) -> Detections:
        height, width = image.shape
        number, areas, stats, _ = cv2.connectedComponentsWithStats((image > 128).astype(np.uint8), connectivity=8)
        shares = np.zeros((NUM_MASK_FEATURES, height // MASK_STRIDE, width // MASK_STRIDE), np.float32)
        boxes, kernels = [], []
        for area in range(1, number):
            x, y, w, h, _ = stats[area]
            boxes.append([x + w / 2, y + h / 2, w, h, 0.0])
            channel = area % NUM_MASK_FEATURES
            kernels.append(channel_kernel(channel))
            x0, y0, x1, y1 = x // 8 * 8, y // 8 * 8, -(-(x + w) // 8) * 8, -(-(y + h) // 8) * 8
            pixels = (areas[y0:y1, x0:x1] == area).astype(np.float32)
            cells = pixels.reshape(len(pixels) // 8, 8, -1, 8).mean(axis=(1, 3))
            shares[channel, y0 // 8 : y1 // 8, x0 // 8 : x1 // 8] += cells
        count = len(boxes)
        masks = MaskKernels(
            np.array(kernels, np.float32).reshape(count, -1) if count else np.zeros((0, 169), np.float32),
            np.tile(np.float32([0, 0, 8]), (count, 1)),
            (MaskView(shares),),
            np.zeros(count, np.int64),
        )
        scores = np.linspace(0.9, 0.8, count, dtype=np.float32)
        return Detections(np.array(boxes).reshape(-1, 5), scores, np.zeros(count, np.int64), "tile", "mask", masks)
