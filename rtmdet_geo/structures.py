r"""What crosses the borders between stages: :class:`Tile`, :class:`Detections`, :class:`ModelSpec`. numpy only.

Masks take two forms. In a tile they are :class:`MaskKernels`: numbers from which :mod:`rtmdet_geo.masks` makes a mask,
which is done for the survivors of NMS only. In a scene they are outlines, so memory follows the objects' edges.

Conventions (stated once, used everywhere):

* Pixel coordinates are continuous; the origin is the **outer corner** of the top-left pixel, x to the right, y down,
  so pixel centres lie at .5.
* A box is ``cx, cy, w, h`` in pixels and an angle in radians, le90: ``w`` is the long side, the angle is the long
  side's, in [-pi/2, pi/2), positive **clockwise on screen**::

      o----> x          angle 0: ship lies along x      angle +pi/4: bow to the lower right (or upper left)
      |   \
      v    \  (+)
      y
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from rtmdet_geo.errors import ConfigError

Frame = Literal["tile", "scene"]
Kind = Literal["rotated", "horizontal", "mask"]
#: Models find objects of some kind, or name what a whole image shows.
ModelKind = Literal["rotated", "horizontal", "mask", "classification"]

#: What a model file's convolutions compute in.
FilePrecision = Literal["fp32", "fp16", "int8"]

#: Grey of pixels beyond the scene, in training and in detection (RTMDet's recipes: Pad, pad_val=114).
PAD_VALUE = 114

#: Wavelength names that model bands use; raster.py maps sensor names such as ``B04`` to them.
BAND_NAMES = ("red", "green", "blue", "nir")


@dataclass(frozen=True, slots=True)
class Tile:
    """One window of the overlap grid, in resampled pixels. ``row`` and ``col`` count tiles, ``x`` and ``y`` pixels."""

    row: int
    col: int
    x: int
    y: int
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class MaskView:
    """The picture that instances were found in: the tile itself, or the tile resized or mirrored.

    Attributes:
        features: (8, h, w) float32 mask features at stride 8 of the picture, padding included.
        step_x: px of the picture from one column of the tile to the next; 1 unless it was resized.
        step_y: likewise, rows.
        flip_x: the picture shows the tile mirrored, left and right changed.
        flip_y: likewise, top and bottom.
    """

    features: NDArray[np.float32]
    step_x: float = 1.0
    step_y: float = 1.0
    flip_x: bool = False
    flip_y: bool = False


@dataclass(frozen=True, slots=True)
class MaskKernels:
    """What the masks of N instances are made of.

    Attributes:
        kernels: (N, 169) float32 parameters of each instance's three convolutions.
        priors: (N, 3) float32 x, y and stride, in px of the view, of the prior that it comes from.
        views: pictures that instances were found in.
        view_index: (N,) int64, index into ``views``.

    Raises:
        ValueError: shapes do not agree.
    """

    kernels: NDArray[np.float32]
    priors: NDArray[np.float32]
    views: tuple[MaskView, ...]
    view_index: NDArray[np.int64]

    def __post_init__(self) -> None:
        """Check the shapes."""
        number = len(self.kernels)
        if self.priors.shape != (number, 3) or self.view_index.shape != (number,):
            raise ValueError(
                f"mask kernels disagree: kernels {self.kernels.shape}, priors {self.priors.shape}, "
                f"view_index {self.view_index.shape}"
            )

    def __len__(self) -> int:
        """Return N."""
        return len(self.kernels)

    def select(self, index: NDArray[Any]) -> MaskKernels:
        """Return those that ``index`` (boolean or integer, numpy rules) picks."""
        return replace(self, kernels=self.kernels[index], priors=self.priors[index], view_index=self.view_index[index])

    @classmethod
    def concatenate(cls, parts: list[MaskKernels]) -> MaskKernels:
        """Join the instances of several pictures of one tile, in order; one part at least."""
        shifts = np.cumsum([0, *(len(part.views) for part in parts)])
        return cls(
            np.concatenate([part.kernels for part in parts]),
            np.concatenate([part.priors for part in parts]),
            tuple(view for part in parts for view in part.views),
            np.concatenate([part.view_index + shift for part, shift in zip(parts, shifts, strict=False)]),
        )


@dataclass(frozen=True, slots=True)
class Detections:
    """N detections in one frame.

    Attributes:
        boxes: (N, 5) cx, cy, w, h in px, angle in rad (le90); float32 in a tile, float64 in a scene.
        scores: (N,) float32 in [0, 1].
        labels: (N,) int64, index into ``ModelSpec.classes``.
        frame: "tile" (px of the tile) or "scene" (px of the source scene).
        kind: "rotated", "horizontal" or "mask".
        masks: of kind "mask" only: :class:`MaskKernels` in a tile; in a scene (N,) outlines of its pixels, see
            :mod:`rtmdet_geo.annotations.outlines`, in the px of the boxes. None where nothing needs them.

    Raises:
        ValueError: shapes do not agree.
    """

    boxes: NDArray[Any]
    scores: NDArray[np.float32]
    labels: NDArray[np.int64]
    frame: Frame = "tile"
    kind: Kind = "rotated"
    masks: MaskKernels | NDArray[np.object_] | None = None

    def __post_init__(self) -> None:
        """Cast to the contract's dtypes and check the shapes."""
        box_dtype = np.float32 if self.frame == "tile" else np.float64
        object.__setattr__(self, "boxes", np.ascontiguousarray(self.boxes, box_dtype).reshape(-1, 5))
        object.__setattr__(self, "scores", np.ascontiguousarray(self.scores, np.float32))
        object.__setattr__(self, "labels", np.ascontiguousarray(self.labels, np.int64))
        number = len(self.boxes)
        if self.scores.shape != (number,) or self.labels.shape != (number,):
            raise ValueError(
                f"Detections disagree: boxes {self.boxes.shape}, scores {self.scores.shape}, labels {self.labels.shape}"
            )
        if self.masks is not None and len(self.masks) != number:
            raise ValueError(f"Detections disagree: {number} boxes, {len(self.masks)} masks")

    def __len__(self) -> int:
        """Return N."""
        return len(self.boxes)

    def select(self, index: NDArray[Any]) -> Detections:
        """Return the detections that ``index`` (boolean or integer, numpy rules) picks."""
        masks = self.masks.select(index) if isinstance(self.masks, MaskKernels) else self.masks
        if isinstance(masks, np.ndarray):
            masks = masks[index]
        return replace(self, boxes=self.boxes[index], scores=self.scores[index], labels=self.labels[index], masks=masks)

    @classmethod
    def empty(cls, frame: Frame = "tile", kind: Kind = "rotated") -> Detections:
        """Return N = 0."""
        return cls(np.zeros((0, 5)), np.zeros(0, np.float32), np.zeros(0, np.int64), frame, kind)

    @classmethod
    def concatenate(cls, parts: list[Detections], frame: Frame = "scene", kind: Kind = "rotated") -> Detections:
        """Join detections of one frame and kind, in order; an empty list gives N = 0.

        Raises:
            ValueError: some have masks and others, that are not empty, have none.
        """
        if not parts:
            return cls.empty(frame, kind)
        masks = _join_masks([part for part in parts if len(part)])
        return cls(
            np.concatenate([part.boxes for part in parts]),
            np.concatenate([part.scores for part in parts]),
            np.concatenate([part.labels for part in parts]),
            frame,
            kind,
            masks,
        )


def _join_masks(parts: list[Detections]) -> MaskKernels | NDArray[np.object_] | None:
    masks = [part.masks for part in parts]
    kernels = [item for item in masks if isinstance(item, MaskKernels)]
    outlines = [item for item in masks if isinstance(item, np.ndarray)]
    if masks and len(kernels) == len(masks):
        return MaskKernels.concatenate(kernels)
    if masks and len(outlines) == len(masks):
        return np.concatenate(outlines)
    if kernels or outlines:
        raise ValueError("detections with masks of one form and detections with another, or none, cannot be joined")
    return None


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StretchSpec(_Frozen):
    """How scene values become uint8.

    ``fixed``: ``low``..``high`` in physical units (reflectance for optical sensors) map linearly to 0..255. Integer
    scenes without scale/offset tags are multiplied by ``default_scale``; float scenes are physical already; **8-bit
    scenes are taken as already stretched** and pass unchanged. With ``dark_percent`` both limits of a band move up by
    that percentile of the band over the whole valid scene, in 8-bit scenes too: what haze or a constant offset added
    is subtracted again (dark-object subtraction, Chavez 1988, doi:10.1016/0034-4257(88)90019-3).
    ``percentile``: the ``low_percent`` and ``high_percent`` percentiles of each band over the whole valid scene map to
    0..255 (8-bit scenes too).
    ``none``: values are used as they are and must be 8-bit.
    """

    kind: Literal["fixed", "percentile", "none"] = "fixed"
    low: float = 0.0
    high: float = 0.3
    default_scale: float = 1e-4
    dark_percent: float | None = Field(None, ge=0, lt=100)
    low_percent: float = Field(0.5, ge=0, lt=100)
    high_percent: float = Field(99.5, gt=0, le=100)

    @model_validator(mode="after")
    def _ordered(self) -> StretchSpec:
        if not self.low < self.high or not self.low_percent < self.high_percent:
            raise ValueError("stretch limits must rise: low < high and low_percent < high_percent")
        return self


class ModelSpec(_Frozen):
    """Everything that a model file says of itself; stored in ONNX metadata, safetensors metadata, engine sidecars.

    Attributes:
        architecture: builder name, such as ``rtmdet_r_tiny``.
        classes: class names in label order.
        bands: names of the model's input channels, in channel order (see BAND_NAMES).
        optional_bands: uint8 value that fills a band which a scene may lack.
        mean, std: per channel, on the uint8 scale; applied inside the graph.
        tile_size: side of the square input in px. stride_multiple: tile sides are multiples of it.
        max_detections: K, rows that the model file returns per image.
        gsd_m: metres per pixel on the ground that the model expects; None means any.
        trained_gsd_m: lowest and highest metres per pixel of the training scenes before they were resampled to gsd_m.
        score_threshold, iou_threshold: defaults of detect; the first maximises F1 on left-out data.
        overlap: default tile overlap in px.
        precision: of the model file's convolutions; weights are fp32.
        differences: how far the file is from what it was made of, as its export measured on check tiles, such as
            ``boxes_px`` and ``scores``; empty: not compared.
    """

    format_version: Literal[1] = 1
    name: str
    architecture: str
    kind: ModelKind = "rotated"
    classes: tuple[str, ...]
    bands: tuple[str, ...] = ("red", "green", "blue")
    optional_bands: dict[str, int] = Field(default_factory=dict)
    input_dtype: Literal["uint8"] = "uint8"
    mean: tuple[float, ...]
    std: tuple[float, ...]
    tile_size: int = Field(1024, gt=0)
    overlap: int = Field(200, ge=0)
    stride_multiple: int = 32
    max_detections: int = 2000
    gsd_m: float | None = Field(None, gt=0)
    trained_gsd_m: tuple[float, float] | None = None
    stretch: StretchSpec = Field(default_factory=StretchSpec)
    score_threshold: float = Field(0.3, ge=0, le=1)
    iou_threshold: float = Field(0.1, ge=0, le=1)
    angle_convention: Literal["le90"] = "le90"
    weights_sha256: str = ""
    training_data: str = ""
    metrics: dict[str, float] = Field(default_factory=dict)
    limits: str = ""
    licence: str = ""
    attribution: str = ""
    exporter: str = ""
    precision: FilePrecision = "fp32"
    differences: dict[str, float] = Field(default_factory=dict)

    @property
    def object_kind(self) -> Kind:
        """The kind of objects that the model finds.

        Raises:
            ConfigError: it finds none, it classifies whole images.
        """
        if self.kind == "classification":
            raise ConfigError(f"model {self.name!r} classifies whole images and finds no objects; choose a detector")
        return self.kind

    @model_validator(mode="after")
    def _consistent(self) -> ModelSpec:
        channels = len(self.bands)
        if len(self.mean) != channels or len(self.std) != channels:
            raise ValueError(f"mean and std need one value per band ({channels})")
        if not set(self.optional_bands) <= set(self.bands):
            raise ValueError("optional_bands must be among bands")
        if not self.classes:
            raise ValueError("a model needs at least one class")
        return self
