"""What a data set holds: objects by class, how large, how long, which way, how dense; in px and on the ground."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.annotations.findings import Findings
from rtmdet_geo.annotations.folders import FoldersSource, list_folders
from rtmdet_geo.annotations.parts import LabelledFile, PartSource
from rtmdet_geo.annotations.usable import sift
from rtmdet_geo.dataset_check import ChipsSource, Source, read_source
from rtmdet_geo.errors import Cancelled, RasterError
from rtmdet_geo.evaluation.report import check_files, format_table, rows_csv, write_files
from rtmdet_geo.pictures import image_size

logger = logging.getLogger(__name__)

Array = NDArray[Any]

#: COCO's borders of small, medium and large objects, px^2.
_MEDIUM_PX2, _LARGE_PX2 = 32.0**2, 96.0**2
#: From this ratio of long to short side on the angle of an object is told.
ELONGATED = 1.5
#: Directions that angles are counted by, deg.
_DIRECTIONS = (0, 45, 90, 135)
#: Endings of image files that may say where they lie on the ground.
_GEOREFERENCED = {".tif", ".tiff"}


@dataclass(frozen=True)
class PartStats:
    """I images of a part of a data set and N objects, those that training can take.

    Attributes:
        classes: names.
        images: I names.
        sizes: (I, 2) int64 width and height in px.
        gsd_m: (I,) float64 metres per px; nan where nobody knows.
        owners: (N,) int64 image of each object.
        labels: (N,) int64 its class.
        boxes: (N, 5) float64 cx, cy, w, h in px, angle in rad (le90); nan of images in folders named by class, which
            are an object each.
        num_left_out: objects that training cannot take.
        num_faults: of all kinds; ``data check`` names them.
        is_upright: the boxes are enclosing ones, by the format of the labels or the kind of the model: their sides and
            angles are not those of the objects.
    """

    classes: tuple[str, ...]
    images: tuple[str, ...]
    sizes: NDArray[np.int64]
    gsd_m: NDArray[np.float64]
    owners: NDArray[np.int64]
    labels: NDArray[np.int64]
    boxes: NDArray[np.float64]
    num_left_out: int
    num_faults: int
    is_upright: bool = False

    @property
    def sides_m(self) -> NDArray[np.float64]:
        """(N, 2) long and short side in metres; nan where the resolution is not known."""
        return np.asarray(self.boxes[:, 2:4] * self.gsd_m[self.owners][:, None])

    @property
    def aspects(self) -> NDArray[np.float64]:
        """(N,) long side over short side."""
        return np.asarray(self.boxes[:, 2] / self.boxes[:, 3])

    @property
    def angles_deg(self) -> NDArray[np.float64]:
        """(K,) angles of the long sides in [0, 180), clockwise on screen from the row, of elongated objects.

        These are at least :data:`ELONGATED` times as long as wide: the direction of others is chance.
        """
        return np.asarray(np.degrees(self.boxes[self.aspects >= ELONGATED, 4]) % 180)

    @property
    def objects_per_image(self) -> NDArray[np.int64]:
        """(I,) numbers of objects."""
        return np.bincount(self.owners, minlength=len(self.images)).astype(np.int64)

    @property
    def density(self) -> NDArray[np.float64]:
        """(I,) objects per million px."""
        return np.asarray(self.objects_per_image / (np.prod(self.sizes, axis=1) / 1e6))


def data_stats(
    parts: Mapping[str, Source],
    *,
    gsd_m: float | None = None,
    progress: Callable[[int, int], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> dict[str, PartStats]:
    """Count and measure the objects of a data set; no pixel is decoded.

    Args:
        parts: by name ("train", "val"), see :func:`rtmdet_geo.dataset_check.recipe_parts`.
        gsd_m: metres per px of all images; None: what chips and GeoTIFFs say.
        progress: called with images whose resolution was looked up and all images.
        cancelled: asked between images.

    Raises:
        DatasetNotFoundError: a folder or file is missing or empty.
        AnnotationError: a COCO file, an index of chips, ``classes.txt`` or an image in a folder named by class cannot
            be read at all.
        Cancelled: ``cancelled`` said so.
    """
    found = {}
    for name, source in parts.items():
        clock = _Clock(progress, cancelled)
        if isinstance(source, FoldersSource):
            found[name] = _folder_stats(source, clock, gsd_m)
        else:
            found[name] = _object_stats(source, clock, gsd_m)
        if found[name].num_faults:
            logger.warning("%s: %d faults in labels or images; `data check` names them", name, found[name].num_faults)
    return found


@dataclass(frozen=True)
class _Clock:
    """Tells how far the work has come, and hears whether to stop."""

    progress: Callable[[int, int], None] | None
    cancelled: Callable[[], bool] | None

    def tick(self, done: int, number: int) -> None:
        if self.progress is not None:
            self.progress(done, number)
        if self.cancelled is not None and self.cancelled():
            raise Cancelled(f"stopped after {done} of {number} images")


def _object_stats(source: PartSource | ChipsSource, clock: _Clock, gsd_m: float | None) -> PartStats:
    """Measure labelled objects."""
    findings = Findings()
    files = read_source(source, findings)
    usable = sift(files, source.classes, findings)
    boxes = np.concatenate([np.zeros((0, 5)), *(file.labels.boxes for file in files)])
    stated = gsd_m
    if stated is None and isinstance(source, ChipsSource):
        stated = _chips_gsd(source.folder)
    gsd = []
    for number, file in enumerate(files, 1):
        gsd.append(_file_gsd(file) if stated is None else stated)
        clock.tick(number, len(files))
    return PartStats(
        usable.classes,
        tuple(file.name for file in files),
        np.array([(file.width, file.height) for file in files], np.int64).reshape(-1, 2),
        np.array(gsd, np.float64),
        usable.owners[usable.kept],
        usable.labels[usable.kept],
        boxes[usable.kept],
        int((~usable.kept).sum()),
        sum(findings.counts.values()),
        isinstance(source, PartSource) and source.kind != "rotated",
    )


def _folder_stats(source: FoldersSource, clock: _Clock, gsd_m: float | None) -> PartStats:
    """Count images in folders named by class."""
    listing = list_folders(source)
    label_of = {name: label for label, name in enumerate(listing.classes)}
    sizes = []
    for number, image in enumerate(listing.known, 1):
        sizes.append(image_size(source.images / image.name))
        clock.tick(number, len(listing.known))
    number = len(sizes)
    return PartStats(
        listing.classes,
        tuple(image.name for image in listing.known),
        np.array(sizes, np.int64).reshape(-1, 2),
        np.full(number, math.nan if gsd_m is None else gsd_m),
        np.arange(number),
        np.array([label_of[image.class_name] for image in listing.known], np.int64),
        np.full((number, 5), math.nan),
        len(listing.images) - number,
        len(listing.unknown) + len(listing.stray) + len(listing.missing),
    )


def _chips_gsd(folder: Path) -> float:
    """Return the metres per px to which chips were resampled; nan where they were not."""
    stated = json.loads((folder / "chips.json").read_text(encoding="utf-8")).get("gsd_m")
    return math.nan if stated is None else float(stated)


def _file_gsd(file: LabelledFile) -> float:
    """Return the metres per px of an image file; nan where it does not say."""
    if file.path.suffix.lower() not in _GEOREFERENCED:
        return math.nan
    from rtmdet_geo.raster import describe_scene

    try:
        facts = describe_scene(file.path)
    except RasterError as error:
        logger.info("%s: no ground sample distance: %s", file.path, error)
        return math.nan
    x, y = facts["gsd_x_m"], facts["gsd_y_m"]
    return math.nan if x is None else math.sqrt(x * y)


def stats_rows(stats: Mapping[str, PartStats]) -> list[dict[str, Any]]:
    """Return a row a class of each part, and one of all its classes where it has several.

    Columns: ``part``, ``class``, ``objects``, ``images`` (that have some); 5th percentile, median and 95th of the long
    side, ``long_px_p5``, ``long_px``, ``long_px_p95``, and the median of the short one, ``short_px``; the median of
    long over short side, ``aspect``; sides in metres, ``long_m`` and so on, where any are known.
    """
    has_metres = any(np.isfinite(part.sides_m).any() for part in stats.values())
    rows = []
    for name, part in stats.items():
        chosen = [(class_name, part.labels == label) for label, class_name in enumerate(part.classes)]
        if len(chosen) != 1:
            chosen.append(("all", np.ones(len(part.labels), bool)))
        for class_name, keep in chosen:
            row: dict[str, Any] = {"part": name, "class": class_name, "objects": int(keep.sum())}
            row["images"] = len(np.unique(part.owners[keep]))
            row |= _sides("px", part.boxes[keep, 2:4]) | {"aspect": _quantiles(part.aspects[keep])[1]}
            rows.append(row | (_sides("m", part.sides_m[keep]) if has_metres else {}))
    return rows


def _sides(unit: str, sides: Array) -> dict[str, float]:
    low, middle, high = _quantiles(sides[:, 0])
    names = f"long_{unit}_p5", f"long_{unit}", f"long_{unit}_p95", f"short_{unit}"
    return dict(zip(names, (low, middle, high, _quantiles(sides[:, 1])[1]), strict=True))


def _quantiles(values: Array) -> tuple[float, float, float]:
    """Return the 5th, 50th and 95th percentile of the finite values; nan where there are none."""
    numbers = values[np.isfinite(values)]
    if not len(numbers):
        return math.nan, math.nan, math.nan
    low, middle, high = np.percentile(numbers, (5, 50, 95))
    return float(low), float(middle), float(high)


def stats_summary(stats: Mapping[str, PartStats]) -> dict[str, Any]:
    """Return what ``--json`` says: ``parts`` by name, and ``rows``."""
    return {"parts": {name: _part_summary(part) for name, part in stats.items()}, "rows": stats_rows(stats)}


def _part_summary(part: PartStats) -> dict[str, Any]:
    areas = part.boxes[:, 2] * part.boxes[:, 3]
    numbers = part.objects_per_image
    counts = np.bincount(part.labels, minlength=len(part.classes)).tolist()
    return {
        "images": len(part.images),
        "images_without_objects": int((numbers == 0).sum()),
        "objects": len(part.labels),
        "left_out": part.num_left_out,
        "faults": part.num_faults,
        "is_upright": part.is_upright,
        "classes": dict(zip(part.classes, counts, strict=True)),
        "objects_per_image": _spread(numbers),
        "objects_per_mpx": _spread(part.density),
        "image_width_px": _spread(part.sizes[:, 0]),
        "image_height_px": _spread(part.sizes[:, 1]),
        "gsd_m": _spread(part.gsd_m),
        "long_px": _spread(part.boxes[:, 2]),
        "short_px": _spread(part.boxes[:, 3]),
        "long_m": _spread(part.sides_m[:, 0]),
        "short_m": _spread(part.sides_m[:, 1]),
        "aspect": _spread(part.aspects),
        "angles": _directions(part.angles_deg),
        "small": int((areas < _MEDIUM_PX2).sum()),
        "medium": int(((areas >= _MEDIUM_PX2) & (areas < _LARGE_PX2)).sum()),
        "large": int((areas >= _LARGE_PX2).sum()),
    }


def _directions(angles_deg: Array) -> dict[str, int] | None:
    """Return how many angles are nearest to each of the directions, by its name; None of none."""
    if not len(angles_deg):
        return None
    nearest = np.round(angles_deg / (180 / len(_DIRECTIONS))).astype(np.int64) % len(_DIRECTIONS)
    counts = np.bincount(nearest, minlength=len(_DIRECTIONS)).tolist()
    return dict(zip(map(str, _DIRECTIONS), counts, strict=True))


def _spread(values: Array) -> dict[str, float] | None:
    """Return how values are spread; None where no number is among them."""
    numbers = np.asarray(values, np.float64)
    numbers = numbers[np.isfinite(numbers)]
    if not len(numbers):
        return None
    low, middle, high = _quantiles(numbers)
    inner = {"p5": low, "median": middle, "p95": high, "mean": float(numbers.mean())}
    return {"min": float(numbers.min())} | inner | {"max": float(numbers.max())}


def stats_text(stats: Mapping[str, PartStats]) -> str:
    """Return what the command prints: a few lines a part, and the table of classes."""
    lines = []
    for name, part in stats.items():
        facts = _part_summary(part)
        lines.append(
            f"{name}: {facts['images']} images ({facts['images_without_objects']} without objects), {facts['objects']} "
            f"objects" + (f", {part.num_left_out} left out" if part.num_left_out else "")
        )
        for key, text in _FACTS.items():
            if facts[key] is not None:
                lines.append(f"  {text}: {_spread_text(facts[key])}")
        if facts["angles"] is not None:
            whole = sum(facts["angles"].values())
            shares = ", ".join(f"{number / whole:.0%} near {angle}" for angle, number in facts["angles"].items())
            lines.append(f"  angles of elongated objects, deg clockwise from the row: {shares}")
        if part.is_upright and len(part.labels):
            lines.append("  sides, aspect and angles are those of upright boxes around the objects, not of outlines")
        if facts["long_px"] is not None:
            sizes = ", ".join(f"{facts[size]} {size}" for size in ("small", "medium", "large"))
            lines.append(f"  by area (borders 32^2 and 96^2 px): {sizes}")
    return "\n".join([*lines, "", format_table(stats_rows(stats))])


def _spread_text(spread: Mapping[str, float]) -> str:
    if spread["min"] == spread["max"]:
        return f"{spread['min']:.4g}"
    return f"{spread['min']:.4g} to {spread['max']:.4g}, median {spread['median']:.4g}"


#: Lines of the text, by key of the summary.
_FACTS = {
    "image_width_px": "width of images, px",
    "image_height_px": "height of images, px",
    "gsd_m": "metres per px",
    "objects_per_image": "objects an image",
    "objects_per_mpx": "objects per million px",
}


def check_stats_outputs(
    *,
    csv: str | os.PathLike[str] | None = None,
    plots: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    sources: Sequence[str | os.PathLike[str]] = (),
) -> None:
    """Check before a long run that :func:`write_stats` could write there, and would not write over its sources.

    Raises:
        OutputError, MissingDependencyError: as :func:`write_stats`, as far as it can be known without writing; or the
            CSV file is a source.
    """
    from rtmdet_geo.dataset_charts import CHARTS

    check_files(csv, plots, CHARTS, overwrite, sources)


def write_stats(
    stats: Mapping[str, PartStats],
    *,
    csv: str | os.PathLike[str] | None = None,
    plots: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """Write the table as CSV, and charts as PNG files into a folder; return the files.

    Raises:
        OutputError: a file exists and ``overwrite`` is False, then none is written; or one cannot be written.
        MissingDependencyError: charts are asked for without matplotlib.
    """
    contents: dict[Path, bytes] = {}
    if csv is not None:
        contents[Path(csv)] = rows_csv(stats_rows(stats)).encode()
    if plots is not None:
        from rtmdet_geo.dataset_charts import draw_stats

        drawn = draw_stats(stats)
        if not drawn:
            logger.warning("no object is labelled: there is nothing to draw into %r", os.fspath(plots))
        contents |= {Path(plots) / name: picture for name, picture in drawn.items()}
        plots = plots if drawn else None
    write_files(contents, None if plots is None else Path(plots), overwrite)
    return list(contents)
