"""Cut the real tiles that `rtmdet-geo export` compares files on out of the scenes in tests/data.

    python -m data_tools.make_check_tiles

Each is what the bundled model for such scenes sees: bands chosen, stretched, at its resolution.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np

from rtmdet_geo.catalog import CATALOG, read_spec
from rtmdet_geo.export.tiles import CHECK_TILES, open_for_model
from rtmdet_geo.outputs import staged_output

#: Scene, model whose eyes it is seen through, and where the tile lies, in px of the model's resolution: many objects.
TILES = (("casablanca", "sen2ships_r", 192, 384), ("banepa_west", "banepa_ins", 96, 384))
SIDE = 192


@click.command(help=__doc__.splitlines()[0])
def main() -> None:
    """Run the command line."""
    arrays: dict[str, np.ndarray] = {}
    for name, model, x, y in TILES:
        spec = read_spec(CATALOG[model].path)
        with open_for_model(Path("tests/data") / f"{name}.tif", spec) as scene:
            arrays[name] = scene.read(x, y, SIDE, SIDE)[0][None]
        arrays[f"{name}_bands"] = np.array(spec.bands)
    with staged_output(CHECK_TILES) as staged:
        np.savez_compressed(staged, **arrays)
    click.echo(f"{CHECK_TILES}: {CHECK_TILES.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
