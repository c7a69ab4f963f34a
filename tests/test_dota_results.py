"""Result files of DOTA: what is written is read back, and what is wrong is named."""

from __future__ import annotations

import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rtmdet_geo.annotations.dota_results import ResultRows, read_result_file, read_results, write_results
from rtmdet_geo.errors import AnnotationError, DatasetNotFoundError, OutputError

QUAD = "1 2 5 2 5 4 1 4"
LINE = f"P0003 0.5 {QUAD}\n"
number = st.floats(-1e6, 1e6)
row = st.tuples(st.sampled_from(["P0001", "P0002", "a.b-c"]), number, st.lists(number, min_size=8, max_size=8))


def rows_of(entries, task=1):
    corners = np.array([entry[2] for entry in entries]).reshape(-1, 8)
    if task == 2:
        corners = np.column_stack([corners[:, :2], corners[:, :2] + np.abs(corners[:, 2:4])])
    given_corners = {"polygons": corners} if task == 1 else {"hboxes": corners}
    return ResultRows(
        tuple(entry[0] for entry in entries), np.array([entry[1] for entry in entries], float), **given_corners
    )


def write(folder, text, name="Task1_ship.txt", **encoding):
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(text.encode(**encoding))
    return folder


@settings(deadline=None, max_examples=60)
@given(st.lists(row, max_size=5, unique_by=str), st.sampled_from([1, 2]))
def test_what_is_written_is_read_back(tmp_path_factory, entries, task):
    folder = tmp_path_factory.mktemp("out") / "results"
    rows = rows_of(entries, task)
    write_results(folder, {"ship": rows}, task, ["plane", "ship"])
    assert sorted(path.name for path in folder.parent.iterdir()) == ["results"]
    read = read_results(folder, task, ["ship", "plane"])
    assert list(read) == ["ship", "plane"] and len(read["plane"]) == 0
    assert read["ship"].image_ids == rows.image_ids
    np.testing.assert_array_equal(read["ship"].scores, rows.scores)
    shape, mine, other = (8, "polygons", "hboxes") if task == 1 else (4, "hboxes", "polygons")
    np.testing.assert_array_equal(getattr(read["ship"], mine), getattr(rows, mine))
    assert getattr(read["plane"], mine).shape == (0, shape) and getattr(read["plane"], other) is None


def test_windows_lines_blank_lines_and_byte_order_marks(tmp_path):
    text = f"\r\n{LINE.strip()}\r\n\r\nP0004 1e-3 {QUAD}\r\n"
    rows = read_result_file(write(tmp_path / "r", text, encoding="utf-8-sig") / "Task1_ship.txt", 1)
    assert rows.image_ids == ("P0003", "P0004") and rows.scores.tolist() == [0.5, 1e-3]
    assert rows.place(1) == f"{tmp_path / 'r' / 'Task1_ship.txt'}:4"
    assert rows.polygons.tolist() == [[1, 2, 5, 2, 5, 4, 1, 4]] * 2


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (f"{LINE}P0003 nan {QUAD}\n", "Task1_ship.txt:2: score or coordinates are not finite"),
        (f"{LINE}P0003 0.5 1 2 5 2 5 4 1 inf\n", "Task1_ship.txt:2: .*not finite"),
        (f"{LINE}\nP0003 0.5 1 2 5 2\n", "Task1_ship.txt:3: 6 words, but task 1 has image score x1"),
        (f"{LINE}P0003 0.5 {QUAD} 0\n", "Task1_ship.txt:2: 11 words"),
        (f"P0003 high {QUAD}\n", "Task1_ship.txt:1: 'high' is no number; a line is image score"),
        (f"{LINE}P0004 0.5 {QUAD}\n{LINE}", "Task1_ship.txt:3: the same as line 1"),
    ],
)
def test_bad_lines_are_named(tmp_path, text, part):
    with pytest.raises(AnnotationError, match=part):
        read_results(write(tmp_path / "r", text), 1)


def test_bad_bytes_and_turned_boxes_are_named(tmp_path):
    folder = write(tmp_path / "r", "P0003 0.5 5 2 1 4\n", "Task2_ship.txt")
    with pytest.raises(AnnotationError, match=r"Task2_ship.txt:1: x2 < x1"):
        read_results(folder, 2)
    (folder / "Task1_ship.txt").write_bytes(b"\xff\xfe\x00P")
    with pytest.raises(AnnotationError, match=r"^result file .*Task1_ship.txt' is not text"):
        read_results(folder, 1)


def test_missing_folders_files_and_unknown_classes_are_named(tmp_path):
    with pytest.raises(DatasetNotFoundError, match=r"nowhere.* is missing"):
        read_results(tmp_path / "nowhere", 1)
    folder = write(tmp_path / "r", LINE)
    with pytest.raises(DatasetNotFoundError, match="is it task 2"):
        read_results(folder, 2)
    with pytest.raises(DatasetNotFoundError, match=r"no Task1_plane.txt \(1 of 2 classes"):
        read_results(folder, 1, ["plane", "ship"])
    with pytest.raises(AnnotationError, match=r"Task1_ship.txt: class 'ship' is not among plane"):
        read_results(folder, 1, ["plane"])
    write(folder, "not a result file", "notes.txt")
    assert list(read_results(folder, 1)) == ["ship"]


def test_a_folder_is_whole_or_not_there(tmp_path):
    rows = rows_of([("P0003", 0.5, [1.0] * 8)])
    folder = tmp_path / "results"
    broken = rows_of([("P0003", float("nan"), [1.0] * 8)])
    for wrong, part in (
        ({"tank": rows}, "'tank' is not among ship"),
        ({"ship": broken}, "detection 0 of 'ship' is not finite"),
        ({"ship": ResultRows(("P0003",), np.ones(1), hboxes=np.ones((1, 4)))}, "no corners of task 1"),
    ):
        with pytest.raises(AnnotationError, match=part):
            write_results(folder, wrong, 1, ["ship"])
        assert list(tmp_path.iterdir()) == []
    write_results(folder, {}, 1, ["ship"])
    with pytest.raises(OutputError, match="exists; add --overwrite"):
        write_results(folder, {"ship": rows}, 1, ["ship"])
    assert (folder / "Task1_ship.txt").read_text() == ""
    write_results(folder, {"ship": rows}, 1, ["ship"], overwrite=True)
    assert (folder / "Task1_ship.txt").read_text() == f"P0003 0.5{' 1.0' * 8}\n"
    with pytest.raises(OutputError, match="is no folder"):
        write_results(folder / "Task1_ship.txt", {}, 1, ["ship"], overwrite=True)
    with pytest.raises(OutputError, match="cannot write to"):
        write_results(folder / "Task1_ship.txt" / "r", {}, 1, ["ship"])
    with pytest.raises(OutputError, match=r"cannot write .*results"):
        write_results(folder, {}, 1, ["no/folder"], overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["results"] and len(list(folder.iterdir())) == 1


def packed(path, **texts):
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in texts.items():
            archive.writestr(name.replace("__", "/"), text)
    return path


@pytest.mark.parametrize("inside", ["", "results__"])
def test_a_zip_is_read_as_its_folder(tmp_path, inside):
    names = {f"{inside}Task1_ship.txt": LINE, f"{inside}Task1_plane.txt": ""}
    found = read_results(packed(tmp_path / "a.zip", **names, **{"readme.md": "no results"}), 1, ["ship", "plane"])
    (tmp_path / "r").mkdir()
    for name, text in (("ship", LINE), ("plane", "")):
        write(tmp_path / "r", text, f"Task1_{name}.txt")
    for name, rows in read_results(tmp_path / "r", 1).items():
        assert found[name].image_ids == rows.image_ids and np.array_equal(found[name].polygons, rows.polygons)
    bad = packed(tmp_path / "b.zip", **{f"{inside}Task1_ship.txt": f"{LINE}P0003 nan {QUAD}\n"})
    with pytest.raises(AnnotationError, match=r"b.zip/.*Task1_ship.txt:2: score or coordinates are not finite"):
        read_results(bad, 1)


def test_what_is_no_zip_of_results_is_named(tmp_path):
    (tmp_path / "a.zip").write_text("no zip")
    with pytest.raises(AnnotationError, match=r"a.zip' are neither a folder nor a zip"):
        read_results(tmp_path / "a.zip", 1)
    with pytest.raises(DatasetNotFoundError, match="is it task 2"):
        read_results(packed(tmp_path / "b.zip", **{"Task1_ship.txt": LINE}), 2)
    double = packed(tmp_path / "c.zip", **{"a__Task1_ship.txt": LINE, "b__Task1_ship.txt": LINE})
    with pytest.raises(AnnotationError, match=r"c.zip: Task1_ship.txt is there twice"):
        read_results(double, 1)
    whole = packed(tmp_path / "d.zip", **{"Task1_ship.txt": LINE * 1}).read_bytes()
    (tmp_path / "d.zip").write_bytes(whole.replace(LINE.encode(), LINE.replace("5", "6").encode()))
    with pytest.raises(AnnotationError, match=r"d.zip/Task1_ship.txt cannot be read: Bad CRC"):
        read_results(tmp_path / "d.zip", 1)
