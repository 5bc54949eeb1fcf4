"""Viterbi in chunks that run side by side, by rank convergence.

A long sequence is cut into S chunks of L steps, each a column more of the batch. All chunks start
at once, the first from the start scores, the others from a guess; then each runs again from where
its left neighbour ended, but only until its scores differ from the stored ones by a constant, for
from there on every maximum stands where it stood. After r rounds the first r chunks are exact, so S
rounds always suffice; mostly it is a few steps of the second, because a maximum soon forgets where
it came from. The path is read off in the same way, from the right. What lies in the padding does
not matter, for a sequence's last tag is pinned before.

Source: Maleki, Musuvathi and Mytkowicz (2014), "Parallelizing dynamic programming through rank
convergence".
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["best_path"]

_WORK = 2**15  # additions a step; more columns pay up to here
_NUMPY_WORK = 2**14  # up to here NumPy is the faster one
_THREADED_WORK = 2**17  # below this, torch's threads cost more than they gain
_SHORTEST = 5  # steps a chunk should have at least
_FIRST_LOOK = 4  # steps before the first look whether a chunk has converged
_ROUNDING = 1e-12  # relative to the scores
_ANOTHER_TAG_IN_PADDING = -1e4


@np.errstate(invalid="ignore")  # inf - inf
def best_path(
    emissions: Tensor, transitions: Tensor, start: Tensor, end: Tensor, mask: Tensor
) -> Tensor:
    """The best tags (B, T), -1 in the padding."""
    batch, length, tags = emissions.shape
    device = emissions.device
    if not batch:
        return torch.empty(0, length, dtype=torch.long, device=device)
    steps = -(-length // max(1, min(_WORK // (batch * tags**2), length // _SHORTEST)))
    chunks = -(-length // steps)
    scores = emissions.detach(), mask, transitions.detach().double(), start.detach()
    kept, kernel, last = (x.detach().cpu().numpy() for x in (mask, scores[2], end))
    after = np.ascontiguousarray(_scores(*scores, chunks, steps).swapaxes(1, 2))  # (L, S B, C)
    _pin_ends(after, kept.sum(1) - 1, last)
    paths = _read_off(after, np.ascontiguousarray(kernel.T), batch)
    paths = paths.reshape(-1, chunks, batch).transpose(2, 1, 0).reshape(batch, -1)[:, :length]
    return torch.from_numpy(np.where(kept, paths, -1)).to(device)


def _scores(
    emissions: Any, mask: Any, kernel: Any, start: Any, chunks: int, steps: int
) -> np.ndarray:
    """What ``_forward`` returns, by the faster of NumPy and torch."""
    (batch, _, tags), device = emissions.shape, emissions.device
    columns = chunks * batch
    in_numpy = device.type == "cpu" and columns * tags**2 <= _NUMPY_WORK
    empty: Any = np.empty if in_numpy else partial(torch.empty, dtype=kernel.dtype, device=device)
    if in_numpy:  # also because small calls to torch are dear
        emissions, mask, kernel, start = (x.numpy() for x in (emissions, mask, kernel, start))
    if columns < tags:  # the longer axis lies innermost in memory
        h = empty((steps, columns, tags)).swapaxes(1, 2)
        work = empty((tags, columns, tags)).swapaxes(1, 2)
    else:
        h, work = empty((steps, tags, columns)), empty((tags, tags, columns))
    few = device.type == "cpu" and columns * tags**2 < _THREADED_WORK
    with _one_thread() if few and not in_numpy else nullcontext():
        _fill(h.reshape(steps, tags, chunks, batch), emissions, mask)
        after = _forward(h, kernel, start, work, batch)
    return after if in_numpy else after.cpu().numpy()


@contextmanager
def _one_thread() -> Iterator[None]:
    """One torch thread, and then as many as before.

    From the main thread alone: the number is the process's, and callers side by side would restore
    what they read from each other.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _fill(h: Any, emissions: Any, mask: Any) -> None:
    """Put emissions (B, T, C) into columns ``h`` (L, C, S, B).

    Padding prefers one tag by far, so that chunks converge there at once.
    """
    xp: Any = torch if isinstance(h, Tensor) else np
    batch, _, tags = emissions.shape
    steps = len(h)
    padding = xp.zeros_like(emissions[0, 0])
    padding[1:] = _ANOTHER_TAG_IN_PADDING
    emissions = emissions + 0.0  # a copy
    emissions[~mask] = padding
    full, rest = divmod(emissions.shape[1], steps)
    blocks = emissions[:, : full * steps].reshape(batch, full, steps, tags)
    h[:, :, :full] = blocks.swapaxes(0, 2).swapaxes(1, 3).swapaxes(2, 3)
    if rest:
        h[:rest, :, full] = emissions[:, full * steps :].swapaxes(0, 1).swapaxes(1, 2)
        h[rest:, :, full] = padding[:, None]


def _pin_ends(after: np.ndarray, last: np.ndarray, end: np.ndarray) -> None:
    """Give the best last tag of every sequence the score inf, whatever is read off behind it."""
    steps, columns, tags = after.shape
    rows = after.reshape(-1, tags)  # a view
    row = last % steps * columns + last // steps * len(last) + np.arange(len(last))
    scores = rows[row] + end
    best = scores.argmax(1)
    finite = np.isfinite(scores.max(1))
    if not finite.all():
        bad = np.flatnonzero(~finite).tolist()
        raise ValueError(f"no path is allowed, or a score is not a number, in sequences {bad}")
    rows[row, best] = np.inf  # plus a forbidden move NaN, which argmax takes for the largest


def _forward(h: Any, kernel: Any, start: Any, work: Any, batch: int) -> Any:
    """Scores (L, C, S B) of the best path to each tag, up to a constant a column and chunk.

    In NumPy or torch, whichever the arguments are.
    """
    xp, largest = (torch, torch.amax) if isinstance(h, Tensor) else (np, np.maximum.reduce)
    steps, _, columns = h.shape
    after, fresh = xp.empty_like(h), xp.zeros_like(h[0])
    emissions, rows, kernel = list(h), list(after), kernel[:, :, None]
    heads = list(after[:, :, None])  # with an axis for the tag that follows

    def step(here: Any) -> None:
        xp.add(here, kernel, out=work)
        largest(work, 0, out=fresh)

    fresh[:, :batch] = start[:, None]
    xp.add(fresh, emissions[0], out=rows[0])
    for t in range(1, steps):
        step(heads[t - 1])
        xp.add(fresh, emissions[t], out=rows[t])
    for _ in range(batch, columns, batch):
        step(heads[-1])
        fresh[:, batch:] = fresh[:, :-batch] + 0.0  # by way of a copy, for the two overlap
        fresh[:, :batch] = start[:, None]
        fresh += emissions[0]
        look = _FIRST_LOOK
        for t in range(steps):
            if t in (look, steps - 1):
                look *= 2
                if _parallel(fresh, rows[t]):
                    return after
            rows[t][...] = fresh
            if t + 1 < steps:
                step(heads[t])
                fresh += emissions[t + 1]
    return after


def _parallel(fresh: Any, stored: Any) -> bool:
    """Whether all columns differ by constants, up to rounding; -inf matches -inf alone."""
    if isinstance(fresh, Tensor):
        fresh, stored = fresh.cpu().numpy(), stored.cpu().numpy()
    gap = fresh - stored
    spread = np.fmax.reduce(gap) - np.fmin.reduce(gap)
    close = spread <= _ROUNDING * (1.0 + np.abs(np.maximum.reduce(fresh)))
    return bool(close.all() or (close | (fresh == stored).all(0)).all())


def _read_off(after: np.ndarray, kernel: np.ndarray, batch: int) -> np.ndarray:
    """Tags (L, S B) from scores (L, S B, C), from the right; ``kernel`` is [to, from]."""
    steps, columns, _ = after.shape
    tags = np.empty((steps, columns), dtype=np.int64)
    scores, fresh = np.empty_like(after[0]), np.empty_like(tags[0])
    rows, paths = list(after), list(tags)

    def step(tag: np.ndarray, t: int, out: np.ndarray) -> None:
        kernel.take(tag, 0, scores, "clip")
        np.add(scores, rows[t], scores)
        scores.argmax(1, out)

    rows[-1].argmax(1, paths[-1])
    last = paths[-1][-batch:].copy()
    for t in range(steps - 1, 0, -1):
        step(paths[t], t - 1, paths[t - 1])
    for _ in range(batch, columns, batch):
        step(np.concatenate((paths[0][batch:], paths[0][:batch])), -1, fresh)
        fresh[-batch:] = last
        for t in range(steps - 1, -1, -1):
            if (fresh == paths[t]).all():
                return tags
            paths[t][:] = fresh
            if t:
                step(fresh, t - 1, fresh)
    return tags
