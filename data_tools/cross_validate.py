"""Train one network per fold of a recipe and score all left-out scenes together.

    python -m data_tools.cross_validate configs/sen2ships_r.yaml --out runs/cv --csv table.csv

A fold whose run is finished is not trained again; one that was broken off goes on from its checkpoint.
"""

from __future__ import annotations

import csv
import datetime
import logging
import os
import platform
from itertools import product
from pathlib import Path
from typing import Any

import click
import torch

from rtmdet_geo.config import Recipe, load_recipe
from rtmdet_geo.errors import ConfigError
from rtmdet_geo.evaluation.rotated import precision_recall
from rtmdet_geo.models.weights import build_from_weights
from rtmdet_geo.training.chips import load_chips, split_chips
from rtmdet_geo.training.loop import CHECKPOINT, train_model
from rtmdet_geo.training.search import find_objects
from rtmdet_geo.training.validate import average_of, chip_truths, mask_overlaps

COLUMNS = (
    "recipe", "model", "parameters", "iterations", "scene", "class", "bands", "iou", "ap", "best_f1", "best_score",
    "objects", "cpu", "torch", "date",
)  # fmt: skip


def train_folds(recipe_path: str, overrides: tuple[str, ...], out: Path, data: str | None) -> dict[str, Recipe]:
    """Train the folds that are not finished. Returns the recipe of each fold.

    Raises:
        ConfigError: a finished run is of another recipe; what only scoring uses may differ.
    """
    recipes = {}
    for fold in load_recipe(recipe_path).data.folds:
        recipe = load_recipe(recipe_path, [*overrides, f"data.fold={fold}"])
        run = out / fold
        if not (run / "model.safetensors").is_file():
            train_model(recipe, run, data=data, resume=(run / CHECKPOINT).is_file(), overwrite=True)
        elif _what_trains(load_recipe(run / "recipe.yaml")) != _what_trains(recipe):
            raise ConfigError(f"{str(run)!r} holds a run of another recipe; name another --out or remove it")
        recipes[fold] = recipe
    return recipes


def _what_trains(recipe: Recipe) -> dict[str, Any]:
    """Everything of a recipe that its weights depend on."""
    values = recipe.model_dump(exclude={"card": True, "validation": {"score_threshold", "iou_thresholds", "protocol"}})
    for name in ("score_threshold", "trained_gsd_m"):
        del values["model"][name]
    return values


def pooled_rows(recipes: dict[str, Recipe], out: Path, data: str | None) -> list[dict[str, object]]:
    """Score every left-out scene with the network that never saw it: rows per scene and for all scenes together.

    Raises:
        ConfigError: the protocol is COCO's, which has no scenes.
    """
    first = next(iter(recipes.values()))
    if first.validation.protocol == "coco":
        raise ConfigError("scenes are scored by validation.protocol area or voc07, not coco")
    chips = load_chips(Path(data or first.data.chips), first.model)
    facts = {
        "recipe": first.name,
        "model": first.model.name,
        "iterations": first.optim.iterations,
        "cpu": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": str(torch.__version__),
        "date": datetime.date.today().isoformat(),
    }
    rows: list[dict[str, object]] = []
    for dropped in first.validation.drop_bands:
        found, searched = [], []
        for fold, recipe in recipes.items():
            network, _ = build_from_weights(out / fold / "model.safetensors")
            network.eval()
            facts["parameters"] = sum(parameter.numel() for parameter in network.parameters())
            for chip in split_chips(chips, recipe)[1]:
                found.append(find_objects(network, chip, recipe, dropped=dropped))
                searched.append(chip)
        scenes = [chip.scene for chip in searched]
        truths = chip_truths(searched, first.model.kind)
        overlaps = mask_overlaps(found, searched) if first.model.kind == "mask" else None
        bands = "+".join(band for band in first.model.bands if band not in dropped)
        groups = {"all left-out": range(len(scenes))} | {scene: [index] for index, scene in enumerate(scenes)}
        for (name, members), (label, class_name) in product(groups.items(), enumerate(first.model.classes)):
            for iou in first.validation.iou_thresholds:
                curve = precision_recall(
                    [found[index].detections for index in members],
                    [truths[index] for index in members],
                    label=label,
                    iou_threshold=iou,
                    overlaps=None if overlaps is None else [overlaps[index] for index in members],
                )
                f1, score = curve.best_f1
                rows.append(
                    facts
                    | {
                        "scene": name,
                        "class": class_name,
                        "bands": bands,
                        "iou": iou,
                        "ap": round(average_of(curve, first.validation.protocol), 4),
                    }
                    | {"best_f1": round(f1, 4), "best_score": round(score, 3), "objects": curve.num_objects}
                )
    return rows


@click.command(help=__doc__.splitlines()[0])
@click.argument("recipe")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the runs, one per fold.")
@click.option("--csv", "table", type=click.Path(path_type=Path), help="Table to write; default OUT/table.csv.")
@click.option("--data", help="Folder of chips; default as the recipe says.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a value of the recipe.")
def main(recipe: str, out: Path, table: Path | None, data: str | None, overrides: tuple[str, ...]) -> None:
    """Run the command line."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    recipes = train_folds(recipe, overrides, out, data)
    rows = pooled_rows(recipes, out, data)
    path = table or out / "table.csv"
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        click.echo(
            f"{row['scene']:>14}  {row['bands']:<20} IoU {row['iou']:.2f}  AP {row['ap']:.4f}  F1 {row['best_f1']}"
        )


if __name__ == "__main__":
    main()
