"""Which data a command looks at: those of a recipe, or a folder with its labels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rtmdet_geo.dataset_check import Source

#: Formats whose images and labels lie apart.
_WITH_LABELS = ("coco", "dota", "hrsc", "yolo_obb", "rbox", "voc")


@dataclass(frozen=True)
class SourceOptions:
    """Values of the options of :func:`source_options`."""

    recipe: str | None
    overrides: tuple[str, ...]
    folder: Path | None
    label_format: str | None
    images: Path | None
    labels: Path | None
    ids: Path | None
    classes: tuple[str, ...]
    hrsc_level: int

    def parts(self) -> tuple[dict[str, Source], bool]:
        """Return the parts of the data by name, and whether objects of unknown classes are left out by wish.

        Raises:
            click.UsageError: options that do not go together.
        """
        if (self.recipe is None) == (self.label_format is None):
            raise click.UsageError("Give a RECIPE, or --format and --images.")
        if self.recipe is None:
            if self.overrides or self.folder:
                raise click.UsageError("--set and --data go with a RECIPE, not with --format.")
            return {"data": self._source(str(self.label_format))}, False
        if self.images or self.labels or self.ids or self.classes:
            raise click.UsageError("--images, --labels, --ids and --class go with --format, not with a RECIPE.")
        from rtmdet_geo.config import load_recipe
        from rtmdet_geo.dataset_check import recipe_parts

        loaded = load_recipe(self.recipe, self.overrides).with_data(self.folder)
        return recipe_parts(loaded), loaded.data.unknown_classes == "drop"

    def places(self, parts: dict[str, Source]) -> list[Path]:
        """Return the files and folders that parts are read from, and the recipe."""
        names = ("images", "labels", "ids", "folder")
        found = {path for part in parts.values() for name in names if (path := getattr(part, name, None)) is not None}
        return [*([Path(self.recipe)] if self.recipe else []), *sorted(found)]

    def _source(self, label_format: str) -> Source:
        """Return what ``--format`` and the options beside it name."""
        from rtmdet_geo.annotations.folders import FoldersSource
        from rtmdet_geo.annotations.label_sets import CLASS_LIST, read_class_list
        from rtmdet_geo.annotations.parts import PartSource
        from rtmdet_geo.dataset_check import ChipsSource

        classes = self.classes or None
        if self.images is None:
            raise click.UsageError(f"--format {label_format} needs --images.")
        if label_format in _WITH_LABELS:
            if self.labels is None:
                raise click.UsageError(f"--format {label_format} needs --labels.")
            kind = "horizontal" if label_format == "coco" else "rotated"
            if label_format == "yolo_obb" and classes is None and (self.labels / CLASS_LIST).is_file():
                classes = read_class_list(self.labels / CLASS_LIST)
            places = label_format, self.images, self.labels, self.ids, classes, kind, self.hrsc_level
            return PartSource(*places)  # type: ignore[arg-type]
        if self.labels:
            raise click.UsageError(f"--format {label_format} takes no --labels.")
        if label_format == "folders":
            return FoldersSource(self.images, self.ids, classes)
        if self.ids:
            raise click.UsageError("--format chips takes no --ids.")
        return ChipsSource(self.images, classes)


def source_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add RECIPE and the options that name a folder instead; the command gets them as ``source``."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        names = SourceOptions.__dataclass_fields__
        source = SourceOptions(**{name: kwargs.pop(name) for name in names})
        return function(*args, source=source, **kwargs)

    for add in reversed(_OPTIONS):
        call = add(call)
    return call


_OPTIONS: tuple[Callable[..., Any], ...] = (
    click.argument("recipe", required=False, metavar="[RECIPE]"),
    click.option(
        "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a value of the recipe; repeat."
    ),
    click.option(
        "--data",
        "folder",
        type=click.Path(path_type=Path),
        help="Folder of the data.  [default: the recipe's data.root, or data.chips]",
    ),
    click.option(
        "--format",
        "label_format",
        type=click.Choice([*_WITH_LABELS, "chips", "folders"]),
        help="Look at a folder instead of a recipe's data: format of its labels.",
    ),
    click.option(
        "--images", type=click.Path(path_type=Path), help="Folder of images, of chips, or of folders of images."
    ),
    click.option("-l", "--labels", type=click.Path(path_type=Path), help="Folder of label files, or the file (coco)."),
    click.option("--ids", type=click.Path(path_type=Path), help="Text file with one image name a line: only these."),
    click.option(
        "--class", "classes", multiple=True, metavar="NAME", help="Class of the model, in label order; repeat."
    ),
    click.option(
        "--hrsc-level", type=click.IntRange(1, 3), default=1, show_default=True, help="Level of HRSC2016's classes."
    ),
)
