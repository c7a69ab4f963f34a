"""Chips on disk: what is checked, how scenes are split, that crops are a pure function."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from rtmdet_geo.config import parse_recipe
from rtmdet_geo.errors import AnnotationError, ConfigError, DatasetNotFoundError
from rtmdet_geo.training.datasets import BatchLoader, CropSampler, load_chips, split_chips


def same(first, second):
    return all(
        np.array_equal(getattr(first, name), getattr(second, name)) for name in ("image", "boxes", "labels", "ignored")
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


def test_crops_are_a_pure_function_whatever_the_threads(chips_dir, recipe):
    chips = load_chips(chips_dir, recipe.model)
    sampler = CropSampler(chips, recipe)
    threaded, plain = (BatchLoader(sampler, batch_size=3, workers=workers) for workers in (2, 0))
    for iteration in (0, 1, 5):
        for first, second in zip(threaded.batch(iteration), plain.batch(iteration), strict=True):
            assert same(first, second)
    threaded.close()
    assert not same(sampler.draw(0, 0), sampler.draw(0, 1))


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


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda index: index.pop("bands"), AnnotationError, "not an index"),
        (lambda index: index.update(bands=["red"]), ConfigError, "also wants"),
        (lambda index: index.update(gsd_m=10.0), ConfigError, "10.0 m a pixel"),
        (lambda index: index.update(gsd_m=None), ConfigError, "own resolution"),
        (lambda index: index["stretch"].update(high=0.5), ConfigError, "stretched"),
        (lambda index: index["stretch"].update(kind="log"), AnnotationError, "not an index"),
        (lambda index: index["chips"][0].update(boxes=[["a"] * 5]), AnnotationError, "not an index"),
        (lambda index: index.update(classes=["boat"]), ConfigError, "'boat'"),
        (lambda index: index["chips"][0].update(file="gone.npy"), DatasetNotFoundError, "gone.npy"),
        (lambda index: index["chips"][0].update(width=99), AnnotationError, "not what chips.json says"),
        (lambda index: index["chips"][0].update(labels=[0]), AnnotationError, "one label each"),
        (lambda index: index["chips"][0]["boxes"][0].__setitem__(2, -3), AnnotationError, "finite boxes"),
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


def test_band_dropout_needs_a_fill_value(chips_dir, recipe_values):
    recipe_values["augment"]["band_dropout"] = {"red": 0.5}
    recipe = parse_recipe(recipe_values)
    with pytest.raises(ConfigError, match="red"):
        CropSampler(load_chips(chips_dir, recipe.model), recipe)
