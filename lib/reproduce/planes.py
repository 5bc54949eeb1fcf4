"""Digits in the plane: what a classifier with and without a margin makes of its features."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize, one_hot

from lib.margin import MarginHead
from lib.training import fit

__all__ = ["Plane", "first_digits", "misranked", "plane", "trio"]


class Plane(NamedTuple):
    """Features (N, 2), class centres (C, 2), and which samples training is done with (N,)."""

    points: Tensor
    centres: Tensor
    done: Tensor


class Extreme(NamedTuple):
    """The extreme of each row and where it stands, both (N,)."""

    values: Tensor
    indices: Tensor


def first_digits(num_classes: int = 5, size: int = 1000) -> tuple[Tensor, Tensor]:
    """Pictures (N, 784) in [0, 1] of the digits below ``num_classes``, and the digits (N,)."""
    from lib.data import load

    pictures, digits = map(torch.tensor, load("mnist")["train"])
    chosen = (digits < num_classes).nonzero()[:size, 0]
    return pictures[chosen].flatten(1) / 255, digits[chosen].long()


def plane(pictures: Tensor, digits: Tensor, margin: float | None, seed: int) -> Plane:
    """Train a network that ends in two features under a plain softmax layer or a margin head.

    Training is done with a sample that is classified right, or, with a margin, wins by it.
    """
    torch.manual_seed(seed)
    layers = [nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 2)]
    net, num_classes = nn.Sequential(*layers), int(digits.max()) + 1
    top: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    if margin is None:
        top = nn.Linear(2, num_classes, bias=False)
        loss = lambda z, y: cross_entropy(top(z), y)  # noqa: E731
    else:
        top = head = MarginHead(2, num_classes, margin=margin, scale=12.0)
        turn = torch.arange(num_classes) * 2 * math.pi / num_classes
        head.weight.data = torch.stack([turn.cos(), turn.sin()], 1)  # on a circle none can pass
        loss = head.loss
    fit(
        lambda x, y: loss(net(x), y),
        torch.optim.Adam([*net.parameters(), *top.parameters()], lr=2e-3),
        (pictures, digits),
        epochs=20,
        batch_size=50,
        generator=torch.Generator().manual_seed(seed),
        description="digits",
    )
    with torch.no_grad():
        points = net(pictures)
        handicapped = top(points) - (margin or 0.0) * one_hot(digits, num_classes)
    return Plane(points, top.weight.detach(), handicapped.argmax(1) == digits)


def misranked(points: Tensor, classes: Tensor, done: Tensor) -> Tensor:
    """Which finished samples have a finished stranger nearer, by cosine, than some fellow (N,)."""
    far, near = _extremes(points, classes, done)
    return (near.values > far.values) & done


def trio(points: Tensor, classes: Tensor, done: Tensor) -> tuple[int, int, int]:
    """The sample most misranked, the fellow farthest from it and the stranger nearest to it."""
    far, near = _extremes(points, classes, done)
    wrong = (near.values - far.values).masked_fill(~done, -4)
    a = int(wrong.argmax())
    if wrong[a] <= 0:
        raise ValueError("no sample is misranked")
    return a, int(far.indices[a]), int(near.indices[a])


def _extremes(points: Tensor, classes: Tensor, done: Tensor) -> tuple[Extreme, Extreme]:
    """For each sample the lowest cosine with a finished fellow, the highest with a stranger."""
    unit = normalize(points, dim=1)
    cosines, same = unit @ unit.t(), classes.unsqueeze(1) == classes
    far = cosines.masked_fill(~(same & done), 2).min(1)
    return Extreme(*far), Extreme(*cosines.masked_fill(same | ~done, -2).max(1))
