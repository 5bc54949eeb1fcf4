"""The logistic distribution, which torch.distributions lacks."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints
from torch.distributions.utils import broadcast_all
from torch.nn import functional as F

from lib._common import noise_source, values_readable

__all__ = ["Logistic", "draw_logistic", "standard_logistic_log_prob"]

Shape = torch.Size | list[int] | tuple[int, ...]


def standard_logistic_log_prob(z: Tensor) -> Tensor:
    """log p(z) = -z - 2 log(1 + e^-z), in nats, exact in both tails."""
    return F.logsigmoid(z) + F.logsigmoid(-z)


def draw_logistic(
    shape: torch.Size,
    *,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw log u - log(1 - u) for uniform u, whose least value 0 counts as the next, eps / 2."""
    u = torch.rand(shape, dtype=dtype, **noise_source(device, generator))
    return u.clamp_(min=torch.finfo(dtype).eps / 2).logit_()


def _as_float(value: Tensor | float) -> Tensor | float:
    if isinstance(value, Tensor) and not value.is_floating_point():
        return value.to(torch.get_default_dtype())
    return value


class Logistic(Distribution):
    """The logistic distribution with a location and a scale.

    log p(z) = -y - 2 log(1 + e^-y) - log scale, y = (z - loc) / scale

    Its tails fall as e^-|y|, slower than the normal's; its variance is (pi scale)^2 / 3 and its
    entropy 2 + log scale nats.

    Args:
        loc: the mean, any shape; integers are cast to the default dtype.
        scale: positive, broadcast against ``loc``.
        validate_args: as in torch.distributions.

    Raises:
        ValueError: if ``scale`` is not positive, a value is not a real number, or a probability
            is not in [0, 1].
        TypeError: if the probabilities are no tensor.

    Source: chapter `nice`, eq-nice-logistic; Dinh, Krueger and Bengio (2015).

    >>> prior = Logistic(torch.tensor(0.0), torch.tensor(1.0))
    >>> prior.log_prob(torch.tensor(0.0)).exp().item()
    0.25
    >>> prior.cdf(torch.tensor(0.0)).item(), round(prior.entropy().item(), 6)
    (0.5, 2.0)
    """

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive}  # noqa: RUF012
    support = constraints.real
    has_rsample = True

    def __init__(
        self,
        loc: Tensor | float,
        scale: Tensor | float,
        *,
        validate_args: bool | None = None,
    ) -> None:
        # integers would cut a scale of 1.5 to 1
        self.loc, self.scale = broadcast_all(_as_float(loc), _as_float(scale))
        super().__init__(self.loc.shape, validate_args=validate_args)

    @property
    def mean(self) -> Tensor:
        """The location."""
        return self.loc

    @property
    def mode(self) -> Tensor:
        """The location."""
        return self.loc

    @property
    def variance(self) -> Tensor:
        """(pi scale)^2 / 3."""
        return (math.pi * self.scale).square() / 3

    def expand(self, batch_shape: Shape, _instance: Distribution | None = None) -> Logistic:
        """The same distribution with parameters expanded to ``batch_shape``."""
        new = self._get_checked_instance(Logistic, _instance)
        new.loc = self.loc.expand(batch_shape)
        new.scale = self.scale.expand(batch_shape)
        Distribution.__init__(new, torch.Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    def rsample(self, sample_shape: Shape = ()) -> Tensor:
        """Reparametrised draws of shape ``sample_shape + batch_shape``."""
        shape = self._extended_shape(torch.Size(sample_shape))
        noise = draw_logistic(shape, dtype=self.loc.dtype, device=self.loc.device)
        return self.loc + self.scale * noise

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of ``value`` in nats."""
        if self._validate_args:
            self._validate_sample(value)
        return standard_logistic_log_prob((value - self.loc) / self.scale) - self.scale.log()

    def cdf(self, value: Tensor) -> Tensor:
        """The sigmoid of (value - loc) / scale."""
        if self._validate_args:
            self._validate_sample(value)
        return torch.sigmoid((value - self.loc) / self.scale)

    def icdf(self, value: Tensor) -> Tensor:
        """loc + scale logit(value), for probabilities ``value``."""
        if not isinstance(value, Tensor):
            raise TypeError(f"value must be a tensor of probabilities, got {type(value).__name__}")
        if self._validate_args and values_readable(value):
            bad = int((~constraints.unit_interval.check(value)).sum())
            if bad:
                raise ValueError(f"value must hold probabilities, got {bad} outside 0 .. 1 or NaN")
        return self.loc + self.scale * torch.logit(value)

    def entropy(self) -> Tensor:
        """2 + log scale, in nats."""
        return 2 + self.scale.log()
