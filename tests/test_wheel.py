"""The built package: sdist and wheel hold what they should, and the wheel works in an empty environment elsewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCENE = ROOT / "tests" / "data" / "casablanca.tif"
MAX_SDIST_BYTES = 36_000_000

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def run(command: list[str | Path], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command in ``folder`` with nothing of this environment's Python settings; fail with its output."""
    dropped = ("PYTHON", "VIRTUAL_ENV", "RTMDET")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    done = subprocess.run(
        [str(part) for part in command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """Folder with the sdist and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("dist")
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT], folder)
    return folder


@pytest.fixture(scope="module")
def program(built, tmp_path_factory) -> Path:
    """The ``rtmdet-geo`` program in an empty environment that got the wheel and its base requirements."""
    folder = tmp_path_factory.mktemp("empty")
    run([sys.executable, "-m", "venv", folder / "venv"], folder)
    (wheel,) = built.glob("*.whl")
    pip = [folder / "venv" / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run([*pip, "-c", ROOT / "constraints.txt", wheel], folder)
    return folder / "venv" / "bin" / "rtmdet-geo"


def test_wheel_holds_the_package_and_nothing_else(built):
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"rtmdet_geo"}
    assert "rtmdet_geo/py.typed" in names
    for folder, target in (("configs", "_configs"), ("rtmdet_geo/assets", "assets")):
        committed = {f"rtmdet_geo/{target}/{path.name}" for path in (ROOT / folder).iterdir() if path.is_file()}
        assert committed <= set(names)
    assert any(name.endswith(".onnx") for name in names), "the wheel carries no model"
    assert "rtmdet_geo/_configs/sen2ships_r.yaml" in names
    assert not [name for name in names if name.endswith((".nbi", ".nbc", ".pyc"))]
    assert any(name.endswith(".dist-info/licenses/NOTICE") for name in names)


def test_sdist_suffices_to_build_and_test(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {member.name.split("/", 1)[1] for member in archive.getmembers() if "/" in member.name}
    wanted = {
        *("pyproject.toml", "constraints.txt", "Makefile", "LICENSE", "NOTICE", "README.md", ".ci/run"),
        *("tests/conftest.py", "tests/data/casablanca.tif", "tests/data/casablanca_ships.geojson"),
        *("tests/golden/oracle/recipes.py", "configs/sen2ships_r.yaml", "data_tools/__init__.py"),
    }
    assert wanted <= names
    assert sdist.stat().st_size < MAX_SDIST_BYTES


def test_empty_environment_has_no_torch(program):
    code = "import importlib.util as u; print([n for n in ('torch', 'tests', 'data_tools') if u.find_spec(n)])"
    assert run([program.with_name("python"), "-c", code], program.parent).stdout.strip() == "[]"


def test_detect_from_the_wheel(program, tmp_path):
    done = run([program, "detect", SCENE, "-o", "ships.gpkg", "--json", "--progress", "none"], tmp_path)
    assert isinstance(json.loads(done.stdout), dict)
    assert (tmp_path / "ships.gpkg").stat().st_size > 0
    count = "import pyogrio; print(pyogrio.read_info('ships.gpkg')['features'])"
    assert int(run([program.with_name("python"), "-c", count], tmp_path).stdout) > 0


def test_show_config_from_the_wheel_without_torch(program, tmp_path):
    import yaml

    shown = yaml.safe_load(run([program, "train", "sen2ships_r", "--show-config"], tmp_path).stdout)
    assert shown["model"]["classes"] == ["ship"]
    assert list(tmp_path.iterdir()) == []


def test_package_knows_its_version(program, tmp_path):
    import rtmdet_geo

    assert rtmdet_geo.__version__ in run([program, "--version"], tmp_path).stdout
