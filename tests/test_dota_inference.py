"""A model over DOTA folders: whole images, patches and the steps one by one find the same; kills, outputs, faults."""

from __future__ import annotations

import json
import zipfile

import numpy as np
import pytest
from engines import RectangleEngine, draw_rectangles, scattered_boxes
from PIL import Image
from synthetic import make_spec
from test_cli import error_line, run

from rtmdet_geo import images
from rtmdet_geo.annotations.dota_results import ResultRows, read_results, write_results
from rtmdet_geo.boxes import boxes_to_polygons
from rtmdet_geo.dota.inference import run_dota
from rtmdet_geo.dota.merge import merge_results
from rtmdet_geo.dota.split import split_dota
from rtmdet_geo.errors import AnnotationError, BandWarning, Cancelled, ConfigError, OutputError, SaturatedTileWarning
from rtmdet_geo.images import predict
from rtmdet_geo.pictures import decode_image
from rtmdet_geo.structures import Detections

CLASSES = ("ship", "plane")


class TwoClasses(RectangleEngine):
    """Long rectangles are ships, the others planes; the score says how large they are."""

    def __init__(self, kind="rotated", **options):
        super().__init__(make_spec(kind=kind, classes=CLASSES, tile_size=128, **options))
        self.fails_after = None

    def find(self, image):
        if self.fails_after is not None:
            self.fails_after -= 1
            if self.fails_after < 0:
                raise KeyboardInterrupt
        found = super().find(image)
        areas = found.boxes[:, 2] * found.boxes[:, 3]
        labels = found.boxes[:, 2] < 2 * found.boxes[:, 3]
        return Detections(found.boxes, np.clip(areas / 3000, 0.01, 1), labels, kind=found.kind)


@pytest.fixture
def folder(tmp_path):
    """Three images with bright rectangles, one smaller than a patch."""
    (tmp_path / "images").mkdir()
    for index, (height, width) in enumerate([(240, 300), (100, 90), (128, 200)]):
        boxes = scattered_boxes(height, width, index)
        pixels = draw_rectangles(height, width, boxes).transpose(1, 2, 0)
        Image.fromarray(pixels).save(tmp_path / f"images/P{index:04d}.png")
    return tmp_path / "images"


def texts_of(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name).decode() for name in archive.namelist()}


def steps_one_by_one(folder, tmp_path, *, task, **rules):
    """Split, predict patch by patch, write result files, merge them."""
    split_dota(folder, None, tmp_path / "patches", size=128, **rules)
    kind = "rotated" if task == 1 else "horizontal"
    rows = {name: ([], [], []) for name in CLASSES}
    for path in sorted((tmp_path / "patches/images").iterdir()):
        image = decode_image(path)
        found = predict(
            TwoClasses(kind), image, resize="letterbox", score_threshold=0.05, iou_threshold=0.1, multi_label=True
        )
        corners = boxes_to_polygons(found.boxes).reshape(-1, 4, 2)
        for name, score, points in zip(found.class_names, found.scores.tolist(), corners, strict=True):
            images, scores, numbers = rows[name]
            images.append(path.stem)
            scores.append(score)
            numbers.append(points.ravel() if task == 1 else np.r_[points.min(axis=0), points.max(axis=0)])
    by_class = {}
    for name, (images, scores, numbers) in rows.items():
        table = np.array(numbers).reshape(-1, 8 if task == 1 else 4)
        corners = {"polygons" if task == 1 else "hboxes": table}
        by_class[name] = ResultRows(tuple(images), np.array(scores), **corners)
    write_results(tmp_path / "found", by_class, task, CLASSES)
    merge_results(tmp_path / "found", tmp_path / "merged", task=task, tool=rules["tool"])
    return read_results(tmp_path / "merged", task)


@pytest.mark.parametrize("task", [1, 2])
@pytest.mark.parametrize(("tool", "rates"), [("devkit", (0.5, 1.0)), ("bboxtoolkit", (1.0, 1.5))])
def test_whole_images_patches_and_single_steps_find_the_same(folder, tmp_path, task, tool, rates):
    rules = {"tool": tool, "rates": rates, "gap": 48}
    expected = steps_one_by_one(folder, tmp_path, task=task, **rules)
    kind = "rotated" if task == 1 else "horizontal"
    summary = run_dota(TwoClasses(kind), folder, tmp_path / "whole", **rules)
    run_dota(TwoClasses(kind), tmp_path / "patches/images", tmp_path / "cut", patches=True, batch_size=3)
    with pytest.raises(ConfigError, match=f"were cut by {tool}, as settings.json says"):
        other = "devkit" if tool == "bboxtoolkit" else "bboxtoolkit"
        run_dota(TwoClasses(kind), tmp_path / "patches/images", tmp_path / "no", patches=True, tool=other)
    assert summary["task"] == task and summary["empty_classes"] == []
    found = read_results(tmp_path / "whole", task)
    for name in CLASSES:
        file = f"Task{task}_{name}.txt"
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "cut" / file).read_bytes()
        mine, other = found[name], expected[name]
        assert len(mine) > 5 and mine.image_ids == other.image_ids
        # the one writes two decimals of everything, the other of scores; corners may begin anywhere
        assert mine.scores == pytest.approx(other.scores, abs=0.006)
        assert bounds(mine) == pytest.approx(bounds(other), abs=0.011)


def bounds(rows):
    corners = (rows.hboxes if rows.polygons is None else rows.polygons).reshape(len(rows), -1, 2)
    return np.hstack([corners.min(axis=1), corners.max(axis=1)])


def test_known_rectangles_are_found_once(tmp_path):
    """None is cut by every patch: all come back, to parts of a px, of whatever the rate."""
    (tmp_path / "images").mkdir()
    boxes = scattered_boxes(240, 300, 0)
    Image.fromarray(draw_rectangles(240, 300, boxes).transpose(1, 2, 0)).save(tmp_path / "images/P1.png")
    for rate in (1.0, 0.5):
        run_dota(TwoClasses(), tmp_path / "images", tmp_path / f"out{rate}", gap=64, rates=(rate,), score_threshold=0.0)
        rows = read_results(tmp_path / f"out{rate}", 1).values()
        found = np.concatenate([part.polygons.reshape(-1, 4, 2) for part in rows])
        expected = boxes_to_polygons(boxes).reshape(-1, 4, 2)
        apart = np.abs(found.mean(axis=1)[:, None] - expected.mean(axis=1)).max(axis=2)
        assert apart.min(axis=0).max() < 0.3 / rate


def test_task_2_encloses_task_1(folder, tmp_path):
    summary = run_dota(TwoClasses(), folder, tmp_path / "a.zip", task2=tmp_path / "b.zip")
    assert summary["task2"] == str(tmp_path / "b.zip")
    first, second = texts_of(tmp_path / "a.zip"), texts_of(tmp_path / "b.zip")
    assert sum(text.count("\n") for text in first.values()) == summary["detections"] > 10
    for name in CLASSES:
        for line, box in zip(
            first[f"Task1_{name}.txt"].splitlines(), second[f"Task2_{name}.txt"].splitlines(), strict=True
        ):
            image, score, *numbers = line.split()
            points = np.array(numbers, float).reshape(4, 2)
            assert box.split()[:2] == [image, score]
            assert np.array(box.split()[2:], float).tolist() == [*points.min(axis=0), *points.max(axis=0)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zip", "b.zip", "images"]
    with pytest.raises(OutputError, match="task 1 and task 2 are both"):
        run_dota(TwoClasses(), folder, tmp_path / "c", task2=f"{tmp_path}/./c")
    with pytest.raises(ConfigError, match="leave task2 out"):
        run_dota(TwoClasses("horizontal"), folder, tmp_path / "c.zip", task2=tmp_path / "d.zip")


def test_thresholds_and_numbers_are_kept(folder, tmp_path):
    few = run_dota(TwoClasses(), folder, tmp_path / "few", max_detections=1)
    assert few["detections"] <= few["patches"]
    none = run_dota(TwoClasses(), folder, tmp_path / "none", score_threshold=1.0)
    assert none["empty_classes"] == list(CLASSES) and none["detections"] == 0
    assert (tmp_path / "none/Task1_ship.txt").read_text() == ""
    engine = TwoClasses()
    run_dota(engine, folder, tmp_path / "many", batch_size=4)
    assert engine.multi_label and max(map(len, engine.batches)) == 4


# ---------------------------------------------------------------- kills and faults


def test_a_stopped_run_is_taken_up(folder, tmp_path):
    engine = TwoClasses()
    whole = run_dota(engine, folder, tmp_path / "whole.zip", size=64, gap=16)
    number = len(engine.batches)
    first = TwoClasses()
    first.fails_after = number - 3  # while the last image is being searched
    with pytest.raises(KeyboardInterrupt):
        run_dota(first, folder, tmp_path / "out.zip", size=64, gap=16)
    assert not (tmp_path / "out.zip").exists()
    with pytest.raises(OutputError, match="--resume to go on"):
        run_dota(TwoClasses(), folder, tmp_path / "out.zip", size=64, gap=16)
    with pytest.raises(ConfigError, match=r"begun with score_threshold=0\.05, not 0\.3"):
        run_dota(TwoClasses(), folder, tmp_path / "out.zip", size=64, gap=16, score_threshold=0.3, resume=True)
    second, steps = TwoClasses(), []
    summary = run_dota(
        second, folder, tmp_path / "out.zip", size=64, gap=16, resume=True, progress=lambda *step: steps.append(step)
    )
    assert summary == {**whole, "out": str(tmp_path / "out.zip"), "reused": 2}
    assert len(second.batches) < number / 2 and steps[-1] == (number, number)
    assert (tmp_path / "out.zip").read_bytes() == (tmp_path / "whole.zip").read_bytes()
    assert not (tmp_path / "out.zip.partial").exists()


def test_cancelling(folder, tmp_path):
    steps = []
    with pytest.raises(Cancelled, match="--resume goes on"):
        run_dota(
            TwoClasses(),
            folder,
            tmp_path / "out.zip",
            progress=lambda *step: steps.append(step),
            cancelled=lambda: len(steps) >= 3,
        )
    assert (tmp_path / "out.zip.partial").is_dir() and not (tmp_path / "out.zip").exists()


def test_wrong_input_is_named(folder, tmp_path):
    def fails(error, text, images=folder, **options):
        with pytest.raises(error, match=text):
            run_dota(TwoClasses(), images, tmp_path / "out.zip", **options)
        assert not (tmp_path / "out.zip").exists()

    fails(ConfigError, "score_threshold=2", score_threshold=2)
    fails(ConfigError, "batch_size=0", batch_size=0)
    fails(ConfigError, "gap=200 px must be", gap=200)  # the model's patches are of 128 px
    fails(AnnotationError, r"P0000\.png: 'P0000' is no patch", patches=True)
    split_dota(folder, None, tmp_path / "patches", size=64, gap=0)
    fails(AnnotationError, "has the name of a patch; add --patches", images=tmp_path / "patches/images", gap=0)
    (folder / "P0001.png").write_bytes((folder / "P0001.png").read_bytes()[:200])
    fails(AnnotationError, r"P0001\.png' does not decode", gap=0)


def test_warnings_about_bands_name_the_folder_once(folder, tmp_path):
    engine = TwoClasses()
    bands = {"bands": ("red", "green", "blue", "nir"), "optional_bands": {"nir": 0}}
    engine.spec = engine.spec.model_copy(update=bands)
    engine.find = lambda image: TwoClasses.find(engine, image[:3])
    with pytest.warns(BandWarning) as told:
        run_dota(engine, folder, tmp_path / "out.zip")
    assert {str(warning.message).partition(" is used")[0] for warning in told} == {f"no nir band of scene '{folder}'"}


def test_saturated_patches_are_told(folder, tmp_path):
    class Saturated(TwoClasses):
        def find(self, image):
            self.num_saturated += 1
            return super().find(image)

    with pytest.warns(SaturatedTileWarning, match="patches hold more candidates above score 0.05"):
        run_dota(Saturated(), folder, tmp_path / "out.zip")


# ---------------------------------------------------------------- the command


def test_command(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(images, "open_backend", lambda *names, **settings: TwoClasses())
    words = ("data", "submission", "sen2ships_r", folder, "-o", tmp_path / "task1.zip", "--gap", 48)
    result = run(*words)
    assert result.exit_code == 0, result.stderr
    assert "task 1 (oriented boxes)" in result.stdout and "in 3 images" in result.stdout and result.stderr == ""
    assert run("data", "check-submission", tmp_path / "task1.zip", "--images", folder, "--class", "ship").exit_code == 3
    good = run(
        *("data", "check-submission", tmp_path / "task1.zip", "--images", folder, "--class", "ship", "--class", "plane")
    )
    assert good.exit_code == 0
    assert "--overwrite" in error_line(run(*words))
    found = json.loads(run(*words, "--overwrite", "--score", 1, "--classes", "dota_v1.0", "--json").stdout)
    assert found["detections"] == 0 and len(found["findings"]) == 15 and len(found["empty_classes"]) == 15
    assert len(texts_of(tmp_path / "task1.zip")) == 15 and set(texts_of(tmp_path / "task1.zip").values()) == {""}
    (line,) = run(*words, "--overwrite", "--classes", "dota_v1.0").stderr.splitlines()
    assert "the files of 13 of 15 classes are empty: baseball-diamond, bridge" in line
    warned = run(*words, "--overwrite", "--score", 1, "--task2", tmp_path / "task2.zip")
    assert warned.exit_code == 0 and warned.stderr.count("rtmdet-geo: warning: ") == 1
    assert "the files of 2 of 2 classes are empty: ship, plane" in warned.stderr
    assert f"; {tmp_path / 'task2.zip'}: task 2 (horizontal boxes)" in warned.stdout
    assert run(*words, "--overwrite", "--size", 48).exit_code == 2  # no larger than the gap
    assert run(*words, "--overwrite", "--rates", 0).exit_code == 2
    assert run(*words, "--resume", "--overwrite").exit_code == 2
