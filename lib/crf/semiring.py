"""One recursion, three readings: sum (log Z), maximum (Viterbi) and drawing (sampling).

With ``plus`` a reduction over the previous tag,

    alpha_1(j) = start(j) + h_1(j),    alpha_t(j) = plus_i [alpha_{t-1}(i) + A(i, j)] + h_t(j),

and a path is read off backwards by choosing ``i`` from ``alpha_t(i) + A(i, y_{t+1})``. Everything
stays in log space, so that it is exact whatever the scores, and plain torch, so that it may be
differentiated any number of times.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Reduction", "backward", "forward", "logsumexp", "trace"]

Reduction = Callable[[Tensor, int], Tensor]


def logsumexp(scores: Tensor, dim: int) -> Tensor:
    """Like torch.logsumexp, with gradient 0 instead of NaN where all scores are -inf."""
    top = scores.amax(dim, keepdim=True).detach()
    top = torch.where(top == -torch.inf, 0, top)
    total = (scores - top).exp().sum(dim)
    empty = total == 0
    return torch.where(empty, -torch.inf, torch.where(empty, 1, total).log() + top.squeeze(dim))


def forward(
    emissions: Tensor, transitions: Tensor, start: Tensor, mask: Tensor, plus: Reduction
) -> Tensor:
    """The messages alpha (B, T, C); beyond the end of a sequence its last one is repeated."""
    alpha = [start + emissions[:, 0]]
    for t in range(1, emissions.shape[1]):
        step = plus(alpha[-1].unsqueeze(2) + transitions, 1) + emissions[:, t]  # (B, C)
        alpha.append(torch.where(mask[:, t, None], step, alpha[-1]))
    return torch.stack(alpha, 1)


def backward(
    emissions: Tensor, transitions: Tensor, end: Tensor, mask: Tensor, plus: Reduction
) -> Tensor:
    """The messages beta (B, T, C): what follows tag i at t, its own emission left out."""
    beta = [end.expand_as(emissions[:, 0])]
    for t in reversed(range(1, emissions.shape[1])):
        step = plus(transitions + (emissions[:, t] + beta[-1]).unsqueeze(1), 2)  # (B, C)
        beta.append(torch.where(mask[:, t, None], step, beta[-1]))
    return torch.stack(beta[::-1], 1)


def trace(
    alpha: Tensor, transitions: Tensor, end: Tensor, mask: Tensor, choose: Reduction
) -> Tensor:
    """Paths (B, T) read off backwards; beyond the end of a sequence they hold -1."""
    tag = choose(alpha[:, -1] + end, -1)
    tags = [tag]
    for t in reversed(range(alpha.shape[1] - 1)):
        earlier = choose(alpha[:, t] + transitions.T[tag], -1)
        tag = torch.where(mask[:, t + 1], earlier, tag)
        tags.append(tag)
    return torch.stack(tags[::-1], 1).masked_fill(~mask, -1)
