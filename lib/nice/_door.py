"""The door of the package: which tensors may enter a flow, and which are turned away."""

from __future__ import annotations

import torch
from torch import Tensor

from lib._common import check_positive, values_readable

__all__ = ["check_even", "enter", "require_finite"]


def check_even(dim: int) -> None:
    """Refuse dimensions that do not split into two equal halves."""
    check_positive(dim, "dim")
    if dim % 2:
        raise ValueError(
            f"dim must be even, got {dim}: a coupling swaps the roles of two halves of equal size. "
            f"Pad the data with one coordinate of noise, or drop one"
        )


def enter(x: Tensor, dim: int, dtype: torch.dtype, name: str) -> Tensor:
    """Return ``x`` (..., D) in the precision of the work: that of the parameters, never half.

    Raises:
        TypeError: if ``x`` is not floating-point, or more precise than the parameters.
        ValueError: if the last axis is not ``dim``.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        seen = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(
            f"{name} must be a floating-point tensor, got {seen}; "
            f"integer images go through dequantize first"
        )
    if x.dim() == 0 or x.shape[-1] != dim:
        raise ValueError(f"{name} must have shape (..., {dim}), got {tuple(x.shape)}")
    work = torch.promote_types(dtype, torch.float32)
    if torch.promote_types(x.dtype, work) != work:
        raise TypeError(
            f"{name} is {x.dtype} but the parameters are {dtype}: convert one of them, "
            f"so that no precision is lost without a word"
        )
    return x.to(work)


def require_finite(x: Tensor, name: str) -> None:
    """Refuse NaN and infinity, at the price of one sum unless something is wrong."""
    if values_readable(x) and not x.sum().isfinite() and not x.isfinite().all():
        bad = int((~x.isfinite()).sum())
        raise ValueError(f"{name} must be finite, got {bad} NaN or infinite values of {x.numel()}")
