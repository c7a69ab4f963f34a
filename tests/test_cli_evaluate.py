"""rtmdet-geo evaluate: what it prints and writes, its exit codes, and the scripts that are the same."""

from __future__ import annotations

import csv
import json
import runpy
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from rtmdet_geo.class_names import DOTA_V1
from rtmdet_geo.cli import cli

ROOT = Path(__file__).resolve().parent.parent
SHIP, PLANE = "10 10 50 10 50 30 10 30", "60 60 90 60 90 90 60 90"


def run(*words):
    return CliRunner().invoke(cli, ["evaluate", *map(str, words)], prog_name="rtmdet-geo", terminal_width=100)


@pytest.fixture
def folders(tmp_path):
    """Two images, a ship found and a plane missed; results of all classes of v1.0."""
    for name in ("results", "labels"):
        (tmp_path / name).mkdir()
    for name in DOTA_V1:
        (tmp_path / "results" / f"Task1_{name}.txt").write_text(f"P1 0.9 {SHIP}\n" if name == "ship" else "")
    (tmp_path / "labels" / "P1.txt").write_text(f"{SHIP} ship 0\n{PLANE} plane 0\n")
    (tmp_path / "labels" / "P2.txt").write_text("")
    return tmp_path


def test_table_and_figures(folders):
    quiet = run("dota", folders / "results", folders / "labels", "-q")
    result = run("dota", folders / "results", folders / "labels")
    assert (quiet.exit_code, quiet.stderr, quiet.stdout) == (0, "", result.stdout)
    lines = result.stdout.splitlines()
    assert result.exit_code == 0 and lines[0] == "DOTA task 1, protocol devkit"
    assert len([line for line in lines if line.startswith(DOTA_V1)]) == 15
    figures = dict(line.split() for line in lines if line.startswith("AP"))
    assert figures["AP50_11"] == "0.0667" and figures["AP50_11_present"] == "0.5000" and figures["AP50_area"] == "-"
    (line,) = result.stderr.splitlines()
    assert line.startswith("rtmdet-geo: warning: ") and "13 of 15 classes" in line
    loud = run("dota", folders / "results", folders / "labels", "-v")
    assert "WARNING rtmdet_geo.evaluation.dota: " in loud.stderr


def test_json_csv_plots_and_verdict(folders):
    words = ("dota", folders / "results", folders / "labels", "--protocol", "mmrotate", "--json")
    output = ("--csv", folders / "ap.csv", "--plots", folders / "plots")
    result = run(*words, *output, "--min-ap", 0.4)
    summary = json.loads(result.stdout)
    assert result.exit_code == 0 and result.stderr == ""
    assert (summary["figures"]["AP50_11"], summary["min_ap"], summary["is_met"]) == (0.5, 0.4, True)
    with (folders / "ap.csv").open(newline="") as stream:
        rows = {row["class"]: row for row in csv.DictReader(stream)}
    assert len(rows) == 15 and rows["ship"]["AP50_11"] == "1.0" and rows["plane"]["objects"] == "1"
    assert {path.suffix for path in (folders / "plots").iterdir()} == {".png", ".csv"}
    assert summary["confusion"]["names"][-1] == "background"

    below = run(*words, "--min-ap", 0.6)
    assert below.exit_code == 3 and json.loads(below.stdout)["is_met"] is False
    assert below.stderr == "rtmdet-geo: AP50_11 0.5000 is below --min-ap 0.6\n"
    no_number = run("dota", folders / "results", folders / "labels", "--points", "area", "--min-ap", 0, "-q")
    assert no_number.exit_code == 3 and "AP50_area nan is below" in no_number.stderr

    again = run(*words, *output)
    assert again.exit_code == 1 and "--overwrite" in again.stderr and again.stdout == ""
    assert run(*words, *output, "--overwrite").exit_code == 0


def test_progress_as_events(folders):
    """With --progress jsonl stdout is events only, the report in the last one."""
    words = ("dota", folders / "results", folders / "labels", "--protocol", "mmrotate", "--progress", "jsonl")
    events = [json.loads(line) for line in run(*words, "--min-ap", 0.4).stdout.splitlines()]
    assert [event["event"] for event in events] == ["start", *["progress"] * (2 + 15 + 15), "done"]
    assert (events[-2]["done"], events[-2]["total"]) == (32, 32)
    assert events[-1]["figures"]["AP50_11"] == 0.5 and events[-1]["is_met"] is True
    assert run(*words, "--json").exit_code == 2


def test_errors_are_one_line_and_nothing_is_written(folders):
    (folders / "results" / "Task1_ship.txt").write_text(f"P1 0.9 {SHIP}\nP1 nan {SHIP}\n")
    result = run("dota", folders / "results", folders / "labels", "--csv", folders / "ap.csv")
    assert result.exit_code == 1 and result.stdout == "" and not (folders / "ap.csv").exists()
    (line,) = result.stderr.splitlines()
    assert line.startswith("rtmdet-geo: error: ") and "Task1_ship.txt:2: score or coordinates are not finite" in line
    result = run("dota", folders / "results", folders / "labels" / "P1.txt")
    assert result.exit_code == 1 and "P1.txt' is a file; give the folder that it lies in" in result.stderr
    result = run("dota", folders / "nowhere", folders / "labels")
    assert result.exit_code == 1 and "nowhere" in result.stderr
    result = run("dota", folders / "results", folders / "labels", "--csv", folders / "no" / "ap.csv")
    assert result.exit_code == 1 and "does not exist" in result.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["--difficult", "count"],
        ["--task", "3"],
        ["--points", "12"],
        ["--protocol", "voc"],
        ["--min-ap", "1.5"],
        ["--nosuch"],
    ],
)
def test_usage_errors(folders, words):
    result = run("dota", folders / "results", folders / "labels", *words)
    assert result.exit_code == 2 and result.stdout == "" and "Usage: rtmdet-geo evaluate dota" in result.stderr


def test_hrsc(folders):
    (folders / "texts").mkdir()
    (folders / "texts" / "P1.txt").write_text("30 20 40 20 0\n")
    words = ("hrsc", folders / "results", folders / "texts", "--json", "--points", "voc12")
    figures = json.loads(run(*words).stdout)["figures"]
    assert next(iter(figures)) == "AP50_voc12" and set(figures.values()) == {1.0}
    events = [json.loads(line) for line in run(*words[:3], "--progress", "jsonl").stdout.splitlines()]
    assert [event["event"] for event in events] == ["start", "progress", "done"] and "AP50_voc07" in events[-1][
        "figures"
    ]
    with zipfile.ZipFile(folders / "found.zip", "w") as archive:
        archive.write(folders / "results" / "Task1_ship.txt", "Task1_ship.txt")
    assert json.loads(run("hrsc", folders / "found.zip", *words[2:]).stdout)["figures"] == figures
    (folders / "results" / "Task1_ship.txt").write_text("")
    (row,) = json.loads(run(*words).stdout)["rows"]
    assert (row["objects"], row["recall"], row["best_f1"], row["best_score"]) == (1, 0.0, None, None)
    (folders / "texts" / "P1.xml").write_text("<HRSC_Image/>")
    result = run(*words)
    assert result.exit_code == 1 and "holds .xml and .txt files" in result.stderr


def test_coco(tmp_path):
    image = {"id": 1, "file_name": "a.png", "width": 50, "height": 40}
    box = {"image_id": 1, "category_id": 1, "bbox": [1, 2, 20, 10]}
    content = {
        "images": [image],
        "categories": [{"id": 1, "name": "ship"}],
        "annotations": [box | {"id": 1, "area": 200}],
    }
    (tmp_path / "labels.json").write_text(json.dumps(content))
    (tmp_path / "results.json").write_text(json.dumps([box | {"score": 0.5}]))
    result = run("coco", tmp_path / "results.json", tmp_path / "labels.json", "--min-ap", 1)
    assert result.exit_code == 0 and "COCO, boxes" in result.stdout and "AP50" in result.stdout
    result = run("coco", tmp_path / "results.json", tmp_path / "labels.json", "--measure", "masks")
    assert result.exit_code == 1 and "entry 0: it has none of the masks" in result.stderr


def test_classification(tmp_path):
    (tmp_path / "labels.csv").write_text("image,class\na.jpg,ship\nb.jpg,plane\n")
    (tmp_path / "p.csv").write_text("image,plane,ship\na.jpg,0.1,0.9\nb.jpg,0.4,0.6\n")
    result = run("classification", tmp_path / "p.csv", tmp_path / "labels.csv", "--min-ap", 0.6)
    assert result.exit_code == 3 and "top1 0.5000 is below" in result.stderr
    assert "top5" in result.stdout and result.stdout.startswith("classification of 2 images, 2 classes")


@pytest.mark.parametrize(("name", "verb"), [("eval_dota", "dota"), ("eval_hrsc", "hrsc")])
def test_scripts_are_the_commands(folders, monkeypatch, capsys, name, verb):
    monkeypatch.setattr(sys, "argv", [name, str(folders / "nowhere"), str(folders / "labels")])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "data_tools" / f"{name}.py"), run_name="__main__")
    assert end.value.code == 1
    assert run(verb, folders / "nowhere", folders / "labels").stderr == capsys.readouterr().err


def test_help_is_light():
    """The help of the group imports neither numpy nor numba."""
    code = (
        "import sys\nfrom rtmdet_geo.cli import main\n"
        "try:\n    main(['evaluate', '--help'])\nexcept SystemExit as end:\n    assert not end.code\n"
        "print(sorted({'torch', 'numpy', 'numba', 'geopandas'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stderr.strip() == "[]" and "classification" in done.stdout
