"""Labelled scenes that bundled models are scored on: ports of sen2ships, columns of Banepa; any engine runs over them.

Search and protocol are those of training's validation (:mod:`rtmdet_geo.training.validate`), with an engine in place of
a network: tiles of the model's size, scores from .05 on, border rule, NMS by boxes, area under the curve.
"""

from __future__ import annotations

import numpy as np

#: Scenes of a model in two halves: what is fitted to one is scored on the other. Casablanca and the western column of
#: Banepa were in no training.
HALVES = {
    "sen2ships_r": (
        ("algiers", "busan", "casablanca", "gdynia", "klang"),
        ("athens", "cartagena", "hedland", "marseille", "valencia"),
    ),
    "banepa_ins": (("banepa_386690",), ("banepa_386691", "banepa_386692")),
}
LEFT_OUT = {"sen2ships_r": "casablanca", "banepa_ins": "banepa_386690"}
#: Tiles that ranges of int8 files are taken from, spread over some scenes.
NUM_CALIBRATION = 24


def load_scenes(model, data, folder):
    """Cut each labelled scene into one chip; return the model's recipe and the chips by the scene's name.

    Args:
        model: name of a bundled model.
        data: folder of the real scenes (``RTMDET_DATA``).
        folder: where chips may be written.
    """
    from rtmdet_geo.config import load_recipe
    from rtmdet_geo.gis_labels import cut_chips
    from rtmdet_geo.training.chips import load_chips

    recipe = load_recipe(model)
    if model == "sen2ships_r":
        scenes, labels = sorted((data / "sen2ships").glob("*.tif")), data / "sen2ships" / "annotations.json"
    else:
        scenes = [make_mosaic(data, column, folder) for column in sum(HALVES[model], ())]
        labels = next((data / "banepa").glob("*.geojson"))
    section = recipe.model
    cut_chips(
        scenes,
        labels,
        folder / model,
        model_bands=section.bands,
        optional_bands=section.optional_bands,
        stretch=section.stretch,
        gsd_m=section.gsd_m,
        classes=section.classes,
        chip_size=0,
    )
    return recipe, {chip.scene: chip for chip in load_chips(folder / model, section)}


def make_mosaic(data, column, folder):
    """Write a column of Banepa's pictures as one scene; return its path."""
    import rasterio

    pictures = sorted((data / "banepa" / "oam").glob(f"OAM-{column.removeprefix('banepa_')}-*.tif"))  # north first
    parts, transforms = [], []
    for path in pictures:
        with rasterio.open(path) as dataset:
            parts.append(dataset.read())
            transforms.append(dataset.transform)
    pixels = np.concatenate(parts, axis=1)
    profile = {"driver": "GTiff", "count": 3, "dtype": "uint8", "height": pixels.shape[1], "width": pixels.shape[2]}
    path = folder / f"{column}.tif"
    with rasterio.open(path, "w", **profile, crs="EPSG:4326", transform=transforms[0], photometric="RGB") as scene:
        scene.write(pixels)
    return path


class ChipScene:
    """A chip in the place of a scene that was opened for a model."""

    def __init__(self, chip):
        self.chip, self.path = chip, chip.scene
        self.width, self.height = chip.width, chip.height

    def read(self, x, y, width, height):
        """Return pixels (C, height, width), and that all are valid."""
        return np.ascontiguousarray(self.chip.pixels[:, y : y + height, x : x + width]), np.ones((height, width), bool)


def grid_of(chip, recipe):
    """Return the tiles of a chip."""
    from rtmdet_geo.tiles import TileGrid

    return TileGrid(chip.width, chip.height, recipe.model.tile_size, recipe.model.overlap)


def calibration_tiles(chips, recipe):
    """Return the tiles that an int8 file is calibrated on, (1, C, H, W) each, as an engine gets them."""
    from rtmdet_geo.views import pad

    tiles = []
    for chip in chips:
        grid, scene = grid_of(chip, recipe), ChipScene(chip)
        for tile in grid:
            pixels, _ = scene.read(tile.x, tile.y, tile.width, tile.height)
            tiles.append(pad(pixels, grid.padded_shape(32))[None])
    return tiles[:: max(len(tiles) // NUM_CALIBRATION, 1)][:NUM_CALIBRATION]


def search(engine, chip, recipe, batch_size=1):
    """Return what an engine finds in a chip: merged detections, best first."""
    from rtmdet_geo.merge import merge_survivors
    from rtmdet_geo.tile_loop import TileSettings, run_tiles

    section, grid = recipe.validation, grid_of(chip, recipe)
    settings = TileSettings.of(
        engine,
        score_threshold=section.score_threshold,
        iou_threshold=section.nms_iou_threshold,
        mask_threshold=section.mask_threshold,
        tile_size=recipe.model.tile_size,
        overlap=recipe.model.overlap,
        batch_size=batch_size,
        multi_label=True,
    )
    results = run_tiles(ChipScene(chip), grid, engine, settings)
    merged = merge_survivors(
        results.parts, grid, iou_threshold=section.nms_iou_threshold, max_overlap=1, kind=engine.spec.object_kind
    ).detections
    return merged.select(np.arange(min(len(merged), section.max_detections)))


def average_precision(chips, found, kind, iou=0.5):
    """Return average precision over chips and the number of objects; of masks where the model gives such.

    Args:
        chips: labelled.
        found: what :func:`search` found in each.
        kind: of the model.
        iou: from which on a detection is a hit.
    """
    from rtmdet_geo.evaluation.masks import mask_iou
    from rtmdet_geo.evaluation.rotated import match_images
    from rtmdet_geo.masks import crop_outline
    from rtmdet_geo.stitch import outlines_of
    from rtmdet_geo.training.validate import chip_masks, chip_truths

    overlaps = None
    if kind == "mask":
        overlaps = []
        for chip, detections in zip(chips, found, strict=True):
            outlines = outlines_of(detections)
            masks = [] if outlines is None else [crop_outline(item, chip.width, chip.height) for item in outlines]
            overlaps.append(mask_iou(masks, chip_masks(chip)))
    curve = match_images(found, chip_truths(chips, kind), label=0, overlaps=overlaps).curve(iou)
    return curve.average_precision, curve.num_objects
