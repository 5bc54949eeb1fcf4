"""The logarithm of a mean of weights, a chunk of draws at a time."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lib._common import check_positive

__all__ = ["log_mean_exp"]


def log_mean_exp(draw: Callable[[int], Tensor], k: int, chunk_size: int | None) -> Tensor:
    """log 1/k sum_i exp(log_w_i) over k draws, where ``draw(n)`` gives the log-weights (n, B) of n.

    Between chunks only two numbers an example are kept: tensors kept from every chunk would lie
    scattered over the heap and hold on to it, many times their own size.
    """
    check_positive(k, "k")
    chunk_size = k if chunk_size is None else chunk_size
    check_positive(chunk_size, "chunk_size")
    if chunk_size >= k:
        return draw(k).logsumexp(0) - math.log(k)
    peak = total = torch.zeros(())
    for start in range(0, k, chunk_size):
        log_weights = draw(min(chunk_size, k - start))
        # Finite, because infinity less infinity is NaN
        largest = torch.finfo(log_weights.dtype).max
        top = log_weights.detach().amax(0).clamp(-largest, largest)
        top = torch.maximum(top, peak) if start else top
        mass = (log_weights - top).exp().sum(0)
        total = total * (peak - top).exp() + mass if start else mass
        peak = top
    return peak + total.log() - math.log(k)
