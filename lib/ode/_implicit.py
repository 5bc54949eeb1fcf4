"""Implicit one-step methods for stiff fields, solved by Newton's iteration."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lib._common import is_transformed

from ._errors import NewtonError
from ._methods import METHODS, Field

__all__ = ["Theta", "as_real", "jacobian", "solve_blocks"]


def jacobian(func: Field, t: Tensor, y: Tensor, *, blocks: bool) -> tuple[Tensor, Tensor]:
    """The slope of ``func`` at ``y`` and its derivative by the state.

    Args:
        func: the field.
        t: the time.
        y: the state, any shape.
        blocks: whether the leading axes of ``y`` are independent samples; else all of ``y`` is one.

    Returns:
        The slope, of the shape of ``y``, and the Jacobian (M, D, D): M samples of size D.
    """
    size = y.shape[-1] if blocks else y.numel()
    columns = torch.eye(size, dtype=y.dtype, device=y.device)
    if blocks:
        columns = columns.reshape(size, *[1] * (y.dim() - 1), size).expand(size, *y.shape)
    else:
        columns = columns.reshape(size, *y.shape)
    if is_transformed() or torch.is_inference_mode_enabled():  # autograd is not at work there
        slope, pull = torch.func.vjp(lambda state: func(t, state), y)  # type: ignore[misc]
        (rows,) = torch.func.vmap(pull)(columns)
    else:
        with torch.enable_grad():
            state = y.detach().requires_grad_()
            slope = func(t, state)
            rows = _products(slope, state, columns)
    return slope, rows.reshape(size, -1, size).transpose(0, 1)


def _products(slope: Tensor, state: Tensor, columns: Tensor) -> Tensor:
    """Every column times the derivative of ``slope`` by ``state``, (D, *state.shape).

    For a few, the gradient of a sum is asked for, because the first gradient of anything but a
    scalar costs seconds, as does the first vmap: torch then loads what it compiles with.
    """
    if not slope.requires_grad:
        return torch.zeros_like(columns)
    if len(columns) > 8:
        batch = torch.autograd.grad(
            slope, state, columns, is_grads_batched=True, allow_unused=True
        )[0]
        return torch.zeros_like(columns) if batch is None else batch
    rows = []
    for column in columns:
        row = torch.autograd.grad(
            (slope * column).sum(), state, retain_graph=True, allow_unused=True
        )[0]
        rows.append(torch.zeros_like(state) if row is None else row)
    return torch.stack(rows)


def as_real(func: Field) -> Field:
    """The field of the real and imaginary parts, a last axis of two."""

    def field(t: Tensor, parts: Tensor) -> Tensor:
        return torch.view_as_real(func(t, torch.view_as_complex(parts)).resolve_conj())

    return field


class Theta:
    """The implicit step through one point inside the step.

    z = y + theta dt f(t + theta dt, z),    y_next = y + (z - y) / theta.

    Theta 1/2 is the implicit midpoint rule (order 2, keeps quadratic invariants, damps no
    oscillation); theta 1 is the backward Euler method (order 1, kills what decays fast).

    Newton's iteration runs without a graph. Two last steps with the matrix held fixed carry the
    gradient: the first makes first derivatives those of the implicit function, the second the
    second ones. Under vmap or compile, where no value may be looked at, the iteration takes eight
    rounds, and what has not converged by then becomes NaN.

    Source: chapter `ode`, eq-ode-implicit-midpoint.
    """

    explicit = False
    max_iterations = 25

    def __init__(self, name: str, order: int, theta: float) -> None:
        self.name, self.order, self.theta = name, order, theta
        self.nodes: tuple[float, ...] = (theta,)
        self.scales: tuple[float, ...] = (theta,)

    def __repr__(self) -> str:
        return f"Theta({self.name!r}, order={self.order}, theta={self.theta})"

    def advance(
        self, func: Field, times: Sequence[Tensor], scales: Sequence[Tensor], y: Tensor
    ) -> Tensor:
        if y.is_complex():
            parts = torch.view_as_real(y.resolve_conj())
            ahead = self.advance(as_real(func), times, [scales[0].real], parts)
            return torch.view_as_complex(ahead)
        if not y.numel():
            return y
        z, matrix = self.newton(func, times[0], scales[0], y)
        for _ in range(2):
            z = z - solve_blocks(matrix, z - y - scales[0] * func(times[0], z))
        return y + (z - y) / self.theta

    def newton(self, func: Field, t: Tensor, scale: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The inner point and the matrix I - theta dt J there, both without a graph."""
        t, scale, y = t.detach(), scale.detach(), y.detach()
        blind = is_transformed()  # under vmap or compile no value may be looked at
        tolerance, tiny = torch.finfo(y.dtype).eps ** 0.5, torch.finfo(y.dtype).tiny
        z = y
        with torch.no_grad():
            for _ in range(8 if blind else self.max_iterations):
                slope, matrix = self._linear(func, t, scale, z)
                change = solve_blocks(matrix, z - y - scale * slope)
                z = z - change
                near = z.abs()
                size = (change.abs() / (near + near.max().clamp(tiny, 1.0))).max()
                if not blind and not size > tolerance:  # also where it is not a number:
                    return z, matrix  # what is not finite the driver reports
        if blind:
            return torch.where(size <= tolerance, z, torch.nan), matrix
        raise NewtonError(
            f"{self.name}: Newton's iteration did not converge in {self.max_iterations} rounds; "
            "try a smaller step_size"
        )

    def matrix(self, func: Field, t: Tensor, scale: Tensor, z: Tensor) -> Tensor:
        """I - scale df/dy at ``z``, in blocks (M, D, D)."""
        return self._linear(func, t, scale, z)[1]

    def _linear(self, func: Field, t: Tensor, scale: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        blocks = bool(getattr(func, "pointwise", False)) and z.dim() > 0
        slope, derivative = jacobian(func, t, z, blocks=blocks)
        identity = torch.eye(derivative.shape[-1], dtype=z.dtype, device=z.device)
        return slope.detach(), identity - scale * derivative.detach()


def solve_blocks(matrix: Tensor, right: Tensor) -> Tensor:
    """Solve block by block; ``matrix`` (M, D, D), ``right`` of any shape with M D elements."""
    columns = right.reshape(matrix.shape[0], -1, 1)
    return torch.linalg.solve_ex(matrix, columns)[0].reshape(right.shape)


METHODS["implicit_midpoint"] = Theta("implicit_midpoint", 2, 0.5)
METHODS["implicit_euler"] = Theta("implicit_euler", 1, 1.0)
