"""Fields of ecology whose parameters can be learned and read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ._methods import Field
from ._problem import Prepared

__all__ = ["LogisticGrowth", "LotkaVolterraCompetition", "PredatorPrey"]

Numbers = Tensor | Sequence[float] | float


class _PerCapita(Prepared):
    """dy_i/dt = y_i (rate_i + sum_j interaction_ij y_j): each species grows per head.

    ``pointwise`` says that leading axes are samples, so that ``odeint`` may take the Jacobians of
    all steps at once; set it to False on an instance to differentiate a gradient again.
    """

    pointwise = True
    species: int

    def coefficients(self) -> tuple[Tensor, Tensor]:
        """The rates (D,) and the interactions (D, D)."""
        raise NotImplementedError

    def prepared(self, y: Tensor) -> Field:
        rate, interaction = (c.to(y.dtype) for c in self.coefficients())
        if y.dim() == 0 or y.shape[-1] != self.species:
            raise ValueError(
                f"y must have {self.species} species on its last axis, got {tuple(y.shape)}"
            )
        transposed = interaction.T.contiguous()
        if y.is_complex() or torch.is_autocast_enabled(y.device.type):
            return lambda t, y: y * (rate + (y[..., None] * transposed).sum(-2))

        def field(t: Tensor, y: Tensor) -> Tensor:
            if y.dim() == 2:
                return y * torch.addmm(rate, y, transposed)
            if y.dim() == 1:
                return y * torch.addmv(rate, interaction, y)
            heads = torch.addmm(rate, y.reshape(-1, y.shape[-1]), transposed)
            return y * heads.view(y.shape)

        return field


class LotkaVolterraCompetition(_PerCapita):
    """Two species that compete for one resource.

    dx1/dt = r1 x1 (1 - x1 / N1) - a1 x1 x2,    dx2/dt = r2 x2 (1 - x2 / N2) - a2 x1 x2.

    Args:
        growth: r (2,), the rates of growth of a small population, per unit of time.
        competition: a (2,), the loss of each by the other.
        inverse_capacity: 1 / N (2,); the inverse, so that zero means no limit.

    The three are parameters of these names. ``forward(t, y)`` takes states (..., 2).

    Source: chapter `ode`, eq-ode-competition; Volterra (1926).

    >>> field = LotkaVolterraCompetition((0.1, 0.3), (1e-4, 2e-4), (0.002, 0.003))
    >>> field(torch.tensor(0.0), torch.tensor([375.0, 250.0])).abs().max() < 1e-5
    tensor(True)
    """

    species = 2

    def __init__(self, growth: Numbers, competition: Numbers, inverse_capacity: Numbers) -> None:
        super().__init__()
        self.growth = _parameter("growth", growth, (2,))
        self.competition = _parameter("competition", competition, (2,))
        self.inverse_capacity = _parameter("inverse_capacity", inverse_capacity, (2,))

    def coefficients(self) -> tuple[Tensor, Tensor]:
        own = self.growth * self.inverse_capacity
        row1 = torch.stack([own[0], self.competition[0]])
        row2 = torch.stack([self.competition[1], own[1]])
        return self.growth, -torch.stack([row1, row2])

    def equation(self) -> str:
        """The two equations with the present parameters."""
        r, a, n = self.growth.tolist(), self.competition.tolist(), self.inverse_capacity.tolist()
        return "\n".join(
            f"dx{i + 1}/dt = {_number(r[i])} x{i + 1} (1{_term(-n[i], f'x{i + 1}')})"
            f"{_term(-a[i], 'x1 x2')}"
            for i in range(2)
        )


class PredatorPrey(_PerCapita):
    """A prey x and its predator z, after Lotka and Volterra.

    dx/dt = x (growth - predation z),    dz/dt = z (reproduction x - mortality).

    Args:
        growth: of the prey alone, per unit of time.
        predation: loss of prey for each predator.
        reproduction: gain of predators for each prey.
        mortality: of the predators alone.

    The four are scalar parameters of these names. ``forward(t, y)`` takes states (..., 2).

    Source: chapter `ode`; Lotka (1925), Volterra (1926).

    >>> field = PredatorPrey(0.5, 0.025, 0.025, 0.8)
    >>> field(torch.tensor(0.0), torch.tensor([32.0, 20.0])).abs().max() < 1e-6
    tensor(True)
    """

    species = 2

    def __init__(
        self, growth: Numbers, predation: Numbers, reproduction: Numbers, mortality: Numbers
    ) -> None:
        super().__init__()
        self.growth = _parameter("growth", growth, ())
        self.predation = _parameter("predation", predation, ())
        self.reproduction = _parameter("reproduction", reproduction, ())
        self.mortality = _parameter("mortality", mortality, ())

    def coefficients(self) -> tuple[Tensor, Tensor]:
        none = torch.zeros_like(self.growth)
        rate = torch.stack([self.growth, -self.mortality])
        prey = torch.stack([none, -self.predation])
        predator = torch.stack([self.reproduction, none])
        return rate, torch.stack([prey, predator])

    def equation(self) -> str:
        """The two equations with the present parameters."""
        return (
            f"dx1/dt = x1 ({_number(self.growth.item())}{_term(-self.predation.item(), 'x2')})\n"
            f"dx2/dt = x2 ({_number(-self.mortality.item())}"
            f"{_term(self.reproduction.item(), 'x1')})"
        )


class LogisticGrowth(Prepared):
    """One species that fills its space: dy/dt = growth y (1 - inverse_capacity y).

    Args:
        growth: the rate of a small population, per unit of time.
        inverse_capacity: 1 / N, where N is the population in the end.

    The two are scalar parameters of these names. ``forward(t, y)`` takes states of any shape.

    Source: chapter `ode`, eq-ode-logistic; Verhulst (1838).

    >>> LogisticGrowth(0.5, 1 / 64)(torch.tensor(0.0), torch.tensor([0.0, 32.0, 64.0])).tolist()
    [0.0, 8.0, 0.0]
    """

    pointwise = True

    def __init__(self, growth: Numbers, inverse_capacity: Numbers) -> None:
        super().__init__()
        self.growth = _parameter("growth", growth, ())
        self.inverse_capacity = _parameter("inverse_capacity", inverse_capacity, ())

    def prepared(self, y: Tensor) -> Field:
        rate = self.growth.to(y.dtype)
        own = -rate * self.inverse_capacity.to(y.dtype)
        return lambda t, y: y * torch.addcmul(rate, y, own)

    def equation(self) -> str:
        """The equation with the present parameters."""
        limit = _term(-self.inverse_capacity.item(), "y")
        return f"dy/dt = {_number(self.growth.item())} y (1{limit})"


def _parameter(name: str, value: Numbers, shape: tuple[int, ...]) -> nn.Parameter:
    given = value.detach().clone() if isinstance(value, Tensor) else torch.tensor(value)
    if not given.is_floating_point():
        given = given.to(torch.get_default_dtype())
    if tuple(given.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(given.shape)}")
    if not bool(given.isfinite().all()):
        raise ValueError(f"{name} must be finite, got {given.tolist()}")
    return nn.Parameter(given)


def _number(value: float) -> str:
    return f"{value:.4g}"


def _term(value: float, unit: str) -> str:
    """`` + 0.5 x`` or `` - 0.5 x``."""
    return f" {'-' if value < 0 else '+'} {abs(value):.4g} {unit}"
