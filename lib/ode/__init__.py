"""Differential equations: solvers that are recurrent networks, and networks that are solvers.

>>> import torch
>>> from lib.ode import odeint
>>> odeint(lambda t, y: -y, torch.tensor([1.0]), torch.tensor([0.0, 1.0]), step_size=0.1)
tensor([[1.0000],
        [0.3679]])
"""

from __future__ import annotations

from ._adjoint import odeint_adjoint
from ._errors import (
    FieldError,
    NewtonError,
    NonFiniteError,
    SolverError,
    StepLimitError,
    StepUnderflowError,
    TimeOrderError,
)
from ._fields import LogisticGrowth, LotkaVolterraCompetition, PredatorPrey
from ._fit import FitResult, fit
from ._implicit import Theta
from ._methods import METHODS, Tableau
from ._rnn import ODERNN
from ._solve import odeint, step

__all__ = [
    "METHODS",
    "ODERNN",
    "FieldError",
    "FitResult",
    "LogisticGrowth",
    "LotkaVolterraCompetition",
    "NewtonError",
    "NonFiniteError",
    "PredatorPrey",
    "SolverError",
    "StepLimitError",
    "StepUnderflowError",
    "Tableau",
    "Theta",
    "TimeOrderError",
    "fit",
    "odeint",
    "odeint_adjoint",
    "step",
]
