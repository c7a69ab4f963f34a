"""Real files with random bytes changed: each runs or gives its one line; none hangs or falls with a traceback."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import numpy as np
import pytest
from synthetic import BlobBackend, make_spec

from rtmdet_geo.detect import detect_scene
from rtmdet_geo.errors import RTMDetGeoError
from rtmdet_geo.structures import StretchSpec

HERE = Path(__file__).parent
#: Seconds that a damaged file may take, a hundred times what a whole one needs.
LIMIT_S = 60
#: Of a file's beginning, where its headers are, half of the changed bytes.
HEAD_BYTES = 2000

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="each file is tried in a fork of the test process")


def damage(content: bytes, rng: np.random.Generator) -> bytes:
    """Return a file with 1 to 16 bytes changed."""
    damaged = bytearray(content)
    for _ in range(int(rng.integers(1, 17))):
        end = min(len(damaged), HEAD_BYTES) if rng.random() < 0.5 else len(damaged)
        damaged[int(rng.integers(end))] ^= int(rng.integers(1, 256))
    return bytes(damaged)


def run_child(path: Path) -> int:
    """Detect in a file; return 0 where that worked, 1 for an error on purpose with one line, 2 for anything else."""
    try:
        engine = BlobBackend(
            make_spec(bands=("red",), mean=(100.0,), std=(50.0,), stretch=StretchSpec(kind="percentile"))
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            detect_scene(path, model=engine, bands=[1], nodata=None)
    except RTMDetGeoError as error:
        return 1 if str(error).strip() and "\n" not in str(error) else 2
    except BaseException as error:
        print(f"{path.name}: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


def outcome(path: Path) -> str:
    """Run in a process of its own; return "done", "refused", "traceback", "hang" or the signal that it died of."""
    child = os.fork()
    if child == 0:
        code = 2
        try:
            code = run_child(path)
        finally:
            os._exit(code)

    def too_late(number: int, frame: FrameType | None) -> None:
        os.kill(child, signal.SIGKILL)

    before = signal.signal(signal.SIGALRM, too_late)
    signal.alarm(LIMIT_S)
    try:
        _, status = os.waitpid(child, 0)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return "hang" if number == signal.SIGKILL else signal.Signals(number).name
    return ("done", "refused", "traceback")[os.WEXITSTATUS(status)]


def scenes(data_dir: Path) -> Iterator[Path]:
    """Yield small real files of many kinds."""
    yield HERE / "data" / "casablanca.tif"
    yield from sorted(path for path in (data_dir / "geotiff").glob("*.tif*") if path.stat().st_size > 1000)


def try_damaged(data_dir: Path, folder: Path, number: int, seed: int) -> Counter[str]:
    """Damage files in turn; return how often each outcome came."""
    rng, found = np.random.default_rng(seed), Counter[str]()
    files = [(path.name, path.read_bytes()) for path in scenes(data_dir)]
    for index in range(number):
        name, content = files[index % len(files)]
        path = folder / f"{index}_{name}"
        path.write_bytes(damage(content, rng))
        result = outcome(path)
        found[result] += 1
        if result in ("done", "refused"):
            path.unlink()
        else:
            print(f"{result}: {path}", file=sys.stderr)  # kept, to look at
    return found


def check(found: Counter[str], number: int) -> None:
    assert found["traceback"] == found["hang"] == 0, found
    assert found["done"] > 0 and found["refused"] > 0, "files were not damaged, or could not be read at all"
    assert set(found) == {"done", "refused"}, f"a decoder crashed: {found}"
    assert found.total() == number


@pytest.mark.slow
def test_damaged_files_run_or_say_why(data_dir, tmp_path):
    check(try_damaged(data_dir, tmp_path, 39, seed=0), 39)


@pytest.mark.soak
def test_a_thousand_damaged_files(data_dir, tmp_path):
    check(try_damaged(data_dir, tmp_path, 1000, seed=1), 1000)


def test_outcomes_are_told_apart(tmp_path, monkeypatch):
    """A hang, a crash and a traceback are seen as such."""
    here = sys.modules[__name__]
    monkeypatch.setattr(here, "LIMIT_S", 1)
    monkeypatch.setattr(here, "run_child", lambda path: signal.pause() or 0)
    assert outcome(tmp_path) == "hang"
    monkeypatch.setattr(here, "run_child", lambda path: os.kill(os.getpid(), signal.SIGUSR1) or 0)
    assert outcome(tmp_path) == "SIGUSR1"
    monkeypatch.setattr(here, "run_child", lambda path: 2)
    assert outcome(tmp_path) == "traceback"
