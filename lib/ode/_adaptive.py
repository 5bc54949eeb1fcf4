"""Dormand-Prince 5(4): the step adapts itself, a continuous extension serves the times between."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lib._common import check_positive

from ._errors import NonFiniteError, SolverError, StepLimitError, StepUnderflowError
from ._methods import METHODS, Field, Tableau
from ._transforms import concrete, real_dtype

__all__ = ["HIDDEN", "Control", "integrate", "rms"]

HIDDEN = (
    "dopri5 chooses its steps by looking at values, which torch.compile and vmap hide; take a "
    "method of fixed steps"
)


def rms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x) / math.sqrt(max(x.numel(), 1))


@dataclass
class Control:
    """How the step is chosen; the names are those of torchdiffeq's ``options``."""

    rtol: float | Tensor
    atol: float | Tensor
    first_step: float | None = None
    min_step: float = 0.0
    max_step: float = math.inf
    max_num_steps: int = 50_000
    safety: float = 0.9
    ifactor: float = 10.0
    dfactor: float = 0.2
    norm: Callable[[Tensor], Any] = rms
    step_t: Sequence[float] = field(default_factory=list)
    jump_t: Sequence[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_positive(self.max_num_steps, "max_num_steps")
        for name, is_good, wanted in (
            ("first_step", lambda x: x is None or 0 < x < math.inf, "a positive number"),
            ("min_step", lambda x: 0 <= x < math.inf, "a number of at least 0"),
            ("max_step", lambda x: x > 0 and x >= self.min_step, "positive, not below min_step"),
            ("safety", lambda x: 0 < x <= 1, "above 0 and at most 1"),
            ("ifactor", lambda x: x >= 1, "at least 1"),
            ("dfactor", lambda x: 0 < x < 1, "between 0 and 1"),
        ):
            if not is_good(getattr(self, name)):
                raise ValueError(f"{name} must be {wanted}, got {getattr(self, name)!r}")

    def measure(self, x: Tensor, size: Tensor) -> float:
        """``x`` in units of the tolerance for a state of ``size``: an error below 1 is good."""
        return float(self.norm(x / (size * self.rtol).add_(self.atol)))

    def factor(self, error: float, order: int) -> float:
        """By how much the next step is longer; not shorter after a good step."""
        if not math.isfinite(error):
            return self.dfactor
        if error == 0.0:
            return self.ifactor
        lowest = 1.0 if error < 1.0 else self.dfactor
        return min(self.ifactor, max(self.safety * error ** (-1 / order), lowest))


def integrate(func: Field, y: Tensor, values: Sequence[float], control: Control) -> Tensor:
    """The solution (T, *shape) at the times ``values``, of which the last is a step's end.

    Raises:
        ValueError: if vmap hides the values.
        NonFiniteError: if the field is not finite at a good state or close after it.
        StepUnderflowError: if the step cannot be seen next to the time.
        StepLimitError: after ``max_num_steps`` steps, good and rejected.
    """
    method = METHODS["dopri5"]
    assert isinstance(method, Tableau)
    t, end = values[0], values[-1]
    sign = math.copysign(1.0, end - t)
    slope = func(_time(t, y), y)
    finite = concrete(y.detach().isfinite().all() & slope.detach().isfinite().all())
    if finite is None:
        raise ValueError(HIDDEN)
    if not finite:
        raise NonFiniteError("dopri5: the field is not finite at the first time").at(t, y)
    stops = sorted({s * sign for s in (*control.step_t, *control.jump_t, end)}, reverse=True)
    stops = [s for s in stops if sign * t < s <= sign * end]
    jumps = {s * sign for s in control.jump_t}
    shortest = 32 * max(math.ulp(t), math.ulp(end))  # of the steps that a time can tell apart
    length = control.first_step or max(
        shortest, _first_step(func, t, sign, y, slope, control, method.order)
    )
    out, due = [y], 1
    error = 0.0
    for _ in range(control.max_num_steps):
        length = min(max(length, control.min_step), control.max_step)
        room = stops[-1] - sign * t
        lands = length >= room * (1 - 1e-12)
        after = sign * stops[-1] if lands else t + sign * length
        if after == t or not (lands or length > 16 * math.ulp(t)):
            raise _underflow(error).at(t, y)
        dt, jumps_there = after - t, lands and stops[-1] in jumps
        try:
            y_after, slopes = _stages(func, method, t, dt, after, y, slope, jumps_there)
        except SolverError as failure:
            raise failure.at(t, y) from None
        with torch.no_grad():
            difference = _combine(None, slopes, method.error, dt)
            error = control.measure(difference, torch.maximum(y.abs(), y_after.abs()))
        factor = control.factor(error, method.order)
        if error <= 1.0 or (abs(dt) <= control.min_step and math.isfinite(error)):
            last = due
            while due < len(values) and sign * values[due] <= sign * after:
                due += 1
            if due > last:
                out += _outputs(method, values[last:due], t, dt, after, y, y_after, slopes)
            t, y, slope = after, y_after, slopes[-1]
            if due == len(values):
                return torch.stack(out)
            if lands:
                stops.pop()
                if jumps_there:
                    now = _time(t, y)
                    slope = func(now.nextafter(now + sign), y)
                factor = max(factor, length / abs(dt))  # a step cut short says little
        length = abs(dt) * factor
    raise StepLimitError(
        f"dopri5: {control.max_num_steps} steps did not lead to t = {end:.6g}; the field is stiff "
        'or the tolerance too small (see options={"max_num_steps": ...})'
    ).at(t, y)


def _stages(
    func: Field,
    method: Tableau,
    t: float,
    dt: float,
    after: float,
    y: Tensor,
    slope: Tensor,
    jumps: bool,
) -> tuple[Tensor, list[Tensor]]:
    """The end of the step and all its slopes; the last one is the first of the next step.

    If the field ``jumps`` at the end, it is looked at just before.
    """
    times = torch.tensor(
        [after if c == 1.0 else t + c * dt for c in method.nodes],
        dtype=real_dtype(y),
        device=y.device,
    )
    if jumps:
        times = torch.where(times == times[-1], times.nextafter(times[0]), times)
    scalars, slopes, state = times.unbind(), [slope], y
    for c, row in zip(method.c[1:], method.a[1:], strict=True):
        state = _combine(y, slopes, row, dt)
        slopes.append(func(scalars[method.nodes.index(c)], state))
    return state, slopes


def _combine(start: Tensor | None, slopes: list[Tensor], row: Sequence[float], dt: float) -> Tensor:
    """start + dt * (the slopes weighted with ``row``)."""
    for weight, slope in zip(row, slopes, strict=True):
        if start is None:
            start = slope * (weight * dt)
        elif weight:
            start = torch.add(start, slope, alpha=weight * dt)
    assert start is not None
    return start


def _outputs(
    method: Tableau,
    values: Sequence[float],
    t: float,
    dt: float,
    after: float,
    y: Tensor,
    y_after: Tensor,
    slopes: list[Tensor],
) -> list[Tensor]:
    """The continuous extension of a step, of order four, at the times ``values`` inside it."""
    exact = values[-1] == after
    inside = values[:-1] if exact else values
    out = []
    if inside:
        rise = y_after - y
        bend = slopes[0] * dt - rise
        twist = rise - slopes[-1] * dt - bend
        rest = _combine(None, slopes, method.dense, dt)
        for value in inside:
            x = (value - t) / dt
            out.append(y + x * (rise + (1 - x) * (bend + x * (twist + (1 - x) * rest))))
    return [*out, y_after] if exact else out


@torch.no_grad()
def _first_step(
    func: Field,
    t: float,
    sign: float,
    y: Tensor,
    slope: Tensor,
    control: Control,
    order: int,
) -> float:
    """Guess a first step from the sizes of state, slope and its change over a trial step.

    After Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, II.4.
    """
    size = y.abs()
    state, speed = control.measure(y, size), control.measure(slope, size)
    trial = 1e-6 if state < 1e-5 or speed < 1e-5 else 0.01 * state / speed
    ahead = func(_time(t + sign * trial, y), torch.add(y, slope, alpha=sign * trial))
    change = control.measure(ahead - slope, size) / trial
    steepest = max(speed, change)
    if not math.isfinite(steepest):
        return trial
    length = max(1e-6, trial * 1e-3) if steepest <= 1e-15 else (0.01 / steepest) ** (1 / order)
    return min(100 * trial, length)


def _time(t: float, y: Tensor) -> Tensor:
    return torch.tensor(t, dtype=real_dtype(y), device=y.device)


def _underflow(error: float) -> SolverError:
    if math.isfinite(error):
        return StepUnderflowError(
            "dopri5: the step shrank to the spacing of floating-point times; "
            "the solution may blow up there, the field jump, or the tolerance be below rounding"
        )
    return NonFiniteError("dopri5: no step is short enough for the field to stay finite")
