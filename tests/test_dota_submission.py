"""The zip that DOTA's server takes: each fault is named, and a good one passes."""

from __future__ import annotations

import json
import re
import zipfile

import pytest
from test_cli import error_line, run

from rtmdet_geo.dota.submission import check_submission
from rtmdet_geo.errors import AnnotationError, DatasetNotFoundError

LINE = "P0003 0.5 10 10 30 10 30 20 10 20\n"
CLASSES = ("ship", "plane")


def pack(path, **files):
    """Write a zip of texts; names get Task1_ and .txt unless they have an ending."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name if "." in name or "/" in name else f"Task1_{name}.txt", text)
    return path


def found(path, classes=CLASSES, image_ids=None, **options):
    return [str(finding).removeprefix(f"{path}") for finding in check_submission(path, classes, image_ids, **options)]


def test_a_good_one_passes(tmp_path):
    path = pack(tmp_path / "a.zip", ship=LINE, plane=LINE.replace("\n", "\r\n"))
    assert found(path) == [] and found(path, image_ids=["P0003"]) == []
    path = pack(tmp_path / "b.zip", **{"Task2_ship.txt": "P0003 0.5 10 10 30 10\n", "Task2_plane.txt": "P1 1 1 1 2 2"})
    assert found(path, task=2) == []


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ({"ship": LINE}, ": Task1_plane.txt is missing"),
        ({"ship": LINE, "plane": "\n"}, ":Task1_plane.txt: it is empty: nothing was found of this class"),
        ({"ship": LINE, "plane": LINE, "task1/Task1_ship.txt": LINE}, ":task1/Task1_ship.txt: folders are not taken"),
        ({"ship": LINE, "plane": LINE, "task1/": ""}, ":task1/: folders are not taken"),
        (
            {"ship": LINE, "plane": LINE, "readme.txt": "x"},
            ":readme.txt: a file of this name is not taken; leave it out",
        ),
        ({"ship": LINE, "plane": LINE, "Task1_harbor.txt": LINE}, ":Task1_harbor.txt: a file of this name"),
        ({"ship": LINE, "plane": LINE, "Task1_Ship.txt": LINE}, ":Task1_Ship.txt: .* should it be 'Task1_ship.txt'"),
        ({"ship": LINE, "plane": LINE + "P1 0.5 1 2 3\n"}, ":Task1_plane.txt:2: 5 words parted by single spaces"),
        ({"ship": LINE, "plane": LINE.replace(" 10 ", "  10 ")}, ":Task1_plane.txt:1: 13 words parted"),
        ({"ship": LINE, "plane": LINE.replace("30", "x", 1)}, ":Task1_plane.txt:1: 'x' is no number; task 1 has"),
        ({"ship": LINE, "plane": LINE.replace("30", "nan", 1)}, ":Task1_plane.txt:1: a number is not finite"),
        ({"ship": LINE, "plane": LINE.replace("0.5", "50")}, r":Task1_plane.txt:1: score 50 is not in \[0, 1\]"),
        ({"ship": LINE, "plane": LINE * 2}, ":Task1_plane.txt:2: the same as line 1"),
        ({"ship": LINE, "plane": "P1__1__0___0" + LINE[5:]}, ":Task1_plane.txt:1: 'P1__1__0___0' is a patch"),
        ({"ship": LINE, "plane": b"\xff\xfe\x00"}, ":Task1_plane.txt: it is not text"),
    ],
)
def test_each_fault_is_named(tmp_path, files, text):
    (fault,) = found(pack(tmp_path / "a.zip", **files))
    assert re.match(text, fault), fault


def test_a_folder_inside_is_one_mistake(tmp_path):
    files = {f"task1/Task1_{name}.txt": LINE for name in CLASSES}
    (fault,) = found(pack(tmp_path / "a.zip", **{"task1/": ""}, **files))
    assert fault.startswith(":task1/: folders are not taken (3 entries): pack the files")
    faults = found(pack(tmp_path / "b.zip", **{"task1/Task1_ship.txt": LINE * 2}))
    assert [fault.split(":")[1] for fault in faults] == [
        "task1/Task1_ship.txt",
        "Task1_ship.txt",
        " Task1_plane.txt is missing",
    ]


def test_unknown_images_and_many_faults(tmp_path):
    path = pack(tmp_path / "a.zip", ship="".join(LINE.replace("10 10", f"1{n} 10") for n in range(9)), plane=LINE)
    faults = found(path, image_ids=["P0004"])
    assert faults[0] == ":Task1_ship.txt:1: image 'P0003' is not in the data set"
    assert faults[3] == ":Task1_ship.txt: and 6 more lines with faults" and len(faults) == 5
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr("Task1_ship.txt", LINE)
    assert ":Task1_ship.txt: it is there twice: leave one out" in found(path)


def test_files_that_are_no_zip(tmp_path):
    with pytest.raises(DatasetNotFoundError, match="is missing"):
        check_submission(tmp_path / "a.zip")
    path = pack(tmp_path / "a.zip", ship=LINE, plane=LINE)
    damaged = bytearray(path.read_bytes())
    damaged[50] ^= 255
    path.write_bytes(bytes(damaged))
    with pytest.raises(AnnotationError, match="no zip file that can be read"):
        check_submission(path, CLASSES)
    path.write_text(LINE)
    with pytest.raises(AnnotationError, match="no zip file that can be read"):
        check_submission(path, CLASSES)


def test_command(tmp_path):
    path = pack(tmp_path / "a.zip", ship=LINE, plane=LINE)
    words = ("data", "check-submission", path)
    good = run(*words, "--class", "ship", "--class", "plane")
    assert (good.exit_code, good.stdout) == (0, f"{path}: no fault found\n")
    bad = run(*words)
    assert bad.exit_code == 3 and "Task1_bridge.txt is missing" in bad.stdout and bad.stdout.endswith("13 faults\n")
    assert len(json.loads(run(*words, "--json").stdout)["findings"]) == 13
    assert "is missing" in error_line(run("data", "check-submission", tmp_path / "no.zip"))
