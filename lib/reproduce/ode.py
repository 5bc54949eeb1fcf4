"""The experiments of chapter ``ode``: the essay's descent, and what recurrent cells remember."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lib.training import progress

__all__ = ["adam", "euler_loss", "gradient_norms", "memory_error"]

Cell = Callable[[Tensor, Tensor, Tensor], Tensor]
Pair = Sequence[float]


def euler_loss(p: Sequence[float], points: Mapping[int, Pair]) -> tuple[float, list[float]]:
    """The essay's loss and its gradient, by the recursions of steps 1 and 6.

    Fifty steps of length 1 are too short for tensors to pay, so these are Python's numbers.

    Args:
        p: r1, r2, a1, a2, 1/N1, 1/N2.
        points: what was seen of both species, by time; the one at 0 is where Euler starts.
    """
    r1, r2, a1, a2, n1, n2 = p
    path = [tuple(points[0])]
    for _ in range(50):
        x, w = path[-1]
        path.append(
            (x + r1 * x * (1 - n1 * x) - a1 * x * w, w + r2 * w * (1 - n2 * w) - a2 * x * w)
        )
    loss = u = v = 0.0
    gradient = [0.0] * 6
    for m in range(50, 0, -1):
        if m in points:
            left, right = path[m][0] - points[m][0], path[m][1] - points[m][1]
            loss, u, v = loss + left**2 + right**2, u + 2 * left, v + 2 * right
        x, w = path[m - 1]
        parts = (
            u * x * (1 - n1 * x),
            v * w * (1 - n2 * w),
            -u * x * w,
            -v * x * w,
            -u * r1 * x * x,
            -v * r2 * w * w,
        )
        gradient = [total + part for total, part in zip(gradient, parts, strict=True)]
        u, v = (
            u * (1 + r1 - 2 * r1 * n1 * x - a1 * w) - v * a2 * w,
            v * (1 + r2 - 2 * r2 * n2 * w - a2 * x) - u * a1 * x,
        )
    return loss, gradient


def adam(
    p: Sequence[float],
    loss_and_gradient: Callable[[Sequence[float]], tuple[float, list[float]]],
    steps: int,
    lr: float,
) -> tuple[list[float], list[float]]:
    """Adam with the constants of Keras; returns the parameters and the loss before each step."""
    p = list(p)
    first, second, losses = [0.0] * len(p), [0.0] * len(p), []
    for k in progress(range(1, steps + 1), "Adam"):
        loss, gradient = loss_and_gradient(p)
        losses.append(loss)
        for i, g in enumerate(gradient):
            first[i] = 0.9 * first[i] + 0.1 * g
            second[i] = 0.999 * second[i] + 0.001 * g * g
            size = (second[i] / (1 - 0.999**k)) ** 0.5 + 1e-7
            p[i] -= lr * first[i] / (1 - 0.9**k) / size
    return p, losses


def memory_error(
    move: Cell, task: str, steps: int, *, seeds: int = 3, rounds: int = 80, hidden: int = 16
) -> list[float]:
    """Train a cell to say at the end what it was shown at the beginning; one error a seed.

    ``"number"``: a number uniform in (-1, 1), then nothing; the error is the mean square over
    the variance. ``"bit"``: a sign, then noise of deviation 0.3; the error is the share of wrong
    signs. All seeds are trained at once, along the first axis.

    Args:
        move: maps a state (S, B, H), what drives it (S, B, H) and W (S, H, H) to the next state.
        task: ``"number"`` or ``"bit"``.
        steps: T, how long to remember.
    """
    draw = torch.Generator().manual_seed(5643)
    single: dict[str, Any] = {"generator": draw, "dtype": torch.float32}
    weights = [
        (torch.randn(seeds, *shape, **single) * scale).requires_grad_()
        for shape, scale in (
            ((hidden, hidden), hidden**-0.5),
            ((1, hidden), 1.0),
            ((hidden, 1), hidden**-0.5),
        )
    ]
    inner, into, out = weights

    def episodes(batch: int) -> tuple[Tensor, Tensor]:
        shown = 2 * torch.rand(seeds, batch, 1, **single) - 1
        noise = torch.randn(steps, seeds, batch, 1, **single)
        if task == "bit":
            shown = shown.sign()
        x = 0.3 * noise if task == "bit" else 0.0 * noise
        x[0] = shown
        return x, shown

    def answer(x: Tensor) -> Tensor:
        h = torch.zeros(seeds, x.shape[2], hidden, dtype=x.dtype)
        for drive in (x @ into).unbind():
            h = move(h, drive, inner)
        return h @ out

    optimizer = torch.optim.Adam(weights, lr=0.01)
    for _ in progress(range(rounds), f"{task}, {steps} steps"):
        x, shown = episodes(64)
        optimizer.zero_grad()
        (answer(x) - shown).square().mean((1, 2)).sum().backward()
        _clip(weights)
        optimizer.step()
    with torch.no_grad():
        x, shown = episodes(500)
        guess = answer(x)
    if task == "bit":
        return (guess.sign() != shown).float().mean((1, 2)).tolist()
    return ((guess - shown).square().mean((1, 2)) / shown.square().mean((1, 2))).tolist()


def _clip(weights: Sequence[Tensor]) -> None:
    """Scale the gradient of each seed to norm 1 at most."""
    gradients = [w.grad for w in weights if w.grad is not None]
    size = torch.stack([g.square().flatten(1).sum(1) for g in gradients]).sum(0).sqrt()
    for gradient in gradients:
        gradient /= size.clamp_min(1.0).reshape(-1, 1, 1)


def gradient_norms(move: Cell, weight: Tensor, steps: int) -> Tensor:
    """|d c.h_T / d h_(T-k)| for k = 0..T, at random c and h_0, without input, as shares of |c|."""
    draw = torch.Generator().manual_seed(5643)
    ends = torch.randn(2, len(weight), generator=draw, dtype=weight.dtype)
    states, nothing = [0.5 * ends[0].requires_grad_()], torch.zeros_like(ends[0])
    for _ in range(steps):
        states.append(move(states[-1], nothing, weight))
    found = torch.autograd.grad(states[-1] @ ends[1].detach(), states)
    return torch.stack(found[::-1]).norm(dim=1) / ends[1].detach().norm()
