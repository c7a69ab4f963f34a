"""Runs that are stopped or killed go on where they were, and give what an unbroken run gives."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import geopandas
import numpy as np
import pytest
import rasterio
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import BlobBackend, draw_ships, small_model, write_scene

from rtmdet_geo import detect as pipeline
from rtmdet_geo import journal
from rtmdet_geo.annotations.outlines import as_outline
from rtmdet_geo.detect import detect_scene
from rtmdet_geo.errors import Cancelled, ConfigError, OutputError, RasterError
from rtmdet_geo.journal import TileRecord, journal_folder, open_journal, partial_output
from rtmdet_geo.stitch import Pieces, as_outlines, outlines_of
from rtmdet_geo.structures import Detections
from rtmdet_geo.tiles import TileGrid


def record(tile_id: int, number: int = 2, *, masks: bool = False) -> TileRecord:
    """Return the record of a tile with some detections."""
    rng = np.random.default_rng(tile_id)
    outlines = None
    if masks:
        ring = np.array([[0, 0], [4, 0], [4, 4]], float)
        shapes = [as_outline([[ring + n, ring[::-1] / 3], [ring * n]] if n else [[ring]]) for n in range(number)]
        outlines = as_outlines(shapes)
    kind = "mask" if masks else "rotated"
    found = Detections(rng.normal(size=(number, 5)), rng.random(number), np.arange(number), "scene", kind, outlines)
    counts = rng.integers(1, 9, number)
    return TileRecord(tile_id, False, 1, Pieces(found, counts, counts > 4, np.full(number, tile_id)))


def same(first: TileRecord, second: TileRecord) -> bool:
    """Say whether two records are equal to the bit."""
    if first[:3] != second[:3] or (first.pieces is None) != (second.pieces is None):
        return False
    if first.pieces is None or second.pieces is None:
        return True
    one, other = first.pieces, second.pieces
    arrays = [(one.detections.boxes, other.detections.boxes), (one.detections.scores, other.detections.scores)]
    arrays += [(one.detections.labels, other.detections.labels), *zip(one[1:], other[1:], strict=True)]
    is_same = all(a.tobytes() == b.tobytes() and a.dtype == b.dtype for a, b in arrays)
    shapes, others = outlines_of(one.detections), outlines_of(other.detections)
    if (shapes is None) != (others is None) or one.detections.kind != other.detections.kind:
        return False
    if shapes is None or others is None:
        return is_same
    texts = [
        repr([[[ring.tolist() for ring in part] for part in shape] for shape in array]) for array in (shapes, others)
    ]
    return is_same and texts[0] == texts[1]


def write(output: Path, records: list[TileRecord], facts: dict | None = None) -> Path:
    """Leave a journal as a killed process does, and return its records' file."""
    with pytest.raises(KeyboardInterrupt), open_journal(output, facts or {}, resume=False) as new:
        for item in records:
            new.add(item)
        raise KeyboardInterrupt
    return journal_folder(output) / "tiles.bin"


@pytest.mark.parametrize(
    "records",
    [
        [TileRecord(0, is_empty=True), record(3), TileRecord(1, num_saturated=1)],
        [record(5, 3, masks=True), record(6, 1, masks=True), record(7, 0, masks=True)],
        [record(1, 0)],
    ],
)
def test_what_is_written_is_read(tmp_path, records):
    write(tmp_path / "a.gpkg", records)
    grid = TileGrid(40, 40, 16, 4)
    assert (grid.num_rows, grid.num_cols) == (3, 3)
    expected = [sorted(item for item in records if item.tile_id // 3 == row) for row in range(3)]
    with open_journal(tmp_path / "a.gpkg", {}, resume=True) as again:
        assert again.records == [item._replace(pieces=None) for item in records]
        for _ in range(2):  # they can be read again
            for pieces, row in zip(again.rows(grid), expected, strict=True):
                found = [item for item in row if item.pieces is not None]
                assert all(same(item._replace(pieces=part), item) for part, item in zip(pieces, found, strict=True))
        again.add(record(8, 2))  # what is added after reading is appended
        assert len(list(again.rows(grid))[2][-1].counts) == 2
    assert list(tmp_path.iterdir()) == []


def test_a_record_that_changes_while_it_is_open_is_an_error(tmp_path):
    path = write(tmp_path / "a.gpkg", [record(0)])
    with (
        pytest.raises(OutputError, match="was damaged while it was open"),
        open_journal(tmp_path / "a.gpkg", {}, resume=True) as again,
    ):
        content = bytearray(path.read_bytes())
        content[len(content) - 20] ^= 1
        path.write_bytes(content)
        list(again.rows(TileGrid(16, 16, 16, 0)))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_journal_cut_anywhere_keeps_all_whole_records(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("cut")
    records = [record(number, number % 3) for number in range(5)]
    path = write(folder / "a.gpkg", records)
    size = path.stat().st_size
    lengths = []
    with path.open("rb") as stream:
        while head := stream.read(8):
            lengths.append(stream.seek(int.from_bytes(head[:4], "little"), os.SEEK_CUR))
    assert lengths[-1] == size
    end = data.draw(st.integers(0, size))
    os.truncate(path, end)
    with pytest.raises(KeyboardInterrupt), open_journal(folder / "a.gpkg", {}, resume=True) as again:
        whole = sum(length <= end for length in lengths)
        assert [item.tile_id for item in again.records] == list(range(whole))
        again.add(record(9))
        raise KeyboardInterrupt
    with open_journal(folder / "a.gpkg", {}, resume=True) as again:  # what is appended after a cut can be read
        assert [item.tile_id for item in again.records] == [*range(whole), 9]


def test_a_flipped_bit_ends_the_records(tmp_path):
    path = write(tmp_path / "a.gpkg", [record(0), record(1)])
    content = bytearray(path.read_bytes())
    content[len(content) - 20] ^= 1
    path.write_bytes(content)
    with open_journal(tmp_path / "a.gpkg", {}, resume=True) as again:
        assert [item.tile_id for item in again.records] == [0]


def test_another_run_is_not_gone_on_with(tmp_path):
    write(tmp_path / "a.gpkg", [record(0)], {"tile_size": 1024})
    with (
        pytest.raises(ConfigError, match=r"had tile_size=1024, this one has 512"),
        open_journal(tmp_path / "a.gpkg", {"tile_size": 512}, resume=True),
    ):
        pass
    assert journal_folder(tmp_path / "a.gpkg").exists()


def test_two_processes_do_not_write_one_journal(tmp_path):
    with (
        open_journal(tmp_path / "a.gpkg", {}, resume=False),
        pytest.raises(OutputError, match="another process"),
        open_journal(tmp_path / "a.gpkg", {}, resume=True),
    ):
        pass


@pytest.mark.parametrize(
    "name,partial",
    [
        ("a.gpkg", "a.partial.gpkg"),
        ("a.b.shp.zip", "a.b.partial.shp.zip"),
        ("A.SHP", "A.partial.SHP"),
        ("a", "a.partial"),
    ],
)
def test_names_of_partial_outputs(name, partial):
    assert partial_output(Path("x") / name) == Path("x") / partial


# ---------------------------------------------------------------- the pipeline


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> BlobBackend:
    """Put the blob engine in the place of every model."""
    backend = BlobBackend()
    monkeypatch.setattr(pipeline, "open_backend", lambda path, **options: backend)
    monkeypatch.setattr(pipeline, "find_model", lambda model: Path(__file__))
    return backend


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    return write_scene(tmp_path / "port.tif", draw_ships(500, 400))


def stop_after(number: int):
    """Return a ``progress`` and a ``cancelled`` that stop a run after some tiles."""
    done = [0]

    def progress(tiles: int, total: int) -> None:
        done[0] = tiles

    return {"progress": progress, "cancelled": lambda: done[0] >= number}


@pytest.mark.parametrize("number", [1, 4])
def test_a_stopped_run_goes_on(engine, scene, tmp_path, number):
    whole = detect_scene(scene, tmp_path / "whole.gpkg")
    num_images = engine.num_images
    output = tmp_path / "ships.gpkg"
    with pytest.raises(Cancelled, match="--resume goes on") as wish:
        detect_scene(scene, output, **stop_after(number))
    assert wish.value.partial == str(tmp_path / "ships.partial.gpkg") and not output.exists()
    assert len(geopandas.read_file(wish.value.partial, layer="detections")) <= len(whole)
    with pytest.raises(OutputError, match="unfinished run"):
        detect_scene(scene, output)
    calls = []
    resumed = detect_scene(scene, output, resume=True, batch_size=2, progress=lambda *call: calls.append(call))
    assert calls[0][0] >= number and calls[-1] == (6, 6)
    assert engine.num_images < 3 * num_images
    assert resumed.drop(columns="run_id").equals(whole.drop(columns="run_id"))
    assert sorted(item.name for item in tmp_path.iterdir()) == ["port.tif", "ships.gpkg", "whole.gpkg"]


def test_resume_refuses_other_settings_and_overwrite_begins_anew(engine, scene, tmp_path):
    output = tmp_path / "ships.gpkg"
    with pytest.raises(Cancelled):
        detect_scene(scene, output, **stop_after(2))
    with pytest.raises(ConfigError, match="overlap"):
        detect_scene(scene, output, resume=True, overlap=32)
    calls = []
    detect_scene(scene, output, overwrite=True, overlap=32, progress=lambda *call: calls.append(call))
    assert calls[0][0] == 0 and output.exists() and not journal_folder(output).exists()


def test_a_scene_that_is_replaced_while_it_is_read(engine, scene, tmp_path):
    def replace(done: int, total: int) -> None:
        if done == 3:
            os.utime(scene, (1, 1))

    with pytest.raises(RasterError, match="changed while it was read"):
        detect_scene(scene, tmp_path / "ships.gpkg", progress=replace)
    assert not (tmp_path / "ships.gpkg").exists()
    with pytest.raises(ConfigError, match="scene_file"):
        detect_scene(scene, tmp_path / "ships.gpkg", resume=True)


def test_what_could_not_be_written_is_not_lost(engine, scene, tmp_path, monkeypatch):
    def full(*words: object, **options: object) -> None:
        raise OutputError("no space left")

    with monkeypatch.context() as patch, pytest.raises(OutputError, match="no space") as refusal:
        patch.setattr(pipeline, "write_feature_chunks", full)
        detect_scene(scene, tmp_path / "ships.gpkg")
    assert refusal.value.__notes__ == ["6 tiles are done, --resume goes on from them"]
    num_images = engine.num_images
    assert len(detect_scene(scene, tmp_path / "ships.gpkg", resume=True)) == 5
    assert engine.num_images == num_images


# ---------------------------------------------------------------- real processes

PROGRAM = [sys.executable, "-m", "rtmdet_geo.cli"]


@pytest.fixture(scope="module")
def busy_scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise, of which the small model makes many detections."""
    pixels = np.random.default_rng(1).integers(0, 255, (3, 1500, 1500), dtype=np.uint8)
    path = tmp_path_factory.mktemp("busy") / "busy.tif"
    profile = {"driver": "GTiff", "width": 1500, "height": 1500, "count": 3, "dtype": "uint8", "tiled": True}
    profile |= {"crs": "EPSG:32630", "transform": rasterio.Affine(10, 0, 5e5, 0, -10, 4.5e6)}
    with rasterio.open(path, "w", photometric="RGB", **profile) as dataset:
        dataset.write(pixels)
    return path


def detect_words(scene: Path, output: Path, model: Path) -> list[str]:
    words = [*PROGRAM, "detect", scene, "-o", output, "-m", model, "--tile-size", 128, "--overlap", 32, "--score", 0.05]
    return [str(word) for word in [*words, "--threads", 1, "--progress", "jsonl"]]


def kill_and_resume(scene: Path, folder: Path, rng: np.random.Generator, model: Path) -> int:
    """Kill a run at random moments until it is through; return how often it was killed with a tile done."""
    output, num_kills = folder / "ships.gpkg", 0
    while not output.exists():
        command = [*detect_words(scene, output, model), "--resume"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            lines, wanted = 0, int(rng.integers(2, 140))
            for line in process.stdout:
                event = json.loads(line)
                assert event["event"] != "error", event
                lines += event["event"] == "progress"
                if lines >= wanted:
                    time.sleep(float(rng.random()) * 0.01)
                    process.kill()
                    num_kills += 1
                    break
            process.stdout.read()
    return num_kills


def check_kills(scene: Path, folder: Path, seed: int, at_least: int) -> None:
    model = small_model()
    whole = folder / "whole.gpkg"
    subprocess.run(detect_words(scene, whole, model), check=True, capture_output=True)
    expected = geopandas.read_file(whole, layer="detections").drop(columns="run_id")
    assert len(expected) > 20
    rng, num_kills, number = np.random.default_rng(seed), 0, 0
    while num_kills < at_least:
        part = folder / f"run{number}"
        part.mkdir()
        num_kills += kill_and_resume(scene, part, rng, model)
        found = geopandas.read_file(part / "ships.gpkg", layer="detections").drop(columns="run_id")
        assert found.equals(expected)
        assert [item.name for item in part.iterdir()] == ["ships.gpkg"]
        number += 1


@pytest.mark.slow
def test_kill_and_resume_gives_the_same_features(busy_scene, tmp_path):
    check_kills(busy_scene, tmp_path, seed=0, at_least=5)


@pytest.mark.soak
def test_fifty_kills(busy_scene, tmp_path):
    check_kills(busy_scene, tmp_path, seed=1, at_least=50)


@pytest.mark.parametrize("how", ["stdin", "signal"])
def test_cancel_keeps_what_was_found(busy_scene, tmp_path, how):
    command = [*detect_words(busy_scene, tmp_path / "ships.gpkg", small_model()), "--stdin-cancel"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:
        timer = threading.Timer(120, process.kill)
        timer.start()
        for line in process.stdout:
            if json.loads(line).get("done", 0) >= 30:
                break
        if how == "stdin":
            process.stdin.write("cancel\n")
            process.stdin.flush()
        else:
            process.send_signal(signal.SIGTERM)
        stdout, stderr = process.communicate()
        timer.cancel()
    assert process.returncode == 130, stderr
    event = json.loads(stdout.splitlines()[-1])
    assert event["event"] == "error" and event["partial"] == str(tmp_path / "ships.partial.gpkg")
    assert len(geopandas.read_file(event["partial"], layer="detections")) > 0
    assert sorted(item.name for item in tmp_path.iterdir()) == ["ships.gpkg.partial", "ships.partial.gpkg"]


def test_version_of_the_layout_is_in_the_facts(tmp_path, monkeypatch):
    write(tmp_path / "a.gpkg", [record(0)])
    monkeypatch.setattr(journal, "JOURNAL_VERSION", 2)
    with pytest.raises(ConfigError, match="journal_version"), open_journal(tmp_path / "a.gpkg", {}, resume=True):
        pass
