"""The log of a run: what stands in its files, after a kill and a resume too, with and without TensorBoard."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from contextlib import closing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rtmdet_geo.errors import OutputError
from rtmdet_geo.training.run_log import RunLog, log_columns, read_table

HEADER = "iteration,lr,loss,loss_cls,loss_bbox,grad_norm,seconds,data_wait,images_per_second"


def values(iteration):
    return {
        "iteration": iteration,
        "loss": 1 / iteration,
        "loss_cls": 0.25 / iteration,
        "loss_bbox": 0.75 / iteration,
        "grad_norm": 3.0,
        "lr": 1e-3,
        "seconds": 0.5,
        "data_wait": 0.25,
        "images_per_second": 16.0,
    }


def figures(iteration):
    return {"AP50": iteration / 100, "AP50 red+green": float("nan")}


def write(log, first, last):
    for iteration in range(first, last + 1):
        log.step(iteration, values(iteration))
        if iteration % 5 == 0:
            log.validation(iteration, figures(iteration))


def texts(run):
    return {name: (run / name).read_bytes() for name in ("log.csv", "history.csv")}


def test_columns_stand_in_their_order_and_rows_are_there_at_once(tmp_path):
    with closing(RunLog(tmp_path, tensorboard=False)) as log:
        log.step(20, values(20))
        assert (tmp_path / "log.csv").read_text() == f"{HEADER}\n20,0.001,0.05,0.0125,0.0375,3,0.5,0.25,16\n"
        log.validation(20, figures(20))
        assert (tmp_path / "history.csv").read_text() == "iteration,AP50,AP50 red+green\n20,0.2,nan\n"
    assert not (tmp_path / "tensorboard").exists()


def test_what_is_missing_is_empty_and_what_is_more_comes_last(tmp_path):
    with closing(RunLog(tmp_path, tensorboard=False)) as log:
        log.step(1, {"loss": 2.0, "scale": 65536.0, "loss_mask": 1.0})
        log.step(2, {"loss": 2.0, "unforeseen": 1.0})  # the file keeps the columns it has
    assert (tmp_path / "log.csv").read_text().splitlines() == [
        "iteration,lr,loss,loss_mask,grad_norm,seconds,data_wait,images_per_second,scale",
        "1,,2,1,,,,,65536",
        "2,,2,,,,,,",
    ]
    assert log_columns({"loss": 0})[:3] == ["iteration", "lr", "loss"]


@settings(deadline=None, max_examples=40)
@given(
    stop=st.integers(1, 12),
    back=st.integers(0, 5),
    cut=st.integers(0, 60),
    junk=st.sampled_from([b"", b"13,0.001", b"\xff\xfe,", b"nonsense,1,2,3,4,5,6,7,8\n", b"\n", b'9,"open']),
)
def test_a_run_broken_anywhere_leaves_the_rows_of_an_unbroken_one(tmp_path_factory, stop, back, cut, junk):
    """Killed after ``stop`` iterations within a line, resumed from a checkpoint some iterations before."""
    whole, broken = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("broken")
    with closing(RunLog(whole, tensorboard=False)) as log:
        write(log, 1, 12)
    with closing(RunLog(broken, tensorboard=False)) as log:
        write(log, 1, stop)
    checkpoint = max(stop - back, 0)
    for path in broken.iterdir():  # of rows up to the checkpoint nothing is lost: they were written before it
        content = path.read_bytes()
        safe = sum(
            len(line)
            for number, line in enumerate(content.splitlines(keepends=True))
            if number == 0 or int(line.split(b",")[0]) <= checkpoint
        )
        path.write_bytes(content[: max(len(content) - cut, safe)] + junk)
    with closing(RunLog(broken, resume_at=checkpoint, tensorboard=False)) as log:
        write(log, checkpoint + 1, 12)
    assert texts(broken) == texts(whole)


def test_resuming_from_the_wrong_iteration_would_show(tmp_path):
    """A negative control of the test before: rows written twice are seen."""
    for run in ("whole", "broken"):
        (tmp_path / run).mkdir()
        with closing(RunLog(tmp_path / run, tensorboard=False)) as log:
            write(log, 1, 10)
    with closing(RunLog(tmp_path / "broken", resume_at=10, tensorboard=False)) as log:
        write(log, 8, 10)
    assert texts(tmp_path / "broken") != texts(tmp_path / "whole")


def test_a_log_of_an_earlier_version_keeps_its_columns(tmp_path):
    """Lines ended otherwise, and two columns were not known."""
    (tmp_path / "log.csv").write_bytes(b"iteration,lr,loss,grad_norm,seconds\r\n1,0.1,3,1,2\r\n2,0.1,2,1,2\r\n")
    with closing(RunLog(tmp_path, resume_at=1, tensorboard=False)) as log:
        log.step(2, values(2))
    rows = read_table(tmp_path / "log.csv")
    assert [row["iteration"] for row in rows] == ["1", "2"] and rows[1]["loss"] == "0.5"
    assert list(rows[0]) == ["iteration", "lr", "loss", "grad_norm", "seconds"]


def test_a_run_that_begins_anew_forgets_the_earlier_one(tmp_path):
    for _ in range(2):
        with closing(RunLog(tmp_path)) as log:
            write(log, 1, 5)
        assert len(read_table(tmp_path / "log.csv")) == 5 and len(read_table(tmp_path / "history.csv")) == 1
        assert len(list((tmp_path / "tensorboard").iterdir())) == 1


def test_a_killed_process_leaves_every_row_that_it_wrote(tmp_path):
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom rtmdet_geo.training.run_log import RunLog\n"
        "log = RunLog(Path(sys.argv[1]), tensorboard=False)\n"
        "for iteration in range(1, 100000):\n    log.step(iteration, {'loss': iteration})\n"
        "    if iteration == 50:\n        print('here', flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"here\n"
    process.kill()
    process.wait()
    process.stdout.close()
    rows = read_table(tmp_path / "log.csv")
    assert [int(row["iteration"]) for row in rows] == list(range(1, len(rows) + 1)) and len(rows) >= 50


def scalars(run):
    """What TensorBoard shows: by tag, (step, value)."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = accumulator.EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    return {tag: [(item.step, item.value) for item in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


def test_tensorboard_shows_what_the_tables_say_and_no_row_twice(tmp_path):
    with closing(RunLog(tmp_path)) as log:
        write(log, 1, 10)
    time.sleep(1.1)  # its files are named by the second
    with closing(RunLog(tmp_path, resume_at=7)) as log:
        write(log, 8, 12)
    shown = scalars(tmp_path)
    assert [step for step, _ in shown["train/loss"]] == list(range(1, 13))
    table = [float(row["loss_cls"]) for row in read_table(tmp_path / "log.csv")]
    assert [value for _, value in shown["train/loss_cls"]] == pytest.approx(table)
    assert shown["validation/AP50"] == [(5, pytest.approx(0.05)), (10, pytest.approx(0.1))]
    assert "train/iteration" not in shown


def test_without_tensorboard_one_line_says_what_to_install(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with caplog.at_level(logging.WARNING), closing(RunLog(tmp_path)) as log:
        write(log, 1, 5)
    assert len(caplog.records) == 1 and "pip install 'rtmdet-geo[train]'" in caplog.text
    assert len(read_table(tmp_path / "log.csv")) == 5 and not (tmp_path / "tensorboard").exists()


def test_a_file_that_cannot_be_written_is_one_clear_error(tmp_path):
    with closing(RunLog(tmp_path, tensorboard=False)) as log:
        (tmp_path / "history.csv").mkdir()
        with pytest.raises(OutputError, match=r"cannot write .*history\.csv.*; is the disk full\?"):
            log.validation(1, {"AP50": 0.1})
        (tmp_path / "log.csv").touch()  # an empty file has no columns yet
        log.step(1, {"loss": 1.0})
    assert read_table(tmp_path / "log.csv")[0]["loss"] == "1"
