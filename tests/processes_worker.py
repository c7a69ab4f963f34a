"""One of several processes of a test: computes the gradients of the first batch and saves them."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from rtmdet_geo.config import load_recipe
from rtmdet_geo.training.loop import _numbers, _Training
from rtmdet_geo.training.processes import join_processes
from rtmdet_geo.training.task import DetectionTask, samples_per_process


def settle_norms(network: torch.nn.Module) -> None:
    """Give batch norms the averages of a fixed input: with those of a new network signals would fade to nothing."""
    norms = [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        network.train()(torch.randn(4, 4, 128, 128, generator=torch.Generator().manual_seed(0)))


def main(recipe_path: str, out: str, positions: str = "") -> None:
    """Save loss terms and gradients of iteration 0 as ``OUT/RANK.pt``; of samples at other positions if asked."""
    torch.set_num_threads(1)
    recipe = load_recipe(recipe_path)
    with join_processes("cpu") as processes, _numbers(recipe):
        task = DetectionTask(recipe, processes=processes, load_weights=True)
        settle_norms(task.network)
        training = _Training(recipe, Path(out) / "run", task, processes, resume=False)
        own = samples_per_process(recipe)
        chosen = [int(text) for text in positions.split(",") if text]
        chosen = chosen or [processes.rank * own + number for number in range(own)]
        samples = [task.sampler.draw(0, position) for position in chosen]
        losses = training._gradients(samples)
        gradients = {name: parameter.grad for name, parameter in task.network.named_parameters()}
        torch.save({"losses": losses, "gradients": gradients}, Path(out) / f"{processes.rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
