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

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["best_path"]

_WORK = 2**15  # additions a step; more columns pay up to here
_NUMPY_WORK = 2**14  # up to here NumPy is the faster one
_THREADED_WORK = 2**17  # below this, torch's threads cost more than they gain
_SHORTEST = 6  # steps a chunk should have at least
_FIRST_LOOK = 4  # steps before the first look whether a chunk has converged
_ROUNDING = 1e-12  # relative to the scores


@np.errstate(invalid="ignore")  # inf - inf
def best_path(
    emissions: Tensor, transitions: Tensor, start: Tensor, end: Tensor, mask: Tensor
) -> Tensor:
    """The best tags (B, T), -1 in the padding, which counts as tag C."""
    batch, length, tags = emissions.shape
    device, size = emissions.device, tags + 1
    if not batch:
        return torch.empty(0, length, dtype=torch.long, device=device)
    table = np.full((size, size), -np.inf)
    table[:tags, :tags] = transitions.detach().cpu().numpy()
    table[:tags, tags] = end.detach().cpu().numpy()
    table[tags, tags] = 0.0
    chunks = max(1, min(_WORK // (batch * size**2), length // _SHORTEST))
    steps, columns = length // chunks + 1, chunks * batch  # every sequence ends in padding
    space, work = emissions.new_empty(steps * size + size**2, columns, dtype=torch.float64).split(
        (steps * size, size**2)
    )
    if columns < size:  # the longer axis lies innermost in memory
        space, work = space.view(steps, columns, size).mT, work.view(size, columns, size).mT
    arrays: Any = (
        space.view(steps, size, columns),
        work.view(size, size, columns),
        emissions.detach(),
        mask,
        torch.from_numpy(table).to(device),
        start.detach(),
    )
    if device.type == "cpu" and work.numel() <= _NUMPY_WORK:
        arrays = tuple(x.numpy() for x in arrays)
    h, table_space, *scores, kernel, first = arrays
    with _one_thread(device.type == "cpu" and work.numel() < _THREADED_WORK):
        _fill(h.reshape(steps, size, chunks, batch), *scores)
        forward = torch.as_tensor(_forward(h, kernel, first, table_space, batch))
    after = np.ascontiguousarray(forward.transpose(1, 2).cpu().numpy())  # (L, S B, K)
    scores = after[-1, -batch:, tags]
    if not np.isfinite(scores).all():
        bad = np.flatnonzero(~np.isfinite(scores)).tolist()
        raise ValueError(f"no path is allowed, or a score is not a number, in sequences {bad}")
    paths = _read_off(after, np.ascontiguousarray(table.T), batch).reshape(-1, chunks, batch)
    paths = paths.transpose(2, 1, 0).reshape(batch, -1)[:, :length]
    return torch.from_numpy(np.where(paths == tags, -1, paths)).to(device)


@contextmanager
def _one_thread(wanted: bool) -> Iterator[None]:
    """One torch thread if ``wanted``, and then as many as before."""
    threads = torch.get_num_threads()
    if wanted:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _fill(h: Any, emissions: Any, mask: Any) -> None:
    """Put emissions (B, T, C), with padding as one more tag, into columns ``h`` (L, K, S, B)."""
    xp: Any = torch if isinstance(h, Tensor) else np
    batch, length, tags = emissions.shape
    steps = len(h)
    full = length // steps  # chunks without padding of their own
    blocks = emissions[:, : full * steps].reshape(batch, full, steps, tags)
    rest = emissions[:, full * steps :]
    h[:, :tags, :full] = blocks.swapaxes(0, 2).swapaxes(1, 3).swapaxes(2, 3)
    h[: rest.shape[1], :tags, full] = rest.swapaxes(0, 1).swapaxes(1, 2)
    h[:, tags] = 1.0
    h[:, tags, :full] = ~mask[:, : full * steps].reshape(batch, full, steps).swapaxes(0, 2)
    h[: rest.shape[1], tags, full] = ~mask[:, full * steps :].swapaxes(0, 1)
    h[:, :tags] = xp.where(h[:, tags:] == 1.0, -np.inf, h[:, :tags])
    h[:, tags] = xp.where(h[:, tags] == 1.0, 0.0, -np.inf)


def _forward(h: Any, kernel: Any, start: Any, work: Any, batch: int) -> Any:
    """Scores (L, K, S B) of the best path to each tag, up to a constant a column and chunk.

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

    fresh[:-1, :batch] = start[:, None]
    xp.add(fresh, emissions[0], out=rows[0])
    for t in range(1, steps):
        step(heads[t - 1])
        xp.add(fresh, emissions[t], out=rows[t])
    for _ in range(batch, columns, batch):
        step(heads[-1])
        fresh[:, batch:] = fresh[:, :-batch] + 0.0  # by way of a copy, for the two overlap
        fresh[:-1, :batch], fresh[-1, :batch] = start[:, None], 0.0
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
    return bool((spread <= _ROUNDING * (1.0 + np.abs(np.maximum.reduce(fresh)))).all())


def _read_off(after: np.ndarray, kernel: np.ndarray, batch: int) -> np.ndarray:
    """Tags (L, S B) from scores (L, S B, K), from the right; ``kernel`` is [to, from]."""
    steps, columns, size = after.shape
    tags = np.empty((steps, columns), dtype=np.int64)
    scores, fresh = np.empty_like(after[0]), np.empty_like(tags[0])
    rows, paths = list(after), list(tags)

    def step(tag: np.ndarray, t: int, out: np.ndarray) -> None:
        kernel.take(tag, 0, scores, "clip")
        np.add(scores, rows[t], scores)
        scores.argmax(1, out)

    rows[-1].argmax(1, paths[-1])
    paths[-1][-batch:] = size - 1
    for t in range(steps - 1, 0, -1):
        step(paths[t], t - 1, paths[t - 1])
    for _ in range(batch, columns, batch):
        step(np.concatenate((paths[0][batch:], paths[0][:batch])), -1, fresh)
        fresh[-batch:] = size - 1
        for t in range(steps - 1, -1, -1):
            if (fresh == paths[t]).all():
                return tags
            paths[t][:] = fresh
            if t:
                step(fresh, t - 1, fresh)
    return tags
