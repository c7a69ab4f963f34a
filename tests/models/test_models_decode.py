"""Priors, coder, top-K and the whole post-processing against the reference; the exported graph against torch."""

from __future__ import annotations

import json
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_post import cases_of, check_found, detect, raw_outputs

from rtmdet_geo.models import HorizontalOutputs, rtmdet_ins_test, rtmdet_r_test, rtmdet_test
from rtmdet_geo.models.decode import (
    DetectionGraph,
    decode_dense,
    decode_dense_horizontal,
    decode_distances,
    decode_horizontal,
    decode_instances,
    decode_rotated,
    decode_sides,
    encode_distances,
    encode_sides,
    level_priors,
    priors_with_stride,
    select_top_k,
)
from rtmdet_geo.variants import MAX_TOP_K

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


def test_oracle_coder_of_sides(ops):
    coders = ops["coders"]
    points, corners = tensor(coders["points"]), tensor(coders["hboxes"])
    distances = tensor(coders["distances"])[:, :4]
    close = {"rtol": 0, "atol": 1e-4}
    torch.testing.assert_close(encode_sides(points, corners), tensor(coders["hbox_encode"]), **close)
    torch.testing.assert_close(decode_sides(points, distances), tensor(coders["hbox_decode"]), **close)
    clipped = coders["hbox_decode_max_shape"]
    ours = decode_sides(points, distances, image_shape=tuple(clipped["max_shape"]))
    torch.testing.assert_close(ours, tensor(clipped["out"]), **close)
    wrong = decode_sides(points, distances, image_shape=tuple(reversed(clipped["max_shape"])))
    assert (wrong - ours).abs().max() > 1  # height and width the wrong way round would be seen
    limited = encode_sides(points, corners, max_distance=16.0)
    assert torch.equal(limited, encode_sides(points, corners).clamp(0, 15.9))


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
    pad_height, pad_width = golden["valid_flags"]["pad_shape"]
    for one, flags in zip(ours, golden["valid_flags"]["out"], strict=True):
        assert ((one[:, 0] < pad_width) & (one[:, 1] < pad_height)).tolist() == [bool(flag) for flag in flags]


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


@settings(deadline=None, max_examples=60)
@given(
    st.tuples(st.floats(-200, 200), st.floats(-200, 200)),
    st.tuples(st.floats(-200, 200), st.floats(-200, 200), st.floats(-200, 200), st.floats(-200, 200)),
    st.tuples(st.integers(1, 150), st.integers(1, 150)),
)
def test_sides_decode_inverts_encode_and_clipping_clips(point, values, shape):
    points, corners = tensor([point], torch.float64), tensor([values], torch.float64)
    distances = encode_sides(points, corners)
    torch.testing.assert_close(decode_sides(points, distances), corners, rtol=0, atol=1e-9)
    height, width = shape
    clipped = decode_sides(points, distances, image_shape=shape)
    expected = np.clip(corners.numpy(), 0, [[width, height, width, height]])
    np.testing.assert_allclose(clipped, expected, rtol=0, atol=1e-9)
    symbols = decode_sides(points, distances, image_shape=(torch.tensor(height), torch.tensor(width)))
    assert torch.equal(symbols, clipped)


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


@pytest.mark.parametrize("family", ["rot", "det"])
def test_oracle_post(oracle_dir, family):
    for case in cases_of(oracle_dir, "post.json", family):
        outputs = raw_outputs(case)
        for image, golden in enumerate(case["results"]):
            check_found(detect(outputs, case, image), golden, case["num_classes"], (case["name"], image))


def test_oracle_post_negative_controls(oracle_dir):
    """Swapped axes, boxes that are not clipped, another NMS threshold: each is seen."""
    case = max(cases_of(oracle_dir, "post.json", "det"), key=lambda case: case["results"][0]["num"])
    outputs = raw_outputs(case)

    def check(outputs, case):
        check_found(detect(outputs, case, 0), case["results"][0], case["num_classes"], case["name"])

    check(outputs, case)
    swapped = HorizontalOutputs(outputs.cls, [level[:, [1, 0, 3, 2]] for level in outputs.reg])
    meta = {**case["img_metas"][0], "img_shape": [10**6, 10**6]}
    stricter = {**case["test_cfg"], "nms": {"iou_threshold": 0.05}}
    for wrong_outputs, wrong_case in (
        (swapped, case),
        (outputs, {**case, "img_metas": [meta]}),
        (outputs, {**case, "test_cfg": stricter}),
    ):
        with pytest.raises(AssertionError):
            check(wrong_outputs, wrong_case)


@pytest.mark.parametrize("builder", [rtmdet_test, rtmdet_ins_test, rtmdet_r_test])
def test_candidates_are_the_decoded_priors(builder):
    """Top-K then decode equals decode then look-up; levels come in order; gradients flow through the dense boxes."""
    torch.manual_seed(0)
    model = builder(num_classes=3).eval()
    outputs = model(torch.randn(2, 3, 64, 96))
    is_rotated = model.kind == "rotated"
    logits, boxes = (decode_dense if is_rotated else decode_dense_horizontal)(outputs)
    assert logits.shape == (2, 8 * 12 + 4 * 6 + 2 * 3, 3)
    assert boxes.shape == (2, 8 * 12 + 4 * 6 + 2 * 3, 5 if is_rotated else 4)
    boxes.sum().backward()
    if is_rotated:
        candidates = decode_rotated(outputs, limit=50)
    else:
        decode = decode_instances if model.kind == "mask" else decode_horizontal
        candidates = decode(outputs, limit=50)
        boxes = boxes.clamp(min=0).minimum(tensor([96, 64, 96, 64]))
        low, high = boxes[..., :2], boxes[..., 2:]
        boxes = torch.cat(((low + high) / 2, high - low, torch.zeros_like(low[..., :1])), dim=-1)
    assert candidates.boxes.shape == (2, 50 + 50 + 18, 5)
    assert candidates.labels.dtype == torch.int64
    first = select_top_k(logits[:, : 8 * 12], 50)
    for image in range(2):
        torch.testing.assert_close(candidates.boxes[image, :50], boxes[image, first.priors[image]])
    assert (candidates.scores[:, :49] >= candidates.scores[:, 1:50]).all()


def test_instances_carry_their_own_kernels():
    """Every candidate's kernel is the one at its prior's cell, and boxes equal those of decode_horizontal."""
    torch.manual_seed(0)
    outputs = rtmdet_ins_test(num_classes=3).eval()(torch.randn(2, 3, 64, 96))
    for multi_label in (True, False):
        found = decode_instances(outputs, limit=20, multi_label=multi_label)
        plain = decode_horizontal(outputs, limit=20, multi_label=multi_label)
        for one, other in zip(found[:3], plain, strict=True):
            assert torch.equal(one, other)
        num_rows = found.scores.shape[1]
        assert found.kernels.shape == (2, num_rows, 169)
        assert found.mask_priors.shape == (2, num_rows, 3)
        assert torch.equal(found.mask_features, outputs.mask_features)
        for image in range(2):
            for row in range(num_rows):
                x, y, stride = found.mask_priors[image, row].int().tolist()
                level, label = (8, 16, 32).index(stride), found.labels[image, row]
                cell = image, slice(None), y // stride, x // stride
                assert torch.equal(found.kernels[image, row], outputs.kernel[level][cell])
                assert torch.equal(found.scores[image, row], outputs.cls[level][cell][label].sigmoid())


def test_oracle_rotated_candidates_are_unchanged(oracle_dir):
    """The graph of a rotated model decodes as decode_rotated does, to the bit."""
    case = cases_of(oracle_dir, "post.json", "rot")[0]
    outputs = raw_outputs(case)

    class Fixed(torch.nn.Module):
        kind = "rotated"

        def forward(self, images):
            return outputs

    graph = DetectionGraph(Fixed(), (0.0,), (1.0,))
    assert graph.limit == 2000
    for one, other in zip(graph(torch.zeros(1, 1, 8, 8)), decode_rotated(outputs), strict=True):
        assert torch.equal(one, other)


NAMES = {"horizontal": ["boxes", "scores", "labels"], "rotated": ["boxes", "scores", "labels"]}
NAMES["mask"] = [*NAMES["rotated"], "kernels", "mask_priors", "mask_features"]


@pytest.mark.parametrize("builder", [rtmdet_test, rtmdet_ins_test, rtmdet_r_test])
def test_exported_graph_equals_torch(tmp_path, builder):
    """Opset 17, dynamic batch, height and width, standard operators only, TopK within TensorRT's limit."""
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = builder(num_classes=3)
    with torch.no_grad():
        for module in model.bbox_head.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.weight.mul_(30)  # spread the outputs
        model(torch.randn(4, 3, 64, 64))
    graph = DetectionGraph(model.eval(), (100.0, 110.0, 120.0), (55.0, 56.0, 57.0), limit=18).eval()
    images = torch.randint(0, 256, (3, 3, 64, 96), dtype=torch.uint8)
    path = tmp_path / "graph.onnx"
    names = NAMES[model.kind]
    axes = {name: {0: "batch"} for name in ["images", *names]}
    for name in {"images", "mask_features"} & set(axes):
        axes[name] |= {2: "height", 3: "width"} if name == "images" else {2: "rows", 3: "columns"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns of its own internals
        torch.onnx.export(
            graph,
            (images[:2],),
            path,
            input_names=["images"],
            output_names=names,
            dynamic_axes=axes,
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
    larger = torch.randint(0, 256, (2, 3, 128, 160), dtype=torch.uint8)
    for batch in (images, images[:1], larger):
        with torch.inference_mode():
            ours = graph(batch)
        theirs = session.run(names, {"images": batch.numpy()})
        assert [one.shape for one in theirs] == [tuple(one.shape) for one in ours]
        np.testing.assert_allclose(theirs[1], ours.scores, atol=1e-5)
        assert theirs[2].dtype == np.int64
        if model.kind == "mask":
            np.testing.assert_allclose(theirs[5], ours.mask_features, rtol=1e-3, atol=1e-3)
        for image in range(len(batch)):
            rows = [np.column_stack([part[image] for part in (out[2], out[0], *out[3:5])]) for out in (ours, theirs)]
            # near ties may swap places: every one of ours has a partner
            gaps = np.abs(rows[0][:, None] - rows[1][None]).max(axis=2).min(axis=1)
            assert np.quantile(gaps, 0.98) < 1e-3
