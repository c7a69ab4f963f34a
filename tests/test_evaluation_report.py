"""Reports of evaluations: text, JSON, CSV, files."""

from __future__ import annotations

import csv
import io
import json
import math

import numpy as np
import pytest

from rtmdet_geo.errors import OutputError
from rtmdet_geo.evaluation.report import (
    Confusion,
    EvaluationReport,
    count_confusion,
    format_table,
    report_csv,
    report_json,
    report_text,
    write_report,
)
from rtmdet_geo.evaluation.rotated import best_columns

ROWS = ({"class": "plane", "ap": 0.5, "num_objects": 12}, {"class": "ship, old", "ap": float("nan"), "note": "none"})


def a_report(**changes) -> EvaluationReport:
    settings = {
        "protocol": "test",
        "figures": {"AP50": 0.5, "error_m": 12.345},
        "rows": ROWS,
        "confusion": count_confusion(["plane", "ship"], [0, 0, -1, 1], [0, 1, 0, -1]),
    }
    return EvaluationReport(**(settings | changes))


def test_confusion_counts_pairs():
    assert a_report().confusion.matrix.tolist() == [[1, 1, 0], [0, 0, 1], [1, 0, 0]]
    assert count_confusion([], [], []).matrix.tolist() == [[0]]


def test_confusion_of_a_wrong_shape_is_refused():
    with pytest.raises(ValueError, match=r"need a matrix of \(2, 2\)"):
        Confusion(("ship",), np.zeros((1, 1), np.int64))


def test_table_aligns_columns():
    assert format_table(ROWS).splitlines() == [
        "class          ap  num_objects  note",
        "plane      0.5000           12  -",
        "ship, old       -            -  none",
    ]


def test_text_has_protocol_rows_and_figures():
    text = report_text(a_report())
    assert text.startswith("test\n\nclass ")
    assert text.endswith("AP50     0.5000\nerror_m  12.35")
    assert report_text(EvaluationReport("empty", {})) == "empty"


def test_json_is_json():
    content = json.loads(json.dumps(report_json(a_report()), allow_nan=False))
    assert content["figures"] == {"AP50": 0.5, "error_m": 12.345}
    assert content["rows"][1]["ap"] is None
    assert content["confusion"]["names"] == ["plane", "ship", "background"]
    assert content["confusion"]["matrix"][0] == [1, 1, 0]
    assert "confusion" not in report_json(a_report(confusion=None))


def test_csv_keeps_every_digit_and_leaves_nan_empty():
    rows = list(csv.DictReader(io.StringIO(report_csv(a_report(rows=({"class": "a, b", "ap": 1 / 3}, *ROWS))))))
    assert float(rows[0]["ap"]) == 1 / 3
    assert rows[0]["class"] == "a, b"
    assert rows[2]["ap"] == ""
    assert rows[2]["note"] == "none"


def test_csv_without_rows_has_the_figures():
    assert report_csv(a_report(rows=())).splitlines() == ["AP50,error_m", "0.5,12.345"]


def test_write_report_writes_csv(tmp_path):
    path = tmp_path / "a.csv"
    assert write_report(a_report(), csv=path) == [path]
    assert path.read_bytes().decode() == report_csv(a_report())
    with pytest.raises(OutputError, match="--overwrite"):
        write_report(a_report(rows=()), csv=path)
    assert path.read_bytes().decode() == report_csv(a_report())
    write_report(a_report(rows=()), csv=path, overwrite=True)
    assert path.read_text(encoding="utf-8").startswith("AP50")
    assert [item.name for item in tmp_path.iterdir()] == ["a.csv"]


def test_nothing_found_is_told_alike_everywhere():
    """Nothing labelled or nothing detected: no threshold; detections without a hit: F1 0, whatever the threshold."""
    assert best_columns(0.8, 0.7, 3, 5) == {"best_f1": 0.8, "best_score": 0.7}
    for numbers in ((0, 5), (3, 0), (0, 0)):
        assert all(map(math.isnan, best_columns(0.0, 1.0, *numbers).values()))
    told = best_columns(0.0, 0.9, 3, 5)
    assert told["best_f1"] == 0 and math.isnan(told["best_score"])
