"""Put a trained run into the package: the model file that detects, and its safetensors twin to fine-tune from.

    python -m data_tools.bundle_model runs/sen2ships_r

Card, metrics and thresholds come from the recipe of the run's name as it stands now, so that measures made after the
training travel with the weights.
"""

from __future__ import annotations

from pathlib import Path

import click

from rtmdet_geo.catalog import CATALOG
from rtmdet_geo.config import load_recipe
from rtmdet_geo.export import export_model
from rtmdet_geo.models.weights import build_from_weights, save_weights
from rtmdet_geo.training.task import make_spec


@click.command(help=__doc__.splitlines()[0])
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
def main(run: Path) -> None:
    """Run the command line."""
    network, trained = build_from_weights(run / "model.safetensors")
    entry = CATALOG[trained.name]
    recipe = load_recipe(trained.name)
    spec = make_spec(recipe).model_copy(update={"metrics": recipe.card.metrics})
    if (spec.architecture, spec.classes, spec.bands, spec.stretch, spec.mean, spec.std, spec.gsd_m) != (
        *(
            trained.architecture,
            trained.classes,
            trained.bands,
            trained.stretch,
            trained.mean,
            trained.std,
            trained.gsd_m,
        ),
    ):
        raise click.ClickException(f"{run} was trained by another recipe than {trained.name} is now")
    save_weights(network, entry.weights_path, spec, half=True)
    export_model(entry.weights_path, entry.path, half_weights=True, overwrite=True)
    for path in (entry.path, entry.weights_path):
        click.echo(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
