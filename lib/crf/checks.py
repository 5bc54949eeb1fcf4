"""Refusals that say what was seen: masks, scores, tags and spans."""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor

__all__ = ["check_mask", "check_scores", "check_span", "check_tags"]

_FAR = 1e8  # beside it float64 still has eight digits behind the point


def check_mask(mask: Tensor) -> None:
    """Refuse empty sequences, left padding and holes in a bool mask (B, T)."""
    begins = mask[:, 1:] > mask[:, :-1]  # again, or too late
    if begins.any() or not mask[:, 0].all():
        row = int((begins.any(1) | ~mask[:, 0]).nonzero()[0])
        raise ValueError(
            "mask must be True from the first position to the end of a sequence and False "
            f"behind it, got row {row} = {mask[row].int().tolist()}"
        )


def check_scores(
    scores: Tensor, name: str, mask: Tensor | None = None, *, values: bool = True
) -> bool:
    """Whether even the largest score (at some position of emissions) drowns others in float64.

    ``values``: refuse NaN and +inf, but for padding.
    """
    scores = scores.detach()
    if not scores.numel():
        return False
    low, high = (extreme.item() for extreme in scores.aminmax())
    if values and not high < torch.inf:
        _refuse_infinite(scores, name, mask)
    if mask is None:
        return abs(high) > _FAR and abs(high) < torch.inf
    if low >= -_FAR and high <= _FAR:
        return False
    best = scores.amax(2)
    return bool(((best.abs() > _FAR) & best.isfinite() & mask).any())


def _refuse_infinite(scores: Tensor, name: str, mask: Tensor | None) -> None:
    """Refuse NaN and +inf, but for padding."""
    bad = ~(scores < torch.inf)
    if mask is not None:
        bad &= mask.unsqueeze(2)
    if bad.any():
        place = bad.nonzero()[0].tolist()
        seen = scores[tuple(place)].item()
        raise ValueError(f"{name} must hold numbers below inf, got {seen} at {place}")


def _check_integers(tags: Tensor) -> None:
    """Refuse what holds no tags."""
    if not isinstance(tags, Tensor):
        raise TypeError(f"tags must be a tensor of integers, got {type(tags).__name__}")
    if tags.is_floating_point() or tags.is_complex() or tags.dtype == torch.bool:
        raise TypeError(f"tags must be integers, got {tags.dtype}")


def check_tags(tags: Tensor, mask: Tensor, num_tags: int, *, values: bool) -> Tensor:
    """Tags (..., B, T) as long, beside the mask (B, T); ``values``: in range where it is True."""
    _check_integers(tags)
    if tags.shape[-2:] != mask.shape:
        raise ValueError(
            f"tags must have shape (..., B, T), here {tuple(mask.shape)}, got {tuple(tags.shape)}"
        )
    tags = tags.to(mask.device, torch.long)
    if values and tags.numel():
        low, high = (int(x) for x in tags.aminmax())
        if low < 0 or high >= num_tags:  # perhaps only in the padding
            low, high = (int(x) for x in torch.where(mask, tags, 0).aminmax())
        if low < 0 or high >= num_tags:
            raise ValueError(
                f"tags must lie in 0..{num_tags - 1} where the mask is True, "
                f"got {low if low < 0 else high}"
            )
    return tags


def check_span(start: int, tags: Tensor, mask: Tensor, num_tags: int, *, values: bool) -> Tensor:
    """Tags (B, L) of a span as long; ``values``: in range and within every sequence."""
    batch, length = mask.shape
    _check_integers(tags)
    if isinstance(start, bool) or not isinstance(start, Integral):
        raise TypeError(f"start must be an integer, got {start!r}")
    if tags.dim() != 2 or tags.shape[0] != batch or not tags.shape[1]:
        raise ValueError(f"tags must have shape (B, L), here B = {batch}, got {tuple(tags.shape)}")
    stop = start + tags.shape[1]
    if not 0 <= start < stop <= length:
        raise ValueError(f"the span must lie in 0..{length - 1}, got {start}..{stop - 1}")
    inside = mask[:, start:stop]
    if values and not inside.all():
        raise ValueError(
            f"the span must lie within every sequence, got {start}..{stop - 1} "
            f"beside a sequence of length {int(mask.sum(1).min())}"
        )
    return check_tags(tags, inside, num_tags, values=values)
