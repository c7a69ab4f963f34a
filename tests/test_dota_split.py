"""Splitting DOTA folders: files and pixels, workers, kills and resumption, wrong input."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from test_cli import error_line, run

from rtmdet_geo.dota import partial, split
from rtmdet_geo.dota.rules import SplitRules
from rtmdet_geo.dota.split import split_dota
from rtmdet_geo.errors import AnnotationError, Cancelled, ConfigError, DatasetNotFoundError, OutputError
from rtmdet_geo.pictures import decode_image

SMALL = {"size": 64, "gap": 16}


def write_set(folder, shapes=((100, 150), (40, 30), (64, 64)), suffix=".png"):
    """Write images of noise, of so many (height, width) px, with an object each."""
    (folder / "images").mkdir(parents=True)
    (folder / "labelTxt").mkdir()
    generator = np.random.default_rng(0)
    for index, (height, width) in enumerate(shapes):
        pixels = generator.integers(0, 256, (height, width, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"P{index:04d}{suffix}")
        lines = ["imagesource:GoogleEarth", "gsd:0.5", "5 5 25 5 25 15 5 15 ship 0", "50 10 75 10 75 30 50 30 plane 1"]
        (folder / "labelTxt" / f"P{index:04d}.txt").write_text("\n".join(lines) + "\n")
    return folder / "images", folder / "labelTxt"


def content(folder):
    """Return the bytes of every file below a folder, by its name."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


@pytest.fixture
def source(tmp_path):
    return write_set(tmp_path / "source")


# ---------------------------------------------------------------- what is written


@pytest.mark.parametrize(
    ("tool", "label_folder", "colour"), [("devkit", "labelTxt", 0), ("bboxtoolkit", "annfiles", 1)]
)
def test_patches_show_their_window(source, tmp_path, tool, label_folder, colour):
    summary = split_dota(*source, tmp_path / "out", tool=tool, **SMALL)
    rules = SplitRules(tool, **SMALL)
    image = decode_image(source[0] / "P0000.png")
    windows = rules.windows(150, 100)
    for window in windows:
        patch = decode_image(tmp_path / "out/images" / f"P0000__{window.name}.png")
        assert patch.shape == (64, 64, 3)
        shown = image[window.y : window.y + 64, window.x : window.x + 64]
        assert (patch[: shown.shape[0], : shown.shape[1]] == shown).all()
    patch = decode_image(tmp_path / "out/images" / f"P0001__{'1' if tool == 'devkit' else '64'}__0___0.png")
    assert patch[40:].reshape(-1, 3).tolist() == [[[0, 0, 0], [124, 116, 104]][colour]] * (24 * 64)  # red first
    assert patch[:40, :30].tolist() == decode_image(source[0] / "P0001.png").tolist()
    names = {path.stem for path in (tmp_path / "out/images").iterdir()}
    assert names == {path.stem for path in (tmp_path / "out" / label_folder).iterdir()}
    assert summary["tiles"] == len(names) and summary["images"] == 3 and summary["reused"] == 0
    lines = [path.read_text().splitlines() for path in (tmp_path / "out" / label_folder).iterdir()]
    assert summary["objects"] == sum(map(len, lines)) > 3
    assert summary["difficult"] == sum(not line.endswith(" 0") for part in lines for line in part) > 0
    assert not (tmp_path / "out.partial").exists()


def test_rates_resize_as_opencv_does(source, tmp_path):
    split_dota(*source, tmp_path / "out", rates=(0.5, 1, 1.5), pad=False, **SMALL)
    image = cv2.imread(str(source[0] / "P0000.png"))
    for rate in (0.5, 1.5):
        resized = cv2.resize(image, None, fx=rate, fy=rate, interpolation=cv2.INTER_CUBIC)
        found = cv2.imread(str(tmp_path / f"out/images/P0000__{rate}__0___0.png"))
        assert (found == resized[:64, :64]).all()
    assert (tmp_path / "out/images/P0000__1__0___0.png").exists()


def test_images_without_labels_and_other_formats(source, tmp_path):
    summary = split_dota(source[0], None, tmp_path / "out", image_format="jpg", pad=False, **SMALL)
    assert summary["objects"] == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["images", "settings.json"]
    assert decode_image(tmp_path / "out/images/P0001__1__0___0.jpg").shape == (40, 30, 3)


def test_grey_images_become_colour_images(tmp_path):
    (tmp_path / "images").mkdir()
    Image.fromarray(np.arange(100, dtype=np.uint8).reshape(10, 10)).save(tmp_path / "images/a.png")
    split_dota(tmp_path / "images", None, tmp_path / "out", size=8, gap=0)
    assert decode_image(tmp_path / "out/images/a__1__2___2.png")[0, 0].tolist() == [22, 22, 22]


def test_more_pixels_than_pillow_takes(tmp_path, monkeypatch):
    images, labels = write_set(tmp_path / "source")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert split_dota(images, labels, tmp_path / "out", **SMALL)["images"] == 3
    assert Image.MAX_IMAGE_PIXELS == 1000
    with pytest.raises(AnnotationError, match=r"P0000\.png' is 150 x 100 px"):
        decode_image(images / "P0000.png")
    with pytest.raises(AnnotationError, match="at most 0 Mpx"):
        decode_image(images / "P0000.png", max_pixels=14_999)


def test_the_number_of_workers_changes_nothing(source, tmp_path):
    split_dota(*source, tmp_path / "one", rates=(0.5, 1), **SMALL)
    split_dota(*source, tmp_path / "two", rates=(0.5, 1), workers=2, **SMALL)
    assert content(tmp_path / "one") == content(tmp_path / "two")


# ---------------------------------------------------------------- kills, resumption

KILLED = """
import os, signal, sys
from pathlib import Path
from rtmdet_geo.dota import partial
from rtmdet_geo.dota.split import split_dota
left = int(sys.argv[4])
def replace(staged, path, real=os.replace):
    global left
    left -= 1
    if left < 0:
        Path(staged).write_bytes(Path(staged).read_bytes()[:10])  # as if it was being written
        os.kill(os.getpid(), signal.SIGKILL)
    real(staged, path)
partial.os.replace = replace
split_dota(sys.argv[1], sys.argv[2], sys.argv[3], size=64, gap=16)
"""


def test_a_killed_split_leaves_whole_patches_and_is_taken_up(source, tmp_path):
    whole = split_dota(*source, tmp_path / "whole", **SMALL)
    num_files = 2 * (whole["tiles"] - 2) + 2  # of the first image, then its record and the settings
    script = [sys.executable, "-c", KILLED, *map(str, source), str(tmp_path / "out"), str(num_files + 1)]
    assert subprocess.run(script, timeout=60).returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    folder = tmp_path / "out.partial"
    reference = content(tmp_path / "whole")
    grown = {name: text for name, text in content(folder).items() if name.startswith(("images/P", "labelTxt/P"))}
    assert grown and all(reference[name] == text for name, text in grown.items())
    assert [path.name for path in (folder / "done").iterdir()] == ["P0000.json"]
    assert any(name.startswith("images/.") for name in content(folder))  # the half-written one is not under its name

    with pytest.raises(OutputError, match="--resume to go on"):
        split_dota(*source, tmp_path / "out", **SMALL)
    with pytest.raises(ConfigError, match="begun with gap=16, not 20"):
        split_dota(*source, tmp_path / "out", size=64, gap=20, resume=True)
    summary = split_dota(*source, tmp_path / "out", resume=True, **SMALL)
    assert summary["reused"] == 1
    assert content(tmp_path / "out") == reference
    assert not folder.exists()


def test_a_split_stopped_before_it_gets_its_name_is_taken_up(source, tmp_path, monkeypatch):
    def refuse(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as stopped, pytest.raises(KeyboardInterrupt):
        stopped.setattr(partial.PartialFolder, "forget_records", refuse)
        split_dota(*source, tmp_path / "out", **SMALL)
    assert not (tmp_path / "out").exists()
    assert split_dota(*source, tmp_path / "out", resume=True, **SMALL)["reused"] == 3
    split_dota(*source, tmp_path / "again", **SMALL)
    assert content(tmp_path / "out") == content(tmp_path / "again")


def test_resuming_looks_at_the_files_again(source, tmp_path, monkeypatch):
    images, labels = source
    done = []
    with pytest.raises(Cancelled, match="--resume goes on"):
        split_dota(
            images,
            labels,
            tmp_path / "out",
            progress=lambda *now: done.append(now),
            cancelled=lambda: len(done) == 2,
            **SMALL,
        )
    assert done == [(1, 3), (2, 3)]
    Image.fromarray(np.zeros((70, 70, 3), np.uint8)).save(images / "P0000.png")  # changed, and smaller
    for folder in source:
        next(folder.glob("P0001.*")).unlink()
    seen = []
    real = split._split_image
    monkeypatch.setattr(split, "_split_image", lambda job: seen.append(job.name) or real(job))
    split_dota(images, labels, tmp_path / "out", resume=True, **SMALL)
    assert seen == ["P0000", "P0002"]
    monkeypatch.undo()
    split_dota(images, labels, tmp_path / "again", **SMALL)
    assert content(tmp_path / "out") == content(tmp_path / "again")  # no patch of the removed or the larger image


def test_a_finished_split_is_left_alone_or_replaced(source, tmp_path):
    first = split_dota(*source, tmp_path / "out", **SMALL)
    again = split_dota(*source, tmp_path / "out", resume=True, **SMALL)
    assert again == {**first, "reused": 3}
    with pytest.raises(OutputError, match="--overwrite"):
        split_dota(*source, tmp_path / "out", **SMALL)
    with pytest.raises(ConfigError, match="begun with size=64, not 32"):
        split_dota(*source, tmp_path / "out", size=32, gap=16, resume=True)
    (source[1] / "P0001.txt").write_text("")
    with pytest.raises(OutputError, match="of other images or labels"):
        split_dota(*source, tmp_path / "out", resume=True, **SMALL)
    split_dota(*source, tmp_path / "out", overwrite=True, size=32, gap=16)
    assert decode_image(next((tmp_path / "out/images").glob("P0000*"))).shape == (32, 32, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


# ---------------------------------------------------------------- wrong input


def test_wrong_input_is_named_before_anything_is_cut(source, tmp_path):
    images, labels = source

    def fails(error, text, *, labels=labels, images=images, **options):
        with pytest.raises(error, match=text):
            split_dota(images, labels, tmp_path / "out", **{**SMALL, **options})
        assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "source"]

    (tmp_path / "empty").mkdir()
    fails(DatasetNotFoundError, "folder of images .*nowhere", images=tmp_path / "nowhere")
    fails(DatasetNotFoundError, "folder of labels .*nowhere", labels=tmp_path / "nowhere")
    fails(DatasetNotFoundError, "no images in .*empty", images=tmp_path / "empty")
    fails(ConfigError, "image_format='gif'", image_format="gif")
    fails(ConfigError, "workers=0", workers=0)
    (labels / "P0001.txt").write_text("imagesource:x\n1 2 3 2 3 4 1 4 ship 0\n1 2 3 2 3 4 1 4 ship 7\n")
    fails(AnnotationError, r"P0001\.txt:3: difficult is '7'")
    (labels / "P0001.txt").unlink()
    fails(AnnotationError, r"image 'P0001' .* has no labels P0001\.txt .*\(1 file without labels\)")
    (labels / "P0001.txt").write_text("")
    (labels / "P0009.txt").write_text("")
    fails(AnnotationError, r"P0009\.txt' have no image")
    (labels / "P0009.txt").unlink()
    (images / "P0001.jpg").write_bytes(b"")
    fails(AnnotationError, r"P0001\.png' and 'P0001\.jpg' differ in their ending only")


@pytest.mark.parametrize("damage", [b"no image", None])
def test_an_image_that_does_not_decode_is_named(source, tmp_path, damage):
    path = source[0] / "P0002.png"
    path.write_bytes(damage if damage is not None else path.read_bytes()[:2000])
    with pytest.raises(AnnotationError, match=r"P0002\.png"):
        split_dota(*source, tmp_path / "out", **SMALL)
    assert not (tmp_path / "out").exists()
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(path)
    assert split_dota(*source, tmp_path / "out", resume=True, **SMALL)["reused"] == 2


def test_other_folders_are_not_touched(source, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    (tmp_path / "out.partial").mkdir()
    with pytest.raises(OutputError, match="is no earlier split"):
        split_dota(*source, tmp_path / "mine", overwrite=True, **SMALL)
    with pytest.raises(OutputError, match="is not what an unfinished run leaves"):
        split_dota(*source, tmp_path / "out", overwrite=True, **SMALL)
    with pytest.raises(OutputError, match="cannot make folder"):
        split_dota(*source, tmp_path / "mine/thesis.txt/out", **SMALL)
    assert (tmp_path / "mine/thesis.txt").exists() and (tmp_path / "out.partial").exists()


def test_a_full_disk_is_said(source, tmp_path, monkeypatch):
    monkeypatch.setattr(partial.os, "replace", lambda *names: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OutputError, match="No space left; is the disk full"):
        split_dota(*source, tmp_path / "out", **SMALL)


# ---------------------------------------------------------------- the command


def test_command(source, tmp_path):
    words = ("data", "split", source[0], "-l", source[1], "-o", tmp_path / "out", "--size", 64, "--gap", 16)
    result = run(*words, "--rates", "0.5,1", "--workers", 1, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["tiles"] == len(list((tmp_path / "out/images").iterdir()))
    assert "--overwrite" in error_line(run(*words, "--workers", 1))
    again = run(*words, "--rates", "0.5,1", "--workers", 1, "--resume")
    assert again.exit_code == 0 and "3 of an earlier run" in again.stdout
    assert run(*words, "--resume", "--overwrite").exit_code == 2
    assert run(*words, "--rates", "a,b").exit_code == 2
    for wrong, text in (
        (("--gap", 64), "gap=64 px must be"),
        (("--rates", "0"), "rates are from 0.01 to 100"),
        (("--image-share", 0.5), "--image-share goes with --tool bboxtoolkit"),
    ):
        refused = run(*words, "--overwrite", *wrong)
        assert refused.exit_code == 2 and text in refused.stderr


def test_script(source, tmp_path):
    script = [
        sys.executable,
        "-m",
        "data_tools.split_dota",
        str(source[0]),
        "-o",
        str(tmp_path / "out"),
        "--workers",
        "1",
    ]
    root = Path(__file__).parent.parent
    done = subprocess.run(script, capture_output=True, text=True, timeout=60, cwd=root)
    assert (done.returncode, done.stderr) == (0, "") and "3 patches of 3 images" in done.stdout
