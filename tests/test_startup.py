"""Importing the package and asking for help are quick and load nothing heavy; public names load on first use."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import rtmdet_geo

HEAVY = {"torch", "rasterio", "onnxruntime", "geopandas", "pandas", "pyarrow", "shapely", "numba", "cv2", "matplotlib"}
MAX_CPU_SECONDS = 0.5
PROGRAM = Path(sys.executable).with_name("rtmdet-geo")
IMPORT = [sys.executable, "-c", "import rtmdet_geo"]
HELP = [sys.executable, str(PROGRAM), "--help"]


def loaded_modules(command: list[str]) -> set[str]:
    """Run a Python command and return the top-level names of all modules that it imported."""
    done = subprocess.run(
        [command[0], "-X", "importtime", *command[1:]], capture_output=True, text=True, check=True, timeout=60
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.rsplit("|", 1)[1].strip().split(".")[0] for line in lines}


def cpu_seconds(command: list[str]) -> float:
    """Return user and system CPU seconds of a command, the best of three runs."""
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, capture_output=True, check=True, timeout=60)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    return min(times)


@pytest.mark.parametrize("command", [IMPORT, HELP], ids=["import", "help"])
def test_nothing_heavy_is_loaded(command):
    assert loaded_modules(command) & HEAVY == set()


@pytest.mark.parametrize("command", [IMPORT, HELP], ids=["import", "help"])
def test_cpu_time(command):
    assert cpu_seconds(command) < MAX_CPU_SECONDS


def test_the_probe_sees_a_heavy_import():
    assert "rasterio" in loaded_modules([sys.executable, "-c", "import rtmdet_geo; rtmdet_geo.open_scene"])


def test_reading_structures_loads_no_torch():
    loaded = loaded_modules([sys.executable, "-c", "import rtmdet_geo; rtmdet_geo.Detections"])
    assert not loaded & {"torch", "rasterio"}


def test_detecting_loads_no_torch():
    assert "torch" not in loaded_modules([sys.executable, "-c", "import rtmdet_geo; rtmdet_geo.detect_scene"])


@pytest.mark.parametrize("name", rtmdet_geo.__all__)
def test_public_name_twice(name):
    """The second look-up gives the same object: loading the home did not put a module under the name."""
    first = getattr(rtmdet_geo, name)
    assert getattr(rtmdet_geo, name) is first
    assert type(first).__name__ != "module"


def test_public_names_in_a_fresh_process():
    code = (
        "import json, types, rtmdet_geo\n"
        "names = {n: [getattr(rtmdet_geo, n), getattr(rtmdet_geo, n)] for n in rtmdet_geo.__all__}\n"
        "print(json.dumps([n for n, (a, b) in names.items() if a is not b or isinstance(a, types.ModuleType)]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert json.loads(done.stdout) == []


def test_unknown_name():
    with pytest.raises(AttributeError, match="no_such_name"):
        rtmdet_geo.no_such_name  # noqa: B018 - the look-up is the test


def test_lazy_names_are_listed():
    assert set(rtmdet_geo._HOMES) | {"__version__"} == set(rtmdet_geo.__all__) <= set(dir(rtmdet_geo))
