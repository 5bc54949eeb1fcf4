"""Runge-Kutta methods as tableaus, and the one step they all share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["METHODS", "Field", "Method", "Tableau"]

_Pair = tuple[int, int]
Field = Callable[[Tensor, Tensor], Tensor]


class Method(Protocol):
    """What the drivers need to know of a one-step method.

    ``nodes`` are the fractions of the step at which the field is evaluated, ``scales`` the
    multiples of the step that multiply a slope; ``advance`` receives both as tensors, the nodes
    as times, so that the same code takes one step or, with a leading axis, all steps at once.
    """

    name: str
    order: int
    explicit: bool
    nodes: tuple[float, ...]
    scales: tuple[float, ...]

    def advance(
        self, func: Field, times: Sequence[Tensor], scales: Sequence[Tensor], y: Tensor
    ) -> Tensor: ...


class Tableau:
    """An explicit Runge-Kutta method.

    slope_i = f(t + c_i dt, y + dt sum_j a_ij slope_j),    y_next = y + dt sum_i b_i slope_i.

    Args:
        name: what ``odeint`` calls it.
        order: the error of one step is O(dt^(order + 1)).
        a: the rows of the strictly lower triangular matrix, without the empty first one.
        b: the weights of the slopes.
        c: the nodes; each is the sum of its row of ``a``.
        error: weights of the difference to an embedded method of lower order.
        dense: weights of the last coefficient of the continuous extension.

    Source: chapter `ode`, eq-ode-runge-kutta.

    >>> METHODS["rk4"].b
    (0.16666666666666666, 0.3333333333333333, 0.3333333333333333, 0.16666666666666666)
    """

    explicit = True

    def __init__(
        self,
        name: str,
        order: int,
        a: Sequence[Sequence[float]],
        b: Sequence[float],
        c: Sequence[float],
        *,
        error: Sequence[float] = (),
        dense: Sequence[float] = (),
    ) -> None:
        self.name, self.order = name, order
        self.a = ((), *(tuple(row) for row in a))
        self.b, self.c = tuple(b), tuple(c)
        self.error, self.dense = tuple(error), tuple(dense)
        self.nodes = tuple(sorted(set(self.c)))
        # Each distinct multiple of dt is formed once a step; a slope with weight zero not at all.
        self.scales = tuple(sorted({x for row in (*self.a, self.b) for x in row if x}))
        self._weights = self._pairs(self.b)
        used = 1 + max(j for j, weight in enumerate(self.b) if weight)
        self._stages = [  # a last stage may serve the error estimate alone
            (self.nodes.index(node), *self._pairs(row))
            for node, row in zip(self.c[1:used], self.a[1:used], strict=True)
        ]

    def __repr__(self) -> str:
        return f"Tableau({self.name!r}, order={self.order}, stages={len(self.b)})"

    def _pairs(self, row: Sequence[float]) -> tuple[_Pair, tuple[_Pair, ...]]:
        """The slopes with a weight, each with the number of its weight among the scales."""
        first, *rest = [(j, self.scales.index(x)) for j, x in enumerate(row) if x]
        return first, tuple(rest)

    def advance(
        self, func: Field, times: Sequence[Tensor], scales: Sequence[Tensor], y: Tensor
    ) -> Tensor:
        """One step: ``times`` belong to ``nodes``, ``scales`` are the multiples of dt."""
        slopes = [func(times[0], y)]
        for node, (j, scale), rest in self._stages:
            state = torch.addcmul(y, slopes[j], scales[scale])
            for j, scale in rest:
                state = torch.addcmul(state, slopes[j], scales[scale])
            slopes.append(func(times[node], state))
        # The increment is summed before it meets y, so that y is rounded once a step.
        (j, scale), rest = self._weights
        increment = slopes[j] * scales[scale]
        for j, scale in rest:
            increment = torch.addcmul(increment, slopes[j], scales[scale])
        return y + increment


_DORMAND_PRINCE = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
)
_FIFTH = (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)
_FOURTH = (5179 / 57600, 0.0, 7571 / 16695, 393 / 640, -92097 / 339200, 187 / 2100, 1 / 40)
_DENSE = (  # Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, II.6
    -12715105075 / 11282082432,
    0.0,
    87487479700 / 32700410799,
    -10690763975 / 1880347072,
    701980252875 / 199316789632,
    -1453857185 / 822651844,
    69997945 / 29380423,
)

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Tableau("euler", 1, (), (1.0,), (0.0,)),
        Tableau("midpoint", 2, [(1 / 2,)], (0.0, 1.0), (0.0, 1 / 2)),
        Tableau("heun", 2, [(1.0,)], (1 / 2, 1 / 2), (0.0, 1.0)),
        Tableau("heun2", 2, [(1.0,)], (1 / 2, 1 / 2), (0.0, 1.0)),
        Tableau("heun3", 3, [(1 / 3,), (0.0, 2 / 3)], (1 / 4, 0.0, 3 / 4), (0.0, 1 / 3, 2 / 3)),
        Tableau(
            "rk4",
            4,
            [(1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)],
            (1 / 6, 1 / 3, 1 / 3, 1 / 6),
            (0.0, 1 / 2, 1 / 2, 1.0),
        ),
        Tableau(
            "rk4_38",
            4,
            [(1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)],
            (1 / 8, 3 / 8, 3 / 8, 1 / 8),
            (0.0, 1 / 3, 2 / 3, 1.0),
        ),
        Tableau(
            "dopri5",
            5,
            [*_DORMAND_PRINCE, _FIFTH],
            (*_FIFTH, 0.0),
            (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
            error=[high - low for high, low in zip((*_FIFTH, 0.0), _FOURTH, strict=True)],
            dense=_DENSE,
        ),
    )
}
