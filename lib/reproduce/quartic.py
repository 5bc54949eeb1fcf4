"""The density exp(-a x^2 - b x^4): drawn from, and fitted with and without its normaliser."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributions import Distribution, Normal, Uniform

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["GRID", "contrast_fits", "draw", "features", "likelihood_fits", "normal", "uniform"]

GRID = torch.linspace(-3, 3, 6001, dtype=torch.float64)  # beyond it lies less than 1e-20


def uniform(half_width: float) -> Uniform:
    """Noise spread evenly over an interval around 0, in float64."""
    edge = torch.tensor(half_width, dtype=torch.float64)
    return Uniform(-edge, edge, validate_args=False)


def normal(scale: float, mean: float = 0.0) -> Normal:
    """Gaussian noise in float64."""
    return Normal(torch.tensor(mean, dtype=torch.float64), torch.tensor(scale, dtype=torch.float64))


def features(x: Tensor) -> Tensor:
    """The derivatives (..., 3) of ``-a x^2 - b x^4 - c`` by a, b and c."""
    return torch.stack((-(x**2), -(x**4), -torch.ones_like(x)), -1)


def draw(shape: tuple[int, ...], a: float, b: float, generator: torch.Generator) -> Tensor:
    """Draws of that shape, by inverting the distribution function on `GRID`."""
    mass = (-a * GRID**2 - b * GRID**4).exp().cumsum(0)
    mass = mass / mass[-1].clone()
    level = torch.rand(shape, generator=generator, dtype=torch.float64)
    right = torch.searchsorted(mass, level).clamp(1, len(GRID) - 1)
    share = (level - mass[right - 1]) / (mass[right] - mass[right - 1])
    return torch.lerp(GRID[right - 1], GRID[right], share.clamp(0, 1))


def likelihood_fits(x: Tensor) -> Tensor:
    """Maximum likelihood for each row of ``x`` (R, n), with log Z by quadrature: (a, b, log Z)."""
    seen, grid = features(x)[..., :2].mean(1), features(GRID)[:, :2]

    def slope_and_curvature(theta: Tensor) -> tuple[Tensor, Tensor]:
        law = (theta @ grid.T).softmax(1)  # (R, grid)
        mean = law @ grid
        second = grid.T @ (law.unsqueeze(2) * grid)
        return mean - seen, second - mean.unsqueeze(2) * mean.unsqueeze(1)

    theta = _newton(slope_and_curvature, torch.ones(len(x), 2, dtype=torch.float64))
    log_z = (theta @ grid.T).logsumexp(1, keepdim=True) + math.log(float(GRID[1] - GRID[0]))
    return torch.cat((theta, log_z), 1)


def contrast_fits(x: Tensor, law: Distribution, k: int, start: Tensor) -> Tensor:
    """NCE for each row of ``x`` (R, n) with ``k`` draws from ``law`` per point: (a, b, log Z).

    The loss is convex, a logistic regression, so Newton's steps from ``start`` (R, 3) end in its
    one minimum. The draws are those of torch's global generator.
    """
    noise = law.sample((len(x), k * x.shape[1]))
    own = features(x), law.log_prob(x) + math.log(k)
    other = features(noise), law.log_prob(noise) + math.log(k)

    def slope_and_curvature(theta: Tensor) -> tuple[Tensor, Tensor]:
        slope = curvature = torch.zeros(())
        for (rows, offset), target in ((own, 1.0), (other, 0.0)):
            chance = ((rows @ theta.unsqueeze(2)).squeeze(2) - offset).sigmoid()
            slope = slope + ((chance - target).unsqueeze(1) @ rows).squeeze(1)
            weighted = (chance * (1 - chance)).unsqueeze(2) * rows
            curvature = curvature + rows.mT @ weighted
        return slope, curvature

    return _newton(slope_and_curvature, start)


def _newton(
    slope_and_curvature: Callable[[Tensor], tuple[Tensor, Tensor]], theta: Tensor, steps: int = 50
) -> Tensor:
    for _ in range(steps):
        slope, curvature = slope_and_curvature(theta)
        step = torch.linalg.solve(curvature, slope)
        length = torch.linalg.vector_norm(step, dim=1, keepdim=True)
        theta = theta - step * (0.5 / length.clamp_min(0.5))  # never far past the minimum
        if step.abs().max() < 1e-8:
            return theta
    raise RuntimeError(f"no minimum after {steps} Newton steps, the last {step.abs().max():.1e}")
