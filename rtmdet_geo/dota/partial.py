"""Work that can be killed and taken up again: ``OUT.partial`` holds what is finished, image by image.

Each finished image has a record. Records and all else are written under a temporary name and renamed, so a killed
process leaves nothing that is half there; settings are kept, and others refused.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rtmdet_geo.errors import ConfigError, OutputError

SETTINGS_FILE = "settings.json"
#: What a finished output's settings have besides: its records.
FINISHED_KEY = "images"
_RECORDS = "done"
#: Files that are being written end so.
_STAGED = ".partial"


class PartialFolder:
    """The folder beside an output in which it grows; see :func:`open_partial`.

    Attributes:
        folder: ``OUT.partial``.
    """

    def __init__(self, folder: Path) -> None:
        """Take a folder that exists."""
        self.folder = folder

    def records(self) -> dict[str, dict[str, Any]]:
        """Return the records of finished images by name; one that does not read is none."""
        found = {}
        for path in sorted((self.folder / _RECORDS).glob("*.json")):
            content = read_json(path)
            if content is not None:
                found[path.stem] = content
        return found

    def record(self, name: str, content: Mapping[str, Any]) -> None:
        """Say that an image is finished."""
        write_whole(self.folder / _RECORDS / f"{name}.json", json.dumps(content).encode())

    def forget_records(self) -> None:
        """Remove the records, when the output is about to get its name."""
        shutil.rmtree(self.folder / _RECORDS, ignore_errors=True)

    def remove(self) -> None:
        """Remove all of it."""
        shutil.rmtree(self.folder, ignore_errors=True)


def partial_path(out: str | os.PathLike[str]) -> Path:
    """Return ``OUT.partial``."""
    out = Path(out)
    return out.with_name(out.name + ".partial")


def open_partial(
    out: str | os.PathLike[str], settings: Mapping[str, Any], *, resume: bool, overwrite: bool
) -> PartialFolder:
    """Make ``OUT.partial``, or take up the one that is there.

    Args:
        out: output that shall grow there.
        settings: what the result depends on; plain values.
        resume: go on from an earlier one.
        overwrite: begin again where there is an earlier one.

    Raises:
        ConfigError: the earlier one had other settings.
        OutputError: there is one, and neither ``resume`` nor ``overwrite``; it is no such folder; the folder cannot be
            written.
    """
    folder = partial_path(out)
    wanted = json.loads(json.dumps(settings))
    if folder.exists():
        begun = read_json(folder / SETTINGS_FILE)
        if begun is None:
            raise OutputError(f"{str(folder)!r} is not what an unfinished run leaves; move it or choose another output")
        if resume:
            begun.pop(FINISHED_KEY, None)  # it was stopped just before it got its name
            check_settings(wanted, begun, str(folder))
            return PartialFolder(folder)
        if not overwrite:
            raise OutputError(
                f"{str(folder)!r} is left of an unfinished run; add --resume to go on, --overwrite to begin anew"
            )
        shutil.rmtree(folder)
    try:
        (folder / _RECORDS).mkdir(parents=True)
    except OSError as error:
        raise OutputError(f"cannot make folder {str(folder)!r}: {error.strerror or error}") from error
    write_whole(folder / SETTINGS_FILE, json.dumps(wanted, indent=1).encode())
    return PartialFolder(folder)


def check_settings(wanted: Mapping[str, Any], begun: Mapping[str, Any], place: str) -> None:
    """Refuse to go on with other settings.

    Raises:
        ConfigError: a value differs; the message names it.
    """
    for key in [*wanted, *(key for key in begun if key not in wanted)]:
        if wanted.get(key) != begun.get(key):
            raise ConfigError(
                f"{place!r} was begun with {key}={begun.get(key)!r}, not {wanted.get(key)!r}: give the same options to "
                "go on, or --overwrite without --resume to begin anew"
            )


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under a temporary name and rename it.

    Raises:
        OutputError: the operating system refuses.
    """
    staged = path.with_name(f".{path.name}{_STAGED}")
    try:
        staged.write_bytes(content)
        os.replace(staged, path)
    except OSError as error:
        raise OutputError(f"cannot write {str(path)!r}: {error.strerror or error}; is the disk full?") from error


def read_json(path: Path) -> dict[str, Any] | None:
    """Return an object in a file; None if the file is missing or holds none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
