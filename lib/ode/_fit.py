"""Fit a field to data by Gauss-Newton, and read out what was learned."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lib._common import bool_mask, check_positive

from ._errors import SolverError
from ._sensitivity import Model

__all__ = ["FitResult", "fit"]


@dataclass(frozen=True)
class FitResult:
    """What ``fit`` learned; ``print`` shows the equation and every parameter with its error.

    Attributes:
        field: a copy of the field with the fitted parameters.
        parameters: the fitted values by parameter name (and ``"y0"`` if it was fitted).
        standard_errors: of the same names and shapes; infinite where the data say nothing.
        residual: the sum of squared residuals.
        converged: whether the residual is perpendicular to all the data allow to change.
        equation: the fitted equation as text.
        prediction: what the model predicts of the observations, in their shape.
        jacobian: derivatives of the kept predictions (M, P), one column per number fitted.
        covariance: of the numbers fitted (P, P), in the order of ``parameters``.
        iterations: accepted and rejected steps.
        history: the residual after each accepted step, the first one before any.
    """

    field: nn.Module
    parameters: dict[str, Tensor]
    standard_errors: dict[str, Tensor]
    residual: float
    converged: bool
    equation: str
    prediction: Tensor
    jacobian: Tensor
    covariance: Tensor
    iterations: int
    history: list[float]

    def __str__(self) -> str:
        lines = [self.equation]
        for name, value in self.parameters.items():
            errors = self.standard_errors[name].reshape(-1).tolist()
            for index, number in enumerate(value.reshape(-1).tolist()):
                label = f"{name}[{index}]" if value.dim() else name
                lines.append(f"{label} = {number:.4g} ± {errors[index]:.2g}")
        state = "converged" if self.converged else "NOT converged"
        lines.append(f"sum of squares {self.residual:.6g}, {state} in {self.iterations} steps")
        return "\n".join(lines)


@torch.inference_mode(False)  # it differentiates, wherever it is called
def fit(
    field: nn.Module,
    y0: Tensor,
    t: Tensor | Sequence[float],
    observations: Tensor,
    *,
    method: str | None = "rk4",
    step_size: float | None = None,
    mask: Tensor | None = None,
    observe: Callable[[Tensor], Tensor] | None = None,
    fit_y0: bool = False,
    noise_std: float | None = None,
    rtol: float = 1e-8,
    atol: float = 1e-10,
    max_iterations: int = 200,
    tolerance: float = 1e-6,
) -> FitResult:
    """Find the parameters of ``field`` whose solution comes nearest to ``observations``.

    Least squares by Gauss-Newton steps, damped after Levenberg and Marquardt,
    (J^T J + mu D) step = -J^T residual with D the diagonal of J^T J, and bent to second order.
    J holds the derivatives of the predictions, carried forward with the solution. Use float64
    where the data fix some parameters much better than others.

    Args:
        field: a module ``field(t, y)``; it is left as it was. Parameters that do not require a
            gradient stay fixed.
        y0: the state at t[0].
        t: the times (T,), as for ``odeint``.
        observations: what was seen of ``observe(states)`` (T, ...), the row of t[0] included.
        method: as for ``odeint``.
        step_size: as for ``odeint``.
        mask: of the shape of ``observations``, True = keep; what is masked may be NaN.
        observe: maps the states (T, *y0.shape) to what is observed; default: the states.
        fit_y0: whether to fit the initial state too, from ``y0`` on.
        noise_std: the standard deviation of the noise if it is known; otherwise it is estimated
            from the residual, with M - P degrees of freedom for M observations (not counting
            those of t[0] that only repeat ``y0``) and P numbers fitted.
        rtol: tolerance of ``dopri5``.
        atol: tolerance of ``dopri5``.
        max_iterations: at most so many steps are tried.
        tolerance: converged when the part of the residual that a step could remove is this
            fraction of the residual (or 1e-3, where rounding lets it get no lower).

    Returns:
        A FitResult.

    Raises:
        ValueError: for shapes that do not agree, or kept observations that are not finite, or
            predictions that are not finite at the start.
        TypeError: for a field that is no module, or numbers that are not real.
        SolverError: if the field cannot be solved with the parameters given.

    Source: chapter `ode`, eq-ode-gauss-newton; Levenberg (1944), Marquardt (1963); Transtrum,
    Machta and Sethna (2011) for the second order.

    >>> from lib.ode import LogisticGrowth
    >>> t = torch.arange(0, 12, dtype=torch.float64)
    >>> seen = 100 / (1 + 19 * torch.exp(-0.7 * t))
    >>> result = fit(LogisticGrowth(0.5, 0.02), seen[0], t, seen, step_size=0.1)
    >>> print(result.equation, result.converged)
    dy/dt = 0.7 y (1 - 0.01 y) True
    """
    check_positive(max_iterations, "max_iterations")
    for name, number in (("noise_std", noise_std), ("tolerance", tolerance)):
        if number is not None and not 0 < number < float("inf"):
            raise ValueError(f"{name} must be a positive number, got {number!r}")
    if not isinstance(field, nn.Module):
        raise TypeError(f"field must be a torch.nn.Module, got {type(field).__name__}")
    for name, given in (("y0", y0), ("observations", observations)):
        if not isinstance(given, Tensor) or given.is_complex():
            kind = given.dtype if isinstance(given, Tensor) else type(given).__name__
            raise TypeError(f"{name} must be a tensor of real numbers, got {kind}")
    y0, observations = y0.detach().clone(), observations.detach().clone()
    t = t.detach().clone() if isinstance(t, Tensor) else t
    fitted = copy.deepcopy(field).to(dtype=torch.promote_types(_dtype(field), y0.dtype))
    model = Model(
        fitted,
        y0,
        t,
        method=method,
        step_size=step_size,
        rtol=rtol,
        atol=atol,
        observe=observe or _as_it_is,
        moves=fit_y0,
    )
    vector = model.start
    predicted, derivative = model.jacobian(vector)
    keep, seen = _kept(observations, predicted, mask)
    if not bool(predicted[keep].isfinite().all() & derivative[keep].isfinite().all()):
        raise ValueError(
            "observe must be finite, with its derivatives, at what field predicts at the start"
        )
    precision = torch.finfo(torch.promote_types(y0.dtype, torch.float32)).eps
    history: list[float] = []
    damping, trials = 1e-3, 0
    while True:
        residual, matrix = predicted[keep] - seen, derivative[keep]
        history.append(float(residual.square().sum()))
        plane = _Tangent(matrix, residual, precision)
        floor = precision * float(seen.norm())
        converged = plane.removable <= tolerance * float(residual.norm()) + floor
        if converged or trials == max_iterations:
            break
        moved = None
        while moved is None and trials < max_iterations and damping < 1e20:
            trials += 1
            moved = _lower(model, vector, plane, damping, keep, seen)
            damping = damping * 2 if moved is None else max(damping / 3, 1e-15)
        if moved is None:  # as low as rounding allows
            converged = converged or plane.removable <= 1e-3 * float(residual.norm())
            break
        vector = moved
        predicted, derivative = model.jacobian(vector)
    return _result(
        model, vector, predicted, plane, history, converged, trials, noise_std, observations
    )


def _dtype(field: nn.Module) -> torch.dtype:
    """The narrowest dtype of the parameters, which limits how exactly they can be found."""
    kinds = [p.dtype for p in field.parameters() if p.requires_grad]
    return min(kinds, key=lambda kind: kind.itemsize, default=torch.float32)


def _as_it_is(y: Tensor) -> Tensor:
    return y


def _kept(observations: Tensor, predicted: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Which observations count (bool, their shape), and those (M,) in float64."""
    if observations.shape != predicted.shape:
        raise ValueError(
            f"observations must have the shape {tuple(predicted.shape)} of what is predicted, "
            f"got {tuple(observations.shape)}"
        )
    shape = tuple(observations.shape)
    keep = torch.ones(shape, dtype=torch.bool) if mask is None else bool_mask(mask, shape)
    keep = keep.to(predicted.device)
    seen = observations.to(predicted)[keep]
    if not len(seen):
        raise ValueError("mask keeps no observation")
    if not bool(seen.isfinite().all()):
        raise ValueError("observations that are kept must be finite; mask what is missing")
    return keep, seen


def _lower(
    model: Model, vector: Tensor, plane: _Tangent, damping: float, keep: Tensor, seen: Tensor
) -> Tensor | None:
    """A vector with a smaller residual, or None if the damped step does not lead to one.

    The step follows the curve of the model to second order: along it the predictions bend by
    the acceleration found from one more solve, a tenth of the step ahead.
    """
    step, ahead = plane.step(damping, plane.residual), 0.1
    if plane.length(step) > 1e-6 * float(seen.norm()):  # a shorter one drowns in rounding
        residual = _residual(model, vector + ahead * step, keep, seen)
        if residual is None:
            return None
        bend = 2 / ahead * ((residual - plane.residual) / ahead - plane.matrix @ step)
        correction = 0.5 * plane.step(damping, bend)
        if plane.length(correction) > 0.375 * plane.length(step):
            return None  # the curve bends away too soon: a shorter step is wanted
        step = step + correction
    moved = vector + step
    residual = _residual(model, moved, keep, seen)
    better = residual is not None and residual.square().sum() < plane.residual.square().sum()
    return moved if better else None


def _residual(model: Model, vector: Tensor, keep: Tensor, seen: Tensor) -> Tensor | None:
    try:
        return model.predict(vector)[keep] - seen
    except SolverError:
        return None


class _Tangent:
    """The linear problem at one vector, each column scaled to length one."""

    def __init__(self, matrix: Tensor, residual: Tensor, precision: float) -> None:
        norms = matrix.norm(dim=0)
        self.matrix, self.residual = matrix, residual
        self.scale = torch.where(norms > 0, norms, torch.ones_like(norms))
        self.left, self.singular, self.right = torch.linalg.svd(
            matrix / self.scale, full_matrices=False
        )
        limit = max(matrix.shape) * precision
        self.seen = self.singular > limit * self.singular.max().clamp_min(limit)
        self.removable = float((self.left.T @ residual)[self.seen].norm())

    def step(self, damping: float, target: Tensor) -> Tensor:
        """The step that takes ``target`` (M,) off the predictions, damped."""
        along = self.singular / (self.singular.square() + damping) * (self.left.T @ target)
        return -(self.right.T @ along) / self.scale

    def length(self, step: Tensor) -> float:
        return float((step * self.scale).norm())

    def covariance(self) -> Tensor:
        """(J^T J)^-1; infinite for what the data leave free."""
        directions = self.right[self.seen] / self.scale
        weights = self.singular[self.seen].reciprocal()
        known = (directions * weights[:, None]).T @ (directions * weights[:, None])
        free = 1.0 - self.right[self.seen].square().sum(0)  # part of each axis that is not seen
        return known + torch.diag(torch.where(free > 1e-8, torch.inf, 0.0))


def _result(
    model: Model,
    vector: Tensor,
    predicted: Tensor,
    plane: _Tangent,
    history: list[float],
    converged: bool,
    trials: int,
    noise_std: float | None,
    observations: Tensor,
) -> FitResult:
    # A row that no parameter moves and that fits exactly is y0 itself, not a measurement of it.
    rows = (plane.matrix.abs().sum(1) > 0) | (plane.residual != 0)
    freedom = int(rows.sum()) - len(vector)
    if noise_std is not None:
        variance = noise_std**2
    else:
        variance = history[-1] / freedom if freedom > 0 else float("inf")
    covariance = plane.covariance()
    spread = covariance * variance
    spread = torch.where(covariance == 0, 0.0, spread)  # inf times zero
    pieces, errors = model.split(vector), model.split(spread.diagonal().sqrt())
    model.load(vector)
    like = {name: model.parameters.get(name, model.y0) for name in pieces}
    parameters = {name: piece.to(like[name].dtype) for name, piece in pieces.items()}
    return FitResult(
        field=model.field,
        parameters=parameters,
        standard_errors={name: errors[name].to(like[name].dtype) for name in pieces},
        residual=history[-1],
        converged=converged,
        equation=_equation(model.field, parameters),
        prediction=predicted.to(observations.dtype),
        jacobian=plane.matrix,
        covariance=spread,
        iterations=trials,
        history=history,
    )


def _equation(field: nn.Module, parameters: dict[str, Tensor]) -> str:
    written = getattr(field, "equation", None)
    if callable(written):
        return str(written())
    return "\n".join(
        f"{name} = {value.tolist():.4g}" if not value.dim() else f"{name} = {value.tolist()}"
        for name, value in parameters.items()
    )
