"""Recipes: defaults, inheritance, overrides, and errors that help."""

from __future__ import annotations

import pytest

from rtmdet_geo.config import load_recipe, parse_recipe, recipe_names
from rtmdet_geo.errors import ConfigError
from rtmdet_geo.recipe_sections import ModelSection

MINIMAL = {"name": "t", "model": {"classes": ["ship"]}, "data": {"chips": "chips"}}
FOLDERS = {"format": "folders", "train_images": "train"}
CLASSIFIER = {**MINIMAL, "data": FOLDERS, "augment": {"sampling": "classification"}}


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_every_recipe_of_the_package_loads_and_survives_a_round_trip(tmp_path):
    assert recipe_names()
    for name in recipe_names():
        recipe = load_recipe(name)
        assert load_recipe(write(tmp_path / "again.yaml", recipe.to_yaml())) == recipe


def test_exponent_without_a_dot_is_a_number():
    assert parse_recipe({**MINIMAL, "optim": {"lr": "1e-3"}}).optim.lr == 1e-3


def test_unknown_key_names_its_neighbour():
    with pytest.raises(ConfigError, match=r"unknown key 'optim.lrr'; did you mean 'lr'\?"):
        parse_recipe({**MINIMAL, "optim": {"lrr": 1}})


def test_unknown_key_inside_the_stretch():
    with pytest.raises(ConfigError, match=r"model\.stretch\.hihg.*did you mean 'high'"):
        parse_recipe({**MINIMAL, "model": {"classes": ["ship"], "stretch": {"hihg": 1}}})


def test_base_merges_mappings_and_replaces_lists(tmp_path):
    write(tmp_path / "a.yaml", "name: a\nmodel: {classes: [x, y], gsd_m: 2}\ndata: {chips: c}\noptim: {lr: 1}\n")
    child = write(tmp_path / "b.yaml", "base: a.yaml\nname: b\nmodel: {classes: [z]}\noptim: {batch_size: 3}\n")
    recipe = load_recipe(child, ["optim.lr=1e-4", "data.holdout=[p]"])
    assert (recipe.name, recipe.model.classes, recipe.model.gsd_m) == ("b", ("z",), 2)
    assert (recipe.optim.lr, recipe.optim.batch_size, recipe.data.holdout) == (1e-4, 3, ("p",))


def test_base_that_points_to_itself_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="deeper than 2"):
        load_recipe(write(tmp_path / "a.yaml", "base: a.yaml\n"))


@pytest.mark.parametrize("override", ["optim.lr", "=3", "name.first=3", "optim.lr=[1"])
def test_malformed_override(tmp_path, override):
    path = write(tmp_path / "a.yaml", parse_recipe(MINIMAL).to_yaml())
    with pytest.raises(ConfigError, match="override"):
        load_recipe(path, [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [", "not YAML"), ("- 1", "mapping"), ("base: no.yaml", "not a file"), ("name: x\n", "model is missing")],
)
def test_malformed_file(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe(write(tmp_path / "a.yaml", text))


def test_no_such_recipe_lists_those_there_are():
    with pytest.raises(ConfigError, match=recipe_names()[0]):
        load_recipe("nothing_r")


@pytest.mark.parametrize(
    ("name", "kind", "iou"),
    [("rtmdet_r_s", "rotated", 0.1), ("rtmdet_m", "horizontal", 0.65), ("rtmdet_ins_tiny", "mask", 0.6)],
)
def test_the_model_decides_the_kind_and_its_overlap(name, kind, iou):
    recipe = parse_recipe({**MINIMAL, "model": {"classes": ["ship"], "name": name}})
    assert recipe.model.kind == kind and recipe.validation.nms_iou_threshold == iou
    given = {**MINIMAL, "model": {"classes": ["ship"], "name": name}, "validation": {"nms_iou_threshold": 0.3}}
    assert parse_recipe(given).validation.nms_iou_threshold == 0.3


def test_the_kind_is_that_of_the_builder():
    pytest.importorskip("torch")
    from rtmdet_geo.models import BUILDERS

    for name, build in BUILDERS.items():
        kind = parse_recipe({**MINIMAL, "model": {"classes": ["s"], "name": name}}).model.kind
        if name.endswith("_test"):  # of each kind one; the sizes share the head's class
            assert kind == build().kind


@pytest.mark.parametrize(
    ("name", "message"),
    [("rtmdet_inz_tiny", "no network; did you mean rtmdet_ins_tiny"), ("cspnext_s", "is no detector")],
)
def test_a_name_that_is_no_detector_finds_no_objects(name, message):
    model = ModelSection(classes=("ship",), name=name)
    with pytest.raises(ConfigError, match=message):
        _ = model.object_kind


@pytest.mark.parametrize(
    "values", [[], {"model": 3}, {**MINIMAL, "validation": 3}, {**MINIMAL, "model": {"name": [1]}}]
)
def test_malformed_sections_are_config_errors(values):
    with pytest.raises(ConfigError):
        parse_recipe(values)


def test_values_that_contradict_each_other():
    with pytest.raises(ConfigError, match="fold 'z'"):
        parse_recipe({**MINIMAL, "data": {"chips": "c", "fold": "z"}})
    with pytest.raises(ConfigError, match="one value for each"):
        parse_recipe({**MINIMAL, "model": {"classes": ["s"], "bands": ["red"]}})
    with pytest.raises(ConfigError, match=r"^recipe: model: optional_bands names nir, but bands are red, green, blue$"):
        parse_recipe({**MINIMAL, "model": {"classes": ["s"], "optional_bands": {"nir": 5}}})
    for section in ({"augment": {"band_dropout": {"nir": 0.5}}}, {"validation": {"drop_bands": [["nir"]]}}):
        with pytest.raises(ConfigError, match="names nir, which has no fill value"):
            parse_recipe({**MINIMAL, **section})


# ---------------------------------------------------------------- weights to start from


def parse_model(**values):
    return parse_recipe(
        {
            **(CLASSIFIER if str(values.get("name")).startswith("cspnext") else MINIMAL),
            "model": {"classes": ["ship"], **values},
        }
    ).model


@pytest.mark.parametrize(
    "values",
    [
        {"weights": "mine.pth"},
        {"weights": "mine.pth", "transfer": True, "weights_bands": ["blue", "green", "red"]},
        {"weights": "mine.pth", "weights_bands": ["red", "green", "blue"]},
        {"weights": "rtmdet_r_tiny_dota", "transfer": True},
        {"weights": "rtmdet_r_tiny_dota", "transfer": True, "weights_parts": ["backbone", "neck"]},
        {"weights": "cspnext_tiny_imagenet", "weights_parts": ["backbone"]},
        {"weights": "sen2ships_r", "weights_parts": ["backbone", "neck", "bbox_head"]},
        {"name": "cspnext_tiny", "weights": "mine.pth", "weights_parts": ["head"]},
        {"weights": "rtmdet_r_tiny_hrsc", "bands": ["blue", "green", "red"]},
    ],
)
def test_weights_to_start_from(values, tmp_path):
    model = parse_model(**values)
    sections = CLASSIFIER if model.kind == "classification" else MINIMAL
    again = load_recipe(write(tmp_path / "a.yaml", parse_recipe({**sections, "model": model.model_dump()}).to_yaml()))
    assert again.model == model
    for key, value in values.items():
        assert getattr(model, key) == (tuple(value) if isinstance(value, list) else value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"transfer": True}, "model: transfer: there are no weights to load; name them with weights"),
        ({"weights_parts": ["neck"], "weights_bands": ["red"]}, "model: weights_parts and weights_bands: there are no"),
        ({"weights": "a.pth", "weights_parts": []}, "must name some of backbone, neck, bbox_head, each once"),
        ({"weights": "a.pth", "weights_parts": ["head"]}, "must name some of backbone, neck, bbox_head, each once"),
        (
            {"weights": "a.pth", "weights_parts": ["neck", "neck"]},
            r"each once, not \['neck', 'neck'\]; null loads them",
        ),
        ({"weights": "a.pth", "weights_parts": "neck"}, "weights_parts: Input should be a valid tuple"),
        ({"weights": "a.pth", "name": "cspnext_s", "weights_parts": ["neck"]}, "must name some of backbone, head"),
        ({"weights": "a.pth", "weights_bands": ["red"]}, "weights_bands red are not bands red, green, blue; transfer"),
        (
            {"weights": "rtmdet_r_tiny_dota", "transfer": True, "weights_bands": ["red", "green", "blue"]},
            "'rtmdet_r_tiny_dota' is for bands blue, green, red; leave weights_bands out",
        ),
        ({"weights": "rtmdet_r_tiny_dota"}, "has 15 classes, the network 1; transfer=True .model.transfer in a recipe"),
        ({"weights": "rtmdet_r_tiny_hrsc"}, "is for bands blue, green, red, the network for red, green, blue; transf"),
        ({"weights": "rtmdet_r_s_dota", "transfer": True}, "weights of rtmdet_r_s, not of rtmdet_r_tiny; published"),
        ({"weights": "cspnext_tiny_imagenet", "transfer": True}, r"parts=\['backbone'\] \(model.weights_parts"),
        ({"weight_parts": ["neck"]}, r"unknown key 'model.weight_parts'; did you mean 'weights_parts'\?"),
    ],
)
def test_weights_that_cannot_be_loaded_so(values, message):
    with pytest.raises(ConfigError, match=message) as caught:
        parse_model(**values)
    assert "\n" not in str(caught.value)


def test_a_missing_value_is_named_and_nothing_else():
    with pytest.raises(ConfigError, match=r"^mine\.yaml: name is missing$"):
        parse_recipe({"model": {"classes": ["ship"]}, "data": {"chips": "chips"}}, source="mine.yaml")


# Sizes, lists of classes, and sections that must agree.


@pytest.mark.parametrize(
    "task", ["coco_det", "coco_ins", "dota_r", "dota_r_ms", "dota_r_100e", "hrsc_r", "hrsc_r_strong"]
)
def test_every_published_size_of_a_recipe_resolves(task):
    family = {"coco_det": "rtmdet", "coco_ins": "rtmdet_ins"}.get(task, "rtmdet_r")
    sizes = ("tiny", "s", "m", "l") if family == "rtmdet_r" else ("tiny", "s", "m", "l", "x")
    for size in sizes:
        recipe = load_recipe(task, [f"model.name={family}_{size}"])
        assert (recipe.model.name, recipe.model.size) == (f"{family}_{size}", size)


def test_sizes_change_what_is_published_for_them():
    """RECIPES: tiny has smaller caches that drop the oldest, tiny and s a narrower range, ins x half the batch."""
    tiny, small, large = (load_recipe("coco_det", [f"model.name=rtmdet_{size}"]) for size in ("tiny", "s", "l"))
    assert [recipe.augment.scale_min for recipe in (tiny, small, large)] == [0.5, 0.5, 0.1]
    assert [recipe.augment.mosaic_cache for recipe in (tiny, small, large)] == [20, 40, 40]
    assert [recipe.augment.mixup_random_pop for recipe in (tiny, small, large)] == [False, True, True]
    assert [recipe.augment.mixup_prob for recipe in (tiny, small, large)] == [0.5, 1.0, 1.0]
    assert (tiny.model.weights, large.model.weights) == ("cspnext_tiny_imagenet", None)
    assert load_recipe("coco_ins", ["model.name=rtmdet_ins_x"]).optim.batch_size == 16
    assert load_recipe("coco_ins").augment == load_recipe("coco_det").augment


@pytest.mark.parametrize(
    ("name", "lr", "batch", "epochs", "repeat", "weak"),
    [
        ("coco_det", 0.004, 256, 300, 1, 20),
        ("dota_r", 0.004 / 16, 8, 36, 1, 0),
        ("dota_r_ms", 0.004 / 16, 8, 36, 1, 0),
        ("dota_r_ms_coco", 0.004 / 16, 8, 36, 1, 0),
        ("dota_r_100e", 0.004 / 16, 8, 100, 1, 10),
        ("hrsc_r", 0.004 / 16, 8, 36, 3, 0),
        ("hrsc_r_strong", 0.004 / 2, 8, 100, 3, 10),
    ],
)
def test_recipes_have_the_published_schedule(name, lr, batch, epochs, repeat, weak):
    recipe = load_recipe(name)
    optim = recipe.optim
    assert (optim.lr, optim.lr_for_batch, optim.epochs) == (pytest.approx(lr), batch, epochs)
    assert (optim.weight_decay, optim.lr_min_factor, optim.warmup_iterations, optim.ema_momentum) == (
        0.05,
        0.05,
        1000,
        2e-4,
    )
    assert (recipe.data.repeat, recipe.augment.weak_epochs) == (repeat, weak)


def test_the_row_of_a_size_goes_before_an_override(tmp_path):
    text = parse_recipe({**MINIMAL, "model": {"classes": ["ship"], "name": "rtmdet_r_s"}}).to_yaml()
    path = write(tmp_path / "a.yaml", text + "by_size:\n  s: {optim: {lr: 0.5}}\n  tiny: {optim: {lr: 0.25}}\n")
    assert load_recipe(path).optim.lr == 0.5
    assert load_recipe(path, ["model.name=rtmdet_r_tiny"]).optim.lr == 0.25
    assert load_recipe(path, ["model.name=rtmdet_r_m"]).optim.lr == 1e-3
    assert load_recipe(path, ["optim.lr=3"]).optim.lr == 3
    assert "by_size" not in load_recipe(path).to_yaml()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("by_size: 3\n", "by_size must map sizes"),
        ("by_size: {s: 3}\n", "by_size must map sizes"),
        ("by_size: {huge: {}}\n", "by_size names huge; sizes are l, m, nano"),
        ("by_size: {tiny: {optim: {lrr: 1}}}\n", "unknown key 'optim.lrr'; did you mean 'lr'"),
    ],
)
def test_malformed_rows_of_sizes(tmp_path, row, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe(write(tmp_path / "a.yaml", parse_recipe(MINIMAL).to_yaml() + row))


def test_classes_by_the_name_of_a_public_list():
    assert len(parse_model(classes="coco").classes) == 80
    assert parse_model(classes="dota_v2.0").classes[15:] == ("container-crane", "airport", "helipad")
    with pytest.raises(ConfigError, match="no list of classes 'coko'"):
        parse_model(classes="coko")


IMAGES = {"format": "coco", "train_images": "train", "train_labels": "train.json"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"augment": {"sampling": "images", "hue": 1}}, "unknown key 'augment.hue'"),
        (
            {"augment": {"sampling": "images", "hue_dleta": 1}},
            "unknown key 'augment.hue_dleta'; did you mean 'hue_delta'",
        ),
        ({"augment": {"sampling": "image"}}, "does not match any of the expected tags"),
        ({"augment": {"sampling": "images", "image_sizes": [100]}}, "multiples of 32 px"),
        ({"augment": {"sampling": "images", "scale_min": 2}}, "scale_min 2.0 is above scale_max 1.0"),
        ({"augment": {"sampling": "images", "axis_aligned_classes": ["tank"]}}, "names tank, not among model.classes"),
        ({"augment": {"sampling": "classification"}}, "do not go together"),
        ({"optim": {"epochs": 3}}, "random crops know no epoch"),
        ({"optim": {"epochs": 3, "iterations": 5}}, "iterations and epochs are both given"),
        ({"data": {"format": "coco"}}, "train_images is missing"),
        ({"data": {"format": "dota", "train_images": "a"}}, "train_labels or val_labels is missing"),
        ({"data": {"format": "chips"}}, "chips is missing"),
        ({"loop": {"early_stop": 3}}, "early_stop counts validations: set validation.interval_epochs"),
        ({"model": {"classes": ["a", "b", "a"]}}, "each class must be named once; a"),
        ({"model": {"classes": []}}, "name at least one class"),
        (
            {"data": IMAGES, "model": {"classes": ["s"], "stretch": {"kind": "percentile"}}},
            "images are trained on as they",
        ),
        (
            {"data": IMAGES, "model": {"classes": ["s"], "bands": ["nir"], "mean": [1], "std": [1]}},
            "images have red, green",
        ),
        ({"validation": {"protocol": "coco"}}, "protocol coco is for axis-aligned boxes and masks"),
        ({"model": {"classes": ["s"], "name": "cspnext_s"}}, "do not go together"),
    ],
)
def test_sections_that_contradict_each_other(values, message):
    with pytest.raises(ConfigError, match=message):
        parse_recipe({**MINIMAL, **values})


def test_a_recipe_without_a_length_has_the_default_one():
    assert parse_recipe(MINIMAL).optim.iterations == 2000
    images = {"augment": {"sampling": "images"}, "optim": {"epochs": 3}}
    assert parse_recipe({**MINIMAL, **images}).optim.iterations is None


def test_a_file_goes_before_what_its_base_says_of_a_size(tmp_path):
    write(tmp_path / "a.yaml", "name: a\nmodel: {classes: [x]}\ndata: {chips: c}\nby_size: {tiny: {optim: {lr: 1}}}\n")
    child = write(tmp_path / "b.yaml", "base: a.yaml\nname: b\noptim: {lr: 2, batch_size: 3}\n")
    assert (load_recipe(child).optim.lr, load_recipe(child).optim.batch_size) == (2, 3)
    row = write(tmp_path / "c.yaml", "base: a.yaml\nname: c\noptim: {lr: 2}\nby_size: {tiny: {optim: {lr: 4}}}\n")
    assert load_recipe(row).optim.lr == 4
    assert load_recipe(row, ['model.name="rtmdet_r_s"']).optim.lr == 2
    scratch = load_recipe("hrsc_r_scratch")
    assert scratch.model.weights is None and scratch.model.weights_parts is None


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"data": {"chips": "c", "repeat": 3}}, "data.repeat"),
        (
            {"validation": {"interval_epochs": 3}, "optim": {"warmup_epochs": 2}},
            "validation.interval_epochs, optim.warmup_",
        ),
        ({"data": {"chips": "c", "train_ids": "a.txt"}}, "data.train_ids"),
        ({"augment": {"sampling": "images"}, "loop": {"mine_interval": 5}}, "loop.mine_interval"),
        ({"data": {**IMAGES, "holdout": ["a"]}}, "data.holdout"),
    ],
)
def test_settings_without_effect_are_refused(values, names):
    with pytest.raises(ConfigError, match=f"{names}.*: no effect with"):
        parse_recipe({**MINIMAL, **values})


@pytest.mark.parametrize(
    "values",
    [
        {"loop": {"seed": -1}},
        {"validation": {"iou_thresholds": []}},
        {"validation": {"drop_bands": []}},
        {"model": {"classes": ["s"], "std": [1, 0, 1]}},
        {"augment": {"sampling": "images", "flip_directions": []}},
    ],
)
def test_values_that_cannot_be_meant(values):
    with pytest.raises(ConfigError):
        parse_recipe({**MINIMAL, **values})


@pytest.mark.parametrize(
    ("data", "model", "sampling"),
    [
        ({"chips": "c"}, {}, "crops"),
        (IMAGES, {}, "images"),
        ({"format": "folders", "train_images": "a"}, {"name": "cspnext_s"}, "classification"),
    ],
)
def test_the_format_of_the_data_says_how_samples_are_made(data, model, sampling):
    values = {"name": "t", "model": {"classes": ["ship"], **model}, "data": data}
    assert parse_recipe(values).augment.sampling == sampling
    assert parse_recipe({**values, "augment": {}}).augment.sampling == sampling


def test_a_classifier_validates_at_the_published_ratio():
    assert parse_recipe({**CLASSIFIER, "model": {"classes": ["a"], "name": "cspnext_s"}}).augment.eval_size == 236
    smaller = {"sampling": "classification", "image_size": 64}
    small = parse_recipe({**CLASSIFIER, "model": {"classes": ["a"], "name": "cspnext_s"}, "augment": smaller})
    assert small.augment.eval_size == 67
