"""Make ``banepa_west.tif`` from a copy of the Banepa chips of OpenAerialMap.

Run ``python tests/data/make_banepa.py FOLDER`` where FOLDER holds the chips ``OAM-386690-220241-19.tif`` and on. The
three northern chips of the western column are put together and compressed as JPEG again; nothing else is changed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import rasterio
from rasterio.merge import merge

HERE = Path(__file__).parent
CHIPS = [f"OAM-386690-{row}-19.tif" for row in (220241, 220242, 220243)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    pixels, transform = merge([folder / name for name in CHIPS])
    with rasterio.open(folder / CHIPS[0]) as chip:
        crs = chip.crs
    profile = {"driver": "GTiff", "count": 3, "dtype": "uint8", "height": pixels.shape[1], "width": pixels.shape[2]}
    profile |= {"crs": crs, "transform": transform, "tiled": True, "blockxsize": 256, "blockysize": 256}
    profile |= {"compress": "JPEG", "photometric": "YCBCR", "jpeg_quality": 85}
    with rasterio.open(HERE / "banepa_west.tif", "w", **profile) as scene:
        scene.write(pixels)
        scene.update_tags(
            TIFFTAG_IMAGEDESCRIPTION="Banepa, Nepal. Imagery: OpenAerialMap contributors (producer HOTOSM), CC-BY-4.0"
        )


if __name__ == "__main__":
    main()
