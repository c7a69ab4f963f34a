"""Pictures of evaluations: that there are any, how large they are, and what they are silent about."""

from __future__ import annotations

import builtins
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rtmdet_geo.errors import MissingDependencyError, OutputError
from rtmdet_geo.evaluation.plots import (
    CONFUSION_TABLE,
    MAX_LISTED,
    MAX_NUMBERED,
    PICTURES,
    best_threshold,
    draw_confusion,
    draw_report,
    draw_scores,
)
from rtmdet_geo.evaluation.report import EvaluationReport, count_confusion, write_report
from rtmdet_geo.evaluation.rotated import Curve


def inks(picture: bytes) -> int:
    """Number of different colours."""
    return len(Image.open(io.BytesIO(picture)).convert("RGB").getcolors(1 << 20))


def dark_pixels(picture: bytes) -> int:
    return int((np.asarray(Image.open(io.BytesIO(picture)).convert("L")) < 60).sum())


@pytest.mark.parametrize("number", [1, MAX_LISTED + 1])
def test_confusion_of_any_number_of_classes_is_drawn(number):
    confusion = count_confusion([f"$c{index}" for index in range(number)], np.arange(number), np.arange(number))
    assert inks(draw_confusion(confusion)) > 20


def test_confusion_shows_numbers_while_classes_are_few():
    few, many = (
        count_confusion(["c"] * number, *np.indices((number, number)).reshape(2, -1))
        for number in (MAX_NUMBERED, MAX_NUMBERED + 1)
    )
    assert dark_pixels(draw_confusion(few)) > 1.2 * dark_pixels(draw_confusion(many))


def test_nothing_is_no_picture():
    assert draw_confusion(count_confusion(["ship"], [], [])) is None
    assert draw_scores([], []) is None
    assert draw_report(EvaluationReport("empty", {})) == {}


def test_scores_are_drawn():
    rng = np.random.default_rng(0)
    assert inks(draw_scores(rng.random(50), rng.random(50) / 2, num_objects=60)) > 20
    assert inks(draw_scores([1.0], [])) > 5
    assert inks(draw_scores(np.ones(1), np.zeros(100_000), num_objects=1)) > 5  # a logarithmic axis


@given(
    st.lists(st.integers(0, 6), max_size=12),
    st.lists(st.integers(0, 6), max_size=12),
    st.integers(0, 5),
)
@settings(max_examples=60, deadline=None)
def test_best_threshold_is_the_best_of_all(hits, misses, num_missed):
    hits, misses = np.array(hits) / 6, np.array(misses) / 6
    number = max(len(hits) + num_missed, 1)
    f1, score = best_threshold(hits, misses, number)

    def f1_from(threshold):
        true, false = (hits >= threshold).sum(), (misses >= threshold).sum()
        return 2 * true / (true + false + number)

    levels = [*hits, *misses]
    assert f1 == pytest.approx(max([f1_from(level) for level in levels], default=0))
    assert not levels or f1_from(score) == pytest.approx(f1)


def whole_report() -> EvaluationReport:
    curve = Curve(0.5, np.array([1.0, 0.5]), np.array([0.5, 0.5]), np.array([0.9, 0.3]), 2)
    confusion = count_confusion(["ship"], [0, 0, -1], [0, -1, 0])
    return EvaluationReport("test", {"AP": 0.5}, (), {"ship": curve}, confusion, np.array([0.9]), np.array([0.3]))


def test_write_report_makes_the_folder_and_all_pictures(tmp_path):
    folder = tmp_path / "a" / "plots"
    assert write_report(whole_report(), plots=folder) == [folder / name for name in (*PICTURES, CONFUSION_TABLE)]
    assert {path.name for path in folder.iterdir()} == {*PICTURES, CONFUSION_TABLE}
    lines = (folder / CONFUSION_TABLE).read_text().splitlines()
    assert lines == ["labelled,ship,background", "ship,1,1", "background,1,0"]
    with pytest.raises(OutputError, match="--overwrite"):
        write_report(whole_report(), plots=folder, csv=tmp_path / "a.csv")
    assert not (tmp_path / "a.csv").exists()
    write_report(whole_report(), plots=folder, overwrite=True)
    with pytest.raises(OutputError, match="is a file"):
        write_report(whole_report(), plots=folder / PICTURES[0])


def test_nothing_to_draw_is_said_and_makes_no_folder(tmp_path, caplog):
    nothing = EvaluationReport("test", {"AP": float("nan")}, confusion=count_confusion(["ship"], [], []))
    assert write_report(nothing, plots=tmp_path / "plots", csv=tmp_path / "a.csv") == [tmp_path / "a.csv"]
    assert not (tmp_path / "plots").exists() and "there is nothing to draw" in caplog.text


def test_long_names_cut_nothing_off():
    """Around everything on the picture of a confusion there is white."""
    names = ["ground-track-field-of-soccer", "baseball-diamond", *(f"ground-track-{index}" for index in range(13))]
    for chosen in (names, names[:2]):
        picture = draw_confusion(count_confusion(chosen, range(len(chosen)), range(len(chosen))))
        pixels = np.asarray(Image.open(io.BytesIO(picture)).convert("L"))
        assert all(edge.min() == 255 for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]))


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch):
    usual = builtins.__import__

    def refuse(name, *rest, **named):
        if name.split(".")[0] == "matplotlib":
            raise ImportError("No module named 'matplotlib'")
        return usual(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingDependencyError, match=r"rtmdet-geo\[eval\]"):
        write_report(whole_report(), plots=tmp_path / "plots", csv=tmp_path / "a.csv")
    assert list(tmp_path.iterdir()) == []
