"""Training of classifiers: CSPNeXt on images in folders (arXiv 2212.07784, section 4.1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from rtmdet_geo.config import Recipe
from rtmdet_geo.errors import AnnotationError
from rtmdet_geo.evaluation.classification import accuracy, accuracy_by_class, true_ranks
from rtmdet_geo.models.classifier import get_classifier
from rtmdet_geo.recipe_sections import ClassificationAugment
from rtmdet_geo.structures import ModelSpec
from rtmdet_geo.training.class_sampler import CentreSampler, ClassSample, ClassSampler
from rtmdet_geo.training.image_folders import load_class_images
from rtmdet_geo.training.loader import BatchLoader
from rtmdet_geo.training.mixing import mix_batch
from rtmdet_geo.training.processes import Processes
from rtmdet_geo.training.task import make_spec, normalised, run_length, samples_per_process, start_from_weights
from rtmdet_geo.training.validate import Validation


class ClassificationTask:
    """Classes of whole images; see :class:`rtmdet_geo.training.task.Task`.

    Args:
        recipe: of a classifier.
        processes: that train together.
        load_weights: whether to start from ``model.weights``; a checkpoint to resume from holds what became of them.
        cancelled: asked during a download of weights.

    Raises:
        DatasetNotFoundError, AnnotationError: data are missing, or do not fit the recipe.
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
        """List the images and build the network."""
        assert isinstance(recipe.augment, ClassificationAugment)
        self.recipe, self.section, model = recipe, recipe.augment, recipe.model
        self.training, self.left_out = load_class_images(recipe)
        self.can_validate = bool(self.left_out)
        self.network: nn.Module = get_classifier(
            model.name, num_classes=len(model.classes), in_channels=len(model.bands)
        )
        if load_weights and model.weights is not None:
            start_from_weights(self.network, model, cancelled)
        own = samples_per_process(recipe)
        self.epoch: int | None
        self.epoch, self.iterations = run_length(recipe, len(self.training) * recipe.data.repeat, processes.world)
        self.sampler = ClassSampler(
            self.training, recipe, samples_per_step=own * processes.world, samples_per_process=own
        )

    def counts(self) -> dict[str, int]:
        """See :class:`rtmdet_geo.training.task.Task`."""
        return {"images": len(self.training), "left-out images": len(self.left_out)}

    def batch(self, samples: Sequence[ClassSample], device: torch.device) -> tuple[Tensor, Tensor]:
        """Return normalised images (N, C, S, S) and the shares of the classes (N, K) float32, mixed by the recipe."""
        images = normalised(np.stack([sample.image for sample in samples]), self.recipe, device)
        labels = torch.tensor([sample.label for sample in samples], device=device)
        targets = functional.one_hot(labels, len(self.recipe.model.classes)).float()
        return mix_batch(
            self.sampler.mixing(samples),
            images,
            targets,
            mixup_alpha=self.section.mixup_alpha,
            cutmix_alpha=self.section.cutmix_alpha,
        )

    def losses(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return the cross entropy of logits (N, K) and shares (N, K).

        Label smoothing e makes a share t into ``t * (1 - e) + e / K`` (arXiv 1512.00567; mmpretrain's
        ``LabelSmoothLoss``, mode "original").
        """
        loss = functional.cross_entropy(outputs, targets, label_smoothing=self.section.label_smoothing)
        return {"loss_cls": loss}

    def look_again(self, averaged: Callable[[], nn.Module], iteration: int, processes: Processes) -> None:
        """Change nothing: samples depend on no network."""

    def take_state(self, state: dict[str, Any]) -> None:
        """Take up nothing: there is no state."""

    def validate(
        self, network: nn.Module, processes: Processes, progress: Callable[[int, int], None] | None = None
    ) -> Validation:
        """Score a network in eval mode: ``top1`` and ``top5``, shares of the images left out; rows by class.

        Every process looks at its part of the images. Those that do not decode are left out if the recipe says so.

        Raises:
            AnnotationError: an image does not decode and the recipe says to stop; in every process.
        """
        mine = self.left_out[processes.rank :: processes.world]
        size = samples_per_process(self.recipe)
        sampler = CentreSampler(mine, self.recipe, batch_size=size)
        batches = -(-len(mine) // size)
        workers = self.recipe.loop.workers
        loader = BatchLoader(sampler, positions=range(size), iterations=batches, workers=workers)
        ranks, labels = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        bad: AnnotationError | None = None
        try:
            for number in range(batches):
                samples = [sample for sample in loader.batch(number) if sample is not None]
                if samples:
                    labels.append(np.array([sample.label for sample in samples]))
                    ranks.append(true_ranks(self._scores(network, samples, processes.device), labels[-1]))
                if progress is not None:
                    progress(min((number + 1) * size, len(mine)), len(mine))
        except AnnotationError as error:
            bad = error  # the others hear of it when all have come so far
        finally:
            loader.close()
        parts = processes.gather((np.concatenate(ranks), np.concatenate(labels), sorted(sampler.bad_images), bad))
        failed = [part[3] for part in parts if part[3] is not None]
        if failed:
            raise failed[0]
        all_ranks, all_labels = (np.concatenate([part[index] for part in parts]) for index in (0, 1))
        return Validation(
            figures={"top1": accuracy(all_ranks), "top5": accuracy(all_ranks, 5)},
            rows=accuracy_by_class(all_ranks, all_labels, self.recipe.model.classes),
            curves=[],
            num_images=len(all_ranks),
            left_out=tuple(name for part in parts for name in part[2]),
        )

    def _scores(self, network: nn.Module, samples: Sequence[ClassSample], device: torch.device) -> Any:
        """Return logits (N, K) float32."""
        with torch.inference_mode():
            images = normalised(np.stack([sample.image for sample in samples]), self.recipe, device)
            return network(images).float().cpu().numpy()

    def spec(self, validation: Validation | None) -> ModelSpec:
        """Return what files of these weights say of themselves; they see whole images of ``augment.image_size``."""
        spec = make_spec(self.recipe, validation)
        changes = {"tile_size": self.section.image_size, "overlap": 0, "score_threshold": 0.0}
        return spec.model_copy(update=changes)
