"""Image folders, the order of samples, bad files, accuracy, and the recipe of ImageNet."""

from __future__ import annotations

import collections
import logging
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rtmdet_geo.annotations.folders import FoldersSource
from rtmdet_geo.class_names import IMAGENET
from rtmdet_geo.config import load_recipe, parse_recipe
from rtmdet_geo.errors import AnnotationError, ConfigError, DatasetNotFoundError
from rtmdet_geo.evaluation.classification import accuracy, accuracy_by_class, true_ranks
from rtmdet_geo.training.class_sampler import CentreSampler, ClassSampler
from rtmdet_geo.training.image_files import ImageCache
from rtmdet_geo.training.image_folders import load_class_images, load_folders

BANDS = ("red", "green", "blue")
CACHE = ImageCache(10_000_000)


def load(root, classes, **options):
    """Images of all folders below ``root``."""
    return load_folders(FoldersSource(root, None, tuple(classes)), BANDS, CACHE, **options)


def write_image(path, colour=(200, 100, 50), size=(48, 40)):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.full((size[1], size[0], 3), colour[::-1], np.uint8)
    assert cv2.imwrite(str(path), image)
    return path


def recipe_of(root, *, classes=("cat", "dog"), data=None, augment=None, optim=None, loop=None):
    return parse_recipe(
        {
            "name": "pets",
            "model": {"name": "cspnext_test", "classes": list(classes), "stretch": {"kind": "none"}},
            "data": {"format": "folders", "root": str(root), "train_images": "train", **(data or {})},
            "augment": {"sampling": "classification", "image_size": 32, "eval_size": 36, **(augment or {})},
            "optim": {"epochs": 2, "batch_size": 4, **(optim or {})},
            "loop": {"seed": 3, **(loop or {})},
        }
    )


@pytest.fixture(scope="module")
def pets(tmp_path_factory):
    """Five cats and six dogs to train, two and one to validate; each of another grey."""
    root = tmp_path_factory.mktemp("pets")
    for number in range(5):
        write_image(root / "train" / "cat" / f"{number}.png", (10 * number,) * 3)
    for number in range(6):
        write_image(root / "train" / "dog" / "sub" / f"{number}.PNG", (100 + 10 * number,) * 3)
    for name in ("cat/a.png", "cat/b.png", "dog/c.png"):
        write_image(root / "val" / name)
    return root


# --- folders


def test_folders_are_classes_in_the_order_of_the_recipe(pets):
    training, left_out = load_class_images(recipe_of(pets, classes=("dog", "cat"), data={"val_images": "val"}))
    assert [(image.name, image.label) for image in training] == [
        *((f"cat/{number}.png", 1) for number in range(5)),
        *((f"dog/sub/{number}.PNG", 0) for number in range(6)),
    ]
    assert [(image.name, image.label) for image in left_out] == [("cat/a.png", 1), ("cat/b.png", 1), ("dog/c.png", 0)]
    pixels = left_out[0].pixels
    assert pixels.shape == (3, 40, 48) and pixels[:, 7, 7].tolist() == [200, 100, 50]
    assert (
        load_class_images(recipe_of("elsewhere", data={"val_images": "val"}).with_data(pets))[0][0].root
        == pets / "train"
    )


def test_a_kept_image_is_not_opened_again(tmp_path):
    path = write_image(tmp_path / "cat" / "1.png")
    for budget, is_kept in ((10_000_000, True), (0, False)):
        write_image(path)
        (image,) = load_folders(FoldersSource(tmp_path, None, ("cat",)), BANDS, ImageCache(budget))
        pixels = image.pixels
        path.unlink()
        if is_kept:
            np.testing.assert_array_equal(image.pixels, pixels)
        else:
            with pytest.raises(AnnotationError, match="is missing"):
                _ = image.pixels


def test_what_is_no_image_is_passed_over(pets, tmp_path, caplog):
    write_image(tmp_path / "cat" / "1.png")
    write_image(tmp_path / "cat" / ".2.png")
    write_image(tmp_path / ".git" / "3.png")
    write_image(tmp_path / "stray.png")
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    with caplog.at_level(logging.WARNING):
        found = load(tmp_path, ("cat", "dog", "cow"))
    assert [image.name for image in found] == ["cat/1.png"]
    assert "classes without an image: dog, cow" in caplog.text and "stray.png in no class folder" in caplog.text


def test_unknown_folders_are_refused_or_dropped(pets, caplog):
    with pytest.raises(AnnotationError, match=r"no class of the recipe: dog; did you mean 'dogs'\?.*unknown_classes"):
        load_class_images(recipe_of(pets, classes=("cat", "dogs")))
    with caplog.at_level(logging.WARNING):
        training, _ = load_class_images(recipe_of(pets, classes=("cat",), data={"unknown_classes": "drop"}))
    assert {image.name.split("/")[0] for image in training} == {"cat"} and "left out: dog" in caplog.text


def test_nothing_to_learn_from(tmp_path, pets):
    with pytest.raises(DatasetNotFoundError, match=r"folder of images .*missing"):
        load(tmp_path / "missing", ("cat",))
    with pytest.raises(DatasetNotFoundError, match=r"no images in folders of classes"):
        load(tmp_path, ("cat", "dog"))
    with pytest.raises(DatasetNotFoundError, match=r"no image of a class.*\(cow\)"):
        load(pets / "train", ("cow",), unknown_classes="drop")


@pytest.mark.parametrize("place", [".", ".."], ids=["beside the folders", "above"])
def test_a_file_says_which_folder_is_which_class(tmp_path, place):
    root = tmp_path / "train"
    for folder in ("n1", "n2", "dog"):
        write_image(root / folder / "1.png")
    (root / place / "classes.txt").write_text("n2 crane (bird)\n\nn1\tcat\nn3 unused\n")
    found = load(root, ("cat", "crane (bird)", "dog"))
    assert [(image.name, image.label) for image in found] == [("dog/1.png", 2), ("n1/1.png", 0), ("n2/1.png", 1)]
    for text, problem in (("n1\n", "line 1: 'n1' is not"), ("n1 a\nn1 b\n", "line 2: 'n1 b' names a folder again")):
        (root / place / "classes.txt").write_text(text)
        with pytest.raises(AnnotationError, match=problem):
            load(root, ("cat",))


def test_wordnet_ids_are_imagenet_classes_in_their_order(tmp_path):
    for number in range(1000):
        (tmp_path / f"n{10_000_000 + 7 * number}").mkdir()
    write_image(tmp_path / f"n{10_000_000 + 7 * 134}" / "1.JPEG")
    write_image(tmp_path / "n10000000" / "2.JPEG")
    found = load(tmp_path, IMAGENET)
    assert [(image.label, IMAGENET[image.label]) for image in found] == [(0, "tench"), (134, "crane (bird)")]
    (tmp_path / "n10000007").rmdir()
    with pytest.raises(AnnotationError, match=r"n10000000, .* 994 more; a file classes\.txt"):
        load(tmp_path, IMAGENET)
    # Folders named by class need no file, and some classes may be missing.
    write_image(tmp_path / "named" / "goldfish" / "1.png")
    assert load(tmp_path / "named", IMAGENET)[0].label == 1


def test_a_list_takes_a_part(pets, tmp_path):
    (pets / "some.txt").write_text("cat/1.png\ndog/sub/4\n")
    training, _ = load_class_images(recipe_of(pets, data={"train_ids": "some.txt"}))
    assert [image.name for image in training] == ["cat/1.png", "dog/sub/4.PNG"]
    (pets / "some.txt").write_text("cat/1.png\ncat/17\n")
    with pytest.raises(DatasetNotFoundError, match=r"not there: cat/17; names are"):
        load_class_images(recipe_of(pets, data={"train_ids": "some.txt"}))
    (pets / "some.txt").write_text("\ufeffcat/1.png\n")  # as Windows' editors begin a file
    assert len(load_class_images(recipe_of(pets, data={"train_ids": "some.txt"}))[0]) == 1
    (pets / "some.txt").write_text("\n")
    with pytest.raises(DatasetNotFoundError, match=r"some\.txt' is empty"):
        load_class_images(recipe_of(pets, data={"train_ids": "some.txt"}))
    with pytest.raises(DatasetNotFoundError, match=r"none\.txt' is missing"):
        load_class_images(recipe_of(pets, data={"train_ids": "none.txt"}))


def test_lists_may_come_with_the_recipes(pets, tmp_path, monkeypatch):
    monkeypatch.setattr("rtmdet_geo.annotations.parts.recipe_folder", lambda: tmp_path)
    (tmp_path / "few.txt").write_text("dog/sub/2.PNG\n")
    training, _ = load_class_images(recipe_of(pets, data={"train_ids": "few.txt"}))
    assert [image.name for image in training] == ["dog/sub/2.PNG"]


# --- order of samples


class Counted:
    """An image without a file."""

    def __init__(self, number):
        self.name, self.label, self.pixels = str(number), 0, np.zeros((3, 40, 40), np.uint8)


def sampler_of(number, *, repeats=1, repeat=1, step=4, own=4, seed=3, **data):
    recipe = recipe_of(
        ".", augment={"repeats": repeats, "randaugment_num": 0}, data={"repeat": repeat, **data}, loop={"seed": seed}
    )
    return ClassSampler([Counted(n) for n in range(number)], recipe, samples_per_step=step, samples_per_process=own)


def drawn(sampler, iterations):
    """Return (iterations, positions): which image each sample shows."""
    positions = range(sampler.samples_per_step)
    return np.array([[int(sampler.draw(i, p).names[0]) for p in positions] for i in iterations])


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 23), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
def test_an_epoch_shows_every_image_as_often_as_asked(number, repeat, processes, own):
    sampler = sampler_of(number, repeat=repeat, step=processes * own, own=own)
    assert sampler.epoch_length == number * repeat
    numbers = np.arange(2 * number * repeat)
    steps = -(-len(numbers) // (processes * own))
    seen = drawn(sampler, range(steps)).reshape(steps, processes, own)
    in_order = seen.transpose(0, 2, 1).reshape(-1)[: len(numbers)]  # numbers go round the processes
    for epoch in (in_order[: number * repeat], in_order[number * repeat :]):
        assert collections.Counter(epoch.tolist()) == dict.fromkeys(range(number), repeat)


def test_epochs_and_seeds_have_their_own_orders():
    one = drawn(sampler_of(40), range(20)).reshape(2, 40)
    assert (one[0] != one[1]).any() and (one[0] != np.arange(40)).any()
    assert (drawn(sampler_of(40, seed=4), range(10)).reshape(-1) != one[0]).any()


def test_copies_meet_in_a_step_and_on_different_processes():
    """Twelve images three times each in steps of six over three processes: two images a step, each on every process."""
    sampler = sampler_of(12, repeats=3, step=6, own=2)
    steps = drawn(sampler, range(2)).reshape(2, 3, 2)
    for step in steps:
        assert len(np.unique(step)) == 2
        assert (step == step[0]).all()
    assert len(np.unique(steps)) == 4  # ceil(12 / 3) images in an epoch of 12 samples
    later = drawn(sampler, range(2, 40))
    assert len(np.unique(later)) == 12  # other epochs show the others


def test_copies_are_augmented_differently(pets):
    recipe = recipe_of(pets, augment={"repeats": 3, "randaugment_num": 0})
    image = np.random.default_rng(0).integers(0, 256, (3, 40, 40), dtype=np.uint8)
    images = [Counted(0)]
    images[0].pixels = image
    sampler = ClassSampler(images, recipe, samples_per_step=3, samples_per_process=3)
    copies = [sampler.draw(0, position).image for position in range(3)]
    assert not np.array_equal(copies[0], copies[1]) and not np.array_equal(copies[1], copies[2])


def test_samples_are_the_same_in_any_thread_and_order(pets):
    recipe = recipe_of(pets, augment={"repeats": 2})
    places = [(iteration, position) for iteration in range(6) for position in range(4)]

    def draw_all(order, threads):
        training, _ = load_class_images(recipe)
        sampler = ClassSampler(training, recipe, samples_per_step=4, samples_per_process=2)
        with ThreadPoolExecutor(threads) as pool:
            return dict(zip(order, pool.map(lambda place: sampler.draw(*place), order), strict=True))

    one, many = draw_all(places, 1), draw_all(places[::-1], 4)
    for place in places:
        assert one[place].names == many[place].names and one[place].label == many[place].label
        assert one[place].number == many[place].number
        np.testing.assert_array_equal(one[place].image, many[place].image)
    assert sorted(sample.number for sample in one.values()) == list(range(24))


def test_numbers_that_mix_differ_from_batch_to_batch():
    sampler = sampler_of(8)
    batches = [[sampler.draw(iteration, position) for position in range(2)] for iteration in (0, 0, 1)]
    numbers = [sampler.mixing(samples).random() for samples in batches]
    assert numbers[0] == numbers[1] != numbers[2]
    assert numbers[0] != np.random.default_rng([3, 0]).random()


# --- bad files


def test_a_bad_image_stops_or_is_replaced_by_the_next(pets, tmp_path, caplog):
    for number in range(4):
        write_image(tmp_path / "train" / "cat" / f"{number}.png", (number,) * 3)
    (tmp_path / "train" / "cat" / "2.png").write_bytes(b"no image")
    augment = {"randaugment_num": 0}

    def sampler(**data):
        recipe = recipe_of(tmp_path, classes=("cat",), data=data, augment=augment)
        return ClassSampler(load_class_images(recipe)[0], recipe, samples_per_step=4, samples_per_process=4)

    stops = sampler()
    with pytest.raises(AnnotationError, match=r"2\.png"):
        [stops.draw(0, position) for position in range(4)]
    skips = sampler(on_bad_image="skip")
    with caplog.at_level(logging.WARNING):
        samples = [skips.draw(iteration, position) for iteration in range(3) for position in range(4)]
    names = collections.Counter(sample.names[0] for sample in samples)
    assert names == {"cat/0.png": 3, "cat/1.png": 3, "cat/3.png": 6}
    assert all(sample.image[0, 5, 5] == int(sample.names[0][4]) for sample in samples)
    assert skips.bad_images == {"cat/2.png"} and caplog.text.count("takes its place") == 1
    for number in range(4):
        (tmp_path / "train" / "cat" / f"{number}.png").write_bytes(b"no image")
    with pytest.raises(AnnotationError, match="none of 4 images decodes"):
        sampler(on_bad_image="skip", cache_mb=0).draw(0, 0)


def test_centres_are_shown_once_and_bad_ones_left_out(pets, tmp_path):
    recipe = recipe_of(pets, data={"train_images": "val"})
    images, _ = load_class_images(recipe)
    sampler = CentreSampler(images, recipe, batch_size=2)
    samples = [sampler.draw(iteration, position) for iteration in range(2) for position in range(2)]
    assert [sample and sample.names[0] for sample in samples] == ["cat/a.png", "cat/b.png", "dog/c.png", None]
    assert samples[0].image.shape == (3, 32, 32) and samples[0].image[:, 3, 4].tolist() == [200, 100, 50]
    write_image(tmp_path / "train" / "cat" / "1.png")
    (tmp_path / "train" / "cat" / "2.png").write_bytes(b"no image")
    for action in ("stop", "skip"):
        recipe = recipe_of(tmp_path, data={"on_bad_image": action})
        sampler = CentreSampler(load_class_images(recipe)[0], recipe, batch_size=2)
        if action == "skip":
            assert sampler.draw(0, 1) is None and sampler.bad_images == {"cat/2.png"}
        else:
            with pytest.raises(AnnotationError, match=r"2\.png"):
                sampler.draw(0, 1)


# --- accuracy


def test_ranks_by_hand():
    scores = np.array([[0.1, 0.7, 0.2], [0.1, 0.7, 0.2], [0.1, 0.7, 0.2], [0.5, 0.5, 0.0], [0.5, 0.5, 0.0]])
    ranks = true_ranks(scores, np.array([1, 2, 0, 0, 1]))
    assert ranks.tolist() == [0, 1, 2, 0, 1]
    assert accuracy(ranks) == 0.4 and accuracy(ranks, 2) == 0.8 and accuracy(ranks, 5) == 1
    assert np.isnan(accuracy(ranks[:0]))


def test_what_is_not_a_number_is_never_right():
    scores = np.array([[np.nan, 0.1], [0.9, np.nan], [np.nan, np.nan]])
    assert true_ranks(scores, np.array([0, 0, 0])).tolist() == [1, 1, 1]


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 1000), st.integers(1, 8))
def test_ranks_equal_a_sort(seed, classes):
    rng = np.random.default_rng(seed)
    scores, labels = rng.integers(0, 4, (20, classes)) / 4, rng.integers(0, classes, 20)
    order = np.argsort(-scores, axis=1, kind="stable")
    assert true_ranks(scores, labels).tolist() == [row.tolist().index(k) for row, k in zip(order, labels, strict=True)]


def test_rows_by_class():
    rows = accuracy_by_class(np.array([0, 1, 0]), np.array([0, 0, 2]), ("cat", "dog", "cow"))
    assert [(row["class"], row["num_images"]) for row in rows] == [("cat", 2), ("dog", 0), ("cow", 1)]
    assert rows[0]["top1"] == 0.5 and np.isnan(rows[1]["top1"]) and rows[2]["top1"] == 1


# --- recipe


@pytest.mark.parametrize("size", ["tiny", "s", "m", "l", "x"])
def test_recipe_of_imagenet_has_the_published_figures(size):
    recipe = load_recipe("imagenet_cls", [f"model.name=cspnext_{size}"])
    assert recipe.model.kind == "classification" and recipe.model.classes == IMAGENET
    optim, augment = recipe.optim, recipe.augment
    assert (optim.optimizer, optim.lr, optim.lr_for_batch, optim.weight_decay) == ("lamb", 0.005, 2048, 0.01)
    assert (optim.schedule, optim.epochs, optim.warmup_epochs, optim.warmup_factor) == ("cosine", 600, 5, 1e-4)
    assert optim.lr * optim.lr_min_factor == pytest.approx(1e-6) and optim.batch_size * 8 == 2048
    assert (augment.mixup_alpha, augment.cutmix_alpha, augment.label_smoothing, augment.repeats) == (0.2, 1, 0.1, 3)
    assert (augment.randaugment_num, augment.randaugment_magnitude, augment.randaugment_std) == (2, 7, 0.5)
    assert (augment.image_size, augment.eval_size, augment.crop_area_min) == (224, 236, 0.08)


def test_a_crop_larger_than_the_image_is_refused():
    with pytest.raises(ConfigError, match="eval_size 224 px is below image_size 256 px"):
        recipe_of(".", augment={"image_size": 256, "eval_size": 224})
