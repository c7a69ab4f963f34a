"""LAMB against steps worked out by hand, against Adam where it is Adam, and resumed."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from rtmdet_geo.training.lamb import Lamb

BETAS, EPS = (0.9, 0.999), 1e-6


def by_hand(weight, grads, *, lr, decay, max_norm):
    """Algorithm 2 of arXiv 1904.00962 for one tensor, gradients clipped first, in float64."""
    weight = np.array(weight, float)
    mean, square = np.zeros_like(weight), np.zeros_like(weight)
    for step, grad in enumerate(np.array(grads, float), start=1):
        norm = math.sqrt((grad**2).sum())
        if max_norm is not None and norm > max_norm:
            grad = grad * max_norm / norm
        mean = BETAS[0] * mean + (1 - BETAS[0]) * grad
        square = BETAS[1] * square + (1 - BETAS[1]) * grad**2
        update = mean / (1 - BETAS[0] ** step) / (np.sqrt(square / (1 - BETAS[1] ** step)) + EPS) + decay * weight
        ratio = np.linalg.norm(weight) / np.linalg.norm(update) if decay else 1
        weight = weight - lr * ratio * update
    return weight


def parameter(*values):
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


def run(weights, grads, **options):
    """Take steps with the gradients given for each of some parameters."""
    optimizer = Lamb(weights, **options)
    for row in grads:
        for weight, grad in zip(weights, row, strict=True):
            weight.grad = None if grad is None else torch.tensor(grad, dtype=weight.dtype)
        optimizer.step()
    return optimizer


def test_first_step_by_hand():
    """The first step of Adam is the gradient's sign: u = (1, -1) + .5 * (3, 4) = (2.5, 1), |w| = 5, |u| = 2.6926."""
    weight = parameter(3.0, 4.0)
    run([weight], [[[2.0, -7.0]]], lr=0.1, weight_decay=0.5, eps=1e-12, max_grad_norm=None)
    ratio = 5 / math.sqrt(2.5**2 + 1)
    assert weight.tolist() == pytest.approx([3 - 0.1 * ratio * 2.5, 4 - 0.1 * ratio], rel=1e-9)
    assert math.dist(weight.tolist(), (3, 4)) == pytest.approx(0.1 * 5)  # as long as lr times the tensor


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("max_norm", [None, 1.0, 100.0])
def test_three_steps_equal_the_paper(decay, max_norm):
    grads = [[2.0, -7.0, 0.1], [0.2, 0.1, -0.3], [-5.0, 1.0, 0.0]]
    weight = parameter(3.0, 4.0, -1.0)
    run([weight], [[row] for row in grads], lr=0.1, weight_decay=decay, max_grad_norm=max_norm)
    expected = by_hand([3, 4, -1], grads, lr=0.1, decay=decay, max_norm=max_norm)
    np.testing.assert_allclose(weight.detach().numpy(), expected, rtol=1e-12)
    # Negative control: another clip or decay is another result.
    other = by_hand([3, 4, -1], grads, lr=0.1, decay=decay, max_norm=2.0)
    assert not np.allclose(weight.detach().numpy(), other, rtol=1e-9)


def test_the_norm_that_clips_is_that_of_all_groups():
    """Gradients 3 and 4 have norm 5: divided by 5. Of momenta .06 and .08 only their squares tell."""
    one, two = parameter(1.0), parameter(1.0)
    optimizer = Lamb([{"params": [one], "weight_decay": 0.1}, {"params": [two]}], max_grad_norm=1.0)
    one.grad, two.grad = torch.tensor([3.0]).double(), torch.tensor([4.0]).double()
    optimizer.step()
    assert optimizer.state[one]["mean"].item() == pytest.approx(0.1 * 3 / 5)
    assert optimizer.state[two]["square"].item() == pytest.approx(0.001 * (4 / 5) ** 2)
    assert (one.grad.item(), two.grad.item()) == (3, 4)  # gradients themselves are left alone


def test_without_decay_it_is_adam():
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.ones(4, 3)) for _ in range(2))
    lamb = Lamb([ours], lr=0.01, max_grad_norm=None)
    adam = torch.optim.Adam([theirs], lr=0.01, eps=EPS)
    for _ in range(5):
        ours.grad = torch.randn(4, 3)
        theirs.grad = ours.grad.clone()
        lamb.step()
        adam.step()
    torch.testing.assert_close(ours, theirs)


def test_zero_tensors_take_the_step_as_it_is():
    """The ratio of norms is 1 where the weights are 0 (they could never leave it), and where the step is."""
    weight, still = parameter(0.0, 0.0), parameter(0.0)
    run([weight, still], [[[2.0, -7.0], [0.0]]], lr=0.1, weight_decay=0.5, eps=1e-12, max_grad_norm=None)
    assert weight.tolist() == pytest.approx([-0.1, 0.1]) and still.tolist() == [0]


def test_parameters_without_gradient_stay():
    weight, frozen = parameter(1.0), parameter(1.0)
    optimizer = run([weight, frozen], [[[1.0], None]], weight_decay=0.1)
    assert frozen.item() == 1 and weight.item() < 1
    assert frozen not in optimizer.state


def test_it_minimises_a_quadratic():
    torch.manual_seed(0)
    goal = torch.randn(8)
    weight, bias = nn.Parameter(torch.full((8,), 3.0)), nn.Parameter(torch.zeros(1))
    optimizer = Lamb([{"params": [weight], "weight_decay": 1e-4}, {"params": [bias]}], lr=0.05)
    for step in range(400):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 + math.cos(math.pi * step / 400)) / 2

        def closure():
            optimizer.zero_grad()
            loss = ((weight - goal) ** 2).sum() + ((bias - 1) ** 2).sum()
            loss.backward()
            return loss

        loss = optimizer.step(closure)
    assert loss.item() < 1e-3


def test_a_resumed_run_gives_the_same_bits():
    def make():
        torch.manual_seed(0)
        net = nn.Linear(5, 3)
        groups = [{"params": [net.weight], "weight_decay": 0.02}, {"params": [net.bias], "weight_decay": 0.0}]
        return net, Lamb(groups, lr=0.01)

    def train(net, optimizer, first, last):
        for step in range(first, last):
            optimizer.zero_grad()
            net(torch.full((2, 5), 0.1 * step + 1)).pow(2).sum().backward()
            optimizer.step()

    whole, optimizer = make()
    train(whole, optimizer, 0, 9)
    net, optimizer = make()
    train(net, optimizer, 0, 4)
    weights, state = copy.deepcopy(net.state_dict()), copy.deepcopy(optimizer.state_dict())
    for saved, is_same in ((state, True), ({**state, "state": {}}, False)):
        net, optimizer = make()
        net.load_state_dict(weights)
        optimizer.load_state_dict(saved)
        train(net, optimizer, 4, 9)
        assert torch.equal(net.weight, whole.weight) is is_same, "the moments are part of the state"


@pytest.mark.parametrize(
    "wrong", [{"lr": -1}, {"eps": 0}, {"betas": (1.0, 0.9)}, {"weight_decay": -1}, {"max_grad_norm": 0}]
)
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Lamb([parameter(1.0)], **wrong)
