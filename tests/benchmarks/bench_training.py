"""Cost of a training step and memory of many boxes: ``python tests/benchmarks/bench_training.py [--output FILE.csv]``.

Step cost: images per second of the whole loop (images from disk, augmentation in two threads, assignment, losses,
optimiser, averaging, logging) over the bare network on data in memory: forward and backward of the sum of its
outputs, nothing else. Both run in one process in turns, on the same device and in the same numbers; target: at least
0.9. A second ratio adds the loss to the bare side, which says what remains of the difference.

Many boxes: one 1024 px tile with 2,000 oriented boxes, forward, assignment, loss and backward on the CPU in a process
of its own; target: a peak below 6 GB.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import multiprocessing
import os
import platform
import resource
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import torch

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results" / "training.csv"
TARGET_RATIO, TARGET_GB = 0.9, 6.0
NUM_IMAGES = 64


def paint(folder, size):
    """Write a data set in DOTA's format: photographs of noise with painted boxes."""
    rng = np.random.default_rng(0)
    for name in ("images", "labels"):
        (folder / name).mkdir()
    for number in range(NUM_IMAGES):
        image = cv2.resize(rng.integers(0, 90, (size // 8, size // 8, 3)).astype(np.uint8), (size, size))
        lines = []
        for _ in range(int(rng.integers(2, 8))):
            box = ((*rng.uniform(50, size - 50, 2),), (*rng.uniform(20, 120, 2),), float(rng.uniform(-90, 90)))
            corners = cv2.boxPoints(box)
            cv2.fillPoly(image, [np.round(corners).astype(np.int32)], (200, 210, 220))
            lines.append(" ".join(f"{value:.1f}" for value in corners.ravel()) + " ship 0")
        cv2.imwrite(str(folder / "images" / f"{number}.jpg"), image)
        (folder / "labels" / f"{number}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def recipe_of(folder, name, size, batch, iterations, workers):
    """Return the recipe that is timed: DOTA's augmentation with mosaic, which costs the data side the most."""
    from rtmdet_geo.config import parse_recipe

    paths = {"train_images": "images", "train_labels": "labels", "root": str(folder)}
    images = {"sampling": "images", "image_size": size, "mosaic_prob": 0.5, "flip_prob": 0.75, "rotate_prob": 0.5}
    optim = {"batch_size": batch, "iterations": iterations, "warmup_iterations": 1, "lr": 1e-4}
    loop = {"workers": workers, "checkpoint_interval": 10**6, "log_interval": 5, "tensorboard": False}
    return parse_recipe(
        {"name": "bench", "model": {"name": name, "classes": ["ship"]}, "data": {"format": "dota", **paths}}
        | {"augment": images, "optim": optim, "loop": loop}
    )


def bare_seconds(recipe, device, steps, *, with_loss):
    """Seconds a step of the network alone: forward and backward, data in memory; with the loss or with a plain sum."""
    from rtmdet_geo.models import get_model
    from rtmdet_geo.training.processes import Processes
    from rtmdet_geo.training.task import DetectionTask

    processes = Processes(torch.device(device))
    task = DetectionTask(recipe, processes=processes, load_weights=False)
    samples = [task.sampler.draw(0, position) for position in range(recipe.optim.batch_size)]
    inputs, targets = task.batch(samples, processes.device)
    network = get_model(recipe.model.name, num_classes=1).to(device, memory_format=torch.channels_last).train()

    def step():
        network.zero_grad(set_to_none=True)
        with torch.autocast(processes.device.type, torch.bfloat16, enabled=device != "cpu"):
            outputs = network(inputs)
        if with_loss:
            loss = torch.stack(list(task.losses(outputs, targets).values())).sum()
        else:
            loss = torch.stack([level.float().sum() for part in outputs for level in part]).sum()
        loss.backward()

    step()
    return timed(step, steps, device)


def timed(step, steps, device):
    """Mean seconds of a step."""
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    if device != "cpu":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / steps


def loop_seconds(recipe, device, folder):
    """Seconds a step of the whole loop, the first logging interval (warm-up) left out."""
    from rtmdet_geo.training.loop import train_model

    train_model(recipe, folder, device=device, overwrite=True)
    with (folder / "log.csv").open() as stream:
        rows = list(csv.DictReader(stream))[1:]
    speed = [float(row["images_per_second"]) for row in rows]
    waits = [float(row["data_wait"]) for row in rows]
    return recipe.optim.batch_size * float(np.mean(1 / np.array(speed))), float(np.mean(waits))


def step_cost(device, name, size, batch, turns, steps):
    """Rows of the results: interleaved turns of the bare network and the loop."""
    with tempfile.TemporaryDirectory() as name_of_folder:
        folder = Path(name_of_folder)
        paint(folder, size)
        recipe = recipe_of(folder, name, size, batch, steps + 5, workers=2 if device == "cpu" else 8)
        bare, with_loss, loop, waits = [], [], [], []
        for _ in range(turns):
            bare.append(bare_seconds(recipe, device, steps, with_loss=False))
            with_loss.append(bare_seconds(recipe, device, steps, with_loss=True))
            seconds, wait = loop_seconds(recipe, device, folder / "run")
            loop.append(seconds)
            waits.append(wait)
    bare, with_loss, loop = (min(values) for values in (bare, with_loss, loop))
    return {
        "case": f"{name} {size} px batch {batch}",
        "device": torch.cuda.get_device_name() if device != "cpu" else f"CPU, {torch.get_num_threads()} threads",
        "bare_images_s": round(batch / bare, 2),
        "bare_with_loss_images_s": round(batch / with_loss, 2),
        "loop_images_s": round(batch / loop, 2),
        "ratio": round(bare / loop, 3),
        "ratio_with_loss": round(with_loss / loop, 3),
        "data_wait": round(float(np.mean(waits)), 4),
    }


def many_boxes(connection, num_boxes):
    """Run one step with many boxes in a fresh process and send its peak memory in GB and its seconds."""
    from rtmdet_geo.models import get_model
    from rtmdet_geo.training.criterion import Target, make_criterion

    rng = np.random.default_rng(0)
    boxes = np.column_stack([rng.uniform(0, 1024, (num_boxes, 2)), rng.uniform(6, 40, (num_boxes, 2))])
    boxes = np.column_stack([boxes, rng.uniform(-1.5, 1.5, num_boxes)]).astype(np.float32)
    network = get_model("rtmdet_r_tiny", num_classes=15).train()
    criterion = make_criterion("rotated", 15)
    target = Target(torch.from_numpy(boxes), torch.from_numpy(rng.integers(0, 15, num_boxes)))
    start = time.perf_counter()
    losses = criterion(network(torch.rand(1, 3, 1024, 1024)), [target])
    torch.stack(list(losses.values())).sum().backward()
    seconds = time.perf_counter() - start
    connection.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2, seconds))


def measure_boxes(num_boxes):
    """Row of the results for many boxes."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=many_boxes, args=(sender, num_boxes))
    process.start()
    peak, seconds = receiver.recv()
    process.join()
    return {"case": f"{num_boxes} boxes in a 1024 px tile", "peak_gb": round(peak, 2), "seconds": round(seconds, 1)}


def main():
    """Measure, print, write the CSV; exit 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))

    name, size, batch = ("rtmdet_r_tiny", 416, 8) if options.device == "cpu" else ("rtmdet_r_tiny", 1024, 16)
    rows = [step_cost(options.device, name, size, batch, options.turns, options.steps)]
    rows += [measure_boxes(number) for number in (20, 2000)]
    machine = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, OpenCV {cv2.__version__}",
        "date": datetime.date.today().isoformat(),
    }
    columns = [
        "case",
        "device",
        "bare_images_s",
        "bare_with_loss_images_s",
        "loop_images_s",
        "ratio",
        "ratio_with_loss",
    ]
    columns += ["data_wait", "peak_gb", "seconds", *machine]
    with options.output.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(row | machine for row in rows)
    for row in rows:
        print(", ".join(f"{key} {value}" for key, value in row.items()))
    passed = rows[0]["ratio"] >= TARGET_RATIO and rows[-1]["peak_gb"] < TARGET_GB
    print(f"step ratio >= {TARGET_RATIO}, 2000 boxes < {TARGET_GB} GB: {'PASS' if passed else 'FAIL'}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
