"""What benchmarks say of the machine that they ran on, and of their targets."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path

import numba
import numpy as np


def describe_machine():
    """Return processor, cores, load of the last minute, versions and date, as columns of a table of results."""
    return {
        "cpu": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "numba": numba.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def _processor():
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def verdict(text, is_met):
    """Print whether a target is met."""
    print(f"{'PASS ' if is_met else 'BELOW'}  {text}")
