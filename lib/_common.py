"""What every stem needs at its door: precision, masks, reductions, and clear errors."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from numbers import Integral
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = [
    "Reduction",
    "at_least_float32",
    "bool_mask",
    "check_positive",
    "is_transformed",
    "no_autocast",
    "noise_source",
    "reduce_loss",
    "values_readable",
]

Reduction = Literal["mean", "sum", "none"]


def at_least_float32(tensor: Tensor, name: str = "input") -> Tensor:
    """Return ``tensor`` in float32 if it is in half precision, else as it is.

    Raises:
        TypeError: if ``tensor`` is not a floating-point tensor.
    """
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        seen = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name} must be a floating-point tensor, got {seen}")
    return tensor.float() if tensor.element_size() < 4 else tensor


def no_autocast(tensor: Tensor) -> AbstractContextManager:
    """A context in which autocast leaves products of ``tensor`` in the precision they came in."""
    if tensor.is_meta:  # which has no autocast to leave
        return nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)


def bool_mask(mask: Tensor, shape: tuple[int, ...], name: str = "mask") -> Tensor:
    """Return ``mask`` as bool (True = keep); cast integer masks, refuse other shapes and dtypes."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a tensor of shape {tuple(shape)}, got {mask!r}")
    if tuple(mask.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(mask.shape)}")
    if mask.is_floating_point() or mask.is_complex():
        raise TypeError(f"{name} must be bool or integer (True = keep), got {mask.dtype}")
    return mask.bool()


def check_positive(value: int, name: str) -> None:
    """Refuse counts below 1 and anything that is not an integer."""
    if isinstance(value, bool) or not isinstance(value, int | Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def noise_source(device: torch.device, generator: torch.Generator | None) -> dict[str, Any]:
    """Options for torch.rand: where to draw and from what.

    ``generator=None`` is left out, since torch.compile refuses it once the shape is dynamic.
    """
    if generator is None:
        return {"device": device}
    return {"device": generator.device, "generator": generator}


def reduce_loss(values: Tensor, reduction: Reduction) -> Tensor:
    """Apply ``reduction`` to a tensor of losses: ``"mean"``, ``"sum"`` or ``"none"``."""
    if reduction == "mean":
        return values.mean()
    if reduction == "sum":
        return values.sum()
    if reduction == "none":
        return values
    raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')


def values_readable(*tensors: Tensor) -> bool:
    """Whether Python may branch on values: not while compiling, in ``torch.func``, on "meta"."""
    if torch.compiler.is_compiling() or any(tensor.is_meta for tensor in tensors):
        return False
    return not any(torch._C._functorch.is_functorch_wrapped_tensor(tensor) for tensor in tensors)


def is_transformed() -> bool:
    """Whether torch.compile, a ``torch.func`` transform or forward-mode differentiation is on."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )
