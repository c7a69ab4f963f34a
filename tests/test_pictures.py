"""Ordinary image files: size, pixels and orientation, and what is refused."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from PIL import Image

from rtmdet_geo.errors import AnnotationError
from rtmdet_geo.pictures import decode_image, image_size, is_turned


@pytest.fixture(scope="module")
def colours():
    """(H, W, 3) = (5, 7, 3) uint8, every value different."""
    return np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)


def test_sizes_and_pixels(tmp_path, colours):
    for suffix in ("png", "bmp", "tif", "webp"):
        path = tmp_path / f"a.{suffix}"
        Image.fromarray(colours).save(path, **({"lossless": True} if suffix == "webp" else {}))
        assert image_size(path) == (7, 5) and not is_turned(path)
        assert np.array_equal(decode_image(path), colours) and decode_image(path).flags.writeable
    Image.fromarray(colours[..., 0]).save(tmp_path / "grey.png")
    assert np.array_equal(decode_image(tmp_path / "grey.png"), colours[..., 0])


@pytest.mark.parametrize("orientation", range(9))
def test_orientations(tmp_path, colours, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "a.jpg"
    Image.fromarray(colours).save(path, exif=exif)
    assert is_turned(path) == (orientation >= 2)
    assert image_size(path) == (7, 5) and decode_image(path).shape == (5, 7, 3)


@pytest.mark.parametrize("look", [image_size, decode_image, is_turned])
def test_files_that_are_gone_or_no_images(tmp_path, look):
    with pytest.raises(AnnotationError, match=r"gone\.png' is missing"):
        look(tmp_path / "gone.png")
    (tmp_path / "text.png").write_text("these are no pixels")
    with pytest.raises(AnnotationError, match=r"text\.png' is no image"):
        look(tmp_path / "text.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(AnnotationError, match=r"folder\.png' does not decode"):
        look(tmp_path / "folder.png")


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("shape", [(6, 8), (6, 8, 3)])
def test_16_bits_are_refused_with_the_remedy(tmp_path, suffix, shape):
    path = tmp_path / f"deep.{suffix}"
    assert cv2.imwrite(str(path), np.full(shape, 4000, np.uint16))
    for look in (image_size, decode_image):
        with pytest.raises(AnnotationError, match=rf"deep\.{suffix}.*(8 bits|cut into) .*chips"):
            look(path)


def test_floats_are_refused(tmp_path):
    path = tmp_path / "float.tif"
    Image.fromarray(np.ones((4, 4), np.float32)).save(path)
    with pytest.raises(AnnotationError, match=r"float\.tif.*more than 8 bits"):
        image_size(path)


@pytest.mark.parametrize("suffix", ["png", "tif", "bmp", "jpg"])
def test_a_scene_too_large_is_no_broken_image(tmp_path, monkeypatch, colours, suffix):
    path = tmp_path / f"huge.{suffix}"
    Image.fromarray(colours).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 17)
    for look in (image_size, decode_image, is_turned):
        with pytest.raises(
            AnnotationError, match=rf"huge\.{suffix}' is 7 x 5 px; .* cut it into tiles first"
        ) as caught:
            look(path)
        assert "replace it" not in str(caught.value)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 18)  # 35 px are allowed now
    with pytest.warns(Image.DecompressionBombWarning):
        assert image_size(path) == (7, 5)


def test_the_largest_size_is_told(tmp_path):
    path = tmp_path / "scene.png"
    Image.new("1", (15000, 12000)).save(path, compress_level=1)
    with pytest.raises(AnnotationError, match=r"scene\.png' is 15000 x 12000 px; .* of up to 179 Mpx"):
        image_size(path)
