"""Real files with random bytes changed: each runs or gives its one line; none hangs or falls with a traceback."""

from __future__ import annotations

import multiprocessing
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from scene_child import REFUSED, break_down, crash, detect_in, wait_forever

HERE = Path(__file__).parent
#: Seconds that a damaged file may take, a hundred times what a whole one needs.
LIMIT_S = 60
#: Of a file's beginning, where its headers are, half of the changed bytes.
HEAD_BYTES = 2000

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the fork server needs a Unix")


def damage(content: bytes, rng: np.random.Generator) -> bytes:
    """Return a file with 1 to 16 bytes changed."""
    damaged = bytearray(content)
    for _ in range(int(rng.integers(1, 17))):
        end = min(len(damaged), HEAD_BYTES) if rng.random() < 0.5 else len(damaged)
        damaged[int(rng.integers(end))] ^= int(rng.integers(1, 256))
    return bytes(damaged)


def outcome(work: Callable[[Path], None], path: Path, limit_s: float = LIMIT_S) -> str:
    """Run in a process of its own; return "done", "refused", "traceback", "hang" or the signal that it died of.

    The processes are forks of a server that has no threads: a fork of the test process would inherit locks held by
    the threads of earlier tests, and wait for them for ever.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["scene_child"])
    child = context.Process(target=work, args=(path,), daemon=True)
    child.start()
    child.join(limit_s)
    if child.exitcode is None:
        child.kill()
        child.join()
        return "hang"
    if child.exitcode < 0:
        return signal.Signals(-child.exitcode).name
    return {0: "done", REFUSED: "refused"}.get(child.exitcode, "traceback")


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
        result = outcome(detect_in, path)
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


def test_outcomes_are_told_apart(tmp_path):
    """A hang, a crash and a traceback are seen as such."""
    assert outcome(wait_forever, tmp_path, limit_s=3) == "hang"
    assert outcome(crash, tmp_path) == "SIGUSR1"
    assert outcome(break_down, tmp_path) == "traceback"
