"""Merging DOTA results over patches: golden lines, the official loop, split and merge undo each other."""

from __future__ import annotations

import json
import zipfile

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cli import error_line, run
from test_dota_rules import cut, scenes

from rtmdet_geo.annotations.dota_results import ResultRows, write_results
from rtmdet_geo.boxes import boxes_to_polygons
from rtmdet_geo.dota.merge import PatchBoxes, merge_boxes, merge_results, merge_rows, result_texts
from rtmdet_geo.dota.rules import SplitRules
from rtmdet_geo.errors import AnnotationError, ConfigError, DatasetNotFoundError, OutputError


def rows_of(lines, task=1):
    words = [line.split() for line in lines]
    values = np.array([[float(word) for word in row[1:]] for row in words]).reshape(-1, 9 if task == 1 else 5)
    corners = {"polygons" if task == 1 else "hboxes": values[:, 1:]}
    return ResultRows(tuple(row[0] for row in words), values[:, 0], **corners)


def merged_lines(lines, tool="devkit", task=1, **options):
    return result_texts({"x": merge_rows(rows_of(lines, task), tool=tool, **options)}, tool)["x"].splitlines()


def overlap(first, second):
    common = first.intersection(second).area
    return common / (first.area + second.area - common)


def official_merge(lines, threshold=0.1):
    """Merge as the devkit's plain loop does; IoU by shapely."""
    by_image = {}
    for line in lines:
        name, score, *corners = line.split()
        image, rate, place = name.split("__", 2)
        shift = np.array(place.split("___"), float)
        moved = (np.array(corners, float).reshape(4, 2) + shift) / float(rate)
        by_image.setdefault(image, []).append((float(score), moved))
    found = []
    for image, detections in by_image.items():
        order = np.argsort([score for score, _ in detections])[::-1].tolist()
        polygons = [shapely.Polygon(corners) for _, corners in detections]
        while order:
            best = order.pop(0)
            found.append((image, *detections[best]))
            order = [other for other in order if overlap(polygons[best], polygons[other]) <= threshold]
    return found


# ---------------------------------------------------------------- golden lines


def test_oracle_devkit_merge(oracle_dir):
    golden = json.loads((oracle_dir / "dota_merge.json").read_text())["devkit"]
    assert golden["input"]
    for name, lines in golden["input"].items():
        found = merged_lines(lines, iou_threshold=golden["nms_thresh"])
        assert found == golden["output"][name], name
        assert merged_lines(lines, iou_threshold=0.9) != golden["output"][name]  # negative control


def test_oracle_mmrotate_merge(oracle_dir):
    golden = json.loads((oracle_dir / "dota_merge.json").read_text())["mmrotate"]
    patches = [
        PatchBoxes(item["img_id"], np.array(item["bboxes"], np.float32), np.float32(item["scores"]), item["labels"])
        for item in golden["input"]
    ]
    found = merge_boxes(patches, golden["classes"], iou_threshold=golden["iou_thr"])
    texts = result_texts(found, "bboxtoolkit")
    assert {name: text.splitlines() for name, text in texts.items()} == golden["output"]
    assert sum(map(len, found.values())) < sum(len(item["labels"]) for item in golden["input"])


# ---------------------------------------------------------------- by hand

BOX = "10 10 30 10 30 20 10 20"


def test_moved_and_divided_by_hand():
    lines = [f"P1__0.5__100___40 0.25 {BOX}", f"P2__1__0___0 0.5 {BOX}"]
    assert merged_lines(lines) == [
        "P1 0.25 220.0 100.0 260.0 100.0 260.0 120.0 220.0 120.0",
        "P2 0.5 10.0 10.0 30.0 10.0 30.0 20.0 10.0 20.0",
    ]
    assert merged_lines([f"P1__1024__100___40 0.256 {BOX}"], "bboxtoolkit") == [
        "P1 0.26 110.00 50.00 130.00 50.00 130.00 60.00 110.00 60.00"
    ]


def test_the_better_of_two_stays_and_a_tenth_is_no_overlap():
    two = [f"P1__1__0___0 0.5 {BOX}", "P1__1__5___0 0.75 5 10 25 10 25 20 5 20"]  # the same place
    assert [line.split()[1] for line in merged_lines(two)] == ["0.75"]
    lines = ["P1__1__0___0 0.9 0 0 20 0 20 10 0 10", "P1__1__0___0 0.8 16 0 36 0 36 10 16 10"]  # IoU 4 / 36 = .111
    assert len(merged_lines(lines)) == 1
    assert len(merged_lines(lines, iou_threshold=0.1112)) == 2
    exact = ["P1__1__0___0 0.9 0 0 11 0 11 1 0 1", "P1__1__0___0 0.8 9 0 20 0 20 1 9 1"]  # 2 / 20
    assert len(merged_lines(exact)) == 2
    assert len(merged_lines([line.replace("P1__1__0", f"P{index}__1__0") for index, line in enumerate(lines)])) == 2


def test_of_equal_scores_the_last_line_stays():
    same = [f"P1__1__0___0 0.5 {BOX}", f"P1__1__0___1 0.5 {BOX}"]
    assert merged_lines(same)[0].split()[3] == "11.0"
    sized = [line.replace("__1__", "__1024__") for line in same]
    assert merged_lines(sized, "bboxtoolkit")[0].split()[3] == "10.00"


def test_task_2_counts_pixels():
    # 10 x 1 and 10 x 1 px one of which is shared: corners say 1 / 19, pixels (11 x 2) 4 / 40 = .1
    lines = ["P1__1__0___0 0.9 0 0 10 1", "P1__1__0___0 0.8 9 0 19 1"]
    assert len(merged_lines(lines, task=2)) == 2
    assert len(merged_lines(lines, task=2, iou_threshold=0.099)) == 1
    sized = [line.replace("__1__", "__1024__") for line in lines]
    assert len(merged_lines(sized, "bboxtoolkit", task=2, iou_threshold=0.06)) == 2
    assert merged_lines(["P1__0.5__2___4 0.5 1 2 3 4"], task=2) == ["P1 0.5 6.0 12.0 10.0 16.0"]


def test_nothing_found():
    assert merged_lines([]) == []
    assert {name: len(rows) for name, rows in merge_boxes([], ["a", "b"]).items()} == {"a": 0, "b": 0}


# ---------------------------------------------------------------- whatever was found


@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.1, 0.5]))
@settings(max_examples=25, deadline=None)
def test_as_the_official_loop(seed, threshold):
    generator = np.random.default_rng(seed)
    number = int(generator.integers(1, 40))
    boxes = np.column_stack(
        [generator.uniform(0, 80, (number, 2)), generator.uniform(5, 40, (number, 2)), generator.uniform(-2, 2, number)]
    )
    scores = (generator.permutation(number) + 1) / (number + 1)
    names = [f"P{generator.integers(2)}__{generator.choice(['1', '0.5'])}__{x}___{x}" for x in range(number)]
    corners = boxes_to_polygons(boxes).reshape(-1, 8)
    lines = [
        f"{name} {score} " + " ".join(map(str, row))
        for name, score, row in zip(names, scores.tolist(), corners.tolist(), strict=True)
    ]
    found = [line.split() for line in merged_lines(lines, iou_threshold=threshold)]
    official = official_merge(lines, threshold)
    assert [(row[0], float(row[1])) for row in found] == [(image, score) for image, score, _ in official]
    expected = np.array([corners for _, _, corners in official]).reshape(-1, 8)
    assert np.array([row[2:] for row in found], float) == pytest.approx(expected)


@given(scenes(), st.sampled_from(["devkit", "bboxtoolkit"]), st.integers(64, 120))
@settings(max_examples=40, deadline=None)
def test_merging_gives_back_what_splitting_cut(scene, tool, size):
    objects, width, height = scene
    lines = []
    for name, labels in cut(SplitRules(tool, size, 32), objects, width, height).items():
        for line in labels:
            corners = np.array(line.split()[:8], float).reshape(4, 2)
            if not line.endswith(" 2"):  # what the devkit has cut off less of is smaller, so worse
                lines.append(f"P1__{name} {shapely.Polygon(corners).area / 1000} " + " ".join(line.split()[:8]))
    merged = merge_rows(rows_of(lines), tool=tool).polygons
    assert sorted(map(tuple, merged.tolist())) == sorted(map(tuple, objects.corners.tolist()))


# ---------------------------------------------------------------- files


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "patches"
    rows = rows_of([f"P1__1__0___0 0.5 {BOX}", "P1__1__5___0 0.75 5 10 25 10 25 20 5 20"])
    write_results(folder, {"ship": rows}, 1, ("ship", "plane"))
    return folder


def test_files(results, tmp_path):
    summary = merge_results(results, tmp_path / "out")
    assert (tmp_path / "out/Task1_ship.txt").read_text() == "P1 0.75 10.0 10.0 30.0 10.0 30.0 20.0 10.0 20.0\n"
    assert (tmp_path / "out/Task1_plane.txt").read_text() == ""
    assert {key: summary[key] for key in ("classes", "images", "patches", "before", "after")} == {
        **{"classes": 2, "images": 1, "patches": 2, "before": 2, "after": 1}
    }
    merge_results(results, tmp_path / "a.zip")
    merge_results(results, tmp_path / "b.zip")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert archive.read("Task1_ship.txt").startswith(b"P1 0.75")


def test_wrong_files_are_named_and_nothing_is_written(results, tmp_path):
    def fails(error, text, out="out", **options):
        with pytest.raises(error, match=text):
            merge_results(results, tmp_path / out, **options)
        assert [path.name for path in tmp_path.iterdir()] == ["patches"]

    fails(ConfigError, "tool='x'", tool="x")
    fails(ConfigError, "iou_threshold=2", iou_threshold=2)
    fails(DatasetNotFoundError, "is it task 2", task=2)
    fails(DatasetNotFoundError, "harbor", classes=("ship", "plane", "harbor"))
    fails(OutputError, "make it first", out="no/out")
    (results / "Task1_ship.txt").write_text(f"P1__1__0___0 0.5 {BOX}\nP1 0.5 {BOX}\n")
    fails(AnnotationError, r"Task1_ship\.txt:2: 'P1' is no patch")
    (results / "Task1_ship.txt").write_text(f"P1__1__0___0 nan {BOX}\n")
    fails(AnnotationError, r"Task1_ship\.txt:1: .*finite")


def test_folders_of_other_things_are_not_replaced(results, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="holds other files than results"):
        merge_results(results, tmp_path / "mine", overwrite=True)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(OutputError, match=r"is a file, and no \.zip"):
        merge_results(results, tmp_path / "a.txt", overwrite=True)


def test_command(results, tmp_path):
    result = run("data", "merge", results, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert "1 of 2 detections left, in 1 images and 2 classes" in result.stdout
    assert "--overwrite" in error_line(run("data", "merge", results, "-o", tmp_path / "out"))
    assert "no Task1_baseball-diamond.txt" in error_line(
        run("data", "merge", results, "-o", tmp_path / "x", "--classes", "dota_v1.0")
    )
    found = run(
        "data", "merge", results, "-o", tmp_path / "out", "--overwrite", "--json", "--class", "ship", "--class", "plane"
    )
    assert json.loads(found.stdout)["after"] == 1
    assert run("data", "merge", results, "-o", "x", "--class", "ship", "--classes", "dota_v1.0").exit_code == 2


def test_the_names_say_whose_patches_they_are(results, tmp_path):
    assert merge_results(results, tmp_path / "a")["tool"] == "devkit"
    line = error_line(run("data", "merge", results, "-o", tmp_path / "b", "--tool", "bboxtoolkit"))
    assert "'P1__1__0___0' is none of bboxtoolkit" in line
    (results / "Task1_ship.txt").write_text(f"P1__1024__5___0 0.5 {BOX}\n")
    assert merge_results(results, tmp_path / "c")["tool"] == "bboxtoolkit"
    assert (tmp_path / "c/Task1_ship.txt").read_text().startswith("P1 0.5 15.00 10.00")
    with pytest.raises(ConfigError, match="'P1__1024__5___0' is none of devkit"):
        merge_results(results, tmp_path / "d", tool="devkit")
    with pytest.raises(ConfigError, match="is none of devkit"):
        merge_rows(rows_of([f"P1__1024__5___0 0.5 {BOX}"]))
