"""Viterbi in chunks that run side by side, by rank convergence.

A long sequence is cut into S chunks of L steps, each a column more of the batch. All chunks start
at once, the first from the start scores, the others from a guess; then each runs again from where
its left neighbour ended, but only until its scores differ from the stored ones by a constant, for
from there on every maximum stands where it stood. After r rounds the first r chunks are exact, so S
rounds always suffice; mostly it is a few steps of the second, because a maximum soon forgets where
it came from. The path is read off in the same way, from the right.

Source: Maleki, Musuvathi and Mytkowicz (2014), "Parallelizing dynamic programming through rank
convergence".
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["best_path"]

_WORK = 2**14  # additions that keep a call busy; more columns pay up to here
_SHORTEST = 12  # steps a chunk should have at least
_ROUNDING = 1e-12
_FIRST_LOOK = 4  # steps before the first look whether a chunk has converged


def best_path(
    emissions: Tensor, transitions: Tensor, start: Tensor, end: Tensor, mask: Tensor
) -> Tensor:
    """The best tags (B, T), -1 in the padding."""
    batch, length, tags = emissions.shape
    if not batch:
        return torch.empty(0, length, dtype=torch.long, device=emissions.device)
    kernel = emissions.new_full((tags + 1, tags + 1), -torch.inf, dtype=torch.float64)
    kernel[:tags, :tags] = transitions
    kernel[:tags, tags] = end
    kernel[tags, tags] = 0.0
    columns = _WORK // max(1, kernel.numel() * batch)
    chunks = max(1, min(columns, (length + 1) // _SHORTEST))
    first = pad(start.double(), (0, 1))
    after = _forward(_columns(emissions, mask, chunks), kernel, first, chunks)
    final = after[-1, tags, -batch:]
    if not final.isfinite().all():
        bad = final.isfinite().logical_not().nonzero().flatten().tolist()
        raise ValueError(f"no path is allowed, or a score is not a number, in sequences {bad}")
    arrays = (x.contiguous().cpu().numpy() for x in (after.transpose(1, 2), kernel.T))
    paths = torch.from_numpy(_read_off(*arrays, batch=batch)).view(-1, chunks, batch)
    paths = paths.permute(2, 1, 0).reshape(batch, -1)[:, :length]
    return paths.masked_fill_(paths == tags, -1).to(emissions.device)


def _columns(emissions: Tensor, mask: Tensor, chunks: int) -> Tensor:
    """Emissions with padding as one more tag, in columns (L, K, S B)."""
    batch, length, tags = emissions.shape
    steps = length // chunks + 1  # S L > T: every sequence ends in padding
    h = emissions.new_full((steps, tags + 1, chunks, batch), -torch.inf, dtype=torch.float64)
    keep = pad(mask, (0, chunks * steps - length)).view(batch, chunks, steps).permute(2, 1, 0)
    for chunk, piece in enumerate(emissions.split(steps, 1)):
        h[: piece.shape[1], :tags, chunk] = piece.permute(1, 2, 0)
    h[:, :tags].masked_fill_(~keep.unsqueeze(1), -torch.inf)
    h[:, tags].masked_fill_(~keep, 0.0)
    return h.flatten(2)


def _forward(h: Tensor, kernel: Tensor, start: Tensor, chunks: int) -> Tensor:
    """Scores (L, K, S B) of the best path to each tag, up to a constant a column and chunk."""
    steps, _, columns = h.shape
    table = h.new_empty(*kernel.shape, columns)
    fresh = torch.zeros_like(h[0])
    fresh[:, : columns // chunks] = start.unsqueeze(1)
    fresh += h[0]
    after = torch.empty_like(h)
    emissions, rows, kernel = list(h), list(after), kernel.unsqueeze(2)

    def step(here: Tensor, out: Tensor) -> Tensor:
        torch.add(here.unsqueeze(1), kernel, out=table)
        return torch.amax(table, 0, out=out)

    rows[0].copy_(fresh)
    for t in range(1, steps):
        torch.add(step(rows[t - 1], fresh), emissions[t], out=rows[t])
    for _ in range(1, chunks):
        step(rows[-1], fresh)
        first = columns // chunks
        fresh = torch.cat([start.unsqueeze(1).expand(-1, first), fresh[:, :-first]], 1)
        fresh += emissions[0]
        look = _FIRST_LOOK
        for t in range(steps):
            if t == look:
                look *= 2
                if _parallel(fresh, rows[t]):
                    return after
            rows[t].copy_(fresh)
            if t + 1 < steps:
                step(rows[t], fresh)
                fresh += emissions[t + 1]
    return after


def _parallel(fresh: Tensor, stored: Tensor) -> bool:
    """Whether all columns differ by constants, up to rounding; -inf matches -inf alone."""
    gap, scores = (fresh - stored).cpu().numpy(), fresh.cpu().numpy()
    spread = np.fmax.reduce(gap) - np.fmin.reduce(gap)
    return bool((spread <= _ROUNDING * (1.0 + np.abs(scores.max(0)))).all())


def _read_off(after: np.ndarray, kernel: np.ndarray, *, batch: int) -> np.ndarray:
    """Tags (L, S B), from the right; ``kernel`` is [to, from]."""
    steps, columns, size = after.shape
    tags = np.empty((steps, columns), dtype=np.int64)
    scores = np.empty_like(after[0])
    rows, paths = list(after), list(tags)

    def step(tag: np.ndarray, t: int, out: np.ndarray) -> None:
        np.take(kernel, tag, 0, scores, "clip")
        np.add(scores, rows[t], scores)
        np.argmax(scores, 1, out)

    paths[-1][:] = rows[-1].argmax(1)
    paths[-1][-batch:] = size - 1
    for t in range(steps - 2, -1, -1):
        step(paths[t + 1], t, paths[t])
    fresh = np.empty_like(paths[0])
    for _ in range(batch, columns, batch):
        step(np.roll(paths[0], -batch), -1, fresh)
        fresh[-batch:] = size - 1
        look = steps - 1
        for t in range(steps - 1, -1, -1):
            if t <= look:
                look = steps - 2 * (steps - look)
                if np.array_equal(fresh, paths[t]):
                    return tags
            paths[t][:] = fresh
            if t:
                step(paths[t], t - 1, fresh)
    return tags
