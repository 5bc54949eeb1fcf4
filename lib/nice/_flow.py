"""NICE: couplings that swap roles, one scaling, and a factorised prior."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal, Transform, constraints

from lib._common import check_positive, noise_source
from lib.nice._coupling import (
    AdditiveCoupling,
    AffineCoupling,
    Coupling,
    Scaling,
    join,
    split,
)
from lib.nice._door import enter, require_finite
from lib.nice._linear import ColumnLinear
from lib.nice._prior import Logistic, draw_logistic, standard_logistic_log_prob

__all__ = ["NICE", "FlowTransform"]

_COUPLINGS = {"additive": AdditiveCoupling, "affine": AffineCoupling}


class NICE(nn.Module):
    """A density whose logarithm is exact, whose samples cost one pass, and whose inverse is known.

    log p(x) = sum_i log p_Z(z_i) + log |det dz/dx|,  z = f(x)

    f is a stack of couplings, in which the even and the odd coordinates take turns to move, and a
    scaling. With additive couplings the scaling alone changes volume. Three couplings are the
    fewest in which every output depends on every input (two if D = 2).

    Args:
        dim: D, even.
        num_couplings: number of couplings.
        hidden: width of the hidden layers in each coupling's network.
        num_hidden: their number.
        prior: ``"logistic"`` or ``"normal"``, standard and independent in each coordinate.
        coupling: ``"additive"`` (NICE) or ``"affine"`` (RealNVP).
        linear: makes each linear layer from (inputs, outputs); the default is ``nn.Linear`` with a
            faster product for small batches, ``OneDNNLinear`` is faster on some CPUs.
        validate_args: refuse NaN and infinite points, at the price of one sum.

    Shapes are (..., D) for points and (...,) for log-densities. Half precision is raised to
    float32 outside the networks, inside autocast too. ``torch.func.vmap``, ``torch.func.grad`` and
    ``torch.compile(fullgraph=True)`` work; there the check of the values is skipped.

    Raises:
        ValueError: if ``dim`` is odd, or points are not (..., D) or not finite.
        TypeError: if points are not floating-point, or more precise than the parameters.

    Source: chapter `nice`, eq-nice-density; Dinh, Krueger and Bengio (2015).

    >>> flow = NICE(6, hidden=16, num_hidden=2)
    >>> x = torch.rand(5, 6, generator=torch.Generator().manual_seed(0))
    >>> z, log_abs_det = flow(x)
    >>> z.shape, log_abs_det.shape, flow.log_prob(x).shape
    (torch.Size([5, 6]), torch.Size([5]), torch.Size([5]))
    >>> torch.allclose(flow.inverse(z), x, atol=1e-6)
    True
    >>> sum(p.numel() for p in NICE(784).parameters())
    19158352
    """

    couplings: Sequence[Coupling]  # an nn.ModuleList, but its elements have a type

    def __init__(
        self,
        dim: int,
        *,
        num_couplings: int = 4,
        hidden: int = 1000,
        num_hidden: int = 5,
        prior: Literal["logistic", "normal"] = "logistic",
        coupling: Literal["additive", "affine"] = "additive",
        linear: Callable[..., nn.Module] = ColumnLinear,
        validate_args: bool = True,
    ) -> None:
        check_positive(num_couplings, "num_couplings")
        if prior not in ("logistic", "normal"):
            raise ValueError(f'prior must be "logistic" or "normal", got {prior!r}')
        if coupling not in tuple(_COUPLINGS):
            raise ValueError(f'coupling must be "additive" or "affine", got {coupling!r}')
        super().__init__()
        self.dim, self._prior = dim, prior
        self._validate_args = validate_args
        layer = _COUPLINGS[coupling]
        self.couplings = nn.ModuleList(  # type: ignore[assignment]
            layer(dim, swap=i % 2 == 1, hidden=hidden, num_hidden=num_hidden, linear=linear)
            for i in range(num_couplings)
        )
        self.scaling = Scaling(dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Data to noise: x (..., D) -> (z (..., D), log |det dz/dx| (...,))."""
        even, odd, log_abs_det = self._couple(x)
        z, change = self.scaling.stretch(join(even, odd))
        return z, log_abs_det + change

    def inverse(self, z: Tensor) -> Tensor:
        """Noise to data: the x (..., D) that ``forward`` maps to ``z``."""
        even, odd = split(self.scaling.shrink(self._enter(z, "z")))
        for coupling in reversed(self.couplings):
            even, odd = coupling.uncouple(even, odd)
        return join(even, odd)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density of x (..., D) in nats, shape (...,)."""
        even, odd, log_prob = self._couple(x)
        # coordinates of z are independent, so the halves need not be joined
        for half, part in ((even, slice(0, None, 2)), (odd, slice(1, None, 2))):
            z, change = self.scaling.stretch(half, part)
            log_prob = log_prob + change + self._log_prior(z)
        return log_prob

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Set the last shifts and the scaling so that ``x`` (B, D) arrives like the prior.

        Each z_i gets mean 0 (with a single coupling, half of them) and the prior's standard
        deviation on this batch, the maximum-likelihood scaling for a normal prior. Call it once,
        before training, with some thousand points: where coordinates differ much in scale, as
        pixels do, it saves thousands of steps. The idea is that of actnorm (Kingma and Dhariwal,
        2018).

        Raises:
            ValueError: if there are fewer than two points, if they are not finite, or if a
                coordinate of z is constant or overflows; the flow is then left as it was.
            TypeError: if the network of one of the last two couplings does not end in a bias.
        """
        x = enter(x, self.dim, self.scaling.log_scale.dtype, "x")
        require_finite(x, "x")
        if x.dim() != 2 or len(x) < 2:
            raise ValueError(
                f"x must hold two points or more, (B, {self.dim}), got {tuple(x.shape)}"
            )
        log_scale, last = self.scaling.log_scale, list(self.couplings)[-2:]
        shifts = [coupling.last_shift() for coupling in last]
        before = [shift.clone() for shift in shifts]
        for coupling, shift in zip(last, shifts, strict=True):
            mean = self(x)[0].mean(0) * (-log_scale).exp()
            shift.sub_(mean[0::2] if coupling.swap else mean[1::2])
        deviation = self(x)[0].std(0, correction=0)
        rounding = 16 * torch.finfo(deviation.dtype).eps * x.abs().max() * log_scale.exp()
        constant, overflown = int((deviation <= rounding).sum()), int((~deviation.isfinite()).sum())
        if constant or overflown:
            for shift, value in zip(shifts, before, strict=True):
                shift.copy_(value)
            raise ValueError(
                f"{constant} coordinates of z are constant: dequantize adds the noise"
                if constant
                else f"{overflown} coordinates of z are beyond {deviation.dtype}: scale x down"
            )
        log_scale.add_((self.prior.stddev / deviation).log())

    @torch.no_grad()
    def sample(
        self, n: int, *, temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw n points (n, D): the inverse of ``temperature`` times a draw from the prior.

        Temperatures below 1 stay nearer to the mode; 0 is the image of the mode of the prior.
        """
        check_positive(n, "n")
        if not (isinstance(temperature, Real) and 0 <= temperature < math.inf):
            raise ValueError(
                f"temperature must be a finite number, at least 0, got {temperature!r}"
            )
        scale = self.scaling.log_scale
        dtype = torch.promote_types(scale.dtype, torch.float32)
        draw = draw_logistic if self._prior == "logistic" else torch.randn
        source = noise_source(scale.device, generator)
        z = draw(torch.Size((n, self.dim)), dtype=dtype, **source)
        return self.inverse(float(temperature) * z.to(scale.device))

    @property
    def prior(self) -> Distribution:
        """The distribution of z: D independent standard logistics or normals."""
        scale = self.scaling.log_scale
        dtype = torch.promote_types(scale.dtype, torch.float32)
        loc = torch.zeros(self.dim, dtype=dtype, device=scale.device)
        family = Logistic if self._prior == "logistic" else Normal
        return Independent(family(loc, torch.ones_like(loc)), 1)

    @property
    def transform(self) -> FlowTransform:
        """``forward`` as a ``torch.distributions.Transform``; ``.inv`` maps noise to data."""
        return FlowTransform(self)

    def extra_repr(self) -> str:
        """The values that ``repr`` shows."""
        return f"dim={self.dim}, prior={self._prior!r}"

    def _couple(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All couplings: x (..., D) -> both halves (..., D/2) and log |det| (...,)."""
        even, odd = split(self._enter(x, "x"))
        log_abs_det = even.new_zeros(even.shape[:-1])
        for coupling in self.couplings:
            even, odd, log_abs_det = coupling.couple(even, odd, log_abs_det)
        return even, odd, log_abs_det

    def _log_prior(self, z: Tensor) -> Tensor:
        if self._prior == "logistic":
            return standard_logistic_log_prob(z).sum(-1)
        return -0.5 * (torch.linalg.vecdot(z, z) + z.shape[-1] * math.log(2 * math.pi))

    def _enter(self, x: Tensor, name: str) -> Tensor:
        x = enter(x, self.dim, self.scaling.log_scale.dtype, name)
        if self._validate_args:
            require_finite(x, name)
        return x


class FlowTransform(Transform):
    """A flow in the vocabulary of torch.distributions, from data to noise.

    ``TransformedDistribution(flow.prior, [flow.transform.inv])`` is the density of the flow.

    Args:
        flow: the flow; its parameters are shared, not copied.
        cache_size: 0 or 1, as in torch.distributions; with 1 the last pair of points is kept,
            which is wrong once the parameters have changed.

    Source: chapter `nice`, section "In code".

    >>> from torch.distributions import TransformedDistribution
    >>> flow = NICE(4, hidden=8, num_hidden=1, prior="normal")
    >>> density = TransformedDistribution(flow.prior, [flow.transform.inv])
    >>> x = density.sample((3,))
    >>> torch.allclose(density.log_prob(x), flow.log_prob(x), atol=1e-5)
    True
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, flow: NICE, cache_size: int = 0) -> None:
        super().__init__(cache_size=cache_size)
        self.flow = flow

    def with_cache(self, cache_size: int = 1) -> FlowTransform:
        """The same transform with another cache size."""
        return self if cache_size == self._cache_size else FlowTransform(self.flow, cache_size)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FlowTransform) and other.flow is self.flow

    def __hash__(self) -> int:
        return hash(id(self.flow))

    def _call(self, x: Tensor) -> Tensor:
        return self.flow(x)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return self.flow.inverse(y)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """log |det dz/dx| (...,) at ``x`` (..., D); no second pass if couplings keep the volume."""
        if all(isinstance(coupling, AdditiveCoupling) for coupling in self.flow.couplings):
            log_scale = self.flow.scaling.log_scale
            x = enter(x, self.flow.dim, log_scale.dtype, "x")
            return log_scale.to(x.dtype).sum().expand(x.shape[:-1]).clone()
        return self.flow(x)[1]
