"""The engines of model files: what they accept, and how rows become Detections."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from synthetic import make_spec, small_model

from rtmdet_geo.backends import BACKEND_NAMES, Backend, open_backend, require_package
from rtmdet_geo.backends.contract import OUTPUTS, RowsBackend, rows_per_level, rows_to_detections
from rtmdet_geo.errors import ConfigError, MissingDependencyError, ModelFileError, SaturatedTileWarning
from rtmdet_geo.export import make_check_tiles
from rtmdet_geo.structures import Kind

ENGINES = [
    "onnxruntime",
    pytest.param(
        "openvino",
        marks=pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is not installed"),
    ),
]


@pytest.fixture(params=ENGINES)
def opened(request: pytest.FixtureRequest) -> Callable[..., RowsBackend]:
    """Open model files, with each engine that runs them."""
    return partial(open_backend, name=request.param)


def write_model(
    path: Path,
    *,
    input_type: int = TensorProto.UINT8,
    input_name: str = "images",
    channels: int = 3,
    outputs: tuple[str, ...] = ("boxes", "scores", "labels"),
    metadata: dict[str, str] | None = None,
    rows: np.ndarray | None = None,
    box_numbers: int = 5,
) -> Path:
    """Write a graph by the contract that answers the same rows (K, 7: box, score, label) to every image."""
    rows = np.zeros((1, 7), np.float32) if rows is None else np.asarray(rows, np.float32)
    columns = {"boxes": rows[:, :box_numbers], "scores": rows[:, 5], "labels": rows[:, 6]}
    nodes = [
        helper.make_node("Shape", [input_name], ["number"], start=0, end=1),
        helper.make_node("Constant", [], ["zero"], value_int=0),
    ]
    values = []
    for name in outputs:
        data = columns.get(name, rows[:, 5])[None]
        tail = list(data.shape[1:])
        nodes += [
            helper.make_node(
                "Constant", [], [f"{name}_data"], value=helper.make_tensor("", 1, data.shape, data.ravel())
            ),
            helper.make_node("Constant", [], [f"{name}_ones"], value_ints=[1] * len(tail)),
            helper.make_node("Concat", ["number", f"{name}_ones"], [f"{name}_repeats"], axis=0),
            helper.make_node("Tile", [f"{name}_data", f"{name}_repeats"], [name]),
        ]
        values.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *tail]))
    image = helper.make_tensor_value_info(input_name, input_type, ["batch", channels, "height", "width"])
    model = helper.make_model(
        helper.make_graph(nodes, "fixed", [image], values), opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    )
    helper.set_model_props(model, {"model_spec": make_spec().model_dump_json()} if metadata is None else metadata)
    onnx.save(model, path)
    return path


def image(number: int = 1, side: int = 256) -> np.ndarray:
    return np.zeros((number, 3, side, side), np.uint8)


def test_rows_become_detections_by_hand(opened, tmp_path):
    rows = [
        [10, 20, 4, 30, 0.0, 0.9, 0],  # short side first: turned by a quarter
        [50, 60, 30, 4, 0.5, 0.8, 0],
        [50, 60, 30, 4, 0.5, 0.1, 0],  # below the threshold
        [70, 60, -3, 4, 0.5, 0.9, 0],  # negative width
        [70, 60, 3, 0, 0.5, 0.9, 0],  # no height
        [np.nan, 60, 3, 4, 0.5, 0.9, 0],
        [np.inf, 60, 3, 4, 0.5, 0.9, 0],
    ]
    backend = opened(write_model(tmp_path / "fixed.onnx", rows=np.array(rows)))
    first, second = backend.predict(image(2), score_threshold=0.3)
    np.testing.assert_allclose(first.boxes, [[10, 20, 30, 4, -np.pi / 2], [50, 60, 30, 4, 0.5]], atol=1e-6)
    np.testing.assert_allclose(first.scores, [0.9, 0.8])
    assert first.frame == "tile" and first.kind == "rotated" and first.labels.dtype == np.int64
    np.testing.assert_array_equal(first.boxes, second.boxes)


def test_score_equal_to_the_threshold_stays():
    arguments = {"score_threshold": 0.5, "multi_label": True, "kind": "rotated"}
    rows = (np.array([[5, 5, 4, 2, 0]], np.float32), np.array([0.5], np.float32), np.zeros(1))
    assert len(rows_to_detections(*rows, **arguments)) == 1


def test_one_label_a_prior_keeps_the_best_of_identical_boxes():
    box, other = [5, 5, 4, 2, 0.1], [5, 5, 4, 2, 0.1000001]
    boxes = np.array([box, other, box, box], np.float32)
    scores, labels = np.array([0.4, 0.7, 0.6, 0.5], np.float32), np.array([0, 1, 2, 3], np.float32)
    one = rows_to_detections(boxes, scores, labels, score_threshold=0.1, multi_label=False, kind="rotated")
    assert one.labels.tolist() == [1, 2]
    every = rows_to_detections(boxes, scores, labels, score_threshold=0.1, multi_label=True, kind="rotated")
    assert every.labels.tolist() == [1, 2, 3, 0]


def test_horizontal_boxes_are_not_turned():
    rows = (np.array([[5, 5, 2, 9, 0]], np.float32), np.array([0.5], np.float32), np.zeros(1))
    found = rows_to_detections(*rows, score_threshold=0.1, multi_label=False, kind="horizontal")
    np.testing.assert_array_equal(found.boxes, [[5, 5, 2, 9, 0]])


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 60), st.integers(1, 3), st.floats(0, 1), st.integers(0, 2**31))
def test_rows_property(number, num_classes, threshold, seed):
    generator = np.random.default_rng(seed)
    priors = generator.uniform(-5, 50, (number, 5)).astype(np.float32)
    boxes = np.repeat(priors, num_classes, axis=0)
    scores = generator.random(len(boxes), np.float32)
    labels = np.tile(np.arange(num_classes), number)
    order = generator.permutation(len(boxes))
    rows = (boxes[order], scores[order], labels[order])
    one = rows_to_detections(*rows, score_threshold=threshold, multi_label=False, kind="rotated")
    every = rows_to_detections(*rows, score_threshold=threshold, multi_label=True, kind="rotated")
    valid = (priors[:, 2:4] > 0).all(axis=1)
    best = scores.reshape(number, num_classes).max(axis=1, initial=0)
    assert len(one) == int((valid & (best >= threshold)).sum())
    assert len(every) == int((np.repeat(valid, num_classes) & (scores >= threshold)).sum())
    for found in (one, every):
        assert (np.diff(found.scores) <= 0).all() and (found.scores >= threshold).all()
        assert (found.boxes[:, 2] >= found.boxes[:, 3]).all()
        assert (np.abs(found.boxes[:, 4]) <= np.pi / 2 + 1e-6).all()


def instance_rows() -> tuple[np.ndarray, ...]:
    """Four rows of three priors (the first and the third row are of one), 64 px image."""
    boxes = np.array([[8, 8, 4, 6, 0], [16, 8, 4, 6, 0], [8, 8, 4, 6, 0], [8, 8, 4, 6, 0]], np.float32)
    scores, labels = np.array([0.9, 0.2, 0.8, 0.7], np.float32), np.array([1, 0, 0, 1], np.float32)
    kernels = np.repeat(np.arange(4, dtype=np.float32)[:, None], 169, axis=1)
    priors = np.array([[8, 8, 8], [16, 8, 8], [8, 8, 8], [0, 0, 32]], np.float32)
    return boxes, scores, labels, kernels, priors, np.ones((8, 8, 8), np.float32)


def test_instances_by_hand():
    """Kernels and priors of the rows that pass; one view, the picture itself; nothing that keeps a batch alive."""
    rows = instance_rows()
    every = rows_to_detections(*rows, score_threshold=0.3, multi_label=True, kind="mask")
    assert every.kind == "mask" and every.labels.tolist() == [1, 0, 1]
    assert every.masks.kernels[:, 0].tolist() == [0, 2, 3]
    np.testing.assert_array_equal(every.masks.priors, rows[4][[0, 2, 3]])
    (view,) = every.masks.views
    assert (view.step_x, view.step_y, view.flip_x, view.flip_y) == (1, 1, False, False)
    assert every.masks.view_index.tolist() == [0, 0, 0] and every.masks.view_index.dtype == np.int64
    np.testing.assert_array_equal(view.features, rows[5])
    for copied, original in ((view.features, rows[5]), (every.masks.kernels, rows[3]), (every.masks.priors, rows[4])):
        assert copied.base is None and not np.shares_memory(copied, original)


def test_instances_one_label_a_prior():
    """Identical boxes of two priors are two instances: their masks differ."""
    one = rows_to_detections(*instance_rows(), score_threshold=0.3, multi_label=False, kind="mask")
    assert one.labels.tolist() == [1, 1] and one.masks.kernels[:, 0].tolist() == [0, 3]


@pytest.mark.parametrize("kind", ["rotated", "horizontal", "mask"])
def test_nothing_above_the_threshold(kind):
    rows = instance_rows() if kind == "mask" else instance_rows()[:3]
    found = rows_to_detections(*rows, score_threshold=0.95, multi_label=False, kind=kind)
    assert len(found) == 0 and found.kind == kind and found.masks is None


def test_instances_need_their_kernels():
    with pytest.raises(ValueError, match="kernels"):
        rows_to_detections(*instance_rows()[:3], score_threshold=0.3, multi_label=False, kind="mask")


@pytest.mark.parametrize("kind", ["horizontal", "mask"])
def test_model_files_of_other_kinds_run(opened, kind):
    backend = opened(small_model(kind), threads=1)
    tiles = make_check_tiles(2, 3, 96, seed=2)
    found = backend.predict(tiles, score_threshold=0.2)
    raw = dict(zip(OUTPUTS[kind], backend.raw(tiles), strict=True))
    assert isinstance(backend, Backend) and len(found) == 2
    for image, detections in enumerate(found):
        assert detections.kind == kind and len(detections) > 3 and (detections.boxes[:, 4] == 0).all()
        assert (detections.boxes[:, 2] < detections.boxes[:, 3]).any()  # w lies along x, it is not the long side
        if kind == "mask":
            assert detections.masks.kernels.shape == (len(detections), 169)
            np.testing.assert_array_equal(detections.masks.views[0].features, raw["mask_features"][image])
    assert (found[0].masks is not None) == (kind == "mask")


def test_classifier_is_refused(opened):
    with pytest.raises(ModelFileError, match=r"small_classification\.onnx.*rtmdet-geo classify"):
        opened(small_model("classification"))


@pytest.mark.parametrize("kind,limit", [("rotated", 2000), ("mask", 1000), ("horizontal", 3840)])
def test_rows_per_level_formula(kind: Kind, limit: int):
    assert rows_per_level(kind, 2, 1024, 512) == [
        (min(128 * 64 * 2, limit), True),
        (min(64 * 32 * 2, limit), 64 * 32 * 2 > limit),
        (min(32 * 16 * 2, limit), 32 * 16 * 2 > limit),
    ]


def saturated_rows(last_score: float) -> np.ndarray:
    """K rows of a 512 px tile, one class: 2000 of 4096, 1024, 256; the cut level ends with ``last_score``."""
    rows = np.tile(np.array([[5, 5, 4, 2, 0, 0.01, 0]], np.float32), (2000 + 1024 + 256, 1))
    rows[:2000, 5] = np.linspace(0.9, last_score, 2000)
    return rows


def test_saturation_looks_at_the_cut_level_only(opened, tmp_path):
    path = write_model(tmp_path / "full.onnx", rows=saturated_rows(0.31))
    backend = opened(path)
    with pytest.warns(SaturatedTileWarning, match="2 of 2 images"):
        backend.predict(image(2, 512), score_threshold=0.3)
    assert backend.num_saturated == 2
    backend.predict(image(1, 512), score_threshold=0.32)
    assert backend.num_saturated == 2


def test_uncut_levels_never_saturate(opened, tmp_path):
    rows = np.tile(np.array([[5, 5, 4, 2, 0, 0.9, 0]], np.float32), (1024 + 256 + 64, 1))
    backend = opened(write_model(tmp_path / "all.onnx", rows=rows))
    backend.predict(image(1, 256), score_threshold=0.3)
    assert backend.num_saturated == 0


def test_run_is_lazy_and_in_order(opened):
    backend = opened(small_model(), threads=1)
    taken = []

    def batches():
        for number in (1, 3, 2):
            taken.append(number)
            yield image(number, 64)

    results = backend.run(batches(), score_threshold=0.0)
    assert taken == []
    assert len(next(results)) == 1 and taken == [1]
    assert [len(result) for result in results] == [3, 2]


def test_protocol_and_spec(opened):
    backend = opened(small_model())
    assert isinstance(backend, Backend) and backend.name in BACKEND_NAMES
    assert backend.spec.name == "small" and backend.fixed_tile_size is None


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"input_type": TensorProto.FLOAT}, "input 'images' uint8"),
        ({"input_name": "input"}, "input 'images' uint8"),
        ({"outputs": ("boxes", "scores")}, "output 'labels'"),
        ({"outputs": ("dets", "scores", "labels")}, r"output 'boxes' fp32 \(N, K, 5\)"),
        (
            {"metadata": {"model_spec": make_spec(kind="mask").model_dump_json()}},
            r"lacks output 'kernels' fp32 \(N, K, 169\); output 'mask_priors' fp32 \(N, K, 3\); "
            r"output 'mask_features' fp32 \(N, 8, H/8, W/8\);",
        ),
        (
            {"metadata": {"model_spec": make_spec(kind="classification").model_dump_json()}, "outputs": ("boxes",)},
            r"lacks output 'scores' fp32 \(N, classes\);",
        ),
        ({"box_numbers": 4}, r"lacks output 'boxes' fp32 \(N, K, 5\);"),
        ({"metadata": {}}, "metadata key 'model_spec'"),
        ({"metadata": {"model_spec": '{"name": 3}'}}, "invalid at name"),
        ({"channels": 4}, "4 channels"),
    ],
)
def test_foreign_files_are_told_what_they_lack(opened, tmp_path, changes, words):
    path = write_model(tmp_path / "foreign.onnx", **changes)
    with pytest.raises(ModelFileError, match=words) as caught:
        opened(path)
    assert "\n" not in str(caught.value) and "foreign.onnx" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x08:\xff\xff\xff\x7f"])
def test_corrupt_files(opened, tmp_path, content):
    path = tmp_path / "corrupt.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=r"corrupt\.onnx"):
        opened(path)


def test_truncated_and_missing_file(opened, tmp_path):
    path = tmp_path / "cut.onnx"
    data = small_model().read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelFileError, match="truncated"):
        opened(path)
    with pytest.raises(ModelFileError, match="not there"):
        opened(tmp_path / "nosuch.onnx")


def test_model_exported_by_others(opened, data_dir):
    with pytest.raises(ModelFileError, match=r"input 'images' uint8.*metadata key 'model_spec'"):
        opened(data_dir / "weights" / "rtmdet_nano_person.onnx")


@pytest.mark.parametrize(
    "batch,words",
    [
        (np.zeros((1, 3, 64, 64), np.float32), "uint8"),
        (np.zeros((1, 4, 64, 64), np.uint8), r"\(N, 3, H, W\)"),
        (np.zeros((3, 64, 64), np.uint8), r"\(N, 3, H, W\)"),
        (np.zeros((1, 3, 60, 64), np.uint8), "multiples of 32"),
    ],
)
def test_wrong_batches(opened, batch, words):
    with pytest.raises(ConfigError, match=words):
        opened(small_model()).predict(batch, score_threshold=0.3)


def test_wrong_names(opened):
    with pytest.raises(ConfigError, match="onnxruntime"):
        open_backend(small_model(), name="tensorflow")
    with pytest.raises(ConfigError, match="device"):
        opened(small_model(), device="tpu")
    with pytest.raises(ConfigError, match="threads"):
        opened(small_model(), threads=0)
    with pytest.raises(ConfigError, match="candidates"):
        opened(small_model(), candidates=5)


def test_missing_package_names_the_extra():
    with pytest.raises(MissingDependencyError, match=r"pip install 'rtmdet-geo\[tensorrt\]'"):
        require_package("no_such_package_here", extra="tensorrt")


def test_scores_that_are_no_numbers_are_an_error(opened, tmp_path):
    backend = opened(write_model(tmp_path / "nan.onnx", rows=[[1, 1, 2, 2, 0, np.nan, 0]]))
    with pytest.raises(ModelFileError, match="damaged"):
        backend.predict(image(), score_threshold=0.3)
