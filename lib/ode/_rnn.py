"""A differential equation solved step by step is a recurrent network."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lib._common import check_positive

from ._fixed import Schedule
from ._problem import Problem, State
from ._settings import choose
from ._solve import check_scalar, follow

__all__ = ["ODERNN"]


class ODERNN(nn.Module):
    """The recurrent network whose cell is one step of a solver.

    y_(n+1) = step(func, t_n, dt, y_n),    t_n = t_0 + n dt.

    Args:
        func: maps (t, y) to dy/dt; a module is registered, so that its parameters are the
            network's.
        dt: the step, a number or a scalar tensor (which may be learned); negative runs backward.
        method: any method of ``odeint``.

    Source: chapter `ode`, eq-ode-euler.

    >>> cell = ODERNN(lambda t, y: -y, dt=0.5, method="euler")
    >>> cell(torch.ones(1), steps=2).flatten()
    tensor([1.0000, 0.5000, 0.2500])
    """

    def __init__(
        self, func: Callable[..., Any], *, dt: float | Tensor, method: str = "rk4"
    ) -> None:
        super().__init__()
        choose(method)
        check_scalar("dt", dt)
        if not isinstance(dt, Tensor) and (dt == 0 or not math.isfinite(dt)):
            raise ValueError(f"dt must be a finite number other than 0, got {dt!r}")
        self.func, self.dt, self.method = func, dt, method

    def extra_repr(self) -> str:
        return f"dt={self.dt}, method={self.method!r}"

    def forward(self, y0: State, steps: int, *, t0: float = 0.0) -> Any:
        """The states (steps + 1, *y0.shape), of which the first is ``y0`` at time ``t0``."""
        check_positive(steps, "steps")
        method, _ = choose(self.method)
        problem = Problem.of(self.func, y0, [t0])
        count = torch.arange(steps + 1, dtype=torch.float64, device=problem.y0.device)
        fixed = not isinstance(self.dt, Tensor)
        plan = Schedule(
            t0 + count * self.dt,
            [float(self.dt)] * steps if fixed else None,
            list(range(steps + 1)),
        )
        return problem.shape_state(follow(problem.func, problem.y0, plan, method))
