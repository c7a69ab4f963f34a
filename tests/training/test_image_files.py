"""Image files: what they decode to, what is refused, and that the cache keeps to its budget."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rtmdet_geo.errors import AnnotationError
from rtmdet_geo.pictures import image_size, is_turned
from rtmdet_geo.training.image_files import ImageCache, ImageFile

RGB = ("red", "green", "blue")


@pytest.fixture(scope="module")
def colours():
    """(H, W, 3) = (5, 7, 3) uint8, every value different."""
    return np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)


def opened(path, bands=RGB, budget=1 << 20):
    return ImageFile(path, *image_size(path), bands, ImageCache(budget))


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif"])
def test_pixels_come_as_stored_in_the_order_of_the_bands(tmp_path, colours, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(colours).save(path)
    source = opened(path)
    assert not is_turned(path) and source.shape == (3, 5, 7) and (source.width, source.height) == (7, 5)
    assert source.read().dtype == np.uint8
    assert np.array_equal(source.read(), colours.transpose(2, 0, 1))
    swapped = opened(path, ("blue", "red"))
    assert swapped.shape == (2, 5, 7)
    assert np.array_equal(swapped.read(), colours[..., [2, 0]].transpose(2, 0, 1))


def test_memory_is_as_opencv_wants_it_and_cannot_be_written(tmp_path, colours):
    path = tmp_path / "a.png"
    Image.fromarray(colours).save(path)
    for bands in (RGB, ("blue", "green", "red"), ("green",)):
        pixels = opened(path, bands).read()
        rows = np.moveaxis(pixels, 0, -1)
        assert rows.flags.c_contiguous and np.ascontiguousarray(rows) is rows
        assert cv2.resize(rows, (14, 10)).shape[:2] == (10, 14)
        with pytest.raises(ValueError, match="read-only"):
            pixels[0, 0, 0] = 1


def test_grey_palettes_and_transparency(tmp_path, colours):
    grey = colours[..., 0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey).convert("LA").save(tmp_path / "grey_alpha.png")
    Image.fromarray(grey > 50).save(tmp_path / "bits.png")
    Image.fromarray(np.dstack([colours, grey])).save(tmp_path / "alpha.png")
    palette = Image.fromarray(grey)
    palette.putpalette([value for index in range(256) for value in (index, 255 - index, 7)])
    palette.save(tmp_path / "palette.png")
    assert np.array_equal(opened(tmp_path / "grey.png").read(), np.stack([grey] * 3))
    assert np.array_equal(opened(tmp_path / "grey.png", ("blue",)).read(), grey[None])
    assert np.array_equal(opened(tmp_path / "grey_alpha.png").read(), np.stack([grey] * 3))
    assert np.array_equal(opened(tmp_path / "bits.png").read(), np.stack([(grey > 50) * np.uint8(255)] * 3))
    assert np.array_equal(opened(tmp_path / "alpha.png").read(), colours.transpose(2, 0, 1))
    assert np.array_equal(opened(tmp_path / "palette.png").read(), np.stack([grey, 255 - grey, np.full_like(grey, 7)]))


def test_exif_orientation_is_ignored(tmp_path):
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, :16] = 200
    exif = Image.Exif()
    exif[0x0112] = 6  # a viewer would turn it by 90 degrees
    path = tmp_path / "turned.jpg"
    Image.fromarray(pixels).save(path, exif=exif, quality=95)
    source = opened(path)
    assert is_turned(path) and source.shape == (3, 16, 32)
    assert source.read()[0, 8, 4] > 150 and source.read()[0, 8, 28] < 50


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_broken_files_are_named(tmp_path, suffix):
    path = tmp_path / f"half.{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(path)
    source = opened(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])  # the header is still there
    assert image_size(path) == (64, 64)
    for _ in range(2):  # a failure is not remembered as an image
        with pytest.raises(AnnotationError, match=rf"half\.{suffix}.*does not decode"):
            source.read()
    path.write_bytes(b"these are no pixels")
    with pytest.raises(AnnotationError, match=rf"half\.{suffix}.*no image"):
        source.read()
    path.unlink()
    with pytest.raises(AnnotationError, match=rf"half\.{suffix}.*missing"):
        source.read()
    path.write_bytes(whole)
    assert source.read().shape == (3, 64, 64)


def test_a_file_that_changed_its_size_is_named(tmp_path, colours):
    path = tmp_path / "a.png"
    Image.fromarray(colours).save(path)
    source = opened(path)
    Image.fromarray(colours[:3]).save(path)
    with pytest.raises(AnnotationError, match=r"a\.png.*7 x 3 px now, it was 7 x 5 px"):
        source.read()


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 60), st.lists(st.tuples(st.integers(0, 7)), max_size=60))
def test_the_cache_is_never_above_its_budget_and_forgets_the_oldest(budget, asked):
    """Against a plain list: image k has 5 k bytes; kept are the last ones asked for that fit."""
    cache, kept, decoded = ImageCache(budget), [], []
    for (key,) in asked:
        size = 5 * key

        def decode(key=key, size=size):
            decoded.append(key)
            return np.full(size, key, np.uint8)

        before = len(decoded)
        assert np.array_equal(cache.get(key, decode), np.full(size, key, np.uint8))
        assert (len(decoded) > before) == (key not in kept)
        if key in kept:
            kept.remove(key)
        if size <= budget:
            while sum(kept) * 5 + size > budget:
                kept.pop(0)
            kept.append(key)
        assert cache.weight == 5 * sum(kept) <= budget
        assert len(cache) == len(kept)


def test_one_decode_for_threads_that_ask_together():
    cache, started, go_on = ImageCache(100), threading.Event(), threading.Event()
    calls = []

    def decode():
        calls.append(1)
        started.set()
        assert go_on.wait(10)
        return np.zeros(10, np.uint8)

    with ThreadPoolExecutor(5) as pool:
        first = pool.submit(cache.get, "a", decode)
        assert started.wait(10)
        others = [pool.submit(cache.get, "a", decode) for _ in range(3)]
        assert pool.submit(cache.get, "b", lambda: np.ones(1, np.uint8)).result(10).tolist() == [1]  # waits for nobody
        go_on.set()
        images = [future.result(10) for future in (first, *others)]
    assert len(calls) == 1 and all(image is images[0] for image in images)


def test_a_failure_reaches_every_thread_and_is_tried_again():
    cache = ImageCache(100)
    barrier = threading.Barrier(3)
    calls = []

    def fail():
        calls.append(1)
        raise AnnotationError("broken")

    def ask():
        barrier.wait(10)
        with pytest.raises(AnnotationError, match="broken"):
            cache.get("a", fail)

    with ThreadPoolExecutor(3) as pool:
        for future in [pool.submit(ask) for _ in range(3)]:
            future.result(10)
    assert 1 <= len(calls) <= 3 and len(cache) == 0
    assert cache.get("a", lambda: np.zeros(3, np.uint8)).nbytes == 3


def test_many_threads_and_little_room(tmp_path):
    """Images of 4 colours read by 8 threads through a cache of two: always the right pixels, never above the budget."""
    cache = ImageCache(2 * 16 * 16 * 3)
    sources = []
    for value in range(4):
        path = tmp_path / f"{value}.png"
        Image.new("RGB", (16, 16), (value, value, value)).save(path)
        sources.append(ImageFile(path, 16, 16, RGB, cache))

    def look(number):
        value = number * 7 % 4
        pixels = sources[value].read()
        return bool((pixels == value).all()) and cache.weight <= cache.budget

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(look, range(400)))
    assert len(cache) == 2
