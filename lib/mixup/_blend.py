"""What all mixing shares: lambda, the partners, and lambda x + (1 - lambda) x[partner]."""

from __future__ import annotations

import math
from numbers import Real
from typing import Literal

import torch
from torch import Tensor

from lib._common import is_transformed, noise_source

__all__ = [
    "Pairing",
    "both_shares",
    "draw_beta",
    "draw_box",
    "draw_partner",
    "is_plain",
    "mix",
    "mix_labels",
    "partners",
    "share_memory",
]

Pairing = Literal["random", "halves"]

# Bytes mixed at a time in place on a CPU: enough to hide a call's overhead, few enough for a cache
_CHUNK = 1 << 20

_CPU = torch.device("cpu")  # where draws are made unless a generator says otherwise
_NUMBERS = (float, int, Real, Tensor)  # a union would be built anew in every call


def is_plain(x: Tensor) -> bool:
    """Whether x has numbers to read and memory to write: no autograd, no transform, no tracing."""
    return not (is_transformed() or (x.requires_grad and torch.is_grad_enabled()))


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether the storages of a and b overlap: one array can lie under many (``from_numpy``)."""
    first, second = a.untyped_storage(), b.untyped_storage()
    start, other = first.data_ptr(), second.data_ptr()
    return start < other + second.nbytes() and other < start + first.nbytes()


def draw_beta(alpha: float, n: int, generator: torch.Generator | None) -> Tensor:
    """Draws of Beta(alpha, alpha), (n,), in double precision."""
    if not isinstance(alpha, _NUMBERS):
        raise TypeError(f"alpha must be a number, got {alpha!r}")
    if not 0 <= alpha < math.inf:
        raise ValueError(f"alpha must be a finite number of at least 0, got {alpha}")
    source = noise_source(_CPU, generator)
    device = source["device"]
    if alpha == 0:
        return torch.ones(n, dtype=torch.float64, device=device)
    if alpha == 1:
        return torch.rand(n, dtype=torch.float64, **source)
    # Gamma(a) = Gamma(a + 1) U^(1/a), in logarithms: U^(1/a) underflows where a is small
    shape = torch.full((2, n), alpha + 1.0, dtype=torch.float64, device=device)
    log_gamma = torch._standard_gamma(shape, generator=generator).log()
    log_u = torch.rand(2, n, dtype=torch.float64, **source).neg().log1p()
    return torch.sigmoid(log_gamma[0] - log_gamma[1] + (log_u[0] - log_u[1]) / alpha)


def draw_partner(x: Tensor, pairing: Pairing, generator: torch.Generator | None) -> Tensor | None:
    """The partners as an index (B,), or None where the two halves of the batch change places."""
    if pairing == "halves":
        if len(x) % 2 == 0:
            return None
        return torch.arange(len(x), device=x.device).roll(-(len(x) // 2))
    if pairing == "random":
        return torch.randperm(len(x), **noise_source(_CPU, generator)).to(x.device)
    raise ValueError(f'pairing must be "random" or "halves", got {pairing!r}')


def partners(x: Tensor, partner: Tensor | None) -> Tensor:
    return x.roll(len(x) // 2, 0) if partner is None else x[partner]


def both_shares(weight: Tensor) -> Tensor:
    """An example's own share and its partner's, (n, 2)."""
    return torch.stack((weight, 1 - weight), 1)


def mix_labels(
    y: Tensor,
    num_classes: int | None,
    shares: Tensor,
    partner: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Mixed labels: floating point as they are, classes and multi-hot in at least float32."""
    if y.is_floating_point():
        return mix(y, shares, partner)
    dtype = dtype if dtype == torch.float64 else torch.float32
    if y.ndim > 1:
        return mix(y.to(dtype), shares, partner)
    own = y.long()
    both = torch.stack((own, partners(own, partner)), 1)  # (B, 2)
    soft = torch.zeros(len(y), num_classes or 0, dtype=dtype, device=y.device)
    add = Tensor.scatter_add_ if is_plain(y) else Tensor.scatter_add
    return add(soft, 1, both, shares.to(y.device, dtype).expand(len(y), 2))


def mix(x: Tensor, shares: Tensor, partner: Tensor | None, out: Tensor | None = None) -> Tensor:
    """own share x + other share x[partner]; ``shares`` are (1, 2), or (B, 2)."""
    shares = shares.to(x.device, x.dtype).reshape(-1, 2, *[1] * (x.ndim - 1))
    own = shares[:, 0]
    if out is None and not is_plain(x):
        return torch.lerp(partners(x, partner), x, own)
    if out is not None and share_memory(x, out):
        same = out.data_ptr() == x.data_ptr() and out.stride() == x.stride()
        if same and out.is_neg() == x.is_neg() and partner is None:
            _mix_halves_in_place(x, shares)
            return out
        return out.copy_(mix(x, shares, partner))
    mixed = torch.empty_like(x) if out is None else out
    if partner is None:
        return _mix_halves(x, shares, mixed)
    return torch.index_select(x, 0, partner, out=mixed).lerp_(x, own)


def _mix_halves(x: Tensor, shares: Tensor, out: Tensor) -> Tensor:
    """Both halves are mixtures of the same two: in one pass, x is read once."""
    pair = 2, len(x) // 2, *x.shape[1:]
    a, b = x.view(pair).unbind()
    torch.lerp(b.expand(pair), a.expand(pair), _of_first(shares), out=out.view(pair))
    return out


def _of_first(shares: Tensor) -> Tensor:
    """The first half's share in either half of the mixtures, (2, 1, ...) or (2, B / 2, ...)."""
    if len(shares) == 1:
        return shares.transpose(0, 1)
    a, b = shares.chunk(2)
    return torch.stack((a[:, 0], b[:, 1]))


def _mix_halves_in_place(x: Tensor, shares: Tensor) -> None:
    size = x[0].numel() * x.element_size()
    step = max(1, _CHUNK // max(1, size)) if x.device.type == "cpu" else len(x)
    half = len(x) // 2
    rows = _of_first(shares).expand(-1, half, *[-1] * (x.ndim - 1))
    chunks = (part.split(step) for part in (*x.split(half), *rows))
    for a, b, share_a, share_b in zip(*chunks, strict=True):
        mixed = torch.lerp(b, a, share_a)
        b.lerp_(a, share_b)
        a.copy_(mixed)


def draw_box(size: int, kept: float, generator: torch.Generator | None) -> slice:
    """Where a box with sides sqrt(1 - kept) lies along one axis, cut at the border."""
    centre = int(torch.randint(size, (1,), **noise_source(_CPU, generator)))
    half = int(size * math.sqrt(1 - kept)) // 2
    return slice(max(centre - half, 0), min(centre + half, size))
