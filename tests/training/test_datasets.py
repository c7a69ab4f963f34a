"""Chips on disk: what is checked, how scenes are split, that crops are a pure function."""

from __future__ import annotations

import json
import logging
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import cv2
import numpy as np
import pytest

from rtmdet_geo.annotations.outlines import mask_bounds, outline_points
from rtmdet_geo.config import parse_recipe
from rtmdet_geo.errors import AnnotationError, ConfigError, DatasetNotFoundError
from rtmdet_geo.models import get_model
from rtmdet_geo.training.chips import load_chips, split_chips
from rtmdet_geo.training.crops import CropSampler
from rtmdet_geo.training.labelled import LabelledImage
from rtmdet_geo.training.loader import BatchLoader
from rtmdet_geo.training.validate import find_false_alarms


def same(first, second):
    return all(
        np.array_equal(getattr(first, name), getattr(second, name))
        for name in ("image", "boxes", "labels", "ignored", "masks")
    )


@pytest.fixture
def broken(chips_dir, tmp_path):
    """A copy of the chips and a function that edits its index."""
    folder = tmp_path / "copy"
    shutil.copytree(chips_dir, folder)

    def edit(change):
        index = json.loads((folder / "chips.json").read_text())
        change(index)
        (folder / "chips.json").write_text(json.dumps(index))
        return folder

    return edit


def test_bands_come_in_the_models_order(chips_dir, recipe_values):
    recipe_values["model"] |= {"bands": ["nir", "red"], "mean": [1, 1], "std": [1, 1]}
    recipe_values["augment"] = {}
    chips = load_chips(chips_dir, parse_recipe(recipe_values).model)
    stored = np.load(chips_dir / "alpha.npy")
    assert np.array_equal(chips[0].pixels, stored[[3, 0]])


def test_split_leaves_fold_and_holdout_out(chips_dir, recipe_values):
    recipe_values["data"]["holdout"] = ["gamma"]
    recipe = parse_recipe(recipe_values)
    training, left_out = split_chips(load_chips(chips_dir, recipe.model), recipe)
    assert [chip.scene for chip in training] == ["beta"]
    assert [chip.scene for chip in left_out] == ["alpha"]


@pytest.mark.parametrize("name", ["rtmdet_r_test", "rtmdet_test", "rtmdet_ins_test"])
def test_crops_are_a_pure_function_whatever_the_threads(chips_dir, recipe_values, name):
    recipe_values["model"]["name"] = name
    recipe = parse_recipe(recipe_values)
    chips = load_chips(chips_dir, recipe.model)
    sampler = CropSampler(chips, recipe)
    threaded, single = (BatchLoader(sampler, positions=range(3), iterations=6, workers=workers) for workers in (2, 0))
    for iteration in (0, 1, 5):
        for first, second in zip(threaded.batch(iteration), single.batch(iteration), strict=True):
            assert same(first, second)
    threaded.close()
    assert not same(sampler.draw(0, 0), sampler.draw(0, 1))


class Broken:
    """Pixels of a file that does not decode."""

    def __init__(self, name, shape):
        self.name, self.shape, self.reads = name, shape, 0

    def read(self):
        self.reads += 1
        raise AnnotationError(f"{self.name} does not decode")


def with_broken(chips, *numbers):
    return [
        replace(chip, source=Broken(chip.name, chip.source.shape)) if number in numbers else chip
        for number, chip in enumerate(chips)
    ]


def test_a_bad_image_stops_or_other_crops_take_its_place(chips_dir, recipe_values, caplog):
    recipe_values["augment"]["object_crop_prob"] = 0.4
    chips = load_chips(chips_dir, parse_recipe(recipe_values).model)
    stops = CropSampler(with_broken(chips, 1), parse_recipe(recipe_values))
    with pytest.raises(AnnotationError, match=r"beta\.npy does not decode"):
        [stops.draw(0, position) for position in range(12)]
    recipe_values["data"]["on_bad_image"] = "skip"
    recipe = parse_recipe(recipe_values)
    samplers = [CropSampler(with_broken(chips, 1), recipe) for _ in range(2)]
    for sampler in samplers:
        sampler.false_alarms = np.array([[1, 100, 100, 0.9], [2, 50, 60, 0.8]])
    keys = [(iteration, position) for iteration in range(8) for position in range(3)]
    with caplog.at_level(logging.WARNING), ThreadPoolExecutor(3) as pool:
        drawn = list(pool.map(lambda key: samplers[0].draw(*key), keys))
    assert {name for sample in drawn for name in sample.names} == {"alpha.npy", "gamma.npy"}
    assert samplers[0].bad_images == {"beta.npy"} and samplers[0].chips[1].source.reads <= 3  # once a thread at most
    assert [record.getMessage().split()[0] for record in caplog.records] == ["beta.npy"]
    late = {key: samplers[1].draw(*key) for key in reversed(keys)}  # met at another time, replaced alike
    assert all(same(sample, late[key]) for key, sample in zip(keys, drawn, strict=True))
    sound = CropSampler(chips, recipe)  # what does not show it stays as it is
    sound.false_alarms = samplers[0].false_alarms
    unchanged = [same(sample, sound.draw(*key)) for key, sample in zip(keys, drawn, strict=True)]
    assert 0 < sum(unchanged) < len(keys)
    with pytest.raises(AnnotationError, match=r"100 images .* do not decode \(3 of 3 so far\).*data check"):
        CropSampler(with_broken(chips, 0, 1, 2), recipe).draw(0, 0)


def test_a_bad_image_is_not_searched_for_false_alarms(chips_dir, recipe_values, caplog):
    chips = with_broken(load_chips(chips_dir, parse_recipe(recipe_values).model), 1)
    network = get_model("rtmdet_r_test", num_classes=1, in_channels=4).eval()
    with pytest.raises(AnnotationError, match=r"beta\.npy"):
        find_false_alarms(network, chips, parse_recipe(recipe_values), score_threshold=0, max_iou=1)
    recipe_values["data"]["on_bad_image"] = "skip"
    recipe_values["validation"] = {"score_threshold": 0}
    found = find_false_alarms(network, chips, parse_recipe(recipe_values), score_threshold=0, max_iou=1, limit=5)
    assert set(found[:, 0]) == {0, 2} and "beta.npy does not decode; it is not searched" in caplog.text


def test_crops_show_their_boxes(chips_dir, recipe_values):
    recipe_values["augment"] |= {"band_dropout": {}, "offset": 0, "gain": 0, "band_gain": 0, "gamma": 0, "noise": 0}
    recipe = parse_recipe(recipe_values)
    sampler = CropSampler(load_chips(chips_dir, recipe.model), recipe)
    seen = 0
    for position in range(20):
        sample = sampler.draw(0, position)
        for x, y in sample.boxes[:, :2]:
            if 2 < x < 126 and 2 < y < 126:
                seen += 1
                assert sample.image[0, int(y), int(x)] > 150
    assert seen > 10


def plain(values, name, **augment):
    """A recipe whose crops keep the pixels' tones, for a model of some kind."""
    values["model"]["name"] = name
    tones = {"band_dropout": {}, "offset": 0, "gain": 0, "band_gain": 0, "gamma": 0, "noise": 0, "blur_prob": 0}
    values["augment"] |= tones | augment
    return parse_recipe(values)


def grown(masks):
    return cv2.dilate(masks.max(axis=0), np.ones((3, 3), np.uint8)) > 0


def test_crops_show_their_masks(houses_dir, house_values):
    recipe = plain(house_values, "rtmdet_ins_test", mosaic_prob=0.5, min_visible=0.0)
    sampler = CropSampler(load_chips(houses_dir, recipe.model), recipe)
    seen = 0
    for position in range(20):
        sample = sampler.draw(0, position)
        assert sample.masks.shape == (len(sample.boxes), 128, 128) and sample.masks.dtype == np.uint8
        assert sample.boxes.shape[1] == 4 and sample.boxes.dtype == np.float32 and len(sample.ignored) == 0
        bright = (sample.image[0] > 125).astype(np.uint8)
        for mask, box in zip(sample.masks, sample.boxes, strict=True):
            seen += 1
            assert box.tolist() == mask_bounds(mask).tolist()
            assert not (mask.astype(bool) & ~grown(bright[None])).any()
        if len(sample.masks):  # what is bright without a mask is a speck at the border: less than 5 % of a house
            rest = (bright > 0) & ~grown(sample.masks)
            assert rest.sum() < 4 * 0.05 * 1300
    assert seen > 30


def test_horizontal_crops_have_the_boxes_of_the_masks(houses_dir, house_values):
    """The same draw for either kind: boxes of outlines hold boxes of masks, and differ by rounding to pixels."""
    samples = []
    for name in ("rtmdet_ins_test", "rtmdet_test"):
        recipe = plain(house_values, name, min_visible=0.0, min_size_px=0.0)
        sampler = CropSampler(load_chips(houses_dir, recipe.model), recipe)
        samples.append([sampler.draw(3, position) for position in range(12)])
    for instances, horizontal in zip(*samples, strict=True):
        assert np.array_equal(instances.image, horizontal.image) and horizontal.masks is None
        if len(instances.boxes) == len(horizontal.boxes):
            assert (instances.boxes[:, :2] >= np.floor(horizontal.boxes[:, :2])).all()
            assert (instances.boxes[:, 2:] <= np.ceil(horizontal.boxes[:, 2:])).all()
            # A sliver at the crop's border may cover few pixels' centres.
            assert np.percentile(np.abs(instances.boxes - horizontal.boxes), 90) < 1.5
        assert 0 <= len(horizontal.boxes) - len(instances.boxes) <= 1  # one so thin that it covers no pixel's centre
        assert (horizontal.boxes >= 0).all() and (horizontal.boxes <= 128).all()


def test_objects_cut_by_the_crop_are_ignored(houses_dir, house_values):
    recipe = plain(house_values, "rtmdet_ins_test", mosaic_prob=0.0, min_visible=1.0)
    sampler = CropSampler(load_chips(houses_dir, recipe.model), recipe)
    samples = [sampler.draw(0, position) for position in range(12)]
    assert sum(len(sample.ignored) for sample in samples) > 5 and sum(len(sample.boxes) for sample in samples) > 5
    for sample in samples:
        assert sample.ignored.shape[1] == 4 and len(sample.masks) == len(sample.labels) == len(sample.boxes)
        touches = (sample.ignored <= 0.01) | (sample.ignored >= 127.99)
        assert touches.any(axis=1).all()


def test_masks_end_where_the_chip_ends(broken, recipe_values):
    """Beyond a chip crops are grey: what is there of an object is not known, and not to be learnt."""

    def move(index):
        index["chips"][0]["outlines"][0] = [[[-30, 20, 50, 20, 50, 40, -30, 40]]]
        index["chips"][0]["boxes"][0] = [10, 30, 80, 20, 0]

    recipe = plain(recipe_values, "rtmdet_ins_test")
    chip = load_chips(broken(move), recipe.model)[0]
    assert chip.boxes_of("horizontal")[0].tolist() == [25, 30, 50, 20, 0]
    assert chip.boxes_of("rotated")[0].tolist() == [10, 30, 80, 20, 0]
    assert outline_points(chip.shapes[0])[:, 0].min() == 0


def test_boxes_without_outlines(broken, recipe_values):
    def remove(index):
        for chip in index["chips"]:
            del chip["outlines"]
        index["chips"][0]["boxes"][0] = [50, 40, 30, 10, np.pi / 6]

    folder = broken(remove)
    horizontal = plain(recipe_values, "rtmdet_test")
    chips = load_chips(folder, horizontal.model)
    half = [15 * 3**0.5 / 2 + 2.5, 7.5 + 5 * 3**0.5 / 2]  # half extents by hand
    assert chips[0].boxes_of("horizontal")[0] == pytest.approx([50, 40, 2 * half[0], 2 * half[1], 0])
    assert np.array_equal(chips[0].boxes_of("rotated"), chips[0].boxes)
    assert CropSampler(chips, horizontal).draw(0, 0).boxes.shape[1] == 4
    with pytest.raises(ConfigError, match="4 objects of scene 'alpha' have a box but no outline"):
        CropSampler(chips, plain(recipe_values, "rtmdet_ins_test"))
    nothing = LabelledImage(
        "empty.npy", "empty", np.zeros((4, 9, 9), np.uint8), np.zeros((0, 5)), np.zeros(0, int), np.zeros(0, bool)
    )
    assert nothing.boxes_of("mask").shape == (0, 5) and nothing.shapes == []


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda index: index.pop("bands"), AnnotationError, "not an index"),
        (lambda index: index.update(bands=["red"]), ConfigError, "also wants"),
        (lambda index: index.update(gsd_m=10.0), ConfigError, "10.0 m a pixel"),
        (lambda index: index.update(gsd_m=None), ConfigError, "own resolution"),
        (lambda index: index["stretch"].update(high=0.5), ConfigError, "stretched"),
        (lambda index: index["stretch"].update(kind="log"), AnnotationError, "not an index"),
        (lambda index: index["chips"][0].update(boxes=[["a"] * 5]), AnnotationError, "chip 1: it is not an entry"),
        (lambda index: index.update(classes=["boat"]), ConfigError, "'boat'"),
        (lambda index: index["chips"][0].update(file="gone.npy"), DatasetNotFoundError, "gone.npy"),
        (lambda index: index["chips"][0].update(width=99), AnnotationError, "not what chips.json says"),
        (lambda index: index["chips"][0].update(labels=[0]), AnnotationError, "4 boxes, 1 labels"),
        (lambda index: index["chips"][1].update(labels=[0, 0, 1, 0]), AnnotationError, r"labels \[1\], .* 1 classes"),
        (lambda index: index["chips"][1].update(labels=[0, 0, -1, 0]), AnnotationError, r"chip 2: .*labels \[-1\]"),
        (lambda index: index["chips"][1].update(labels=[0, 0, 0.5, 0]), AnnotationError, r"labels \[0.5\]"),
        (lambda index: index["chips"][2].pop("scene"), AnnotationError, "chip 3: .*'scene'.*cut the chips again"),
        (
            lambda index: index["chips"][0]["boxes"][0].__setitem__(2, -3),
            AnnotationError,
            "not finite, or have no area",
        ),
        (lambda index: index["chips"][0]["boxes"][0].__setitem__(3, 0), AnnotationError, "not finite, or have no area"),
        (lambda index: index["chips"][0]["outlines"].pop(), AnnotationError, "4 boxes, .* 3 outlines"),
        (lambda index: index["chips"][0].update(outlines=[[[[1, 2, 3]]]] * 4), AnnotationError, "not an entry"),
        (lambda index: index["chips"][0].update(outlines=7), AnnotationError, "not an entry"),
    ],
)
def test_an_index_that_is_wrong_says_where(broken, recipe, change, error, message):
    with pytest.raises(error, match=message):
        load_chips(broken(change), recipe.model)


def test_a_truncated_chip_is_named(broken, recipe):
    folder = broken(lambda index: None)
    path = folder / "beta.npy"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(AnnotationError, match=r"beta\.npy"):
        load_chips(folder, recipe.model)


def test_no_chips_says_how_to_get_them(tmp_path, recipe):
    with pytest.raises(DatasetNotFoundError, match="rtmdet-geo data chips"):
        load_chips(tmp_path, recipe.model)


def test_split_refuses_what_cannot_be(chips_dir, recipe_values):
    recipe_values["data"]["folds"] = {"a": ["atlantis"]}
    recipe = parse_recipe(recipe_values)
    chips = load_chips(chips_dir, recipe.model)
    with pytest.raises(ConfigError, match="atlantis"):
        split_chips(chips, recipe)
    recipe_values["data"] |= {"folds": {}, "fold": None, "holdout": ["alpha", "beta", "gamma"]}
    with pytest.raises(ConfigError, match="no labelled object"):
        split_chips(chips, parse_recipe(recipe_values))
