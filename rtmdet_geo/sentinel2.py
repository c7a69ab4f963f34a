"""The offset of Sentinel-2 products: from processing baseline 04.00 on, digital numbers are 1000 too high.

Reflectance is ``(DN + offset) / 10000`` with an offset of -1000 in Level-1C (RADIO_ADD_OFFSET) and Level-2A
(BOA_ADD_OFFSET) products of baseline 04.00 and later, 0 before; DN 0 stays "no data" (Sentinel-2 Products Specification
Document, issue 14.9). Many copies have it subtracted already, so a date or the sensor's name alone says nothing: the
offset is used only where the file itself is such a product and says so.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping

logger = logging.getLogger(__name__)

#: In DN, for baselines from the first number on; tests of processors are numbered from the second on.
BASELINE_OFFSET_DN = -1000.0
_FIRST_BASELINE, _TEST_BASELINES = 4.0, 90.0

_OFFSET_TAGS = ("boa_add_offset", "radio_add_offset", "boa_add_offset_values_list", "radiometric_offset_list")
#: Name of a product, such as S2B_MSIL2A_20230426T105619_N0509_R094_T29SPS_20230426T141124; its baseline in a group.
_PRODUCT = r"S2[A-D]_MSIL(?:1C|2A)_\d{8}T\d{6}_N(\d{2})(\d{2})_R\d{3}_T[0-9A-Z]{5}_\d{8}T\d{6}"
#: A band's own file inside a product, as delivered.
_GRANULE = re.compile(rf"{_PRODUCT}\.SAFE[/\\].*IMG_DATA[/\\].*_B(?:0\d|1[0-2]|8A)(?:_[126]0m)?\.jp2$")


def radiometric_offset(path: str, tags: Mapping[str, str], nodata: float | None) -> tuple[float, str] | None:
    """Offset in DN of a Sentinel-2 Level-1C or Level-2A scene and where it is from; None where it is not certain.

    A scene is one if its tags name such a product (PRODUCT_TYPE as GDAL's driver has it, PRODUCT_URI), or if it is a
    band's own file in a product's folder. Its nodata value must be 0 (or the tag SPECIAL_VALUE_NODATA, or the file be a
    product's own). Tags that give the offset have precedence over the processing baseline, the baseline's tag over the
    product's name.

    Args:
        path: of the scene.
        tags: names in any case.
        nodata: of the band.

    Example:
        >>> radiometric_offset("a.tif", {"PRODUCT_TYPE": "S2MSI2A", "PROCESSING_BASELINE": "05.09"}, 0)
        (-1000.0, 'PROCESSING_BASELINE 05.09')
    """
    lower = {name.lower(): text.strip() for name, text in tags.items()}
    granule = _GRANULE.search(path)
    uri = re.match(_PRODUCT, lower.get("product_uri", ""))
    if not (granule or uri or re.fullmatch(r"S2MSI(1C|2A)p?", lower.get("product_type", ""))):
        return None
    if not (granule or nodata == 0 or lower.get("special_value_nodata") == "0"):
        return None
    for name in _OFFSET_TAGS:
        if name in lower:
            return _tagged(path, name.upper(), lower[name])
    text = lower.get("processing_baseline")
    evidence = f"PROCESSING_BASELINE {text}"
    product = uri or granule
    if text is None and product is not None:
        text = f"{product[1]}.{product[2]}"
        evidence = f"processing baseline {text} of the product's name"
    if text is None or not re.fullmatch(r"\d{1,2}\.\d{1,2}", text):
        return None
    return (BASELINE_OFFSET_DN, evidence) if _FIRST_BASELINE <= float(text) < _TEST_BASELINES else None


def _tagged(path: str, name: str, text: str) -> tuple[float, str] | None:
    """The offset that a tag gives, one number or the same for all bands."""
    numbers = set(re.findall(r"[+-]?\d+(?:\.\d+)?", text))
    values = {float(number) for number in numbers}
    if len(values) != 1 or min(values) > 0:
        logger.warning("%s: tag %s is %r, which is no one offset of all bands; none is used", path, name, text)
        return None
    return values.pop(), f"{name} {text}"
