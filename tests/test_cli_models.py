"""``rtmdet-geo models``: the listing, cards of published weights, downloads from a server of this machine."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
from click.testing import CliRunner, Result
from fileserver import FileServer

from rtmdet_geo import cache, catalog
from rtmdet_geo.checkpoints import CHECKPOINTS
from rtmdet_geo.cli import cli
from rtmdet_geo.variants import VARIANTS


def run(*words: str) -> Result:
    """Run the real group in this process."""
    return CliRunner().invoke(cli, list(words), prog_name="rtmdet-geo", terminal_width=100)


def error_line(result: Result) -> str:
    """Check that a command failed and said why in the last line of stderr, nothing on stdout; return the line."""
    assert result.exit_code == 1, (result.output, result.exception)
    assert result.stdout == ""
    line = result.stderr.splitlines()[-1]
    assert line.startswith("rtmdet-geo: error: ")
    return line


def test_models_list():
    result = run("models", "list")
    assert result.exit_code == 0 and "sen2ships_r" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 120
    for name in (*catalog.CATALOG, *VARIANTS, *CHECKPOINTS):
        assert f"{name} " in result.stdout
    entries = json.loads(run("models", "list", "--json").stdout)
    assert [entry["name"] for entry in entries] == [*sorted(catalog.CATALOG), *VARIANTS]
    assert all(type(entry["params"]) is int and type(entry["flops"]) is int for entry in entries)
    weights = [weights for entry in entries for weights in entry.get("checkpoints", [])]
    assert [entry["name"] for entry in weights] == list(CHECKPOINTS)
    assert all(entry["metrics"] and entry["licence"] and entry["url"] and entry["data_terms"] for entry in weights)


def test_models_list_in_a_cache_and_without_the_bundled_file(monkeypatch, tmp_path):
    monkeypatch.setenv("RTMDET_GEO_CACHE", str(tmp_path))
    place = CHECKPOINTS["rtmdet_tiny_coco"].path
    place.parent.mkdir(parents=True)
    place.write_bytes(b"")
    monkeypatch.setattr(catalog, "ASSETS", tmp_path)
    lines = run("models", "list").stdout.splitlines()
    assert [line.split()[0] for line in lines if line.endswith("in the cache")] == ["rtmdet_tiny_coco"]
    assert any(line.endswith("default, file missing") for line in lines)


def test_models_list_needs_no_torch():
    code = (
        "import sys\nfrom rtmdet_geo.cli import main\n"
        "try:\n    main(['models', 'list', '--json'])\nexcept SystemExit as end:\n    assert not end.code\n"
        "heavy = {'torch', 'rasterio', 'numba', 'geopandas', 'onnxruntime', 'cv2'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    listing, heavy = done.stdout.splitlines()
    assert json.loads(listing) and heavy == "[]"


def test_models_show_published_weights():
    card = run("models", "show", "rtmdet_r_tiny_dota").stdout
    assert "not in the cache" in card and "9d821076.pth" in card and "academic purposes only" in card
    assert "fixed, 0..0.3 in physical units (integers x 0.0001); 8-bit as they are" in card
    assert "8-bit as they are" not in run("models", "show", "sen2ships_r").stdout  # its dark level is subtracted
    facts = json.loads(run("models", "show", "rtmdet_r_tiny_dota", "--json").stdout)
    assert facts["kind"] == "rotated" and len(facts["classes"]) == 15 and facts["bands"] == ["blue", "green", "red"]
    assert "1000: tench, goldfish" in run("models", "show", "cspnext_s_imagenet").stdout


@pytest.mark.parametrize("name", [*catalog.CATALOG, *VARIANTS, *CHECKPOINTS])
def test_info_and_show_know_every_name(name):
    """The same card, by one function."""
    for words in ([], ["--json"]):
        shown = run("models", "show", name, *words)
        assert shown.exit_code == 0 and name in shown.stdout
        assert run("info", name, *words).stdout == shown.stdout
    assert json.loads(shown.stdout)["name"] == name


def test_models_show_a_network():
    card = run("models", "show", "rtmdet_r_tiny").stdout.splitlines()
    assert "parameters  4,877,544 with 15 classes and 3 bands" in card
    assert "GFLOPs      20.58 (multiply-adds in 1e9) for 1024 x 1024 px" in card
    assert "published   4.88 M parameters, 20.45 GFLOPs" in card
    assert sum(line.startswith("weights     rtmdet_r_tiny_") and "mAP50" in line for line in card) == 3
    own = run("models", "show", "rtmdet_r_nano").stdout
    assert "a size of our own" in own and "weights     sen2ships_r: AP" in own and "published" not in own
    assert "weights     none, to be trained" in run("info", "rtmdet_ins_nano").stdout


def test_names_that_are_nearly_known(tmp_path, monkeypatch):
    for words in (("info",), ("models", "show")):
        assert "did you mean 'rtmdet_r_tiny_dota'" in error_line(run(*words, "rtmdet_r_tiny_dotta"))
    assert "scene 'port_a' does not exist" in error_line(run("info", "port_a"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rtmdet_r_tin").write_bytes(b"")  # a file of that name is meant
    assert "did you mean" not in error_line(run("info", "rtmdet_r_tin"))


def test_bundled_weights_are_listed_below_their_network():
    lines = run("models", "list").stdout.splitlines()
    place = next(number for number, line in enumerate(lines) if line.startswith("rtmdet_r_nano "))
    assert lines[place + 1].split()[0] == "sen2ships_r" and lines[place + 1].endswith("bundled")


@pytest.fixture
def published(monkeypatch, tmp_path) -> Iterator[FileServer]:
    """The published rtmdet_tiny_coco lies on a server of this machine, with other bytes."""
    monkeypatch.setenv("RTMDET_GEO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "FIRST_PAUSE_S", 0.01)
    content = bytes(range(256)) * 2000
    with FileServer({"/tiny-00000000.pth": content}).running() as server:
        changed = replace(
            CHECKPOINTS["rtmdet_tiny_coco"],
            url=f"{server.url}/tiny-00000000.pth",
            sha256=hashlib.sha256(content).hexdigest()[:8],
        )
        monkeypatch.setitem(CHECKPOINTS, "rtmdet_tiny_coco", changed)
        yield server


def test_models_download(published, tmp_path):
    published.faults = ["drop:100000"]
    result = run("models", "download", "rtmdet_tiny_coco")
    assert result.exit_code == 0, result.output
    path = tmp_path / "cache" / "checkpoints" / "tiny-00000000.pth"
    assert result.stdout == f"{path}\n" and path.stat().st_size == 512_000
    assert "next attempt in 0 s" in result.stderr
    summary = json.loads(run("models", "download", "rtmdet_tiny_coco", "--json").stdout)
    assert summary["path"] == str(path) and summary["bytes"] == 512_000 and len(summary["sha256"]) == 64
    assert published.ranges == ["", "bytes=100000-"]


def test_models_download_events(published):
    lines = run("models", "download", "rtmdet_tiny_coco", "--progress", "jsonl").stdout.splitlines()
    events = [json.loads(line) for line in lines]
    assert [events[0]["event"], events[-1]["event"]] == ["start", "done"]
    assert events[-2] == {"event": "progress", "done": 512_000, "total": 512_000}
    assert run("models", "download", "rtmdet_tiny_coco", "--progress", "jsonl", "--json").exit_code == 2


def test_models_download_bar(published):
    result = run("models", "download", "rtmdet_tiny_coco", "--progress", "bar")
    assert result.exit_code == 0 and len(result.stdout.splitlines()) == 1


def test_models_download_fails(published, tmp_path):
    assert "did you mean 'rtmdet_tiny_coco'" in error_line(run("models", "download", "rtmdet_tiny"))
    published.always = "status:404"
    line = error_line(run("models", "download", "rtmdet_tiny_coco"))
    assert "HTTP 404" in line and str(tmp_path / "cache" / "checkpoints" / "tiny-00000000.pth") in line
