"""Checks that read values, and so must step aside where there are none to read."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["check_ids", "check_values"]


def check_values(holds: Tensor, message: str) -> None:
    """Raise ``ValueError`` unless ``holds`` (bool, any shape) is true everywhere.

    Under ``torch.compile`` and ``torch.func.vmap`` a tensor has no values to branch on; the check
    is skipped there.
    """
    if torch.compiler.is_compiling():
        return
    try:
        fine = bool(holds.all())
    except RuntimeError:  # vmap refuses control flow on values
        return
    if not fine:
        first = tuple((~holds).nonzero()[0].tolist())
        where = f", the first at index {first if len(first) != 1 else first[0]}" if first else ""
        raise ValueError(f"{message}, got {int((~holds).sum())} that break this{where}")


def check_ids(ids: Tensor, size: int, name: str) -> None:
    """Refuse ids that are not integers in ``0 .. size - 1``."""
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name} must be a tensor of integer ids, got {type(ids).__name__}")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"{name} must be a tensor of integer ids, got {ids.dtype}")
    check_values((ids >= 0) & (ids < size), f"{name} must lie in 0 .. {size - 1}")
