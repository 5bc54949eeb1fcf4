"""What losses, head and ranking ask of their input, and how they refuse it."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from lib._common import Reduction, values_readable

__all__ = [
    "check_angle",
    "check_cosine",
    "check_margin",
    "check_scale",
    "check_target",
    "lengths",
]

_ROUNDING = 1e-4  # how far rounding may carry a float32 cosine past 1


def check_scale(scale: float | Tensor, validate_args: bool = True) -> float | Tensor:
    """Refuse a scale that is not positive; return a tensor of one number, to be learned, as ()."""
    number: Any = scale
    if isinstance(scale, Tensor) and scale.numel() == 1:
        if not (validate_args and values_readable(scale)):
            return scale.reshape(())
        scale, number = scale.reshape(()), scale.item()
    _check_number(number, "scale", "positive and finite", lambda s: 0 < s < math.inf)
    return scale


def check_margin(margin: float) -> None:
    """Refuse a margin of the cosine that is negative or not finite."""
    _check_number(margin, "margin", "at least 0 and finite", lambda m: 0 <= m < math.inf)


def check_angle(margin: float) -> None:
    """Refuse a margin of the angle that lies outside the half circle, as one in degrees does."""
    _check_number(
        margin, "margin", "an angle from 0 to pi, in radians", lambda m: 0 <= m <= math.pi
    )


def _check_number(value: Any, name: str, wanted: str, holds: Callable[[Any], bool]) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not holds(value):
        raise ValueError(f"{name} must be {wanted}, got {value}")


def check_target(
    target: Tensor,
    shape: tuple[int, ...],
    num_classes: int,
    ignore_index: int,
    reduction: Reduction,
    validate_args: bool,
) -> tuple[Tensor, Tensor]:
    """Refuse targets that name no class; return them with 0 for ignored ones, and what is kept."""
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a tensor of integers, got {type(target).__name__}")
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise TypeError(f"target must be a tensor of integers, got {target.dtype}")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int | Integral):
        raise TypeError(f"ignore_index must be an integer, got {ignore_index!r}")
    if tuple(target.shape) != tuple(shape):
        raise ValueError(f"target must have shape {tuple(shape)}, got {tuple(target.shape)}")
    if reduction == "mean" and target.numel() == 0:
        raise ValueError('the batch is empty: reduction="mean" has nothing to average')
    target = target.long()
    keep = target != ignore_index
    if validate_args and values_readable(target):
        outside = keep & ((target < 0) | (target >= num_classes))
        if outside.any():
            raise ValueError(
                f"target must lie in 0 .. {num_classes - 1} or be ignore_index={ignore_index}, "
                f"got {target[outside][0].item()}"
            )
        if reduction == "mean" and not keep.any():
            raise ValueError(
                f"every target is ignore_index={ignore_index}: "
                'reduction="mean" has nothing to average'
            )
    return target.masked_fill(~keep, 0), keep


def check_cosine(cosine: Tensor, keep: Tensor, given: torch.dtype) -> None:
    """Refuse kept rows (B, C) that hold NaN or, rounding in ``given`` apart, leave [-1, 1]."""
    half = given in (torch.half, torch.bfloat16)
    bound = 1 + (2 * torch.finfo(given).eps if half else _ROUNDING)
    if cosine.numel() == 0 or _within(cosine, bound):
        return
    kept = cosine[keep]
    if kept.numel() and not _within(kept, bound):
        raise ValueError(
            "cosine must lie in [-1, 1] (cosines, not scaled logits), "
            f"got values from {kept.min().item():.4g} to {kept.max().item():.4g}"
        )


def _within(values: Tensor, bound: float) -> bool:
    """Whether all values lie in [-bound, bound]; False if one is NaN."""
    low, high = values.detach().aminmax()
    return bool((low >= -bound) & (high <= bound))


def lengths(vectors: Tensor, name: str, validate_args: bool = True) -> Tensor:
    """Lengths of the rows (N, 1); a zero row that is not refused counts as of length 1.

    Refused are rows without a direction, and those so short or so long that the squares of their
    entries leave the range in which their precision has all its digits.
    """
    norm = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    if validate_args and values_readable(vectors):
        info = torch.finfo(norm.dtype)
        low, high = math.sqrt(info.tiny / info.eps), math.sqrt(info.max)
        fine = (norm > low) & (norm < math.inf)
        if not fine.all():
            row = int((~fine).squeeze(1).nonzero()[0])
            raise ValueError(
                f"{name} needs rows with a direction, but row {row} has length {norm[row].item()} "
                f"(in {norm.dtype} from {low:.0e} to {high:.0e})"
            )
    return norm.masked_fill(norm == 0, 1.0)
