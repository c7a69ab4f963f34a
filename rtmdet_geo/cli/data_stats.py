"""``rtmdet-geo data stats``: what a data set holds."""

from __future__ import annotations

from pathlib import Path

import click

from rtmdet_geo.cli import options, report
from rtmdet_geo.cli.data_source import SourceOptions, source_options


@click.command()
@source_options
@click.option(
    "--gsd",
    type=click.FloatRange(min=0, min_open=True),
    help="Metres per pixel of all images.  [default: what chips and GeoTIFFs say]",
)
@click.option("--csv", type=click.Path(path_type=Path), help="Write the table to this file as well.")
@click.option("--plots", type=click.Path(path_type=Path), help="Folder for charts: classes.png and objects.png.")
@options.overwrite_option
@options.json_option
@options.progress_option
@options.verbosity_options
@click.pass_context
def stats(
    ctx: click.Context,
    source: SourceOptions,
    gsd: float | None,
    csv: Path | None,
    plots: Path | None,
    overwrite: bool,
    as_json: bool,
    progress_mode: str,
) -> None:
    """Count and measure the objects of RECIPE's data, or of a folder's; no image is decoded.

    \b
    Example:
      rtmdet-geo data stats --format chips --images chips/sen2ships
      rtmdet-geo data stats --format dota --images train/images --labels train/labelTxt --plots charts

    By class: objects, images that have some, the long side in px (5th percentile, median, 95th), the short side, long
    over short side; in metres where chips or GeoTIFFs know their resolution, or --gsd says it. By part: sizes of
    images, objects an image and per million px, angles of elongated objects. Objects that training leaves out are left
    out here.
    """
    options.check_stdout_owner(as_json, progress_mode)
    from rtmdet_geo.dataset_stats import check_stats_outputs, data_stats, stats_summary, stats_text, write_stats

    parts, _ = source.parts()
    check_stats_outputs(csv=csv, plots=plots, overwrite=overwrite, sources=source.places(parts))
    with report.progress(ctx, progress_mode, "images", {"recipe": source.recipe, "parts": list(parts)}) as advance:
        found = data_stats(parts, gsd_m=gsd, progress=advance)
    written = write_stats(found, csv=csv, plots=plots, overwrite=overwrite)
    if as_json:
        report.echo_json(stats_summary(found))
    elif progress_mode == "jsonl":
        report.emit_event(ctx, {"event": "done", **stats_summary(found)})
    else:
        click.echo(stats_text(found))
    if written and report.verbosity(ctx) >= 0:
        report.echo(ctx, f"wrote {', '.join(str(path) for path in written)}")
