"""``odeint`` and ``step``: the doors to every method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ._adaptive import HIDDEN, integrate
from ._errors import SolverError
from ._fixed import Schedule, march, schedule
from ._gradient import march_in_parallel
from ._methods import METHODS, Field, Method
from ._problem import NO_TIMES, Problem, State
from ._settings import choose, control_for, gather_settings
from ._transforms import concrete, real_dtype

__all__ = ["check_scalar", "follow", "odeint", "solve", "step"]


def odeint(
    func: Callable[..., Any],
    y0: State,
    t: Tensor | Sequence[float],
    *,
    method: str | None = "rk4",
    step_size: float | None = None,
    rtol: float | Tensor | Sequence[Any] = 1e-7,
    atol: float | Tensor | Sequence[Any] = 1e-9,
    options: Mapping[str, Any] | None = None,
) -> Any:
    """Solve dy/dt = func(t, y), y(t[0]) = y0, and return y at the times ``t``.

    The call is that of torchdiffeq, whose methods of the same name are the same, but for ``rk4``,
    which is the classical one here (theirs is ``rk4_38``). Their default is ``dopri5``, ours is
    not: pass ``method``. A fixed step looks at no tolerance and lands on every requested time;
    ``dopri5`` ends a step at the last one and evaluates its continuous extension, of order four,
    at those before. There are no events and no callbacks.

    Args:
        func: maps a time (a scalar tensor) and a state to its derivative, of the state's shape.
        y0: a floating-point or complex tensor of any shape, or a tuple of tensors.
        t: times (T,), strictly increasing or strictly decreasing; a tensor or numbers.
        method: ``"euler"``, ``"midpoint"``, ``"heun"`` (or ``"heun2"``), ``"heun3"``, ``"rk4"``,
            ``"rk4_38"``, ``"implicit_midpoint"``, ``"implicit_euler"`` with fixed steps;
            ``"dopri5"`` (or None) adapts them.
        step_size: the longest fixed step; without it there is one step between two times.
        rtol: error per step allowed to ``dopri5``, relative to the state; may vary by element.
        atol: the same, absolute.
        options: torchdiffeq's options by name: ``step_size``, ``grid_constructor`` for fixed
            steps, ``first_step``, ``min_step``, ``max_step``, ``max_num_steps``, ``safety``,
            ``ifactor``, ``dfactor``, ``norm``, ``step_t``, ``jump_t`` for ``dopri5``.

    Returns:
        The states (T, *y0.shape) in the dtype of ``y0``; a tuple of them if ``y0`` was one. All
        are differentiable by ``y0``, ``t`` and whatever ``func`` depends on. Half precision is
        carried in float32 between calls of ``func``.

    The gradient is that of the computed solution. With explicit fixed steps and a small state it
    is found from the Jacobians of all the steps at once, up to ten times faster than through the
    loop, wherever ``func`` allows: at most eight components that hang together, rows that do not
    feel each other, nothing random. That is found out by trying. A true attribute
    ``func.pointwise``, which the fields of this module have, says so without: the field works on
    the last axis alone, all others being samples (times then come as (n, 1, ...)). With a false
    one the loop is differentiated.

    Fixed steps work under torch.func transforms and torch.compile(fullgraph=True) (there, give
    ``t`` as numbers if there is a ``step_size``). ``dopri5`` looks at values and does not.

    Raises:
        SolverError: one of its kinds, with the time reached ``.t`` and the last good state
            ``.y``: TimeOrderError, FieldError, NonFiniteError, StepUnderflowError,
            StepLimitError, NewtonError.
        ValueError: for an unknown method or option, or a bad step_size.
        TypeError: for a state that is not floating-point.

    Source: chapter `ode`, eq-ode-runge-kutta; Dormand and Prince (1980); Chen et al. (2018).

    >>> t = torch.linspace(0, 1, 11, dtype=torch.float64)
    >>> y = odeint(lambda t, y: -y, torch.ones((), dtype=torch.float64), t)
    >>> bool((y - torch.exp(-t)).abs().max() < 1e-6)
    True
    """
    chosen, adaptive = choose(method)
    settings = gather_settings(chosen, adaptive, step_size, options)
    problem = Problem.of(func, y0, t)
    try:
        states = solve(problem, chosen, adaptive, settings, rtol, atol)
    except SolverError as error:
        if isinstance(error.y, Tensor):
            error.y = problem.shape_state(error.y)
        raise
    return problem.shape_state(states)


def step(
    func: Callable[..., Any],
    t: float | Tensor,
    dt: float | Tensor,
    y: State,
    *,
    method: str = "rk4",
) -> Any:
    """Take one step of length ``dt`` from ``y`` at time ``t``: the cell of a recurrent network.

    Euler: y + dt func(t, y). Nothing is checked but the shape, so that it can stand in a loop;
    ``dopri5`` takes its fifth-order step without looking at the error.

    Args:
        func: maps (t, y) to the derivative of ``y``.
        t: the time, a number or a scalar tensor.
        dt: the step, a number or a scalar tensor; negative steps go back.
        y: the state, a tensor of any shape or a tuple of tensors.
        method: any method of ``odeint``.

    Returns:
        The next state, of the kind, shape and dtype of ``y``.

    Source: chapter `ode`, eq-ode-euler.

    >>> step(lambda t, y: -y, 0.0, 0.5, torch.ones(2), method="euler")
    tensor([0.5000, 0.5000])
    """
    chosen, _ = choose(method)
    problem = Problem.of(func, y, NO_TIMES)
    state = problem.y0
    real = real_dtype(state)
    start = torch.as_tensor(t, dtype=real, device=state.device)
    check_scalar("t", start)
    check_scalar("dt", dt)
    if isinstance(dt, Tensor):
        scales = [(dt * scale).to(state.dtype) for scale in chosen.scales]
    else:
        multiples = [dt * scale for scale in chosen.scales]
        scales = list(torch.tensor(multiples, dtype=state.dtype, device=state.device).unbind())
    times = [start + c * dt if c else start for c in chosen.nodes]
    try:
        return problem.shape_state(chosen.advance(problem.func, times, scales, state))
    except SolverError as error:
        error.at(concrete(start), state)
        error.y = problem.shape_state(state.detach())
        raise


def solve(
    problem: Problem,
    method: Method,
    adaptive: bool,
    settings: dict[str, Any],
    rtol: Any,
    atol: Any,
) -> Tensor:
    """The states (T, *shape) of ``problem``."""
    func, y, t = problem.func, problem.y0, problem.t
    if len(t) == 1:
        return y[None].clone()
    differentiable = t.requires_grad and torch.is_grad_enabled()
    if adaptive:
        if problem.values is None:
            raise ValueError(HIDDEN)
        control = control_for(problem, settings, rtol, atol)
        if not differentiable:
            return integrate(func, y, problem.values, control)
        states = integrate(func, _moved(func, t[0], -_zero(t[0]), y), problem.values, control)
        pairs = zip(t[1:], states[1:], strict=True)
        return torch.stack([y, *(_moved(func, s.detach(), _zero(s), y) for s, y in pairs)])
    constructor = settings.get("grid_constructor")
    plan = schedule(
        t,
        problem.values,
        y,
        step_size=settings.get("step_size"),
        constructor=None if constructor is None else lambda: constructor(func, y, t),
        differentiable=differentiable,
    )
    return follow(func, y, plan, method)


def follow(func: Field, y: Tensor, plan: Schedule, method: Method) -> Tensor:
    """The states (T, *shape) that ``plan`` asks for, differentiable in the fastest way."""
    states = march_in_parallel(func, y, plan, method)
    return torch.stack(march(func, y, plan, method)) if states is None else states


def check_scalar(name: str, value: float | Tensor) -> None:
    if isinstance(value, Tensor) and value.dim():
        raise ValueError(f"{name} must be a number or a scalar, got shape {tuple(value.shape)}")


def _zero(t: Tensor) -> Tensor:
    """Zero, whose derivative by ``t`` is one."""
    return t - t.detach()


def _moved(func: Field, t: Tensor, dt: Tensor, y: Tensor) -> Tensor:
    """The state ``dt`` later, where ``dt`` is zero but not its derivative (four are right)."""
    method = METHODS["rk4"]
    times = [(t + c * dt).to(real_dtype(y)) for c in method.nodes]
    return method.advance(func, times, [(dt * scale).to(y.dtype) for scale in method.scales], y)
