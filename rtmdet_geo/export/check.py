"""Does an exported file give what it came from? The same tiles through both, row by row. No torch.

fp32 files are held to the rounding of single precision, rank by rank. Half precision moves every number a little, so
ranks change; there the detections count that a user would see, wherever they stand. All its roundings are made, as a
GPU would, which CPUs leave out (:func:`rtmdet_geo.export.half.with_roundings`). int8 files are another model, whose
quality is its average precision; how far they are off is measured and not judged.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.backends.contract import OUTPUTS, rows_per_level
from rtmdet_geo.backends.onnxrt import open_graph, open_model_file
from rtmdet_geo.errors import ExportMismatchError
from rtmdet_geo.structures import FilePrecision, ModelSpec

logger = logging.getLogger(__name__)

Pixels = NDArray[np.uint8]
#: A model's outputs by name.
Outputs = dict[str, NDArray[np.float32]]

#: Rows of fp32 files with scores above this are compared one by one; below, ranks may differ between engines.
CHECK_SCORE = 0.05
#: ... and so many rows of every image at least.
NUM_CHECK_ROWS = 100
#: Detections of other files are compared from so much above the score threshold on: one at the threshold may be lost.
SCORE_MARGIN = 0.02
#: ... and so many at least where no score is that high.
NUM_CHECK_DETECTIONS = 20


class Differences(NamedTuple):
    """How far a file is from its reference at most.

    Attributes:
        boxes: px and rad; per 100 px of size where boxes are larger than that.
        scores: probabilities.
        kernels: of instances, as a part of the largest number in any kernel of the batch.
        mask_features: likewise.
        matched: detections that have a partner within the tolerances; 0 where rows are compared rank by rank.
        unmatched: detections without one, in either.
    """

    boxes: float = 0.0
    scores: float = 0.0
    kernels: float = 0.0
    mask_features: float = 0.0
    matched: int = 0
    unmatched: int = 0

    def times(self, factor: float) -> Differences:
        """Return the distances times a factor, as tolerances are widened."""
        return Differences(
            factor * self.boxes, factor * self.scores, factor * self.kernels, factor * self.mask_features
        )

    def joined(self, other: Differences) -> Differences:
        """Return the larger of the distances, and all detections."""
        return Differences(
            max(self.boxes, other.boxes),
            max(self.scores, other.scores),
            max(self.kernels, other.kernels),
            max(self.mask_features, other.mask_features),
            self.matched + other.matched,
            self.unmatched + other.unmatched,
        )


#: Largest differences allowed between the reference and a fp32 file on drawn tiles,
TOLERANCES = Differences(boxes=0.02, scores=2e-4, kernels=1e-3, mask_features=1e-3)
#: on real ones,
REAL_TOLERANCES = Differences(boxes=0.05, scores=1e-3, kernels=1e-3, mask_features=1e-3)
#: of a fp16 file,
HALF_TOLERANCES = Differences(boxes=0.5, scores=0.01, kernels=0.02, mask_features=0.02)
#: and within which a detection of an int8 file is the same one.
INT8_TOLERANCES = Differences(boxes=4.0, scores=0.2, kernels=np.inf, mask_features=np.inf)
#: Share of a fp16 model's detections without a partner from which on something is broken. Trained models lose none;
#: numbers of networks that were never trained can be so large that fp16 moves some boxes further, which is said.
MAX_HALF_SHARE = 0.25
#: Kernels and mask features smaller than this leave every mask where it is; those of networks that were never trained
#: are, and vanish in fp16.
_LEAST_SIZE = 1e-3


class CheckBatch(NamedTuple):
    """A batch of tiles to compare on.

    Attributes:
        tiles: uint8 (N, C, H, W).
        is_real: they are cut out of scenes.
    """

    tiles: Pixels
    is_real: bool = False


class Reference(Protocol):
    """What a file is compared with.

    Attributes:
        name: for messages.
    """

    name: str

    def __call__(self, images: Pixels) -> Outputs:
        """Return the outputs for uint8 (N, C, H, W)."""
        ...


class FileReference:
    """A model file in onnxruntime as a function of pixels, on the CPU; of a fixed batch, the last one is filled up.

    What is fp16 in the file is rounded to fp16, whatever the CPU computes in.

    Raises:
        ModelFileError: missing, corrupt or foreign file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open the file."""
        self._session, self.spec = open_model_file(path)
        if self.spec.precision == "fp16":
            self._session = _open_rounded(path)
        self.name = f"the {self.spec.precision} model file"

    @property
    def is_fixed(self) -> bool:
        """Whether it takes tiles of ``spec.tile_size`` only."""
        return all(isinstance(size, int) for size in self._session.get_inputs()[0].shape[2:])

    def __call__(self, images: Pixels) -> Outputs:
        """Return the outputs for uint8 (N, C, H, W)."""
        names = list(OUTPUTS[self.spec.kind])
        size = self._session.get_inputs()[0].shape[0]
        size = size if isinstance(size, int) else len(images)
        parts = []
        for start in range(0, len(images), size):
            batch = images[np.arange(start, start + size) % len(images)]
            parts.append(self._session.run(names, {"images": batch}))
        joined = [np.concatenate(values)[: len(images)] for values in zip(*parts, strict=True)]
        return dict(zip(names, joined, strict=True))


def _open_rounded(path: str | os.PathLike[str]) -> Any:
    """Return onnxruntime's session of a fp16 file, which was opened before, with all its roundings."""
    import onnx

    from rtmdet_geo.export.half import with_roundings

    return open_graph(with_roundings(onnx.load(os.fspath(path))).SerializeToString())


def verify_export(
    reference: Reference, file: FileReference, batches: Iterable[CheckBatch], *, slack: float = 1.0
) -> Differences:
    """Compare a model file in onnxruntime with what it came from.

    fp32: scores are compared rank by rank, mask features number by number. The rest is compared for every row with a
    score above CHECK_SCORE and for the NUM_CHECK_ROWS best: the file must return the same label with (nearly) the same
    box somewhere, since rows of equal score may swap ranks between engines; of instances, the row of the same label and
    prior, with the same box and kernel.

    fp16 and int8: every detection of one whose score is SCORE_MARGIN above the threshold must be in the other, and
    scores are compared rank by rank. Rows near the cut of a level, where another pair may stand, are left out.

    Args:
        reference: gives the outputs that the file should give.
        file: model file.
        batches: tiles to run.
        slack: how many times the tolerances are allowed.

    Returns:
        The largest differences; 0 for what the kind does not have.

    Raises:
        ExportMismatchError: a difference exceeds what the file's precision allows, a number is not finite, or the
            shapes differ. Of detections, if more than MAX_HALF_SHARE (fp16; fewer are a warning of the log), or most
            (int8), have no partner.
    """
    precision = file.spec.precision
    groups: dict[bool, list[_Run]] = {False: [], True: []}
    for tiles, is_real in batches:
        run = _Run(reference(tiles), file(tiles), tiles.shape)
        _check_arrays(run, reference.name)
        groups[is_real].append(run)
    worst = Differences()
    for is_real, runs in groups.items():
        if not runs:
            continue
        if precision == "fp32":
            allowed = REAL_TOLERANCES if is_real else TOLERANCES
        else:
            allowed = HALF_TOLERANCES if precision == "fp16" else INT8_TOLERANCES
        allowed = allowed.times(slack)
        if file.spec.kind == "classification":
            here = _compare_probabilities(runs)
        elif precision == "fp32":
            here = _compare_ranked(runs, file.spec)
        else:
            here = _compare_detections(runs, file.spec, allowed)
        _judge(here, allowed, precision, reference.name)
        worst = worst.joined(here)
    logger.info("export check: largest differences %s", in_words(worst))
    if precision == "fp16" and any(value > usual for value, usual in zip(worst[:4], HALF_TOLERANCES[:4], strict=True)):
        logger.warning(
            "%s in fp16 is off by %s, more than fp16 usually costs (%s); precision fp32 is exact",
            *(file.spec.name, in_words(worst), in_words(HALF_TOLERANCES)),
        )
    return worst


class _Run(NamedTuple):
    """What both gave for one batch of images of a shape (N, C, H, W)."""

    expected: Outputs
    found: Outputs
    shape: tuple[int, ...]


def _check_arrays(run: _Run, name: str) -> None:
    expected, found, (number, *_) = run
    for output, values in found.items():
        if expected[output].shape != values.shape:
            raise ExportMismatchError(
                f"output {output!r} at batch {number}: {name} {expected[output].shape}, file {values.shape}"
            )
        for engine, numbers in ((name, expected[output]), ("the file", values)):
            if not np.isfinite(numbers).all():
                raise ExportMismatchError(f"output {output!r} at batch {number} is not finite in {engine}")


def _judge(here: Differences, allowed: Differences, precision: FilePrecision, name: str) -> None:
    """Refuse what exceeds the tolerances; of int8, where fewer are found again than not."""
    share = {"fp32": 0.0, "fp16": MAX_HALF_SHARE, "int8": 0.5}[precision]
    is_bad = here.unmatched > share * (here.matched + here.unmatched)
    if precision != "int8":
        limits = allowed._replace(boxes=np.inf) if precision == "fp16" else allowed  # those too far apart were counted
        is_bad |= any(value > limit for value, limit in zip(here[:4], limits[:4], strict=True))
    if is_bad:
        raise ExportMismatchError(
            f"the exported graph differs from {name} by {in_words(here)} (allowed: {in_words(allowed)}); "
            "nothing was written"
        )


def in_words(differences: Differences) -> str:
    """Say differences in one line."""
    words = [
        f"{name} {value:.3g}{' px' if name == 'boxes' else ''}"
        for name, value in zip(Differences._fields[:4], differences[:4], strict=True)
    ]
    if differences.matched or differences.unmatched:
        words.append(f"{differences.matched} detections matched, {differences.unmatched} not")
    return ", ".join(words)


def as_record(differences: Differences, spec: ModelSpec) -> dict[str, float]:
    """Return differences as ``ModelSpec.differences`` has them: what the model's kind and precision do have."""
    record = {"scores": differences.scores}
    if spec.kind != "classification":
        record = {"boxes_px": differences.boxes, **record}
        if spec.precision != "fp32":
            record |= {"matched": differences.matched, "unmatched": differences.unmatched}
    if spec.kind == "mask":
        record |= {"kernels": differences.kernels, "mask_features": differences.mask_features}
    return {name: float(f"{value:.4g}") for name, value in record.items()}


def _compare_probabilities(runs: Sequence[_Run]) -> Differences:
    """Return how far a classifier's file is from its reference."""
    return Differences(scores=max(float(np.abs(run.expected["scores"] - run.found["scores"]).max()) for run in runs))


def _compare_ranked(runs: Sequence[_Run], spec: ModelSpec) -> Differences:
    """Return how far a detector's fp32 file is from its reference."""
    worst = Differences()
    for expected, found, (_, _, height, width) in runs:
        levels = rows_per_level(spec.object_kind, len(spec.classes), height, width)
        boxes, kernels = 0.0, 0.0
        for image in range(len(expected["scores"])):
            mine, others = ({name: values[image] for name, values in side.items()} for side in (expected, found))
            for row in np.flatnonzero(_is_compared(mine["scores"], levels)):
                here = _distances(mine, others, int(row))
                nearest = int(here.boxes.argmin()) if len(here.boxes) else -1
                boxes = max(boxes, float(here.boxes[nearest]) if nearest >= 0 else np.inf)
                kernels = max(kernels, float(here.kernels[nearest]) if nearest >= 0 else np.inf)
        scores = float(np.abs(expected["scores"] - found["scores"]).max(initial=0.0))
        worst = worst.joined(_with_masks(Differences(boxes, scores, kernels), expected, found, spec))
    return worst


def _compare_detections(runs: Sequence[_Run], spec: ModelSpec, allowed: Differences) -> Differences:
    """Return how far a detector's fp16 or int8 file is from its reference in what a user sees of it.

    Distances are those of pairs; of fp16, where the nearest row is too far to be a partner, its distance counts too.
    """
    best = np.sort(np.concatenate([run.expected["scores"].ravel() for run in runs]))[::-1]
    floor = min(spec.score_threshold + SCORE_MARGIN, float(best[min(NUM_CHECK_DETECTIONS, len(best)) - 1]))
    worst = Differences()
    for expected, found, (_, _, height, width) in runs:
        levels = rows_per_level(spec.object_kind, len(spec.classes), height, width)
        by_rank = float(np.abs(expected["scores"] - found["scores"]).max(initial=0.0))
        here = Differences(scores=by_rank)
        for image in range(len(expected["scores"])):
            mine, others = ({name: values[image] for name, values in side.items()} for side in (expected, found))
            is_mine, is_theirs = (_is_kept(rows["scores"], levels, 2 * allowed.scores) for rows in (mine, others))
            is_mine &= mine["scores"] >= floor
            is_theirs &= others["scores"] >= floor + allowed.scores
            here = here.joined(_match(mine, others, is_mine, allowed))
            here = here.joined(_match(others, mine, is_theirs, allowed)._replace(matched=0))
        worst = worst.joined(_with_masks(here, expected, found, spec))
    return worst


def _match(mine: Outputs, others: Outputs, is_compared: NDArray[np.bool_], allowed: Differences) -> Differences:
    """Return the distances from some of an image's rows to their partners, and how many have one."""
    boxes, scores, kernels, matched, unmatched = 0.0, 0.0, 0.0, 0, 0
    for row in np.flatnonzero(is_compared):
        here = _distances(mine, others, int(row))
        apart = np.maximum(here.boxes / allowed.boxes, here.scores / allowed.scores)
        nearest = int(apart.argmin()) if len(apart) else -1
        if nearest < 0 or apart[nearest] > 1:
            unmatched += 1
            if np.isinf(allowed.kernels):
                continue
        else:
            matched += 1
        boxes = max(boxes, float(here.boxes[nearest]) if nearest >= 0 else np.inf)
        scores = max(scores, float(here.scores[nearest]) if nearest >= 0 else np.inf)
        kernels = max(kernels, float(here.kernels[nearest]) if nearest >= 0 else np.inf)
    return Differences(boxes, scores, kernels, 0.0, matched, unmatched)


def _with_masks(here: Differences, expected: Outputs, found: Outputs, spec: ModelSpec) -> Differences:
    """Add the difference of mask features, and make kernels' a part of the largest."""
    if spec.kind != "mask":
        return here
    features = float(np.abs(expected["mask_features"] - found["mask_features"]).max())
    return here._replace(
        kernels=here.kernels / _largest(expected["kernels"]),
        mask_features=features / _largest(expected["mask_features"]),
    )


def _largest(values: NDArray[np.float32]) -> float:
    """Return the largest absolute value, what differences are compared with; not less than counts in a mask."""
    return float(np.abs(values).max(initial=_LEAST_SIZE))


def _is_compared(scores: NDArray[np.float32], levels: list[tuple[int, bool]]) -> NDArray[np.bool_]:
    """Say which of one image's rows must be in the file too.

    Rows whose score ties with the last row of a level that was cut off are left out: another pair may stand there.
    """
    is_checked = scores >= CHECK_SCORE
    is_checked[np.argsort(-scores, kind="stable")[:NUM_CHECK_ROWS]] = True
    return is_checked & _is_kept(scores, levels, 1e-6)


def _is_kept(scores: NDArray[np.float32], levels: list[tuple[int, bool]], margin: float) -> NDArray[np.bool_]:
    """Say which rows of an image are more than a margin above the last row of a level that was cut off."""
    is_kept = np.ones(len(scores), bool)
    start = 0
    for rows, is_cut in levels:
        level = slice(start, start + rows)
        if is_cut:
            is_kept[level] = scores[level] > scores[level].min() + margin
        start += rows
    return is_kept


class _Distances(NamedTuple):
    """From one row to each row that may be its partner: of its label, of instances also of its prior."""

    boxes: NDArray[np.float64]
    scores: NDArray[np.float64]
    kernels: NDArray[np.float64]


def _distances(mine: Outputs, others: Outputs, row: int) -> _Distances:
    box = mine["boxes"][row]
    partners = np.flatnonzero(others["labels"] == mine["labels"][row])
    if "mask_priors" in mine:
        is_same = (others["mask_priors"][partners] == mine["mask_priors"][row]).all(axis=1)
        partners = partners[is_same]
    difference = np.abs(others["boxes"][partners] - box).astype(np.float64)
    difference[:, 4] = np.minimum(difference[:, 4] % np.pi, np.pi - difference[:, 4] % np.pi)
    boxes = difference.max(axis=1, initial=0.0) / max(1.0, float(box[2:4].max()) / 100)
    scores = np.abs(others["scores"][partners] - mine["scores"][row]).astype(np.float64)
    kernels = np.zeros(len(partners))
    if "kernels" in mine:
        kernels = np.abs(others["kernels"][partners] - mine["kernels"][row]).max(axis=1).astype(np.float64)
    return _Distances(boxes, scores, kernels)
