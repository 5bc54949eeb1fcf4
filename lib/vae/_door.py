"""The door of the models: what may enter, and what their networks may answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lib._common import at_least_float32, values_readable

__all__ = ["as_codes", "as_images", "as_posterior", "ask"]


def ask(network: Callable[[Tensor], Any], value: Tensor, name: str) -> Any:
    """What ``network`` answers to ``value``, handed over in the precision of its parameters.

    Raises:
        TypeError: if ``value`` is more precise than the parameters, half precision aside.
    """
    if isinstance(network, nn.Module):
        floating = (p.dtype for p in network.parameters() if p.is_floating_point())
        dtype = next(floating, value.dtype)
        work = torch.promote_types(dtype, torch.float32)
        if torch.promote_types(value.dtype, work) != work:
            raise TypeError(
                f"{name} is {value.dtype} but the parameters of the network that reads it are "
                f"{dtype}: convert one of them, so that no precision is lost without a word"
            )
        value = value.to(dtype)
    return network(value)


def as_images(x: Tensor, *, unit_interval: bool, validate: bool) -> Tensor:
    """``x`` (B, *event) in at least float32, finite and, if asked for, in [0, 1]."""
    x = at_least_float32(x, "x")
    if x.ndim < 2:
        raise ValueError(f"x must have shape (B, *event), got {tuple(x.shape)}")
    if validate and x.numel() and values_readable(x):
        low, high = x.aminmax()
        if unit_interval and not (low >= 0 and high <= 1):
            seen = f"[{low.item():.9g}, {high.item():.9g}]"
            raise ValueError(f"x must lie in [0, 1] under a Bernoulli likelihood, got {seen}")
        if not (low.isfinite() and high.isfinite()):
            raise ValueError("x must be finite, got NaN or infinite values")
    return x


def as_codes(z: Tensor, latent_dim: int, *, validate: bool) -> Tensor:
    """``z`` (..., L) in at least float32, finite."""
    z = at_least_float32(z, "z")
    if z.ndim < 1 or z.shape[-1] != latent_dim:
        raise ValueError(f"z must have shape (..., {latent_dim}), got {tuple(z.shape)}")
    if validate and values_readable(z) and not z.isfinite().all():
        raise ValueError("z must be finite, got NaN or infinite values")
    return z


def as_posterior(answer: Any, shape: tuple[int, int], *, validate: bool) -> tuple[Tensor, Tensor]:
    """An encoder's ``answer`` as (mean, log_var), both (B, L) in at least float32."""
    if not isinstance(answer, tuple | list):
        raise TypeError(f"encoder must return (mean, log_var), got {type(answer).__name__}")
    if len(answer) != 2:
        raise TypeError(f"encoder must return (mean, log_var), got {len(answer)} values")
    mean, log_var = (
        at_least_float32(value, f"encoder's {name}")
        for name, value in zip(("mean", "log_var"), answer, strict=True)
    )
    for name, value in (("mean", mean), ("log_var", log_var)):
        if tuple(value.shape) != shape:
            raise ValueError(
                f"encoder must return {name} of shape (B, latent_dim) = {shape}, "
                f"got {tuple(value.shape)}"
            )
        if validate and values_readable(value) and not value.isfinite().all():
            raise ValueError(f"encoder returned {name} with values that are not finite")
    if validate and values_readable(log_var) and not log_var.exp().isfinite().all():
        raise ValueError(
            f"encoder returned log_var up to {log_var.max().item():.4g}, whose exponential, "
            f"the variance, is not finite in {log_var.dtype}"
        )
    return mean, log_var
