"""Directions of vectors of any length."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["unit"]


def unit(vectors: Tensor) -> Tensor:
    """Unit vectors along the last axis; zero vectors stay zero.

    Dividing by the largest entry first keeps squares inside the float's range.
    """
    largest = vectors.detach().abs().amax(-1, keepdim=True)
    return F.normalize(vectors / largest.masked_fill(largest == 0, 1), dim=-1)
