"""``rtmdet-geo info``: what the program sees in a scene or a model file."""

from __future__ import annotations

from typing import Any

import click

from rtmdet_geo.cli import options, report


@click.command()
@click.argument("scene_or_model", metavar="SCENE|MODEL")
@options.json_option
@options.verbosity_options
def info(scene_or_model: str, as_json: bool) -> None:
    """Say what the program sees in a scene (bands, resolution, CRS) or knows of a model.

    A MODEL is any name of `rtmdet-geo models list` or a model file; `rtmdet-geo models show` prints the same.

    \b
    Example:
      rtmdet-geo info scene.tif
    """
    from rtmdet_geo.cli.models import is_model, show_model

    if is_model(scene_or_model):
        show_model(scene_or_model, as_json)
        return
    from rtmdet_geo.raster import describe_scene

    facts = describe_scene(scene_or_model)
    if as_json:
        report.echo_json(facts)
    else:
        click.echo(format_facts(facts))


def format_facts(facts: dict[str, Any]) -> str:
    """Return the facts of ``raster.describe_scene`` as lines ``name   value``."""
    gsd_x, gsd_y = facts["gsd_x_m"], facts["gsd_y_m"]
    rows = [
        ("scene", f"{facts['path']} ({facts['driver']})"),
        ("size", f"{facts['width']} x {facts['height']} px"),
        ("CRS", facts["crs"] or "none: results will be in pixels"),
        ("resolution", f"{gsd_x:.3f} x {gsd_y:.3f} m per pixel on the ground" if gsd_x else "unknown: give --gsd"),
        ("bounds", " ".join(f"{value:.6f}" for value in facts["bounds"]) if facts["bounds"] else "none"),
        ("valid pixels by", str(facts["valid_mask"])),
        ("acquired", facts["acquired_at"] or "not stated"),
        ("sensor", facts["sensor"] or "not stated"),
    ]
    if facts["warped_from"]:
        rows.append(("placed by", str(facts["warped_from"])))
    for band in facts["bands"]:
        parts = [band["name"] or "unnamed", band["dtype"]]
        parts += [f"({band['description']})"] if band["description"] else []
        parts += (
            [f"scale {band['scale']:g} offset {band['offset']:g}"] if (band["scale"], band["offset"]) != (1, 0) else []
        )
        parts += [f"nodata {band['nodata']:g}"] if band["nodata"] is not None else []
        rows.append((f"band {band['number']}", " ".join(parts)))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
