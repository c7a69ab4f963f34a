"""Networks in torch: builders, decoding, weights. Nothing here reads scenes."""

from __future__ import annotations

from rtmdet_geo.models.heads import RotatedOutputs
from rtmdet_geo.models.rtmdet import (
    BUILDERS,
    RTMDet,
    get_model,
    rtmdet_r_l,
    rtmdet_r_m,
    rtmdet_r_nano,
    rtmdet_r_s,
    rtmdet_r_test,
    rtmdet_r_tiny,
)

__all__ = [
    "BUILDERS",
    "RTMDet",
    "RotatedOutputs",
    "get_model",
    "rtmdet_r_l",
    "rtmdet_r_m",
    "rtmdet_r_nano",
    "rtmdet_r_s",
    "rtmdet_r_test",
    "rtmdet_r_tiny",
]
