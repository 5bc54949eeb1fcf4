"""The two routes brought together: expectations, pair marginals and covariances as numbers.

Each function takes the scores ``(emissions (B, T, C), transitions (C, C), start (C,), end (C,),
mask (B, T))``, goes the scaled route where float64 can hold the messages, and through log space
where it cannot. :mod:`lib.crf.functions` makes them differentiable.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from lib.crf import scaled
from lib.crf.semiring import Chain, backward, forward

__all__ = [
    "covariance",
    "exact_log_messages",
    "expectations",
    "log_messages",
    "log_partition",
    "pair_marginals",
    "path_score",
]


def path_score(
    emissions: Tensor, transitions: Tensor, start: Tensor, end: Tensor, mask: Tensor, tags: Tensor
) -> Tensor:
    """The score (...,) in float64 of ``tags`` (..., B, T); padding counts as tag C."""
    num_tags = len(start)
    node = emissions.expand(*tags.shape, num_tags)
    node = node.gather(-1, torch.where(mask, tags, 0).unsqueeze(-1)).squeeze(-1)
    node = torch.where(mask, node, 0).sum(-1, dtype=torch.float64)
    table = pad(torch.cat([transitions, end.unsqueeze(1)], 1).double(), (0, 0, 0, 1)).flatten()
    tags = torch.where(mask, tags, num_tags)
    moves = tags * (num_tags + 1) + pad(tags[..., 1:], (0, 1), value=num_tags)
    edge = table.gather(0, moves.flatten()).view_as(moves).sum(-1)
    first = start.double().gather(0, tags[..., 0].flatten()).view_as(node)
    return first + node + edge


def _check_paths(log_z: Tensor) -> None:
    """Refuse sequences without a path."""
    empty = (log_z == -torch.inf).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"no path is allowed: every score is -inf in sequences {empty}")


def log_messages(*scores: Tensor) -> tuple[Tensor, Tensor]:
    """Logs of ``before`` and ``behind`` (N, B, K), up to a constant for each time and sequence."""
    return scaled.log_messages(*scores) or exact_log_messages(*scores)


def exact_log_messages(*scores: Tensor) -> tuple[Tensor, Tensor]:
    """The same in log space: -inf only where no path leads, however far the scores lie apart."""
    chain = Chain.extend(*scores)
    before, behind = forward(chain), backward(chain)
    _check_paths(before[-1, :, -1])
    return before, behind


def log_partition(*scores: Tensor) -> Tensor:
    """log Z (B,)."""
    log_z = scaled.log_partition(*scores)
    if log_z is None:
        chain = Chain.extend(*scores)
        log_z = forward(chain)[-1, :, -1] + chain.offset
        _check_paths(log_z)
    return log_z


def _softmax(scores: Tensor, dim: int) -> Tensor:
    """Softmax; 0 where all scores are -inf."""
    top = scores.amax(dim, keepdim=True)
    weights = (scores - torch.where(top == -torch.inf, 0, top)).exp()
    total = weights.sum(dim, keepdim=True)
    return weights / torch.where(total == 0, 1, total)


def _log_expectations(*scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log Z (B,), p(y_t = k) (N, B, K) and expected transitions (B, K, K), in log space.

    Each time is normalised by itself: of a large log Z, exp would make its rounding a factor.
    """
    chain = Chain.extend(*scores)
    before, behind = forward(chain), backward(chain)
    log_z = before[-1, :, -1]
    _check_paths(log_z)
    after, ahead = before + chain.emissions, behind + chain.emissions
    edges = torch.zeros_like(chain.transitions).repeat(len(log_z), 1, 1)
    for here, there in zip(after[:-1], ahead[1:], strict=True):
        moves = here.unsqueeze(2) + chain.transitions + there.unsqueeze(1)
        edges += _softmax(moves.flatten(1), 1).view_as(moves)
    return log_z + chain.offset, _softmax(before + ahead, 2), edges


def _subtract_path(
    scores: tuple[Tensor, ...], tags: Tensor, log_z: Tensor, node: Tensor, edges: Tensor
) -> None:
    """Subtract in place what is known of one path: its score, leaving -log p, and what it counts.

    NumPy and torch read the same here; on the CPU it is NumPy, for its small overhead.
    """
    arrays: Any = (x.detach() for x in (*scores, tags, log_z, node, edges))
    xp: Any = torch
    if tags.device.type == "cpu":
        arrays, xp = (x.numpy() for x in arrays), np
    emissions, transitions, start, end, mask, tags, log_z, node, edges = arrays
    batch, size = edges.shape[:2]
    rows, times = xp.where(mask)  # sequence by sequence
    tag = tags[rows, times]
    if tag.min() < 0:  # an index that would count from the end; too large a one is an error anyway
        raise ValueError(f"tags must not be negative where the mask is True, got {int(tag.min())}")
    next_tag = xp.full_like(tag, size - 1)
    next_tag[:-1] = xp.where(rows[1:] == rows[:-1], tag[1:], size - 1)
    table = xp.zeros_like(edges[0])
    table[:-1, :-1], table[:-1, -1] = transitions, end
    score = emissions[rows, times, tag] + table[tag, next_tag]
    log_z -= start[tags[:, 0]] + xp.bincount(rows, score, batch)
    xp.clip(log_z, 0.0, None, out=log_z)  # below 0 by rounding alone
    node[times, rows, tag] -= 1.0
    moves = (rows * size + tag) * size + next_tag
    edges -= xp.bincount(moves, None, batch * size**2).reshape(edges.shape)


def expectations(
    emissions: Tensor,
    transitions: Tensor,
    start: Tensor,
    end: Tensor,
    mask: Tensor,
    tags: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """log Z (B,), p(y_t = i) (B, T, C) and the expected number of transitions (B, K, K).

    With ``tags`` (B, T), each less what it is on that path: -log p(tags) and its gradient.
    """
    scores = emissions, transitions, start, end, mask
    log_z, node, edges = scaled.expectations(*scores) or _log_expectations(*scores)
    if tags is not None and len(tags):
        _subtract_path(scores, tags, log_z, node, edges)
    marginals = torch.empty_like(emissions, memory_format=torch.contiguous_format)
    return log_z, marginals.copy_(node[:-1, :, :-1].transpose(0, 1)), edges


def pair_marginals(*scores: Tensor) -> Tensor:
    """p(y_t = i, y_{t+1} = j), (B, T-1, C, C)."""
    chain = Chain.extend(*scores)
    before, behind = log_messages(*scores)
    ahead = behind + chain.emissions
    after = before + chain.emissions
    pair = after[:-2].unsqueeze(3) + chain.transitions + ahead[1:-1].unsqueeze(2)
    pair = _softmax(pair.flatten(2), 2).view_as(pair)[..., :-1, :-1]
    return pair.transpose(0, 1).to(scores[0].dtype).contiguous()


def covariance(
    emissions: Tensor,
    transitions: Tensor,
    start: Tensor,
    end: Tensor,
    mask: Tensor,
    node: Tensor,
    edges: Tensor,
) -> tuple[Tensor, Tensor]:
    """Cov(counts, S) for S(y) = sum_t node_t(y_t) + sum_t edges_t(y_t, y_{t+1}).

    The counts are those of :func:`expectations`: tags (B, T, C) and transitions (B, K, K).
    With the posterior kernels P(y_{t-1} = i | y_t = j, past) and P(y_{t+1} = j | y_t = i, future),
    the parts of S before and behind t have conditional means

        F_t(j) = node_t(j) + sum_i P(i | j) [F_{t-1}(i) + edges_{t-1}(i, j)],
        R_t(i) = sum_j P(j | i) [edges_t(i, j) + node_{t+1}(j) + R_{t+1}(j)],

    and the covariance with the count of tag i at t is p_t(i) (F_t(i) + R_t(i) - E S).

    ``node`` is (B, T, C), ``edges`` is (B, T or 1, K, K).
    """
    scores = emissions, transitions, start, end, mask
    chain = Chain.extend(*scores)
    before, behind = log_messages(*scores)
    after, ahead = before + chain.emissions, behind + chain.emissions
    node = pad(node.double().transpose(0, 1), (0, 1, 0, 0, 0, 1))  # (N, B, K)
    edges = edges.double().transpose(0, 1).expand(len(node) - 1, -1, -1, -1)  # (T, B, K, K)
    p = _softmax(before + ahead, 2)

    rest = [torch.zeros_like(node[0])]
    for t in range(len(node) - 2, -1, -1):
        kernel = _softmax(chain.transitions + ahead[t + 1].unsqueeze(1), 2)
        rest.append((kernel * (edges[t] + (node[t + 1] + rest[-1]).unsqueeze(1))).sum(2))
    rest.reverse()
    mean = (p[0] * (node[0] + rest[0])).sum(1, keepdim=True)  # E S, (B, 1)

    past, moves = [node[0]], torch.zeros_like(edges[0])
    for t in range(1, len(node)):
        kernel = _softmax(after[t - 1].unsqueeze(2) + chain.transitions, 1)
        total = past[-1].unsqueeze(2) + edges[t - 1]
        past.append(node[t] + (kernel * total).sum(1))
        total = total + (node[t] + rest[t] - mean).unsqueeze(1)
        moves += p[t].unsqueeze(1) * kernel * total
    visits = p * (torch.stack(past) + torch.stack(rest) - mean)  # (N, B, K)
    return visits[:-1, :, :-1].transpose(0, 1).to(emissions.dtype).contiguous(), moves
