"""Masks from dynamic kernels: golden masks, an obvious double in torch, windows, and what must be noticed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_post import Found, cases_of, check_found, detect, raw_outputs

from rtmdet_geo.masks import (
    NUM_KERNEL_PARAMETERS,
    CroppedMask,
    MaskFrame,
    assemble_cropped_masks,
    assemble_detections,
    assemble_masks,
    input_frame,
    original_frame,
)
from rtmdet_geo.structures import Detections, MaskKernels, MaskView

pytestmark = pytest.mark.usefixtures("one_thread")


def decode_rle(rle: dict[str, Any]) -> np.ndarray:
    """Decode COCO's compressed run lengths (column-major, runs of 0 first) to (h, w) bool.

    Each number is a chain of 5-bit groups, lowest first, as characters from 48 on; bit 5 says that another follows, bit
    4 of the last one is the sign; from the third run on a number is the difference to the run before the last.
    """
    runs: list[int] = []
    value = shift = 0
    for character in rle["counts"].encode():
        group = character - 48
        value |= (group & 31) << shift
        shift += 5
        if group & 32:
            continue
        if group & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    height, width = rle["size"]
    flat = np.repeat(np.arange(len(runs)) % 2, runs).astype(bool)
    assert len(flat) == height * width
    return flat.reshape(width, height).T


def test_rle_by_hand() -> None:
    """Runs 1 2 1 2 3: '1', '2', then '1' as it is the third, then differences 0 and 2."""
    mask = decode_rle({"size": [3, 3], "counts": "12102"})
    assert mask.T.ravel().tolist() == [False, True, True, False, True, True, False, False, False]


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    union = np.count_nonzero(one | other)
    return np.count_nonzero(one & other) / union if union else 1.0


def golden_frame(found: Found, case: dict[str, Any], image: int) -> MaskFrame:
    """Return the frame that the reference gives masks in, its swapped factors included."""
    assert found.mask_features is not None
    if not case["rescale"]:
        return input_frame(found.mask_features)
    meta = case["img_metas"][image]
    scale_factor, shape = tuple(meta["scale_factor"]), tuple(meta["ori_shape"])
    return original_frame(found.mask_features, scale_factor, shape, axes="swapped")


def check_masks(masks: np.ndarray, golden: dict[str, Any], partners: np.ndarray, where: object) -> None:
    """Compare masks with the golden areas and run lengths; a partner is our row of a golden row."""
    if golden["num"]:
        assert list(masks.shape) == golden["mask_shape"], where
    areas = masks.sum(axis=(1, 2))[partners]
    tolerance = 2 + 1e-4 * np.asarray(golden["mask_areas"])[: len(partners)]
    assert (np.abs(areas - golden["mask_areas"][: len(partners)]) <= tolerance).all(), where
    for rle, row in zip(golden["mask_rle"], partners, strict=False):
        assert overlap(masks[row], decode_rle(rle)) >= 0.999, (where, row)


def test_oracle_post_instances(oracle_dir: Path) -> None:
    num_masks = 0
    for case in cases_of(oracle_dir, "post_ins.json", "ins"):
        outputs = raw_outputs(case)
        for image, golden in enumerate(case["results"]):
            where = (case["name"], image)
            found = detect(outputs, case, image)
            partners = check_found(found, golden, case["num_classes"], where)
            masks = assemble_masks(
                *found[3:],
                threshold=case["test_cfg"]["mask_thr_binary"],
                frame=golden_frame(found, case, image),
            )
            check_masks(masks, golden, partners, where)
            num_masks += len(golden["mask_rle"])
    assert num_masks


def test_oracle_post_instances_negative_controls(oracle_dir: Path) -> None:
    """Swapped coordinates, another reach, kernels of other rows, another threshold: each is seen."""
    case = next(case for case in cases_of(oracle_dir, "post_ins.json", "ins") if case["results"][0]["mask_rle"])
    golden = case["results"][0]
    found = detect(raw_outputs(case), case, 0)
    partners = check_found(found, golden, case["num_classes"], case["name"])
    frame = golden_frame(found, case, 0)
    kernels, priors, features = found[3:]
    check_masks(assemble_masks(kernels, priors, features, frame=frame), golden, partners, "right")
    transposed = kernels.copy()
    transposed[:, :80] = kernels[:, :80].reshape(-1, 8, 10).transpose(0, 2, 1).reshape(-1, 80)
    for wrong in (
        assemble_masks(kernels, priors[:, [1, 0, 2]], features, frame=frame),
        assemble_masks(kernels, priors * [1, 1, 2], features, frame=frame),
        assemble_masks(kernels[::-1], priors, features, frame=frame),
        assemble_masks(transposed, priors, features, frame=frame),
        assemble_masks(kernels, priors, features, frame=frame, threshold=0.9),
        assemble_masks(kernels, np.add(priors, [8, 0, 0]), features, frame=frame),
    ):
        with pytest.raises(AssertionError):
            check_masks(wrong, golden, partners, "wrong")


def obvious_masks(
    kernels: np.ndarray, priors: np.ndarray, features: np.ndarray, frame_sizes: list[tuple[int, int]]
) -> np.ndarray:
    """The same with torch's grouped convolutions and interpolate, step by step; returns logits."""
    number, (_, height, width) = len(kernels), features.shape
    y, x = torch.meshgrid(torch.arange(height) * 8.0, torch.arange(width) * 8.0, indexing="ij")
    reach = torch.from_numpy(priors[:, 2]) * 8
    coordinates = torch.stack(
        [
            (torch.from_numpy(priors[:, 0])[:, None, None] - x) / reach[:, None, None],
            (torch.from_numpy(priors[:, 1])[:, None, None] - y) / reach[:, None, None],
        ],
        dim=1,
    )
    inputs = torch.cat([coordinates, torch.from_numpy(features).expand(number, -1, -1, -1)], dim=1)
    weights = torch.from_numpy(kernels).split([80, 64, 8, 8, 8, 1], dim=1)
    values = inputs.reshape(1, -1, height, width)
    for layer, (outputs, channels) in enumerate(((8, 10), (8, 8), (1, 8))):
        weight = weights[layer].reshape(number * outputs, channels, 1, 1)
        values = torch.nn.functional.conv2d(values, weight, weights[3 + layer].flatten(), groups=number)
        values = values.relu() if layer < 2 else values
    for size in frame_sizes:
        values = torch.nn.functional.interpolate(values, size=size, mode="bilinear", align_corners=False)
    return values[0].numpy()


def make_instances(number: int, height: int, width: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return kernels, priors, features of random instances on a map of height x width cells."""
    generator = np.random.default_rng(seed)
    strides = generator.choice([8, 16, 32], number)
    cells = generator.random((number, 2)) * [[width, height]]
    points = np.floor(cells * 8 / strides[:, None]) * strides[:, None]
    return (
        (0.6 * generator.standard_normal((number, NUM_KERNEL_PARAMETERS))).astype(np.float32),
        np.column_stack([points, strides]).astype(np.float32),
        generator.standard_normal((8, height, width)).astype(np.float32),
    )


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 4), st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32), st.floats(0.05, 0.95))
def test_masks_equal_the_obvious_ones(number: int, height: int, width: int, seed: int, threshold: float) -> None:
    kernels, priors, features = make_instances(number, height, width, seed)
    masks = assemble_masks(kernels, priors, features, threshold=threshold)
    assert masks.shape == (number, 8 * height, 8 * width)
    if number:
        distance = obvious_masks(kernels, priors, features, [(8 * height, 8 * width)])
        distance -= math.log(threshold / (1 - threshold))
        is_clear = np.abs(distance) > 1e-3
        assert np.array_equal(masks[is_clear], (distance > 0)[is_clear])


@settings(deadline=None, max_examples=25)
@given(st.integers(3, 9), st.integers(3, 9), st.integers(0, 2**32), st.floats(0.3, 3), st.floats(0.3, 3))
def test_swapped_frame_is_the_reference_s(height: int, width: int, seed: int, factor_x: float, factor_y: float) -> None:
    """The reference multiplies the height by 1 / the factor of x, rounds up, interpolates again and cuts."""
    kernels, priors, features = make_instances(2, height, width, seed)
    original = (max(1, round(8 * height / factor_y) - 3), max(1, round(8 * width / factor_x) - 3))
    frame = original_frame(features, (factor_x, factor_y), original, axes="swapped")
    masks = assemble_masks(kernels, priors, features, frame=frame)
    sizes = [(8 * height, 8 * width), (math.ceil(8 * height * (1 / factor_x)), math.ceil(8 * width * (1 / factor_y)))]
    logits = obvious_masks(kernels, priors, features, sizes)[:, : original[0], : original[1]]
    assert masks.shape == logits.shape
    is_clear = np.abs(logits) > 2e-3
    assert np.array_equal(masks[is_clear], (logits > 0)[is_clear])


def disc(height: int, width: int, x: float, y: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return kernels, priors, features whose one mask is a diamond |dx| + |dy| < 24 px around x, y.

    First layer: relu of +dx, -dx, +dy, -dy in strides of 8 px x 8; second: as it is; third: 3 / 8 minus their sum.
    """
    kernel = np.zeros(NUM_KERNEL_PARAMETERS, np.float32)
    first, second = kernel[:80].reshape(8, 10), kernel[80:144].reshape(8, 8)
    first[0, 0], first[1, 0], first[2, 1], first[3, 1] = 1, -1, 1, -1
    second[[0, 1, 2, 3], [0, 1, 2, 3]] = 1
    kernel[144:148] = -1
    kernel[-1] = 3 / 8
    return kernel[None], np.array([[x, y, 8]], np.float32), np.zeros((8, height, width), np.float32)


def test_worked_mask() -> None:
    """A diamond around the prior: in the input, and in an original of twice the height and four times the width.

    The value at a cell belongs to its top left corner in coordinates and to its centre in interpolation: that half cell
    of 4 px is the reference's.
    """
    parts = disc(16, 16, 64, 48)
    mask = assemble_masks(*parts)[0]
    rows, columns = np.nonzero(mask)
    assert (rows.min() + rows.max() + 1) / 2 == pytest.approx(48 + 4, abs=0.6)
    assert (columns.min() + columns.max() + 1) / 2 == pytest.approx(64 + 4, abs=0.6)
    assert mask.sum() == pytest.approx(2 * 24 * 24, rel=0.08)
    frame = original_frame(parts[2], (0.25, 0.5), (256, 512))
    assert frame == MaskFrame(256, 512, 0.25, 0.5)
    larger = assemble_masks(*parts, frame=frame)[0]
    assert larger.shape == (256, 512)
    rows, columns = np.nonzero(larger)
    assert (rows.min() + rows.max() + 1) / 2 == pytest.approx(2 * 52, abs=1)
    assert (columns.min() + columns.max() + 1) / 2 == pytest.approx(4 * 68, abs=2)
    assert larger.sum() == pytest.approx(8 * 2 * 24 * 24, rel=0.01)
    swapped = assemble_masks(*parts, frame=original_frame(parts[2], (0.25, 0.5), (256, 512), axes="swapped"))[0]
    assert swapped.shape == (256, 256)  # 4 x 128 rows cut to 256, 2 x 128 columns
    assert overlap(swapped, larger[:, :256]) < 0.5  # factors that are not swapped back would be seen


@settings(deadline=None, max_examples=40)
@given(
    st.integers(2, 12),
    st.integers(2, 12),
    st.integers(0, 2**32),
    st.one_of(st.none(), st.tuples(st.floats(0.2, 4), st.floats(0.2, 4))),
    st.floats(0, 0.6),
)
def test_a_cropped_mask_is_a_window_of_the_whole(
    height: int, width: int, seed: int, steps: tuple[float, float] | None, margin: float
) -> None:
    kernels, priors, features = make_instances(3, height, width, seed)
    frame = None
    if steps is not None:
        frame = MaskFrame(max(1, int(8 * height / steps[1])), max(1, int(8 * width / steps[0])), *steps)
    rows, columns = (frame or input_frame(features))[:2]
    generator = np.random.default_rng(seed)
    centres = generator.uniform(-0.3, 1.3, (3, 2)) * [columns, rows]
    sizes = generator.uniform(0.5, 0.8 * max(rows, columns), (3, 2))
    boxes = np.column_stack([centres, sizes, np.zeros(3)])
    whole = assemble_masks(kernels, priors, features, frame=frame)
    cropped = assemble_cropped_masks(kernels, priors, features, boxes, frame=frame, margin=margin)
    assert len(cropped) == 3
    for mask, full, (x, y, w, h, _) in zip(cropped, whole, boxes, strict=True):
        part = full[mask.y : mask.y + mask.mask.shape[0], mask.x : mask.x + mask.mask.shape[1]]
        assert mask.mask.dtype == np.uint8
        assert mask.mask.shape == part.shape  # inside the frame
        assert np.count_nonzero(mask.mask != part) <= 1 + 0.001 * part.size  # another order of the same sums
        inside = full[
            max(0, math.ceil(y - h / 2)) : max(0, int(y + h / 2)), max(0, math.ceil(x - w / 2)) : max(0, int(x + w / 2))
        ]
        assert mask.mask.sum() + 1 + 0.001 * part.size >= inside.sum()  # the box's own pixels are all there


def test_cropping_follows_the_boxes() -> None:
    """Time and memory come from the boxes: small windows of a large frame, one cell of margin, cut at the edges."""
    kernels, priors, features = make_instances(2, 128, 128, 0)
    boxes = [[500.5, 600.5, 30, 20, 0], [2, 1020, 10, 10, 0]]
    first, second = assemble_cropped_masks(kernels, priors, features, boxes, margin=0)
    assert (first.x, first.y, first.mask.shape) == (477, 582, (37, 47))
    assert (second.x, second.y, second.mask.shape) == (0, 1007, (17, 15))
    wide = assemble_cropped_masks(kernels, priors, features, boxes, margin=1.0)[0]
    assert (wide.x, wide.y, wide.mask.shape) == (455, 560, (81, 91))
    away = assemble_cropped_masks(kernels, priors, features, [[-900, 50, 9, 9, 0], [50, 5000, 9, 9, 0]])
    assert [mask.mask.size for mask in away] == [0, 0]


def test_nothing_found_and_odd_inputs() -> None:
    features = np.zeros((8, 4, 6), np.float32)
    none = np.zeros((0, NUM_KERNEL_PARAMETERS), np.float32), np.zeros((0, 3), np.float32), features
    assert assemble_masks(*none).shape == (0, 32, 48)
    assert assemble_cropped_masks(*none, np.zeros((0, 5))) == []
    kernels, priors, _ = make_instances(1, 4, 6, 0)
    kernels[0, 0] = np.nan
    assert not assemble_masks(kernels, priors, features).any()
    for arguments, words in (
        ((kernels[:, :168], priors, features), "169"),
        ((kernels, priors[:, :2], features), "3"),
        ((kernels, priors, features[:7]), "8, h, w"),
        ((kernels, priors, features[:, :0]), "8, h, w"),
    ):
        with pytest.raises(ValueError, match=words):
            assemble_masks(*arguments)
    with pytest.raises(ValueError, match="outside"):
        assemble_masks(kernels, priors, features, threshold=1.0)
    with pytest.raises(ValueError, match="one box per kernel"):
        assemble_cropped_masks(kernels, priors, features, np.zeros((2, 5)))
    with pytest.raises(ValueError, match="finite"):
        assemble_cropped_masks(kernels, priors, features, [[0, 0, np.inf, 1, 0]])
    with pytest.raises(ValueError, match="positive"):
        original_frame(features, (0.0, 1.0), (10, 10))
    with pytest.raises(ValueError, match="axes"):
        original_frame(features, (1.0, 1.0), (10, 10), axes="other")  # type: ignore[arg-type]


def make_exact_instances(number: int, height: int, width: int, seed: int) -> tuple[np.ndarray, ...]:
    """As make_instances, with weights of -1, 0, 1 and dyadic numbers: sums are the same in any order, to the bit."""
    generator = np.random.default_rng(seed)
    _, priors, _ = make_instances(number, height, width, seed)
    kernels = generator.integers(-1, 2, (number, NUM_KERNEL_PARAMETERS)).astype(np.float32)
    return kernels, priors, generator.integers(-4, 5, (8, height, width)).astype(np.float32) / 4


def mirrored_instances(
    kernels: np.ndarray, priors: np.ndarray, features: np.ndarray, flip_x: bool, flip_y: bool
) -> tuple[np.ndarray, ...]:
    """Return instances whose logits are the mirror image: a cell's coordinates belong to its top left corner."""
    kernels, priors = kernels.copy(), priors.copy()
    for axis, (flip, size) in enumerate(((flip_x, features.shape[2]), (flip_y, features.shape[1]))):
        if flip:
            kernels[:, :80].reshape(-1, 8, 10)[:, :, axis] *= -1
            priors[:, axis] = 8 * (size - 1) - priors[:, axis]
            features = np.flip(features, 2 - axis)
    return kernels, priors, features


def as_detections(boxes: np.ndarray, *pictures: tuple[tuple[np.ndarray, ...], dict[str, Any]]) -> Detections:
    """Return the boxes once per picture, given as (kernels, priors, features) and options of its MaskView."""
    number = len(boxes)
    parts = [
        MaskKernels(kernels, priors, (MaskView(features, **options),), np.zeros(number, np.int64))
        for (kernels, priors, features), options in pictures
    ]
    count = len(parts) * number
    return Detections(
        np.concatenate([boxes] * len(parts)),
        np.ones(count),
        np.zeros(count),
        kind="mask",
        masks=MaskKernels.concatenate(parts),
    )


def view_options(step_x: float, step_y: float, flip_x: bool, flip_y: bool) -> dict[str, Any]:
    return {"step_x": step_x, "step_y": step_y, "flip_x": flip_x, "flip_y": flip_y}


def assert_same_masks(one: list[CroppedMask], other: list[CroppedMask]) -> None:
    assert len(one) == len(other)
    for mask, partner in zip(one, other, strict=True):
        assert (mask.x, mask.y) == (partner.x, partner.y)
        assert np.array_equal(mask.mask, partner.mask)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(2, 9),
    st.integers(2, 9),
    st.integers(0, 2**32),
    st.sampled_from([(1.0, 1.0), (2.0, 2.0), (0.5, 1.0), (2.0, 0.5)]),
)
def test_masks_of_mirrored_pictures_are_mirrored_back(
    height: int, width: int, seed: int, steps: tuple[float, float]
) -> None:
    """The same instances in a picture and its three mirror images, in one Detections: equal to the pixel."""
    exact = make_exact_instances(3, height, width, seed)
    rows, columns = int(8 * height / steps[1]), int(8 * width / steps[0])
    generator = np.random.default_rng(seed)
    centres = generator.uniform(-0.2, 1.2, (3, 2)) * [columns, rows]
    turned = np.column_stack([centres, generator.uniform(1, 60, (3, 2)), generator.uniform(-1.5, 1.5, 3)])
    boxes = turned.astype(np.float32)
    flips = [(False, False), (True, False), (False, True), (True, True)]
    pictures = [(mirrored_instances(*exact, *flip), view_options(*steps, *flip)) for flip in flips]
    detections = as_detections(boxes, *pictures)
    plain = assemble_cropped_masks(*exact, boxes, frame=MaskFrame(rows, columns, *steps))
    masks = assemble_detections(detections, rows, columns)
    assert_same_masks(masks, plain * len(flips))
    order = generator.permutation(len(detections))
    assert_same_masks(assemble_detections(detections.select(order), rows, columns), [masks[row] for row in order])


def test_masks_of_detections_by_hand_and_negative_controls() -> None:
    """A diamond around x 44, y 52 of a tile of 128 x 96 px, left of the middle, seen in the mirrored tile."""
    kernels, priors, features = disc(12, 16, 40, 48)
    mirrored = mirrored_instances(kernels, priors, features, True, False)
    box = np.array([[44, 52, 48, 48, 0]], np.float32)
    (mask,) = assemble_detections(as_detections(box, (mirrored, {"flip_x": True})), 96, 128)
    columns = np.flatnonzero(mask.mask.any(axis=0)) + mask.x
    assert (columns[0] + columns[-1] + 1) / 2 == pytest.approx(44, abs=0.6)
    (plain,) = assemble_cropped_masks(kernels, priors, features, box)
    assert_same_masks([mask], [plain])
    for options, size in (
        ({}, (96, 128)),
        ({"flip_x": True, "flip_y": True}, (96, 128)),
        ({"flip_x": True}, (96, 120)),
    ):
        (wrong,) = assemble_detections(as_detections(box, (mirrored, options)), *size)
        assert (wrong.x, wrong.y, wrong.mask.tolist()) != (plain.x, plain.y, plain.mask.tolist())
    strict = assemble_detections(as_detections(box, (mirrored, {"flip_x": True})), 96, 128, threshold=0.55)
    assert 0 < strict[0].mask.sum() < mask.mask.sum()
    assert assemble_detections(Detections.empty(kind="mask"), 96, 128) == []
    for wrong_input in (
        Detections(box, np.ones(1), np.zeros(1), kind="mask"),
        Detections(box, np.ones(1), np.zeros(1), "scene", "mask", np.array([None], object)),
    ):
        with pytest.raises(ValueError, match="mask kernels"):
            assemble_detections(wrong_input, 96, 128)
