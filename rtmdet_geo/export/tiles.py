"""Tiles on which an exported file is compared with what it came from: real ones and drawn ones. No torch.

Real tiles come with the package (a port in a Sentinel-2 scene, houses in an aerial orthophoto) or are cut out of the
user's scenes and pictures as the model sees them. What the shipped ones show and whose they are: NOTICE.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.catalog import ASSETS
from rtmdet_geo.errors import ConfigError, NotGeoreferencedWarning, RasterError, ResolutionWarning
from rtmdet_geo.pictures import IMAGE_SUFFIXES
from rtmdet_geo.structures import ModelSpec
from rtmdet_geo.tiles import TileGrid
from rtmdet_geo.views import pad

if TYPE_CHECKING:
    from rtmdet_geo.scene import Scene

#: uint8 (N, bands, h, w) of each scene, and the names of its bands under ``NAME_bands``.
CHECK_TILES = ASSETS / "check_tiles.npz"
#: So many tiles at most are taken from each file.
TILES_PER_FILE = 4


def shipped_tiles(spec: ModelSpec, side: int | None) -> list[NDArray[np.uint8]]:
    """Return the package's real tiles as a model wants them.

    Bands go by their names. One that a scene lacks gets the model's own fill, or where it has none another band: what
    the picture shows is of no account, that it looks like one is.

    Args:
        spec: of the model.
        side: of the tiles in px, beyond which they are mirrored; None leaves them as they are, multiples of 32 px.

    Returns:
        (C, side, side) uint8 each.
    """
    tiles = []
    with np.load(CHECK_TILES) as file:
        scenes = [name for name in file.files if not name.endswith("_bands")]
        for scene in scenes:
            bands = [str(band) for band in file[f"{scene}_bands"]]
            for picture in file[scene]:
                tile = np.stack([_channel(picture, bands, spec, number) for number in range(len(spec.bands))])
                tiles.append(tile if side is None else _to_side(tile, side))
    return tiles


def _channel(picture: NDArray[np.uint8], bands: list[str], spec: ModelSpec, number: int) -> NDArray[np.uint8]:
    band = spec.bands[number]
    channel: NDArray[np.uint8] = picture[bands.index(band) if band in bands else number % len(picture)]
    if band not in bands and band in spec.optional_bands:
        return np.full_like(channel, spec.optional_bands[band])
    return channel


def _to_side(tile: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    missing = [max(0, side - length) for length in tile.shape[1:]]
    grown = np.pad(tile, [(0, 0), *[(0, length) for length in missing]], mode="symmetric")
    return np.ascontiguousarray(grown[:, :side, :side])


def cut_tiles(paths: Sequence[str | os.PathLike[str]], spec: ModelSpec, side: int) -> Iterator[NDArray[np.uint8]]:
    """Yield tiles of scenes and pictures as detection would show them to a model, at most TILES_PER_FILE of each.

    Args:
        paths: files that GDAL opens, or folders of such.
        spec: of the model; bands, stretch and resolution are its.
        side: of the tiles in px; what is smaller is padded.

    Yields:
        (C, side, side) uint8 each; tiles without a valid pixel are left out.

    Raises:
        RasterError, BandError, ResolutionError: a file cannot be read as the model needs it.
        ConfigError: a folder holds no picture.
    """
    for path in _files(paths):
        with open_for_model(path, spec) as scene:
            grid = TileGrid(scene.width, scene.height, side, 0)
            for index in np.unique(np.linspace(0, len(grid) - 1, TILES_PER_FILE).round().astype(int)):
                tile = grid[int(index)]
                pixels, valid = scene.read(tile.x, tile.y, tile.width, tile.height)
                if valid.any():
                    yield pad(pixels, (side, side))


def open_for_model(path: str | os.PathLike[str], spec: ModelSpec) -> Scene:
    """Open a scene or picture as a model sees it; that it lies nowhere on the ground, or is coarser, is no news.

    Raises:
        RasterError, BandError, ResolutionError: it cannot be read as the model needs it.
    """
    from rtmdet_geo.raster import open_scene

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        warnings.simplefilter("ignore", ResolutionWarning)
        return open_scene(
            Path(path),
            model_bands=spec.bands,
            optional_bands=spec.optional_bands,
            stretch=spec.stretch,
            model_gsd_m=spec.gsd_m,
            trained_gsd_m=spec.trained_gsd_m,
        )


def check_files(paths: Sequence[str | os.PathLike[str]]) -> None:
    """Look whether files and folders that tiles are to be cut from are there.

    Raises:
        RasterError: one is not.
    """
    for path in paths:
        if not Path(path).exists():
            raise RasterError(f"{os.fspath(path)!r} is not there; give a scene, a picture or a folder of them")


def _files(paths: Sequence[str | os.PathLike[str]]) -> Iterator[Path]:
    check_files(paths)
    for given in map(Path, paths):
        if not given.is_dir():
            yield given
            continue
        inside = sorted(item for item in given.iterdir() if item.suffix.lower() in IMAGE_SUFFIXES and item.is_file())
        if not inside:
            raise ConfigError(
                f"no pictures in {str(given)!r}: it should hold {', '.join(sorted(IMAGE_SUFFIXES))} files"
            )
        yield from inside


def make_check_tiles(number: int, channels: int, side: int, *, seed: int) -> NDArray[np.uint8]:
    """Return uint8 (number, channels, side, side) tiles that look like scenes: smooth ground, bright blobs, noise."""
    generator = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:side, 0:side].astype(np.float32)
    tiles = np.empty((number, channels, side, side), np.float32)
    for index in range(number):
        slope = generator.normal(0, 40 / side, 2)
        ground = 45 + slope[0] * (rows - side / 2) + slope[1] * (columns - side / 2)
        for _ in range(12):
            x, y = generator.uniform(0, side, 2)
            long_px, short_px = generator.uniform(6, 24), generator.uniform(2, 6)
            angle = generator.uniform(0, np.pi)
            along = (columns - x) * np.cos(angle) + (rows - y) * np.sin(angle)
            across = (rows - y) * np.cos(angle) - (columns - x) * np.sin(angle)
            ground = ground + 150 * ((np.abs(along) < long_px) & (np.abs(across) < short_px))
        gains = generator.uniform(0.7, 1.3, (channels, 1, 1))
        tiles[index] = ground * gains + generator.normal(0, 4, (channels, side, side))
    return tiles.clip(0, 255).astype(np.uint8)
