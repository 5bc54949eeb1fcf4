"""The adjoint equation: gradients whose memory does not grow with the number of steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lib._common import is_transformed

from ._adaptive import rms
from ._errors import SolverError
from ._fixed import schedule
from ._gradient import leaves
from ._implicit import Theta, as_real, solve_blocks
from ._methods import Method
from ._problem import Problem, State, module_of
from ._settings import choose, gather_settings
from ._solve import solve
from ._transforms import real_dtype

__all__ = ["odeint_adjoint"]


def odeint_adjoint(
    func: Callable[..., Any],
    y0: State,
    t: Tensor | Sequence[float],
    *,
    method: str | None = "rk4",
    step_size: float | None = None,
    rtol: float | Tensor = 1e-7,
    atol: float | Tensor = 1e-9,
    options: Mapping[str, Any] | None = None,
    adjoint_params: Iterable[Tensor] | None = None,
    adjoint_method: str | None = None,
    adjoint_rtol: float | Tensor | None = None,
    adjoint_atol: float | Tensor | None = None,
    adjoint_options: Mapping[str, Any] | None = None,
) -> Any:
    """``odeint`` whose gradient comes from a second solve, backward in time.

    With a(t) = dL/dy(t):    da/dt = -a df/dy,    dL/dparameter = integral of a df/dparameter dt.

    Only the states at the requested times are kept, however many steps lie between them; ``y`` is
    solved backward again along with ``a``, from the kept state at the end of each interval. The
    gradient is that of the exact solution up to the error of both solves: not to the last digit
    that of the computed one, which ``odeint`` gives.

    Args:
        func: as for ``odeint``.
        y0: as for ``odeint``.
        t: as for ``odeint``.
        method: as for ``odeint``; with fixed steps, give a ``step_size`` to have steps between
            the requested times.
        step_size: as for ``odeint``.
        rtol: as for ``odeint``.
        atol: as for ``odeint``.
        options: as for ``odeint``.
        adjoint_params: the tensors to find gradients for; by default the parameters of ``func``
            if it is a module or a method of one, and every leaf that its value at the first time
            depends on.
        adjoint_method: method of the backward solve, by default ``method``.
        adjoint_rtol: tolerance of the backward solve, by default ``rtol``.
        adjoint_atol: tolerance of the backward solve, by default ``atol``.
        adjoint_options: options of the backward solve, by default ``options`` without ``norm``;
            ``norm`` may be ``"seminorm"``, which looks at no error of the parameters' gradients
            (Kidger et al., 2021), or a function of the tuple (dL/dt, *y, *a, *parameters'
            gradients).

    Returns:
        What ``odeint`` returns, once differentiable by ``y0``, ``t`` and the parameters.

    Raises:
        SolverError: as ``odeint`` does, also in the backward pass.
        RuntimeError: if the field turns out to depend on a leaf not in ``adjoint_params``.
        ValueError: as ``odeint`` does; inside torch.func transforms and torch.compile, where this
            does not work; and if a tolerance varies by element and none is given for the backward
            solve.

    Source: chapter `ode`, eq-ode-adjoint; Pontryagin et al. (1962), Chen et al. (2018).

    >>> rate = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
    >>> times = torch.tensor([0.0, 1.0], dtype=torch.float64)
    >>> one = torch.ones((), dtype=torch.float64)
    >>> y = odeint_adjoint(lambda t, y: rate * y, one, times, step_size=0.01)
    >>> y[-1].backward()
    >>> abs(rate.grad.item() - y[-1].item()) < 1e-8
    True
    """
    chosen, adaptive = choose(method)
    settings = gather_settings(chosen, adaptive, step_size, options)
    problem = Problem.of(func, y0, t)
    if is_transformed():
        raise ValueError(
            "odeint_adjoint does not work under torch.func transforms or torch.compile; "
            "take odeint with a method of fixed steps"
        )
    back, back_adaptive = choose(adjoint_method or method)
    if adjoint_options is not None or adjoint_method in (None, method):
        back_options = dict(settings if adjoint_options is None else adjoint_options)
    elif settings:
        raise ValueError(
            "adjoint_options must be given when adjoint_method differs and there are options"
        )
    else:
        back_options = {}
    norm = back_options.pop("norm", None)
    if isinstance(norm, str) and norm != "seminorm":
        raise ValueError(f'norm must be a function or "seminorm", got {norm!r}')
    tolerances = {
        "rtol": rtol if adjoint_rtol is None else adjoint_rtol,
        "atol": atol if adjoint_atol is None else adjoint_atol,
    }
    for name, value in tolerances.items():
        by_element = value.dim() > 0 if isinstance(value, Tensor) else isinstance(value, Sequence)
        if back_adaptive and by_element:
            raise ValueError(
                f"{name} varies by element; give adjoint_{name}, a number, for the backward solve"
            )
    plan = _Plan(
        problem,
        (chosen, adaptive, settings, rtol, atol),
        (
            back,
            back_adaptive,
            gather_settings(back, back_adaptive, None, back_options),
            tolerances["rtol"],
            tolerances["atol"],
        ),
        None if adjoint_options is None else norm,
    )
    parameters = _parameters(func, problem, adjoint_params)
    try:
        states = _Adjoint.apply(plan, problem.y0, problem.t, *parameters)
    except SolverError as error:
        if isinstance(error.y, Tensor):
            error.y = problem.shape_state(error.y)
        raise
    return problem.shape_state(states)


Settings = tuple[Method, bool, dict[str, Any], Any, Any]


@dataclass(frozen=True)
class _Plan:
    problem: Problem
    forward: Settings
    backward: Settings
    norm: Any

    def part(self, ends: list[int]) -> Problem:
        """The problem between two of its times."""
        t, values = self.problem.t.detach()[ends], self.problem.values
        assert values is not None
        return replace(self.problem, t=t, values=[values[index] for index in ends])


class _Adjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: _Plan, y0: Tensor, t: Tensor, *parameters: Tensor) -> Tensor:
        states = solve(replace(plan.problem, y0=y0.detach(), t=t.detach()), *plan.forward)
        ctx.plan = plan
        ctx.save_for_backward(t, states, *parameters)
        return states

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the adjoint gradient cannot be differentiated again; use odeint for "
                "create_graph=True"
            )
        t, states, *parameters = ctx.saved_tensors
        func = ctx.plan.problem.func
        system = _Augmented(ctx.plan, states[0], parameters)
        back = _implicit_interval if isinstance(ctx.plan.backward[0], Theta) else _interval
        sensitivity = gradient[-1]
        learned = states.new_zeros(sum(p.numel() for p in parameters))
        moved = torch.zeros_like(t)
        for index in range(len(t) - 1, 0, -1):
            slope = func(t[index].to(real_dtype(states)), states[index])
            moved[index] = _inner(gradient[index], slope)
            start = torch.cat([states[index].reshape(-1), sensitivity.reshape(-1), learned])
            end = back(ctx.plan, system, [index, index - 1], start)
            _, sensitivity, learned = system.split(end)
            sensitivity = sensitivity.reshape(states[0].shape)
            if index == 1:
                slope = func(t[0].to(real_dtype(states)), states[0])
                moved[0] = -_inner(sensitivity, slope)
            sensitivity = sensitivity + gradient[index - 1]
        pieces = learned.split([p.numel() for p in parameters])
        shaped = [x.reshape(p.shape).to(p.dtype) for x, p in zip(pieces, parameters, strict=True)]
        return None, sensitivity, moved if ctx.needs_input_grad[2] else None, *shaped


def _interval(plan: _Plan, system: _Augmented, ends: list[int], start: Tensor) -> Tensor:
    """The augmented vector at the earlier of two requested times, from that at the later."""
    method, adaptive, options, rtol, atol = plan.backward
    if adaptive:
        options = {**options, "norm": system.norm}
    problem = replace(plan.part(ends), func=system, y0=start, joined=False)
    return solve(problem, method, adaptive, options, rtol, atol)[-1]


def _implicit_interval(plan: _Plan, system: _Augmented, ends: list[int], start: Tensor) -> Tensor:
    """The same by an implicit method, which here is implicit for the state alone.

    Given the inner state, that of the sensitivity solves a linear equation with the transposed
    matrix, and what is learned follows without a solve.
    """
    method, _, options, _, _ = plan.backward
    assert isinstance(method, Theta)
    if not system.size:
        return start
    part, func = plan.part(ends), system.func
    parts: Callable[[Tensor], Tensor] = _same
    whole: Callable[[Tensor], Tensor] = _same
    if start.is_complex():
        func, parts, whole = as_real(func), _parts, torch.view_as_complex
    grid = schedule(part.t, part.values, start, step_size=options.get("step_size"))
    for times, scales in grid.steps(method, start):
        scale = scales[0].real
        state, sensitivity, learned = system.split(start)
        inner, _ = method.newton(func, times[0], scale, parts(state.reshape(system.shape)))
        matrices = method.matrix(func, times[0], -scale, inner).transpose(1, 2)
        pulled = whole(solve_blocks(matrices, parts(sensitivity)))
        middle = whole(inner).reshape(-1)
        slope = system.split(system(times[0], torch.cat([middle, pulled, learned])))[2]
        moved = torch.cat([middle - state, pulled - sensitivity, slope * scale])
        start = start + moved / method.theta
    return start


def _same(x: Tensor) -> Tensor:
    return x


def _parts(x: Tensor) -> Tensor:
    return torch.view_as_real(x.resolve_conj())


class _Augmented:
    """State, sensitivity and parameter gradients as one vector, and their equation."""

    pointwise = False

    def __init__(self, plan: _Plan, like: Tensor, parameters: Sequence[Tensor]) -> None:
        self.problem, self.given = plan.problem, plan.norm
        self.func, self.shape, self.size = plan.problem.func, like.shape, like.numel()
        self.parameters = tuple(parameters)
        self.known = {id(p) for p in parameters}
        self.roots = {p.grad_fn for p in parameters if p.grad_fn is not None}

    def split(self, joined: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        state, sensitivity, learned = joined.split(
            [self.size, self.size, joined.numel() - 2 * self.size]
        )
        return state, sensitivity, learned

    def norm(self, joined: Tensor) -> float:
        """The largest of the three sizes, so that none hides behind the others, or as given."""
        state, sensitivity, learned = self.split(joined)
        if callable(self.given):
            pieces = learned.split([p.numel() for p in self.parameters])
            shaped = [x.reshape(p.shape) for x, p in zip(pieces, self.parameters, strict=True)]
            both = [self.problem.shape_state(x.reshape(self.shape)) for x in (state, sensitivity)]
            parts = [part for x in both for part in (x if self.problem.joined else (x,))]
            return float(self.given((joined.new_zeros(()), *parts, *shaped)))
        looked_at = (state, sensitivity) if self.given else (state, sensitivity, learned)
        return max((float(rms(part)) for part in looked_at if part.numel()), default=0.0)

    def __call__(self, t: Tensor, joined: Tensor) -> Tensor:
        state, sensitivity, _ = self.split(joined)
        with torch.enable_grad():
            y = state.detach().reshape(self.shape).requires_grad_()
            slope = self.func(t, y)
            found = leaves(slope, self.roots)
            unknown = [p for p in found if p is not y and id(p) not in self.known]
            if unknown:
                raise RuntimeError(
                    "func depends on a tensor that requires a gradient and is not in "
                    f"adjoint_params (shape {tuple(unknown[0].shape)}); pass adjoint_params"
                )
            inputs = (y, *self.parameters)
            pulled: Sequence[Tensor | None] = (None,) * len(inputs)
            if slope.requires_grad:
                pulled = torch.autograd.grad(
                    slope,
                    inputs,
                    -sensitivity.reshape(self.shape),
                    allow_unused=True,
                    retain_graph=True,
                )
        parts = [
            (torch.zeros_like(x) if g is None else g).reshape(-1).to(joined.dtype)
            for g, x in zip(pulled, inputs, strict=True)
        ]
        return torch.cat([slope.detach().reshape(-1), *parts])


def _inner(a: Tensor, b: Tensor) -> Tensor:
    product = a.conj().reshape(-1) @ b.reshape(-1)
    return product.real if product.is_complex() else product


def _parameters(
    func: Callable[..., Any], problem: Problem, given: Iterable[Tensor] | None
) -> list[Tensor]:
    if given is None:
        owner = module_of(func)
        found: list[Tensor] = [] if owner is None else list(owner.parameters())
        with torch.enable_grad():
            found += leaves(problem.func(problem.t[0], problem.y0.detach()))
    else:
        found = list(given)
    return list({id(p): p for p in found if p.requires_grad}.values())
