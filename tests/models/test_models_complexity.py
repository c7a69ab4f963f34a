"""Parameters and multiply-adds: of single layers by hand, of every network beside the catalogue."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rtmdet_geo.catalog import CATALOG, read_spec
from rtmdet_geo.models import BUILDERS, CLASSIFIERS
from rtmdet_geo.models.complexity import count_complexity, count_parameters
from rtmdet_geo.models.weights import build_from_weights
from rtmdet_geo.variants import VARIANTS

EVERY_BUILDER = {**BUILDERS, **CLASSIFIERS}


class Layers(nn.Module):
    """Layers in a row."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, images):
        return self.layers(images)


@pytest.mark.parametrize(
    ("layer", "kind", "number"),
    [
        (nn.Conv2d(3, 4, 3, padding=1), "conv", 8 * 16 * 4 * 27),
        (nn.Conv2d(3, 6, 3, padding=1, stride=2, groups=3, bias=False), "conv", 4 * 8 * 6 * 9),
        (nn.BatchNorm2d(3), "batch_norm", 8 * 16 * 3 * 2),
        (nn.BatchNorm2d(3, affine=False), "batch_norm", 8 * 16 * 3),
        (nn.AdaptiveAvgPool2d(1), "avg_pool", 8 * 16 * 3),
        (nn.AdaptiveAvgPool2d(2), "avg_pool", 8 * 16 * 3),
        (nn.Upsample(scale_factor=2), "upsample", 16 * 32 * 3),
        (nn.Upsample(scale_factor=2, mode="bilinear"), "upsample", 16 * 32 * 3 * 4),
        (nn.Sequential(nn.Flatten(), nn.Linear(8 * 16 * 3, 5)), "linear", 8 * 16 * 3 * 5),
        (nn.Sequential(nn.Flatten(), nn.Linear(8 * 16 * 3, 5, bias=False)), "linear", 8 * 16 * 3 * 5),
        (nn.Sequential(nn.SiLU(), nn.MaxPool2d(5, 1, 2), nn.Hardsigmoid()), "conv", 0),
    ],
)
def test_layers_by_hand(layer, kind, number):
    found = count_complexity(Layers(layer), 8, 16, batch_size=2)
    assert found.by_operator == {**dict.fromkeys(found.by_operator, 0), kind: 2 * number}
    assert found.flops == 2 * number and found.input_shape == (2, 3, 8, 16)


def test_shared_parameters_count_once_and_the_model_stays_as_it_is():
    shared = nn.Conv2d(3, 3, 1)
    model = Layers(shared, shared, nn.BatchNorm2d(3)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = count_complexity(model, 4)
    assert found.params == count_parameters(model) == 12 + 6
    assert found.by_operator["conv"] == 2 * 16 * 9
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    shared.requires_grad_(False)
    assert count_parameters(model) == 6


def test_catalogue_lists_every_builder():
    assert list(VARIANTS) == list(EVERY_BUILDER)


@pytest.mark.parametrize("name", EVERY_BUILDER)
def test_catalogue_equals_the_network(name):
    variant = VARIANTS[name]
    with torch.device("meta"):
        model = EVERY_BUILDER[name](num_classes=variant.num_classes)
    found = count_complexity(model, variant.input_size, training=variant.task == "instances")
    assert found.params == variant.params
    assert found.flops == pytest.approx(variant.flops, rel=1e-3)
    if variant.task == "instances":  # one pass through the common tower instead of two
        assert 0.05 < 1 - count_complexity(model, variant.input_size).flops / variant.flops < 0.13


@pytest.mark.parametrize("name", CATALOG)
def test_catalogue_equals_the_bundled_model(name):
    entry = CATALOG[name]
    found = count_complexity(build_from_weights(entry.weights_path)[0], read_spec(entry.path).tile_size)
    assert (found.params, found.flops) == (entry.params, entry.flops)
