"""Prediction on numpy images: golden results, known rectangles, and what the engine is shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pytest
import shapely
from engines import (
    Engine,
    GoldenEngine,
    RectangleEngine,
    check_golden,
    draw_rectangles,
    scattered_boxes,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reference_post import cases_of
from synthetic import make_spec, write_scene
from test_masks import decode_rle, overlap
from test_preprocess import check, image_of

import rtmdet_geo
from rtmdet_geo import detect as pipeline
from rtmdet_geo.backends.onnxrt import OnnxRuntimeBackend
from rtmdet_geo.boxes import boxes_to_polygons
from rtmdet_geo.checkpoints import CHECKPOINTS
from rtmdet_geo.errors import (
    BandError,
    BandWarning,
    ConfigError,
    ModelFileError,
    NotGeoreferencedWarning,
    ResolutionError,
    SaturatedTileWarning,
    UnknownClassError,
)
from rtmdet_geo.images import Prediction, load_model, predict
from rtmdet_geo.masks import CroppedMask
from rtmdet_geo.preprocess import Letterbox, letterbox, normalise
from rtmdet_geo.structures import PAD_VALUE, Detections, Kind, StretchSpec
from rtmdet_geo.views import Augmentation, augment

BGR = ("blue", "green", "red")
TTA = ("none", "flips", "all", Augmentation(flips=("diagonal",)))


class ChannelEngine(Engine):
    """Finds nothing."""

    def find(self, image: np.ndarray) -> Detections:
        """See the class."""
        return Detections.empty(kind=self.spec.object_kind)


def picture(height: int, width: int, boxes: np.ndarray, *, bands: int = 3) -> np.ndarray:
    """Return rectangles as an image (H, W, C)."""
    return np.ascontiguousarray(draw_rectangles(height, width, boxes, bands=bands).transpose(1, 2, 0))


def match(prediction: Prediction, boxes: np.ndarray) -> float:
    """Return the largest difference in px of the boxes' corners; each true box must have one partner."""
    assert len(prediction) == len(boxes)
    found, true = boxes_to_polygons(prediction.boxes), boxes_to_polygons(boxes)
    partner = np.linalg.norm(found.mean(axis=1)[:, None] - true.mean(axis=1)[None], axis=2).argmin(axis=0)
    assert len(set(partner.tolist())) == len(boxes)
    # corners in any order: a square's long side may be either
    apart = np.linalg.norm(found[partner][:, :, None] - true[:, None], axis=3).min(axis=2)
    return float(apart.max(initial=0))


def whole(mask: CroppedMask, shape: tuple[int, ...]) -> np.ndarray:
    """Return a cropped mask in an image of that shape."""
    full = np.zeros(shape[:2], bool)
    part, x, y = mask
    full[y : y + part.shape[0], x : x + part.shape[1]] = part
    return full


@pytest.mark.parametrize("family,file", [("det", "post.json"), ("rot", "post.json"), ("ins", "post_ins.json")])
def test_oracle_letterboxed_results(oracle_dir: Path, family: str, file: str) -> None:
    """Golden candidates through predict: boxes, scores and labels of the reference, and its masks inside our crops."""
    num_results = num_masks = 0
    for case in cases_of(oracle_dir, file, family):
        for image, golden in enumerate(case["results"]):
            meta, config = case["img_metas"][image], case["test_cfg"]
            shape = meta["ori_shape"] if case["rescale"] else meta["img_shape"]
            shown = np.zeros((*shape, 3), np.uint8)
            factor = meta["scale_factor"] if case["rescale"] else (1, 1)
            if letterbox(shown, max(meta["img_shape"])).scale_factor != pytest.approx(tuple(factor)):
                continue  # the case was not resized with its sides' ratio kept
            found = predict(
                GoldenEngine(case, image),
                shown,
                resize="letterbox" if family == "rot" else "auto",
                max_detections=config["max_per_img"],
                multi_label=True,
            )
            partners = check_golden(found.boxes, found.scores, found.labels, case, image)
            num_results += golden["num"] > 0
            assert (found.masks is not None) == (family == "ins")
            for rle, row in zip(golden.get("mask_rle", []), partners, strict=False):
                assert found.masks is not None
                part, x, y = found.masks[row]
                expected = decode_rle(rle)
                assert expected.shape == tuple(shape)
                window = expected[y : y + part.shape[0], x : x + part.shape[1]]
                assert overlap(part.astype(bool), window) >= 0.999, (case["name"], image, row)
                num_masks += window.any()
    assert num_results
    assert num_masks or family != "ins"


def test_oracle_preprocessing(oracle_dir: Path) -> None:
    """What the engine gets of an image in blue, green, red is what the reference's preprocessing makes."""
    cases = json.loads((oracle_dir / "preprocess.json").read_text())["cases"]
    for case in cases:
        engine = ChannelEngine(make_spec(kind="horizontal", bands=BGR, tile_size=case["size"]))
        image = image_of(case)
        predict(engine, image, channels=BGR, score_threshold=1.0)
        (batch,) = engine.batches
        given = np.ascontiguousarray(batch[0].transpose(1, 2, 0))
        boxed = Letterbox(given, tuple(case["content"]), letterbox(image, case["size"]).scale_factor)
        check(boxed, normalise(given), case)
    predict(engine, image, score_threshold=1.0)  # read as red, green, blue: another picture
    with pytest.raises(AssertionError):
        check(boxed._replace(image=engine.batches[1][0].transpose(1, 2, 0)), normalise(given), case)


@settings(deadline=None, max_examples=8)
@given(
    st.integers(0, 2**32),
    st.sampled_from(["rotated", "horizontal", "mask"]),
    st.sampled_from(TTA),
    st.sampled_from([(100, 120), (150, 230)]),
    st.sampled_from([None, 5.0]),
)
@example(0, "mask", TTA[3], (100, 120), None)  # mirrored with its padding
def test_tiles_find_rectangles_where_they_are(
    seed: int, kind: Kind, tta: str | Augmentation, size: tuple[int, int], gsd: float | None
) -> None:
    """One padded tile or several, plain or augmented, at the model's resolution of 4 m or resampled to it."""
    boxes = scattered_boxes(*size, seed, kind=kind)
    engine = RectangleEngine(make_spec(kind=kind, gsd_m=4.0, tile_size=128, overlap=64, iou_threshold=0.5))
    found = predict(engine, picture(*size, boxes), tta=tta, gsd=gsd)
    assert match(found, boxes) < (0.5 if gsd is None and tta != "all" else 1.2)
    assert found.boxes.dtype == np.float64 and found.kind == kind
    assert set(found.class_names) == {"ship"}
    if kind == "mask":
        check_rectangle_masks(found, boxes, size)


def check_rectangle_masks(found: Prediction, boxes: np.ndarray, size: tuple[int, int]) -> None:
    """Masks from features of 8 px cells: their centres are the rectangles', and they cover about as much."""
    assert found.masks is not None and len(found.masks) == len(boxes)
    for box, mask in zip(found.boxes, found.masks, strict=True):
        x, y, w, h, _ = boxes[np.linalg.norm(boxes[:, :2] - box[:2], axis=1).argmin()]
        rows, columns = np.nonzero(whole(mask, size)[int(y - h / 2 - 5) : int(y + h / 2 + 5)])
        rows = rows + int(y - h / 2 - 5)
        near = np.abs(columns + 0.5 - x) < w / 2 + 5
        assert abs(columns[near].mean() + 0.5 - x) < 3 and abs(rows[near].mean() + 0.5 - y) < 3
        assert 0.6 * w * h < near.sum() < 1.5 * w * h


@settings(deadline=None, max_examples=8)
@given(
    st.integers(0, 2**32),
    st.sampled_from(["rotated", "horizontal", "mask"]),
    st.sampled_from(TTA),
    st.sampled_from([(150, 101), (96, 160)]),
    st.sampled_from([192, 256]),
)
def test_letterboxes_find_rectangles_where_they_are(
    seed: int, kind: Kind, tta: str | Augmentation, size: tuple[int, int], side: int
) -> None:
    boxes = scattered_boxes(*size, seed, kind=kind)
    engine = RectangleEngine(make_spec(kind=kind, tile_size=side, iou_threshold=0.5))
    found = predict(engine, picture(*size, boxes), tta=tta, resize="letterbox")
    assert match(found, boxes) < 1.0
    assert all(batch.shape[2] == batch.shape[3] for batch in engine.batches)
    if kind == "mask":
        check_rectangle_masks(found, boxes, size)


class OneBoxEngine(Engine):
    """Finds one box at x 32, y 3, everywhere."""

    def find(self, image: np.ndarray) -> Detections:
        """See the class."""
        return Detections([[32, 3, 8, 4, 0]], [0.9], [0], kind=self.spec.object_kind)


def test_worked_letterbox() -> None:
    """9 x 100 px become 6 x 64: the axes' factors are 2/3 and 0.64. What lies in padding stays, as in the reference."""
    engine = OneBoxEngine(make_spec(kind="horizontal", tile_size=64))
    found = predict(engine, np.zeros((9, 100, 3), np.uint8))
    np.testing.assert_allclose(found.boxes, [[50, 4.5, 12.5, 6, 0]], rtol=1e-6)
    np.testing.assert_allclose(predict(engine, np.zeros((3, 100, 3), np.uint8)).boxes[0, :2], [50, 4.5], rtol=1e-6)


def test_what_lies_in_the_padding_of_tiles_is_dropped() -> None:
    engine = OneBoxEngine()
    assert len(predict(engine, np.zeros((4, 40, 3), np.uint8))) == 1
    assert len(predict(engine, np.zeros((3, 40, 3), np.uint8))) == 0
    assert len(predict(engine, np.zeros((4, 32, 3), np.uint8))) == 0


@pytest.mark.parametrize("resize", ["letterbox", "none"])
def test_mask_threshold_and_multi_label_are_passed_on(resize: Any) -> None:
    boxes = np.array([[60.0, 50.0, 60.0, 40.0, 0.0]])
    engine = RectangleEngine(make_spec(kind="mask", tile_size=128))
    areas = []
    for threshold in (0.4, 0.5, 0.6):
        found = predict(engine, picture(100, 120, boxes), resize=resize, mask_threshold=threshold, multi_label=True)
        assert engine.multi_label and found.masks is not None
        areas.append(found.masks[0].mask.sum())
    assert areas[0] > areas[1] > areas[2] > 0
    predict(engine, picture(100, 120, boxes), resize=resize)
    assert not engine.multi_label


def test_letterbox_views_are_mirrored_before_they_are_padded() -> None:
    engine = RectangleEngine(make_spec(kind="horizontal", tile_size=64))
    image = np.arange(64 * 32 * 3, dtype=np.uint32).astype(np.uint8).reshape(32, 64, 3)
    predict(engine, image, tta="flips", score_threshold=1.0)
    plain = image.transpose(2, 0, 1)
    for batch, shown in zip(
        engine.batches, (plain, plain[:, :, ::-1], plain[:, ::-1], plain[:, ::-1, ::-1]), strict=True
    ):
        assert (batch[0, :, :32] == shown).all() and (batch[0, :, 32:] == PAD_VALUE).all()
    engine.batches.clear()
    predict(engine, image, tta=Augmentation(scales=(0.5, 2.0)), score_threshold=1.0)
    assert [batch.shape for batch in engine.batches] == [(1, 3, 32, 32), (1, 3, 128, 128)]


def run_both(
    monkeypatch: pytest.MonkeyPatch, folder: Path, image: np.ndarray, engines: tuple[Engine, Engine], gsd: float | None
) -> tuple[geopandas.GeoDataFrame, Prediction]:
    """Run detect_scene on a file of a grey image (H, W), and predict on the image with an equal engine."""
    scene = write_scene(folder / "port.tif", image, crs=None)
    monkeypatch.setattr(pipeline, "open_backend", lambda path, **options: engines[0])
    monkeypatch.setattr(pipeline, "find_model", lambda model: Path(__file__))
    with pytest.warns(NotGeoreferencedWarning):
        result = pipeline.detect_scene(scene, gsd=gsd)
    return result, predict(engines[1], np.repeat(image[..., None], 3, axis=2), gsd=gsd)


@pytest.mark.parametrize("gsd,max_pixels", [(None, 10_000_000), (6.0, 10_000_000), (None, 7_000)])
def test_engines_see_what_they_see_of_a_scene(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gsd: float | None, max_pixels: int
) -> None:
    """Stretched, resampled and tiled alike, to the bit; limits of the stretch from every third pixel, too."""
    monkeypatch.setattr("rtmdet_geo.scene.PERCENTILE_MAX_PIXELS", max_pixels)
    image = np.random.default_rng(0).integers(30, 100, (200, 259)).astype(np.uint8)
    image += (40 * (np.arange(259) % 3)).astype(np.uint8)  # which third counts shows
    spec = make_spec(gsd_m=4.0, tile_size=160, stretch=StretchSpec(dark_percent=1.0))
    engines = ChannelEngine(spec), ChannelEngine(spec)
    run_both(monkeypatch, tmp_path, image, engines, gsd)
    assert len(engines[0].batches) > 1
    for theirs, ours in zip(engines[0].batches, engines[1].batches, strict=True):
        assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("kind", ["rotated", "mask"])
def test_results_are_those_of_a_scene(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: Kind) -> None:
    boxes = scattered_boxes(200, 260, 7, kind=kind)
    spec = make_spec(kind=kind, gsd_m=4.0, tile_size=160)
    engines = RectangleEngine(spec), RectangleEngine(spec)
    image = picture(200, 260, boxes)[..., 0]
    result, found = run_both(monkeypatch, tmp_path, image, engines, 6.0)
    assert len(found) == len(result) == len(boxes)
    np.testing.assert_allclose(found.scores, result["score"], atol=1e-3)
    for ours, theirs in zip(found.polygons(), result.geometry, strict=True):
        theirs = shapely.transform(theirs, np.abs)  # rows may count downwards from 0
        assert shapely.hausdorff_distance(ours, theirs) < (1e-3 if kind == "rotated" else 1.5)


def seen_channels(engine: Engine) -> list[int]:
    """Return the grey of each channel's first pixel in the last batch."""
    return engine.batches[-1][0, :, 0, 0].tolist()


def test_channels_come_in_the_model_s_order() -> None:
    image = np.tile(np.array([10, 20, 30, 40], np.uint8), (40, 50, 1))
    rgbn = ("red", "green", "blue", "nir")
    engine = ChannelEngine(make_spec(bands=BGR))
    predict(engine, image[..., :3])
    assert seen_channels(engine) == [30, 20, 10]
    predict(engine, image[..., :3], channels=BGR)
    assert seen_channels(engine) == [10, 20, 30]
    predict(engine, image, channels=rgbn)  # near infrared is not asked for
    assert seen_channels(engine) == [30, 20, 10]
    four = ChannelEngine(make_spec(bands=rgbn, mean=(0.0,) * 4, std=(1.0,) * 4, optional_bands={"nir": 90}))
    predict(four, image[..., [3, 2, 1, 0]], channels=rgbn[::-1])
    assert seen_channels(four) == [10, 20, 30, 40]
    with pytest.warns(BandWarning, match="no nir band"):
        predict(four, image[..., :3])
    assert seen_channels(four) == [10, 20, 30, 90]


def test_one_band() -> None:
    grey = np.full((40, 50), 77, np.uint8)
    engine = ChannelEngine()
    with pytest.warns(BandWarning, match="repeated"):
        predict(engine, grey)
    assert seen_channels(engine) == [77, 77, 77]
    with pytest.raises(BandError, match="needs green, blue"):
        predict(engine, grey, channels=("red",))
    radar = ChannelEngine(make_spec(bands=("vv",), mean=(0.0,), std=(1.0,)))
    for image in (grey, grey[..., None]):
        predict(radar, image, channels="vv")
        assert seen_channels(radar) == [77]
    predict(radar, grey)  # nothing is said of it: it is the one
    with pytest.raises(BandError, match="has vh, but model 'blobs' also needs vv"):
        predict(radar, grey, channels=("vh",))


def test_published_models_read_blue_green_red() -> None:
    """Of the published detectors' own specs: pixels go letterboxed, in the order of their training."""
    spec = CHECKPOINTS["rtmdet_tiny_coco"].spec()
    engine = RectangleEngine(spec)
    image = np.tile(np.array([10, 20, 30], np.uint8), (40, 80, 1))
    predict(engine, image, score_threshold=1.0)
    assert engine.batches[0].shape == (1, 3, 640, 640) and seen_channels(engine) == [30, 20, 10]
    aerial = RectangleEngine(CHECKPOINTS["rtmdet_r_tiny_dota"].spec())
    predict(aerial, image, score_threshold=1.0)
    assert aerial.batches[0].shape == (1, 3, 64, 96)  # its own resolution, one padded tile


def test_fixed_size_engines_get_their_size() -> None:
    boxes = scattered_boxes(100, 150, 3, kind="horizontal")
    engine = RectangleEngine(make_spec(kind="horizontal", tile_size=256))
    engine.fixed_tile_size = 192
    image = picture(100, 150, boxes)
    for resize in ("letterbox", "none"):
        found = predict(engine, image, resize=resize, tta="flips")  # type: ignore[arg-type]
        assert match(found, boxes) < 1.0
    assert {batch.shape for batch in engine.batches} == {(1, 3, 192, 192)}
    with pytest.raises(ConfigError, match="192 px only"):
        predict(engine, image, tta="scales")


class ManyEngine(Engine):
    """Finds six boxes of three classes with falling scores, everywhere; every picture is saturated."""

    def __init__(self) -> None:
        """Make the spec."""
        super().__init__(make_spec(classes=("ship", "plane", "car"), kind="horizontal", score_threshold=0.25))

    def find(self, image: np.ndarray) -> Detections:
        """See the class."""
        self.num_saturated += 1
        boxes = [[10 + 9 * number, 20, 8, 6, 0] for number in range(6)]
        return Detections(boxes, np.arange(7, 1, -1) / 10, np.arange(6) % 3, kind="horizontal")


@pytest.mark.filterwarnings("ignore::rtmdet_geo.errors.SaturatedTileWarning")
@pytest.mark.parametrize("resize", ["letterbox", "none"])
def test_thresholds_classes_and_limit(resize: Any) -> None:
    image = np.zeros((100, 256, 3), np.uint8)

    def names(**options: Any) -> tuple[str, ...]:
        return predict(ManyEngine(), image, resize=resize, **options).class_names

    assert names() == ("ship", "plane", "car", "ship", "plane")  # the last has .2
    assert names(score_threshold=0.45) == ("ship", "plane", "car")
    assert names(max_detections=2) == ("ship", "plane")
    assert names(classes=["plane"]) == ("plane", "plane")
    assert names(classes=["car", "plane"], max_detections=2) == ("plane", "car")
    assert names(classes=[]) == ()


def test_saturated_images_are_warned_of() -> None:
    with pytest.warns(SaturatedTileWarning, match=r"above score 0\.5 .* raise score_threshold"):
        predict(ManyEngine(), np.zeros((100, 256, 3), np.uint8), score_threshold=0.5)


@pytest.mark.parametrize(
    "options,error,words",
    [
        ({"score_threshold": 1.2}, ConfigError, "score_threshold=1.2"),
        ({"iou_threshold": float("nan")}, ConfigError, "iou_threshold=nan"),
        ({"mask_threshold": 1.0}, ConfigError, "mask_threshold=1.0"),
        ({"max_detections": 0}, ConfigError, "max_detections=0"),
        ({"resize": "squash"}, ConfigError, "'squash' is unknown"),
        ({"tta": "some"}, ConfigError, "'some' is unknown"),
        ({"classes": ["boat"]}, UnknownClassError, "no class 'boat'; it knows ship"),
        ({"gsd": 3.0, "resize": "letterbox"}, ConfigError, "resized to the model's input"),
        ({"gsd": 41.0}, ResolutionError, "41 m per pixel"),
        ({"channels": ("red", "green")}, BandError, "3 channels"),
        ({"channels": ("red", "red", "blue")}, BandError, "each of them once"),
        ({"channels": ("red", "green", "nir")}, BandError, "also needs blue"),
    ],
)
def test_wrong_options(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        predict(RectangleEngine(make_spec(gsd_m=4.0)), np.zeros((40, 40, 3), np.uint8), **options)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((40, 40, 3)),
        np.zeros((40, 40, 3), np.uint16),
        np.zeros((0, 40, 3), np.uint8),
        np.zeros((2, 40, 40, 3), np.uint8),
        np.zeros(40, np.uint8),
    ],
)
def test_wrong_images(image: np.ndarray) -> None:
    with pytest.raises(ConfigError, match=r"\(height, width, channels\) uint8"):
        predict(RectangleEngine(), image)


def test_wrong_models() -> None:
    image = np.zeros((40, 40, 3), np.uint8)
    with pytest.raises(ConfigError, match="finds no objects"):
        predict(Engine(make_spec(kind="classification")), image)
    with pytest.raises(ConfigError, match="already"):
        predict(augment(RectangleEngine(), "flips"), image)
    with pytest.raises(ConfigError, match="no resolution"):
        predict(RectangleEngine(), image, gsd=4.0)
    with pytest.raises(ModelFileError, match="not there"):
        load_model("nosuch.onnx")
    with pytest.raises(ConfigError, match="unknown"):
        load_model(backend="abacus")


@pytest.mark.parametrize("tta,any_size", [(None, False), ("flips", False), ("scales", True)])
def test_engines_of_one_size_are_left_out_where_views_have_several(
    monkeypatch: pytest.MonkeyPatch, tta: str | None, any_size: bool
) -> None:
    asked = []
    monkeypatch.setattr(
        "rtmdet_geo.images.open_backend",
        lambda path, **options: asked.append((path.name, options)) or RectangleEngine(),
    )
    predict("sen2ships_r", np.zeros((40, 40, 3), np.uint8), tta=tta)
    assert asked == [("sen2ships_r.onnx", {"any_size": any_size})]


def test_prediction_says_what_it_holds() -> None:
    boxes = np.array([[10, 10, 8, 4, np.pi / 2], [30, 20, 6, 6, 0], [50, 20, 6, 6, 0]])
    labels = np.array([1, 0, 1])
    found = Prediction(boxes, np.ones(3, np.float32), labels, ("car", "ship", "car"), "rotated")
    assert str(found) == "3 objects (2 car, 1 ship)" and len(found) == 3
    assert [shape.area for shape in found.polygons()] == pytest.approx([32, 36, 36])
    assert found.polygons()[0].bounds == pytest.approx((8, 6, 12, 14))
    none = Prediction(np.zeros((0, 5)), np.zeros(0, np.float32), np.zeros(0, np.int64), (), "mask", [])
    assert str(none) == "0 objects" and none.polygons() == []


def test_polygons_follow_the_pixels_of_masks() -> None:
    """A ring with a hole, two parts that touch at a corner, one pixel, nothing."""
    ring = np.ones((5, 6), np.uint8)
    ring[2, 2:4] = 0
    masks = [
        CroppedMask(ring, 10, 20),
        CroppedMask(np.eye(2, dtype=np.uint8), 3, 4),
        CroppedMask(np.ones((1, 1), np.uint8), 7, 8),
        CroppedMask(np.zeros((3, 3), np.uint8), 0, 0),
    ]
    found = Prediction(np.ones((4, 5)), np.ones(4, np.float32), np.zeros(4, np.int64), ("a",) * 4, "mask", masks)
    holed, parts, pixel, nothing = found.polygons()
    assert all(shapely.is_valid(shape) for shape in found.polygons())
    assert holed.equals(shapely.box(10, 20, 16, 25) - shapely.box(12, 22, 14, 23))
    assert parts.equals(shapely.box(3, 4, 4, 5) | shapely.box(4, 5, 5, 6))
    assert pixel.equals(shapely.box(7, 8, 8, 9))
    assert nothing.is_empty


def test_the_bundled_model() -> None:
    """Loaded by no name, it runs on an image of another resolution without near infrared."""
    model = load_model(threads=1)
    assert isinstance(model, OnnxRuntimeBackend) and model.spec.name == "sen2ships_r"
    image = np.random.default_rng(0).integers(20, 60, (40, 50, 3), np.uint8)
    with pytest.warns(BandWarning, match="nir"):
        found = predict(model, image, gsd=10.0, tta="flips")
    assert isinstance(found, Prediction) and found.kind == "rotated"


def test_what_is_no_image_or_scene(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="was the file read"):
        predict(RectangleEngine(), None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="use detect_scene"):
        predict(RectangleEngine(), "scene.tif")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"rtmdet_geo\.predict"):
        rtmdet_geo.detect_scene(np.zeros((8, 8, 3), np.uint8))  # type: ignore[arg-type]
    with pytest.raises(ModelFileError, match="not there"):
        predict("nosuch.onnx", np.zeros((8, 8, 3), np.uint8))


def test_scores_by_class_are_for_scenes():
    with pytest.raises(ConfigError, match="one score_threshold; scores by class are for detect_scene"):
        predict(load_model(), np.zeros((64, 64, 4), np.uint8), score_threshold={"ship": 0.5})  # type: ignore[arg-type]
