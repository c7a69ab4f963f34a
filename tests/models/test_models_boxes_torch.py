"""Rotated boxes in torch against golden numbers and worked examples."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rtmdet_geo.models.boxes_torch import corners, norm_angle, points_inside, regularize_le90, to_own_axes


@pytest.fixture(scope="module")
def golden(oracle_dir):
    return json.loads((oracle_dir / "ops.json").read_text())["boxes"]


def tensor(values, dtype=torch.float32):
    return torch.tensor(values, dtype=dtype)


def same_angles(ours, theirs, tolerance=1e-5):
    """Compare modulo pi: float32 may wrap -pi/2 to +pi/2."""
    difference = torch.remainder(ours - theirs + math.pi / 2, math.pi) - math.pi / 2
    return bool((difference.abs() < tolerance).all())


def test_oracle_corners(golden):
    ours = corners(tensor(golden["rboxes"])).reshape(-1, 8)
    np.testing.assert_allclose(ours, golden["rbox2qbox"], atol=1e-4)


def test_oracle_regularize(golden):
    ours, theirs = regularize_le90(tensor(golden["rboxes"])), tensor(golden["regularize"]["le90"])
    torch.testing.assert_close(ours[:, :4], theirs[:, :4], rtol=0, atol=1e-4)
    assert same_angles(ours[:, 4], theirs[:, 4])


def test_oracle_norm_angle(golden):
    torch.testing.assert_close(
        norm_angle(tensor(golden["norm_angle_input"])), tensor(golden["norm_angle"]["le90"]), rtol=0, atol=1e-6
    )


def test_oracle_points_inside(golden):
    case = golden["find_inside_points"]
    inside = points_inside(tensor(case["points"]), tensor(case["boxes"]))
    theirs = torch.tensor(case["out"]).bool()
    assert theirs.any()
    assert torch.equal(inside, theirs)


def test_worked_example():
    """A 4 x 2 box turned by +pi/2 (clockwise on screen): w points down."""
    box = tensor([[10.0, 20.0, 4.0, 2.0, math.pi / 2]])
    np.testing.assert_allclose(corners(box)[0], [[9, 22], [11, 22], [11, 18], [9, 18]], atol=1e-5)
    assert points_inside(tensor([[10.0, 21.9], [11.5, 20.0], [10.0, 22.0]]), box).tolist() == [[True], [False], [False]]
    np.testing.assert_allclose(to_own_axes(tensor([[10.0, 21.0]]), box), [[1, 0]], atol=1e-6)


BOXES = st.tuples(
    st.floats(-500, 500), st.floats(-500, 500), st.floats(0.5, 300), st.floats(0.5, 300), st.floats(-10, 10)
)


@settings(deadline=None, max_examples=60)
@given(BOXES)
def test_le90_keeps_the_rectangle(values):
    box = tensor([values], torch.float64)
    regular = regularize_le90(box)
    assert regular[0, 2] >= regular[0, 3]
    assert -math.pi / 2 - 1e-12 <= regular[0, 4].item() <= math.pi / 2 + 1e-12
    distances = torch.cdist(corners(box)[0], corners(regular)[0])
    assert distances.amin(dim=1).max() < 1e-6


@settings(deadline=None, max_examples=60)
@given(BOXES, st.floats(-0.49, 0.49), st.floats(-0.49, 0.49), st.floats(1.01, 3.0))
def test_points_inside_by_construction(values, along, across, beyond):
    box = tensor([values], torch.float64)
    first, second, third = corners(box)[0, 0], corners(box)[0, 1], corners(box)[0, 2]
    centre, across_axis, along_axis = box[0, :2], first - second, second - third
    inner = centre + along * along_axis + across * across_axis
    outer = centre + 0.5 * beyond * along_axis + 0.1 * along_axis / along_axis.norm()
    margin = min((0.5 - abs(along)) * values[2], (0.5 - abs(across)) * values[3])
    assert points_inside(torch.stack((inner, outer)), box).squeeze(1).tolist() == [margin > 0.01, False]
