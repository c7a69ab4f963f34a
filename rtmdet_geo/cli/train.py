"""``rtmdet-geo train``: a recipe in, trained weights out."""

from __future__ import annotations

import os
from pathlib import Path

import click

from rtmdet_geo.cli import options, report


@click.command()
@click.argument("recipe", metavar="RECIPE")
@options.output_option("Folder of the run.  [default: runs/NAME of the recipe]", required=False)
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a value, such as optim.lr=1e-3; repeat."
)
@click.option("--show-config", is_flag=True, help="Print the whole recipe as YAML and stop.")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="Folder of chips, or of the data set.  [default: the recipe's data.chips or data.root]",
)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, or auto: cuda if there is one.")
@click.option("--resume", is_flag=True, help="Go on from the run folder's last checkpoint.")
@click.option("--overwrite", is_flag=True, help="Begin anew in a folder that already holds a run.")
@options.json_option
@options.progress_option
@options.verbosity_options
@click.pass_context
def train(
    ctx: click.Context,
    recipe: str,
    output: Path | None,
    overrides: tuple[str, ...],
    show_config: bool,
    data: Path | None,
    device: str,
    resume: bool,
    overwrite: bool,
    as_json: bool,
    progress_mode: str,
) -> None:
    """Train by RECIPE: the name of a recipe that comes with the package, or a YAML file.

    \b
    Example:
      rtmdet-geo train sen2ships_r -o runs/mine --set optim.iterations=2000

    model.weights names weights to start from: published ones or a bundled model (`rtmdet-geo models list`), or a file.
    They must fit exactly; model.weights_parts=[backbone] takes a part of them, model.transfer=true fits them to other
    classes and bands.

    \b
    Several GPUs or processes, each with a batch of its own:
      torchrun --nproc-per-node 8 -m rtmdet_geo.cli train coco_det --set model.name=rtmdet_m

    Ctrl-C and SIGTERM save a checkpoint; --resume goes on from it. The run folder gets report.html at the end.
    """
    options.check_stdout_owner(as_json, progress_mode)
    if resume and overwrite:
        raise click.UsageError("--resume goes on and --overwrite begins anew; choose one.")

    from rtmdet_geo.config import load_recipe

    loaded = load_recipe(recipe, overrides)
    if show_config:
        click.echo(loaded.to_yaml(), nl=False)
        return
    folder = output if output is not None else Path("runs") / loaded.name

    from rtmdet_geo.backends import require_package

    require_package("torch", extra="train")
    from rtmdet_geo.training.loop import train_model

    start = {"recipe": loaded.name, "out": str(folder)}
    is_first = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun started
    if not is_first:
        as_json, progress_mode = False, "none"
    with (
        report.signals_are_polled(),
        report.progress(ctx, progress_mode, "train", start) as advance,
    ):
        summary = train_model(
            loaded,
            folder,
            data=data,
            device=device,
            resume=resume,
            overwrite=overwrite,
            progress=advance,
            cancelled=report.cancel_requested.is_set,
        )
    if not is_first:
        return
    if as_json:
        report.echo_json(summary)
    elif progress_mode == "jsonl":
        report.emit_event(ctx, {"event": "done", **summary})
    elif report.verbosity(ctx) >= 0:
        known = [(name, value) for name, value in summary["figures"].items() if value is not None and value == value]
        figures = "".join(f", {name} {value:.3f}" for name, value in known[:4])
        early = f" of {summary['planned_iterations']}" if summary["iterations"] < summary["planned_iterations"] else ""
        steps = f"{summary['iterations']}{early} iterations in {summary['seconds']:.0f} s"
        click.echo(f"{summary['weights']}: {steps}{figures}")
