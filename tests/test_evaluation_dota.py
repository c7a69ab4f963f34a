"""DOTA and HRSC2016 against the golden numbers, the official algorithm, and by hand."""

from __future__ import annotations

import json
import logging
import math

import numpy as np
import pytest
from dota_official import bounds, official_ap

from rtmdet_geo.annotations.dota import read_dota
from rtmdet_geo.annotations.dota_results import ResultRows, write_results
from rtmdet_geo.annotations.labels import object_corners
from rtmdet_geo.boxes import boxes_to_polygons
from rtmdet_geo.class_names import DOTA_V1, DOTA_V1_5, DOTA_V2
from rtmdet_geo.errors import AnnotationError, Cancelled, DatasetNotFoundError
from rtmdet_geo.evaluation.coco import IOU_THRESHOLDS
from rtmdet_geo.evaluation.dota import evaluate_dota, read_class_list
from rtmdet_geo.evaluation.hrsc import evaluate_hrsc
from rtmdet_geo.evaluation.voc import LabelledObjects, score_results

SHIP = [10, 10, 50, 10, 50, 30, 10, 30]
TOLERANCE = 1e-5  # oracle README, AP
TWO = ("large-vehicle", "small-vehicle")


def text_of(corners):
    return " ".join(f"{value!r}" for value in np.reshape(corners, -1).tolist())


def write_labels(folder, images):
    """Write labelTxt files: by image a list of corners, class, difficult."""
    folder.mkdir(parents=True)
    for image, entries in images.items():
        lines = [f"{text_of(corners)} {name} {int(difficult)}\n" for corners, name, difficult in entries]
        (folder / f"{image}.txt").write_text("".join(["imagesource:x\n", "gsd:1\n", *lines]))
    return folder


def rows_of(entries, task=1):
    """Result rows of (image, score, shape) each."""
    shapes = np.array([entry[2] for entry in entries], float).reshape(-1, 8 if task == 1 else 4)
    corners = {"polygons": shapes} if task == 1 else {"hboxes": shapes}
    return ResultRows(tuple(e[0] for e in entries), np.array([e[1] for e in entries], float), **corners)


def oracle_rows(content, key):
    """Detections by class, whose geometry is the fitted box's or the polygon's."""
    found = {name: [] for name in content["classes"]}
    for image in content["images"]:
        for entry in image["dets"]:
            corners = entry["poly"] if key == "poly" else boxes_to_polygons([entry["rbox"]])[0].reshape(-1)
            found[content["classes"][entry["label"]]].append((image["id"], entry["score"], corners))
    return {name: rows_of(entries) for name, entries in found.items()}


def oracle_objects(content):
    entries = [(index, entry) for index, image in enumerate(content["images"]) for entry in image["gts"]]
    return LabelledObjects(
        tuple(image["id"] for image in content["images"]),
        np.array([index for index, _ in entries]),
        tuple(content["classes"][entry["label"]] for _, entry in entries),
        np.array([entry["poly"] for _, entry in entries], float),
        np.array([entry["rbox"] for _, entry in entries], float),
        np.array([bool(entry["difficult"]) for _, entry in entries]),
    )


def numbers(values):
    return [float(value) for value in values]  # "nan" is a string there


@pytest.fixture(scope="module")
def dota_oracle(oracle_dir):
    return json.loads((oracle_dir / "dota_eval.json").read_text())


@pytest.mark.parametrize("part", ["mmrotate_no_ignore", "mmrotate_difficult_ignored"])
def test_oracle_mmrotate(dota_oracle, part):
    difficult = "ignore" if part.endswith("ignored") else None
    rows, objects, names = oracle_rows(dota_oracle, "rbox"), oracle_objects(dota_oracle), dota_oracle["classes"]
    assert objects.difficult.any()
    scores = score_results(rows, objects, names, protocol="mmrotate", difficult=difficult)
    for points, key in (("11", "11points"), ("area", "area")):
        expected = dota_oracle[part][key]
        means = scores.means(points)
        assert means.mean() == pytest.approx(expected["mAP_50_95"], abs=TOLERANCE)
        for place, threshold in enumerate(IOU_THRESHOLDS):
            column = expected[f"{threshold:.2f}"]
            assert means[place] == pytest.approx(column["mAP"], abs=TOLERANCE)
            ours = [scores.classes[name].average_precisions(points)[place] for name in names]
            np.testing.assert_allclose(ours, numbers(column["ap"]), rtol=0, atol=TOLERANCE)
            assert [scores.classes[name].num_objects for name in names] == column["num_gts"]
            assert [len(scores.classes[name].matches.scores) for name in names] == column["num_dets"]


def test_oracle_devkit(dota_oracle):
    rows, objects, names = oracle_rows(dota_oracle, "poly"), oracle_objects(dota_oracle), dota_oracle["classes"]
    scores = score_results(rows, objects, names)
    for points, key in (("11", "voc07"), ("area", "voc12")):
        means = scores.means(points)
        for place, threshold in enumerate(IOU_THRESHOLDS):
            column = dota_oracle["devkit"][key][f"{threshold:.2f}"]
            ours = [scores.classes[name].average_precisions(points)[place] for name in names]
            np.testing.assert_allclose(ours, numbers(column["ap"]), rtol=0, atol=TOLERANCE)
            np.testing.assert_allclose(means[place], float(column["mAP"]), rtol=0, atol=TOLERANCE)
    with pytest.raises(AssertionError):  # the columns are not those of the other protocol
        other = score_results(rows, objects, names, protocol="mmrotate").means("11")
        np.testing.assert_allclose(other[0], dota_oracle["devkit"]["voc07"]["0.50"]["mAP"], rtol=0, atol=TOLERANCE)


def test_oracle_through_files(dota_oracle, tmp_path):
    """The same columns from result files and labelTxt files, by the function that users call."""
    names = tuple(dota_oracle["classes"])
    write_results(tmp_path / "results", oracle_rows(dota_oracle, "poly"), 1, names)
    labels = write_labels(
        tmp_path / "labels",
        {
            image["id"]: [(entry["poly"], names[entry["label"]], entry["difficult"]) for entry in image["gts"]]
            for image in dota_oracle["images"]
        },
    )
    figures = evaluate_dota(tmp_path / "results", labels, classes=names).figures
    voc07, voc12 = dota_oracle["devkit"]["voc07"], dota_oracle["devkit"]["voc12"]
    assert next(iter(figures)) == "AP50_11"
    assert figures["AP50_11"] == pytest.approx(voc07["0.50"]["mAP"], abs=TOLERANCE)
    assert figures["AP75_11"] == pytest.approx(voc07["0.75"]["mAP"], abs=TOLERANCE)
    assert figures["AP50_95_11"] == pytest.approx(np.mean([voc07[key]["mAP"] for key in voc07]), abs=TOLERANCE)
    assert math.isnan(float(voc12["0.50"]["mAP"])) and math.isnan(figures["AP50_area"])
    present = [value for value in numbers(voc12["0.50"]["ap"]) if value == value]
    by_area = evaluate_dota(tmp_path / "results", labels, classes=names, points="area").figures
    assert next(iter(by_area)) == "AP50_area"
    assert by_area["AP50_area_present"] == pytest.approx(np.mean(present), abs=TOLERANCE)
    assert by_area == {name: pytest.approx(value, nan_ok=True) for name, value in figures.items()}
    # of the labels' polygons and the detections' we fit the boxes ourselves: within what 0.01 px do to an IoU
    expected = dota_oracle["mmrotate_difficult_ignored"]["11points"]["0.50"]["mAP"]
    fitted = evaluate_dota(tmp_path / "results", labels, classes=names, protocol="mmrotate", difficult="ignore")
    assert fitted.figures["AP50_11"] == pytest.approx(expected, abs=TOLERANCE)


def test_oracle_hrsc(oracle_dir, tmp_path):
    content = json.loads((oracle_dir / "hrsc_eval.json").read_text())
    scores = score_results(
        oracle_rows(content, "rbox"), oracle_objects(content), content["classes"], protocol="mmrotate"
    )
    for points, key in (("11", "dota_ap07"), ("area", "dota_ap12")):
        means, expected = scores.means(points), content[key]
        assert means.mean() == pytest.approx(expected["mAP_50_95"], abs=TOLERANCE)
        np.testing.assert_allclose(means, list(expected["per_thr"].values()), rtol=0, atol=TOLERANCE)
    write_results(tmp_path / "r", oracle_rows(content, "rbox"), 1, ["ship"])
    (tmp_path / "labels").mkdir()
    for image in content["images"]:
        lines = [" ".join(map(str, entry["rbox"])) + "\n" for entry in image["gts"]]
        (tmp_path / "labels" / f"{image['id']}.txt").write_text("".join(lines))
    for results in (tmp_path / "r", tmp_path / "r" / "Task1_ship.txt"):
        figures = evaluate_hrsc(results, tmp_path / "labels").figures
        assert figures["AP50_voc07"] == pytest.approx(content["dota_ap07"]["AP50"], abs=TOLERANCE)
        assert figures["AP50_95_voc12"] == pytest.approx(content["dota_ap12"]["mAP_50_95"], abs=TOLERANCE)
        assert next(iter(figures)) == "AP50_voc07" and len(figures) == 6


def made_up(seed, task):
    """Three images of three classes, crowded, with detections near most objects; some objects difficult or double."""
    rng = np.random.default_rng(seed)
    labelled, found = {}, []
    for image in ("P1", "P2", "P3"):
        number = int(rng.integers(0, 25))
        boxes = np.column_stack(
            [rng.uniform(0, 120, (number, 2)), rng.uniform(6, 40, (number, 2)), rng.uniform(-2, 2, number)]
        )
        boxes[number // 2 : number // 2 + 1] = boxes[:1]
        corners = boxes_to_polygons(boxes).reshape(-1, 8)
        corners[::3] += rng.normal(0, 1, corners[::3].shape)  # no rectangles
        names = rng.choice(["ship", "plane", "harbor"], number, p=[0.6, 0.3, 0.1])
        labelled[image] = list(zip(corners, names.tolist(), (rng.random(number) < 0.25).tolist(), strict=True))
        for _ in range(40):
            shape, name = rng.uniform(0, 120, 2)[None] + [[0, 0], [20, 0], [20, 12], [0, 12]], "ship"
            if number and rng.random() < 0.8:
                near = rng.integers(number)
                shape, name = corners[near].reshape(4, 2) + rng.normal(0, 1, (4, 2)), str(names[near])
            shape = shape.reshape(-1) if task == 1 else bounds(shape.reshape(-1))[0]
            found.append((name, image, rng.integers(1, 60) / 60, shape))
    return labelled, found


@pytest.mark.parametrize("task", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_official_loop(tmp_path, seed, task):
    labelled, found = made_up(seed, task)
    names = ("ship", "plane", "harbor")
    rows = {name: [entry[1:] for entry in found if entry[0] == name] for name in names}
    write_results(tmp_path / "r", {name: rows_of(entries, task) for name, entries in rows.items()}, task, names)
    report = evaluate_dota(tmp_path / "r", write_labels(tmp_path / "l", labelled), classes=names, task=task)
    for row in report.rows:
        objects = {
            image: (
                np.array([corners for corners, name, _ in entries if name == row["class"]]).reshape(-1, 8),
                np.array([hard for _, name, hard in entries if name == row["class"]], bool),
            )
            for image, entries in labelled.items()
        }
        for points in ("11", "area"):
            expected = [
                official_ap(rows[row["class"]], objects, threshold, task=task, is_voc07=points == "11")
                for threshold in IOU_THRESHOLDS
            ]
            assert row[f"AP50_{points}"] == pytest.approx(expected[0], abs=1e-9)
            assert row[f"AP75_{points}"] == pytest.approx(expected[5], abs=1e-9)
            assert row[f"AP50_95_{points}"] == pytest.approx(np.mean(expected), abs=1e-9)
    assert 0.1 < report.figures["AP50_11"] < 0.9


def test_difficult_objects_by_hand(tmp_path):
    """Of two ships one is difficult: found or not, it is no hit and no miss, unless difficult objects count."""
    far = [210, 10, 250, 10, 250, 30, 210, 30]
    labels = write_labels(tmp_path / "l", {"P1": [(SHIP, "ship", False), (far, "ship", True)]})
    write_results(tmp_path / "r", {"ship": rows_of([("P1", 0.9, far), ("P1", 0.5, SHIP)])}, 1, ["ship"])
    write_results(tmp_path / "one", {"ship": rows_of([("P1", 0.5, SHIP)])}, 1, ["ship"])

    def figure(results, **options):
        return evaluate_dota(tmp_path / results, labels, classes=["ship"], **options).figures["AP50_area"]

    assert figure("r") == figure("one") == figure("r", protocol="mmrotate") == 1
    assert figure("one", protocol="mmrotate") == figure("one", protocol="mmrotate", difficult="count") == 0.5
    assert figure("one", protocol="mmrotate", difficult="ignore") == 1
    with pytest.raises(ValueError, match="protocol devkit ignores"):
        figure("one", difficult="count")


def test_an_iou_of_the_threshold_itself(tmp_path):
    """Half of the ship: the development kit wants more, MMRotate does not."""
    half = [10, 10, 30, 10, 30, 30, 10, 30]
    labels = write_labels(tmp_path / "l", {"P1": [(SHIP, "ship", False)]})
    write_results(tmp_path / "r", {"ship": rows_of([("P1", 0.9, half)])}, 1, ["ship"])
    assert evaluate_dota(tmp_path / "r", labels, classes=["ship"]).figures["AP50_11"] == 0
    assert evaluate_dota(tmp_path / "r", labels, classes=["ship"], protocol="mmrotate").figures["AP50_11"] == 1


def test_horizontal_boxes_by_hand(tmp_path):
    """Labels are cut to whole px and their last px belongs to them: 41 x 21 px, of which the detection has 31 x 21."""
    labels = write_labels(tmp_path / "l", {"P1": [(np.add(SHIP, 0.6), "ship", False)]})
    write_results(tmp_path / "r", {"ship": rows_of([("P1", 0.9, [10, 10, 40, 30])], 2)}, 2, ["ship"])
    figures = evaluate_dota(tmp_path / "r", labels, classes=["ship"], task=2).figures
    assert (figures["AP50_11"], figures["AP75_11"]) == (1, 1)  # 651 / 861 = 0.756
    plain = evaluate_dota(tmp_path / "r", labels, classes=["ship"], task=2, protocol="mmrotate").figures
    assert (plain["AP50_11"], plain["AP75_11"]) == (1, 0)  # 29.4 x 19.4 of 830 px^2: 0.69


def test_confusion_and_scores(tmp_path):
    """A ship taken for a plane, one found, one missed, a false alarm, a difficult one that does not count."""
    at = [np.add(SHIP, [100 * step, 0] * 4) for step in range(6)]
    entries = [(at[0], "ship", False), (at[1], "ship", False), (at[2], "ship", False), (at[3], "plane", True)]
    labels = write_labels(tmp_path / "l", {"P1": entries, "P2": [(at[0], "plane", False)]})
    planes = [("P1", 0.8, at[0]), ("P1", 0.7, at[3]), ("P2", 0.6, at[0])]
    ships = [("P1", 0.9, at[1]), ("P1", 0.3, at[5])]
    write_results(tmp_path / "r", {"plane": rows_of(planes), "ship": rows_of(ships)}, 1, ["plane", "ship"])
    report = evaluate_dota(tmp_path / "r", labels, classes=["plane", "ship"])
    # planes are sure from 0.6 on, ships from 0.9 on: the best F1
    assert report.confusion.matrix.tolist() == [[1, 0, 0], [1, 1, 1], [0, 0, 0]]
    assert report.hit_scores.tolist() == [0.6, 0.9] and report.miss_scores.tolist() == [0.8, 0.3]
    assert [row["recall"] for row in report.rows] == [1, pytest.approx(1 / 3)]
    assert list(report.curves) == ["plane", "ship"]


def test_absent_classes_count_as_zero_only_in_the_development_kit(tmp_path, caplog):
    labels = write_labels(tmp_path / "l", {"P1": [(SHIP, "ship", False), (SHIP, "tank", False)]})
    write_results(tmp_path / "r", {"ship": rows_of([("P1", 0.9, SHIP)])}, 1, ["plane", "ship"])
    with caplog.at_level(logging.WARNING, logger="rtmdet_geo"):
        figures = evaluate_dota(tmp_path / "r", labels, classes=["plane", "ship"]).figures
    assert (figures["AP50_11"], figures["AP50_11_present"]) == (0.5, 1) and math.isnan(figures["AP50_area"])
    assert "not scored: 1 tank" in caplog.messages[0] and "1 of 2 classes counts (plane)" in caplog.messages[1]
    figures = evaluate_dota(tmp_path / "r", labels, classes=["plane", "ship"], protocol="mmrotate").figures
    assert figures["AP50_11"] == figures["AP50_area"] == 1


def test_bad_input_is_named(tmp_path):
    labels = write_labels(tmp_path / "l", {"P1": [(SHIP, "ship", False)]})
    write_results(tmp_path / "r", {"ship": rows_of([("P1", 0.9, SHIP), ("P7", 0.8, SHIP)])}, 1, ["ship"])
    with pytest.raises(AnnotationError, match=r"Task1_ship.txt:2: image 'P7' has no labels in '.*l'; evaluate"):
        evaluate_dota(tmp_path / "r", labels, classes=["ship"])
    with pytest.raises(DatasetNotFoundError, match=r"no Task1_plane.txt \(14 of 15"):
        evaluate_dota(tmp_path / "r", labels)
    with pytest.raises(DatasetNotFoundError, match=r"folder of labels .*nowhere"):
        evaluate_dota(tmp_path / "r", tmp_path / "nowhere", classes=["ship"])
    with pytest.raises(DatasetNotFoundError, match=r"no label files \(\*\.txt\)"):
        (tmp_path / "none").mkdir()
        evaluate_dota(tmp_path / "r", tmp_path / "none", classes=["ship"])
    (labels / "P2.txt").write_text("1 2 3 ship 0\n")
    with pytest.raises(AnnotationError, match=r"P2.txt:1: 5 words"):
        evaluate_dota(tmp_path / "r", labels, classes=["ship"])
    with pytest.raises(Cancelled):
        (labels / "P2.txt").write_text("")
        evaluate_dota(tmp_path / "r", labels, classes=["ship"], cancelled=lambda: True)


def test_lists_of_classes(tmp_path):
    for start in ("", "dota_"):
        lists = [read_class_list(f"{start}{version}") for version in ("v1.0", "v1.5", "v2.0")]
        assert lists == [DOTA_V1, DOTA_V1_5, DOTA_V2]
    assert read_class_list("ship, large-vehicle") == ("ship", "large-vehicle") and read_class_list("ship") == ("ship",)
    for text in ("ship,", "ship,ship"):
        with pytest.raises(AnnotationError, match="write them as"):
            read_class_list(text)
    for text in ("dota_v1", "names.txt", "some/names", tmp_path / "names"):
        with pytest.raises(DatasetNotFoundError, match="no file of class names"):
            read_class_list(text)
    (tmp_path / "names.txt").write_text("storage-tank\r\n\r\nship\r\n")
    assert read_class_list(tmp_path / "names.txt") == ("storage-tank", "ship")
    with pytest.raises(DatasetNotFoundError, match=r"'v3.0' is none of dota_v1.0, dota_v1.5, dota_v2.0, and no file"):
        read_class_list("v3.0")
    for content, part in (
        (b"ship\nship\n", ":2: class 'ship' stands in line 1"),
        (b"\n", "names no class"),
        (b"\xff", "not text"),
    ):
        (tmp_path / "names.txt").write_bytes(content)
        with pytest.raises(AnnotationError, match=part):
            read_class_list(tmp_path / "names.txt")


def test_threads_and_progress(tmp_path):
    labelled, found = made_up(1, 1)
    names = ("ship", "plane", "harbor")
    rows = {name: rows_of([entry[1:] for entry in found if entry[0] == name]) for name in names}
    write_results(tmp_path / "r", rows, 1, names)
    labels = write_labels(tmp_path / "l", labelled)
    steps = []
    reports = [
        evaluate_dota(tmp_path / "r", labels, classes=names, threads=threads, progress=lambda *step: steps.append(step))
        for threads in (1, 3)
    ]
    assert reports[0].rows == reports[1].rows and reports[0].figures == reports[1].figures
    assert steps == [(step, 9) for step in range(1, 10)] * 2  # 3 label files, 3 of results, 3 classes


# ---------------------------------------------------------------- real labels


def real_labels(data_dir):
    folder = data_dir / "dota_full" / "labelTxt"
    return folder, {path.stem: read_dota(path, with_outlines=True) for path in sorted(folder.glob("*.txt"))}


def fed_back(labels, task, rng=None):
    """Detections that are the labels, in random order of scores; with ``rng`` moved, doubled and left out."""
    found = {name: [] for name in TWO}
    for image, part in labels.items():
        for name, corners in zip(part.class_names, object_corners(part), strict=True):
            copies = 1 if rng is None else int(rng.integers(0, 3))
            for _ in range(copies):
                moved = corners if rng is None else corners + rng.normal(0, 2, (4, 2))
                shape = moved.reshape(-1) if task == 1 else bounds(moved.reshape(-1))[0]
                found[name].append((image, 0.5 if rng is None else float(rng.random()), shape))
    return found


@pytest.mark.parametrize("protocol", ["devkit", "mmrotate"])
@pytest.mark.parametrize("task", [1, 2])
def test_real_labels_fed_back_are_found_completely(data_dir, tmp_path, task, protocol):
    folder, labels = real_labels(data_dir)
    found = {name: rows_of(entries, task) for name, entries in fed_back(labels, task).items()}
    write_results(tmp_path / "r", found, task, DOTA_V1)
    report = evaluate_dota(tmp_path / "r", folder, task=task, protocol=protocol)
    for row in report.rows:
        if row["class"] in TWO:
            assert [row[name] for name in row if name.startswith("AP")] == [pytest.approx(1)] * 6
            assert row["objects"] + row["difficult"] * (protocol == "devkit") == row["detections"] > 30
    mean = 1 if protocol == "mmrotate" else 2 / 15
    assert report.figures["AP50_11"] == pytest.approx(mean)
    assert report.miss_scores.size == 0


@pytest.mark.parametrize("task", [1, 2])
def test_real_labels_with_noise_equal_the_official_loop(data_dir, tmp_path, task):
    folder, labels = real_labels(data_dir)
    found = fed_back(labels, task, np.random.default_rng(task))
    write_results(tmp_path / "r", {name: rows_of(entries, task) for name, entries in found.items()}, task, TWO)
    report = evaluate_dota(tmp_path / "r", folder, classes=TWO, task=task)
    for row in report.rows:
        objects = {
            image: (object_corners(part).reshape(-1, 8)[own], part.difficult[own])
            for image, part in labels.items()
            for own in [np.array([name == row["class"] for name in part.class_names], bool)]
        }
        for key, threshold in (("AP50", 0.5), ("AP75", 0.75)):
            for points in ("11", "area"):
                expected = official_ap(found[row["class"]], objects, threshold, task=task, is_voc07=points == "11")
                assert row[f"{key}_{points}"] == pytest.approx(expected, abs=1e-9)
        assert 0.1 < row["AP50_11"] < 0.99


def test_real_ships_of_hrsc_fed_back(data_dir, tmp_path):
    """The XML of a ship at its own size."""
    from rtmdet_geo.annotations.hrsc import read_hrsc

    folder = data_dir / "hrsc_xml_sample"
    ships = read_hrsc(folder / "100000006.xml")
    entries = [("100000006", 0.9, corners) for corners in boxes_to_polygons(ships.boxes).reshape(-1, 8)]
    write_results(tmp_path / "r", {"ship": rows_of(entries)}, 1, ["ship"])
    figures = evaluate_hrsc(tmp_path / "r", folder).figures
    assert set(figures.values()) == {1.0}
