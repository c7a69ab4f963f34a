"""What a child process of tests/test_damaged_scenes.py does; the fork server imports this module once."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from pathlib import Path

from synthetic import BlobBackend, make_spec

from rtmdet_geo.detect import detect_scene
from rtmdet_geo.errors import RTMDetGeoError
from rtmdet_geo.structures import StretchSpec

#: Exit status of a refusal in one line; 0 is a scene that ran, 1 an exception that nobody caught.
REFUSED = 10


def detect_in(path: Path) -> None:
    """Detect in a file; exit with REFUSED at an error on purpose with one line."""
    spec = make_spec(bands=("red",), mean=(100.0,), std=(50.0,), stretch=StretchSpec(kind="percentile"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            detect_scene(path, model=BlobBackend(spec), bands=[1], nodata=None)
    except RTMDetGeoError as error:
        assert str(error).strip() and "\n" not in str(error), f"{path.name}: not one line: {error}"
        sys.exit(REFUSED)


def wait_forever(path: Path) -> None:
    """Hang."""
    signal.pause()


def crash(path: Path) -> None:
    """Die of a signal."""
    os.kill(os.getpid(), signal.SIGUSR1)


def break_down(path: Path) -> None:
    """Raise what is no error on purpose."""
    raise ValueError(path)
