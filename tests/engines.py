"""Engines whose answers are known: golden candidates, and bright rectangles found by their moments."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from reference_post import Found, check_found, one_image, raw_outputs
from synthetic import make_spec

from rtmdet_geo.boxes import regularize_le90
from rtmdet_geo.masks import NUM_KERNEL_PARAMETERS
from rtmdet_geo.models.decode import decode_horizontal, decode_instances, decode_rotated
from rtmdet_geo.structures import PAD_VALUE, Detections, Kind, MaskKernels, MaskView, ModelSpec

#: Grey of the rectangles; the ground has that of the padding, so padding shows nothing.
BRIGHT = 250


class Engine:
    """Answers every image with :meth:`find`, and remembers the batches and what else was asked for."""

    name = "known"
    path = Path(__file__)
    device_name = "cpu"
    fixed_tile_size: int | None = None

    def __init__(self, spec: ModelSpec | None = None) -> None:
        """Remember the spec."""
        self.spec = spec or make_spec()
        self.num_saturated = 0
        self.batches: list[NDArray[np.uint8]] = []
        self.multi_label = False

    def run(
        self, batches: Iterable[NDArray[np.uint8]], *, score_threshold: float, multi_label: bool = False
    ) -> Iterator[list[Detections]]:
        """See the protocol."""
        self.multi_label = multi_label
        for images in batches:
            assert images.dtype == np.uint8 and images.shape[1] == len(self.spec.bands)
            assert images.shape[2] % 32 == 0 and images.shape[3] % 32 == 0
            self.batches.append(images)
            found = [self.find(image) for image in images]
            yield [detections.select(detections.scores >= score_threshold) for detections in found]

    def predict(
        self, images: NDArray[np.uint8], *, score_threshold: float, multi_label: bool = False
    ) -> list[Detections]:
        """See the protocol."""
        return next(iter(self.run([images], score_threshold=score_threshold, multi_label=multi_label)))

    def find(self, image: NDArray[np.uint8]) -> Detections:
        """Return what is in an image (C, H, W)."""
        raise NotImplementedError


class RectangleEngine(Engine):
    """Finds bright rectangles: centre, sides and direction from the moments of their grey, exact to parts of a px.

    A uniform rectangle has the variance side^2 / 12 along each side, and resampling moves grey by little. Of kind
    "mask" the features are the mean grey of each cell, and a mask is where it is more than half of a rectangle's.
    """

    def find(self, image: NDArray[np.uint8]) -> Detections:
        """Return one detection per connected area that is brighter than the ground."""
        grey = (image[0].astype(np.float64) - PAD_VALUE) / (BRIGHT - PAD_VALUE)
        number, areas, where, _ = cv2.connectedComponentsWithStats((grey > 0.02).astype(np.uint8), connectivity=8)
        boxes = np.zeros((number - 1, 5))
        for area, (x, y, width, height, _) in enumerate(where[1:], 1):
            window = np.s_[y : y + height, x : x + width]
            boxes[area - 1] = self._box(grey[window], areas[window] == area)
            boxes[area - 1, :2] += x, y
        kind = self.spec.object_kind
        if kind == "rotated":
            boxes = regularize_le90(boxes)
        masks = self._kernels(grey, len(boxes)) if kind == "mask" else None
        return Detections(boxes, np.full(len(boxes), 0.9), np.zeros(len(boxes)), kind=kind, masks=masks)

    def _box(self, grey: NDArray[np.float64], area: NDArray[np.bool_]) -> NDArray[np.float64]:
        rows, columns = np.nonzero(area)
        points = np.stack([columns, rows]) + 0.5
        variance = np.cov(points, aweights=grey[area], ddof=0) + np.eye(2) / 12  # a pixel is no point
        centre = np.average(points, axis=1, weights=grey[area])
        if self.spec.object_kind != "rotated":
            return np.array([*centre, *np.sqrt(12 * np.diag(variance)), 0.0])
        sides, directions = np.linalg.eigh(variance)
        x, y = directions[:, 1]
        return np.array([*centre, *np.sqrt(12 * sides[::-1]), np.arctan2(y, x)])

    def _kernels(self, grey: NDArray[np.float64], number: int) -> MaskKernels:
        height, width = grey.shape
        features = np.zeros((8, height // 8, width // 8), np.float32)
        features[0] = grey.reshape(height // 8, 8, width // 8, 8).mean(axis=(1, 3)) - 0.5
        kernel = np.zeros(NUM_KERNEL_PARAMETERS, np.float32)  # the logit is the first feature, split by its sign
        first, second, third = kernel[:80].reshape(8, 10), kernel[80:144].reshape(8, 8), kernel[144:152]
        first[0, 2], first[1, 2] = 1, -1
        second[0, 0] = second[1, 1] = 1
        third[:2] = 1, -1
        priors = np.tile(np.array([0, 0, 8], np.float32), (number, 1))
        return MaskKernels(np.tile(kernel, (number, 1)), priors, (MaskView(features),), np.zeros(number, np.int64))


def draw_rectangles(height: int, width: int, boxes: NDArray[np.float64], *, bands: int = 3) -> NDArray[np.uint8]:
    """Return (bands, height, width) uint8: a pixel is as bright as the share of it that rectangles cover."""
    fine = 8
    covered = np.zeros((height * fine, width * fine), np.uint8)
    for cx, cy, w, h, angle in boxes:
        left, top = (max(0, int(centre - max(w, h))) * fine for centre in (cx, cy))
        part = covered[top : int(cy + max(w, h)) * fine, left : int(cx + max(w, h)) * fine]
        x = (left + np.arange(part.shape[1]) + 0.5) / fine - cx
        y = ((top + np.arange(part.shape[0]) + 0.5) / fine - cy)[:, None]
        along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
        part[(np.abs(along) <= w / 2) & (np.abs(across) <= h / 2)] = 1
    share = covered.reshape(height, fine, width, fine).mean(axis=(1, 3))
    grey = np.rint(PAD_VALUE + (BRIGHT - PAD_VALUE) * share).astype(np.uint8)
    return np.repeat(grey[None], bands, axis=0)


def scattered_boxes(height: int, width: int, seed: int, *, kind: Kind = "rotated") -> NDArray[np.float64]:
    """Return boxes (N, 5) in cells of 48 px, most of them taken, none touching another or the edge.

    Those of kind "mask" are at least two cells of mask features wide.
    """
    generator = np.random.default_rng(seed)
    cells = [(x, y) for x in range(0, width - 47, 48) for y in range(0, height - 47, 48)]
    chosen = [cell for cell in cells if generator.random() < 0.8] or cells[:1]
    centres = np.array(chosen) + generator.uniform(20, 28, (len(chosen), 2))
    shorter = (20, 30) if kind == "mask" else (8, 14)
    sides = np.stack([generator.uniform(20, 30, len(chosen)), generator.uniform(*shorter, len(chosen))], axis=1)
    if kind == "rotated":
        return np.column_stack([centres, sides, generator.uniform(-np.pi / 2, np.pi / 2, len(chosen))])
    return np.column_stack([centres, generator.permuted(sides, axis=1), np.zeros(len(chosen))])


def golden_candidates(case: dict[str, Any], image: int) -> Detections:
    """Return the raw candidates of one image of a golden case above its threshold, in px of the network's input."""
    outputs, config = one_image(raw_outputs(case), image), case["test_cfg"]
    if case["family"] == "rot":
        candidates: tuple[Any, ...] = decode_rotated(outputs, limit=config["nms_pre"])
    else:
        decode = decode_instances if case["family"] == "ins" else decode_horizontal
        shape = tuple(case["img_metas"][image]["img_shape"])
        candidates = decode(outputs, limit=config["nms_pre"], image_shape=shape)
    rows = [part[0].numpy() for part in candidates]
    keep = (rows[1] > config["score_thr"]) & (rows[0][:, 2:4] > config["min_bbox_size"]).all(axis=1)
    boxes, scores, labels = (row[keep] for row in rows[:3])
    if case["family"] != "ins":
        return Detections(boxes, scores, labels, kind="rotated" if case["family"] == "rot" else "horizontal")
    kernels, priors = rows[3][keep], rows[4][keep]
    masks = MaskKernels(kernels, priors, (MaskView(rows[5]),), np.zeros(len(boxes), np.int64))
    return Detections(boxes, scores, labels, kind="mask", masks=masks)


def check_golden(
    boxes: NDArray[Any], scores: NDArray[Any], labels: NDArray[Any], case: dict[str, Any], image: int
) -> NDArray[Any]:
    """Compare with an image's golden result (its rotated boxes are not le90); return our row of each golden row."""
    golden = case["results"][image]
    if case["family"] == "rot" and golden["num"]:
        regular = regularize_le90(golden["bboxes"]).tolist()
        golden = golden | {"bboxes": regular, "bbox_abs_sum": np.abs(boxes).sum()}
    found = Found(boxes.astype(np.float64), scores, labels)
    return check_found(found, golden, case["num_classes"], (case["name"], image))


class GoldenEngine(Engine):
    """Finds the raw candidates of one image of a golden case in whatever it is shown."""

    def __init__(self, case: dict[str, Any], image: int) -> None:
        """Make the spec of the case's published configuration."""
        self.found = golden_candidates(case, image)
        config = case["test_cfg"]
        super().__init__(
            make_spec(
                kind=self.found.kind,
                classes=tuple(f"class {label}" for label in range(case["num_classes"])),
                bands=("blue", "green", "red"),
                tile_size=max(case["img_metas"][image]["img_shape"]),
                score_threshold=config["score_thr"],
                iou_threshold=config["nms"]["iou_threshold"],
            )
        )

    def find(self, image: NDArray[np.uint8]) -> Detections:
        """See the class."""
        return self.found
