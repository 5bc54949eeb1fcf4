"""What the losses share: the target taken out of the sum, its cosine spoilt, one softplus."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lib._common import Reduction, reduce_loss

__all__ = ["folded", "own_and_rest", "softplus_loss", "turned"]


def own_and_rest(
    cosine: Tensor, index: Tensor, keep: Tensor, scale: float | Tensor
) -> tuple[Tensor, Tensor]:
    """The target's cosine (B,) and the log of the sum of exp(scale c) over all others (B,)."""
    index = index.unsqueeze(-1)
    cosine = cosine.masked_fill(~keep.unsqueeze(-1), 0.0)
    nothing = torch.finfo(cosine.dtype).min  # -inf has no second derivative where C = 1
    others = (scale * cosine).scatter(-1, index, nothing)  # (B, C)
    return cosine.gather(-1, index).squeeze(-1), others.logsumexp(-1)


def softplus_loss(
    spoilt: Tensor, rest: Tensor, keep: Tensor, scale: float | Tensor, reduction: Reduction
) -> Tensor:
    """log(1 + exp(rest - scale * spoilt)), reduced over the samples that are kept."""
    losses = -F.logsigmoid(scale * spoilt - rest)
    losses = losses.masked_fill(~keep, 0.0)
    if reduction == "mean":
        return losses.sum() / keep.sum().clamp_min(1)
    return reduce_loss(losses, reduction)


def turned(cosine: Tensor, margin: float) -> Tensor:
    """cos(theta + margin) for theta <= pi - margin, then a branch that keeps falling."""
    tiny = torch.finfo(cosine.dtype).tiny ** 0.5
    sine = ((1 - cosine) * (1 + cosine)).clamp_min(tiny).sqrt()
    shifted = cosine * math.cos(margin) - sine * math.sin(margin)
    beyond = cosine - margin * math.sin(margin)
    return torch.where(cosine >= -math.cos(margin), shifted, beyond)


def folded(cosine: Tensor, m: int) -> Tensor:
    """min(cos(m theta), cos(theta)), by the recursion T_{k+1} = 2 c T_k - T_{k-1}."""
    before, chebyshev = torch.ones_like(cosine), cosine
    for _ in range(m - 1):
        before, chebyshev = chebyshev, 2 * cosine * chebyshev - before
    return torch.where(chebyshev <= cosine, chebyshev, cosine)
