"""Predictions of classifiers in CSV files against folders of images and CSV files."""

from __future__ import annotations

import pytest

from rtmdet_geo.errors import AnnotationError, DatasetNotFoundError
from rtmdet_geo.evaluation.classification_files import evaluate_classification

LABELS = "image,class\na.jpg,ship\nb.jpg,plane\nc.jpg,ship\nd.jpg,tank\n"
SCORES = """image,plane,ship,tank
a.jpg,0.1,0.8,0.1
b.jpg,0.2,0.7,0.1
c.jpg,0.4,0.5,0.1
d.jpg,0.3,0.4,0.3
"""
NAMES = "image,first,second\r\na.jpg,ship,plane\r\nb.jpg,ship,plane\r\nc.jpg,ship,\r\nd.jpg,ship,plane\r\n"


def write(path, text, **encoding):
    path.write_bytes(text.encode(**encoding))
    return path


def evaluate(tmp_path, predictions, labels=LABELS):
    return evaluate_classification(write(tmp_path / "p.csv", predictions), write(tmp_path / "labels.csv", labels))


def test_scores_by_hand(tmp_path):
    report = evaluate(tmp_path, SCORES)
    assert report.figures == {"top1": 0.5, "top5": 1, "top1_class_mean": pytest.approx((1 + 0 + 0) / 3)}
    assert [(row["class"], row["num_images"], row["top1"]) for row in report.rows] == [
        ("plane", 1, 0), ("ship", 2, 1), ("tank", 1, 0)
    ]  # fmt: skip
    assert report.confusion.names == ("plane", "ship", "tank")
    assert report.confusion.matrix.tolist() == [[0, 1, 0, 0], [0, 2, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert report.hit_scores.tolist() == [0.8, 0.5] and report.miss_scores.tolist() == [0.7, 0.4]


def test_names_by_hand(tmp_path):
    """Two names an image, one in one case, do not tell the first five; the tank is not named at all."""
    report = evaluate(tmp_path, NAMES)
    assert list(report.figures) == ["top1", "top1_class_mean"] and report.figures["top1"] == 0.5
    assert report.confusion.matrix[2].tolist() == [0, 1, 0, 0] and report.hit_scores.size == 0
    six = "image,1,2,3,4,5,6\n" + "".join(f"{name}.jpg,e,d,c,b,plane,ship\n" for name in "abcd")
    figures = evaluate(tmp_path, six).figures
    assert figures["top1"] == 0 and figures["top5"] == 0.25


def test_classes_may_be_numbers(tmp_path):
    text = "image,1,2\n" + "".join(f"{name}.jpg,7,0\n" for name in "ab")
    assert evaluate(tmp_path, text, "image,class\na.jpg,7\nb.jpg,0\n").figures["top1"] == 0.5


def test_columns_of_no_label_are_told(tmp_path, caplog):
    """A column of something else, such as the certainty, would be taken for a class."""
    text = "image,plane,ship,tank,sure\n" + "".join(f"{name}.jpg,0,1,0,0.5\n" for name in "abcd")
    assert evaluate(tmp_path, text).figures["top1"] == 0.5
    assert "p.csv: no image is labelled sure, but these columns count as guesses" in caplog.text


def test_a_folder_of_classes(tmp_path):
    """Of images nothing is opened; classes may have other names than their folders."""
    for name in ("n01/1.jpg", "n01/2.jpg", "n02/deep/3.png"):
        path = tmp_path / "val" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "val" / "classes.txt").write_text("n01 ship\nn02 plane\n")
    text = "image,plane,ship,unused\nn01/1.jpg,0,1,0\nn01/2.jpg,1,0,0\nn02/deep/3.png,0.5,0.2,0.1\n"
    report = evaluate_classification(write(tmp_path / "p.csv", text, encoding="utf-8-sig"), tmp_path / "val")
    assert report.figures["top1"] == pytest.approx(2 / 3)
    assert [row["class"] for row in report.rows] == ["plane", "ship"] and len(report.confusion.names) == 3


@pytest.mark.parametrize(
    ("predictions", "part"),
    [
        ("", r"p.csv has no header"),
        ("image\na.jpg\n", r"p.csv has no header of image and classes"),
        ("image,ship,ship\n", r"p.csv:1: the header has the same name twice"),
        ("image,plane,ship,tank\n", r"p.csv has a header and no predictions"),
        (SCORES.replace("0.2,0.7,0.1", "0.2,0.7"), r"p.csv:3: 3 cells, but the header has 4"),
        (SCORES.replace("0.5", "nan"), r"p.csv:4: a score is not finite"),
        (SCORES.replace("0.5", "high"), r"p.csv:4: score 'high' of 'ship' is no number"),
        (SCORES.replace("b.jpg", "a.jpg"), r"p.csv:3: image 'a.jpg' stands in line 2 already"),
        (SCORES.replace("b.jpg", "x.jpg"), r"p.csv:3: image 'x.jpg' has no label in .*labels.csv.*such as 'a.jpg'"),
        (SCORES.replace("b.jpg,0.2,0.7,0.1\n", ""), r"p.csv has no prediction for 'b.jpg' \(1 such"),
        (NAMES.replace("ship,plane", "ship,ship", 1), r"p.csv:2: it names a class twice"),
        (NAMES.replace("c.jpg,ship,", "c.jpg,,"), r"p.csv:4: it names no class"),
        (SCORES + '"open\n', r"p.csv is no CSV file"),
        (SCORES.replace("ship", "shipp"), "'shipp' is no class.*, and none is class 'ship'; the labels have plane, sh"),
        (SCORES.replace("plane,ship,tank", "a,b,c"), "p.csv: column 'a' is no class of the labels, and none is class"),
        ("image,ship\n" + "".join(f"{name}.jpg,1\n" for name in "abcd"), "p.csv: no column is class 'plane'"),
        (SCORES.replace(",", ";"), "p.csv:1: its cells are parted by semicolons; save it with commas"),
    ],
)
def test_malformed_predictions_are_named(tmp_path, predictions, part):
    with pytest.raises(AnnotationError, match=part):
        evaluate(tmp_path, predictions)


@pytest.mark.parametrize(
    ("labels", "part"),
    [
        ("image,class\na.jpg,ship,1\n", r"labels.csv:2: it should be image,class"),
        ("image,class\na.jpg,\n", r"labels.csv:2: it should be"),
        (LABELS + "a.jpg,tank\n", r"labels.csv:6: image 'a.jpg' is of class 'ship' before"),
    ],
)
def test_malformed_labels_are_named(tmp_path, labels, part):
    with pytest.raises(AnnotationError, match=part):
        evaluate(tmp_path, SCORES, labels)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(DatasetNotFoundError, match=r"file or folder of labels .*nosuch.csv' is missing"):
        evaluate_classification(write(tmp_path / "p.csv", SCORES), tmp_path / "nosuch.csv")
    with pytest.raises(DatasetNotFoundError, match=r"file of predictions .*nosuch.csv' is missing"):
        evaluate_classification(tmp_path / "nosuch.csv", write(tmp_path / "labels.csv", LABELS))
    with pytest.raises(DatasetNotFoundError, match=r"labels.csv' labels no image"):
        evaluate(tmp_path, SCORES, "image,class\n")
    (tmp_path / "val").mkdir()
    with pytest.raises(DatasetNotFoundError, match="no images in folders of classes"):
        evaluate_classification(tmp_path / "p.csv", tmp_path / "val")
