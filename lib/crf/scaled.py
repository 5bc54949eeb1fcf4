"""The fast route: forward and backward messages as scaled probabilities, both in one loop.

With G = exp A, H = exp h and padding as one more tag as in :mod:`lib.crf.semiring`,

    before_{t+1} = (before_t * H_t) G,    behind_t = G (H_{t+1} * behind_{t+1}),

a tiny product and a tiny multiplication a step; no logarithm, no exponential. The direction is one
more axis: slice s of the sweep holds time s forwards and time N - 1 - s backwards. Sums of positive
numbers lose no digits, but they may underflow: a guard bounds beforehand how far a message can fall
below the largest, and beyond the bound the answer is None and the caller goes through log space.

The code is in the words that NumPy and torch share. Small problems on the CPU run in NumPy, whose
calls cost a third of torch's; all others in torch.
"""

from __future__ import annotations

import itertools
import math
import threading
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["expectations", "log_messages", "log_partition"]

_LIMIT = 600.0  # nats that products of messages may span; float64 underflows at 708
_SMALL = 30.0  # emissions of this size are exponentiated as they are
_DROP = 340.0  # a parameter this far below the largest is taken for 0 ...
_SAFE = 40.0  # ... if what it could add stays this far below what is kept: exp(-40) < 1e-17
_MAX_REACH = 16
_MAX_INTERVAL = 64
_NUMPY_LIMIT = 2**18  # multiplications a step; beyond, torch's threads win
_WORKSPACE_LIMIT = 2**23  # numbers kept between calls


class _Weights(NamedTuple):
    """exp of the parameters, padding included, and what the guard must know of them."""

    kernel: np.ndarray  # (K, K)
    start: np.ndarray  # (K,)
    scales: tuple[float, float, float]  # the largest transition, start and end score
    spread: float  # range of the transitions
    border: float  # range of the start scores plus that of the end scores
    dropped: float  # how far the largest dropped score lies below the largest
    reach: float  # number of steps after which every tag can follow every tag


class _Sweep(NamedTuple):
    """Messages of both directions, in the workspace: valid until the next call."""

    before: Any  # (N, 2, B, K) without the emission of the slice
    after: Any  # (N, 2, B, K) with it
    kernel: Any  # (K, K)
    log_z: Any  # (B,)
    spare: Any  # (2, N, B, K)
    interval: int
    xp: ModuleType  # where these live: numpy or torch


class _Workspace(threading.local):
    """Memory kept between calls: fresh pages can cost more than the arithmetic done in them."""

    def __init__(self) -> None:
        self.memory = np.empty(0)

    def take(self, size: int) -> np.ndarray:
        """So many uninitialised numbers."""
        if size > _WORKSPACE_LIMIT:
            return np.empty(size)
        if size > len(self.memory):
            self.memory = np.empty(size)
        return self.memory[:size]


_workspace = _Workspace()


def _exponentiate(scores: Tensor) -> tuple[np.ndarray, float, float, float]:
    """exp(scores - top), top, the range of what is kept and the gap to what is dropped."""
    values = np.asarray(scores.detach().cpu(), dtype=np.float64)
    top = float(values.max())
    if math.isfinite(top) and top - values.min() <= _DROP:  # all kept
        gap = top - values
        return np.exp(-gap), top, float(gap.max()), math.inf
    gap = top - values
    kept = gap <= _DROP
    far = gap[~kept & (gap < np.inf)].min(initial=np.inf)
    weights = np.where(kept, np.exp(-gap), 0.0)
    return weights, top, float(gap.max(where=kept, initial=0.0)), float(far)


def _reach(allowed: np.ndarray) -> float:
    """The smallest power of a 0/1 matrix without a zero, infinite if there is none soon."""
    power = allowed
    for steps in range(1, _MAX_REACH + 1):
        if power.all():
            return steps
        power = power @ allowed
    return math.inf


def _weights(transitions: Tensor, start: Tensor, end: Tensor) -> _Weights | None:
    """Extend the parameters by the padding and exponentiate them; None if all are forbidden."""
    tags = len(start)
    inner, top, spread, far = _exponentiate(transitions)
    first, top_start, spread_start, far_start = _exponentiate(start)
    last, top_end, spread_end, far_end = _exponentiate(end)
    if not all(map(math.isfinite, (top, top_start, top_end))):
        return None
    kernel = np.zeros((tags + 1, tags + 1))
    kernel[:tags, :tags] = inner
    kernel[:tags, tags] = last
    kernel[tags, tags] = 1.0
    return _Weights(
        kernel=kernel,
        start=np.append(first, 0.0),
        scales=(top, top_start, top_end),
        spread=spread,
        border=spread_start + spread_end,
        dropped=min(far, far_start, far_end),
        reach=_reach(inner > 0),
    )


def _interval(weights: _Weights, spread: float) -> int:
    """Steps between two rescalings; 0 if float64 cannot hold the messages.

    In ``reach`` steps mass flows from the best tag to every other, so no message is further below
    the largest than depth = reach * (range of a step) + border. Whoever takes a dropped transition
    could have made a detour at that price, so it must lie below by more.
    """
    step = spread + weights.spread + math.log(len(weights.start))
    depth = weights.reach * step + weights.border
    if not depth + _SAFE <= weights.dropped:
        return 0
    room = (_LIMIT - depth) / (2 * step)
    return min(_MAX_INTERVAL, int(room)) if room >= 1 else 0


def _emissions(emissions: Any, mask: Any, h: Any, out: Any, xp: ModuleType) -> tuple[Any, float]:
    """Write exp(emissions - c), extended by the padding, to ``out`` (N, B, K), by way of ``h``.

    Returns the sums of the shifts c (B,) and the range of emissions - c and 0. Small scores need no
    shift, and others the largest score of each step.
    """
    length, tags = emissions.shape[1:]
    padding = ~mask
    flat, rows = h.reshape(-1, tags), xp.where(padding.reshape(-1))[0]
    shift = xp.zeros_like(h[:, 0, 0])
    h[...] = emissions
    flat[rows] = 0.0  # whatever stands there decides nothing
    low, high = float(h.min()), float(h.max())
    if not (low >= -_SMALL and high <= _SMALL):
        top = xp.amax(h, 2)
        shift += top.sum(1)
        h -= top[..., None]
        low, high = float(h.min()), 0.0
    xp.exp(h, out=h)
    flat[rows] = 0.0
    out[:length, :, :tags] = h.swapaxes(0, 1)
    out[:length, :, tags] = padding.swapaxes(0, 1)
    out[length:] = 0.0
    out[length:, :, tags] = 1.0
    return shift, max(high, 0.0) - min(low, 0.0)


def _loop(kernels: Any, before: Any, after: Any, interval: int, xp: ModuleType) -> Any:
    """The recursion; returns the logs of the scales taken out (2, B).

    Enters with the emissions in ``after`` and the first slice of ``before``; both (N, 2, B, K).
    """
    incoming, outgoing = list(before), list(after)
    xp.multiply(incoming[0], outgoing[0], out=outgoing[0])
    scales = [xp.ones_like(outgoing[0][..., 0])]
    for step in range(1, len(incoming)):
        xp.matmul(outgoing[step - 1], kernels, out=incoming[step])
        xp.multiply(incoming[step], outgoing[step], out=outgoing[step])
        # not after the last step: where two half sweeps meet, ``before`` comes from before it
        if step % interval == 0 and step + 1 < len(incoming):
            scales.append(outgoing[step].sum(-1))
            outgoing[step] /= scales[-1][..., None]
    return xp.log(xp.stack(scales)).sum(0)


def _sweep(
    emissions: Tensor,
    transitions: Tensor,
    start: Tensor,
    end: Tensor,
    mask: Tensor,
    *,
    half: bool = False,
) -> _Sweep | None:
    """Both messages, all along or only until they meet; None beyond the range of float64."""
    batch, length, tags = emissions.shape
    weights = _weights(transitions, start, end)
    if weights is None or not batch:
        return None
    device, size = emissions.device, tags + 1
    steps = length + 1 + (length % 2 if half else 0)
    count = steps // 2 + 1 if half else steps
    one = steps * batch * size
    if device.type == "cpu" and batch * size**2 <= _NUMPY_LIMIT:
        xp: Any = np
        memory: Any = _workspace.take(6 * one)
        given: Any = emissions.detach().numpy(), mask.numpy(), weights.kernel, weights.start
    else:
        xp = torch
        memory = torch.empty(6 * one, dtype=torch.float64, device=device)
        tables = (torch.from_numpy(x).to(device) for x in weights[:2])
        given = emissions.detach(), mask, *tables
    h, keep, kernel, first = given
    before = memory[: 2 * one].reshape(steps, 2, batch, size)
    after = memory[2 * one : 4 * one].reshape(steps, 2, batch, size)
    spare = memory[4 * one :].reshape(2, steps, batch, size)
    space = memory[4 * one : 4 * one + emissions.numel()].reshape(emissions.shape)
    shift, spread = _emissions(h, keep, space, after[:, 0], xp)
    interval = _interval(weights, spread)
    if not interval:
        return None
    after[:, 1] = xp.flip(after[:, 0], (0,))
    before, after = before[:count], after[:count]
    before[0, 0], before[0, 1] = first, 1.0
    log_scales = _loop(xp.stack([kernel, kernel.T]), before, after, interval, xp)
    top, top_start, top_end = weights.scales
    log_z = (xp.zeros_like(shift) + keep.sum(1) - 1.0) * top + shift + (top_start + top_end)
    if half:
        log_z += xp.log((before[-1, 0] * after[-1, 1]).sum(-1)) + log_scales.sum(0)
    else:
        log_z += xp.log(after[-1, 0, :, tags]) + log_scales[0]
    if not xp.isfinite(log_z).all():
        return None
    return _Sweep(before, after, kernel, log_z, spare, interval, xp)


@np.errstate(all="ignore")
def log_partition(*scores: Tensor) -> Tensor | None:
    """log Z (B,)."""
    sweep = _sweep(*scores, half=True)
    return None if sweep is None else torch.as_tensor(sweep.log_z)


@np.errstate(all="ignore")
def log_messages(*scores: Tensor) -> tuple[Tensor, Tensor] | None:
    """Logs of ``before`` and ``behind`` (N, B, K), up to a constant for each time and sequence."""
    sweep = _sweep(*scores)
    if sweep is None:
        return None
    before, behind = sweep.before[:, 0], sweep.xp.flip(sweep.before[:, 1], (0,))
    return torch.as_tensor(sweep.xp.log(before)), torch.as_tensor(sweep.xp.log(behind))


@np.errstate(all="ignore")
def expectations(*scores: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """log Z (B,), p(y_t = k) (N, B, K) and the expected number of transitions (B, K, K).

    The second lies in the workspace and is valid until the next call.
    """
    sweep = _sweep(*scores)
    if sweep is None:
        return None
    xp, (node, ahead) = sweep.xp, sweep.spare
    before, after, behind = sweep.before[:, 0], sweep.after[:, 0], xp.flip(sweep.after[:, 1], (0,))
    steps = len(before)
    rescaled = range(sweep.interval, steps - 1, sweep.interval)
    cuts = sorted({0, steps, *(s + 1 for s in rescaled), *(steps - s for s in rescaled)})
    for first, last in itertools.pairwise(cuts):  # between rescalings the product is constant
        mass = (before[first] * behind[first]).sum(-1)[:, None] * xp.ones_like(before[0])
        xp.multiply(behind[first:last], 1.0 / mass, out=ahead[first:last])
    xp.multiply(before, ahead, out=node)
    past, future = after[:-1].swapaxes(0, 1), ahead[1:].swapaxes(0, 1)  # (B, T, K)
    edges = xp.matmul(past.swapaxes(1, 2), future)
    edges *= sweep.kernel
    return torch.as_tensor(sweep.log_z), torch.as_tensor(node), torch.as_tensor(edges)
