"""Which bands of a scene feed which channel of the model: sensor names to wavelength names, and the choice itself."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rtmdet_geo.errors import BandError, BandWarning

logger = logging.getLogger(__name__)

#: Plain names, after lower-casing and dropping everything but letters and digits.
_PLAIN = {
    "red": "red", "r": "red", "green": "green", "g": "green", "blue": "blue", "b": "blue",
    "nir": "nir", "n": "nir", "nir1": "nir", "nearinfrared": "nir", "nearir": "nir", "infrared": "nir",
    "nearinfrared1": "nir", "ir": "nir",
    "nir08": "nir08", "nir2": "nir08", "nirnarrow": "nir08", "coastal": "coastal", "coastalaerosol": "coastal",
    "rededge": "rededge", "yellow": "yellow", "swir": "swir16", "swir1": "swir16", "swir16": "swir16",
    "swir2": "swir22", "swir22": "swir22", "cirrus": "cirrus", "pan": "pan", "panchromatic": "pan",
    "thermal": "thermal",
}  # fmt: skip
#: Band codes by sensor family. Sources: Sentinel-2 MSI, Landsat 8/9 OLI and Landsat 4-7 TM/ETM+ product guides.
_CODES = {
    "sentinel-2": {
        "1": "coastal", "2": "blue", "3": "green", "4": "red", "5": "rededge", "6": "rededge2", "7": "rededge3",
        "8": "nir", "8a": "nir08", "9": "watervapour", "10": "cirrus", "11": "swir16", "12": "swir22",
    },
    "landsat-8": {
        "1": "coastal", "2": "blue", "3": "green", "4": "red", "5": "nir", "6": "swir16", "7": "swir22",
        "8": "pan", "9": "cirrus", "10": "thermal", "11": "thermal2",
    },
    "landsat-7": {
        "1": "blue", "2": "green", "3": "red", "4": "nir", "5": "swir16", "6": "thermal", "7": "swir22", "8": "pan",
    },
}  # fmt: skip
_COLOURS = {"red": "red", "green": "green", "blue": "blue", "nir": "nir"}


@dataclass(frozen=True, slots=True)
class Band:
    """One band of a scene.

    Attributes:
        index: 1-based number in the file.
        name: wavelength name (``red``, ``nir``, ...) or None when nothing says.
        description: the file's own text, "" when it has none.
        colour: GDAL colour interpretation in lower case (``red``, ``gray``, ``alpha``, ``undefined``, ...).
    """

    index: int
    name: str | None
    description: str
    colour: str

    @property
    def is_alpha(self) -> bool:
        """Whether the band is a transparency mask, not an image."""
        return self.colour == "alpha"

    def __str__(self) -> str:
        """Return ``1=red (B04)``, for messages."""
        label = self.name or ("alpha" if self.is_alpha else "unnamed")
        extra = self.description if self.description and self.description.lower() != label else ""
        return f"{self.index}={label}" + (f" ({extra})" if extra else "")


@dataclass(frozen=True, slots=True)
class BandChoice:
    """Which band fills each channel.

    Attributes:
        indexes: one 1-based band number per channel; None where the channel is filled with a constant.
        fills: uint8 value of the channels that no band fills, by channel name.
        repeated: True when one band was repeated.
        guessed: True when names came from positions only.
    """

    indexes: tuple[int | None, ...]
    fills: dict[str, int]
    repeated: bool = False
    guessed: bool = False


def sensor_family(*hints: str | None) -> str | None:
    """Sensor family from tags and file name: ``sentinel-2``, ``landsat-8`` (8 and 9), ``landsat-7`` (4 to 7) or None.

    Example:
        >>> sensor_family("Sentinel-2 MSI L2A")
        'sentinel-2'
        >>> sensor_family(None, "LC08_L1TP_016034_20200101_B4.TIF")
        'landsat-8'
    """
    text = " ".join(hint for hint in hints if hint).lower().replace("_", "-")
    if re.search(r"sentinel-?\s?2|\bs2[abc]\b|\bmsi\b", text):
        return "sentinel-2"
    if re.search(r"landsat-?\s?[89]|\blc0[89]|\bl[89]-|\boli\b", text):
        return "landsat-8"
    if re.search(r"landsat-?\s?[4-7]|\bl[et]0[4-7]|\betm\b|\bthematic mapper\b", text):
        return "landsat-7"
    return None


def wavelength_name(description: str, family: str | None = None) -> str | None:
    """Wavelength name of a band from the file's text for it, or None.

    Example:
        >>> [wavelength_name(text) for text in ("B04", "B8", "B8A", "Near Infrared", "B4, central wavelength 665 nm")]
        ['red', 'nir', 'nir08', 'nir', 'red']
        >>> wavelength_name("SR_B5"), wavelength_name("Band 5", "landsat-8"), wavelength_name("Band 5")
        ('nir', 'nir', None)
    """
    text = description.strip().lower()
    head = re.split(r"[,;(\[|:]", text)[0].strip()
    plain = re.sub(r"[^a-z0-9]", "", head)
    if plain in _PLAIN:
        return _PLAIN[plain]
    without_prefix = re.sub(r"^(sr|toa|boa|surfacereflectance|reflectance)[\s_.-]*|[\s_.-]*band$", "", head)
    match = re.fullmatch(r"(b|band)[\s_.-]*0?(1[0-2]|[1-9])(a?)", without_prefix)
    if match is None:
        plain = re.sub(r"[^a-z0-9]", "", without_prefix)
        return _PLAIN.get(plain)
    code = match[2] + match[3]
    if family is None and head.startswith("sr"):
        family = "landsat-8"  # Collection 2 surface reflectance names its bands SR_B1..SR_B7
    if family is None and match[1] == "b":
        family = "sentinel-2"
    return _CODES.get(family or "", {}).get(code)


def name_bands(descriptions: Sequence[str | None], colours: Sequence[str], family: str | None = None) -> list[Band]:
    """Name a scene's bands: by description, else by colour interpretation; never by position.

    Args:
        descriptions: the file's band descriptions, in order.
        colours: GDAL colour interpretations in lower case, in order.
        family: what :func:`sensor_family` found.
    """
    texts = [(text or "").strip() for text in descriptions]
    # "B1", "B2", "B3" counting the positions says nothing of wavelengths unless the sensor is known.
    counted = family is None and all(
        re.fullmatch(rf"b(and)?[\s_.-]*0?{number}", text.lower()) for number, text in enumerate(texts, 1)
    )
    bands = []
    for index, (text, colour) in enumerate(zip(texts, colours, strict=True), 1):
        name = None if counted or not text else wavelength_name(text, family)
        if colour == "alpha":
            name = None
        elif name is None:
            name = _COLOURS.get(colour)
        bands.append(Band(index, name, text, colour))
    return bands


def choose_bands(
    bands: Sequence[Band],
    model_bands: Sequence[str],
    *,
    explicit: Sequence[int | str] | None = None,
    optional_bands: Mapping[str, int] | None = None,
    where: str,
) -> BandChoice:
    """Choose the band for each channel of the model.

    Args:
        bands: the scene's bands.
        model_bands: wavelength names in channel order.
        explicit: ``--bidx``, one number or name per channel, in channel order; it may leave out trailing optional ones.
        optional_bands: uint8 value for channels that the scene may lack.
        where: the scene, for messages.

    Raises:
        BandError: a band is missing, named twice, or the number of explicit bands does not fit.
    """
    optional = dict(optional_bands or {})
    if explicit is not None and len(explicit) > 0:
        return _explicit(bands, model_bands, explicit, optional, where)
    images = [band for band in bands if not band.is_alpha]
    if not images:
        raise BandError(f"{where} has no image band; it has {_listing(bands)}")
    required = [name for name in model_bands if name not in optional]
    if len(images) == 1 and (len(required) > 1 or images[0].name in (None, *required)):
        if len(required) > 1:
            warnings.warn(
                f"{where} has one band; it is repeated for {', '.join(required)}; results on grey images are worse",
                BandWarning,
                stacklevel=4,
            )
        indexes = [images[0].index if name in required else None for name in model_bands]
        return _filled(model_bands, indexes, optional, where, repeated=len(required) > 1)
    guessed = False
    if all(band.name is None for band in images) and len(images) in (3, 4):
        names = ("red", "green", "blue", "nir")
        images = [Band(band.index, name, band.description, band.colour) for band, name in zip(images, names)]  # noqa: B905
        guessed = True
        logger.info("%s: bands carry no names; taken as %s by position", where, ", ".join(names[: len(images)]))
    elif len(images) == 4 and {band.name for band in images[:3]} == {"red", "green", "blue"} and not images[3].name:
        images[3] = Band(images[3].index, "nir", images[3].description, images[3].colour)
        guessed = True
    if guessed and len(images) == 4 and "nir" in model_bands:
        warnings.warn(
            f"{where}: band {images[3].index} carries no name and is taken as nir; name it with --bidx if it is not",
            BandWarning,
            stacklevel=4,
        )
    indexes = []
    for name in model_bands:
        matches = [band.index for band in images if band.name == name]
        if len(matches) > 1:
            raise BandError(
                f"{where} has band {name!r} more than once; it has {_listing(bands)}; choose with --bidx NUMBER"
            )
        if not matches and name not in optional:
            raise BandError(
                f"{where} has no band {name!r}; it has {_listing(bands)}; "
                f"give the bands for {', '.join(model_bands)} with --bidx"
            )
        indexes.append(matches[0] if matches else None)
    return _filled(model_bands, indexes, optional, where, guessed=guessed)


def _explicit(
    bands: Sequence[Band],
    model_bands: Sequence[str],
    explicit: Sequence[int | str],
    optional: dict[str, int],
    where: str,
) -> BandChoice:
    missing = list(model_bands[len(explicit) :])
    if len(explicit) > len(model_bands) or any(name not in optional for name in missing):
        raise BandError(
            f"{len(explicit)} bands were given ({', '.join(map(str, explicit))}), "
            f"but the model takes {len(model_bands)}: {', '.join(model_bands)}"
        )
    indexes: list[int | None] = [_find(bands, value, where) for value in explicit]
    return _filled(model_bands, indexes + [None] * len(missing), optional, where)


def _find(bands: Sequence[Band], value: int | str, where: str) -> int:
    """Band number for a number (``3``, ``"3"``), a description (``"B04"``) or a wavelength name (``"red"``)."""
    text = str(value).strip()
    if re.fullmatch(r"[+-]?\d+", text):
        number = int(text)
        if not 1 <= number <= len(bands):
            raise BandError(f"{where} has no band {number}; it has {_listing(bands)}")
        return number
    for matches in (
        [band.index for band in bands if band.description.lower() == text.lower()],
        [band.index for band in bands if band.name == text.lower()],
        [band.index for band in bands if band.name and band.name == wavelength_name(text)],
        [band.index for band in bands if band.colour == text.lower()],
    ):
        if len(matches) > 1:
            raise BandError(f"{where} has band {text!r} more than once; it has {_listing(bands)}; give its number")
        if matches:
            return matches[0]
    raise BandError(f"{where} has no band {text!r}; it has {_listing(bands)}")


def _filled(
    model_bands: Sequence[str],
    indexes: Sequence[int | None],
    optional: dict[str, int],
    where: str,
    *,
    repeated: bool = False,
    guessed: bool = False,
) -> BandChoice:
    fills = {name: optional[name] for name, index in zip(model_bands, indexes, strict=True) if index is None}
    if len(fills) == len(model_bands):
        raise BandError(f"{where} has none of the model's bands ({', '.join(model_bands)})")
    if fills:
        logger.info("%s: channels filled with a constant: %s", where, fills)
        warnings.warn(
            f"no {' and no '.join(fills)} band of {where} is used; the model does without, less well",
            BandWarning,
            stacklevel=5,
        )
    return BandChoice(tuple(indexes), fills, repeated, guessed)


def _listing(bands: Sequence[Band]) -> str:
    shown = ", ".join(str(band) for band in bands[:16])
    return shown + (f", ... ({len(bands)} bands)" if len(bands) > 16 else "")
