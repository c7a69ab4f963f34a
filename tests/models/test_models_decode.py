"""Priors, coder, top-K and the whole post-processing against the reference; the exported graph against torch."""

from __future__ import annotations

import importlib
import json
import math
import warnings

import numpy as np
import pytest
import recipes
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rtmdet_geo.models import RotatedOutputs, rtmdet_r_test
from rtmdet_geo.models.decode import (
    MAX_TOP_K,
    DetectionGraph,
    decode_dense,
    decode_distances,
    decode_rotated,
    encode_distances,
    level_priors,
    priors_with_stride,
    select_top_k,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def ops(oracle_dir):
    return json.loads((oracle_dir / "ops.json").read_text())


def tensor(values, dtype=torch.float32):
    return torch.tensor(values, dtype=dtype)


def test_oracle_coder(ops):
    coders = ops["coders"]
    points, boxes, distances = (tensor(coders[key]) for key in ("points", "rboxes", "distances"))
    close = {"rtol": 0, "atol": 1e-4}
    torch.testing.assert_close(encode_distances(points, boxes), tensor(coders["rbox_encode"]), **close)
    limited = coders["rbox_encode_max_dis"]
    ours = encode_distances(points, boxes, max_distance=limited["max_dis"], eps=limited["eps"])
    torch.testing.assert_close(ours, tensor(limited["out"]), **close)
    torch.testing.assert_close(decode_distances(points, distances), tensor(coders["rbox_decode"]), **close)
    unclipped = tensor(coders["rbox_decode_max_shape"]["out"])
    torch.testing.assert_close(decode_distances(points, distances), unclipped, **close)


def test_oracle_priors(ops):
    golden = ops["priors"]
    assert golden["offset"] == 0
    ours = priors_with_stride([tuple(size) for size in golden["featmap_sizes"]], golden["strides"])
    assert len(ours) == len(golden["priors_with_stride"])
    for one, other in zip(ours, golden["priors_with_stride"], strict=True):
        assert torch.equal(one, tensor(other))
    height, width = golden["featmap_sizes"][-1]
    half = level_priors(height, width, golden["strides"][-1], offset=0.5)
    assert torch.equal(half, tensor(golden["offset_half"]))


def test_worked_decode():
    """Angle pi/2: the box's right is down, so right 6 against left 2 moves the centre 2 px down."""
    box = decode_distances(tensor([[16.0, 8.0]]), tensor([[2.0, 1.0, 6.0, 3.0, math.pi / 2 - 1e-4]]))
    np.testing.assert_allclose(box, [[15, 10, 8, 4, math.pi / 2 - 1e-4]], atol=1e-3)
    turned = decode_distances(tensor([[16.0, 8.0]]), tensor([[2.0, 1.0, 6.0, 3.0, math.pi]]))
    np.testing.assert_allclose(turned, [[14, 7, 8, 4, 0]], atol=1e-5)  # offset by the unwrapped angle, angle wrapped
    thin = decode_distances(tensor([[0.0, 0.0]]), tensor([[-3.0, 5.0, 1.0, 5.0, 0.0]]))
    np.testing.assert_allclose(thin, [[2, 0, -2, 10, 0]], atol=1e-5)  # no swap, no clamp


@settings(deadline=None, max_examples=60)
@given(
    st.tuples(st.floats(-200, 200), st.floats(-200, 200)),
    st.tuples(
        st.floats(-200, 200), st.floats(-200, 200), st.floats(0.5, 300), st.floats(0.5, 300), st.floats(-1.5, 1.5)
    ),
)
def test_decode_inverts_encode(point, values):
    points, boxes = tensor([point], torch.float64), tensor([values], torch.float64)
    back = decode_distances(points, encode_distances(points, boxes))
    torch.testing.assert_close(back, boxes, rtol=0, atol=1e-9)


def test_top_k_by_hand():
    logits = tensor([[[0.0, 3.0], [2.0, 1.0], [-1.0, 2.5]]])  # 3 priors, 2 classes
    pairs = select_top_k(logits, 4)
    assert pairs.priors.tolist() == [[0, 2, 1, 1]]
    assert pairs.labels.tolist() == [[1, 1, 0, 1]]
    torch.testing.assert_close(pairs.scores, tensor([[3.0, 2.5, 2.0, 1.0]]).sigmoid())
    single = select_top_k(logits, 4, multi_label=False)
    assert single.priors.tolist() == [[0, 2, 1]]
    assert single.labels.tolist() == [[1, 1, 0]]
    assert select_top_k(logits, 100).scores.shape == (1, 6)


def raw_outputs(recipes_by_name):
    """Return RotatedOutputs from tensor recipes named cls.0, reg.0, angle.0, ..."""
    levels = sorted({int(name.split(".")[1]) for name in recipes_by_name})
    return RotatedOutputs(
        *(
            [torch.from_numpy(recipes.realise(recipes_by_name[f"{field}.{level}"])) for level in levels]
            for field in RotatedOutputs._fields
        )
    )


def detect(outputs, case, image):
    """The reference's post-processing from our parts: candidates, threshold, rescale, min size, NMS, limit."""
    boxes_module = importlib.import_module("rtmdet_geo.boxes")
    nms_module = importlib.import_module("rtmdet_geo.nms")
    config = case["test_cfg"]
    candidates = decode_rotated(outputs, limit=config["nms_pre"])
    boxes, scores, labels = (part[image].numpy() for part in candidates)
    keep = scores > config["score_thr"]
    boxes, scores, labels = boxes[keep].astype(np.float64), scores[keep], labels[keep]
    if case["rescale"]:
        scale_x, scale_y = case["img_metas"][image]["scale_factor"]
        boxes = boxes_module.rescale_boxes(boxes, 1 / scale_x, 1 / scale_y, follow="h")  # as the reference
    keep = (boxes[:, 2] > config["min_bbox_size"]) & (boxes[:, 3] > config["min_bbox_size"])
    boxes, scores, labels = boxes[keep], scores[keep], labels[keep]
    kept = nms_module.nms_rotated(boxes, scores, labels, iou_threshold=config["nms"]["iou_threshold"])
    kept = kept[: config["max_per_img"]]
    return boxes[kept], scores[kept], labels[kept]


def ordered(boxes, scores, labels):
    index = np.lexsort((*np.round(np.asarray(boxes).reshape(-1, 5), 2).T, -np.round(np.asarray(scores), 6)))
    return np.asarray(boxes).reshape(-1, 5)[index], np.asarray(scores)[index], np.asarray(labels)[index]


def test_oracle_post_rotated(oracle_dir):
    cases = [case for case in json.loads((oracle_dir / "post.json").read_text())["cases"] if case["family"] == "rot"]
    assert cases
    for case in cases:
        outputs = raw_outputs(case["raw"])
        for image, golden in enumerate(case["results"]):
            where = (case["name"], image)
            boxes, scores, labels = detect(outputs, case, image)
            assert len(boxes) == golden["num"], where
            assert np.bincount(labels, minlength=case["num_classes"]).tolist() == golden["label_hist"], where
            assert scores.sum(dtype=np.float64) == pytest.approx(golden["score_sum"], rel=1e-5), where
            assert np.abs(boxes).sum() == pytest.approx(golden["bbox_abs_sum"], rel=1e-5), where
            number = len(golden["scores"])
            ours = ordered(boxes[:number], scores[:number], labels[:number])
            theirs = ordered(golden["bboxes"], golden["scores"], golden["labels"])
            np.testing.assert_allclose(ours[1], theirs[1], atol=1e-6, err_msg=str(where))
            np.testing.assert_array_equal(ours[2], theirs[2], err_msg=str(where))
            np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5, atol=1e-3, err_msg=str(where))


def test_candidates_are_the_decoded_priors():
    """Top-K then decode equals decode then look-up; levels come in order; gradients flow through decode_dense."""
    torch.manual_seed(0)
    model = rtmdet_r_test(num_classes=3).eval()
    outputs = model(torch.randn(2, 3, 64, 96))
    logits, boxes = decode_dense(outputs)
    assert logits.shape == (2, 8 * 12 + 4 * 6 + 2 * 3, 3)
    assert boxes.shape == (2, 8 * 12 + 4 * 6 + 2 * 3, 5)
    boxes.sum().backward()
    candidates = decode_rotated(outputs, limit=50)
    assert candidates.boxes.shape == (2, 50 + 50 + 18, 5)
    assert candidates.labels.dtype == torch.int64
    first = select_top_k(logits[:, : 8 * 12], 50)
    for image in range(2):
        torch.testing.assert_close(candidates.boxes[image, :50], boxes[image, first.priors[image]])
    assert (candidates.scores[:, :49] >= candidates.scores[:, 1:50]).all()


def test_exported_graph_equals_torch(tmp_path):
    """Opset 17, dynamic batch, standard operators only, TopK within TensorRT's limit."""
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = rtmdet_r_test(num_classes=3)
    with torch.no_grad():
        for module in model.bbox_head.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.weight.mul_(30)  # spread the outputs
        model(torch.randn(4, 3, 64, 64))
    graph = DetectionGraph(model.eval(), (100.0, 110.0, 120.0), (55.0, 56.0, 57.0), limit=70).eval()
    images = torch.randint(0, 256, (3, 3, 64, 96), dtype=torch.uint8)
    path = tmp_path / "graph.onnx"
    names = ["boxes", "scores", "labels"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns of its own internals
        torch.onnx.export(
            graph,
            (images[:2],),
            path,
            input_names=["images"],
            output_names=names,
            dynamic_axes={name: {0: "batch"} for name in ["images", *names]},
            opset_version=17,
            dynamo=False,
        )
    proto = onnx.load(path)
    assert {node.domain for node in proto.graph.node} == {""}
    operators = [node.op_type for node in proto.graph.node]
    assert operators.count("TopK") == 3
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    constants |= {
        node.output[0]: onnx.numpy_helper.to_array(node.attribute[0].t)
        for node in proto.graph.node
        if node.op_type == "Constant"
    }
    limits = [constants[node.input[1]] for node in proto.graph.node if node.op_type == "TopK"]
    assert max(int(limit.item()) for limit in limits) <= MAX_TOP_K  # and constant, as TensorRT wants
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (images, images[:1]):
        with torch.inference_mode():
            ours = graph(batch)
        theirs = session.run(names, {"images": batch.numpy()})
        np.testing.assert_allclose(theirs[1], ours.scores, atol=1e-5)
        assert theirs[2].dtype == np.int64
        for image in range(len(batch)):
            ours_set = np.column_stack((ours.labels[image], ours.boxes[image]))
            theirs_set = np.column_stack((theirs[2][image], theirs[0][image]))
            # near ties may swap places: every one of ours has a partner
            gaps = np.abs(ours_set[:, None] - theirs_set[None]).max(axis=2).min(axis=1)
            assert np.quantile(gaps, 0.98) < 1e-3
