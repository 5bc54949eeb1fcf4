"""What all mixing shares: lambda, the partners, and weight x + (1 - weight) x[partner]."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = [
    "Pairing",
    "draw_beta",
    "draw_box",
    "draw_partner",
    "is_plain",
    "mix",
    "mix_labels",
    "partners",
]

Pairing = Literal["random", "halves"]

# Bytes mixed at a time in place on a CPU: enough to hide a call's overhead, few enough for a cache
_CHUNK = 1 << 20


def is_plain(x: Tensor) -> bool:
    """Whether x has numbers to read and memory to write: no autograd, no transform, no tracing."""
    if torch.compiler.is_compiling() or (x.requires_grad and torch.is_grad_enabled()):
        return False
    return torch._C._functorch.peek_interpreter_stack() is None and forward_ad._current_level < 0


def draw_beta(alpha: float, n: int, generator: torch.Generator | None) -> Tensor:
    """Draws of Beta(alpha, alpha), (n,), in double precision."""
    if not 0 <= alpha < math.inf:
        raise ValueError(f"alpha must be a finite number of at least 0, got {alpha}")
    device = "cpu" if generator is None else generator.device
    if alpha == 0:
        return torch.ones(n, dtype=torch.float64, device=device)
    # torch compiles no rand(n, generator=None) where n varies
    source: dict[str, Any] = {} if generator is None else {"generator": generator}
    if alpha == 1:
        return torch.rand(n, dtype=torch.float64, device=device, **source)
    # Gamma(a) = Gamma(a + 1) U^(1/a), in logarithms: U^(1/a) underflows where a is small
    shape = torch.full((2, n), alpha + 1.0, dtype=torch.float64, device=device)
    log_gamma = torch._standard_gamma(shape, generator=generator).log()
    log_u = torch.rand(2, n, dtype=torch.float64, device=device, **source).neg().log1p()
    return torch.sigmoid(log_gamma[0] - log_gamma[1] + (log_u[0] - log_u[1]) / alpha)


def draw_partner(x: Tensor, pairing: Pairing, generator: torch.Generator | None) -> Tensor | int:
    """The partners as an index (B,), or as a shift for pairing by halves."""
    if pairing == "halves":
        return len(x) // 2
    if pairing == "random":
        device = "cpu" if generator is None else generator.device
        return torch.randperm(len(x), generator=generator, device=device).to(x.device)
    raise ValueError(f'pairing must be "random" or "halves", got {pairing!r}')


def partners(x: Tensor, partner: Tensor | int) -> Tensor:
    return x.roll(-partner, 0) if isinstance(partner, int) else x[partner]


def mix_labels(
    y: Tensor,
    num_classes: int | None,
    weight: Tensor,
    partner: Tensor | int,
    dtype: torch.dtype,
) -> Tensor:
    """Mixed labels: floating point as they are, classes and multi-hot in at least float32."""
    if y.is_floating_point():
        return mix(y, weight, partner)
    dtype = dtype if dtype == torch.float64 else torch.float32
    if y.ndim > 1:
        return mix(y.to(dtype), weight, partner)
    own = y.long()[:, None]
    other = partners(own, partner)
    soft = torch.zeros(len(y), num_classes or 0, dtype=dtype, device=y.device)
    if is_plain(y) and len(weight) == 1 and weight.device.type == "cpu":
        kept = weight.item()  # no device to wait for
        return soft.scatter_(1, own, kept).scatter_(1, other, 1 - kept, reduce="add")
    share = weight.to(y.device, dtype).expand(len(y))[:, None]
    if is_plain(y):  # two copies of the table less
        return soft.scatter_(1, own, share).scatter_add_(1, other, 1 - share)
    return soft.scatter(1, own, share).scatter_add(1, other, 1 - share)


def mix(x: Tensor, weight: Tensor, partner: Tensor | int, out: Tensor | None = None) -> Tensor:
    """weight x + (1 - weight) x[partner]."""
    share = weight.to(x.device, x.dtype)
    if len(share) > 1:
        share = share.reshape(-1, *[1] * (x.ndim - 1))
    if out is None and not is_plain(x):
        return torch.lerp(partners(x, partner), x, share)
    if out is not None and out.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
        same = out.data_ptr() == x.data_ptr() and out.stride() == x.stride()
        same = same and out.is_neg() == x.is_neg()
        if same and isinstance(partner, int) and len(x) % 2 == 0:
            _mix_halves_in_place(x, share, partner)
            return out
        return out.copy_(mix(x, weight, partner))
    mixed = torch.empty_like(x) if out is None else out
    if isinstance(partner, Tensor):
        return torch.index_select(x, 0, partner, out=mixed).lerp_(x, share)
    head = len(x) - partner
    torch.lerp(x[partner:], x[:head], _rows(share, 0, head), out=mixed[:head])
    torch.lerp(x[:partner], x[head:], _rows(share, head, len(x)), out=mixed[head:])
    return mixed


def _mix_halves_in_place(x: Tensor, weight: Tensor, shift: int) -> None:
    size = x[0].numel() * x.element_size()
    step = max(1, _CHUNK // max(1, size)) if x.device.type == "cpu" else shift
    for start in range(0, shift, step):
        stop = min(start + step, shift)
        a, b = x[start:stop], x[start + shift : stop + shift]
        mixed = torch.lerp(b, a, _rows(weight, start, stop))
        b.lerp_(a, 1 - _rows(weight, start + shift, stop + shift))
        a.copy_(mixed)


def _rows(weight: Tensor, start: int, stop: int) -> Tensor:
    return weight[start:stop] if len(weight) > 1 else weight


def draw_box(size: int, kept: float, generator: torch.Generator | None) -> slice:
    """Where a box with sides sqrt(1 - kept) lies along one axis, cut at the border."""
    device = "cpu" if generator is None else generator.device
    centre = int(torch.randint(size, (1,), device=device, generator=generator))
    half = int(size * math.sqrt(1 - kept)) // 2
    return slice(max(centre - half, 0), min(centre + half, size))
