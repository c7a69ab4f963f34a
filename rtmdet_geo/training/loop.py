"""The training loop, visible on one page.

Follows the recipe of RTMDet (arXiv 2212.07784, section 4.1): AdamW without decay on norms and biases, linear warm-up,
flat then cosine learning rate, exponential moving average of weights and buffers. Samples are a pure function of
(seed, iteration, position), so a run that is stopped and resumed on CPU gives the very numbers of an unbroken one.
What is learnt is a task's business (:mod:`rtmdet_geo.training.task`).
"""

from __future__ import annotations

import logging
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rtmdet_geo.config import Recipe
from rtmdet_geo.errors import Cancelled, ConfigError, TrainingError
from rtmdet_geo.models.weights import save_weights
from rtmdet_geo.recipe_sections import OptimSection
from rtmdet_geo.training.classification import ClassificationTask
from rtmdet_geo.training.ema import ModelEMA
from rtmdet_geo.training.lamb import Lamb
from rtmdet_geo.training.loader import BatchLoader
from rtmdet_geo.training.processes import Processes, join_processes
from rtmdet_geo.training.report import write_report
from rtmdet_geo.training.run_folder import (
    BAD_BATCH,
    BEST_WEIGHTS,
    CHECKPOINT,
    WEIGHTS,
    TrainingState,
    begin_run,
    check_run,
    remove_leftovers,
    resume_checkpoint,
    save_checkpoint,
)
from rtmdet_geo.training.run_log import LOG, RunLog, read_table, write_validation
from rtmdet_geo.training.schedule import freeze_parts, keep_norms_frozen, param_groups, scheduled_rate, warmup_length
from rtmdet_geo.training.task import DetectionTask, Task, digest_of, samples_per_process
from rtmdet_geo.training.validate import Validation

logger = logging.getLogger(__name__)

#: Names of images in a message; all those of a loss that is not finite are written to a file.
_NAMES_SHOWN = 8


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
    """Train a network by a recipe; its ``model.name`` decides what is learnt: boxes, masks, or classes of images.

    Under ``torchrun`` every process calls this function and trains on its part of each batch; the first one writes.

    Args:
        recipe: see :mod:`rtmdet_geo.config`.
        out: run folder; gets ``recipe.yaml``, ``log.csv``, ``history.csv`` (figures of validations), ``last.pt`` (to
            resume from), ``model.safetensors`` (EMA weights of the end with their ModelSpec), ``best.safetensors``
            (those of the best validation), ``validation.csv`` (the last validation, by class), plots and
            ``report.html``.
        data: where the data lie: the folder of chips, or what ``recipe.data`` calls root.
        device: "cpu", "cuda", "cuda:1", or "auto" (cuda when there is one).
        resume: go on from ``out/last.pt``.
        overwrite: begin anew in a folder that already holds a run.
        progress: called with (iterations done, iterations in all).
        cancelled: asked after every iteration; True saves a checkpoint and raises Cancelled.

    Returns:
        ``weights``, ``best`` (paths; ``best`` is None without validation), ``best_iteration``, ``iterations``,
        ``planned_iterations`` (more if it ended early), ``seconds``, ``loss`` (of the last iteration),
        ``images_per_second``, ``data_wait`` (share of the time spent waiting for samples), ``data`` (counts),
        ``parameters``, ``device``, ``processes``, ``bad_images`` (names), ``figures`` and ``validation`` rows.

    Raises:
        DatasetNotFoundError, AnnotationError, ConfigError: data are missing, broken, or made for another recipe.
        OutputError: the run folder holds another run, or cannot be written.
        TrainingError: a loss is not finite; the message names the iteration and its images.
        UnknownModelError, WeightsError, DownloadError: ``recipe.model.weights`` cannot be found or do not fit.
        Cancelled: see ``cancelled``.
    """
    with join_processes(device) as processes, _numbers(recipe):
        run = Path(out)
        recipe = recipe.with_data(data)  # the saved recipe says which data they were
        make_task: type[ClassificationTask] | type[DetectionTask] = (
            ClassificationTask if recipe.model.kind == "classification" else DetectionTask
        )
        check_run(run, recipe, resume=resume, overwrite=overwrite)
        processes.barrier()  # nobody begins the folder while others still look at it
        task: Task = make_task(recipe, processes=processes, load_weights=not resume, cancelled=cancelled)
        return _Training(recipe, run, task, processes, resume=resume).run_to_end(progress, cancelled)


class _Training:
    """One run: its state, and the steps that change it."""

    def __init__(self, recipe: Recipe, run: Path, task: Task, processes: Processes, *, resume: bool) -> None:
        """Put everything on the device and take up a checkpoint, or begin the run folder."""
        self.recipe, self.run, self.task, self.processes = recipe, run, task, processes
        optim, device = recipe.optim, processes.device
        if recipe.loop.early_stop and not task.can_validate:
            raise ConfigError("loop.early_stop counts validations, but nothing is left out: name data.val_images")
        network = task.network
        freeze_parts(network, optim.freeze)
        network.to(device, memory_format=torch.channels_last if recipe.loop.channels_last else torch.contiguous_format)
        ema = ModelEMA(network, momentum=optim.ema_momentum, gamma=optim.ema_gamma)
        if recipe.loop.sync_bn and processes.world > 1 and device.type == "cuda":
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        groups = param_groups(network, optim.weight_decay, layer_decay=optim.layer_decay)
        dtypes = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}
        dtypes["auto"] = torch.bfloat16 if device.type == "cuda" else None
        self.dtype = dtypes[recipe.loop.precision]
        scaler = torch.amp.GradScaler(device.type, enabled=self.dtype is torch.float16)
        self.state = TrainingState(
            network, ema, _optimizer(optim, groups), scaler, samples={}, data=digest_of(task.training)
        )
        self.start = resume_checkpoint(run, processes.world, self.state, device) if resume else 0
        task.take_state(self.state.samples)
        if processes.is_first:
            remove_leftovers(run)
            if not resume:  # an earlier run is untouched until weights, data and device are there
                begin_run(run, recipe)
        processes.barrier()
        network.train()
        keep_norms_frozen(network, optim.freeze, norm_eval=optim.norm_eval)
        self.forward = self._wrap(network)
        share = optim.batch_size * optim.accumulate * processes.world
        self.base_lr = optim.lr * share / (optim.lr_for_batch or share)
        self._warn_of_warmup()

    def _warn_of_warmup(self) -> None:
        """Say when the rate rises for most of the training."""
        optim, total = self.recipe.optim, self.task.iterations
        warmup = warmup_length(optim, self.task.epoch)
        if warmup > total / 2 and self.processes.is_first:
            key = "optim.warmup_iterations" if optim.warmup_epochs is None else "optim.warmup_epochs"
            logger.warning("the rate rises for %d of %d iterations, little is learnt: lower %s", warmup, total, key)

    def _wrap(self, network: nn.Module) -> nn.Module:
        """Return what is called for a forward pass: the network, over all processes, perhaps compiled."""
        wrapped = network
        if self.processes.world > 1:
            device = self.processes.device
            ids = [device.index] if device.type == "cuda" else None
            wrapped = nn.parallel.DistributedDataParallel(network, device_ids=ids)
        return torch.compile(wrapped) if self.recipe.loop.compile else wrapped

    def run_to_end(
        self, progress: Callable[[int, int], None] | None, cancelled: Callable[[], bool] | None
    ) -> dict[str, Any]:
        """Train; see :func:`train_model`."""
        recipe, task, state, processes, run = self.recipe, self.task, self.state, self.processes, self.run
        own, total, loop = samples_per_process(recipe), task.iterations, recipe.loop
        positions = range(processes.rank * own, (processes.rank + 1) * own)
        loader = BatchLoader(task.sampler, positions=positions, iterations=total, workers=loop.workers)
        log = RunLog(run, tensorboard=loop.tensorboard, resume_at=self.start) if processes.is_first else None
        self._announce()
        clock = _Clock(own * processes.world)
        done, row, validation = self.start, {"loss": math.nan}, None
        try:
            if self.start and self._is_validation_due(self.start) and state.validated < self.start:
                validation = self._validate(self.start, log, cancelled)  # killed in the midst of it
            for iteration in range(self.start, total):
                if self._is_stale():
                    break
                seen = task.look_again(self._averaged, iteration, processes)
                if seen is not None:
                    task.take_state(seen)
                    state.samples = seen
                    loader.forget()
                rate = self._set_rate(iteration)
                clock.ask()
                samples = loader.batch(iteration)
                clock.get()
                row, stop = self._step(iteration, samples, cancelled is not None and cancelled())

                done, validation = iteration + 1, None
                row |= {"iteration": done, "lr": rate, "seconds": clock.step()}
                if log is not None and (done % loop.log_interval == 0 or done == total):
                    row |= clock.row()
                    log.step(done, row)
                    self._say(row, done, clock)
                if progress is not None:
                    progress(done, total)
                is_due = self._is_validation_due(done)
                if stop or is_due or done % loop.checkpoint_interval == 0 or done == total:
                    self._save(done)
                if stop and done < total:
                    raise Cancelled(f"training stopped at iteration {done}; go on with --resume -o {run}")
                if is_due:
                    validation = self._validate(done, log, cancelled)
        finally:
            loader.close()
            if log is not None:
                log.close()

        if validation is None and task.can_validate:
            validation = self._score(cancelled)
        summary = self._summary(done, clock, row, validation)
        if processes.is_first:
            save_weights(state.ema.module, run / WEIGHTS, task.spec(validation), half=False)
            if validation is not None:
                write_validation(run, validation.rows)
            write_report(run, recipe, validation=validation, summary=summary)
        processes.barrier()
        return summary

    def _set_rate(self, iteration: int) -> float:
        rate = scheduled_rate(
            self.recipe.optim,
            iteration,
            total_iterations=self.task.iterations,
            iterations_per_epoch=self.task.epoch,
            base_lr=self.base_lr,
        )
        for group in self.state.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        return rate

    def _step(self, iteration: int, samples: list[Any], wants_stop: bool) -> tuple[dict[str, float], bool]:
        """One step of the optimiser; returns its numbers, and whether any process wants to stop."""
        state, optim = self.state, self.recipe.optim
        state.optimizer.zero_grad(set_to_none=True)
        losses = self._gradients(samples)
        state.scaler.unscale_(state.optimizer)
        limit = math.inf if optim.clip_grad_norm is None else optim.clip_grad_norm
        grad_norm = nn.utils.clip_grad_norm_(state.network.parameters(), limit)
        values = {"loss": torch.stack(list(losses.values())).sum(), **losses, "grad_norm": grad_norm}
        flag = torch.tensor(float(wants_stop), device=grad_norm.device)
        mean = self.processes.mean(torch.stack([*(value.detach() for value in values.values()), flag])).tolist()
        row = dict(zip(values, mean[:-1], strict=True))
        self._check_finite(row, values, iteration, samples)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.ema.update(state.network)
        return row, mean[-1] > 0

    def _gradients(self, samples: Sequence[Any]) -> dict[str, Tensor]:
        """Add up the gradients of the parts of a batch; returns the mean terms of the loss."""
        parts, size = self.recipe.optim.accumulate, self.recipe.optim.batch_size
        device = self.processes.device
        total: dict[str, Tensor] = {}
        for number in range(parts):
            is_last = number == parts - 1
            inputs, targets = self.task.batch(samples[number * size : (number + 1) * size], device)
            with nullcontext() if is_last or self.processes.world == 1 else self.forward.no_sync():
                with torch.autocast(device.type, self.dtype, enabled=self.dtype is not None):
                    outputs = self.forward(inputs)
                losses = {name: value / parts for name, value in self.task.losses(outputs, targets).items()}
                self.state.scaler.scale(torch.stack(list(losses.values())).sum()).backward()
            total = {name: value.detach() + total.get(name, 0) for name, value in losses.items()}
        return total

    def _check_finite(
        self, row: dict[str, float], values: dict[str, Tensor], iteration: int, samples: list[Any]
    ) -> None:
        """Stop before a broken step reaches the weights, and name the images that broke it.

        A gradient that overflows in fp16 is no error: the scaler skips that step.
        """
        checked = [name for name in row if name != "grad_norm" or self.dtype is not torch.float16]
        bad = [name for name in checked if not math.isfinite(row[name])]
        if not bad:
            return
        own = [name for name in bad if name != "grad_norm"] or bad  # a norm is that of all processes together
        is_own = not all(bool(torch.isfinite(values[name])) for name in own)
        names = [name for part in self.processes.gather(_names(samples) if is_own else []) for name in part]
        if self.processes.is_first:
            (self.run / BAD_BATCH).write_text("\n".join(names) + "\n", encoding="utf-8")
        shown = ", ".join(names[:_NAMES_SHOWN])
        more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
        back = f", or go back to {self.run / CHECKPOINT} with --resume" if (self.run / CHECKPOINT).exists() else ""
        raise TrainingError(
            f"{' and '.join(bad)} not finite in iteration {iteration + 1}, on images {shown}{more} (all in "
            f"{self.run / BAD_BATCH}): look at these images and their labels, lower optim.lr{back}"
        )

    def _is_validation_due(self, done: int) -> bool:
        """Say whether the recipe asks for a validation after so many iterations."""
        section, epoch, total = self.recipe.validation, self.task.epoch, self.task.iterations
        if not self.task.can_validate:
            return False
        if done == total:
            return True
        if section.interval and done % section.interval == 0:
            return True
        if not epoch or not section.interval_epochs or done % epoch:
            return False
        number, epochs = done // epoch, -(-total // epoch)
        late = number > epochs - section.late_epochs
        return number % (section.late_interval_epochs if late else section.interval_epochs) == 0

    def _is_stale(self) -> bool:
        """Say whether training ends early, because validations have shown nothing better for long enough."""
        patience = self.recipe.loop.early_stop
        return bool(patience) and self.state.stale >= patience

    def _averaged(self) -> nn.Module:
        """Return the averaged network, the same in every process: batch statistics are each process's own."""
        self.processes.share(self.state.ema.module.buffers())
        return self.state.ema.module

    def _save(self, done: int) -> None:
        if self.processes.is_first:
            save_checkpoint(self.run, done, self.processes.world, self.state)

    def _score(self, cancelled: Callable[[], bool] | None) -> Validation:
        """Score the averaged weights; one process alone may be stopped meanwhile, its last checkpoint is there."""

        def poll(*_: int) -> None:
            if self.processes.world == 1 and cancelled is not None and cancelled():
                raise Cancelled(f"training stopped during a validation; go on with --resume -o {self.run}")

        return self.task.validate(self._averaged(), self.processes, poll)

    def _validate(self, done: int, log: RunLog | None, cancelled: Callable[[], bool] | None) -> Validation:
        """Score the averaged weights, and keep them if they are the best so far."""
        state, validation = self.state, self._score(cancelled)
        figures = ", ".join(f"{name} {value:.4f}" for name, value in validation.figures.items())
        logger.info("iteration %d, left-out images: %s", done, figures)
        is_best = state.judge(next(iter(validation.figures.values()), math.nan), done)
        if log is not None:
            log.validation(done, validation.figures)
            if is_best:
                save_weights(state.ema.module, self.run / BEST_WEIGHTS, self.task.spec(validation), half=False)
        self._save(done)
        return validation

    def _announce(self) -> None:
        optim, processes = self.recipe.optim, self.processes
        logger.info(
            "training %s on %s%s: %s, iterations %d to %d, %d samples each, lr %.3g",
            *(self.recipe.model.name, processes.device, f" x {processes.world}" if processes.world > 1 else ""),
            ", ".join(f"{number} {name}" for name, number in self.task.counts().items()),
            *(self.start, self.task.iterations),
            *(optim.batch_size * optim.accumulate * processes.world, self.base_lr),
        )

    def _say(self, row: dict[str, float], done: int, clock: _Clock) -> None:
        remaining = clock.spent / clock.steps * (self.task.iterations - done)
        terms = ", ".join(f"{name.removeprefix('loss_')} {row[name]:.4f}" for name in row if name.startswith("loss_"))
        logger.info(
            "iteration %d/%d  loss %.4f (%s)  lr %.2e  %.2f s/it  waits for data %.0f %%  %d min left",
            *(done, self.task.iterations, row["loss"], terms, row["lr"], row["seconds"], 100 * row["data_wait"]),
            remaining // 60,
        )

    def _summary(
        self, done: int, clock: _Clock, row: dict[str, float], validation: Validation | None
    ) -> dict[str, Any]:
        bad = sorted(set().union(*self.processes.gather(self.task.sampler.bad_images)))
        if bad:
            logger.warning("%d images did not decode and were left out: %s", len(bad), ", ".join(bad[:_NAMES_SHOWN]))
        logged = read_table(self.run / LOG)
        if not clock.steps and logged:  # nothing was left to do
            row = {"loss": float(logged[-1]["loss"])}
        return {
            "weights": str(self.run / WEIGHTS),
            "best": str(self.run / BEST_WEIGHTS) if self.state.best_iteration else None,
            "best_iteration": self.state.best_iteration,
            "iterations": done,
            "planned_iterations": self.task.iterations,
            "seconds": time.perf_counter() - clock.began,
            "loss": row["loss"],
            "images_per_second": clock.samples_per_step * clock.steps / clock.spent if clock.steps else None,
            "data_wait": clock.waited / clock.spent if clock.steps else None,
            "data": self.task.counts(),
            "parameters": sum(parameter.numel() for parameter in self.state.network.parameters()),
            "device": str(self.processes.device),
            "processes": self.processes.world,
            "bad_images": bad,
            "figures": {} if validation is None else dict(validation.figures),
            "validation": [] if validation is None else validation.rows,
        }


class _Clock:
    """Where the time of the steps goes; validations and checkpoints are not counted.

    Attributes:
        samples_per_step: over all processes.
        began: reading of ``time.perf_counter`` at the start.
        steps: taken so far.
        spent: seconds in steps.
        waited: seconds of these in which samples were waited for.
    """

    def __init__(self, samples_per_step: int) -> None:
        self.samples_per_step = samples_per_step
        self.began = self._tick = time.perf_counter()
        self.steps, self.spent, self.waited = 0, 0.0, 0.0
        self._row = (0, 0.0, 0.0)

    def ask(self) -> None:
        """A step begins: samples are asked for."""
        self._tick = time.perf_counter()

    def get(self) -> None:
        """The samples are there."""
        self.waited += time.perf_counter() - self._tick

    def step(self) -> float:
        """The step is done; return its seconds."""
        seconds = time.perf_counter() - self._tick
        self.steps, self.spent = self.steps + 1, self.spent + seconds
        return seconds

    def row(self) -> dict[str, float]:
        """Return speed and share of waiting since the last call."""
        steps, spent, waited = self._row
        self._row = (self.steps, self.spent, self.waited)
        seconds = self.spent - spent
        return {
            "images_per_second": (self.steps - steps) * self.samples_per_step / seconds,
            "data_wait": (self.waited - waited) / seconds,
        }


def _optimizer(optim: OptimSection, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Return the recipe's optimiser; gradients are clipped by the loop, whatever the optimiser."""
    if optim.optimizer == "lamb":
        return Lamb(groups, lr=optim.lr, max_grad_norm=None)
    return torch.optim.AdamW(groups, lr=optim.lr)


def _names(samples: Sequence[Any]) -> list[str]:
    """Return the names of the images that samples show, each once."""
    return list(dict.fromkeys(name for sample in samples for name in sample.names))


@contextmanager
def _numbers(recipe: Recipe) -> Iterator[None]:
    """Seed all generators, and keep to operations that give the same bits again if the recipe asks for it.

    The caller's generators and mode are restored at the end. Where CUDA has no such form of an operation, it warns.
    """
    seed, states = recipe.loop.seed, (random.getstate(), np.random.get_state(), torch.get_rng_state())
    mode, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if recipe.loop.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS may choose anew every time
        torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        torch.use_deterministic_algorithms(mode, warn_only=warns)
