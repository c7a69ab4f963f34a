"""NMS in torch keeps what the pipeline's NMS keeps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rtmdet_geo.models.nms_torch import nms_rotated_batch
from rtmdet_geo.nms import nms_horizontal, nms_rotated, rotated_iou

pytestmark = pytest.mark.usefixtures("one_thread")

Rows = tuple[np.ndarray, np.ndarray, np.ndarray]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def draw_rows(seed: int, images: int, number: int, *, crowd: float, offset: float = 0.0, classes: int = 2) -> Rows:
    """Return boxes (N, K, 5), scores and labels; near duplicates, equal angles and equal scores among them."""
    generator = np.random.default_rng(seed)
    boxes = np.empty((images, number, 5), np.float32)
    boxes[..., :2] = generator.uniform(0, crowd, (images, number, 2)) + offset
    boxes[..., 2:4] = generator.uniform(1, 40, (images, number, 2))
    boxes[..., 4] = generator.choice([0, -np.pi / 2, 0.3, 1.2, 1e-6], (images, number))
    repeated = generator.random((images, number)) < 0.3
    boxes[repeated] = boxes[:, ::-1][repeated]
    scores = np.round(generator.random((images, number)), 2).astype(np.float32)
    return boxes, scores, generator.integers(0, classes, (images, number))


def keep(rows: Rows, score_threshold: float, iou_threshold: float, **options: object) -> np.ndarray:
    tensors = [torch.from_numpy(part) for part in rows]
    kept = nms_rotated_batch(*tensors, score_threshold=score_threshold, iou_threshold=iou_threshold, **options)
    return kept.numpy()


def expected(rows: Rows, score_threshold: float, iou_threshold: float) -> np.ndarray:
    """Return what nms_rotated keeps, image by image."""
    kept = np.zeros(rows[1].shape, bool)
    for image, (boxes, scores, labels) in enumerate(zip(*rows, strict=True)):
        chosen = np.flatnonzero((scores >= score_threshold) & (boxes[:, 2:4] > 0).all(axis=1))
        order = nms_rotated(boxes[chosen], scores[chosen], labels[chosen], iou_threshold=iou_threshold)
        kept[image, chosen[order]] = True
    return kept


def is_decided(rows: Rows, iou_threshold: float) -> bool:
    """Say whether no IoU is so near to the threshold that rounding decides."""
    return all((np.abs(rotated_iou(boxes, boxes) - iou_threshold) > 1e-6).all() for boxes in rows[0])


def test_by_hand():
    """The second overlaps the first by 3 / 5, the third the second by 3 / 5 and the first by 2 / 6."""
    boxes = np.array([[[0, 0, 4, 2, 0], [1, 0, 4, 2, 0], [2, 0, 4, 2, 0], [2, 0, 4, 2, 0]]], np.float32)
    scores, labels = np.array([[0.9, 0.8, 0.7, 0.6]], np.float32), np.array([[0, 0, 0, 1]])
    rows = (boxes, scores, labels)
    assert keep(rows, 0.0, 0.5).tolist() == [[True, False, True, True]]  # what is suppressed does not suppress
    assert keep(rows, 0.0, 0.3).tolist() == [[True, False, False, True]]
    assert keep(rows, 0.85, 0.3).tolist() == [[True, False, False, False]]
    assert keep(rows, 0.0, 0.7).tolist() == [[True, True, True, True]]
    assert keep(rows, 0.0, 0.0).tolist() == [[True, False, False, True]]
    turned = (boxes[:, ::-1].copy(), scores[:, ::-1].copy(), labels[:, ::-1].copy())
    assert keep(turned, 0.0, 0.5).tolist() == [[True, True, False, True]]


def test_chain_that_alternates():
    """Each box suppresses its neighbour alone: every second one stays, however long the chain is."""
    number = 101
    boxes = np.zeros((1, number, 5), np.float32)
    boxes[0, :, 0], boxes[0, :, 2:4] = np.arange(number) * 3, (4, 2)
    rows = (boxes, np.linspace(0.9, 0.1, number, dtype=np.float32)[None], np.zeros((1, number), np.int64))
    assert keep(rows, 0.0, 0.1)[0].tolist() == [index % 2 == 0 for index in range(number)]


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**31),
    st.integers(1, 3),
    st.integers(1, 60),
    st.sampled_from([20.0, 100.0]),
    st.sampled_from([0.0, 1e5]),
    st.sampled_from([0.0, 0.05, 0.4]),
    st.floats(0.01, 0.95),
    st.sampled_from([50, 10**6]),
)
def test_keeps_what_the_pipeline_keeps(seed, images, number, crowd, offset, score, iou, pairs_at_once):
    rows = draw_rows(seed, images, number, crowd=crowd, offset=offset)
    found = keep(rows, score, iou, pairs_at_once=pairs_at_once)
    if is_decided(rows, iou):
        np.testing.assert_array_equal(found, expected(rows, score, iou))


def test_many_boxes():
    rows = draw_rows(1, 2, 1200, crowd=200.0)
    for iou in (0.0, 0.1, 0.5):
        found = keep(rows, 0.05, iou)
        np.testing.assert_array_equal(found, expected(rows, 0.05, iou))
        assert 0 < found.sum() < found.size
    assert not np.array_equal(keep(rows, 0.05, 0.1), keep(rows, 0.05, 0.12))  # the threshold matters


def test_images_do_not_touch_each_other():
    rows = draw_rows(2, 4, 80, crowd=30.0)
    together = keep(rows, 0.0, 0.2)
    for image in range(4):
        alone = keep(tuple(part[image : image + 1] for part in rows), 0.0, 0.2)
        np.testing.assert_array_equal(together[image], alone[0])


def test_rows_that_are_no_boxes():
    boxes = np.array([[[np.nan, 0, 4, 2, 0], [0, 0, -4, 2, 0], [0, 0, 4, 0, 0], [0, 0, 4, 2, 0], [0, 0, 4, 2, np.inf]]])
    rows = (boxes.astype(np.float32), np.full((1, 5), 0.5, np.float32), np.zeros((1, 5), np.float32))
    assert keep(rows, 0.3, 0.5).tolist() == [[False, False, False, True, False]]
    assert keep(rows, 0.6, 0.5).tolist() == [[False] * 5]
    nothing = tuple(part[:, :0] for part in rows)
    assert keep(nothing, 0.3, 0.5).shape == (1, 0)


def test_horizontal_boxes_touch_the_threshold_unharmed():
    """IoU 1 / 3 exactly: > it does not suppress, >= it does."""
    boxes = np.array([[[2, 1, 4, 2, 0], [4, 1, 4, 2, 0]]], np.float32)
    rows = (boxes, np.array([[0.9, 0.8]], np.float32), np.zeros((1, 2), np.int64))
    threshold = 1 / 3
    assert keep(rows, 0.0, threshold, is_strict=True).tolist() == [[True, True]]
    assert keep(rows, 0.0, threshold).tolist() == [[True, False]]
    corners = [[0, 0, 4, 2], [2, 0, 6, 2]]
    assert nms_horizontal(corners, [0.9, 0.8], iou_threshold=threshold).tolist() == [0, 1]
    assert keep(rows, 0.0, 0.0, is_strict=True).tolist() == [[True, False]]


@pytest.mark.parametrize(
    "shapes,iou,words",
    [
        (((1, 3, 4), (1, 3), (1, 3)), 0.5, r"\(N, K, 5\)"),
        (((1, 3, 5), (1, 2), (1, 3)), 0.5, r"\(1, 2\)"),
        (((3, 5), (3,), (3,)), 0.5, r"\(N, K, 5\)"),
        (((1, 3, 5), (1, 3), (1, 3)), 1.5, "outside"),
    ],
)
def test_wrong_arguments(shapes, iou, words):
    with pytest.raises(ValueError, match=words):
        keep(tuple(np.zeros(shape, np.float32) for shape in shapes), 0.3, iou)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("iou", [0.1, 0.5])
def test_gpu_equals_cpu(iou):
    rows = draw_rows(3, 8, 1500, crowd=300.0)
    tensors = [torch.from_numpy(part).cuda() for part in rows]
    found = nms_rotated_batch(*tensors, score_threshold=0.05, iou_threshold=iou)
    assert found.device.type == "cuda"
    np.testing.assert_array_equal(found.cpu().numpy(), expected(rows, 0.05, iou))
