"""``rtmdet-geo models``: what models there are, what a model says of itself, and downloads of published weights."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rtmdet_geo.cli import options, report

if TYPE_CHECKING:
    from rtmdet_geo.catalog import CatalogEntry
    from rtmdet_geo.checkpoints import Checkpoint
    from rtmdet_geo.structures import ModelSpec
    from rtmdet_geo.variants import Variant

#: Of the code of every network.
_LICENCE = "Apache-2.0"
#: More classes than this are counted, not listed.
_MAX_CLASSES_SHOWN = 100
#: Columns of the table: name, parameters, GFLOPs, side in px, published figures; and the lines of weights below it.
_VARIANT_LINE = "{:<26} {:>11} {:>8} {:>5}  {:<27}  {:<10}  {}"
_WEIGHTS_LINE = "  {:<24} {:<55}  {:<10}  {}"


@click.group()
def models() -> None:
    """List models, print model cards, fetch published weights.

    \b
    Example:
      rtmdet-geo models show sen2ships_r
    """


@models.command("list")
@options.json_option
@options.verbosity_options
def list_command(as_json: bool) -> None:
    """List bundled models, networks that can be built, and published weights.

    \b
    Example:
      rtmdet-geo models list

    GFLOPS are multiply-adds in 1e9 for one square image of PX. `--json` has everything, urls and hashes included.
    """
    from rtmdet_geo.catalog import list_models
    from rtmdet_geo.variants import VARIANTS

    if as_json:
        report.echo_json(
            [
                *(_bundled_facts(entry) for entry in list_models()),
                *(_variant_facts(variant) for variant in VARIANTS.values()),
            ]
        )
        return
    click.echo(format_table(list_models(), list(VARIANTS.values())))


@models.command("show")
@click.argument("model", metavar="NAME|PATH")
@options.json_option
@options.verbosity_options
def show_command(model: str, as_json: bool) -> None:
    """Print what is known of a model, of published weights, of a network, or of a model file.

    \b
    Example:
      rtmdet-geo models show sen2ships_r
    """
    show_model(model, as_json)


@models.command("download")
@click.argument("name")
@options.json_option
@options.progress_option
@options.verbosity_options
@click.pass_context
def download_command(ctx: click.Context, name: str, as_json: bool, progress_mode: str) -> None:
    """Fetch published weights into the cache and print the path of the file.

    \b
    Example:
      rtmdet-geo models download rtmdet_r_tiny_dota

    Nothing is fetched if the file is there. A broken download is resumed, by the next run as well. RTMDET_GEO_CACHE
    names another cache folder. Without network the message says which file to put where.
    """
    options.check_stdout_owner(as_json, progress_mode)
    from rtmdet_geo.catalog import file_sha256
    from rtmdet_geo.checkpoints import download_checkpoint, find_checkpoint

    checkpoint = find_checkpoint(name)
    start = {"name": checkpoint.name, "url": checkpoint.url, "path": checkpoint.path}
    with report.progress(ctx, progress_mode, name, start, in_bytes=True) as advance:
        path = download_checkpoint(name, progress=advance, cancelled=report.cancel_requested.is_set)
    summary = {**start, "sha256": file_sha256(path), "bytes": path.stat().st_size, "licence": checkpoint.licence}
    report.emit_event(ctx, {"event": "done", **summary})
    if as_json:
        report.echo_json(summary)
    elif progress_mode != "jsonl":
        click.echo(path)


def is_model(name_or_path: str) -> bool:
    """Say whether a model is meant: a name of the listing or nearly one, or a path that ends like a model file."""
    from rtmdet_geo.catalog import ENGINE_SUFFIX, MODEL_SUFFIXES, WEIGHTS_SUFFIXES

    endings = {*MODEL_SUFFIXES, *WEIGHTS_SUFFIXES, ENGINE_SUFFIX} - {".bin"}  # rasters end so too
    return name_or_path.lower().endswith(tuple(endings)) or bool(_near_names(name_or_path))


def _near_names(name: str) -> list[str]:
    """Return the names of the listing that are like ``name``, best first; none for a path."""
    from rtmdet_geo.catalog import CATALOG
    from rtmdet_geo.checkpoints import CHECKPOINTS
    from rtmdet_geo.variants import VARIANTS

    known = [*CATALOG, *CHECKPOINTS, *VARIANTS]
    if name not in known and (Path(name).suffix or len(Path(name).parts) != 1 or Path(name).exists()):
        return []
    return difflib.get_close_matches(name, known, n=3, cutoff=0.8)


def show_model(model: str, as_json: bool) -> None:
    """Write what is known of a model to stdout: its card, or all of it as JSON.

    Args:
        model: a name of the listing (bundled model, network, published weights), a model file or a TensorRT engine.
        as_json: a ModelSpec with path and hash; of a network what the listing says.

    Raises:
        UnknownModelError, ModelFileError: see :func:`rtmdet_geo.catalog.find_model`.
    """
    from rtmdet_geo.catalog import CATALOG, ENGINE_SUFFIX, SPEC_KEY, file_sha256, find_model, known_spec, read_metadata
    from rtmdet_geo.checkpoints import CHECKPOINTS
    from rtmdet_geo.errors import ModelFileError, UnknownModelError
    from rtmdet_geo.variants import VARIANTS

    if model in VARIANTS:
        facts = _variant_facts(VARIANTS[model])
        card = _format_rows(_variant_rows(VARIANTS[model]))
    elif model in CHECKPOINTS:
        checkpoint = CHECKPOINTS[model]
        spec = checkpoint.spec()
        where = f"in the cache, {checkpoint.path}" if checkpoint.is_cached else f"not in the cache: {checkpoint.path}"
        facts = {**spec.model_dump(mode="json"), **_checkpoint_facts(checkpoint)}
        card = format_card(spec, f"{checkpoint.url} ({where})")
    else:
        near = [] if model in CATALOG else _near_names(model)
        if near:
            raise UnknownModelError(f"no model is named {model!r}; did you mean {' or '.join(map(repr, near))}?")
        path = find_model(model)
        if path.suffix.lower() == ENGINE_SUFFIX:
            _show_engine(path, as_json)
            return
        if path.suffix.lower() == ".onnx" and SPEC_KEY not in read_metadata(path):
            _show_foreign(path, as_json)
            return
        known = known_spec(path)
        if known is None:
            raise ModelFileError(
                f"{model!r} holds weights of another program, which say nothing of themselves; `rtmdet-geo detect -m` "
                "and `rtmdet-geo export` find out the network by their names and shapes"
            )
        spec = known
        facts = {"path": path, "sha256": file_sha256(path), **spec.model_dump(mode="json")}
        card = format_card(spec, f"{path}, {path.stat().st_size / 1e6:.1f} MB")
    if as_json:
        report.echo_json(facts)
    else:
        click.echo(card)


def _show_engine(path: Path, as_json: bool) -> None:
    """Write what lies beside a TensorRT engine, whatever machine it is for."""
    from rtmdet_geo.backends.trt_cache import read_description

    found = read_description(path)
    if as_json:
        engine = found.model_dump(mode="json", exclude={"spec"})
        report.echo_json({"path": path, **found.spec.model_dump(mode="json"), "engine": engine})
        return
    key = {name: ".".join(map(str, value)) if isinstance(value, list) else value for name, value in found.key.items()}
    made = "{gpu}, compute capability {compute_capability}, TensorRT {tensorrt}, {system} {machine}".format_map(key)
    rows = [("made on", made), ("runs on", _RUNS_ON[found.compatibility]), ("batches", f"up to {found.max_batch}")]
    where = f"{path}, {path.stat().st_size / 1e6:.1f} MB"
    click.echo(f"{format_card(found.spec, where)}\n\nTensorRT engine\n{_format_rows(rows)}")


def _show_foreign(path: Path, as_json: bool) -> None:
    """Write what is known of an ONNX file of another program."""
    from rtmdet_geo.backends.foreign import describe_foreign

    facts = describe_foreign(path)
    if as_json:
        report.echo_json(facts)
        return
    made_by = " ".join(part for part in (facts["producer"], facts["domain"]) if part)
    rows = [("file", f"{path}, {facts['bytes'] / 1e6:.1f} MB"), ("made by", made_by), ("graph", facts["graph"])]
    rows += [("description", facts["description"])] if facts["description"] else []
    for what in ("inputs", "outputs"):
        for port in facts[what]:
            shape = ", ".join("?" if size is None else str(size) for size in port["sizes"])
            rows.append((what[:-1], f"{port['name']} {port['type']} ({shape})"))
    rows += [("metadata", f"{key}: {value}") for key, value in facts["metadata"].items()]
    rows += [("lacks" if number == 0 else "", part) for number, part in enumerate(facts["lacks"])]
    click.echo(_format_rows(rows))
    click.echo(
        "\nA file of another program, which `rtmdet-geo detect` cannot run. If it is an RTMDet,\n"
        "export the weights (.pth) that it was made from with `rtmdet-geo export`."
    )


def _variant_rows(variant: Variant) -> list[tuple[str, str]]:
    """Return what is known of a network as (name, value)."""
    from rtmdet_geo.catalog import list_models
    from rtmdet_geo.variants import KINDS

    side = variant.input_size
    rows = [
        ("network", f"{variant.name} ({variant.reference or 'a size of our own'})"),
        ("finds", _FINDS[KINDS[variant.task]]),
        ("parameters", f"{variant.params:,} with {variant.num_classes} classes and 3 bands"),
        ("GFLOPs", f"{variant.flops / 1e9:.2f} (multiply-adds in 1e9) for {side} x {side} px"),
    ]
    if not variant.is_ours:
        rows.append(("published", f"{variant.published_params_m:g} M parameters, {variant.published_gflops:g} GFLOPs"))
    weights = _weights_of(variant, [_bundled_facts(entry) for entry in list_models()])
    rows += [("weights", f"{name}: {measured}; {where}") for name, measured, _, where in weights]
    return [*rows, *([] if weights else [("weights", "none, to be trained")]), ("licence", _LICENCE)]


def format_table(bundled: list[CatalogEntry], variants: list[Variant]) -> str:
    """Return all models as lines of at most 120 columns."""
    from rtmdet_geo.catalog import DEFAULT_MODEL
    from rtmdet_geo.variants import TASKS

    lines = ["Bundled models: rtmdet-geo detect -m NAME", ""]
    all_facts = [_bundled_facts(entry) for entry in bundled]
    for entry, facts in zip(bundled, all_facts, strict=True):
        notes = ["default"] if entry.name == DEFAULT_MODEL else []
        notes += [] if entry.is_available else ["file missing"]
        lines.append(
            _VARIANT_LINE.format(entry.name, *_costs(facts), "", facts["licence"] or "", ", ".join(notes)).rstrip()
        )
        lines.append(f"  {entry.summary}")
    for task, title in TASKS.items():
        lines += ["", f"{task.capitalize()}: {title}", ""]
        header = _VARIANT_LINE.format(
            "NETWORK / weights", "PARAMETERS", "GFLOPS", "PX", "PUBLISHED: M, G", "LICENCE", "FROM"
        )
        lines.append(header)
        for variant in variants:
            if variant.task == task:
                lines += _variant_lines(variant, all_facts)
    lines += [
        "",
        "Weights of OpenMMLab: rtmdet-geo models download NAME; their terms: rtmdet-geo models show NAME.",
        "The licence is that of code and weights as published; the data they were trained on have terms of their own.",
    ]
    return "\n".join(lines)


def _variant_lines(variant: Variant, bundled: list[dict[str, Any]]) -> list[str]:
    published = "" if variant.is_ours else f"{variant.published_params_m:g}, {variant.published_gflops:g}"
    note = "for tests" if variant.is_for_tests else "own size, to be trained" if variant.is_ours else ""
    lines = [_VARIANT_LINE.format(variant.name, *_costs(_costs_of(variant)), published, _LICENCE, note).rstrip()]
    lines += [_WEIGHTS_LINE.format(*row) for row in _weights_of(variant, bundled)]
    return lines


def _weights_of(variant: Variant, bundled: list[dict[str, Any]]) -> list[tuple[str, str, str, str]]:
    """Return name, measured quality, licence and place of all weights of a network.

    Args:
        variant: the network.
        bundled: what JSON says of each bundled model.
    """
    from rtmdet_geo.checkpoints import CHECKPOINTS

    rows = []
    for facts in bundled:
        if facts.get("architecture") == variant.name:
            score = next((f"{name} {value:g}" for name, value in facts["metrics"].items()), "")
            rows.append((facts["name"], score, facts["licence"], "bundled"))
    for checkpoint in CHECKPOINTS.values():
        if checkpoint.variant == variant.name:
            scores = ", ".join(f"{name} {value:g}" for name, value in checkpoint.metrics.items())
            where = "in the cache" if checkpoint.is_cached else checkpoint.url.split("/")[2]
            rows.append((checkpoint.name, f"{scores} on {checkpoint.data.tested_on}", checkpoint.licence, where))
    return rows


def _costs(facts: dict[str, Any]) -> tuple[str, str, str]:
    params = "unknown" if facts["params"] is None else f"{facts['params']:,}"
    return params, f"{facts['flops'] / 1e9:.2f}", str(facts["input_size"])


def _costs_of(variant: Variant) -> dict[str, Any]:
    return {"params": variant.params, "flops": variant.flops, "input_size": variant.input_size}


def _bundled_facts(entry: CatalogEntry) -> dict[str, Any]:
    """Return a bundled model as JSON says it."""
    from rtmdet_geo.catalog import DEFAULT_MODEL, read_spec
    from rtmdet_geo.errors import ModelFileError

    facts: dict[str, Any] = {
        "name": entry.name,
        "type": "model",
        "summary": entry.summary,
        "path": entry.path,
        "is_available": entry.is_available,
        "is_default": entry.name == DEFAULT_MODEL,
        "flops": entry.flops,
    }
    try:
        spec = read_spec(entry.weights_path)
        params: int | None = entry.params
    except ModelFileError:  # a file is missing; the list says so and goes on
        return facts | {"params": None, "input_size": None, "licence": None}
    return facts | {
        "params": params,
        "task": spec.kind,
        "architecture": spec.architecture,
        "input_size": spec.tile_size,
        "licence": spec.licence,
        "metrics": spec.metrics,
        "training_data": spec.training_data,
    }


def _variant_facts(variant: Variant) -> dict[str, Any]:
    """Return a network with its published weights as JSON says it."""
    from rtmdet_geo.checkpoints import CHECKPOINTS

    return {
        "name": variant.name,
        "type": "network",
        "task": variant.task,
        **_costs_of(variant),
        "num_classes": variant.num_classes,
        "reference": variant.reference or None,
        "published_params_m": variant.published_params_m,
        "published_gflops": variant.published_gflops,
        "licence": _LICENCE,
        "is_for_tests": variant.is_for_tests,
        "checkpoints": [_checkpoint_facts(item) for item in CHECKPOINTS.values() if item.variant == variant.name],
    }


def _checkpoint_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return published weights as JSON says them."""
    return {
        "name": checkpoint.name,
        "url": checkpoint.url,
        "sha256_prefix": checkpoint.sha256,
        "path": checkpoint.path,
        "is_cached": checkpoint.is_cached,
        "metrics": checkpoint.metrics,
        "measured_on": checkpoint.data.tested_on,
        "training_data": checkpoint.data.name,
        "recipe": checkpoint.recipe,
        "pretraining": checkpoint.pretraining,
        "input_size": checkpoint.input_size,
        "bands": checkpoint.bands,
        "num_classes": len(checkpoint.classes),
        "resolution": checkpoint.data.resolution,
        "licence": checkpoint.licence,
        "data_terms": checkpoint.data.terms,
    }


_FINDS = {
    "rotated": "rotated boxes",
    "horizontal": "horizontal boxes",
    "mask": "instance masks",
    "classification": "classes of whole images",
}


#: What else than the very GPU an engine runs on, by its level of compatibility.
_RUNS_ON = {
    "none": "GPUs of that name, with that TensorRT",
    "same_compute_capability": "all GPUs of that compute capability, with that TensorRT",
    "ampere_plus": "all GPUs of compute capability 8.0 and later, with that TensorRT",
}


def format_card(spec: ModelSpec, where: str) -> str:
    """Return the model card as lines ``name   value``; what the file does not say reads "not stated"."""
    stretch, dark = spec.stretch, spec.stretch.dark_percent
    limits = {
        "fixed": f"fixed, {stretch.low:g}..{stretch.high:g} in physical units (integers x {stretch.default_scale:g})"
        + ("; 8-bit as they are" if dark is None else f" above the scene's percentile {dark:g}"),
        "percentile": f"percentiles {stretch.low_percent:g}..{stretch.high_percent:g} of each band",
        "none": "none, 8-bit values as they are",
    }
    fills = ", ".join(f"{name} (filled with {value})" for name, value in spec.optional_bands.items())
    is_long = len(spec.classes) > _MAX_CLASSES_SHOWN
    classes = f"{len(spec.classes)}: {', '.join(spec.classes[:5])}, ..." if is_long else ", ".join(spec.classes)
    rows: list[tuple[str, str]] = [
        ("model", spec.name),
        ("file", where),
        ("architecture", f"{spec.architecture}, {_FINDS[spec.kind]}"),
        ("classes", classes),
        ("bands", ", ".join(spec.bands)),
        ("may be missing", fills or "none"),
        ("resolution", f"{spec.gsd_m:g} m per pixel" if spec.gsd_m else "any"),
        ("stretch", limits[stretch.kind]),
        ("tiles", f"{spec.tile_size} px, overlap {spec.overlap} px"),
        ("thresholds", f"score {spec.score_threshold:g}, IoU {spec.iou_threshold:g}"),
        ("precision", spec.precision),
        *([("compared", describe_differences(spec))] if spec.differences else []),
        ("training data", spec.training_data),
        *(("measured", f"{name}: {value:g}") for name, value in spec.metrics.items()),
        ("limits", spec.limits),
        ("licence", spec.licence),
        ("attribution", spec.attribution),
        ("weights sha256", spec.weights_sha256),
        ("made by", spec.exporter),
    ]
    return _format_rows(rows)


def describe_differences(spec: ModelSpec) -> str:
    """Say in one line how far a file is from what it was made of; nothing where it was not compared."""
    found = spec.differences
    words = [f"boxes within {found['boxes_px']:g} px"] if "boxes_px" in found else []
    words += [f"scores within {found['scores']:g}"] if "scores" in found else []
    if found.get("matched") == found.get("unmatched") == 0:
        words.append("no detections above the threshold to match")
    elif "matched" in found:
        words.append(f"{found['matched']:.0f} detections matched, {found['unmatched']:.0f} not")
    return ", ".join(words)


def _format_rows(rows: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value or 'not stated'}" for name, value in rows)
