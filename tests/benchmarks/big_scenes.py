"""Scenes of any size for benchmarks, made of the committed one of Casablanca: mirrored, repeated, with fresh noise.

They are uint8 red, green and blue at the ground sample distance of the bundled model of ships, as GeoTIFF or COG, or as
a VRT that repeats one GeoTIFF. Runs over them state that distance (``gsd``), for UTM's scale would move it by 0.04 %.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np

CASABLANCA = Path(__file__).parents[1] / "data" / "casablanca.tif"
GSD_M = 4.0
NOISE = 2  # largest change of a value, so that no two blocks of a file are alike
BLOCK = 512
CRS = "EPSG:32629"
ORIGIN = (500_000.0, 3_720_000.0)


def texture():
    """Return Casablanca as the model sees it, uint8 (3, h, w)."""
    from rtmdet_geo.errors import ResolutionWarning
    from rtmdet_geo.raster import open_scene

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResolutionWarning)  # Sentinel-2 is coarse for the model
        scene = open_scene(CASABLANCA, model_gsd_m=GSD_M)
    with scene:
        return scene.read(0, 0, scene.width, scene.height)[0]


def write_geotiff(path, width, height):
    """Write a GeoTIFF of 512 px blocks, deflate."""
    import rasterio
    from rasterio.transform import Affine
    from rasterio.windows import Window

    image, generator = texture(), np.random.default_rng(0)
    columns = mirrored(width, image.shape[2])
    profile = {"driver": "GTiff", "dtype": "uint8", "count": 3, "width": width, "height": height, "crs": CRS}
    profile |= {"tiled": True, "blockxsize": BLOCK, "blockysize": BLOCK, "compress": "deflate", "interleave": "pixel"}
    transform = Affine(GSD_M, 0, ORIGIN[0], 0, -GSD_M, ORIGIN[1])
    with rasterio.open(path, "w", transform=transform, photometric="RGB", num_threads="all_cpus", **profile) as target:
        for y in range(0, height, BLOCK):
            rows = mirrored(min(BLOCK, height - y), image.shape[1], y)
            part = image[:, rows][:, :, columns].astype(np.int16)
            part += generator.integers(-NOISE, NOISE + 1, part.shape, dtype=np.int16)
            target.write(part.clip(0, 255).astype(np.uint8), window=Window(0, y, width, len(rows)))


def write_cog(path, width, height):
    """Write a cloud-optimised GeoTIFF with overviews."""
    import rasterio.shutil

    plain = Path(path).with_suffix(".plain.tif")
    write_geotiff(plain, width, height)
    rasterio.shutil.copy(plain, path, driver="COG", compress="deflate", blocksize=BLOCK, num_threads="all_cpus")
    plain.unlink()


def write_vrt(path, width, height, tile, side):
    """Write a mosaic of one GeoTIFF ``tile`` of ``side`` px, which is cut at the right and lower edge."""
    colours, bands = ("Red", "Green", "Blue"), []
    for number, colour in enumerate(colours, 1):
        sources = [
            f'<SimpleSource><SourceFilename relativeToVRT="0">{tile}</SourceFilename>'
            f"<SourceBand>{number}</SourceBand>"
            f'<SourceProperties RasterXSize="{side}" RasterYSize="{side}" DataType="Byte" '
            f'BlockXSize="{BLOCK}" BlockYSize="{BLOCK}"/>'
            f'<SrcRect xOff="0" yOff="0" xSize="{min(side, width - x)}" ySize="{min(side, height - y)}"/>'
            f'<DstRect xOff="{x}" yOff="{y}" xSize="{min(side, width - x)}" ySize="{min(side, height - y)}"/>'
            "</SimpleSource>"
            for y in range(0, height, side)
            for x in range(0, width, side)
        ]
        bands.append(
            f'<VRTRasterBand dataType="Byte" band="{number}"><ColorInterp>{colour}</ColorInterp>{"".join(sources)}'
            "</VRTRasterBand>"
        )
    transform = f"{ORIGIN[0]}, {GSD_M}, 0, {ORIGIN[1]}, 0, {-GSD_M}"
    Path(path).write_text(
        f'<VRTDataset rasterXSize="{width}" rasterYSize="{height}"><SRS>{CRS}</SRS>'
        f"<GeoTransform>{transform}</GeoTransform>{''.join(bands)}</VRTDataset>",
        encoding="utf-8",
    )


def mirrored(number, size, start=0):
    """Return which of ``size`` pixels come at ``start`` and after, there and back again and again."""
    place = np.arange(start, start + number) % (2 * size)
    return np.where(place < size, place, 2 * size - 1 - place)
