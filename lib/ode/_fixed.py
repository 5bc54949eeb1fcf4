"""Fixed steps: the grid of times, the march along it, and what to say when it fails."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ._errors import NonFiniteError, SolverError
from ._methods import Field, Method
from ._transforms import concrete, readable, real_dtype

__all__ = ["Schedule", "march", "schedule"]

_BLOCK = 256  # steps whose times are cut out of one tensor at once


@dataclass(frozen=True)
class Schedule:
    """The points of a grid (n+1,), its step sizes if they can be read, the points asked for."""

    points: Tensor
    deltas: list[float] | None
    wanted: list[int]

    def __len__(self) -> int:
        return len(self.points) - 1

    def steps(
        self, method: Method, y: Tensor, first: int = 0
    ) -> Iterator[tuple[Sequence[Tensor], Sequence[Tensor]]]:
        """The times and scales of every step from number ``first`` on, as scalars."""
        times = self.times(method, y)
        if self.deltas is None:
            scales = self.scales(method, y)
            for index in range(first, len(self)):
                yield times[index].unbind(), scales[index].unbind()
            return
        cache: dict[float, tuple[Tensor, ...]] = {}  # a uniform grid has few different steps
        for block in range(first, len(self), _BLOCK):
            scalars = iter(times[block : block + _BLOCK].flatten().unbind())
            rows = zip(*[scalars] * len(method.nodes), strict=True)
            for row, dt in zip(rows, self.deltas[block : block + _BLOCK], strict=True):
                known = cache.get(dt)
                if known is None:
                    if len(cache) > _BLOCK:
                        cache.clear()
                    multiples = [dt * scale for scale in method.scales]
                    known = torch.tensor(multiples, dtype=y.dtype, device=y.device).unbind()
                    cache[dt] = known
                yield row, known

    def times(self, method: Method, y: Tensor) -> Tensor:
        """The times (n, nodes) at which each step looks at the field."""
        start, end = self.points[:-1], self.points[1:]
        exact = {0.0: start, 1.0: end}  # no rounding in what was asked for
        columns = [exact.get(c, start + c * (end - start)) for c in method.nodes]
        return torch.stack(columns, dim=1).to(real_dtype(y))

    def scales(self, method: Method, y: Tensor) -> Tensor:
        """The multiples (n, scales) of each step that multiply the slopes."""
        multiples = torch.tensor(method.scales, dtype=self.points.dtype, device=y.device)
        return (self.points.diff()[:, None] * multiples).to(y.dtype)


def schedule(
    t: Tensor,
    values: list[float] | None,
    y: Tensor,
    *,
    step_size: float | None = None,
    constructor: Callable[[], Tensor] | None = None,
    differentiable: bool = False,
) -> Schedule:
    """Lay a grid over the times ``t`` that holds every one of them exactly.

    Without a ``step_size`` the grid is ``t`` itself. With one it is t[0], t[0] + step_size, ...,
    and each requested time that falls between two of its points becomes a point of its own.
    """
    wanted = list(range(len(t)))
    if (step_size is None and constructor is None) or len(t) < 2:
        return Schedule(t, None if differentiable else _deltas(t, values), wanted)
    if values is None:
        raise ValueError(
            "step_size needs times whose values can be read: inside torch.compile or vmap "
            "give t as a tuple of floats"
        )
    if constructor is not None:
        candidates, gap = readable(constructor().to(t)) or [], 0.0
        if [candidates[0], candidates[-1]] != [values[0], values[-1]]:
            raise ValueError(
                f"grid_constructor must return a grid from {values[0]:g} to {values[-1]:g}, "
                f"got one from {candidates[0]:g} to {candidates[-1]:g}"
            )
    else:
        candidates, gap = _uniform(t, values, step_size or 0.0)
    merged, wanted = _merge(values, candidates, gap)
    points = torch.tensor(merged, dtype=t.dtype, device=t.device)
    deltas = None if differentiable else _deltas(points, merged)
    if differentiable:  # the grid is laid from t[0] and moves with it; what is asked for does not
        moved = points + (t[0] - t[0].detach())
        points = moved.index_copy(0, torch.tensor(wanted, device=t.device), t)
    return Schedule(points, deltas, wanted)


def _deltas(t: Tensor, values: list[float] | None) -> list[float] | None:
    """Step sizes, rounded as the difference of two entries of ``t`` is."""
    if values is not None and torch.compiler.is_compiling():
        return [b - a for a, b in pairwise(values)]
    return readable(t.diff())


def _uniform(t: Tensor, values: list[float], step_size: float) -> tuple[list[float], float]:
    """The points t[0] + k step_size before the last time, and how near is the same point."""
    if isinstance(step_size, bool) or not step_size > 0 or not math.isfinite(step_size):
        raise ValueError(f"step_size must be a positive number, got {step_size!r}")
    step_size = float(step_size)
    start, end = values[0], values[-1]
    resolution = torch.finfo(t.dtype).eps * max(abs(start), abs(end))
    if step_size < 8 * resolution:
        raise ValueError(
            f"step_size = {step_size:g} is below the spacing of {t.dtype} times near t = {end:g}; "
            "give t in float64 or shift the origin of time"
        )
    signed = math.copysign(step_size, end - start)
    count, gap = math.ceil(abs(end - start) / step_size), max(1e-6 * step_size, 4 * resolution)
    if torch.compiler.is_compiling():
        return [start + k * signed for k in range(count)], gap
    # These two operations in this dtype give the grid of torchdiffeq, bit by bit.
    return (torch.arange(count, dtype=t.dtype) * signed + start).tolist(), gap


def _merge(
    values: list[float], candidates: list[float], gap: float
) -> tuple[list[float], list[int]]:
    """All requested times and the candidates that are not within ``gap`` of one, in order."""
    sign = math.copysign(1.0, values[-1] - values[0])
    merged: list[float] = []
    wanted: list[int] = []
    position = 0
    for value in values:
        while position < len(candidates) and (value - candidates[position]) * sign > gap:
            merged.append(candidates[position])
            position += 1
        while position < len(candidates) and abs(candidates[position] - value) <= gap:
            position += 1
        wanted.append(len(merged))
        merged.append(value)
    return merged, wanted


def march(
    func: Field, y: Tensor, plan: Schedule, method: Method, wanted: Sequence[int] | None = None
) -> list[Tensor]:
    """The states at the grid points ``wanted`` (default: those the plan was asked for).

    Raises:
        NonFiniteError: if a state is not finite, with the last time at which all was well.
    """
    keep = set(plan.wanted if wanted is None else wanted)
    states = [y] if 0 in keep else []
    for index, (times, scales) in enumerate(plan.steps(method, y), 1):
        try:
            y = method.advance(func, times, scales, y)
        except SolverError as error:
            raise error.at(concrete(plan.points[index - 1]), y) from None
        if index in keep:
            states.append(y)
    # What is not finite stays so: y_next = y + increment. So the last state tells of all.
    finite = concrete(y.detach().isfinite().all())
    if finite is not None and not finite:
        raise _failure(func, states[0], plan, method)
    return states


@torch.no_grad()
def _failure(func: Field, y: Tensor, plan: Schedule, method: Method) -> SolverError:
    """Walk again, looking at every step, to find where it went wrong."""
    y = y.detach()
    points = readable(plan.points) or []
    for index, (times, scales) in enumerate(plan.steps(method, y)):
        after = method.advance(func, times, scales, y)
        if not after.isfinite().all():
            slope = func(plan.points[index].to(real_dtype(y)), y)
            where = "within the next step" if slope.isfinite().all() else "at the last good state"
            return NonFiniteError(
                f"{method.name}: the field is infinite or not a number {where}; "
                "the step may be too long, or the solution may blow up"
            ).at(points[index], y)
        y = after
    return NonFiniteError(f"{method.name}: a state is not finite, but not when computed again")
