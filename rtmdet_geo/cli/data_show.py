"""``rtmdet-geo data show``: labels drawn into their images."""

from __future__ import annotations

from pathlib import Path

import click

from rtmdet_geo.cli import options, report
from rtmdet_geo.cli.data_source import SourceOptions, source_options


@click.command()
@source_options
@options.output_option("PNG file to write.")
@click.option("-n", "--number", type=click.IntRange(1, 400), default=16, show_default=True, help="Images to draw.")
@click.option("--only", multiple=True, metavar="CLASS", help="Draw images that show this class; repeat.")
@click.option(
    "--crop",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Show a square of so many px around one of the objects; 0: whole images.",
)
@click.option(
    "--size",
    type=click.IntRange(64, 2048),
    default=384,
    show_default=True,
    help="Long side of an image on the sheet, px.",
)
@click.option(
    "--kind",
    type=click.Choice(["rotated", "horizontal", "mask"]),
    help="What to draw: rotated boxes, the boxes around them, or outlines.  [default: what the labels hold]",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Same seed, same images.")
@options.overwrite_option
@options.json_option
@options.progress_option
@options.verbosity_options
@click.pass_context
def show(
    ctx: click.Context,
    source: SourceOptions,
    output: Path,
    number: int,
    only: tuple[str, ...],
    crop: int,
    size: int,
    kind: str | None,
    seed: int,
    overwrite: bool,
    as_json: bool,
    progress_mode: str,
) -> None:
    """Draw labels of RECIPE's data, or of a folder's, into a contact sheet of some images.

    \b
    Example:
      rtmdet-geo data show --format chips --images chips/sen2ships --crop 300 -o sheet.png
      rtmdet-geo data show --format dota --images train/images --labels train/labelTxt --only ship -o ships.png

    Rotated boxes and outlines have the colour of their class; what is marked difficult, crowd or to be ignored is
    grey, objects of unknown classes are white.
    """
    options.check_stdout_owner(as_json, progress_mode)
    if output.suffix.lower() != ".png":
        raise click.UsageError(f"-o {output} must end with .png.")
    from rtmdet_geo.contact_sheet import show_data
    from rtmdet_geo.outputs import check_not_among

    parts, _ = source.parts()
    check_not_among(output, source.places(parts))
    with report.progress(ctx, progress_mode, "images", {"recipe": source.recipe, "out": str(output)}) as advance:
        summary = show_data(
            parts,
            output,
            number=number,
            classes=only,
            crop_px=crop,
            cell_px=size,
            kind=kind,  # type: ignore[arg-type]
            seed=seed,
            overwrite=overwrite,
            progress=advance,
        )
    if as_json:
        report.echo_json(summary)
    elif progress_mode == "jsonl":
        report.emit_event(ctx, {"event": "done", **summary})
    elif report.verbosity(ctx) >= 0:
        click.echo(f"{summary['out']}: {len(summary['images'])} images, {sum(summary['objects'].values())} objects")
