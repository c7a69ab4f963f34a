"""Instance masks from dynamic kernels, for the survivors of NMS only. numpy only.

A model of instances gives every prior the parameters of three 1 x 1 convolutions (its *kernel*), and the image 8
*mask features* at stride 8 (RTMDet, arXiv 2212.07784, section 3.4; mmdet 3.x ``RTMDetInsHead``). The 10 inputs of the
first convolution are the two coordinates relative to the prior, then the features; between the convolutions is a relu.
The logits that come out at stride 8 are interpolated linearly to pixels, and from there to the pixels of the original
image where one is asked for; the mask is where the result exceeds the threshold.

Interpolation is a product with one sparse matrix per axis, so any window of the result can be computed by itself and
equals that window of the whole: a mask cropped to its box costs the box, never the image.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rtmdet_geo.annotations.outlines import Outline, fill_outline, pixel_window
from rtmdet_geo.boxes import as_boxes, boxes_to_hboxes
from rtmdet_geo.structures import Detections, MaskKernels

Float32Array = NDArray[np.float32]
FloatArray = NDArray[np.float64]

#: Channels of the mask features.
NUM_MASK_FEATURES = 8
#: (inputs, outputs) of the three convolutions; a kernel holds all weights (output-major), then all biases.
KERNEL_LAYERS = ((2 + NUM_MASK_FEATURES, 8), (8, 8), (8, 1))
#: Numbers in a kernel: 80 + 64 + 8 weights and 8 + 8 + 1 biases.
NUM_KERNEL_PARAMETERS = sum(inputs * outputs + outputs for inputs, outputs in KERNEL_LAYERS)
#: Pixels of the input per cell of the mask features.
MASK_STRIDE = 8
#: Relative coordinates are divided by the prior's stride times this (``RTMDetInsHead``: strides * 8).
COORDINATE_RANGE = 8


class MaskFrame(NamedTuple):
    """The pixels that masks are wanted in.

    Attributes:
        height: rows.
        width: columns.
        step_x: px of the network's input from one column to the next; the first column begins at the input's edge.
        step_y: likewise, rows.
    """

    height: int
    width: int
    step_x: float = 1.0
    step_y: float = 1.0


class CroppedMask(NamedTuple):
    """A part of a mask.

    Attributes:
        mask: (h, w) uint8, 1 inside and 0 outside; may be empty.
        x: column of its first pixel in the frame.
        y: row of its first pixel.
    """

    mask: NDArray[np.uint8]
    x: int
    y: int


def input_frame(features: ArrayLike) -> MaskFrame:
    """Return the frame of the network's own input, for mask features (8, h, w)."""
    _, height, width = _check_features(features).shape
    return MaskFrame(height * MASK_STRIDE, width * MASK_STRIDE)


def original_frame(
    features: ArrayLike,
    scale_factor: tuple[float, float],
    original_shape: tuple[int, int],
    *,
    axes: Literal["own", "swapped"] = "own",
) -> MaskFrame:
    """Return the frame of the image as it was before it was resized and padded.

    Args:
        features: (8, h, w) mask features of the padded image.
        scale_factor: (x, y) resized px per original px.
        original_shape: (height, width) of the original image in px.
        axes: "own" is right. "swapped" gives the reference's numbers, for golden tests: it multiplies the height by the
            factor of x and the width by that of y, which only shows where the two differ; the frame may then be smaller
            than the original. It also rounds sizes up first and derives the steps from them.

    Raises:
        ValueError: a factor or a side is not positive, or ``axes`` is unknown.
    """
    _, height, width = _check_features(features).shape
    factor_x, factor_y = scale_factor
    original_height, original_width = original_shape
    if not (0 < factor_x < math.inf and 0 < factor_y < math.inf) or min(original_shape) < 1:
        raise ValueError(f"scale factors {scale_factor!r} and sides {original_shape!r} must be positive and finite")
    if axes == "own":
        return MaskFrame(original_height, original_width, factor_x, factor_y)
    if axes != "swapped":
        raise ValueError(f"unknown axes {axes!r}; use 'own' or 'swapped'")
    num_rows, num_columns = height * MASK_STRIDE, width * MASK_STRIDE
    full_height, full_width = math.ceil(num_rows * (1 / factor_x)), math.ceil(num_columns * (1 / factor_y))
    return MaskFrame(
        min(full_height, original_height),
        min(full_width, original_width),
        num_columns / full_width,
        num_rows / full_height,
    )


def assemble_masks(
    kernels: ArrayLike,
    priors: ArrayLike,
    features: ArrayLike,
    *,
    threshold: float = 0.5,
    frame: MaskFrame | None = None,
) -> NDArray[np.bool_]:
    """Return whole masks, as the reference has them: not cropped to boxes, one byte per pixel and instance.

    Args:
        kernels: (M, 169) of the instances, see :data:`KERNEL_LAYERS`.
        priors: (M, 3) x, y and stride in px of the prior that each comes from.
        features: (8, h, w) mask features of the image.
        threshold: in (0, 1); the mask is where the probability is higher.
        frame: pixels of the result; the network's input by default.

    Returns:
        (M, height, width) bool.

    Raises:
        ValueError: a shape is wrong, or the threshold is outside (0, 1).
    """
    frame = frame if frame is not None else input_frame(features)
    kernel_rows, prior_rows = _check_instances(kernels, priors)
    masks = np.zeros((len(kernel_rows), frame.height, frame.width), np.bool_)
    windows = [(0, 0, frame.width, frame.height)] * len(masks)
    for index, mask in enumerate(_windows(kernel_rows, prior_rows, features, windows, threshold, frame)):
        masks[index] = mask
    return masks


def assemble_cropped_masks(
    kernels: ArrayLike,
    priors: ArrayLike,
    features: ArrayLike,
    boxes: ArrayLike,
    *,
    threshold: float = 0.5,
    frame: MaskFrame | None = None,
    margin: float = 0.1,
) -> list[CroppedMask]:
    """Return each mask inside its box only, widened by a margin; memory and time follow the boxes.

    Args:
        kernels: (M, 169) of the instances.
        priors: (M, 3) x, y and stride in px.
        features: (8, h, w) mask features of the image.
        boxes: (M, 5) cx, cy, w, h in px of the frame, angle in rad.
        threshold: in (0, 1).
        frame: pixels of the result; the network's input by default.
        margin: added on every side, as a part of the box's longer side; one cell of the mask features at least.

    Returns:
        M cropped masks: exactly that window of :func:`assemble_masks`, cut at the frame's edges; empty where the box
        and the frame do not meet.

    Raises:
        ValueError: as :func:`assemble_masks`; or numbers of boxes differ, a box is not finite, or the margin negative.
    """
    frame = frame if frame is not None else input_frame(features)
    kernel_rows, prior_rows = _check_instances(kernels, priors)
    box_rows = as_boxes(boxes)
    if len(box_rows) != len(kernel_rows):
        raise ValueError(f"{len(kernel_rows)} kernels, but {len(box_rows)} boxes; give one box per kernel")
    if not np.isfinite(box_rows).all() or not margin >= 0:
        raise ValueError(f"boxes must be finite and the margin not negative, got margin {margin!r}")
    corners = boxes_to_hboxes(box_rows)
    cell = np.array([MASK_STRIDE / frame.step_x, MASK_STRIDE / frame.step_y])  # px of the frame
    widen = np.maximum(margin * np.abs(box_rows[:, 2:4]).max(axis=1, keepdims=True), cell)
    limits = np.array([frame.width, frame.height])
    low = np.clip(np.floor(corners[:, :2] - widen), 0, limits).astype(np.int64)
    high = np.maximum(np.clip(np.ceil(corners[:, 2:] + widen), 0, limits).astype(np.int64), low)
    windows = [(int(x0), int(y0), int(x1), int(y1)) for (x0, y0), (x1, y1) in zip(low, high, strict=True)]
    masks = _windows(kernel_rows, prior_rows, features, windows, threshold, frame)
    return [CroppedMask(mask.view(np.uint8), x, y) for mask, (x, y, _, _) in zip(masks, windows, strict=True)]


def crop_outline(outline: Outline, width: int, height: int) -> CroppedMask:
    """Cut an outline into the pixels of an image of ``width`` x ``height`` px, within the outline's bounds only."""
    window = pixel_window(outline, width, height)
    return CroppedMask(fill_outline(outline, window), window.x, window.y)


def assemble_detections(
    detections: Detections, height: int, width: int, *, threshold: float = 0.5, margin: float = 0.1
) -> list[CroppedMask]:
    """Return the masks of detections whose masks are kernels, in the pixels of their tile.

    Instances that were found in a mirrored picture are assembled as that picture shows them and mirrored back.

    Args:
        detections: N, in px of the tile.
        height: of the picture that is the tile, in px: what the engine was given, its padding included.
        width: likewise.
        threshold: in (0, 1); the mask is where the probability is higher.
        margin: see :func:`assemble_cropped_masks`.

    Returns:
        N cropped masks, in order.

    Raises:
        ValueError: there are no kernels, the detections are in scene px, or as :func:`assemble_cropped_masks`.
    """
    masks = detections.masks
    if len(detections) == 0:
        return []
    if detections.frame != "tile" or not isinstance(masks, MaskKernels):
        raise ValueError(f"{len(detections)} detections in {detections.frame} px without mask kernels have no masks")
    found: dict[int, CroppedMask] = {}
    for index, view in enumerate(masks.views):
        rows = np.flatnonzero(masks.view_index == index)
        boxes = detections.boxes[rows].astype(np.float64)
        for is_mirrored, axis, side in ((view.flip_x, 0, width), (view.flip_y, 1, height)):
            if is_mirrored:
                boxes[:, axis], boxes[:, 4] = side - boxes[:, axis], -boxes[:, 4]
        frame = MaskFrame(height, width, view.step_x, view.step_y)
        chosen = masks.select(rows)
        parts = assemble_cropped_masks(
            chosen.kernels, chosen.priors, view.features, boxes, threshold=threshold, frame=frame, margin=margin
        )
        for row, part in zip(rows, parts, strict=True):
            found[int(row)] = _mirror(part, frame, view.flip_x, view.flip_y)
    return [found[row] for row in range(len(detections))]


def _mirror(part: CroppedMask, frame: MaskFrame, flip_x: bool, flip_y: bool) -> CroppedMask:
    rows, columns = part.mask.shape
    mask = part.mask[:: -1 if flip_y else 1, :: -1 if flip_x else 1]
    return CroppedMask(
        np.ascontiguousarray(mask),
        frame.width - part.x - columns if flip_x else part.x,
        frame.height - part.y - rows if flip_y else part.y,
    )


def _windows(
    kernels: Float32Array,
    priors: Float32Array,
    features: ArrayLike,
    windows: list[tuple[int, int, int, int]],
    threshold: float,
    frame: MaskFrame,
) -> Iterator[NDArray[np.bool_]]:
    """Yield the window x0, y0, x1, y1 (px of the frame) of each instance's mask."""
    feature_map = _check_features(features)
    if not 0 < threshold < 1:
        raise ValueError(f"mask threshold {threshold!r} is outside (0, 1)")
    least = math.log(threshold / (1 - threshold))
    _, height, width = feature_map.shape
    along_x = _Axis.of(frame.width, frame.step_x, width)
    along_y = _Axis.of(frame.height, frame.step_y, height)
    for kernel, prior, (x0, y0, x1, y1) in zip(kernels, priors, windows, strict=True):
        if x1 <= x0 or y1 <= y0:
            yield np.zeros((y1 - y0, x1 - x0), np.bool_)
            continue
        columns, first_column = along_x.matrix(x0, x1)
        rows, first_row = along_y.matrix(y0, y1)
        part = feature_map[:, first_row : first_row + rows.shape[1], first_column : first_column + columns.shape[1]]
        with np.errstate(over="ignore", invalid="ignore"):  # a kernel that is not finite gives an empty mask
            logits = _apply_kernel(kernel, prior, part, first_column, first_row)
            mask = rows @ logits @ columns.T > least
        yield mask


def _apply_kernel(
    kernel: Float32Array, prior: Float32Array, features: Float32Array, first_column: int, first_row: int
) -> Float32Array:
    """Return the logits (h, w) of one instance at the cells of features (8, h, w), a window of the map."""
    _, height, width = features.shape
    x, y, stride = prior
    reach = stride * COORDINATE_RANGE
    inputs = np.empty((2 + NUM_MASK_FEATURES, height, width), np.float32)
    inputs[0] = (x - np.arange(first_column, first_column + width, dtype=np.float32) * MASK_STRIDE) / reach
    inputs[1] = ((y - np.arange(first_row, first_row + height, dtype=np.float32) * MASK_STRIDE) / reach)[:, None]
    inputs[2:] = features
    values = inputs.reshape(len(inputs), -1)
    weight_at, bias_at = 0, sum(inputs * outputs for inputs, outputs in KERNEL_LAYERS)
    for number, (num_inputs, num_outputs) in enumerate(KERNEL_LAYERS):
        weights = kernel[weight_at : weight_at + num_inputs * num_outputs].reshape(num_outputs, num_inputs)
        values = weights @ values + kernel[bias_at : bias_at + num_outputs, None]
        if number < len(KERNEL_LAYERS) - 1:
            values = np.maximum(values, 0)
        weight_at, bias_at = weight_at + num_inputs * num_outputs, bias_at + num_outputs
    return values.reshape(height, width)


class _Axis(NamedTuple):
    """How the pixels of one axis of a frame are made of cells: a few cells each, with weights.

    Linear twice, with pixel centres at .5 and the edge value held beyond the outermost centre (torch's ``interpolate``,
    mode bilinear, ``align_corners=False``): cells to input pixels, and input pixels to the frame's unless the step
    between these is 1.
    """

    cells: NDArray[np.int64]  # (T, pixels)
    weights: Float32Array  # (T, pixels), of sum 1

    @classmethod
    def of(cls, num_pixels: int, step: float, num_cells: int) -> _Axis:
        pixels = np.arange(num_pixels, dtype=np.float64)
        taps = [(pixels, np.ones(num_pixels))] if step == 1 else _linear(pixels, step, num_cells * MASK_STRIDE)
        cells, weights = [], []
        for pixel, weight in taps:
            for cell, part in _linear(pixel, 1 / MASK_STRIDE, num_cells):
                cells.append(cell.astype(np.int64))
                weights.append(weight * part)
        return cls(np.stack(cells), np.stack(weights).astype(np.float32))

    def matrix(self, start: int, stop: int) -> tuple[Float32Array, int]:
        """Return the weights (stop - start, C) of C cells for pixels [start, stop), and the first cell's index."""
        cells, weights = self.cells[:, start:stop], self.weights[:, start:stop]
        first = int(cells[0, 0])  # cells rise along the axis, and from the first to the last tap
        matrix = np.zeros((stop - start, int(cells[-1, -1]) + 1 - first), np.float32)
        pixels = np.arange(stop - start)
        for cell, weight in zip(cells, weights, strict=True):
            matrix[pixels, cell - first] += weight
        return matrix, first


def _linear(pixels: FloatArray, step: float, size: int) -> list[tuple[FloatArray, FloatArray]]:
    """Return both neighbours (whole numbers in [0, size)) of each pixel's place in the source, with their weights."""
    place = np.clip((pixels + 0.5) * step - 0.5, 0, size - 1)
    low = np.floor(place)
    return [(low, 1 - (place - low)), (np.minimum(low + 1, size - 1), place - low)]


def _check_features(features: ArrayLike) -> Float32Array:
    array: NDArray[Any] = np.asarray(features, np.float32)
    if array.ndim != 3 or len(array) != NUM_MASK_FEATURES or 0 in array.shape:
        raise ValueError(f"mask features must be ({NUM_MASK_FEATURES}, h, w), not {array.shape}")
    return array


def _check_instances(kernels: ArrayLike, priors: ArrayLike) -> tuple[Float32Array, Float32Array]:
    kernel_rows, prior_rows = np.asarray(kernels, np.float32), np.asarray(priors, np.float32)
    if kernel_rows.ndim != 2 or kernel_rows.shape[1] != NUM_KERNEL_PARAMETERS:
        raise ValueError(f"kernels must be (M, {NUM_KERNEL_PARAMETERS}), not {kernel_rows.shape}")
    if prior_rows.shape != (len(kernel_rows), 3):
        raise ValueError(f"{len(kernel_rows)} kernels need priors ({len(kernel_rows)}, 3), not {prior_rows.shape}")
    return kernel_rows, prior_rows
