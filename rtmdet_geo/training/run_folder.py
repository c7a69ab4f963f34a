"""The folder of a run: what may begin or go on in it, and the checkpoints that it goes on from."""

from __future__ import annotations

import logging
import pickle
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import rtmdet_geo
from rtmdet_geo.config import Recipe, load_recipe
from rtmdet_geo.errors import ConfigError, OutputError, TrainingError, first_line
from rtmdet_geo.outputs import staged_output
from rtmdet_geo.training.ema import ModelEMA
from rtmdet_geo.training.run_log import HISTORY, LOG, VALIDATION

logger = logging.getLogger(__name__)

#: What a run goes on from.
CHECKPOINT = "last.pt"
#: EMA weights of the end, and of the best validation.
WEIGHTS, BEST_WEIGHTS = "model.safetensors", "best.safetensors"
#: Names of the images of a batch whose loss is not finite.
BAD_BATCH = "bad_batch.txt"
#: What a run leaves beside its recipe.
PRODUCTS = (
    *(CHECKPOINT, WEIGHTS, BEST_WEIGHTS, LOG, HISTORY, VALIDATION, "report.html"),
    *("losses.png", "lr.png", "ap.png", "pr.png", BAD_BATCH),
)


@dataclass
class TrainingState:
    """All that changes during a training, besides the files.

    Attributes:
        network: what is trained; not wrapped by DDP or torch.compile.
        ema: its average.
        optimizer: of the network's parameters.
        scaler: of the loss, for fp16.
        samples: what the sampler has learnt of the data (false alarms), as a state dict.
        best: highest deciding figure of a validation so far.
        best_iteration: iterations done then; 0: there was none.
        stale: validations since.
        validated: iterations done at the last validation.
        data: digest of the images and labels to train on.
    """

    network: nn.Module
    ema: ModelEMA
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    samples: dict[str, Any]
    best: float = float("-inf")
    best_iteration: int = 0
    stale: int = 0
    validated: int = 0
    data: str = ""

    def judge(self, figure: float, iteration: int) -> bool:
        """Take in the deciding figure of a validation and say whether it is the best; of equals the later one is."""
        self.validated, self.stale = iteration, 0 if figure > self.best else self.stale + 1
        is_best = figure >= self.best
        if is_best:
            self.best, self.best_iteration = figure, iteration
        return is_best


def check_run(run: Path, recipe: Recipe, *, resume: bool, overwrite: bool) -> None:
    """Refuse a run folder that cannot be resumed, or holds a run that is not to be replaced.

    Raises:
        OutputError: nothing to resume, or a run is already there.
        ConfigError: the run began with another recipe.
    """
    if resume:
        if not (run / CHECKPOINT).is_file():
            raise OutputError(f"nothing to resume in {str(run)!r}: {CHECKPOINT} is missing")
        if load_recipe(run / "recipe.yaml") != recipe:
            raise ConfigError(
                f"the recipe differs from {run / 'recipe.yaml'}, with which this run began: resume with that file"
            )
    elif any((run / name).exists() for name in PRODUCTS) and not overwrite:
        raise OutputError(f"{str(run)!r} already holds a run: --resume goes on with it, --overwrite begins anew")


def begin_run(run: Path, recipe: Recipe) -> None:
    """Make the run folder, empty it of an earlier run, and write the resolved recipe.

    Raises:
        OutputError: the folder cannot be written.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        for name in PRODUCTS:
            (run / name).unlink(missing_ok=True)
        (run / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot write the run folder {str(run)!r}: {error.strerror}") from error


def remove_leftovers(run: Path) -> None:
    """Remove what a killed run was writing when it ended."""
    for name in PRODUCTS:
        for folder in run.glob(f".{name}.*.partial"):
            shutil.rmtree(folder, ignore_errors=True)


def save_checkpoint(run: Path, iteration: int, world: int, state: TrainingState) -> None:
    """Write the checkpoint; the former one stays until this one is whole.

    Args:
        run: the run folder.
        iteration: iterations done.
        world: processes that train.
        state: see :class:`TrainingState`.

    Raises:
        OutputError: it cannot be written, for one because the disk is full.
    """
    content = {
        "iteration": iteration,
        "world": world,
        "network": state.network.state_dict(),
        "ema": state.ema.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "scaler": state.scaler.state_dict(),
        "samples": state.samples,
        "best": state.best,
        "best_iteration": state.best_iteration,
        "stale": state.stale,
        "validated": state.validated,
        "data": state.data,
        "versions": {
            "rtmdet_geo": rtmdet_geo.__version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
    }
    kept = "; the former checkpoint is untouched" if (run / CHECKPOINT).exists() else ""
    try:
        with staged_output(run / CHECKPOINT) as staged:
            torch.save(content, staged)
    except (RuntimeError, OSError, OutputError) as error:  # RuntimeError: torch's own writer at a full disk
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise OutputError(f"cannot write {run / CHECKPOINT}: {reason}{kept}; make room and --resume") from error


def resume_checkpoint(run: Path, world: int, state: TrainingState, device: torch.device) -> int:
    """Take up a run where its checkpoint left it, and return the iterations done.

    Raises:
        TrainingError: the checkpoint is broken or of another network.
        ConfigError: the run began with another number of processes.
    """
    path = run / CHECKPOINT
    try:
        content = torch.load(path, map_location=device, weights_only=True)
        if content["world"] != world:
            raise ConfigError(
                f"{path} is of a training on {content['world']} processes, not {world}: start as many, or the samples "
                "would be others"
            )
        if content["data"] != state.data:
            raise ConfigError(
                f"{path} is of a training on other data: images or numbers of objects have changed; put them back, or "
                "begin anew in another folder"
            )
        state.network.load_state_dict(content["network"])
        state.ema.load_state_dict(content["ema"])
        state.optimizer.load_state_dict(content["optimizer"])
        state.scaler.load_state_dict(content["scaler"])
        state.samples, state.stale, state.validated = content["samples"], content["stale"], content["validated"]
        state.best, state.best_iteration = content["best"], content["best_iteration"]
    except ConfigError:
        raise
    except (RuntimeError, KeyError, TypeError, ValueError, EOFError, OSError, pickle.UnpicklingError) as error:
        reason = first_line(error)
        best = run / BEST_WEIGHTS
        instead = f"; or start from its best weights with --set model.weights={best}" if best.exists() else ""
        raise TrainingError(f"{path} cannot be resumed ({reason}); begin anew with --overwrite{instead}") from error
    return int(content["iteration"])
