"""The networks of chapter mixup against single networks, hand counts and finite differences."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, one_hot

from lib.mixup import mixup
from lib.reproduce.mixup import (
    Networks,
    calibration_error,
    gradient,
    probabilities,
    soft_loss,
    train,
)


def keep(x, y, generator, epoch):
    return x, y


def blend(x, y, generator, epoch):
    return mixup(x, y, pairing="halves", generator=generator)


def noise(x, y, generator, epoch):
    return x + torch.randn(x.shape, generator=generator), y


@pytest.fixture
def examples():
    g = torch.Generator().manual_seed(1)
    x = torch.randn(3, 47, 6, generator=g)
    y = one_hot(torch.randint(4, (3, 47), generator=g), 4).float()
    return x, y


def single(networks, i):
    """Network i as an ordinary module."""
    layers = []
    for weight, bias in zip(networks.weights, networks.biases, strict=True):
        layers += [nn.Linear(*weight.shape[1:]), nn.ReLU()]
        layers[-2].weight.data = weight[i].detach().T.clone()
        layers[-2].bias.data = bias[i, 0].detach().clone()
    return nn.Sequential(*layers[:-1])


def test_each_network_is_a_perceptron_and_seeds_start_alike(examples):
    networks = Networks(2, 3, [6, 5, 7, 4], torch.Generator().manual_seed(0))
    scores = networks(examples[0][0])
    for i in range(6):
        torch.testing.assert_close(scores[i], single(networks, i)(examples[0][0]))
    assert torch.equal(scores[:3], scores[3:])
    assert not torch.equal(scores[0], scores[1])


@pytest.mark.parametrize("sizes", [[6, 5, 7, 4], [6, 4, 4], [5, 5]])
def test_only_the_last_layer_starts_at_half_of_he(sizes):
    """Also where a hidden layer is as wide as the output."""
    networks = Networks(1, 2, sizes, torch.Generator().manual_seed(2))
    draws = torch.Generator().manual_seed(2)
    for i, weight in enumerate(networks.weights):
        scale = (2 / sizes[i]) ** 0.5 / (2 if i == len(sizes) - 2 else 1)
        expected = scale * torch.randn(2, sizes[i], sizes[i + 1], generator=draws)
        torch.testing.assert_close(weight.detach(), expected)


def test_training_is_that_of_one_network_alone(examples):
    x, y = examples
    options = {"epochs": 4, "hidden": (5,), "batch_size": 10, "lr": 0.01}
    trained = train({"ERM": keep}, x, y, **options)
    order = torch.Generator().manual_seed(0)
    alone = single(Networks(1, 3, [6, 5, 4], order), 1)
    adam = torch.optim.Adam(alone.parameters())
    rate = torch.optim.lr_scheduler.OneCycleLR(adam, 0.01, 16, pct_start=0.1, cycle_momentum=False)
    for _ in range(4):
        rows = [torch.randperm(47, generator=order) for _ in range(3)][1]
        for part in rows[:40].split(10):
            adam.zero_grad()
            cross_entropy(alone(x[1, part]), y[1, part]).backward()
            adam.step()
            rate.step()
    torch.testing.assert_close(trained(x[0])[1], alone(x[0]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("manifold", [(), ("mixup",)])
def test_a_recipe_does_not_depend_on_its_company(examples, manifold):
    options = {"epochs": 3, "hidden": (5, 5), "batch_size": 10, "manifold": manifold}
    alone = train({"mixup": blend}, *examples, **options)
    recipes = {"noise": noise, "mixup": blend, "ERM": keep}
    together = train(recipes, *examples, **options)
    scores = together(examples[0][0])
    torch.testing.assert_close(scores[3:6], alone(examples[0][0]), rtol=1e-4, atol=1e-5)
    assert (scores[3:6] - scores[6:]).abs().max() > 0.01


def test_manifold_mixing_happens_below_the_scores(examples):
    options = {"epochs": 3, "hidden": (5, 5), "batch_size": 10}
    inputs, layers = (
        train({"mixup": blend}, *examples, manifold=manifold, **options)(examples[0][0])
        for manifold in ((), ("mixup",))
    )
    assert (inputs - layers).abs().max() > 0.01


def test_the_last_incomplete_batch_is_left_out_and_epochs_are_counted(examples):
    seen = []

    def spy(x, y, generator, epoch):
        seen.append((epoch, len(x)))
        return x, y

    train({"spy": spy}, *(t[:1] for t in examples), epochs=2, batch_size=20, hidden=(5,))
    assert seen == [(0, 20), (0, 20), (1, 20), (1, 20)]


def test_soft_loss_is_cross_entropy_summed_over_networks(examples):
    scores, y = torch.randn(3, 47, 4), examples[1]
    expected = sum(cross_entropy(scores[i], y[i]) for i in range(3))
    torch.testing.assert_close(soft_loss(scores, y), expected)


def test_probabilities_in_chunks(examples):
    networks = Networks(1, 3, [6, 5, 4], torch.Generator().manual_seed(0))
    for x in examples[0], examples[0][0]:
        expected = networks(x).softmax(-1)
        torch.testing.assert_close(probabilities(networks, x, chunk=10), expected)


def test_calibration_error_by_hand():
    confidence = torch.tensor([0.95, 0.91, 0.55, 0.58, 1.0])
    p = torch.stack([confidence, 1 - confidence], 1)[None]
    y = torch.tensor([0, 1, 0, 0, 0])
    # bins of width 0.1: {0.95, 0.91, 1.0} with 2 of 3 right, {0.55, 0.58} with 2 of 2
    expected = (abs(2 - 2.86) + abs(2 - 1.13)) / 5
    assert calibration_error(p, y, bins=10).item() == pytest.approx(expected, rel=1e-6)
    sure = one_hot(y, 2).float()[None]
    assert calibration_error(torch.cat([sure, 1 - sure]), y).tolist() == [0.0, 1.0]


def test_gradient_by_finite_differences(examples):
    networks = Networks(1, 3, [6, 5, 4], torch.Generator().manual_seed(0)).double()
    x, y = examples[0][0].double(), examples[1][0].argmax(1)
    found = gradient(networks, x, y)
    away, step = torch.randn(x.shape, dtype=torch.float64), 1e-6
    ends = [
        torch.stack([cross_entropy(s, y, reduction="none") for s in networks(x + e * away)])
        for e in (step, -step)
    ]
    slope = (ends[0] - ends[1]) / (2 * step)
    torch.testing.assert_close((found * away).sum(-1), slope, rtol=1e-6, atol=1e-7)
