"""What a network in training finds in labelled images, by the rules that the finished model goes by.

Large scenes are searched in tiles with the border rule and merge of ``detect``. Where training samples whole images,
they are tested whole, as the published recipes test them: resized with the sides' ratio kept, padded to a square with
grey 114, many at once; what is found goes back to the image's own px, then through one NMS (mmdet 3.x
``BaseDenseHead.predict_by_feat``).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from rtmdet_geo.boxes import regularize_le90
from rtmdet_geo.config import Recipe
from rtmdet_geo.errors import AnnotationError
from rtmdet_geo.masks import CroppedMask, assemble_detections, crop_outline
from rtmdet_geo.merge import merge_survivors, tile_survivors
from rtmdet_geo.models.decode import Candidates, DetectionGraph, InstanceCandidates
from rtmdet_geo.models.heads import STRIDES
from rtmdet_geo.nms import nms_of_kind
from rtmdet_geo.preprocess import Letterbox, letterbox
from rtmdet_geo.recipe_sections import ImageAugment
from rtmdet_geo.stitch import outlines_of
from rtmdet_geo.structures import PAD_VALUE, Detections, Kind, MaskKernels, MaskView
from rtmdet_geo.tiles import TileGrid
from rtmdet_geo.training.labelled import LabelledImage
from rtmdet_geo.views import View, restore

#: Whole images that the network sees at once; a CPU gains nothing by more.
BATCH_SIZE_CUDA, BATCH_SIZE_CPU = 8, 1
#: Candidates per level of horizontal boxes in whole images (``nms_pre`` of the published test configuration, at which
#: its figures were measured); model files return fewer.
HORIZONTAL_CANDIDATES = 30_000

Result = TypeVar("Result")


@dataclass(frozen=True)
class Found:
    """What a network found in one image: detections in its px, and for models of instances a mask for each."""

    detections: Detections
    masks: list[CroppedMask] | None = None


def detect_chip(
    network: torch.nn.Module, chip: LabelledImage, recipe: Recipe, *, dropped: Sequence[str] = (), device: str = "cpu"
) -> Detections:
    """Run the network over one chip in tiles and merge; see :func:`find_objects`, masks are not assembled."""
    return _search_tiles(network, chip, recipe, dropped, device)


def find_objects(
    network: torch.nn.Module, image: LabelledImage, recipe: Recipe, *, dropped: Sequence[str] = (), device: str = "cpu"
) -> Found:
    """Run the network over one image, in tiles or whole as the recipe samples images.

    Args:
        network: in eval mode; normalisation is added as in a model file.
        image: pixels (C, H, W) uint8.
        recipe: tile size and overlap or image size, normalisation, thresholds.
        dropped: names of bands to overwrite with their fill value, as if the scene lacked them.
        device: where the network is.

    Returns:
        Detections in px of the image (frame "scene"), score at or above ``validation.score_threshold``, the best
        ``validation.max_detections`` in score order; each with its mask if the model gives masks.

    Raises:
        AnnotationError: the image does not decode.
    """
    (found,) = search(network, [image], recipe, then=lambda _, found: found, dropped=dropped, device=device)
    if isinstance(found, AnnotationError):
        raise found
    return found


def search(
    network: torch.nn.Module,
    images: Sequence[LabelledImage],
    recipe: Recipe,
    *,
    then: Callable[[LabelledImage, Found], Result],
    dropped: Sequence[str] = (),
    device: str = "cpu",
) -> Iterator[Result | AnnotationError]:
    """Search images one after another; masks are large, so they go no further than ``then``.

    Args:
        network: see :func:`find_objects`.
        images: in any number and of any sizes.
        recipe: see :func:`find_objects`; ``loop.workers`` threads prepare whole images and look after the results.
        then: makes of an image and what was found in it what is wanted of it; called in threads.
        dropped: see :func:`find_objects`.
        device: likewise.

    Yields:
        What ``then`` gave, in the images' order; the error of an image that does not decode.
    """
    if isinstance(recipe.augment, ImageAugment):
        yield from _search_whole(network, images, recipe, recipe.augment.image_size, then, dropped, device)
        return
    for image in images:
        try:
            detections = _search_tiles(network, image, recipe, dropped, device, with_masks=True)
        except AnnotationError as error:
            yield error
            continue
        masks = None
        if network.kind == "mask":
            outlines = outlines_of(detections)  # None where nothing was found
            masks = [] if outlines is None else [crop_outline(item, image.width, image.height) for item in outlines]
        yield then(image, Found(detections, masks))


def _search_tiles(
    network: torch.nn.Module,
    chip: LabelledImage,
    recipe: Recipe,
    dropped: Sequence[str],
    device: str,
    *,
    with_masks: bool = False,
) -> Detections:
    """Return the merged detections of the tiles of an image."""
    model, section = recipe.model, recipe.validation
    graph = DetectionGraph(network, model.mean, model.std).to(device)
    pixels = chip.pixels
    grid = TileGrid(chip.width, chip.height, model.tile_size, model.overlap)
    parts = []
    shape = grid.padded_shape(STRIDES[-1])
    for tile in grid:
        image = np.full((len(model.bands), *shape), PAD_VALUE, np.uint8)
        image[:, : tile.height, : tile.width] = pixels[:, tile.y : tile.y + tile.height, tile.x : tile.x + tile.width]
        _drop_bands(image, recipe, dropped)
        with torch.inference_mode():
            candidates = graph(torch.from_numpy(image)[None].to(device))
        found = _above(candidates, 0, graph.kind, section.score_threshold, with_masks=with_masks)
        parts.append(
            tile_survivors(
                found,
                tile,
                grid,
                iou_threshold=section.nms_iou_threshold,
                mask_threshold=section.mask_threshold,
                input_shape=shape,
            )
        )
    # average precision as published: nothing but NMS by boxes
    merged = merge_survivors(
        parts, grid, iou_threshold=section.nms_iou_threshold, max_overlap=1, kind=graph.kind
    ).detections
    return merged.select(np.arange(min(len(merged), section.max_detections)))


def _search_whole(
    network: torch.nn.Module,
    images: Sequence[LabelledImage],
    recipe: Recipe,
    side: int,
    then: Callable[[LabelledImage, Found], Result],
    dropped: Sequence[str],
    device: str,
) -> Iterator[Result | AnnotationError]:
    """Yield per image what ``then`` makes of it; threads decode and resize before, and do NMS and masks after."""
    graph = DetectionGraph(
        network,
        recipe.model.mean,
        recipe.model.std,
        limit=HORIZONTAL_CANDIDATES if network.kind == "horizontal" else None,
    ).to(device)
    batch_size = BATCH_SIZE_CUDA if device.startswith("cuda") else BATCH_SIZE_CPU

    def prepare(image: LabelledImage) -> Letterbox | AnnotationError:
        try:
            return _prepare(image, side, recipe, dropped)
        except AnnotationError as error:
            return error

    def finish(image: LabelledImage, boxed: Letterbox, candidates: Detections) -> Result:
        return then(image, _to_image(candidates, boxed, image, recipe))

    with ThreadPoolExecutor(max(recipe.loop.workers, 1), thread_name_prefix="validation") as pool:
        prepared = _ahead(pool, prepare, images, 2 * batch_size)
        results: deque[Future[Result] | AnnotationError] = deque()
        for batch in _batches(zip(images, prepared, strict=True), batch_size):
            good = [(image, boxed) for image, boxed in batch if not isinstance(boxed, AnnotationError)]
            rows = iter(_run(graph, [boxed.image for _, boxed in good], recipe, device))
            for image, boxed in batch:
                if isinstance(boxed, AnnotationError):
                    results.append(boxed)
                else:
                    results.append(pool.submit(finish, image, boxed, next(rows)))
            while len(results) > 4 * batch_size:  # what waits holds the features of its masks
                yield _result(results.popleft())
        for entry in results:
            yield _result(entry)


def _result(entry: Future[Any] | AnnotationError) -> Any:
    return entry if isinstance(entry, AnnotationError) else entry.result()


def _ahead(
    pool: ThreadPoolExecutor, make: Callable[[Any], Result], items: Sequence[Any], number: int
) -> Iterator[Result]:
    """Yield ``make(item)`` in order, so many ahead of the one asked for."""
    left = iter(items)
    waiting = deque(pool.submit(make, item) for item in islice(left, number))
    while waiting:
        done = waiting.popleft().result()
        waiting.extend(pool.submit(make, item) for item in islice(left, 1))
        yield done


def _batches(items: Iterator[Result], size: int) -> Iterator[list[Result]]:
    while batch := list(islice(items, size)):
        yield batch


def _prepare(image: LabelledImage, side: int, recipe: Recipe, dropped: Sequence[str]) -> Letterbox:
    """Return an image inside a padded square; its picture has channels first here."""
    boxed = letterbox(image.pixels.transpose(1, 2, 0), side)
    planes = np.ascontiguousarray(boxed.image.transpose(2, 0, 1))
    _drop_bands(planes, recipe, dropped)
    return boxed._replace(image=planes)


def _drop_bands(image: NDArray[np.uint8], recipe: Recipe, dropped: Sequence[str]) -> None:
    """Overwrite bands of (C, H, W) with their fill values."""
    for band in dropped:
        image[recipe.model.bands.index(band)] = recipe.model.optional_bands[band]


def _run(graph: DetectionGraph, pictures: list[NDArray[np.uint8]], recipe: Recipe, device: str) -> Iterator[Detections]:
    """Yield the candidates of pictures of one size; on CUDA in the numbers that training uses."""
    if not pictures:
        return
    images = torch.from_numpy(np.stack(pictures)).to(device, non_blocking=True)
    if recipe.loop.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    dtype = {"fp32": None, "fp16": torch.float16}.get(recipe.loop.precision, torch.bfloat16)
    is_mixed = device.startswith("cuda") and dtype is not None
    with torch.inference_mode(), torch.autocast("cuda", dtype or torch.bfloat16, enabled=is_mixed):
        candidates = graph(images)
    for index in range(len(pictures)):
        yield _above(candidates, index, graph.kind, recipe.validation.score_threshold, with_masks=True)


def _above(
    candidates: Candidates | InstanceCandidates, index: int, kind: Kind, threshold: float, *, with_masks: bool
) -> Detections:
    """Take the candidates of one image of a batch, as they come from the graph, from the threshold on."""
    keep = (candidates.scores[index] >= threshold) & (candidates.boxes[index, :, 2:4] > 0).all(dim=1)
    boxes, scores, labels, *more = (tensor[index, keep].float().cpu().numpy() for tensor in candidates[:5])
    if kind == "rotated":
        return Detections(regularize_le90(boxes), scores, labels)
    masks = None
    if isinstance(candidates, InstanceCandidates) and with_masks:
        view = MaskView(candidates.mask_features[index].float().cpu().numpy())
        kernels, priors = more
        masks = MaskKernels(kernels, priors, (view,), np.zeros(len(boxes), np.int64))
    return Detections(boxes, scores, labels, kind=kind, masks=masks)


def _to_image(candidates: Detections, boxed: Letterbox, image: LabelledImage, recipe: Recipe) -> Found:
    """Bring the candidates of a letterboxed image back to its own px, and keep what NMS keeps."""
    section, kind = recipe.validation, candidates.kind
    height, width = image.height, image.width
    found = restore(candidates, View(*boxed.scale_factor), height, width)
    found = _suppress(found, section.nms_iou_threshold, section.max_detections)
    masks = assemble_detections(found, height, width, threshold=section.mask_threshold) if kind == "mask" else None
    return Found(replace(found, frame="scene", masks=None), masks)


def _suppress(found: Detections, iou_threshold: float, limit: int) -> Detections:
    """Return the best ``limit`` of what NMS keeps, best first.

    What is kept depends on better ones only, so NMS looks at no more than it needs: an untrained network has tens of
    thousands of candidates at low scores.
    """
    order = np.argsort(-found.scores, kind="stable")
    size = 8 * limit
    while True:
        part = found.select(order[:size])
        kept = nms_of_kind(part.boxes, part.scores, part.labels, kind=part.kind, iou_threshold=iou_threshold)
        if len(kept) >= limit or size >= len(order):
            return part.select(kept[:limit])
        size *= 4
