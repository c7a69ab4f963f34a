"""Whole images: labels follow painted pixels, samples are pure functions, partners have the ages of a cache."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from painted_images import (
    check_labels_are_where_pixels_are,
    image_recipe,
    painted_images,
)

from rtmdet_geo.annotations.outlines import outline_points
from rtmdet_geo.boxes import boxes_to_polygons
from rtmdet_geo.errors import AnnotationError, ConfigError
from rtmdet_geo.recipe_sections import ImageAugment
from rtmdet_geo.structures import PAD_VALUE
from rtmdet_geo.training import augment
from rtmdet_geo.training.framed_labels import frame_objects
from rtmdet_geo.training.framing import Framing, compose, flip_matrix, place_images, render
from rtmdet_geo.training.labelled import LabelledImage
from rtmdet_geo.training.whole_images import ImageSampler, _ages

KINDS = ("rotated", "horizontal", "mask")
THREE = ("horizontal", "vertical", "diagonal")
STRONG = {
    "mosaic_prob": 1.0,
    "mixup_prob": 1.0,
    "scale_min": 0.5,
    "scale_max": 1.5,
    "flip_prob": 0.75,
    "flip_directions": THREE,
    "rotate_prob": 0.5,
}
STEPS = {
    "fit": {},
    "shrink": {"scale_min": 0.6, "scale_max": 0.9},
    "crop": {"scale_min": 1.2, "scale_max": 1.8},
    "flip": {"flip_prob": 1.0, "flip_directions": THREE},
    "rotation": {"rotate_prob": 1.0},
    "quarter turns": {"rotate_prob": 1.0, "axis_aligned_classes": ["ship", "house"]},
    "mosaic": {"mosaic_prob": 1.0, "scale_min": 0.5, "scale_max": 1.2},
    "mixup": {"mixup_prob": 1.0},
    "all but mixup": STRONG | {"mixup_prob": 0.0},
    "all": STRONG,
}


def sampler_of(kind, images=None, *, iterations=1000, per_step=4, per_process=2, data=None, model=None, **section):
    recipe = image_recipe(kind, data=data, model=model, **section)
    return ImageSampler(
        painted_images(kind) if images is None else images,
        recipe,
        iterations=iterations,
        samples_per_step=per_step,
        samples_per_process=per_process,
    )


def same(first, second):
    fields = ("image", "boxes", "labels", "ignored", "masks")
    return first.names == second.names and all(
        np.array_equal(getattr(first, field), getattr(second, field)) for field in fields
    )


def one_image(pixels, boxes=(), labels=None, ignored=None, outlines=(), name="one.png"):
    boxes = np.array(boxes, float).reshape(-1, 5)
    labels = np.zeros(len(boxes), np.int64) if labels is None else np.array(labels)
    ignored = np.zeros(len(boxes), bool) if ignored is None else np.array(ignored)
    return LabelledImage(name, name, pixels, boxes, labels, ignored, outlines)


# Labels and pixels


@pytest.mark.parametrize("kind", KINDS)
def test_images_keep_nothing_of_what_was_drawn(kind):
    """Whatever images kept would grow with the data set, outside the budget of the cache."""
    images = painted_images(kind)
    sampler = sampler_of(kind, images, image_size=64)
    for step in range(6):
        sampler.draw(step, 0)
    own = {field.name for field in fields(LabelledImage)}
    assert all(vars(image).keys() == own and len(image.boxes) for image in images)


def test_shapes_are_outlines_or_boxes_cut_off_at_the_edges():
    image = painted_images("mask")[0]
    outlines = (*image.outlines[:1], (), *image.outlines[2:])
    boxes = np.array(image.boxes)
    boxes[1] = [0, 30, 20, 8, 0]
    image = replace(image, boxes=boxes, outlines=outlines)
    shapes = image.shapes_of(np.array([1, 0]))
    assert shapes[1] is image.outlines[0] and len(image.shapes) == len(boxes)
    points = outline_points(shapes[0])
    assert points.min(axis=0) == pytest.approx([0, 26]) and points.max(axis=0) == pytest.approx([10, 34])


@pytest.fixture(scope="module")
def samplers():
    """A sampler for each kind and step of the pipeline."""
    found = {}
    for kind in KINDS:
        images = painted_images(kind)
        for step, section in STEPS.items():
            # Boxes around turned rectangles are larger than these: horizontal boxes turn by quarters only.
            turns = {"axis_aligned_classes": ["ship", "house"]} if kind == "horizontal" else {}
            found[kind, step] = sampler_of(kind, images, **(section | turns))
    return found


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("kind", KINDS)
def test_labels_follow_painted_pixels_to_one_pixel(samplers, kind, step):
    share = 0.5 if STEPS[step].get("mixup_prob") else 1.0

    @given(iteration=st.integers(0, 900), position=st.integers(0, 3))
    @settings(deadline=None, max_examples=6)
    def follow(iteration, position):
        sample = samplers[kind, step].draw(iteration, position)
        assert sample.image.shape == (3, 128, 128) and sample.image.dtype == np.uint8
        assert sample.image.flags.c_contiguous and sample.boxes.dtype == np.float32
        assert len(sample.ignored) == 0 and len(sample.labels) == len(sample.boxes)
        check_labels_are_where_pixels_are(sample, share=share, all_labelled=kind != "rotated")

    follow()
    compared = sum(
        check_labels_are_where_pixels_are(
            samplers[kind, step].draw(iteration, 0), share=share, all_labelled=kind != "rotated"
        )
        for iteration in range(8)
    )
    assert compared > 8


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "spoil",
    [
        lambda image: image[:, :, ::-1],
        lambda image: image[:, ::-1],
        lambda image: np.roll(image, 2, axis=2),
        lambda image: np.roll(image, -2, axis=1),
    ],
    ids=["mirrored", "upside down", "right", "up"],
)
def test_pixels_that_moved_otherwise_are_noticed(samplers, kind, spoil):
    missed = 0
    for iteration in range(6):
        sample = samplers[kind, "mosaic"].draw(iteration, 1)
        try:
            check_labels_are_where_pixels_are(replace(sample, image=spoil(sample.image)), all_labelled=False)
            missed += 1
        except AssertionError:
            continue
    assert missed == 0


def test_boxes_without_outlines_follow_too():
    sampler = sampler_of("horizontal", painted_images("horizontal", with_outlines=False), **STRONG | {"rotate_prob": 0})
    assert sum(check_labels_are_where_pixels_are(sampler.draw(step, 0), share=0.5) for step in range(10)) > 20


def test_horizontal_boxes_of_a_turned_outline_are_its_bounds():
    images = painted_images("mask")
    turned = [sampler_of(kind, images, rotate_prob=1.0).draw(3, 0) for kind in ("mask", "horizontal")]
    assert np.array_equal(turned[0].image, turned[1].image) and len(turned[0].boxes) > 1
    np.testing.assert_allclose(turned[0].boxes, turned[1].boxes, atol=1.0)


# Geometry by hand


def test_an_image_that_fits_keeps_its_very_pixels_and_is_padded():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 20, 32), dtype=np.uint8)
    for layout in (pixels, np.moveaxis(np.ascontiguousarray(np.moveaxis(pixels, 0, -1)), -1, 0)):
        sample = sampler_of("rotated", [one_image(layout)], image_size=32).draw(0, 0)
        assert np.array_equal(sample.image[:, :20], pixels) and (sample.image[:, 20:] == PAD_VALUE).all()
        assert sample.boxes.shape == (0, 5) and sample.ignored.shape == (0, 5) and sample.masks is None


@pytest.mark.parametrize(
    ("direction", "flipped", "box"),
    [
        ("horizontal", lambda image: image[:, :, ::-1], [26, 8, 8, 4, -0.5]),
        ("vertical", lambda image: image[:, ::-1], [6, 12, 8, 4, -0.5]),
        ("diagonal", lambda image: image[:, ::-1, ::-1], [26, 12, 8, 4, 0.5]),
    ],
)
def test_flips_mirror_the_content_not_the_padding(direction, flipped, box):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 20, 32), dtype=np.uint8)
    image = one_image(pixels, [[6, 8, 8, 4, 0.5]])
    sample = sampler_of("rotated", [image], image_size=32, flip_prob=1.0, flip_directions=[direction]).draw(0, 0)
    assert np.array_equal(sample.image[:, :20], flipped(pixels)) and (sample.image[:, 20:] == PAD_VALUE).all()
    np.testing.assert_allclose(sample.boxes, [box], atol=1e-6)
    horizontal = sampler_of("horizontal", [image], image_size=32, flip_prob=1.0, flip_directions=[direction])
    wide, high = 8 * np.cos(0.5) + 4 * np.sin(0.5), 8 * np.sin(0.5) + 4 * np.cos(0.5)
    expected = [box[0] - wide / 2, box[1] - high / 2, box[0] + wide / 2, box[1] + high / 2]
    np.testing.assert_allclose(horizontal.draw(0, 0).boxes, [expected], atol=1e-5)


def test_flips_are_as_frequent_as_asked():
    pixels = np.zeros((3, 32, 32), np.uint8)
    pixels[:, 2, 4] = 255
    sampler = sampler_of("rotated", [one_image(pixels)], image_size=32, flip_prob=0.75, flip_directions=THREE)
    places = Counter(tuple(np.argwhere(sampler.draw(step, 0).image[0] > 0)[0].tolist()) for step in range(200))
    assert set(places) == {(2, 4), (2, 27), (29, 4), (29, 27)}
    assert all(30 <= number <= 70 for number in places.values())


def test_quarter_turns_by_hand():
    """The frame of a 32 x 20 image turned by 90 degrees about its centre shows a strip of 20 px."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, 20, 32), dtype=np.uint8)
    image = one_image(pixels, [[16, 10, 8, 4, 0.0], [2, 10, 4, 2, 0.0]])
    section = {"image_size": 32, "rotate_prob": 1.0, "axis_aligned_classes": ["ship"]}
    sampler = sampler_of("rotated", [image], **section)
    found = set()
    for step in range(40):
        sample = sampler.draw(step, 0)
        if len(sample.boxes) == 2:  # a half turn
            assert np.array_equal(sample.image[:, :20], pixels[:, ::-1, ::-1])
            np.testing.assert_allclose(sample.boxes, [[16, 10, 8, 4, 0], [30, 10, 4, 2, 0]], atol=1e-5)
            found.add(180)
            continue
        (box,) = sample.boxes  # the other's centre left the frame
        np.testing.assert_allclose(box, [16, 10, 8, 4, -np.pi / 2], atol=1e-5)
        clockwise = np.rot90(pixels[:, :, 6:26], -1, axes=(1, 2))
        is_clockwise = np.array_equal(sample.image[:, :20, 6:26], clockwise)
        assert is_clockwise or np.array_equal(sample.image[:, :20, 6:26], clockwise[:, ::-1, ::-1])
        assert (sample.image[:, :, :6] == PAD_VALUE).all() and (sample.image[:, :, 26:] == PAD_VALUE).all()
        found.add(90 if is_clockwise else 270)
    assert found == {90, 180, 270}


def test_only_images_with_an_axis_aligned_class_turn_by_quarters():
    pixels = np.zeros((3, 64, 64), np.uint8)
    for label, is_free in ((0, True), (2, False)):
        image = one_image(pixels, [[32, 32, 20, 10, 0.0]], [label])
        sampler = sampler_of("rotated", [image], image_size=64, rotate_prob=1.0, axis_aligned_classes=["tank"])
        angles = np.array([sampler.draw(step, 0).boxes[0, 4] for step in range(30)])
        is_quarter = np.isclose(angles % (np.pi / 2), 0, atol=1e-5) | np.isclose(angles % (np.pi / 2), np.pi / 2)
        assert is_quarter.any() == (not is_free) and is_quarter.all() == (not is_free)
        assert len(set(angles.round(4).tolist())) == (30 if is_free else 2)


def test_a_mosaic_meets_at_its_centre():
    shades = [one_image(np.full((3, 32, 32), 10 * (number + 1), np.uint8), name=str(number)) for number in range(4)]
    section = ImageAugment(image_size=32)
    placements, frame = place_images(np.random.default_rng(3), section, [(32, 32)] * 4, 32)
    assert frame == (64, 64)
    framing = Framing(placements, frame, np.eye(2, 3), (64, 64))
    canvas = render([image.pixels for image in shades], framing, 64)[..., 0]
    x, y = (int(value) for value in placements[3][:, 2])
    assert 16 <= x < 48 and 16 <= y < 48
    expected = np.full((64, 64), PAD_VALUE, np.uint8)
    expected[max(y - 32, 0) : y, max(x - 32, 0) : x] = 10
    expected[max(y - 32, 0) : y, x : x + 32] = 20
    expected[y : y + 32, max(x - 32, 0) : x] = 30
    expected[y : y + 32, x : x + 32] = 40
    assert np.array_equal(canvas, expected)


def test_images_are_fitted_with_their_aspect_kept():
    section = ImageAugment(scale_min=0.5, scale_max=0.5)
    (placement,), frame = place_images(np.random.default_rng(0), section, [(200, 100)], 128)
    np.testing.assert_allclose(placement, [[0.32, 0, 0], [0, 0.32, 0]])
    assert frame == pytest.approx((64, 32))


def test_far_shrunk_images_are_averaged():
    """A fine chequerboard becomes grey; taking every tenth pixel would give black and white."""
    board = np.indices((320, 320)).sum(axis=0) % 2
    pixels = np.broadcast_to((255 * board).astype(np.uint8), (3, 320, 320))
    for factor in (1.0, 0.4321, 0.35):
        sampler = sampler_of("rotated", [one_image(pixels)], image_size=128, scale_min=factor, scale_max=factor)
        size = int(128 * factor)
        shown = sampler.draw(0, 0).image[:, 1 : size - 1, 1 : size - 1].astype(float)
        assert shown.mean() == pytest.approx(127.5, abs=2) and (shown.std() < 10 or factor == 1.0)


def test_what_is_kept_of_objects_at_edges():
    """One image moved by (-20, 0): an object out of sight, one cut in half past its centre, one cut before it."""
    boxes = [[10, 30, 10, 6, 0], [19, 30, 10, 6, 0], [22, 30, 10, 6, 0], [50, 30, 10, 0.5, 0], [19, 10, 10, 6, 0]]
    image = one_image(np.zeros((3, 64, 64), np.uint8), boxes, ignored=[False] * 4 + [True])
    shift = np.array([[1.0, 0, -20], [0, 1, 0]])
    framing = Framing((np.eye(2, 3),), (64, 64), shift, (40, 40))

    def kept(kind, **section):
        found = frame_objects(image, framing, 0, kind, ImageAugment(**section))
        return found.boxes.tolist(), found.cut.tolist()

    assert kept("rotated") == ([[2, 30, 10, 6, 0], [-1, 10, 10, 6, 0]], [False, True])
    assert kept("rotated", min_visible=0.75) == (
        [[-1, 30, 10, 6, 0], [2, 30, 10, 6, 0], [-1, 10, 10, 6, 0]],
        [True] * 3,
    )
    assert kept("rotated", min_visible=0.1)[1] == [True, False, True]
    assert kept("horizontal") == ([[0, 27, 4, 33], [0, 27, 7, 33], [0, 7, 4, 13]], [False, False, True])
    assert kept("horizontal", min_size_px=5)[0] == [[0, 27, 7, 33]]
    assert kept("horizontal", min_size_px=0, min_visible=0.6)[1] == [True, False, False, True]


def test_rotated_objects_whose_centre_left_the_mosaic_are_dropped():
    """A mosaic turned by 45 degrees: its corner lies inside the sample, an object across it has its centre beyond."""
    image = one_image(np.zeros((3, 64, 64), np.uint8), [[10, 30, 30, 6, 0], [40, 30, 30, 6, 0]])
    turn = np.array([[np.cos(0.5), -np.sin(0.5), 20], [np.sin(0.5), np.cos(0.5), 0]])
    shifted = np.array([[1.0, 0, -20], [0, 1, 0]])  # the frame begins at x = 20 of the image
    framing = Framing((shifted,), (64, 64), turn, (64, 64))
    found = frame_objects(image, framing, 0, "rotated", ImageAugment())
    assert len(found.boxes) == 1
    (_, outlines) = (found, frame_objects(image, framing, 0, "mask", ImageAugment()).outlines)
    assert len(outlines) == 2  # what is left of the first is seen
    back = (outlines[0][0][0] - turn[:, 2]) @ turn[:, :2]  # in px of the frame
    assert back[:, 0].min() == pytest.approx(0) and back[:, 0].max() == pytest.approx(5)


def test_compose_is_first_then_second():
    mirror, shift = flip_matrix("horizontal", (10, 10)), np.array([[1.0, 0, 3], [0, 1, 0]])
    assert (compose(mirror, shift) @ [1, 2, 1]).tolist() == [6, 2]
    assert (compose(shift, mirror) @ [1, 2, 1]).tolist() == [12, 2]


def test_crops_show_objects_if_there_are_any():
    """One small object in a large image: most random crops miss it, and models of masks may learn from those."""
    pixels = np.zeros((3, 128, 128), np.uint8)
    corner = np.array([[2, 2], [12, 2], [12, 12], [2, 12]], float)
    image = one_image(pixels, [[7, 7, 10, 10, 0]], outlines=(((corner,),),))
    counts = {}
    for kind in KINDS:
        sampler = sampler_of(kind, [image], scale_min=1.3, scale_max=1.5)
        counts[kind] = sum(len(sampler.draw(step, 0).boxes) > 0 for step in range(30))
    assert min(counts["rotated"], counts["horizontal"]) > 12 > 6 > counts["mask"]


# Mixup


@pytest.mark.parametrize("kind", KINDS)
def test_mixup_is_the_mean_of_two_finished_samples(kind):
    images = painted_images(kind, 3)
    section = STRONG | {"mixup_cache": 5, "mixup_random_pop": False}
    mixed, plain = (sampler_of(kind, images, **(section | {"mixup_prob": prob})) for prob in (1.0, 0.0))
    finished = {(step, position): plain.draw(step, position) for step in range(17, 22) for position in (2, 3)}
    found_flips = set()
    for key in [(20, 2), (20, 3), (21, 2), (21, 3)]:
        sample, own = mixed.draw(*key), finished[key]
        matches = [
            (other, flip)
            for other in [mixed.earlier(*key, age) for age in range(1, 6)]
            for flip in (1, -1)
            if np.abs((own.image.astype(float) + finished[other].image[:, :, ::flip]) / 2 - sample.image).max() <= 0.5
        ]
        assert len(matches) == 1
        other, flip = matches[0]
        found_flips.add(flip)
        assert len(sample.boxes) == len(own.boxes) + len(finished[other].boxes)
        assert np.array_equal(sample.boxes[: len(own.boxes)], own.boxes)
    assert found_flips == {1, -1}


def test_a_partner_of_another_size_is_fitted():
    sampler = sampler_of(
        "mask", image_sizes=[96, 160], image_sizes_interval=1, mixup_prob=1.0, flip_prob=0.5, flip_directions=THREE
    )
    sides = set()
    for step in range(30):
        sample = sampler.draw(step, 0)
        sides.add(sample.image.shape[1])
        check_labels_are_where_pixels_are(sample, share=0.5)
    assert sides == {96, 160}


def test_partners_without_objects_are_not_mixed_in():
    empty = [one_image(np.full((3, 64, 64), 50, np.uint8), name="empty")]
    sample = sampler_of("rotated", empty, image_size=64, mixup_prob=1.0).draw(0, 0)
    assert sample.names == ("empty",) and (sample.image == 50).all()


# Pure functions of seed, iteration and position


@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_the_same_from_any_thread_in_any_order(kind):
    images = painted_images(kind)
    keys = [(step, position) for step in range(6) for position in range(4)]
    warm = sampler_of(kind, images, **STRONG)
    expected = {key: warm.draw(*key) for key in keys}
    for key in ((5, 3), (3, 0)):  # a resumed run has nothing in memory
        assert same(sampler_of(kind, images, **STRONG).draw(*key), expected[key])
    shuffled = [keys[index] for index in np.random.default_rng(1).permutation(len(keys))]
    threaded = sampler_of(kind, images, **STRONG)
    with ThreadPoolExecutor(4) as pool:
        for key, sample in zip(shuffled, pool.map(lambda key: threaded.draw(*key), shuffled), strict=True):
            assert same(sample, expected[key])
    for key in keys:
        assert same(warm.draw(*key), expected[key])
    assert not same(expected[keys[0]], expected[keys[1]])
    other = ImageSampler(
        images, image_recipe(kind, seed=1, **STRONG), iterations=1000, samples_per_step=4, samples_per_process=2
    )
    assert not same(other.draw(0, 0), expected[0, 0])


def test_samples_do_not_share_memory():
    sampler = sampler_of("rotated", mixup_prob=0.5)
    before = sampler.draw(4, 0)
    sampler.draw(4, 0).image[:] = 7
    assert same(sampler.draw(4, 0), before)


@pytest.mark.parametrize("random_pop", [False, True])
def test_partners_are_made_once(monkeypatch, random_pop):
    sampler = sampler_of("rotated", per_step=2, mixup_prob=1.0, mixup_cache=5, mixup_random_pop=random_pop)
    made = Counter()
    frame = sampler._frame

    def counted(iteration, position):
        made[iteration, position] += 1
        return frame(iteration, position)

    monkeypatch.setattr(sampler, "_frame", counted)
    for step in range(10, 60):
        for position in range(2):
            sampler.draw(step, position)
    own = [number for (step, _), number in made.items() if step >= 10]
    assert len(own) == 100 and max(own) <= (2 if random_pop else 1)
    assert sum(made.values()) <= (125 if random_pop else 105)
    assert len(sampler._memo) <= 15


def test_two_threads_wait_for_the_same_partner():
    sampler = sampler_of("rotated", mixup_prob=1.0)
    barrier, made = threading.Barrier(4), []
    frame = sampler._frame

    def slow(iteration, position):
        made.append((iteration, position))
        return frame(iteration, position)

    sampler._frame = slow
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: (barrier.wait(5), sampler._framed(3, 1)), range(4)))
    assert made == [(3, 1)]


# Epochs, partners, stages


def test_an_epoch_shows_every_image_as_often_as_asked():
    images = [one_image(np.zeros((3, 32, 32), np.uint8), name=str(number)) for number in range(5)]
    sampler = sampler_of("rotated", images, data={"repeat": 3}, image_size=32, per_step=4)
    assert sampler.epoch_length == 15
    shown = [sampler.draw(step, position).names[0] for step in range(15) for position in range(4)]
    epochs = [tuple(shown[start : start + 15]) for start in range(0, 60, 15)]
    assert all(Counter(epoch) == dict.fromkeys("01234", 3) for epoch in epochs) and len(set(epochs)) == 4
    before = [sampler.image_index(step, position) for step in range(-15, 0) for position in range(4)]
    assert Counter(before) == dict.fromkeys(range(5), 12)


@settings(deadline=None)
@given(
    per_process=st.integers(1, 4),
    processes=st.integers(1, 3),
    iteration=st.integers(-3, 9),
    data=st.data(),
    steps=st.integers(1, 25),
)
def test_earlier_walks_back_along_the_process_own_samples(per_process, processes, iteration, data, steps):
    sampler = EMPTY_SAMPLERS[per_process, processes]
    rank = data.draw(st.integers(0, processes - 1))
    position = rank * per_process + data.draw(st.integers(0, per_process - 1))
    own = [(step, rank * per_process + within) for step in range(-40, 12) for within in range(per_process)]
    assert sampler.earlier(iteration, position, steps) == own[own.index((iteration, position)) - steps]


EMPTY_SAMPLERS = {
    (per_process, processes): sampler_of(
        "rotated",
        [one_image(np.zeros((3, 32, 32), np.uint8))],
        per_step=per_process * processes,
        per_process=per_process,
    )
    for per_process in range(1, 5)
    for processes in range(1, 4)
}


def test_earlier_by_hand():
    sampler = EMPTY_SAMPLERS[2, 2]
    assert sampler.earlier(5, 2, 1) == (4, 3) and sampler.earlier(5, 3, 1) == (5, 2)
    assert sampler.earlier(0, 0, 1) == (-1, 1) and sampler.earlier(0, 1, 4) == (-2, 1)


@pytest.mark.parametrize("random_pop", [False, True])
def test_ages_are_those_in_a_cache(random_pop):
    """Play the cache: take a partner for the new sample, let one leave if it is full, put the new one in."""
    rng, cache, played, size = np.random.default_rng(0), [], [], 8
    for number in range(20000):
        if len(cache) == size:
            played.append(number - cache[rng.integers(size)])
            cache.pop(rng.integers(size) if random_pop else 0)
        cache.append(number)
    drawn = np.array(_ages(np.random.default_rng(1), size, random_pop, 20000))
    assert drawn.min() == 1 and (random_pop or drawn.max() == size)
    assert drawn.mean() == pytest.approx(size if random_pop else (size + 1) / 2, rel=0.03)
    for age in (1, 2, 4, 7, 10, 20, 40):
        assert (drawn > age).mean() == pytest.approx((np.array(played) > age).mean(), abs=0.02)


def test_mosaic_partners_are_the_process_own_earlier_images():
    images = [one_image(np.zeros((3, 32, 32), np.uint8), name=str(number)) for number in range(200)]
    sampler = sampler_of("rotated", images, image_size=32, mosaic_prob=1.0, mosaic_cache=6, mosaic_random_pop=False)
    for key in ((20, 0), (21, 3)):
        own = [sampler.earlier(*key, age) for age in range(7)]
        names = [str(sampler.image_index(*place)) for place in own]
        found = sampler.draw(*key).names
        assert len(found) == 4 and found[0] == names[0] and set(found[1:]) <= set(names[1:])


def test_mosaic_and_mixup_rest_in_the_last_epochs():
    images = [one_image(np.zeros((3, 32, 32), np.uint8), [[16, 16, 20, 8, 0]], name=str(n)) for n in range(10)]
    section = {"image_size": 32, "mosaic_prob": 1.0, "mixup_prob": 1.0, "weak_epochs": 3}
    sampler = sampler_of("rotated", images, iterations=30, **section)
    assert sampler.weak_from == 21  # an epoch of 10 samples takes 3 steps of 4
    assert {len(sampler.draw(step, 0).names) for step in range(21)} == {8}
    assert {len(sampler.draw(step, position).names) for step in range(21, 30) for position in range(4)} == {1}
    with pytest.raises(ConfigError, match="weak_epochs 3 covers the whole training of 5 iterations"):
        sampler_of("rotated", images, iterations=5, **section)
    assert sampler_of("rotated", images, iterations=30, **section | {"weak_epochs": 0}).weak_from == 30


def test_all_samples_of_a_step_have_its_size():
    sampler = sampler_of("rotated", image_sizes=[96, 128, 160], image_sizes_interval=3)
    sides = [{sampler.draw(step, position).image.shape[1:] for position in range(4)} for step in range(45)]
    assert all(len(found) == 1 for found in sides)
    by_step = [found.pop() for found in sides]
    assert set(by_step) == {(96, 96), (128, 128), (160, 160)}
    assert all(len(set(by_step[start : start + 3])) == 1 for start in range(0, 45, 3))


# Tones


def test_hsv_by_hand():
    """Values 100, 150, 50 are hue 45 (90 degrees), saturation 170, value 150 in OpenCV's 8 bits."""
    image = np.full((4, 4, 3), (100, 150, 50), np.uint8)
    seen = set()
    for seed in range(60):
        rng = np.random.default_rng(seed)
        changed = augment.jitter_hsv(rng, ImageAugment(value_delta=20), image, (0, 1, 2))[0, 0].astype(int)
        seen.add(int(changed[1]))
        factor = changed[1] / 150
        np.testing.assert_allclose(changed, np.array([100, 150, 50]) * factor, atol=1.5)
    assert min(seen) >= 131 and max(seen) <= 169 and 150 in seen and len(seen) > 10
    hue = [
        augment.jitter_hsv(np.random.default_rng(seed), ImageAugment(hue_delta=90), image, (0, 1, 2))[0, 0]
        for seed in range(40)
    ]
    assert all(150 - 1 <= colour.max() <= 151 and 49 <= colour.min() <= 51 for colour in hue)
    assert {int(colour.argmax()) for colour in hue} == {0, 1, 2}


@pytest.mark.parametrize("bands", [("blue", "green", "red"), ("green", "red", "blue")])
def test_hsv_knows_the_bands(bands):
    order = [("red", "green", "blue").index(band) for band in bands]
    images = painted_images("rotated", 2)
    section = {"hue_delta": 40, "saturation_delta": 60, "value_delta": 60}
    moved = [replace(image, source=np.ascontiguousarray(image.pixels[order])) for image in images]
    straight, mixed = (
        sampler_of("rotated", images, **section),
        sampler_of("rotated", moved, model={"bands": bands}, **section),
    )
    changed = 0
    for step in range(8):
        first, second = straight.draw(step, 0), mixed.draw(step, 0)
        assert np.array_equal(first.image[order], second.image)
        changed += not np.array_equal(first.image, sampler_of("rotated", images).draw(step, 0).image)
    assert changed > 3


def test_padding_keeps_its_value_and_other_bands_are_refused():
    sampler = sampler_of("rotated", painted_images("rotated", 1), image_size=160, value_delta=200, scale_min=0.5)
    assert all((sampler.draw(step, 0).image[:, -5:] == PAD_VALUE).all() for step in range(5) if sampler.side(step))
    four = {"bands": ["red", "green", "blue", "nir"], "mean": [0] * 4, "std": [1] * 4}
    image = one_image(np.full((4, 32, 32), 9, np.uint8), [[16, 16, 20, 8, 0]])
    values = {"model": four, "data": {"format": "chips", "chips": "folder"}, "image_size": 32}
    with pytest.raises(ConfigError, match=r"need bands red, green, blue, model\.bands are red, green, blue, nir"):
        sampler_of("rotated", [image], hue_delta=5, **values)
    sample = sampler_of("rotated", [image], mosaic_prob=1.0, rotate_prob=1.0, mixup_prob=1.0, **values).draw(0, 0)
    assert sample.image.shape == (4, 32, 32) and len(np.unique(sample.image)) <= 4


# Bad input


class Broken:
    """A file that does not decode."""

    shape = (3, 32, 32)

    def __init__(self, name):
        self.name = name

    def read(self):
        raise AnnotationError(f"{self.name} does not decode: truncated")


def with_broken(numbers, count=6):
    images = [one_image(np.full((3, 32, 32), n, np.uint8), [[16, 16, 20, 8, 0]], name=f"{n}.jpg") for n in range(count)]
    return [replace(image, source=Broken(image.name)) if n in numbers else image for n, image in enumerate(images)]


def test_a_bad_image_stops_and_is_named():
    sampler = sampler_of("rotated", with_broken({2}), image_size=32, mixup_prob=1.0)
    with pytest.raises(AnnotationError, match=r"2\.jpg does not decode"):
        for step in range(6):
            sampler.draw(step, 0)
    with pytest.raises(AnnotationError, match=r"2\.jpg"):  # and again: nothing of it is remembered
        for step in range(6):
            sampler.draw(step, 0)


def test_bad_images_are_replaced_counted_and_told_once(caplog):
    section = {"image_size": 32, "mosaic_prob": 0.5, "mixup_prob": 0.5}
    samplers = [sampler_of("rotated", with_broken({2, 4}), data={"on_bad_image": "skip"}, **section) for _ in range(2)]
    keys = [(step, position) for step in range(12) for position in range(4)]
    with caplog.at_level(logging.WARNING), ThreadPoolExecutor(3) as pool:
        drawn = list(pool.map(lambda key: samplers[0].draw(*key), keys))
    assert samplers[0].bad_images == {"2.jpg", "4.jpg"}
    assert sorted(record.getMessage().split()[0] for record in caplog.records) == ["2.jpg", "4.jpg"]
    assert not {"2.jpg", "4.jpg"} & {name for sample in drawn for name in sample.names}
    late = {key: samplers[1].draw(*key) for key in reversed(keys)}  # found in another order, replaced alike
    assert all(same(sample, late[key]) for key, sample in zip(keys, drawn, strict=True))


def test_the_next_image_of_the_epoch_takes_the_place():
    sampler = sampler_of("rotated", with_broken({2}), data={"on_bad_image": "skip"}, image_size=32)
    order = [sampler.image_index(*divmod(place, 4)) for place in range(6)]
    shown = [sampler.draw(*divmod(place, 4)).names[0] for place in range(6)]
    place = order.index(2)
    assert shown[place] == f"{order[(place + 1) % 6]}.jpg"
    assert [name for n, name in enumerate(shown) if n != place] == [f"{n}.jpg" for n in order if n != 2]


def test_no_image_that_decodes_is_an_error():
    sampler = sampler_of("rotated", with_broken(range(6)), data={"on_bad_image": "skip"}, image_size=32)
    with pytest.raises(AnnotationError, match="none of 6 images decodes"):
        sampler.draw(0, 0)


def test_what_cannot_be_sampled_is_refused(recipe):
    with pytest.raises(ConfigError, match="no image to train on"):
        sampler_of("rotated", [])
    with pytest.raises(ConfigError, match="not crops"):
        ImageSampler(painted_images("rotated"), recipe, iterations=1, samples_per_step=1, samples_per_process=1)
    with pytest.raises(ConfigError, match="no outline to learn masks from"):
        sampler_of("mask", painted_images("mask", with_outlines=False))


def test_ignored_objects_move_with_the_image():
    image = one_image(np.zeros((3, 32, 32), np.uint8), [[6, 8, 8, 4, 0], [20, 20, 8, 4, 0]], ignored=[True, False])
    section = {"image_size": 32, "flip_prob": 1.0}
    rotated = sampler_of("rotated", [image], **section).draw(0, 0)
    np.testing.assert_allclose(rotated.ignored, [[26, 8, 8, 4, 0]], atol=1e-6)
    np.testing.assert_allclose(boxes_to_polygons(rotated.boxes)[0].mean(axis=0), [12, 20], atol=1e-5)
    horizontal = sampler_of("horizontal", [image], **section).draw(0, 0)
    np.testing.assert_allclose(horizontal.ignored, [[22, 6, 30, 10]], atol=1e-6)
    assert len(horizontal.boxes) == len(horizontal.labels) == 1
