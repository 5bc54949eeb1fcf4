"""The two Gaussian formulas of a VAE: the divergence from the prior, and the prior's density."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lib._common import at_least_float32, values_readable

__all__ = ["divergence", "gaussian_kl", "log_standard_normal"]


def gaussian_kl(mean: Tensor, log_var: Tensor) -> Tensor:
    """KL divergence from the standard normal prior to a diagonal Gaussian.

    KL(N(mean, exp(log_var)) || N(0, I)) = 1/2 sum_l (mean_l^2 + exp(log_var_l) - 1 - log_var_l).

    Args:
        mean: (..., L).
        log_var: (..., L), logarithms of the variances.

    Returns:
        (...), in nats, at least float32; infinite where a square or a variance is too large for
        the dtype (in float32 from a ``log_var`` of 89 on).

    Raises:
        ValueError: if the shapes differ, or values are not finite (not checked inside
            ``torch.compile`` and ``torch.func``).
        TypeError: if one is not floating.

    Source: chapter ``vae``, eq-vae-kl; Kingma and Welling (2014), appendix B.

    >>> gaussian_kl(torch.tensor([[1.0, 0.0]]), torch.zeros(1, 2))
    tensor([0.5000])
    """
    mean, log_var = at_least_float32(mean, "mean"), at_least_float32(log_var, "log_var")
    if mean.shape != log_var.shape or mean.ndim < 1:
        seen = f"{tuple(mean.shape)} and {tuple(log_var.shape)}"
        raise ValueError(f"mean and log_var must have the same shape (..., L), got {seen}")
    if __debug__ and values_readable(mean, log_var):
        for name, value in (("mean", mean), ("log_var", log_var)):
            if not value.isfinite().all():
                raise ValueError(f"{name} must be finite, got NaN or infinite values")
    return divergence(mean, log_var)


def divergence(mean: Tensor, log_var: Tensor) -> Tensor:
    """``gaussian_kl`` of what has been checked."""
    # expm1(v) - v, not exp(v) - 1 - v: near v = 0 the difference of two numbers near 1 is noise
    return 0.5 * (mean.square() + torch.expm1(log_var) - log_var).sum(-1)


def log_standard_normal(z: Tensor) -> Tensor:
    """log N(z; 0, I) over the last axis."""
    return -0.5 * (z.square() + math.log(2 * math.pi)).sum(-1)
