"""What the losses and the words refuse; checks of values step aside where there are none."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["check_ids", "check_shape", "check_values"]


def check_values(holds: Tensor, message: str, values: Tensor | None = None) -> None:
    """Raise ``ValueError`` unless ``holds`` (bool, any shape) is true everywhere.

    The error shows the first of the ``values`` that break it.

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
        broken = (~holds).nonzero()
        first, more = tuple(broken[0].tolist()), len(broken) - 1
        seen = "one that breaks this" if values is None else values[first].item()
        where = f" at index {first if len(first) != 1 else first[0]}" if first else ""
        raise ValueError(f"{message}, got {seen}{where}" + (f" and {more} more" if more else ""))


def check_shape(tensor: Tensor, shape: torch.Size, name: str) -> None:
    """Refuse a tensor of any other shape."""
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")


def check_ids(ids: Tensor, size: int, name: str) -> Tensor:
    """Return ``ids`` as int64; refuse any that are not integers in ``0 .. size - 1``.

    PyTorch takes an index of uint8 for a mask and refuses the other short integers.
    """
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name} must be a tensor of integer ids, got {type(ids).__name__}")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"{name} must be a tensor of integer ids, got {ids.dtype}")
    ids = ids.long()
    check_values((ids >= 0) & (ids < size), f"{name} must lie in 0 .. {size - 1}", ids)
    return ids
