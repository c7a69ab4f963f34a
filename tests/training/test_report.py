"""The report: one page that holds together, whose numbers are those of the tables, and pictures that show something."""

from __future__ import annotations

import base64
import csv
import io
import logging
import math
import re
import shlex
import sys
from contextlib import closing
from html.parser import HTMLParser

import click
import numpy as np
import pytest
from PIL import Image

from rtmdet_geo.cli import cli
from rtmdet_geo.config import load_recipe, parse_recipe
from rtmdet_geo.evaluation.plots import MAX_NAMED, NamedCurve, draw_precision_recall
from rtmdet_geo.evaluation.rotated import Curve
from rtmdet_geo.training.plots import draw_history, draw_losses, smooth
from rtmdet_geo.training.report import data_wait_share, write_report
from rtmdet_geo.training.run_log import RunLog, read_table, write_validation
from rtmdet_geo.training.validate import Validation

PICTURES = {"losses.png", "ap.png", "pr.png", "lr.png"}
HOSTILE = ("<script>alert(1)</script>", "\"quoted\" & 'more'", "$x_{1}$", "_hidden", "\N{SNOWMAN}\N{CJK RADICAL MEAT}")


class Page(HTMLParser):
    """What a page holds: rows of tables as texts, pictures, links, tags that were not closed."""

    EMPTY = ("meta", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.rows, self.images, self.links, self.tags, self.open, self.texts = [], [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in self.EMPTY:
            self.open.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "action")]
        if tag == "img":
            self.images.append(dict(attrs)["src"])
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data

    def fact(self, name):
        return next(row[1] for row in self.rows if row[0] == name)


def curve(number=40, quality=0.9):
    hits = np.random.default_rng(number).random(2 * number) < np.linspace(quality, 0.05, 2 * number)
    found = np.cumsum(hits)
    precision, recall = found / np.arange(1, 2 * number + 1), found / number
    return Curve(0.5, precision, recall, np.linspace(0.99, 0.05, 2 * number), number)


def finished_run(run, *, classes=("ship",), steps=50):
    """Write the tables of a run; return its last validation."""
    with closing(RunLog(run, tensorboard=False)) as log:
        for iteration in range(2, 2 * steps + 1, 2):
            terms = {"loss_cls": 1.5 / iteration, "loss_bbox": 0.5 / iteration}
            times = {"seconds": 0.4, "data_wait": 0.1 if iteration <= steps else 0.3, "images_per_second": 20}
            log.step(iteration, {"loss": sum(terms.values()), **terms, "grad_norm": 2, "lr": 1e-3, **times})
            if iteration % 20 == 0:
                log.validation(iteration, {"AP25": math.sin(iteration / 30), "AP50": float("nan")})
    curves = [NamedCurve(name, "AP25", 0.5, curve(20 + number)) for number, name in enumerate(classes)]
    rows = [
        {"bands": "red+green", "class": item.name, "measure": "AP25", "iou": 0.25, "ap": 0.123456 + number}
        | {"best_f1": 0.6, "best_score": 0.25, "num_objects": 1200 + number}
        for number, item in enumerate(curves)
    ]
    write_validation(run, rows)
    return Validation({"AP25": 0.31416, "AP50": float("nan")}, rows, curves, 12, ())


@pytest.fixture
def recipe():
    """A recipe that comes with the package."""
    return load_recipe("sen2ships_r")


SUMMARY = {"iterations": 100, "seconds": 4000.0, "parameters": 2177700, "data": {"images": 9, "objects": 1640}}
SUMMARY |= {"processes": 2, "bad_images": ["x.jpg", "y.jpg"], "figures": {}, "validation": [], "spare_time": 3}


def test_the_page_is_whole_and_holds_the_pictures(tmp_path, recipe):
    validation = finished_run(tmp_path)
    written = write_report(tmp_path, recipe, validation=validation, summary=SUMMARY)
    assert {path.name for path in written} == PICTURES | {"report.html"} and all(path.is_file() for path in written)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.open == [] and "script" not in page.tags
    assert len(page.images) == 4 and all(link.startswith("data:image/png;base64,") for link in page.links)
    files = {(tmp_path / name).read_bytes() for name in PICTURES}
    assert {base64.b64decode(link.partition(",")[2]) for link in page.images} == files
    for content in files:
        picture = Image.open(io.BytesIO(content))
        picture.load()
        assert picture.width >= 900 and len(picture.convert("RGB").getcolors(1 << 20)) > 20
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "prefers-color-scheme: dark" in text and "@media print" in text
    assert not re.search(r"(?:https?:)?//\w", re.sub(r"base64,[^\"]*", "", text))


def test_numbers_are_those_of_the_tables(tmp_path, recipe):
    validation = finished_run(tmp_path)
    write_report(tmp_path, recipe, validation=validation, summary=SUMMARY)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    history = read_table(tmp_path / "history.csv")
    best = max(history, key=lambda row: float(row["AP25"]))
    assert best is not history[-1]
    assert page.fact("AP25") == "0.3142"
    assert ["AP25", "0.3142", f"{float(best['AP25']):.4f}", best["iteration"]] in page.rows
    assert ["AP50", "n/a", "n/a", "n/a"] in page.rows
    with (tmp_path / "validation.csv").open() as stream:
        (row,) = csv.DictReader(stream)
    told = [row["class"], row["measure"], f"{float(row['ap']):.4f}", "0.6000", "0.2500", "1,200"]
    assert told in page.rows
    two = [dict(entry, bands=bands) for entry in validation.rows for bands in ("red", "green")]
    validation = Validation(validation.figures, two, [], 12)
    write_report(tmp_path, recipe, validation=validation, summary=SUMMARY)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert [told[0], "green", *told[1:]] in page.rows  # bands are told where they differ
    joined = " ".join(page.texts)
    assert f"{float(read_table(tmp_path / 'log.csv')[-1]['loss']):.4g}" in joined and "1 h 06 min" in joined
    assert page.fact("parameters") == "2,177,700" and page.fact("data") == "chips: 9 images, 1,640 objects"
    assert page.fact("did not decode") == "x.jpg, y.jpg" and page.fact("seed") == "0"
    assert page.fact("batch") == "12 crops: 6 x 1 accumulated x 2 processes" and page.fact("spare time") == "3"
    assert page.fact("images scored") == "12, by protocol area"
    assert recipe.to_yaml() in page.texts


def test_other_tables_give_other_numbers(tmp_path, recipe):
    """A negative control: the page follows the tables."""
    finished_run(tmp_path)
    with closing(RunLog(tmp_path, resume_at=1000, tensorboard=False)) as log:
        log.validation(120, {"AP25": 0.99919, "AP50": 0.5})
    write_report(tmp_path, recipe, validation=Validation({"AP25": 0.1, "AP50": 0.2}, [], [], 3, ("x.jpg",)), summary={})
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert ["AP25", "0.1000", "0.9992", "120"] in page.rows and ["AP50", "0.2000", "0.5000", "120"] in page.rows
    assert page.fact("left out of the scores") == "x.jpg"
    assert page.fact("batch") == "6 crops in each process"
    assert not (tmp_path / "pr.png").exists() and len(page.images) == 3


def test_rows_of_a_validation_are_a_table(tmp_path, recipe):
    """Of classifiers too, whose rows have other columns."""
    rows = [{"class": 'a "b", c', "num_images": 1500, "top1": 0.25}, {"class": "d", "num_images": 0, "top1": math.nan}]
    result = Validation({"top1": 0.25, "top5": 0.5}, rows, [], 1500)
    write_validation(tmp_path, rows)
    with (tmp_path / "validation.csv").open(newline="") as stream:
        assert [row["class"] for row in csv.DictReader(stream)] == ['a "b", c', "d"]
    assert read_table(tmp_path / "validation.csv")[1]["top1"] == "nan"
    write_report(tmp_path, recipe, validation=result, summary={})
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    at = page.rows.index(["class", "images", "top1"])
    assert page.rows[at + 1 : at + 3] == [['a "b", c', "1,500", "0.2500"], ["d", "0", "n/a"]]
    write_validation(tmp_path / "other", [])
    assert not (tmp_path / "other").exists() and read_table(tmp_path / "nosuch.csv") == []


def test_time_waiting_is_weighed_by_time():
    log = [
        {"iteration": "10", "images_per_second": "10", "data_wait": "0.5"},
        {"iteration": "40", "images_per_second": "30", "data_wait": "0.1"},  # 30 iterations in the time of 10
        {"iteration": "41", "images_per_second": "", "data_wait": ""},
    ]
    assert data_wait_share(log) == pytest.approx(0.3)
    assert data_wait_share([{"iteration": "1", "loss": "2"}]) is None and data_wait_share([]) is None


def test_the_share_of_time_waiting_is_told(tmp_path, recipe):
    finished_run(tmp_path)
    write_report(tmp_path, recipe, validation=None, summary={})
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    at = page.texts.index("of the time waiting for data")
    assert page.texts[at - 1] == "20.0 %"


def test_hostile_names_are_text_and_nothing_else(tmp_path, recipe):
    values = recipe.model_dump()
    values["name"] = values["model"]["weights"] = "</title><script>alert(2)</script>"
    values["model"]["classes"] = HOSTILE
    run = tmp_path / "a run; rm -rf \"$HOME\" <b>'x'"
    run.mkdir()
    validation = finished_run(run, classes=HOSTILE)
    hostile = parse_recipe(values)
    write_report(run, hostile, validation=validation, summary={"<i>note": "</pre><script>alert(3)</script>"})
    text = (run / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == [] and {"script", "i"}.isdisjoint(page.tags) and "<b>'x'" not in text
    assert "<script" not in text and page.fact("<i>note") == "</pre><script>alert(3)</script>"
    assert [row[0] for row in page.rows if row[1:2] == ["AP25"]] == list(HOSTILE)
    commands = next(item for item in page.texts if item.startswith("rtmdet-geo export")).splitlines()
    assert shlex.split(commands[0])[2] == str(run / "model.safetensors")


def test_commands_are_those_of_the_command_line(tmp_path, recipe):
    finished_run(tmp_path)
    values = {"name": "toy", "model": {"name": "cspnext_test", "classes": ["a", "b"]}}
    values |= {"augment": {"sampling": "classification"}, "data": {"format": "folders", "train_images": "train"}}
    for by, verbs in (
        (recipe, ["export", "detect"]),
        (parse_recipe(values), ["export", "classify"]),
    ):
        write_report(tmp_path, by, validation=None, summary={})
        page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
        lines = next(item for item in page.texts if item.startswith("rtmdet-geo export")).splitlines()
        words = [shlex.split(line) for line in lines]
        assert [line[1] for line in words] == verbs
        for _, verb, *arguments in words:
            context = click.Context(cli)
            command = cli.get_command(context, verb)
            command.make_parser(click.Context(command, parent=context)).parse_args(list(arguments))


def test_a_run_without_anything_to_show_has_a_page(tmp_path, recipe):
    assert [path.name for path in write_report(tmp_path, recipe, validation=None, summary={})] == ["report.html"]
    assert Page((tmp_path / "report.html").read_text(encoding="utf-8")).images == []


def test_without_matplotlib_one_line_says_what_to_install(tmp_path, recipe, monkeypatch, caplog):
    validation = finished_run(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"] + ["matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    with caplog.at_level(logging.WARNING):
        written = write_report(tmp_path, recipe, validation=validation, summary=SUMMARY)
    assert [path.name for path in written] == ["report.html"]
    assert len(caplog.records) == 1 and "pip install 'rtmdet-geo[train]'" in caplog.text
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.images == [] and page.fact("AP25") == "0.3142"


def test_long_tables_are_folded(tmp_path, recipe):
    validation = finished_run(tmp_path, classes=[f"class {number}" for number in range(30)])
    write_report(tmp_path, recipe, validation=validation, summary={})
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<summary>Every class (30 rows)</summary>" in text
    values = recipe.model_dump()
    values["model"]["classes"] = [f"class {number}" for number in range(30)]
    write_report(tmp_path, parse_recipe(values), validation=None, summary={})
    assert "class 19 and 10 more" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_smoothing_keeps_a_constant_and_follows_a_step():
    np.testing.assert_allclose(smooth(np.full(9, 3.0), 4), 3)
    step = smooth(np.r_[np.zeros(50), np.ones(50)], 5)
    assert step[49] == 0 and 0.1 < step[50] < 0.3 and step[-1] > 0.99
    np.testing.assert_array_equal(smooth(np.arange(4.0), 0), np.arange(4))


def test_pictures_leave_out_what_is_no_number():
    log = [
        {"iteration": str(i), "loss": value, "loss_cls": "1", "lr": ""} for i, value in enumerate(["1", "nan", "", "2"])
    ]
    assert draw_losses(log) is not None
    assert draw_losses([{"iteration": "1", "loss": "nan"}]) is None and draw_losses([]) is None
    assert draw_history([{"iteration": "1", "AP50": "nan"}]) is None
    assert draw_history([{"iteration": "1", "AP50": "nan", "AP75": "0"}]) is not None
    assert draw_precision_recall([]) is None
    nothing = Curve(0.0, np.zeros(0), np.zeros(0), np.zeros(0), 5)
    assert draw_precision_recall([NamedCurve("none found", "AP50", 0.0, nothing)]) is None


def test_pyplot_is_left_alone(tmp_path, recipe):
    """Whoever plots in the same process keeps their figures and settings."""
    import matplotlib
    from matplotlib._pylab_helpers import Gcf

    before = dict(matplotlib.rcParams), list(Gcf.figs)
    write_report(tmp_path, recipe, validation=finished_run(tmp_path), summary={})
    assert (dict(matplotlib.rcParams), list(Gcf.figs)) == before


@pytest.mark.parametrize("number", [1, MAX_NAMED, MAX_NAMED + 1, 80])
def test_any_number_of_classes_is_drawn(number):
    curves = [NamedCurve(f"class {index}", "AP50", 0.5, curve(10 + index)) for index in range(number)]
    picture = Image.open(io.BytesIO(draw_precision_recall(curves)))
    assert picture.width == 1008 and len(picture.convert("RGB").getcolors(1 << 20)) > 50
