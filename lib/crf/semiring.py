"""One recursion, three readings: sum (log Z), maximum (Viterbi) and drawing (sampling).

Padding is one more tag. Behind its end a sequence falls into the absorbing tag C,

    A(i, C) = end(i),    A(C, C) = 0,    A(C, i) = -inf,

which has score 0 in the padding and -inf elsewhere; one more step of padding ends every sequence
there. No recursion below knows of masks, lengths or end scores: with ``plus`` a reduction over the
previous tag,

    before_1 = start,    before_{t+1}(j) = plus_i [before_t(i) + h_t(i) + A(i, j)],

log Z is ``before_{T+1}(C)`` plus an offset, and a path is read off backwards from tag C by choosing
``i`` from ``before_t(i) + h_t(i) + A(i, y_{t+1})``. Everything stays in log space and in float64,
exact whatever the scores; :mod:`lib.crf.scaled` is the fast route for scores of ordinary size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["Chain", "Reduction", "backward", "best_paths", "forward", "logsumexp", "trace"]

Reduction = Callable[[Tensor, int], Tensor]


class Chain(NamedTuple):
    """Scores with padding as the last tag, K = C + 1, and one step of padding, N = T + 1.

    The largest emission of each step is taken out, so that long or huge scores cost no digits.
    """

    emissions: Tensor  # (N, B, K)
    transitions: Tensor  # (K, K)
    start: Tensor  # (K,)
    offset: Tensor  # (B,), the sum of what was taken out

    @classmethod
    def extend(
        cls, emissions: Tensor, transitions: Tensor, start: Tensor, end: Tensor, mask: Tensor
    ) -> Chain:
        """Of emissions (B, T, C), transitions (C, C), start and end (C,) and their mask (B, T)."""
        keep = pad(mask, (0, 1)).T.unsqueeze(2)  # (N, B, 1)
        h = pad(emissions.double().transpose(0, 1), (0, 0, 0, 0, 0, 1))  # (N, B, C)
        absorb = torch.where(keep, -torch.inf, 0).to(h.dtype)
        h = torch.cat([torch.where(keep, h, -torch.inf), absorb], 2)
        top = h.amax(2, keepdim=True)
        top = torch.where(top == -torch.inf, 0, top)
        a = torch.cat([transitions.double(), end.double().unsqueeze(1)], 1)
        a = torch.cat([a, pad(a.new_full((1, a.shape[0]), -torch.inf), (0, 1))])
        first = pad(start.double(), (0, 1), value=-torch.inf)
        return cls(h - top, a, first, top.sum((0, 2)))


def logsumexp(scores: Tensor, dim: int) -> Tensor:
    """log sum exp; -inf, without NaN, where all scores are -inf."""
    top = scores.amax(dim, keepdim=True)
    top = torch.where(top == -torch.inf, 0, top)
    return (scores - top).exp().sum(dim).log() + top.squeeze(dim)


def forward(chain: Chain, plus: Reduction = logsumexp) -> Tensor:
    """``before`` (N, B, K): what leads to tag j at t, its own emission left out."""
    before = [chain.start.expand_as(chain.emissions[0])]
    for h in chain.emissions[:-1]:
        before.append(plus((before[-1] + h).unsqueeze(2) + chain.transitions, 1))
    return torch.stack(before)


def backward(chain: Chain, plus: Reduction = logsumexp) -> Tensor:
    """``behind`` (N, B, K): what follows tag i at t, its own emission left out."""
    behind = [torch.zeros_like(chain.emissions[0])]
    for h in chain.emissions[1:].flip(0):
        behind.append(plus(chain.transitions + (h + behind[-1]).unsqueeze(1), 2))
    return torch.stack(behind[::-1])


def trace(after: Tensor, transitions: Tensor, choose: Reduction) -> Tensor:
    """Paths (B, T) read off backwards from ``after = before + h``; -1 in the padding."""
    padding = len(transitions) - 1
    tags = [torch.full_like(after[0, :, 0], padding, dtype=torch.long)]
    for scores in after[:-1].flip(0):
        tags.append(choose(scores + transitions.T[tags[-1]], 1))
    paths = torch.stack(tags[:0:-1], 1)
    return paths.masked_fill(paths == padding, -1)


def best_paths(chain: Chain, k: int) -> tuple[Tensor, Tensor]:
    """The k best scores (B, k), falling, and their paths (B, k, T); -inf and -1 if there are fewer.

    The recursion in the semiring of sorted lists: plus merges the lists of all previous tags and
    keeps the first k entries.
    """
    best = pad(chain.start[:, None], (0, k - 1), value=-torch.inf)  # (K, k)
    best = best.expand(chain.emissions.shape[1], -1, -1)
    sources = []
    for h in chain.emissions[:-1]:
        lists = (best + h.unsqueeze(2)).unsqueeze(3) + chain.transitions.unsqueeze(1)
        best, source = lists.flatten(1, 2).topk(k, 1)  # over (K k) of (B, K k, K)
        best, source = best.mT, source.mT
        sources.append(source)
    scores, padding = best[:, -1], len(chain.transitions) - 1
    entry = padding * k + torch.arange(k, device=scores.device).expand_as(scores)
    tags = []
    for source in reversed(sources):
        entry = source.flatten(1).gather(1, entry)
        tags.append(entry // k)
    paths = torch.stack(tags[::-1], 2)
    void = (paths == padding) | (scores == -torch.inf).unsqueeze(2)
    return scores + chain.offset.unsqueeze(1), paths.masked_fill(void, -1)
