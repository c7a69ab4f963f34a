"""The rtmdet-geo command: exit codes, who owns stdout, one line per error, help texts."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import click
import geopandas
import numpy as np
import pytest
import rasterio
from click.testing import CliRunner, Result
from synthetic import GROUND, BlobBackend, draw_ships, make_spec, small_model, write_scene

from rtmdet_geo import catalog
from rtmdet_geo import detect as pipeline
from rtmdet_geo.cli import cli, group, options, report
from rtmdet_geo.errors import Cancelled, ExportMismatchError, RTMDetGeoError
from rtmdet_geo.export import check as export_check

HELP_FOLDER = Path(__file__).parent / "golden" / "help"
COMMANDS = [
    *("", "detect", "classify", "train"),
    *("evaluate", "evaluate dota", "evaluate hrsc", "evaluate coco", "evaluate classification", "evaluate layers"),
    *(
        "evaluate model",
        "export",
        "data",
        "data convert",
        "data stats",
        "data show",
        "data split",
        "data merge",
        "data submission",
    ),
    *("data check-submission", "data check", "data chips"),
    *("models", "models download", "models list", "models show", "engines", "info"),
]
PROGRAM = [sys.executable, "-m", "rtmdet_geo.cli"]


def run(*words: object) -> Result:
    """Run the real group in this process."""
    return CliRunner().invoke(cli, [str(word) for word in words], prog_name="rtmdet-geo", terminal_width=100)


def error_line(result: Result, code: int = 1) -> str:
    """Check that a command failed with one line on stderr and nothing on stdout; return the line."""
    assert result.exit_code == code, (result.output, result.exception)
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("rtmdet-geo: error: ")
    return line


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> BlobBackend:
    """An engine that finds bright blobs, behind any model that exists."""
    backend = BlobBackend(make_spec(classes=("ship", "buoy")))
    monkeypatch.setattr(pipeline, "open_backend", lambda path, **settings: backend)
    monkeypatch.setattr(pipeline, "find_model", lambda model: Path(__file__))
    monkeypatch.setattr(catalog, "find_model", lambda model: Path(__file__))
    monkeypatch.setattr(catalog, "read_spec", lambda path: backend.spec)
    return backend


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    return write_scene(tmp_path / "port.tif", draw_ships(500, 400))


# ---------------------------------------------------------------- help and structure


@pytest.mark.parametrize("command", COMMANDS)
def test_help_snapshot(command):
    """Accept changes with RTMDET_ACCEPT_GOLDEN=1."""
    result = run(*command.split(), "--help")
    path = HELP_FOLDER / f"{command.replace(' ', '_') or 'rtmdet-geo'}.txt"
    if os.environ.get("RTMDET_ACCEPT_GOLDEN") == "1":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(result.stdout, encoding="utf-8")
    assert result.exit_code == 0
    assert result.stdout == path.read_text(encoding="utf-8")


def every_command(command: click.Command, name: str = "") -> Iterator[tuple[str, click.Command]]:
    yield name, command
    if isinstance(command, click.Group):
        ctx = click.Context(command)
        for part in command.list_commands(ctx):
            child = command.get_command(ctx, part)
            assert child is not None
            yield from every_command(child, f"{name} {part}".strip())


def test_snapshots_cover_every_command():
    assert [name for name, _ in every_command(cli)] == COMMANDS
    assert sorted(path.stem for path in HELP_FOLDER.glob("*.txt")) == sorted(
        name.replace(" ", "_") or "rtmdet-geo" for name in COMMANDS
    )


@pytest.mark.parametrize("name,command", list(every_command(cli)), ids=lambda value: str(value) or "top")
def test_every_command_has_an_example_and_every_option_a_text(name, command):
    assert "Example:\n      rtmdet-geo" in (command.help or "")
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help and parameter.help.endswith((".", "]"))
    if name and not isinstance(command, click.Group):
        assert {"-v", "-q"} <= {flag for parameter in command.params for flag in parameter.opts}


def test_group_without_command_shows_help_and_unknown_command_is_usage():
    assert "Commands:" in run().output
    result = run("detcet")
    assert result.exit_code == 2 and "detcet" in result.stderr


def test_version():
    assert run("--version").stdout.startswith("rtmdet-geo, version 0.")


def test_help_is_light():
    code = (
        "import sys\nfrom rtmdet_geo.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as end:\n    assert not end.code\n"
        "heavy = {'torch', 'rasterio', 'numpy', 'numba', 'geopandas', 'pydantic', 'onnxruntime', 'cv2', 'rich'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stderr.strip() == "[]" and "detect" in done.stdout


# ---------------------------------------------------------------- detect


def test_detect_writes_the_layer_and_one_line(engine, scene, tmp_path):
    output = tmp_path / "ships.gpkg"
    result = run("detect", scene, "-o", output)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith(f"{scene}: 5 detections (5 ship) in 6 tiles") and result.stdout.count("\n") == 1
    assert len(geopandas.read_file(output)) == 5


def test_detect_json_is_all_of_stdout(engine, scene, tmp_path):
    result = run("detect", scene, "-o", tmp_path / "ships.gpkg", "--json", "--score", 0.5, "--tile-size", 128)
    summary = json.loads(result.stdout)
    assert summary["num_detections"] == 5 and summary["output"].endswith("ships.gpkg")
    assert summary["parameters"]["score_threshold"] == 0.5 and summary["parameters"]["tile_size"] == 128


def test_detect_to_stdout_is_a_sequence_of_features(engine, scene):
    result = run("detect", scene, "-o", "-")
    features = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(features) == 5 and {feature["type"] for feature in features} == {"Feature"}
    in_file = run("detect", scene, "-o", (path := scene.with_name("same.geojson"))) and json.loads(path.read_text())
    for feature in (*features, *in_file["features"]):
        feature["properties"]["run_id"] = None
    assert features == in_file["features"]
    lon, lat = features[0]["geometry"]["coordinates"][0][0]
    assert -3.1 < lon < -2.9 and 40.6 < lat < 40.7
    assert features[0]["properties"]["class_name"] == "ship"


def test_progress_jsonl(engine, scene, tmp_path):
    result = run("detect", scene, "-o", tmp_path / "ships.gpkg", "--progress", "jsonl")
    events = [json.loads(line) for line in result.stdout.splitlines()]
    assert events[0]["event"] == "start" and events[0]["classes"] == ["ship", "buoy"]
    assert events[-1]["event"] == "done" and events[-1]["num_detections"] == 5
    steps = [(event["done"], event["total"]) for event in events if event["event"] == "progress"]
    assert steps == [(number, 6) for number in range(7)]
    assert len(events) == len(steps) + 2


def test_progress_jsonl_reports_errors(engine, tmp_path):
    result = run("detect", tmp_path / "nosuch.tif", "-o", tmp_path / "a.gpkg", "--progress", "jsonl")
    last = json.loads(result.stdout.splitlines()[-1])
    assert (last["event"], last["code"]) == ("error", 1) and "nosuch.tif" in last["message"]
    assert result.exit_code == 1 and result.stderr.startswith("rtmdet-geo: error: ")


def test_progress_jsonl_reports_errors_before_the_start(tmp_path):
    result = run("detect", "scene.tif", "-m", "nosuch.onnx", "-o", tmp_path / "a.gpkg", "--progress", "jsonl")
    (event,) = map(json.loads, result.stdout.splitlines())
    assert (event["event"], event["code"]) == ("error", 1) and "nosuch.onnx" in event["message"]


def test_progress_bar_goes_to_stderr(engine, scene, tmp_path):
    result = run("detect", scene, "--json", "--progress", "bar")
    assert json.loads(result.stdout)["num_detections"] == 5


@pytest.mark.parametrize(
    "words",
    [
        ["--json", "--progress", "jsonl"],
        ["--json", "-o", "-"],
        ["--progress", "jsonl", "-o", "-"],
        [],
        ["-o", "a.gpkg", "--score", "1.5"],
        ["-o", "a.gpkg", "--gsd", "0"],
        ["-o", "a.gpkg", "--tile-size", "x"],
        ["-o", "a.gpkg", "--backend", "tensorflow"],
        ["-o", "a.gpkg", "--nosuch"],
    ],
)
def test_usage_errors(engine, scene, words):
    result = run("detect", scene, *words)
    assert result.exit_code == 2 and result.stdout == "" and "Usage: rtmdet-geo detect" in result.stderr


def test_bands_by_number_and_name(engine, scene):
    for words in (["-b", 3, "-b", 2, "-b", 1], ["-b", "blue", "--bidx", "green", "-b", "1"]):
        summary = json.loads(run("detect", scene, "--json", *words).stdout)
        assert summary["parameters"]["bands"] == [3, 2, 1]
    assert options.parse_bands(()) is None


@pytest.mark.parametrize(
    "words,expected",
    [
        (["-b", 1, "-b", 2, "-b", 9], "has no band 9"),
        (["-b", "1", "-b", 2, "-b", "swir"], "'swir'"),
        (["--class", "plane"], "no class 'plane'; it knows ship, buoy"),
        (["--dst-crs", "EPSG:nothing"], "EPSG:nothing"),
        (["--tile-size", 100], "multiple of 32"),
        (["-f", "Shapefile"], "Shapefile"),
    ],
)
def test_bad_input_is_one_line(engine, scene, tmp_path, words, expected):
    line = error_line(run("detect", scene, "-o", tmp_path / "ships.gpkg", *words))
    assert expected in line
    assert not (tmp_path / "ships.gpkg").exists()


def test_missing_scene_not_a_raster_and_broken_output(engine, scene, tmp_path):
    (tmp_path / "note.txt").write_text("hello")
    assert "does not exist" in error_line(run("detect", tmp_path / "no.tif", "-o", tmp_path / "a.gpkg"))
    assert "note.txt" in error_line(run("detect", tmp_path / "note.txt", "-o", tmp_path / "a.gpkg"))
    assert "nowhere" in error_line(run("detect", scene, "-o", tmp_path / "nowhere" / "a.gpkg"))
    assert "is a folder" in error_line(run("detect", scene, "-o", _folder(tmp_path / "b.gpkg")))
    (tmp_path / "old.gpkg").write_text("old")
    assert "--overwrite" in error_line(run("detect", scene, "-o", tmp_path / "old.gpkg"))
    assert (tmp_path / "old.gpkg").read_text() == "old"


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def test_model_errors(scene, tmp_path):
    (tmp_path / "broken.onnx").write_bytes(b"junk")
    assert "did you mean 'sen2ships_r'" in error_line(run("detect", scene, "--json", "-m", "sen2ships"))
    assert "not there" in error_line(run("detect", scene, "--json", "-m", tmp_path / "no.onnx"))
    assert "broken.onnx" in error_line(run("detect", scene, "--json", "-m", tmp_path / "broken.onnx"))


def test_truncated_scene_leaves_its_journal(engine, tmp_path):
    noise = np.random.default_rng(0).integers(0, 100, (600, 600), dtype=np.uint8)
    path = write_scene(tmp_path / "cut.tif", noise, compress="deflate")
    os.truncate(path, path.stat().st_size * 6 // 10)
    line = error_line(run("detect", path, "-o", tmp_path / "a.gpkg"))
    assert "cut.tif" in line and "tiles are done, --resume goes on from them" in line
    assert sorted(item.name for item in tmp_path.iterdir()) == ["a.gpkg.partial", "cut.tif"]


def test_empty_scene_is_done_with_one_warning_line(engine, tmp_path):
    path = write_scene(tmp_path / "void.tif", np.zeros((300, 300), np.uint8), nodata=0)
    result = run("detect", path, "-o", tmp_path / "void.gpkg")
    assert result.exit_code == 0
    (line,) = result.stderr.splitlines()
    assert line.startswith("rtmdet-geo: warning: ") and "no valid pixel" in line
    assert len(geopandas.read_file(tmp_path / "void.gpkg")) == 0
    assert run("detect", path, "-o", tmp_path / "void.gpkg", "--overwrite", "-q").output == ""


@pytest.mark.parametrize("size", [(1, 1), (20, 30)])
def test_tiny_scenes(engine, tmp_path, size):
    path = write_scene(tmp_path / "tiny.tif", np.full(size, GROUND, np.uint8))
    assert run("detect", path, "-o", tmp_path / "tiny.gpkg").exit_code == 0


def test_verbosity(engine, scene, tmp_path):
    quiet = run("detect", scene, "-o", tmp_path / "a.gpkg", "-q")
    assert quiet.output == ""
    assert "INFO rtmdet_geo" in run("detect", scene, "-o", tmp_path / "b.gpkg", "-v").stderr
    failed = run("detect", tmp_path / "no.tif", "--json", "-vv")
    assert "Traceback" in failed.stderr and failed.stderr.splitlines()[-1].startswith("rtmdet-geo: error: ")


# ---------------------------------------------------------------- failures of every kind


class Boom(RTMDetGeoError):
    """A library error."""


@pytest.mark.parametrize(
    "error,code,words",
    [
        (Boom("two\nlines"), 1, "error: two lines"),
        (ExportMismatchError("differs"), 3, "error: differs"),
        (Cancelled("stopped"), 130, "cancelled; stopped"),
        (KeyboardInterrupt(), 130, "cancelled; nothing was written"),
        (MemoryError(), 1, "out of memory; use a smaller --batch-size"),
        (OSError(28, "No space left on device", "/data/x"), 1, "no space left on the disk while writing '/data/x'"),
        (PermissionError(13, "Permission denied", "/x"), 1, "Permission denied: '/x'"),
        (ZeroDivisionError("oops"), 1, "unexpected ZeroDivisionError: oops; run again with -vv"),
    ],
)
def test_every_failure_is_one_line(engine, scene, monkeypatch, error, code, words):
    def fail(*positional, **named):
        raise error

    monkeypatch.setattr(pipeline, "detect_scene", fail)
    result = run("detect", scene, "--json")
    assert result.exit_code == code
    assert len(result.stderr.splitlines()) == 1 and words in result.stderr and result.stdout == ""


def test_warnings_of_others_stay_out(engine, scene, monkeypatch, recwarn):
    import warnings

    def noisy(*positional, **named):
        warnings.warn("ignore me", FutureWarning, stacklevel=1)
        return real(*positional, **named)

    real = pipeline.detect_scene
    monkeypatch.setattr(pipeline, "detect_scene", noisy)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert run("detect", scene, "--json").stderr == ""
        assert "FutureWarning: ignore me" in run("detect", scene, "--json", "-vv").stderr


def test_json_of_awkward_values(capsys):
    report.echo_json(
        {"a": float("nan"), "b": np.float32(1.5), "c": (Path("x"), np.int64(3)), "d": np.arange(2), 1: None}
    )
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": 1.5, "c": ["x", 3], "d": [0, 1], "1": None}


def test_describe_keeps_errors_of_ours():
    assert group.describe(Boom("what, where")) == ("what, where", 1)


def test_polled_signals_only_set_the_flag():
    report.cancel_requested.clear()
    with report.signals_are_polled():
        report.take_signal()
        assert report.cancel_requested.is_set()
        report.take_signal(signal.SIGTERM)  # from the scheduler, and once more from torchrun
        with pytest.raises(KeyboardInterrupt):
            report.take_signal()
    report.cancel_requested.clear()
    with pytest.raises(KeyboardInterrupt):
        report.take_signal()
    report.cancel_requested.clear()


# ---------------------------------------------------------------- real processes


@pytest.fixture(scope="module")
def large_scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sparse scene that takes minutes."""
    path = tmp_path_factory.mktemp("large") / "large.tif"
    profile = {"driver": "GTiff", "width": 30_000, "height": 30_000, "count": 3, "dtype": "uint8", "tiled": True}
    profile |= {"crs": "EPSG:32630", "transform": rasterio.Affine(10, 0, 5e5, 0, -10, 4.5e6), "sparse_ok": True}
    with rasterio.open(path, "w", photometric="RGB", **profile) as dataset:
        dataset.write(np.full((3, 256, 256), 90, np.uint8), window=rasterio.windows.Window(0, 0, 256, 256))
    return path


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_in_the_middle(large_scene, tmp_path, number):
    command = [*PROGRAM, "detect", large_scene, "-o", tmp_path / "a.gpkg", "-m", small_model(), "--progress", "jsonl"]
    with subprocess.Popen(
        [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        timer = threading.Timer(120, process.kill)
        timer.start()
        assert process.stdout is not None
        for line in process.stdout:
            if json.loads(line).get("done", 0) >= 2:
                break
        asked = time.monotonic()
        process.send_signal(number)
        stdout, stderr = process.communicate()
        timer.cancel()
    assert process.returncode == 130, stderr
    assert time.monotonic() - asked < 30
    assert stderr.startswith("rtmdet-geo: cancelled") and len(stderr.splitlines()) == 1
    event = json.loads(stdout.splitlines()[-1])
    assert event["code"] == 130 and event["partial"] == str(tmp_path / "a.partial.gpkg")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["a.gpkg.partial", "a.partial.gpkg"]


def test_disk_full_while_writing(tmp_path):
    """A limit on the size of files stands for the full disk: the layer cannot be written whole."""
    path = write_scene(tmp_path / "port.tif", draw_ships(500, 400))
    command = [*PROGRAM, "detect", path, "-o", tmp_path / "a.gpkg", "-m", small_model(), "--score", "0"]
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "NUMBA_DISABLE_JIT": "0"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)),
    )
    assert done.returncode == 1, done.stderr
    lines = [line for line in done.stderr.splitlines() if "warning" not in line]
    assert len(lines) == 1 and lines[0].startswith("rtmdet-geo: error: cannot write"), done.stderr
    assert sorted(item.name for item in tmp_path.iterdir()) == ["a.gpkg.partial", "port.tif"]


def test_entry_point_exit_codes(tmp_path):
    for words, code in ((["--version"], 0), (["info", tmp_path / "no.tif"], 1), (["info"], 2)):
        done = subprocess.run([*PROGRAM, *map(str, words)], capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == code
        assert "Traceback" not in done.stderr


# ---------------------------------------------------------------- models, info, export, train, data


def test_models_show_prints_the_card():
    result = run("models", "show", small_model())
    assert result.exit_code == 0
    lines = {line[:16].strip(): line[16:].strip() for line in result.stdout.splitlines()}
    assert lines["model"] == "small" and lines["classes"] == "ship" and lines["licence"] == "Apache-2.0"
    assert lines["training data"] == "noise" and lines["attribution"] == "not stated"
    card = json.loads(run("models", "show", small_model(), "--json").stdout)
    assert card["name"] == "small" and len(card["sha256"]) == 64
    assert run("info", small_model()).stdout == result.stdout


def test_info_of_a_scene(scene, tmp_path):
    text = run("info", scene).stdout
    assert "500 x 400 px" in text and "EPSG:32630" in text and "uint8" in text
    assert json.loads(run("info", scene, "--json").stdout)["width"] == 500
    assert "does not exist" in error_line(run("info", tmp_path / "no.tif"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from rtmdet_geo.models import get_model
    from rtmdet_geo.models.weights import save_weights

    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_weights(get_model("rtmdet_r_test", num_classes=1), path, make_spec(name="mine"))
    return path


def test_export_and_its_verdict(weights, tmp_path, monkeypatch):
    result = run("export", weights, "-o", tmp_path / "mine.onnx", "--half-weights", "--score", 0.4)
    assert result.exit_code == 0, result.stderr
    assert "compared with torch: boxes within" in result.stdout
    assert catalog.read_spec(tmp_path / "mine.onnx").score_threshold == 0.4
    assert "--overwrite" in error_line(run("export", weights, "-o", tmp_path / "mine.onnx"))
    monkeypatch.setattr(export_check, "TOLERANCES", export_check.TOLERANCES._replace(scores=-1.0))
    assert "differs from torch" in error_line(run("export", weights, "-o", tmp_path / "bad.onnx"), code=3)
    assert not (tmp_path / "bad.onnx").exists()
    assert "nosuch" in error_line(run("export", tmp_path / "nosuch.safetensors", "-o", tmp_path / "b.onnx"))


def test_train_shows_its_recipe(tmp_path):
    result = run("train", "sen2ships_r", "--set", "optim.iterations=7", "--show-config")
    assert result.exit_code == 0 and "iterations: 7" in result.stdout
    (tmp_path / "copy.yaml").write_text(result.stdout)
    assert run("train", tmp_path / "copy.yaml", "--show-config").stdout == result.stdout
    line = error_line(run("train", "sen2ships_r", "--set", "optim.lrr=1", "--show-config"))
    assert "optim.lrr" in line and "did you mean" in line
    assert "sen2ships_q" in error_line(run("train", "sen2ships_q"))
    assert run("train", "sen2ships_r", "--resume", "--overwrite").exit_code == 2


def test_train_hands_everything_on(monkeypatch, tmp_path):
    from rtmdet_geo.training import loop

    calls = []

    def train(recipe, out, **settings):
        calls.append((recipe.name, out, settings))
        settings["progress"](1, 2)
        summary = {
            "weights": "w.safetensors",
            "iterations": 2,
            "planned_iterations": 2,
            "seconds": 1.0,
            "validation": [],
        }
        return {**summary, "figures": {"AP50": 0.25}}

    monkeypatch.setattr(loop, "train_model", train)
    words = ["train", "sen2ships_r", "-o", tmp_path / "run", "--data", "chips", "--device", "cpu", "--resume"]
    result = run(*words, "--json")
    assert json.loads(result.stdout)["iterations"] == 2
    name, out, settings = calls[0]
    assert (name, out, settings["data"], settings["device"], settings["resume"]) == (
        "sen2ships_r",
        tmp_path / "run",
        Path("chips"),
        "cpu",
        True,
    )
    events = [json.loads(line) for line in run(*words, "--progress", "jsonl").stdout.splitlines()]
    assert [event["event"] for event in events] == ["start", "progress", "done"]
    result = run("train", "sen2ships_r")
    assert result.exit_code == 0 and calls[-1][1] == Path("runs/sen2ships_r")
    assert result.stdout == "w.safetensors: 2 iterations in 1 s, AP50 0.250\n"
    monkeypatch.setenv("RANK", "1")  # the second of several processes keeps silent
    assert run(*words, "--json").stdout == ""


def test_train_without_chips_is_one_line(tmp_path):
    assert "chips" in error_line(run("train", "sen2ships_r", "-o", tmp_path / "run", "--data", tmp_path / "nochips"))


def test_data_chips(scene, tmp_path):
    import shapely

    labels = geopandas.GeoDataFrame(geometry=[shapely.box(500_400, 4_499_400, 500_800, 4_499_560)], crs="EPSG:32630")
    labels.to_file(tmp_path / "ships.gpkg")
    words = ["data", "chips", scene, "-l", tmp_path / "ships.gpkg", "-o", tmp_path / "chips"]
    summary = json.loads(run(*words, "--chip-size", 256, "--overlap", 64, "--class", "ship", "--json").stdout)
    assert summary["num_scenes"] == 1 and summary["num_by_class"]["ship"] >= 1
    assert (tmp_path / "chips" / "chips.json").is_file()
    assert "--overwrite" in error_line(run(*words))
    assert run("data", "chips", scene, "-o", tmp_path / "x").exit_code == 2
    assert "nolabels" in error_line(run("data", "chips", scene, "-l", "nolabels.gpkg", "-o", tmp_path / "y"))
