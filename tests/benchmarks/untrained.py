"""Untrained networks with numbers like those of trained ones, tiles to run them on, and the comparison of engines."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from rtmdet_geo.backends.contract import rows_to_detections
from rtmdet_geo.models import get_model
from rtmdet_geo.models.decode import DetectionGraph
from rtmdet_geo.models.identify import load_network
from rtmdet_geo.models.weights import save_weights
from rtmdet_geo.structures import ModelSpec

#: By precision, how far detections may be from torch in fp32: px and score. bf16 has 8 bits: that is for large errors.
TOLERANCES = {"fp32": (0.05, 1e-3), "fp16": (0.5, 0.01), "bf16": (8.0, 0.05)}
#: Detections a tile above the score threshold.
NUM_DETECTIONS = 300
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def draw_tiles(number, side, seed):
    """Return uint8 (number, 3, side, side): uneven ground with noise and turned rectangles of 8 to 60 px.

    Four of them differ, the others repeat these.
    """
    generator = np.random.default_rng(seed)
    x, y = np.meshgrid(np.arange(side), np.arange(side))
    tiles = np.empty((min(number, 4), 3, side, side), np.uint8)
    for tile in tiles:
        waves = np.sin(x / generator.uniform(20, 90)) * np.cos(y / generator.uniform(20, 90))
        picture = generator.uniform(40, 110, (3, 1, 1)) + 30 * waves + generator.normal(0, 6, (3, side, side))
        for _ in range(max(8, side * side // 8000)):
            draw_rectangle(picture, x, y, generator)
        tile[:] = np.clip(picture, 0, 255)
    return np.ascontiguousarray(tiles[np.arange(number) % len(tiles)])


def draw_rectangle(picture, x, y, generator):
    """Draw one rectangle into a picture (3, side, side); x and y are the pixels' places."""
    cx, cy = generator.integers(0, len(x), 2)
    length, angle = generator.uniform(8, 60), generator.uniform(-1.6, 1.6)
    window = np.s_[max(0, cy - 60) : cy + 60, max(0, cx - 60) : cx + 60]
    dx, dy = x[window] - cx, y[window] - cy
    along, across = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
    inside = (abs(along) < length / 2) & (abs(across) < length * generator.uniform(0.1, 0.5))
    picture[:, *window][:, inside] = generator.uniform(60, 250, (3, 1))


def make_weights(model, side, folder):
    """Return the file of a network's weights, which are always the same; it is made if it is not there."""
    path = folder / f"{model}_{side}.safetensors"
    if path.is_file():
        return path
    torch.manual_seed(0)
    network = get_model(model)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    normalise(network, (torch.from_numpy(draw_tiles(2, 256, seed=0)) - mean) / std)
    classes = tuple(f"class {index}" for index in range(network.num_classes))
    spec = ModelSpec(
        name=model, architecture=model, kind=network.kind, classes=classes, mean=MEAN, std=STD, tile_size=side
    )
    save_weights(network, path, spec, half=False)
    return path


def normalise(network, images):
    """Give an untrained network statistics of real activations, and predictors whose outputs vary from place to place.

    Logits get mean -4 and deviation 1.5, distances vary by a third of the stride (or its logarithm), angles by half a
    radian.
    """
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    head = network.bbox_head
    with torch.no_grad():
        for norm in norms:
            norm.momentum = None  # the average over all batches
        network.train()
        network(images)
        network.eval()
        for norm in norms:
            norm.momentum = 0.1
            norm.running_var.clamp_(min=0.2)  # channels that hardly vary would blow up rounding errors
        raw = network(images)
        for level, stride in enumerate(head.strides):
            distances = raw.reg[level].log() if head.exp_on_reg and network.kind != "mask" else raw.reg[level] / stride
            head.rtm_reg[level].weight *= 0.3 / distances.std()
            head.rtm_cls[level].weight *= 1.5 / raw.cls[level].std()
            if network.kind == "rotated":
                head.rtm_ang[level].weight *= 0.5 / raw.angle[level].std()
        for level, logits in enumerate(network(images).cls):
            head.rtm_cls[level].bias += -4 - logits.mean()


class Reference:
    """Detections of torch in fp32 on the CPU, batch norms not folded, and the score above which they are compared."""

    def __init__(self, weights, images):
        network, spec = load_network(weights)
        graph = DetectionGraph(network.eval(), spec.mean, spec.std).eval()
        with torch.inference_mode():
            self.rows = [output.numpy() for output in graph(torch.from_numpy(images))]
        self.kind = spec.object_kind
        number = min(NUM_DETECTIONS, self.rows[1].shape[1] // 4)
        self.threshold = float(np.median(np.sort(self.rows[1], axis=1)[:, -number]))

    def compare(self, engine, images, at_once):
        """Return the largest differences in px and in score, and the number of detections that were compared.

        Each detection of one that is surely above the threshold is compared with the nearest of the other's.
        """
        px, score = TOLERANCES[engine.precision]
        expected = [
            rows_to_detections(*rows, score_threshold=self.threshold, multi_label=False, kind=self.kind)
            for rows in zip(*self.rows, strict=True)
        ]
        parts = np.array_split(images, len(images) // at_once)
        found = [one for batch in engine.run(parts, score_threshold=self.threshold) for one in batch]
        worst = np.zeros(2)
        number = 0
        for one, other in zip(expected, found, strict=True):
            for first, second in ((one, other), (other, one)):
                sure = first.select(first.scores >= self.threshold + 2 * score)
                number += len(sure)
                if len(sure):
                    worst = np.maximum(worst, differences(sure, second, px, score))
        return worst[0], worst[1], number


def differences(one, other, px, score):
    """Return the largest distance in px, and in score, of detections to their partners; nan without partners."""
    if not len(other):
        return np.full(2, np.nan)
    distance = np.abs(one.boxes[:, None, :4] - other.boxes[None, :, :4]).max(axis=2)
    turn = np.abs(one.boxes[:, None, 4] - other.boxes[None, :, 4])
    distance = np.maximum(distance, np.minimum(turn, np.abs(np.pi - turn)) * one.boxes[:, None, 2] / 2)
    apart = np.abs(one.scores[:, None] - other.scores[None])
    cost = np.maximum(distance / px, apart / score)
    cost[one.labels[:, None] != other.labels[None]] = np.inf
    partner = cost.argmin(axis=1)
    rows = np.arange(len(one))
    missing = np.isinf(cost[rows, partner])
    return np.array([np.where(missing, np.inf, values[rows, partner]).max() for values in (distance, apart)])
