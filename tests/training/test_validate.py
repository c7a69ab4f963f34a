"""Validation: images searched whole and in tiles, three protocols, several processes, images that do not decode."""

from __future__ import annotations

import logging
import math
import sys
import threading
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from engines import BRIGHT, RectangleEngine, draw_rectangles, scattered_boxes
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import make_spec, small_network

from rtmdet_geo.annotations.outlines import as_outline
from rtmdet_geo.backends import open_backend
from rtmdet_geo.boxes import boxes_to_hboxes, boxes_to_polygons
from rtmdet_geo.config import parse_recipe
from rtmdet_geo.errors import AnnotationError, MissingDependencyError
from rtmdet_geo.evaluation import rotated
from rtmdet_geo.evaluation.coco import FIGURES
from rtmdet_geo.evaluation.masks import mask_iou
from rtmdet_geo.evaluation.matching import best_matches
from rtmdet_geo.images import predict
from rtmdet_geo.masks import crop_outline
from rtmdet_geo.models import HorizontalOutputs, InstanceOutputs, RotatedOutputs, get_model
from rtmdet_geo.models.decode import encode_distances, encode_sides
from rtmdet_geo.models.weights import save_weights
from rtmdet_geo.nms import rotated_iou_aligned
from rtmdet_geo.structures import Detections
from rtmdet_geo.training import search, task
from rtmdet_geo.training.labelled import LabelledImage
from rtmdet_geo.training.processes import Processes
from rtmdet_geo.training.search import find_objects
from rtmdet_geo.training.task import make_spec as spec_of
from rtmdet_geo.training.validate import validate

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = {"rotated": "rtmdet_r_test", "horizontal": "rtmdet_test", "mask": "rtmdet_ins_test"}
SIDE = 256
#: Grey between one class and the next.
STEP = 30


class Seer(torch.nn.Module):
    """A network without parameters that finds bright rectangles, see :class:`engines.RectangleEngine`.

    What the second channel shows at the middle of a rectangle is its class, or that it is hidden: :func:`labelled`.
    """

    def __init__(self, kind, *, num_classes=1):
        super().__init__()
        self.kind, self.num_classes = kind, num_classes
        self.engine = RectangleEngine(make_spec(kind=kind, architecture=NAMES[kind]))
        self.batches = []

    def forward(self, images):
        self.batches.append(len(images))
        found = [self.engine.find(image.round().byte().numpy()) for image in images]
        number, _, height, width = images.shape
        outputs = {"cls": self.num_classes, "reg": 4, "angle": 1, "kernel": 169}
        grids = {
            name: [torch.zeros(number, size, height // s, width // s) for s in (8, 16, 32)]
            for name, size in outputs.items()
        }
        for level in grids["cls"]:
            level -= 20
        for level in grids["reg"]:
            level += 1
        for picture, detections in enumerate(found):
            for row, box in enumerate(torch.from_numpy(detections.boxes)):
                sign = float(images[picture, 1, int(box[1]), int(box[0])])
                if sign < 190:
                    continue
                label = min(round((BRIGHT - sign) / STEP), self.num_classes - 1)
                column, line = int(box[0]) // 8, int(box[1]) // 8
                point = torch.tensor([column * 8.0, line * 8.0])
                at = (picture, slice(None), line, column)
                if self.kind == "rotated":
                    distances = encode_distances(point, box)
                    grids["angle"][0][at] = distances[4:]
                else:
                    distances = encode_sides(point, torch.from_numpy(boxes_to_hboxes(box.numpy()[None]))[0])
                grids["reg"][0][at] = distances[:4].float()
                grids["cls"][0][picture, label, line, column] = 4 - row / 8
                if self.kind == "mask":
                    grids["kernel"][0][at] = torch.from_numpy(detections.masks.kernels[row])
        if self.kind == "rotated":
            return RotatedOutputs(grids["cls"], grids["reg"], grids["angle"])
        if self.kind == "horizontal":
            return HorizontalOutputs(grids["cls"], grids["reg"])
        features = torch.from_numpy(np.stack([item.masks.views[0].features for item in found]))
        return InstanceOutputs(grids["cls"], grids["reg"], grids["kernel"], features)


def labelled(kind, shape, seed, *, ignored=(), hidden=(), num_classes=1):
    """An image of bright rectangles with their labels, in the second channel less bright by class; some not found."""
    height, width = shape
    boxes = scattered_boxes(height, width, seed, kind=kind)
    pixels = draw_rectangles(height, width, boxes)
    for row, (x, y) in enumerate(boxes[:, :2].astype(int)):
        pixels[1, y - 4 : y + 5, x - 4 : x + 5] = 150 if row in hidden else BRIGHT - STEP * (row % num_classes)
    outlines = tuple(as_outline([[corners]]) for corners in boxes_to_polygons(boxes)) if kind == "mask" else ()
    labels = np.arange(len(boxes)) % num_classes
    is_ignored = np.isin(np.arange(len(boxes)), ignored)
    return LabelledImage(f"{seed}.png", f"{seed}", pixels, boxes, labels, is_ignored, outlines)


def recipe_of(kind, *, protocol="area", sampling="images", classes=("thing",), drop_bands=((),), **more):
    """A recipe that normalises nothing."""
    augment = {"sampling": "images", "image_size": SIDE} if sampling == "images" else {"sampling": "crops"}
    model = {"name": NAMES[kind], "classes": list(classes), "mean": [0, 0, 0], "std": [1, 1, 1], "tile_size": SIDE}
    if drop_bands != ((),):
        model["optional_bands"] = {"blue": 114}
    values = {"name": "toy", "model": model | {"overlap": 96}, "data": {"chips": "unused"}, "augment": augment}
    values["validation"] = {"protocol": protocol, "drop_bands": drop_bands, "iou_thresholds": (0.5, 0.75)}
    values["validation"] |= {
        key: more[key] for key in ("iou_thresholds", "max_detections", "score_threshold") if key in more
    }
    values["data"] |= {"on_bad_image": more.get("on_bad_image", "stop")}
    return parse_recipe(values | {"loop": {"workers": more.get("workers", 2)}})


SHAPES = [(200, 300), (300, 200), (256, 256), (97, 401)]


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_objects_of_whole_images_are_where_they_are_painted(kind, shape):
    """Shrunk and enlarged images of any ratio; rounding makes the two factors differ."""
    image = labelled(kind, shape, 3)
    found = find_objects(Seer(kind), image, recipe_of(kind))
    boxes = image.boxes_of(kind)
    order = np.argmin(np.abs(boxes[:, None, :2] - found.detections.boxes[None, :, :2]).sum(axis=2), axis=1)
    assert sorted(order) == list(range(len(boxes))) and found.detections.frame == "scene"
    seen = found.detections.boxes[order]
    assert rotated_iou_aligned(seen, boxes).min() > 0.85
    np.testing.assert_allclose(seen[:, :2], boxes[:, :2], atol=0.5)
    if kind == "mask":
        painted = [crop_outline(shape_, image.width, image.height) for shape_ in image.shapes]
        assert np.diag(mask_iou([found.masks[i] for i in order], painted)).min() > 0.6
    moved = boxes + np.array([6, 0, 0, 0, 0])
    assert rotated_iou_aligned(seen, moved).max() < 0.85  # a shift of 6 px would be seen


@pytest.mark.parametrize("kind", NAMES)
def test_whole_images_are_searched_as_predict_searches_them(kind, tmp_path):
    """The same weights find the same boxes and masks by the way of the library."""
    network = small_network(kind, num_classes=2)
    with torch.no_grad():
        for layer in network.bbox_head.rtm_cls:  # the second class nearly where the first is: several for one place
            layer.weight[1], layer.bias[1] = layer.weight[0], layer.bias[0] - 0.01
    image = labelled(kind, (200, 333), 1)
    best = find_objects(network, image, recipe_of(kind, classes=("a", "b"), max_detections=21)).detections.scores
    threshold = float(best[-1])
    recipe = recipe_of(kind, classes=("a", "b"), max_detections=20, score_threshold=threshold)
    found = find_objects(network, image, recipe)
    save_weights(network, tmp_path / "w.safetensors", spec_of(recipe), half=False)
    other = predict(
        open_backend(tmp_path / "w.safetensors", name="torch", threads=1),
        image.pixels.transpose(1, 2, 0),
        score_threshold=threshold,
        max_detections=20,
        resize="letterbox",
        multi_label=True,
    )
    assert len(other) == 20 and len(set(other.labels.tolist())) == 2
    np.testing.assert_allclose(found.detections.boxes, other.boxes, atol=1e-3)
    np.testing.assert_allclose(found.detections.scores, other.scores, atol=1e-6)
    np.testing.assert_array_equal(found.detections.labels, other.labels)
    for mine, theirs in zip(found.masks or [], other.masks or [], strict=True):
        np.testing.assert_array_equal(mine.mask, theirs.mask)
        assert (mine.x, mine.y) == (theirs.x, theirs.y)


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("protocol", ["area", "voc07", "coco"])
def test_everything_found_is_an_average_precision_of_one(kind, protocol):
    if kind == "rotated" and protocol == "coco":
        return  # refused by the recipe
    images = [labelled(kind, shape, seed, num_classes=2) for seed, shape in enumerate(SHAPES)]
    recipe = recipe_of(kind, protocol=protocol, classes=("even", "odd"))
    result = validate(Seer(kind, num_classes=2), images, recipe)
    measure = "mask AP50" if kind == "mask" else "AP50"
    assert result.figures[measure] > 0.9
    assert next(iter(result.figures)) == (measure.removesuffix("50") if protocol == "coco" else measure)
    images = [labelled(kind, shape, seed, num_classes=2, hidden=range(1, 99, 2)) for seed, shape in enumerate(SHAPES)]
    half = validate(Seer(kind, num_classes=2), images, recipe)
    by_class = {row["class"]: row["ap"] for row in half.rows if row["measure"] == measure}
    assert by_class["even"] > 0.9 and by_class["odd"] == 0
    assert half.figures[measure] == pytest.approx(by_class["even"] / 2)
    assert {curve.name for curve in half.curves} == {"even", "odd"}
    assert all(curve.measure == measure and curve.curve.num_objects for curve in half.curves)
    assert result.num_images == 4 and result.left_out == ()


def test_columns_and_figures():
    image = labelled("horizontal", (200, 300), 0)
    area = validate(Seer("horizontal"), [image], recipe_of("horizontal"))
    columns = ["bands", "class", "measure", "iou", "ap", "best_f1", "best_score", "num_objects"]
    assert [list(row) for row in area.rows] == [columns] * 2
    assert list(area.figures) == ["AP50", "AP75"]
    coco = validate(Seer("horizontal"), [image], recipe_of("horizontal", protocol="coco"))
    assert tuple(coco.figures) == FIGURES
    assert [row["measure"] for row in coco.rows] == ["AP", "AP50", "AP75"]
    assert math.isnan(coco.rows[0]["iou"]) and coco.rows[0]["ap"] == pytest.approx(coco.figures["AP"])
    masks = validate(Seer("mask"), [labelled("mask", (200, 300), 0)], recipe_of("mask", protocol="coco"))
    assert list(masks.figures) == [f"mask {name}" for name in FIGURES] + list(FIGURES)
    assert [row["measure"] for row in masks.rows] == ["mask AP", "mask AP50", "mask AP75"]
    assert all(value > 0.5 for name, value in masks.figures.items() if name in ("AP", "mask AP50"))


@pytest.mark.parametrize("kind", ["horizontal", "mask"])
def test_coco_takes_the_areas_that_the_file_states(kind):
    """All objects are small, but called medium; where nothing is stated, they are as large as they are."""
    image = labelled(kind, (256, 256), 2)
    prefix = "mask " if kind == "mask" else ""
    recipe = recipe_of(kind, protocol="coco")
    plain = validate(Seer(kind), [image], recipe).figures
    found = validate(Seer(kind), [replace(image, areas=np.full(len(image.boxes), 5000.0))], recipe).figures
    for figures, own, other in ((plain, "APs", "APm"), (found, "APm", "APs")):
        assert math.isnan(figures[prefix + other]) and not math.isnan(figures[prefix + own])
    assert found[f"{prefix}AP"] == plain[f"{prefix}AP"] > 0.5
    nothing = replace(image, areas=np.full(len(image.boxes), np.nan))
    assert validate(Seer(kind), [nothing], recipe).figures == pytest.approx(plain, nan_ok=True)


@pytest.mark.parametrize("protocol", ["area", "voc07", "coco"])
def test_ignored_objects_are_neither_hit_nor_miss(protocol):
    recipe = recipe_of("horizontal", protocol=protocol)
    for hidden in ((), (0, 3)):
        image = labelled("horizontal", (256, 256), 2, ignored=[0, 3], hidden=hidden)
        result = validate(Seer("horizontal"), [image], recipe)
        row = next(row for row in result.rows if row["measure"] == "AP50")
        assert row["num_objects"] == len(image.boxes) - 2 and row["ap"] == pytest.approx(1)
    plain = labelled("horizontal", (256, 256), 2, hidden=(0, 3))
    assert validate(Seer("horizontal"), [plain], recipe).figures["AP50"] < 0.95


def test_voc07_is_the_mean_of_eleven_points():
    image = labelled("rotated", (256, 256), 5, hidden=range(3, 99))  # 3 of them are seen
    number = len(image.boxes)
    result = {
        protocol: validate(Seer("rotated"), [image], recipe_of("rotated", protocol=protocol)).figures["AP50"]
        for protocol in ("area", "voc07")
    }
    assert result["area"] == pytest.approx(3 / number)
    assert result["voc07"] == pytest.approx((math.floor(30 / number) + 1) / 11)


def test_matches_once_for_all_thresholds(monkeypatch):
    """Boxes are compared once a class, whatever the number of IoU thresholds; each has the figure that it has alone."""
    image = labelled("rotated", (256, 256), 5, hidden=(0, 3))
    thresholds = (0.3, 0.5, 0.75, 0.95)
    alone = [
        next(iter(validate(Seer("rotated"), [image], recipe_of("rotated", iou_thresholds=(iou,))).figures.values()))
        for iou in thresholds
    ]
    calls = []
    monkeypatch.setattr(rotated, "best_matches", lambda *parts: calls.append(1) or best_matches(*parts))
    result = validate(Seer("rotated"), [image], recipe_of("rotated", iou_thresholds=thresholds))
    assert list(result.figures.values()) == alone and len(calls) == 1


def test_without_coco_the_message_names_the_other_protocol(monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(MissingDependencyError, match=r"or set validation\.protocol=area"):
        task._check_coco()


def test_without_a_band_figures_carry_the_names_of_the_others():
    recipe = recipe_of("rotated", drop_bands=((), ("blue",)))

    class Blue(Seer):
        """Sees blue only."""

        def forward(self, images):
            return super().forward(images[:, 2:].expand(-1, 3, -1, -1))

    result = validate(Blue("rotated"), [labelled("rotated", (256, 256), 1)], recipe)
    assert list(result.figures) == ["AP50", "AP75", "AP50 red+green", "AP75 red+green"]
    assert result.figures["AP50"] == 1 and result.figures["AP50 red+green"] == 0
    assert [row["bands"] for row in result.rows] == ["red+green+blue"] * 2 + ["red+green"] * 2
    assert len(result.curves) == 1


@pytest.mark.parametrize("kind", NAMES)
def test_tiles_and_whole_images_agree(kind):
    """Tiles of the image's own px, and the whole image at its own size."""
    image = labelled(kind, (256, 256), 6)
    tiled, whole = (find_objects(Seer(kind), image, recipe_of(kind, sampling=way)) for way in ("crops", "images"))
    order = [np.lexsort(item.detections.boxes.T) for item in (tiled, whole)]
    np.testing.assert_allclose(tiled.detections.boxes[order[0]], whole.detections.boxes[order[1]], atol=1e-3)
    large = labelled(kind, (300, 520), 7)
    network = Seer(kind)
    result = validate(network, [large], recipe_of(kind, sampling="crops"))
    assert len(network.batches) > 4 and next(iter(result.figures.values())) > 0.9


@pytest.mark.parametrize("sampling", ["crops", "images"])
def test_so_many_detections_are_kept(sampling):
    image = labelled("rotated", (256, 256), 8)
    recipe = recipe_of("rotated", sampling=sampling, max_detections=3)
    found = find_objects(Seer("rotated"), image, recipe).detections
    everything = find_objects(Seer("rotated"), image, recipe_of("rotated", sampling=sampling)).detections
    assert len(found) == 3 < len(everything)
    np.testing.assert_array_equal(found.scores, everything.scores[:3])


def test_batches_change_nothing(monkeypatch):
    """On CUDA several images go at once, of which the last batch is not full."""
    images = [labelled("mask", shape, seed) for seed, shape in enumerate([*SHAPES, (64, 64)])]
    recipe = recipe_of("mask")
    single = validate(Seer("mask"), images, recipe).rows
    network = Seer("mask")
    monkeypatch.setattr(search, "BATCH_SIZE_CPU", 2)
    assert validate(network, images, recipe).rows == single
    assert network.batches == [2, 2, 1]


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(["rotated", "horizontal"]), st.integers(0, 9999), st.integers(0, 120), st.integers(1, 12),
    st.sampled_from([0.1, 0.65]),
)  # fmt: skip
def test_the_best_of_nms_are_found_without_all_candidates(kind, seed, number, limit, threshold):
    """Equal scores and nearly equal boxes too, so that one part is not enough."""
    rng = np.random.default_rng(seed)
    boxes = np.concatenate((rng.integers(0, 3, (number, 2)) * 9, rng.uniform(8, 20, (number, 2))), axis=1)
    boxes = np.column_stack([boxes, rng.uniform(-1.5, 1.5, number) if kind == "rotated" else np.zeros(number)])
    found = Detections(boxes, rng.integers(1, 9, number) / 9, rng.integers(0, 2, number), kind=kind)
    part = search._suppress(found, threshold, limit)
    whole = search._suppress(found, threshold, 10_000)
    np.testing.assert_array_equal(part.boxes, whole.boxes[:limit])
    np.testing.assert_array_equal(part.scores, whole.scores[:limit])
    assert len(whole) <= number and (np.diff(whole.scores) <= 0).all()


class Thread(Processes):
    """A thread that stands for a process."""

    def __init__(self, rank, world, gather):
        super().__init__(torch.device("cpu"), rank, world)
        object.__setattr__(self, "gather", gather)


class Threads:
    """Gathers over threads, each standing for a process."""

    def __init__(self, size):
        self.size, self.parts, self.barrier = size, [None] * size, threading.Barrier(size, timeout=30)

    def share(self, rank):
        def gather(own):
            self.parts[rank] = own
            self.barrier.wait()
            parts = list(self.parts)
            self.barrier.wait()
            return parts

        return Thread(rank, self.size, gather)


def in_threads(size, call):
    """Return what ``call(share)`` gave or raised in each of so many threads."""
    threads, results = Threads(size), [None] * size

    def work(rank):
        try:
            results[rank] = call(threads.share(rank))
        except AnnotationError as error:
            results[rank] = error

    workers = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    return results


@pytest.mark.parametrize("protocol", ["area", "coco"])
@pytest.mark.parametrize("number", [1, 5])
def test_several_processes_come_to_the_result_of_one(protocol, number):
    """Each searches its own part; more processes than images too."""
    images = [labelled("mask", SHAPES[seed % 4], seed, hidden=(seed,)) for seed in range(number)]
    recipe = recipe_of("mask", protocol=protocol)
    alone = validate(Seer("mask"), images, recipe)
    seers = [Seer("mask") for _ in range(3)]
    steps = []
    results = in_threads(
        3,
        lambda share: validate(
            seers[share.rank], images, recipe, processes=share, progress=lambda *step: steps.append((share.rank, *step))
        ),
    )
    for result in results:
        assert result.figures == pytest.approx(alone.figures, nan_ok=True)
        assert [row["ap"] for row in result.rows] == pytest.approx([row["ap"] for row in alone.rows])
    assert sorted(len(seer.batches) for seer in seers) == ([0, 0, 1] if number == 1 else [1, 2, 2])
    assert {step for step in steps if step[0] == 0} == {
        (0, done, -(-number // 3)) for done in range(1, -(-number // 3) + 1)
    }


@dataclass(frozen=True)
class Broken:
    """A file that does not decode."""

    shape: tuple = (3, 100, 100)
    reads: list = field(default_factory=list)

    def read(self):
        self.reads.append(1)
        raise AnnotationError("bad.jpg does not decode")


def broken(name="bad.jpg"):
    return LabelledImage(name, name, Broken(), np.zeros((0, 5)), np.zeros(0, np.int64), np.zeros(0, bool))


@pytest.mark.parametrize("sampling", ["crops", "images"])
def test_an_image_that_does_not_decode_stops_or_is_left_out(sampling, caplog):
    good = [labelled("rotated", (256, 256), seed) for seed in range(3)]
    images = [good[0], broken(), *good[1:]]
    with pytest.raises(AnnotationError, match=r"bad\.jpg does not decode"):
        validate(Seer("rotated"), images, recipe_of("rotated", sampling=sampling))
    recipe = recipe_of("rotated", sampling=sampling, on_bad_image="skip")
    with caplog.at_level(logging.WARNING):
        result = validate(Seer("rotated"), images, recipe)
    assert "bad.jpg does not decode" in caplog.text and "1 of 4 images" in caplog.text
    assert (result.num_images, result.left_out) == (3, ("bad.jpg",))
    assert result.figures == validate(Seer("rotated"), good, recipe).figures
    with pytest.raises(AnnotationError, match="none of the 2 left-out images"):
        validate(Seer("rotated"), [broken(), broken("worse.jpg")], recipe)


def test_an_image_that_does_not_decode_stops_every_process():
    images = [labelled("rotated", (256, 256), 0), broken(), *(labelled("rotated", (256, 256), n) for n in (1, 2))]
    results = in_threads(2, lambda share: validate(Seer("rotated"), images, recipe_of("rotated"), processes=share))
    assert [str(item) for item in results] == ["bad.jpg does not decode"] * 2


def test_a_network_is_left_in_the_mode_it_came_in():
    network = get_model("rtmdet_r_test", num_classes=1).train()
    frozen = next(module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)).eval()
    validate(network, [labelled("rotated", (64, 64), 0)], recipe_of("rotated"))
    assert network.training and not frozen.training
    with pytest.raises(AnnotationError):
        validate(network, [broken()], recipe_of("rotated"))
    assert network.training


def test_nothing_labelled_is_no_number():
    empty = LabelledImage(
        "sea", "sea", np.full((3, 64, 64), 114, np.uint8), np.zeros((0, 5)), np.zeros(0, np.int64), np.zeros(0, bool)
    )
    for protocol in ("area", "voc07", "coco"):
        result = validate(Seer("horizontal"), [empty], recipe_of("horizontal", protocol=protocol))
        assert all(math.isnan(value) for value in result.figures.values()) and result.curves == []
