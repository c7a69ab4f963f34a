"""How GDAL is to reach a scene: its memory, what it does when a server fails, what it says. No raster library here."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

#: Bytes of decoded blocks that GDAL keeps; strips.py reads each block once, so more would only fill the memory.
#: It must hold a strip of blocks under a column panel: 8,192 x 512 px of 13 uint16 bands are 104 MiB.
CACHE_BYTES = 256 * 2**20
#: Requests that fail are repeated, and those that fall silent end (seconds, bytes a second). What came is forgotten
#: with the file's handle, as GDAL would keep a torn answer, and that a server failed, until the process ends. Local
#: files get the same: a virtual raster may lead to a server.
HTTP_OPTIONS: Mapping[str, Any] = {
    "GDAL_HTTP_MAX_RETRY": 3,
    "GDAL_HTTP_RETRY_DELAY": 1,
    "GDAL_HTTP_CONNECTTIMEOUT": 20,
    "GDAL_HTTP_LOW_SPEED_TIME": 30,
    "GDAL_HTTP_LOW_SPEED_LIMIT": 1,
    "CPL_VSIL_CURL_NON_CACHED": "/vsicurl/:/vsis3/:/vsigs/:/vsiaz/:/vsiadls/:/vsioss/:/vsiswift/",
}
#: No listing of a remote folder: each companion file is asked for by its name.
_REMOTE_OPTIONS: Mapping[str, Any] = {"GDAL_DISABLE_READDIR_ON_OPEN": "TRUE"}
#: What to do when pixels cannot be read.
FILE_REMEDY = "the file may be truncated, copy it again"
SERVER_REMEDY = "the server failed, broke off or fell silent: try again later, --resume goes on"
_REMOTE_STARTS = (
    *("http:", "https:", "ftp:", "s3:", "gs:", "az:", "oss:"),
    *("/vsicurl", "/vsis3", "/vsigs", "/vsiaz", "/vsiadls", "/vsioss", "/vsiswift", "/vsiwebhdfs"),
)


def gdal_options(*paths: str, set_already: Container[str] = ()) -> dict[str, Any]:
    """GDAL's options for opening and reading paths, but for those that are set already."""
    options = {"GDAL_CACHEMAX": CACHE_BYTES, **HTTP_OPTIONS, **(_REMOTE_OPTIONS if any(map(is_remote, paths)) else {})}
    return {name: value for name, value in options.items() if name not in set_already}


def retries(in_force: Mapping[str, Any]) -> tuple[int, float, float]:
    """How often a server is asked again, seconds between, and the seconds of silence that are an error.

    Args:
        in_force: options of GDAL that are set; for others HTTP_OPTIONS count.
    """
    names = ("GDAL_HTTP_MAX_RETRY", "GDAL_HTTP_RETRY_DELAY", "GDAL_HTTP_LOW_SPEED_TIME")
    number, pause_s, silent_s = (float(in_force.get(name, HTTP_OPTIONS[name])) for name in names)
    return int(number), pause_s, silent_s


def is_remote(path: str) -> bool:
    """Whether a path leads to a server."""
    return path.startswith(_REMOTE_STARTS)


def is_virtual(path: str) -> bool:
    """Whether GDAL, not the file system, resolves a path."""
    return path.startswith("/vsi") or ":" in path[2:] or path.lstrip().startswith(("<", "{"))


def one_line(error: BaseException) -> str:
    """Message of an error on one line; rasterio keeps GDAL's reason in ``__cause__``."""
    texts = [str(error)]
    if error.__cause__ is not None and str(error.__cause__) not in texts[0]:
        texts.append(str(error.__cause__))
    return " ".join(" ".join(texts).split()) or type(error).__name__
