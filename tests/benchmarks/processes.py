"""Wall time and peak memory of other processes. Needs nothing but Python, for some run without our packages."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

SAMPLE_S = 0.02


def report(**values):
    """Print, in the measured process, its results and its peak memory as the last line."""
    print(json.dumps({**values, "peak_mb": round(peak_bytes() / 1e6, 1)}), flush=True)


def peak_bytes():
    """Return the most memory that this process has had resident.

    Linux counts in ``ru_maxrss`` of a child what its parent had when it was started; VmHWM is the child's alone.
    """
    try:
        return _status("self", "VmHWM")
    except OSError:
        largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return largest if sys.platform == "darwin" else largest * 1024


def run_measured(command, environment=None):
    """Run a command; return its wall seconds, its sampled peak in MB, and what it printed by :func:`report`, if it did.

    Raises:
        SystemExit: it failed; with its last words.
    """
    start, sampled = time.perf_counter(), 0
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        while True:
            sampled = max(sampled, _sample(process.pid))
            try:
                output, errors = process.communicate(timeout=SAMPLE_S)
                break
            except subprocess.TimeoutExpired:
                continue
    seconds = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed ({process.returncode}):\n{(errors or output)[-2000:]}")
    lines = output.strip().splitlines()
    reported = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}
    return {"wall_s": seconds, "sampled_mb": round(sampled / 1e6, 1), **reported}


def _sample(pid):
    try:
        return _status(pid, "VmRSS")
    except OSError:  # it is over, or this is no Linux
        return 0


def _status(pid, name):
    """Return a size in bytes of /proc/PID/status; 0 where it is left out, as of a process that ends."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0
