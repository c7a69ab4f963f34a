"""What is trained: a task brings a network together with its samples, its losses and its validation.

The loop knows tasks only, not what they learn.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

import rtmdet_geo
from rtmdet_geo.checkpoints import CHECKPOINTS
from rtmdet_geo.config import Recipe
from rtmdet_geo.errors import MissingDependencyError
from rtmdet_geo.evaluation.coco import require_coco
from rtmdet_geo.models import get_model
from rtmdet_geo.models.weights import load_checkpoint
from rtmdet_geo.recipe_sections import CropAugment, ModelSection
from rtmdet_geo.structures import ModelSpec
from rtmdet_geo.training.criterion import Target, make_criterion
from rtmdet_geo.training.crops import CropSampler
from rtmdet_geo.training.labelled import Sample, Sampler
from rtmdet_geo.training.processes import Processes
from rtmdet_geo.training.sources import load_datasets
from rtmdet_geo.training.validate import Validation, find_false_alarms, validate
from rtmdet_geo.training.whole_images import ImageSampler

logger = logging.getLogger(__name__)


class Task(Protocol):
    """What the loop needs to know of a training."""

    @property
    def network(self) -> nn.Module:
        """Built by the recipe, on the CPU, in train mode."""

    @property
    def sampler(self) -> Sampler:
        """Draws the samples."""

    @property
    def training(self) -> Sequence[Any]:
        """The labelled images to train on."""

    @property
    def iterations(self) -> int:
        """Length of the training."""

    @property
    def epoch(self) -> int | None:
        """Iterations of an epoch; None where there is no such thing."""

    @property
    def can_validate(self) -> bool:
        """Whether anything was left out to score."""

    def counts(self) -> dict[str, int]:
        """Say what there is to learn from, by name: "images", "objects", "left-out images", ..."""

    def batch(self, samples: Sequence[Any], device: torch.device) -> tuple[Tensor, Any]:
        """Return normalised images (N, C, H, W) float32 on the device, and what :meth:`losses` compares with."""

    def losses(self, outputs: Any, targets: Any) -> dict[str, Tensor]:
        """Return the terms of the loss, named ``loss_*``, float32 scalars to be summed."""

    def look_again(
        self, averaged: Callable[[], nn.Module], iteration: int, processes: Processes
    ) -> dict[str, Any] | None:
        """Let the averaged network look at the data before an iteration, if it is time.

        Returns:
            A state for :meth:`take_state` if samples change from now on.
        """

    def take_state(self, state: dict[str, Any]) -> None:
        """Take up what :meth:`look_again` returned, perhaps in an earlier run."""

    def validate(
        self, network: nn.Module, processes: Processes, progress: Callable[[int, int], None] | None = None
    ) -> Validation:
        """Score a network in eval mode on what was left out."""

    def spec(self, validation: Validation | None) -> ModelSpec:
        """Return what files of these weights say of themselves."""


class DetectionTask:
    """Objects: rotated or horizontal boxes, or masks; see :class:`Task`.

    Args:
        recipe: of a detector.
        processes: that train together.
        load_weights: whether to start from ``model.weights``; a checkpoint to resume from holds what became of them.
        cancelled: asked during a download of weights.

    Raises:
        DatasetNotFoundError, AnnotationError, ConfigError: data are missing, broken, or do not fit the recipe.
        UnknownModelError, WeightsError, DownloadError: ``model.weights`` cannot be found or do not fit.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        processes: Processes,
        load_weights: bool,
        cancelled: Callable[[], bool] | None = None,
    ) -> None:
        """Read the data and build the network."""
        self.recipe = recipe
        self.training, self.left_out = load_datasets(recipe)
        self.can_validate = bool(self.left_out)
        if self.can_validate and recipe.validation.protocol == "coco":
            _check_coco()  # now, not after hours of training
        model = recipe.model
        self.network = get_model(model.name, num_classes=len(model.classes), in_channels=len(model.bands))
        if load_weights and model.weights is not None:
            start_from_weights(self.network, model, cancelled)
        self.criterion = make_criterion(model.object_kind, len(model.classes))
        self.sampler: Sampler
        self.epoch: int | None
        if isinstance(recipe.augment, CropAugment):
            self.sampler = CropSampler(self.training, recipe)
            self.epoch, self.iterations = None, recipe.optim.iterations or 0
        else:
            per_process = samples_per_process(recipe)
            self.epoch, self.iterations = run_length(recipe, len(self.training) * recipe.data.repeat, processes.world)
            self.sampler = ImageSampler(
                self.training,
                recipe,
                iterations=self.iterations,
                samples_per_step=per_process * processes.world,
                samples_per_process=per_process,
            )

    def counts(self) -> dict[str, int]:
        """See :class:`Task`."""
        objects = sum(int((~image.ignored).sum()) for image in self.training)
        return {"images": len(self.training), "objects": objects, "left-out images": len(self.left_out)}

    def batch(self, samples: Sequence[Sample], device: torch.device) -> tuple[Tensor, list[Target]]:
        """See :class:`Task`."""
        images = normalised(np.stack([sample.image for sample in samples]), self.recipe, device)
        return images, [_target(sample, device) for sample in samples]

    def losses(self, outputs: Any, targets: list[Target]) -> dict[str, Tensor]:
        """See :class:`Task`."""
        return self.criterion(outputs, targets)

    def look_again(
        self, averaged: Callable[[], nn.Module], iteration: int, processes: Processes
    ) -> dict[str, Any] | None:
        """Find false alarms of the averaged network on the training images, in turn with all bands and without some."""
        interval, sets = self.recipe.loop.mine_interval, self.recipe.validation.drop_bands
        if not isinstance(self.sampler, CropSampler) or not interval or not iteration or iteration % interval:
            return None
        dropped = sets[iteration // interval % len(sets)]
        mine = self.training[processes.rank :: processes.world]
        alarms = find_false_alarms(averaged(), mine, self.recipe, dropped=dropped, device=str(processes.device))
        alarms[:, 0] = alarms[:, 0] * processes.world + processes.rank
        alarms = np.concatenate(processes.gather(alarms))
        logger.info("iteration %d: %d false alarms mined", iteration, len(alarms))
        return {"false_alarms": torch.from_numpy(alarms)}

    def take_state(self, state: dict[str, Any]) -> None:
        """See :class:`Task`."""
        if isinstance(self.sampler, CropSampler) and state:
            self.sampler.false_alarms = state["false_alarms"].cpu().numpy()

    def validate(
        self, network: nn.Module, processes: Processes, progress: Callable[[int, int], None] | None = None
    ) -> Validation:
        """See :class:`Task`."""
        device = str(processes.device)
        return validate(network, self.left_out, self.recipe, device=device, progress=progress, processes=processes)

    def spec(self, validation: Validation | None) -> ModelSpec:
        """See :class:`Task`; a tile is as large as the images that it was trained on."""
        spec = make_spec(self.recipe, validation)
        if isinstance(self.recipe.augment, CropAugment):
            return spec
        side = self.recipe.augment.image_size
        return spec.model_copy(update={"tile_size": side, "overlap": min(spec.overlap, side // 2)})


def digest_of(images: Sequence[Any]) -> str:
    """Return a digest of what is trained on: names of images in their order, and how many labels each has."""
    text = "\n".join(f"{image.name} {np.size(getattr(image, 'labels', 0))}" for image in images)
    return hashlib.sha256(text.encode()).hexdigest()


def samples_per_process(recipe: Recipe) -> int:
    """Return the samples that one process draws for a step of the optimiser."""
    return recipe.optim.batch_size * recipe.optim.accumulate


def run_length(recipe: Recipe, samples_per_epoch: int, world: int) -> tuple[int, int]:
    """Return the iterations of an epoch (the last, smaller batch rounds up) and of the whole training."""
    epoch = -(-samples_per_epoch // (samples_per_process(recipe) * world))
    optim = recipe.optim
    return epoch, optim.iterations if optim.iterations is not None else epoch * (optim.epochs or 0)


def normalised(images: Any, recipe: Recipe, device: torch.device) -> Tensor:
    """Return images (N, C, H, W) uint8 as float32 on a device, normalised by the recipe's mean and std."""
    values = torch.from_numpy(images).to(device, non_blocking=True).float()
    mean = torch.tensor(recipe.model.mean, device=device).view(1, -1, 1, 1)
    std = torch.tensor(recipe.model.std, device=device).view(1, -1, 1, 1)
    memory_format = torch.channels_last if recipe.loop.channels_last else torch.contiguous_format
    return ((values - mean) / std).contiguous(memory_format=memory_format)


def start_from_weights(network: nn.Module, model: ModelSection, cancelled: Callable[[], bool] | None = None) -> None:
    """Start from ``model.weights`` as the recipe says; one line of the log names what was not loaded.

    Raises:
        UnknownModelError, WeightsError, DownloadError: they cannot be found or do not fit.
    """
    assert model.weights is not None
    load_checkpoint(
        network,
        model.weights,
        parts=model.weights_parts,
        transfer=model.transfer,
        bands=model.bands,
        classes=model.classes,
        source_bands=model.weights_bands,
        cancelled=cancelled,
    )


def make_spec(recipe: Recipe, validation: Validation | None = None) -> ModelSpec:
    """Return the ModelSpec of a network trained by a recipe; its metrics are those of the validation.

    The card's metrics are left out: they were measured on other weights.

    Raises:
        ConfigError: the recipe names no network.
    """
    model, card = recipe.model, recipe.card
    return ModelSpec(
        name=recipe.name,
        architecture=model.name,
        kind=model.kind,
        classes=model.classes,
        bands=model.bands,
        optional_bands=model.optional_bands,
        mean=model.mean,
        std=model.std,
        gsd_m=model.gsd_m,
        trained_gsd_m=model.trained_gsd_m,
        stretch=model.stretch,
        tile_size=model.tile_size,
        overlap=model.overlap,
        score_threshold=model.score_threshold,
        iou_threshold=recipe.validation.nms_iou_threshold,
        metrics={} if validation is None else {name: round(value, 4) for name, value in validation.figures.items()},
        training_data=_training_data(recipe),
        limits=card.limits,
        licence=card.licence,
        attribution=card.attribution,
        exporter=f"rtmdet-geo {rtmdet_geo.__version__}",
    )


def _check_coco() -> None:
    """Refuse a recipe that asks for COCO's figures where they cannot be counted.

    Raises:
        MissingDependencyError: faster-coco-eval is not installed.
    """
    try:
        require_coco()
    except MissingDependencyError as error:
        raise MissingDependencyError(f"{error}, or set validation.protocol=area") from error


def _target(sample: Sample, device: torch.device) -> Target:
    return Target(
        torch.from_numpy(sample.boxes).to(device),
        torch.from_numpy(sample.labels).to(device),
        torch.from_numpy(sample.ignored).to(device),
        None if sample.masks is None else torch.from_numpy(sample.masks).to(device),
    )


def _training_data(recipe: Recipe) -> str:
    """Return what the card says, and which weights the training started from: what they saw, these weights saw too."""
    model = recipe.model
    if model.weights is None:
        return recipe.card.training_data
    parts = f" ({', '.join(model.weights_parts)})" if model.weights_parts else ""
    started = f"started from {model.weights}{parts}"
    if model.weights in CHECKPOINTS:
        data = CHECKPOINTS[model.weights].data
        started += f", trained on {data.name} ({data.terms})"
    return "; ".join(text for text in (recipe.card.training_data, started) if text)
