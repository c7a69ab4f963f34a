"""Score weights on labelled scenes that were kept out of their training.

python -m data_tools.score_weights sen2ships_r --scene casablanca --csv table.csv
"""

from __future__ import annotations

import csv
from pathlib import Path

import click

from rtmdet_geo.catalog import find_weights
from rtmdet_geo.config import load_recipe
from rtmdet_geo.models.weights import build_from_weights
from rtmdet_geo.training.chips import load_chips
from rtmdet_geo.training.validate import validate

COLUMNS = ("weights_sha256", "scenes", "class", "bands", "iou", "ap", "best_f1", "best_score", "num_objects")


@click.command(help=__doc__.splitlines()[0])
@click.argument("weights", metavar="NAME|PATH")
@click.option("--recipe", help="Recipe with bands, thresholds and chips; default: the one the weights were trained by.")
@click.option("--scene", "scenes", multiple=True, required=True, help="Scene to score; repeat.")
@click.option("--data", help="Folder of chips; default as the recipe says.")
@click.option("--csv", "table", type=click.Path(path_type=Path), required=True, help="Table to write.")
def main(weights: str, recipe: str | None, scenes: tuple[str, ...], data: str | None, table: Path) -> None:
    """Run the command line."""
    network, spec = build_from_weights(find_weights(weights))
    settings = load_recipe(recipe or spec.name)
    chips = [chip for chip in load_chips(Path(data or settings.data.chips), settings.model) if chip.scene in scenes]
    missing = set(scenes) - {chip.scene for chip in chips}
    if missing:
        raise click.ClickException(f"no chips of {', '.join(sorted(missing))}")
    rows = validate(network, chips, settings).rows
    with table.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        for row in rows:
            numbers = {name: round(row[name], 4) for name in ("ap", "best_f1", "best_score")}
            writer.writerow(row | numbers | {"weights_sha256": spec.weights_sha256[:16], "scenes": "+".join(scenes)})
            click.echo(f"{row['class']}, {row['bands']}: {row['measure']} {row['ap']:.4f}  F1 {row['best_f1']:.4f}")


if __name__ == "__main__":
    main()
