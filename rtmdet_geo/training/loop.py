"""The training loop, visible on one page.

Follows the recipe of RTMDet (arXiv 2212.07784, section 4.1): AdamW without decay on norms and biases, linear warm-up,
flat then cosine learning rate, exponential moving average of weights and buffers. Random crops are a pure function of
(seed, iteration), so a run that is stopped and resumed on CPU gives the very numbers of an unbroken one.
"""

from __future__ import annotations

import csv
import logging
import math
import pickle
import platform
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import rtmdet_geo
from rtmdet_geo.checkpoints import CHECKPOINTS
from rtmdet_geo.config import Recipe, load_recipe
from rtmdet_geo.errors import Cancelled, ConfigError, OutputError, TrainingError
from rtmdet_geo.models import get_model
from rtmdet_geo.models.devices import find_device
from rtmdet_geo.models.weights import load_checkpoint, save_weights
from rtmdet_geo.outputs import staged_output
from rtmdet_geo.recipe_sections import ModelSection
from rtmdet_geo.structures import ModelSpec
from rtmdet_geo.training.chips import load_chips, split_chips
from rtmdet_geo.training.criterion import Target, make_criterion
from rtmdet_geo.training.crops import CropSampler
from rtmdet_geo.training.ema import ModelEMA
from rtmdet_geo.training.labelled import LabelledImage, Sample
from rtmdet_geo.training.loader import BatchLoader
from rtmdet_geo.training.schedule import learning_rate, param_groups
from rtmdet_geo.training.validate import find_false_alarms, validate

logger = logging.getLogger(__name__)

CHECKPOINT = "last.pt"
#: What a run leaves beside its recipe.
PRODUCTS = (CHECKPOINT, "log.csv", "validation.csv", "model.safetensors")
#: Columns of log.csv; before ``grad_norm`` come the terms of the loss.
LOG_COLUMNS = ("iteration", "lr", "loss", "grad_norm", "seconds")


def train_model(
    recipe: Recipe,
    out: str | Path,
    *,
    data: str | Path | None = None,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> dict[str, Any]:
    """Train a network by a recipe; its ``model.name`` decides what is learnt: rotated or horizontal boxes, or masks.

    Args:
        recipe: see :mod:`rtmdet_geo.config`.
        out: run folder; gets ``recipe.yaml``, ``log.csv``, ``last.pt`` (to resume from), ``model.safetensors`` (EMA
            weights with their ModelSpec) and, when the recipe leaves a fold out, ``validation.csv``.
        data: folder of chips; ``recipe.data.chips`` when None.
        device: "cpu", "cuda", "cuda:1", or "auto" (cuda when there is one). On cuda the forward pass runs in bf16.
        resume: go on from ``out/last.pt``.
        overwrite: begin anew in a folder that already holds a run.
        progress: called with (iterations done, iterations in all).
        cancelled: asked after every iteration; True saves a checkpoint and raises Cancelled.

    Returns:
        ``weights`` (path), ``iterations``, ``seconds``, ``loss`` (of the last iteration), ``validation`` rows.

    Raises:
        DatasetNotFoundError, AnnotationError, ConfigError: data are missing, broken, or cut for another recipe.
        OutputError: the run folder holds another run.
        TrainingError: a loss is not finite; the message names iteration and the checkpoint to go back to.
        UnknownModelError, WeightsError, DownloadError: ``recipe.model.weights`` cannot be found or do not fit.
        Cancelled: see ``cancelled``.
    """
    run = Path(out)
    device = str(find_device(device))
    chips = load_chips(Path(data if data is not None else recipe.data.chips), recipe.model)
    training, left_out = split_chips(chips, recipe)
    _check_run(run, recipe, resume=resume, overwrite=overwrite)
    _seed(recipe.loop.seed)

    network = get_model(
        recipe.model.name,
        num_classes=len(recipe.model.classes),
        in_channels=len(recipe.model.bands),
    )
    if recipe.model.weights is not None and not resume:  # a checkpoint to resume from holds what became of them
        _load_weights(network, recipe.model, cancelled)
    network.to(device, memory_format=torch.channels_last if recipe.loop.channels_last else torch.contiguous_format)
    ema = ModelEMA(network, momentum=recipe.optim.ema_momentum, gamma=recipe.optim.ema_gamma)
    optimizer = torch.optim.AdamW(param_groups(network, recipe.optim.weight_decay), lr=recipe.optim.lr)
    criterion = make_criterion(network.kind, len(recipe.model.classes))
    sampler = CropSampler(training, recipe)
    start = _load_checkpoint(run, network, ema, optimizer, sampler, device) if resume else 0
    loader = BatchLoader(sampler, batch_size=recipe.optim.batch_size, workers=recipe.loop.workers)
    if not resume:  # an earlier run is not touched before weights, chips and device are known to be there
        _begin_run(run, recipe)
    logger.info(
        "training %s on %s: %d chips, %d objects, iterations %d to %d",
        *(recipe.model.name, device, len(training), sum(int((~chip.ignored).sum()) for chip in training)),
        *(start, recipe.optim.iterations),
    )

    began, row = time.perf_counter(), {"loss": math.nan}
    try:
        for iteration in range(start, recipe.optim.iterations):
            tick = time.perf_counter()
            if recipe.loop.mine_interval and iteration and iteration % recipe.loop.mine_interval == 0:
                sampler.false_alarms = _mine(ema, training, recipe, iteration, device)
                loader.forget()
            rate = _set_rate(optimizer, recipe, iteration)
            samples = loader.batch(iteration)
            with torch.autocast("cuda", torch.bfloat16, enabled=device.startswith("cuda")):
                outputs = network(_to_input(samples, recipe, device))
            losses = criterion(outputs, _to_targets(samples, device))
            loss = torch.stack(list(losses.values())).sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            grad_norm = nn.utils.clip_grad_norm_(network.parameters(), recipe.optim.clip_grad_norm)
            values = {"loss": loss, **losses, "grad_norm": grad_norm}
            row = dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True))
            _check_finite(row, iteration, run)
            optimizer.step()
            ema.update(network)

            done = iteration + 1
            row |= {"iteration": done, "lr": rate, "seconds": time.perf_counter() - tick}
            if done % recipe.loop.log_interval == 0 or done == recipe.optim.iterations:
                _log(run, row, done, start, recipe.optim.iterations, time.perf_counter() - began)
            if progress is not None:
                progress(done, recipe.optim.iterations)
            stop = cancelled is not None and cancelled()
            if stop or done % recipe.loop.checkpoint_interval == 0 or done == recipe.optim.iterations:
                _save_checkpoint(run, done, network, ema, optimizer, sampler)
            if stop and done < recipe.optim.iterations:
                raise Cancelled(f"training stopped at iteration {done}; go on with --resume -o {run}")
    finally:
        loader.close()

    rows = validate(ema.module, left_out, recipe, device=device).rows if left_out else []
    weights = run / "model.safetensors"
    save_weights(ema.module, weights, make_spec(recipe, rows), half=False)
    _write_validation(run, rows)
    return {
        "weights": str(weights),
        "iterations": recipe.optim.iterations,
        "seconds": time.perf_counter() - began,
        "loss": row["loss"],
        "validation": [{key: value for key, value in item.items() if key != "detections"} for item in rows],
    }


def make_spec(recipe: Recipe, validation: list[dict[str, Any]] | None = None) -> ModelSpec:
    """Return the ModelSpec of a network trained by a recipe; its metrics are those of the validation rows.

    The card's metrics are left out: they were measured on other weights.

    Raises:
        ConfigError: the recipe's model is no detector.
    """
    model, card = recipe.model, recipe.card
    measure = "mask AP" if model.kind == "mask" else "AP"
    metrics = {
        f"{row['class']} {measure}{round(row['iou'] * 100)} left-out {row['bands']}": round(row["ap"], 4)
        for row in validation or []
    }
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
        metrics=metrics,
        training_data=_training_data(recipe),
        limits=card.limits,
        licence=card.licence,
        attribution=card.attribution,
        exporter=f"rtmdet-geo {rtmdet_geo.__version__}",
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


def _load_weights(network: nn.Module, model: ModelSection, cancelled: Callable[[], bool] | None) -> None:
    """Start from ``model.weights`` as the recipe says; one line of the log names what was not loaded."""
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


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _check_run(run: Path, recipe: Recipe, *, resume: bool, overwrite: bool) -> None:
    """Refuse a run folder that cannot be resumed, or holds a run that is not to be replaced."""
    if resume:
        if not (run / CHECKPOINT).is_file():
            raise OutputError(f"nothing to resume in {str(run)!r}: {CHECKPOINT} is missing")
        if load_recipe(run / "recipe.yaml") != recipe:
            raise ConfigError(
                f"the recipe differs from {run / 'recipe.yaml'}, with which this run began: resume with that file"
            )
    elif any((run / name).exists() for name in PRODUCTS) and not overwrite:
        raise OutputError(f"{str(run)!r} already holds a run: --resume goes on with it, --overwrite begins anew")


def _begin_run(run: Path, recipe: Recipe) -> None:
    """Make the run folder, empty it of an earlier run, and write the recipe."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        for name in PRODUCTS:
            (run / name).unlink(missing_ok=True)
        (run / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot write the run folder {str(run)!r}: {error.strerror}") from error


def _mine(
    ema: ModelEMA, chips: list[LabelledImage], recipe: Recipe, iteration: int, device: str
) -> NDArray[np.float64]:
    """False alarms of the averaged network on the training chips, in turn with all bands and with bands missing."""
    sets = recipe.validation.drop_bands
    dropped = sets[iteration // recipe.loop.mine_interval % len(sets)]
    alarms = find_false_alarms(ema.module, chips, recipe, dropped=dropped, device=device)
    logger.info("iteration %d: %d false alarms mined", iteration, len(alarms))
    return alarms


def _to_input(samples: list[Sample], recipe: Recipe, device: str) -> torch.Tensor:
    """Stack to (N, C, H, W) float32, normalised by the recipe's mean and std."""
    images = torch.from_numpy(np.stack([sample.image for sample in samples])).to(device, non_blocking=True).float()
    mean = torch.tensor(recipe.model.mean, device=device).view(1, -1, 1, 1)
    std = torch.tensor(recipe.model.std, device=device).view(1, -1, 1, 1)
    memory_format = torch.channels_last if recipe.loop.channels_last else torch.contiguous_format
    return ((images - mean) / std).contiguous(memory_format=memory_format)


def _to_targets(samples: list[Sample], device: str) -> list[Target]:
    return [
        Target(
            torch.from_numpy(sample.boxes).to(device),
            torch.from_numpy(sample.labels).to(device),
            torch.from_numpy(sample.ignored).to(device),
            None if sample.masks is None else torch.from_numpy(sample.masks).to(device),
        )
        for sample in samples
    ]


def _set_rate(optimizer: torch.optim.Optimizer, recipe: Recipe, iteration: int) -> float:
    optim = recipe.optim
    rate = learning_rate(
        iteration,
        base_lr=optim.lr,
        total_iterations=optim.iterations,
        warmup_iterations=optim.warmup_iterations,
        eta_min=optim.lr * optim.lr_min_factor,
    )
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def _check_finite(row: dict[str, float], iteration: int, run: Path) -> None:
    bad = [name for name, value in row.items() if not math.isfinite(value)]
    if bad:
        raise TrainingError(
            f"{' and '.join(bad)} not finite in iteration {iteration + 1} (batch {iteration} of the seed): "
            f"lower optim.lr, or go back to {run / CHECKPOINT} with --resume"
        )


def _log(run: Path, row: dict[str, float], done: int, start: int, total: int, elapsed: float) -> None:
    path = run / "log.csv"
    is_new = not path.exists()
    terms = [name for name in row if name.startswith("loss_")]
    columns = [*LOG_COLUMNS[:3], *terms, *LOG_COLUMNS[3:]]
    with path.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns)
        if is_new:
            writer.writeheader()
        writer.writerow({name: f"{row[name]:.9g}" for name in columns})
    remaining = elapsed / (done - start) * (total - done)
    parts = ", ".join(f"{name.removeprefix('loss_')} {row[name]:.4f}" for name in terms)
    logger.info(
        "iteration %d/%d  loss %.4f (%s)  lr %.2e  %.2f s/it  %d min left",
        *(done, total, row["loss"], parts, row["lr"], row["seconds"], remaining // 60),
    )


def _trim_log(run: Path, iteration: int) -> None:
    """Drop log rows later than the checkpoint, so that a resumed run does not write them twice."""
    path = run / "log.csv"
    if path.exists():
        header, *lines = path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if int(line.split(",", 1)[0]) <= iteration]
        path.write_text("\n".join([header, *kept]) + "\n", encoding="utf-8")


def _save_checkpoint(
    run: Path,
    iteration: int,
    network: nn.Module,
    ema: ModelEMA,
    optimizer: torch.optim.Optimizer,
    sampler: CropSampler,
) -> None:
    state = {
        "iteration": iteration,
        "network": network.state_dict(),
        "ema": ema.state_dict(),
        "optimizer": optimizer.state_dict(),
        "false_alarms": torch.from_numpy(sampler.false_alarms),
        "versions": {
            "rtmdet_geo": rtmdet_geo.__version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
    }
    with staged_output(run / CHECKPOINT) as staged:
        try:
            torch.save(state, staged)
        except RuntimeError as error:  # torch's own writer: a full disk, for one
            raise OutputError(f"cannot write {run / CHECKPOINT}: {error}") from error


def _load_checkpoint(
    run: Path,
    network: nn.Module,
    ema: ModelEMA,
    optimizer: torch.optim.Optimizer,
    sampler: CropSampler,
    device: str,
) -> int:
    try:
        state = torch.load(run / CHECKPOINT, map_location=device, weights_only=True)
        network.load_state_dict(state["network"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        sampler.false_alarms = state["false_alarms"].cpu().numpy()
    except (RuntimeError, KeyError, ValueError, EOFError, OSError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise TrainingError(f"{run / CHECKPOINT} cannot be resumed ({reason}); begin anew with --overwrite") from error
    _trim_log(run, state["iteration"])
    return int(state["iteration"])


def _write_validation(run: Path, rows: list[dict[str, Any]]) -> None:
    if not rows:
        return
    columns = [name for name in rows[0] if name != "detections"]
    with staged_output(run / "validation.csv") as staged, staged.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        logger.info("left-out %s, %s: AP at IoU %.2f = %.4f", row["class"], row["bands"], row["iou"], row["ap"])
