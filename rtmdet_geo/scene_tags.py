"""What a scene is called, and when and by what it was taken: from its path and its tags."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

#: Tag names in order of trust, compared in lower case.
_TIME_TAGS = (
    "acquisitiondatetime", "acquisition_datetime", "datetime", "sensing_time", "generation_time_of_acquisition",
    "acquisition_date", "acquired", "date_acquired", "datatake_1_datatake_sensing_start", "product_start_time",
    "nitf_idatim", "tifftag_datetime",
)  # fmt: skip
_SENSOR_TAGS = (
    "sensor", "satelliteid", "satellite", "spacecraft_id", "spacecraft_name", "datatake_1_spacecraft_name", "platform",
    "sensor_id", "nitf_isorce",
)  # fmt: skip
_FORMATS = (
    "%Y:%m:%d %H:%M:%S", "%Y-%m-%d %H:%M:%S", "%Y/%m/%d %H:%M:%S", "%Y%m%d%H%M%S", "%Y%m%dT%H%M%S",
    "%Y:%m:%d", "%Y/%m/%d", "%Y%m%d",
)  # fmt: skip


def acquisition_time(tags: Mapping[str, str]) -> str | None:
    """Acquisition time as ISO 8601 text, or None.

    Args:
        tags: names in any case. Landsat's DATE_ACQUIRED is joined with SCENE_CENTER_TIME.

    Example:
        >>> acquisition_time({"TIFFTAG_DATETIME": "2023:04:26 00:00:00"})
        '2023-04-26T00:00:00'
    """
    lower = {name.lower(): text for name, text in tags.items()}
    if "date_acquired" in lower and "scene_center_time" in lower:
        joined = iso_time(f"{lower['date_acquired']}T{lower['scene_center_time']}".replace('"', ""))
        if joined is not None:
            return joined
    for name in _TIME_TAGS:
        found = iso_time(lower.get(name, ""))
        if found is not None:
            return found
    return None


def iso_time(text: str) -> str | None:
    """ISO 8601 form of a time in one of the usual spellings, or None; a zone is kept where the text has one."""
    text = text.strip().strip("'\"")
    for pattern in _FORMATS:
        try:
            return datetime.strptime(text, pattern).isoformat()
        except ValueError:
            continue
    # More than six decimals of a second occur (Landsat); Python reads at most six before 3.11 and cuts after.
    text = re.sub(r"(\.\d{6})\d+", r"\1", text)
    try:
        return datetime.fromisoformat(text).isoformat() if text else None
    except ValueError:
        return None


def sensor_name(tags: Mapping[str, str]) -> str | None:
    """Name of the sensor or satellite, or None."""
    lower = {name.lower(): text.strip().strip("'\"") for name, text in tags.items()}
    return next((lower[name] for name in _SENSOR_TAGS if lower.get(name)), None)


def scene_stem(path: str | Path) -> str:
    """File name without folder, URL query and suffix.

    Example:
        >>> scene_stem("/vsicurl/https://host/folder/a.b.tif?signature=1/2")
        'a.b'
    """
    text = str(path)
    if "://" in text:
        text = text.split("?", 1)[0]
    return Path(text.rstrip("/")).stem
