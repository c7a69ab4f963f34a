"""``rtmdet-geo models``: what models there are and what a model says of itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from rtmdet_geo.cli import options, report

if TYPE_CHECKING:
    from rtmdet_geo.structures import ModelSpec


@click.group()
def models() -> None:
    """List models and print model cards.

    \b
    Example:
      rtmdet-geo models show sen2ships_r
    """


@models.command("list")
@options.json_option
@options.verbosity_options
def list_command(as_json: bool) -> None:
    """List the models that can be asked for by name.

    \b
    Example:
      rtmdet-geo models list
    """
    from rtmdet_geo.catalog import DEFAULT_MODEL, list_models

    entries = [
        {
            "name": entry.name,
            "summary": entry.summary,
            "path": str(entry.path),
            "is_available": entry.is_available,
            "is_default": entry.name == DEFAULT_MODEL,
        }
        for entry in list_models()
    ]
    if as_json:
        report.echo_json(entries)
        return
    width = max(len(str(entry["name"])) for entry in entries)
    for entry in entries:
        notes = [note for note, key in (("default", "is_default"),) if entry[key]]
        notes += [] if entry["is_available"] else ["file missing"]
        click.echo(f"{entry['name']:<{width}}  {entry['summary']}" + (f"  [{', '.join(notes)}]" if notes else ""))


@models.command("show")
@click.argument("model", metavar="NAME|PATH")
@options.json_option
@options.verbosity_options
def show_command(model: str, as_json: bool) -> None:
    """Print the model card that travels in a model file (.onnx) or weights file (.safetensors).

    \b
    Example:
      rtmdet-geo models show sen2ships_r
    """
    show_model(model, as_json)


def show_model(model: str, as_json: bool) -> None:
    """Write a model's card, or its ModelSpec with path and hash as JSON, to stdout."""
    from rtmdet_geo.catalog import file_sha256, find_model, read_spec

    path = find_model(model)
    spec = read_spec(path)
    if as_json:
        report.echo_json({"path": path, "sha256": file_sha256(path), **spec.model_dump(mode="json")})
    else:
        click.echo(format_card(spec, str(path), path.stat().st_size))


def format_card(spec: ModelSpec, path: str, num_bytes: int) -> str:
    """Return the model card as lines ``name   value``; what the file does not say reads "not stated"."""
    stretch = spec.stretch
    limits = {
        "fixed": f"fixed, {stretch.low:g}..{stretch.high:g} in physical units (integers x {stretch.default_scale:g})"
        + (f" above the scene's percentile {stretch.dark_percent:g}" if stretch.dark_percent is not None else ""),
        "percentile": f"percentiles {stretch.low_percent:g}..{stretch.high_percent:g} of each band",
        "none": "none, 8-bit values as they are",
    }
    fills = ", ".join(f"{name} (filled with {value})" for name, value in spec.optional_bands.items())
    rows: list[tuple[str, str]] = [
        ("model", spec.name),
        ("file", f"{path}, {num_bytes / 1e6:.1f} MB"),
        ("architecture", f"{spec.architecture}, {spec.kind} boxes"),
        ("classes", ", ".join(spec.classes)),
        ("bands", ", ".join(spec.bands)),
        ("may be missing", fills or "none"),
        ("resolution", f"{spec.gsd_m:g} m per pixel" if spec.gsd_m else "any"),
        ("stretch", limits[stretch.kind]),
        ("tiles", f"{spec.tile_size} px, overlap {spec.overlap} px"),
        ("thresholds", f"score {spec.score_threshold:g}, IoU {spec.iou_threshold:g}"),
        ("training data", spec.training_data),
        *(("measured", f"{name}: {value:g}") for name, value in spec.metrics.items()),
        ("limits", spec.limits),
        ("licence", spec.licence),
        ("attribution", spec.attribution),
        ("weights sha256", spec.weights_sha256),
        ("made by", spec.exporter),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value or 'not stated'}" for name, value in rows)
