"""A stretch in place of the model's: spelled out (``--stretch``) or an earlier run's (``--stretch-from``).

| text | values that become 0..255 |
|---|---|
| ``model`` | as the model file says |
| ``percentile:LOW,HIGH`` | these percentiles, 2 and 98 if none are given |
| ``minmax`` | the lowest to the highest value |
| ``sigma:N`` | mean - N .. mean + N standard deviations (of the population), 2 if none is given |
| ``fixed:LOW,HIGH`` | these values, in the file's own numbers (DN), whatever its scale and offset tags say |
| ``none`` | 8-bit values as they are |

Statistics are of the whole valid scene, never of an area. Each band has its own; ``:joint`` behind percentile, minmax
or sigma makes one of all bands that the model uses, which keeps their colours in proportion.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.errors import ConfigError
from rtmdet_geo.stretch import BandStretch, percentile_stretch
from rtmdet_geo.structures import StretchSpec

WishKind = Literal["percentile", "minmax", "sigma", "fixed"]

#: Kind -> its numbers where the text gives none; None: it must.
_DEFAULTS: dict[str, tuple[float, ...] | None] = {
    "percentile": (2.0, 98.0),
    "minmax": (),
    "sigma": (2.0,),
    "fixed": None,
    "model": (),
    "none": (),
}
_SPELLINGS = "model, percentile:2,98, minmax, sigma:2.5, fixed:0,3000 or none, with :joint for one stretch of all bands"


@dataclass(frozen=True, slots=True)
class StretchWish:
    """How values become uint8 in place of what the model says; see the table of the module.

    Attributes:
        kind: "percentile", "minmax", "sigma" or "fixed".
        numbers: its parameters as the table has them.
        joint: all bands share one pair of limits.
    """

    kind: WishKind
    numbers: tuple[float, ...] = ()
    joint: bool = False

    @property
    def needs_values(self) -> bool:
        """Whether the limits depend on the scene's values."""
        return self.kind != "fixed"

    def limits(self, indexes: Sequence[int], values: Mapping[int, NDArray[Any]]) -> dict[int, BandStretch]:
        """Limits in DN by band number.

        Args:
            indexes: band numbers, one at least.
            values: (n,) valid, finite values over the whole scene by band number; not looked at if not
                :attr:`needs_values`. n may be 0.

        Returns:
            A constant band maps to 0, one without values too.
        """
        if self.kind == "fixed":
            return {index: BandStretch(*self.numbers) for index in indexes}
        if self.joint:
            shared = self._of(np.concatenate([values[index] for index in indexes]))
            return dict.fromkeys(indexes, shared)
        return {index: self._of(values[index]) for index in indexes}

    def _of(self, values: NDArray[Any]) -> BandStretch:
        if self.kind == "sigma":
            return _sigma_stretch(values, self.numbers[0])
        low, high = self.numbers if self.kind == "percentile" else (0.0, 100.0)
        return percentile_stretch(StretchSpec(kind="percentile", low_percent=low, high_percent=high), values)

    def record(self) -> dict[str, Any]:
        """Kind and parameters, ready for json; the limits are the record's ``bands``."""
        names = {"percentile": ("low_percent", "high_percent"), "sigma": ("sigma",)}.get(self.kind, ())
        return {"kind": self.kind, **dict(zip(names, self.numbers, strict=False)), "joint": self.joint}


@dataclass(frozen=True, slots=True)
class StoredStretch:
    """The limits that an earlier run used: a value becomes the same uint8 in any scene.

    Attributes:
        path: file that they come from.
        kind: what made them.
        bands: entry of the record (``dtype``, ``low_dn``, ``high_dn``) by name of the model's channel.
    """

    path: str
    kind: str
    bands: Mapping[str, Mapping[str, Any]]

    def limits(
        self, channels: Iterable[tuple[str, int | None]], dtypes: Mapping[int, str], where: str
    ) -> dict[int, BandStretch]:
        """Limits in DN by band number.

        Args:
            channels: name of each channel and the number of its band; None where a constant fills it.
            dtypes: by band number.
            where: the scene, for messages.

        Raises:
            ConfigError: the file has no limits for a channel, or they are for values of another type, or two for one
                band.
        """
        found: dict[int, BandStretch] = {}
        for name, index in channels:
            if index is None:
                continue
            entry = self.bands.get(name)
            if entry is None or "low_dn" not in entry:
                known = ", ".join(sorted(key for key, item in self.bands.items() if "low_dn" in item)) or "none"
                raise ConfigError(
                    f"{self.path!r} stretches the bands {known}, {where} is to be stretched in {name!r} as well; "
                    "choose an output of a model with the same bands"
                )
            stretch = _stored_limits(entry, f"band {name!r} of {self.path!r}")
            before, now = _value_type(str(entry.get("dtype"))), _value_type(dtypes[index])
            if before != now or (stretch.low is None and now != "8-bit"):
                raise ConfigError(
                    f"{self.path!r} stretches {entry.get('dtype')} values in band {name!r}, {where} has "
                    f"{dtypes[index]}; use --stretch, or a scene of the same kind of values"
                )
            if found.setdefault(index, stretch) != stretch:
                raise ConfigError(
                    f"band {index} of {where} fills several channels, which {self.path!r} stretches differently; "
                    "use --stretch"
                )
        return found

    def record(self) -> dict[str, Any]:
        """Where the limits come from, ready for json; the limits are the record's ``bands``."""
        return {"kind": self.kind, "from": self.path}


def parse_stretch(text: str) -> StretchSpec | StretchWish | None:
    """Read a stretch as the command line has it; None is the model's.

    Raises:
        ConfigError: no such kind, or its parameters are wrong.

    Example:
        >>> parse_stretch("sigma:2.5:joint")
        StretchWish(kind='sigma', numbers=(2.5,), joint=True)
    """
    kind, *parts = text.strip().lower().split(":")
    if kind not in _DEFAULTS:
        raise ConfigError(f"{text!r} is no stretch; give {_SPELLINGS}")
    joint = parts[-1:] == ["joint"]
    if joint:
        parts.pop()
        if kind not in ("percentile", "minmax", "sigma"):
            raise ConfigError(f"stretch {text!r}: bands share percentile, minmax and sigma only; leave :joint out")
    numbers = _numbers(text, parts)
    if numbers is None:
        numbers = _DEFAULTS[kind]
    if numbers is None or len(numbers) != {"percentile": 2, "sigma": 1, "fixed": 2}.get(kind, 0):
        raise ConfigError(f"stretch {text!r} has not the numbers it needs; give {_SPELLINGS}")
    if kind in ("percentile", "fixed") and not numbers[0] < numbers[1]:
        raise ConfigError(f"stretch {text!r}: its numbers must rise")
    if kind == "percentile" and not (numbers[0] >= 0 and numbers[1] <= 100):
        raise ConfigError(f"stretch {text!r}: percentiles are 0 to 100")
    if kind == "sigma" and numbers[0] <= 0:
        raise ConfigError(f"stretch {text!r}: the number of standard deviations must be above 0")
    if kind == "model":
        return None
    if kind == "none":
        return StretchSpec(kind="none")
    return StretchWish(kind, numbers, joint)  # type: ignore[arg-type]


def choose_stretch(
    model: StretchSpec, text: str | None, stored_in: str | os.PathLike[str] | None
) -> StretchSpec | StretchWish | StoredStretch:
    """Return the stretch of a run: an earlier output's, the one spelled out, or the model's.

    Raises:
        ConfigError: two are asked for, or one of them is wrong.
    """
    if stored_in is not None:
        if text is not None:
            raise ConfigError("stretch and stretch_from exclude each other; leave one out")
        return read_stretch(stored_in)
    return (parse_stretch(text) if text is not None else None) or model


def read_stretch(path: str | os.PathLike[str]) -> StoredStretch:
    """Read the stretch that a run stored in its output (GPKG, FlatGeobuf, GeoParquet, GeoJSON) or its JSON summary.

    Raises:
        ConfigError: there is no such file, or it holds no stretch.
    """
    text = os.fspath(path)
    if not os.path.isfile(text):
        raise ConfigError(f"file {text!r} to take the stretch from does not exist; check the path")
    try:
        record = _stored_record(Path(text))
    except (ValueError, OSError, RuntimeError) as error:  # pyarrow's, pyogrio's and json's errors are children of these
        reason = " ".join(str(error).split())
        raise ConfigError(f"the stretch in {text!r} cannot be read: {reason}; give an output of detect") from error
    if not isinstance(record, dict) or not isinstance(record.get("bands"), list):
        raise ConfigError(
            f"{text!r} holds no stretch; outputs of detect hold one as .gpkg, .fgb, .parquet and .geojson, and so does "
            "what --json prints"
        )
    bands = {str(entry.get("name")): entry for entry in record["bands"] if isinstance(entry, dict)}
    return StoredStretch(text, str(record.get("kind")), bands)


def _stored_record(path: Path) -> Any:
    """The ``stretch`` record of a file of any format, or None."""
    ending = path.suffix.lower()
    if ending == ".parquet":
        import pyarrow.parquet

        from rtmdet_geo.vector_formats import PARQUET_KEY

        found = (pyarrow.parquet.read_schema(path).metadata or {}).get(PARQUET_KEY.encode())
        return json.loads(found).get("stretch") if found else None
    if ending in (".gpkg", ".fgb"):
        import pyogrio

        from rtmdet_geo.vector_formats import STYLE_TABLE

        layers = [str(row[0]) for row in pyogrio.list_layers(path) if row[0] != STYLE_TABLE]
        found = (pyogrio.read_info(path, layer=layers[0])["layer_metadata"] or {}).get("stretch") if layers else None
        return json.loads(found) if found else None
    document = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(document, dict):
        return None
    if isinstance(metadata := document.get("metadata"), dict):
        document = metadata
    return document.get("stretch")


def _numbers(text: str, parts: list[str]) -> tuple[float, ...] | None:
    """The numbers behind the kind; None: there are none."""
    if not parts:
        return None
    try:
        numbers = tuple(float(word) for word in parts[0].split(","))
    except ValueError:
        numbers = (math.nan,)
    if len(parts) > 1 or not all(map(math.isfinite, numbers)):
        raise ConfigError(f"{text!r} is no stretch; give {_SPELLINGS}")
    return numbers


def _sigma_stretch(values: NDArray[Any], number: float) -> BandStretch:
    """Limits ``number`` standard deviations around the mean of (n,) values; a constant maps to 0."""
    if values.size == 0:
        return BandStretch(0.0, 1.0)
    lowest = float(values.min())
    if lowest == float(values.max()):
        return BandStretch(lowest, lowest + 1.0)
    mean, deviation = float(values.mean(dtype=np.float64)), float(values.std(dtype=np.float64))
    return BandStretch(mean - number * deviation, mean + number * deviation)


def _stored_limits(entry: Mapping[str, Any], where: str) -> BandStretch:
    """Limits of an entry; both None: 8-bit values as they are."""
    low, high = entry.get("low_dn"), entry.get("high_dn")
    if low is None and high is None:
        return BandStretch(None, None)
    for value in (low, high):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ConfigError(f"{where} has limits {low!r} and {high!r}, which are no numbers; give another file")
    if not low < high:  # type: ignore[operator]
        raise ConfigError(f"{where} has limits {low!r} and {high!r}, which do not rise; give another file")
    return BandStretch(float(low), float(high))  # type: ignore[arg-type]


def _value_type(dtype: str) -> str:
    """What the values of a dtype are comparable with."""
    if dtype in ("uint8", "int8"):
        return "8-bit"
    return "float" if dtype.startswith("float") else "integer"
