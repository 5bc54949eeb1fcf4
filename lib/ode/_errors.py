"""What a solver raises, always with the time it reached and the last good state."""

from __future__ import annotations

from typing import Self

from torch import Tensor

__all__ = [
    "FieldError",
    "NewtonError",
    "NonFiniteError",
    "SolverError",
    "StepLimitError",
    "StepUnderflowError",
    "TimeOrderError",
]


class SolverError(RuntimeError):
    """A solve that cannot go on.

    Attributes:
        t: the time reached, a float, or None where the times cannot be read.
        y: the state there, good and detached, in the shape of ``y0`` (a tuple if it was one).

    >>> import torch
    >>> from lib.ode import odeint
    >>> try:
    ...     odeint(lambda t, y: y * y, torch.ones(1), torch.linspace(0, 20, 21), method="euler")
    ... except SolverError as error:
    ...     print(type(error).__name__, error.t, error.y)
    NonFiniteError 7.0 tensor([1.1342e+26])
    """

    def __init__(
        self,
        message: str,
        *,
        t: float | None = None,
        y: Tensor | tuple[Tensor, ...] | None = None,
    ) -> None:
        super().__init__(message)
        self.t = t
        self.y = y

    def __str__(self) -> str:
        reached = "" if self.t is None else f" (reached t = {self.t:.6g}; the state there is in .y)"
        return super().__str__() + reached

    def at(self, t: float | None, y: Tensor) -> Self:
        """This error, with the time and state it leaves behind."""
        self.t, self.y = t, y.detach()
        return self


class NonFiniteError(SolverError, FloatingPointError):
    """The field or the state became infinite or not a number."""


class StepUnderflowError(SolverError):
    """The adaptive step became smaller than the spacing of floating-point times."""


class StepLimitError(SolverError):
    """The adaptive solver used up ``max_num_steps`` before the last time."""


class NewtonError(SolverError):
    """The equations of an implicit step could not be solved."""


class FieldError(SolverError, ValueError):
    """The field returned something that is not the derivative of its state."""


class TimeOrderError(SolverError, ValueError):
    """The requested times are not strictly increasing or strictly decreasing."""
