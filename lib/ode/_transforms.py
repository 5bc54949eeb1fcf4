"""Which values may be looked at: none under torch.func transforms or torch.compile."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["concrete", "readable", "real_dtype"]

_REAL = {
    torch.complex32: torch.float16,
    torch.complex64: torch.float32,
    torch.complex128: torch.float64,
}


def real_dtype(y: Tensor) -> torch.dtype:
    """The dtype of the times that belong to a state, which may be complex."""
    return _REAL.get(y.dtype, y.dtype)


def concrete(value: Tensor) -> float | None:
    """The number in a tensor of one element, or None where vmap or compile hides it."""
    if torch.compiler.is_compiling():
        return None
    try:
        return value.detach().item()
    except RuntimeError:
        return None


def readable(values: Tensor) -> list[float] | None:
    """The numbers in ``values``, or None where vmap or compile hides them."""
    if torch.compiler.is_compiling():
        return None
    try:
        return values.detach().tolist()
    except RuntimeError:
        return None
