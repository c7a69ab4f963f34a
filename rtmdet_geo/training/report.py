"""The report of a run: pictures of its course, and one page that says what was trained, how well, and how to go on.

The page is one file without script or network; it is read in light and dark and printed. Numbers come from the run's
tables, so they are those of ``log.csv``, ``history.csv`` and ``validation.csv``.
"""

from __future__ import annotations

import base64
import datetime
import html
import logging
import math
import os
import platform
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rtmdet_geo.config import Recipe
from rtmdet_geo.evaluation.plots import draw_precision_recall
from rtmdet_geo.outputs import staged_output
from rtmdet_geo.run_record import library_versions
from rtmdet_geo.training import plots
from rtmdet_geo.training.run_log import HISTORY, LOG, read_table
from rtmdet_geo.training.validate import Validation

logger = logging.getLogger(__name__)

#: Pictures by file name, with what they show.
PICTURES = {
    "losses.png": "Losses, as logged (pale) and smoothed",
    "ap.png": "Figures on left-out images, best state marked",
    "pr.png": "Precision over recall on left-out images, best F1 marked",
    "lr.png": "Learning rate",
}
REPORT = "report.html"
#: Names of classes that the page writes out, and rows of a table that it shows unfolded.
_MAX_CLASSES, _MAX_ROWS = 20, 24
#: What the page says of a summary by itself, or takes from the tables.
_TOLD = {
    *("iterations", "seconds", "parameters", "data", "device", "processes", "bad_images", "best", "best_iteration"),
    *("weights", "loss", "figures", "validation", "images_per_second", "data_wait"),
}
#: Heads of the columns of validation.csv that are not their names.
_HEADS = {
    "ap": "AP",
    "best_f1": "best F1",
    "best_score": "from score",
    "num_objects": "objects",
    "num_images": "images",
}
#: What stands where there is no number.
_NOTHING = "n/a"

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5c6773; --line: #d9dee4; --page: #fff; --card: #f5f7f9; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ed; --soft: #a2abb5; --line: #3a424c; --page: #14181d; --card: #1e242b; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem; max-width: 70rem; color: var(--ink); background: var(--page);
  font: 15px/1.45 system-ui, sans-serif; }
h1 { margin: 0; font-size: 1.6rem; overflow-wrap: anywhere; }
h2 { margin: 1.8rem 0 .6rem; font-size: 1.1rem; border-bottom: 1px solid var(--line); padding-bottom: .2rem; }
p.sub { margin: .2rem 0 1.2rem; color: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .7rem; }
.tile { background: var(--card); border-radius: .5rem; padding: .6rem .8rem; }
.tile b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: .85rem; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(28rem, 100%), 1fr)); gap: 1rem; }
figure { margin: 0; }
figure img { width: 100%; height: auto; background: #fff; border-radius: .5rem; border: 1px solid var(--line); }
figcaption { color: var(--soft); font-size: .85rem; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(28rem, 100%), 1fr)); gap: 0 2rem; }
section { min-width: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .22rem .8rem .22rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; }
td { overflow-wrap: break-word; }
table.facts td { overflow-wrap: anywhere; }
table.facts th { color: var(--soft); font-weight: 400; white-space: nowrap; }
td.number, th.number { text-align: right; white-space: nowrap; }
pre { background: var(--card); border-radius: .5rem; padding: .7rem .9rem; overflow-x: auto; font-size: .85rem; }
@media print {
  :root { --ink: #000; --soft: #444; --line: #bbb; --page: #fff; --card: #f2f2f2; }
  @page { margin: 12mm; }
  html { font-size: 9.5px; }
  body { padding: 0; font-size: 9.5px; max-width: none; }
  h2 { margin-top: 1.2rem; }
  .tiles { grid-template-columns: repeat(5, 1fr); }
  .pictures, .columns { grid-template-columns: 1fr 1fr; }
  figure img { max-height: 44mm; object-fit: contain; }
  figure, .tile, tr { break-inside: avoid; }
  pre { white-space: pre-wrap; }
}
"""


def write_report(run: Path, recipe: Recipe, *, validation: Validation | None, summary: Mapping[str, Any]) -> list[Path]:
    """Write the pictures and the page of a finished run into its folder.

    Args:
        run: folder with the tables of :mod:`rtmdet_geo.training.run_log`.
        recipe: by which it was trained.
        validation: the last one; None where no image was left out.
        summary: what else the page is to say, as far as it is there: ``iterations``, ``seconds``, ``parameters``,
            ``data`` (counts by name), ``device``, ``processes``, ``best_iteration``, ``bad_images`` (names), and the
            paths ``best`` or ``weights``. Further numbers and words are told by their names.

    Returns:
        The files written: ``report.html``, and the pictures of which there is something to show. Without matplotlib no
        pictures, which one line of the log says.

    Raises:
        OutputError: a file cannot be written.
    """
    run = Path(run)
    log, history = read_table(run / LOG), read_table(run / HISTORY)
    pictures = _draw(log, history, validation)
    for name in PICTURES:  # of an earlier report
        if name not in pictures:
            (run / name).unlink(missing_ok=True)
    page = _page(run, recipe, validation, dict(summary), log, history, pictures)
    contents = pictures | {REPORT: page.encode()}
    for name, content in contents.items():
        with staged_output(run / name) as staged:
            staged.write_bytes(content)
    return [run / name for name in contents]


def data_wait_share(log: Sequence[Mapping[str, str]]) -> float | None:
    """Return the share of a run's time that was spent waiting for samples; None where the log does not say.

    Rows stand for different lengths of time: as many iterations as since the row before, at their images per second.
    """
    waited = total = previous = 0.0
    for row in log:
        length, previous = float(row["iteration"]) - previous, float(row["iteration"])
        speed, share = (float(row.get(name) or "nan") for name in ("images_per_second", "data_wait"))
        if speed > 0 and math.isfinite(share):
            waited += length / speed * share
            total += length / speed
    return waited / total if total > 0 else None


def _draw(
    log: Sequence[Mapping[str, str]], history: Sequence[Mapping[str, str]], validation: Validation | None
) -> dict[str, bytes]:
    """Return the pictures as PNG by file name, in the order of :data:`PICTURES`."""
    try:
        drawn = {
            "losses.png": plots.draw_losses(log),
            "ap.png": plots.draw_history(history),
            "pr.png": draw_precision_recall(validation.curves if validation is not None else []),
            "lr.png": plots.draw_learning_rate(log),
        }
    except ImportError:
        logger.warning("matplotlib is not installed, so the report has no pictures; pip install 'rtmdet-geo[train]'")
        return {}
    return {name: picture for name, picture in drawn.items() if picture is not None}


def _page(
    run: Path,
    recipe: Recipe,
    validation: Validation | None,
    summary: dict[str, Any],
    log: Sequence[Mapping[str, str]],
    history: Sequence[Mapping[str, str]],
    pictures: Mapping[str, bytes],
) -> str:
    name = html.escape(recipe.name)
    now = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    parts = [
        f"<h1>{name}</h1>",
        f'<p class="sub">{html.escape(recipe.model.name)}, training report of {now}</p>',
        _tiles(validation, summary, log),
    ]
    if pictures:
        figures = "".join(_picture(file, content) for file, content in pictures.items())
        parts.append(f'<h2>Course</h2><div class="pictures">{figures}</div>')
    sections = [("What was trained", _table(_facts(recipe, validation, summary, log), heads=None))]
    if validation is not None:
        sections.insert(0, ("On left-out images", _results(validation, history)))
    columns = "".join(f"<section><h2>{title}</h2>{content}</section>" for title, content in sections)
    parts.append(f'<div class="columns">{columns}</div>')
    parts += ["<h2>How to go on</h2>", f"<pre>{html.escape(_commands(run, recipe, summary))}</pre>"]
    parts.append(f"<details><summary>The whole recipe</summary><pre>{html.escape(recipe.to_yaml())}</pre></details>")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}: training report</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>\n<body>\n'
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _tiles(validation: Validation | None, summary: Mapping[str, Any], log: Sequence[Mapping[str, str]]) -> str:
    """Return the few numbers that are asked for first."""
    tiles: list[tuple[str, str]] = []
    if validation is not None and validation.figures:
        name, value = next(iter(validation.figures.items()))
        tiles.append((name, _number(value)))
    if log:
        tiles.append(("loss at the end", f"{float(log[-1]['loss']):.4g}" if log[-1].get("loss") else _NOTHING))
    if "iterations" in summary:
        tiles.append(("iterations", f"{summary['iterations']:,}"))
    if "seconds" in summary:
        tiles.append(("time", _duration(float(summary["seconds"]))))
    share = data_wait_share(log)
    if share is not None:
        tiles.append(("of the time waiting for data", f"{100 * share:.1f} %"))
    cells = (
        f'<div class="tile"><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>' for name, value in tiles
    )
    return f'<div class="tiles">{"".join(cells)}</div>'


def _picture(name: str, content: bytes) -> str:
    data, text = base64.b64encode(content).decode(), html.escape(PICTURES[name])
    return f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'


def _results(validation: Validation, history: Sequence[Mapping[str, str]]) -> str:
    """Return the figures, at the end and at their best, and the classes."""
    best = {name: _best(history, name) for name in validation.figures}
    rows = []
    for name, value in validation.figures.items():
        top = best[name]
        rows.append(
            [name, _number(value), *((_NOTHING, _NOTHING) if top is None else (_number(top[0]), f"{top[1]:,}"))]
        )
    parts = [_table(rows, heads=("figure", "at the end", "best", "at iteration"))]
    if validation.rows:
        hidden = {"class", "iou"}  # the class goes first, and its measure says the IoU
        if len({row.get("bands") for row in validation.rows}) == 1:
            hidden.add("bands")
        columns = ["class", *(name for name in validation.rows[0] if name not in hidden)]
        classes = [[_as_text(row[name]) for name in columns] for row in validation.rows]
        heads = [_HEADS.get(name, name.replace("_", " ")) for name in columns]
        table = _table(classes, heads=heads)
        folded = f"<details><summary>Every class ({len(classes)} rows)</summary>{table}</details>"
        parts.append(f"<p></p>{table if len(classes) <= _MAX_ROWS else folded}")
    return "".join(parts)


def _best(history: Sequence[Mapping[str, str]], name: str) -> tuple[float, int] | None:
    """Return the highest value of a figure and its iteration."""
    values = [(float(row[name]), -int(row["iteration"])) for row in history if row.get(name)]
    value, iteration = max((pair for pair in values if math.isfinite(pair[0])), default=(math.nan, 0))
    return None if math.isnan(value) else (value, -iteration)


def _facts(
    recipe: Recipe, validation: Validation | None, summary: Mapping[str, Any], log: Sequence[Mapping[str, str]]
) -> list[list[str]]:
    """Return what was trained on what, and where, each with its name."""
    model, optim = recipe.model, recipe.optim
    more = len(model.classes) - _MAX_CLASSES
    classes = ", ".join(model.classes[:_MAX_CLASSES]) + (f" and {more} more" if more > 0 else "")
    facts = {
        "network": f"{model.name} ({model.kind})",
        "parameters": f"{summary['parameters']:,}" if "parameters" in summary else None,
        "started from": model.weights or "random weights",
        f"classes ({len(model.classes)})": classes,
        "bands": ", ".join(model.bands),
    }
    if summary.get("data"):
        counts = ", ".join(f"{value:,} {name}" for name, value in summary["data"].items())
        facts["data"] = f"{recipe.data.format}: {counts}"
    if validation is not None:
        facts["images scored"] = f"{validation.num_images:,}, by protocol {recipe.validation.protocol}"
        facts["left out of the scores"] = ", ".join(validation.left_out)
    facts |= {
        "did not decode": ", ".join(summary.get("bad_images", ())),
        "batch": _batch(recipe, summary),
        "optimiser": f"{optim.optimizer}, weight decay {optim.weight_decay:g}",
        "learning rate": _rate(recipe, int(summary.get("processes", 1))),
        "best state at iteration": f"{summary['best_iteration']:,}" if summary.get("best_iteration") else None,
        "images per second": _speed(log),
        "seed": str(recipe.loop.seed),
    }
    for name, value in summary.items():
        if name not in _TOLD and isinstance(value, str | int | float):
            facts[name.replace("_", " ")] = str(value)
    facts["machine"] = _machine(str(summary.get("device", "cpu")))
    facts["versions"] = ", ".join(f"{name} {version}" for name, version in library_versions("torch").items())
    return [[name, value] for name, value in facts.items() if value]


def _batch(recipe: Recipe, summary: Mapping[str, Any]) -> str:
    optim, processes = recipe.optim, summary.get("processes")
    number = optim.batch_size * optim.accumulate * int(processes or 1)
    text = f"{number} {recipe.augment.sampling}" + ("" if processes else " in each process")
    if number == optim.batch_size:
        return text
    return f"{text}: {optim.batch_size} x {optim.accumulate} accumulated x {processes or 1} processes"


def _rate(recipe: Recipe, processes: int) -> str:
    """Return the rate for the batch there was, and what the recipe says where that is another."""
    optim = recipe.optim
    batch = optim.batch_size * optim.accumulate * processes
    if optim.lr_for_batch in (None, batch):
        return f"{optim.lr:g}"
    return f"{optim.lr * batch / (optim.lr_for_batch or batch):.3g} ({optim.lr:g} for {optim.lr_for_batch} images)"


def _speed(log: Sequence[Mapping[str, str]]) -> str | None:
    """Return the median speed of the rows."""
    speeds = sorted(float(row["images_per_second"]) for row in log if row.get("images_per_second"))
    return f"{speeds[len(speeds) // 2]:.3g}" if speeds else None


def _machine(device: str) -> str:
    is_cuda = device.startswith("cuda") and torch.cuda.is_available()
    name = f" ({torch.cuda.get_device_name(device.split()[0])})" if is_cuda else ""
    return f"{device}{name}; {platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores"


def _commands(run: Path, recipe: Recipe, summary: Mapping[str, Any]) -> str:
    """Return the lines that go on with the run and use what it made."""
    weights = shlex.quote(str(summary.get("best") or summary.get("weights") or run / "model.safetensors"))
    model_file = run / "model.onnx"
    lines = [
        f"rtmdet-geo export {weights} -o {shlex.quote(str(model_file))}",
    ]
    if recipe.model.kind == "classification":
        lines.append(f"rtmdet-geo classify image.jpg -m {shlex.quote(str(model_file))}")
    else:
        lines.append(f"rtmdet-geo detect scene.tif -m {shlex.quote(str(model_file))} -o found.gpkg")
    return "\n".join(lines)


def _table(rows: Sequence[Sequence[str]], *, heads: Sequence[str] | None) -> str:
    """Return a table; columns of numbers stand to the right. Without heads the first cell names its row."""
    if heads is None:
        body = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in rows)
        return f'<div class="scroll"><table class="facts">{body}</table></div>'
    kinds = [' class="number"' if all(_is_number(row[at]) for row in rows) else "" for at in range(len(heads))]
    first = "".join(f"<th{kind}>{html.escape(head)}</th>" for kind, head in zip(kinds, heads, strict=True))
    lines = [
        "".join(f"<td{kind}>{html.escape(cell)}</td>" for kind, cell in zip(kinds, row, strict=True)) for row in rows
    ]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table><thead><tr>{first}</tr></thead><tbody>{body}</tbody></table></div>'


def _is_number(text: str) -> bool:
    return text == _NOTHING or text.replace(",", "").replace(".", "").isdecimal()


def _as_text(value: Any) -> str:
    if isinstance(value, float):
        return _number(value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def _number(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else _NOTHING


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
