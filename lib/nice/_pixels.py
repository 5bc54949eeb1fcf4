"""From integer pixels to a continuous density and back to bits."""

from __future__ import annotations

import math
from numbers import Real
from typing import TypeVar

import torch
from torch import Tensor

from lib._common import at_least_float32, check_positive, noise_source, values_readable

__all__ = ["bits_per_dim", "dequantize"]

Nats = TypeVar("Nats", Tensor, float)


def _check_levels(levels: int) -> None:
    check_positive(levels, "levels")
    if not 2 <= levels <= 2**16:
        raise ValueError(f"levels must be from 2 to 65536, got {levels}")


def _refuse_nan(count: int) -> None:
    if count:
        raise ValueError(f"log_prob must be numbers, got {count} NaN")


def _signed(x: Tensor) -> Tensor:
    """``x`` in a dtype whose minimum torch can take; uint64 beyond int64 turns negative."""
    return x if x.dtype == torch.uint8 or x.dtype.is_signed else x.long()


def dequantize(
    x: Tensor,
    levels: int = 256,
    *,
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Spread each integer over its own interval: (x + u) / levels with u uniform on [0, 1).

    The density of the result bounds the probability of the image from below:
    log P(x) >= E_u log p((x + u) / levels) - D log levels. No interval overlaps another, and
    ``floor(levels * result)`` gives ``x`` back exactly.

    Args:
        x: integers 0 .. levels - 1, any shape.
        levels: number of grey levels, 256 for 8 bits.
        dtype: float32 or float64; the default dtype if not given.
        generator: source of u.

    Returns:
        A new tensor of the shape of ``x`` in [0, 1).

    Raises:
        TypeError: if ``x`` is not an integer tensor: dequantised or scaled images are no integers.
        ValueError: if ``x`` holds values outside 0 .. levels - 1 (not seen inside ``vmap`` and
            ``torch.compile``, where values cannot be read).

    Source: chapter `nice`, eq-nice-dequantisation; Theis, van den Oord and Bethge (2016).

    >>> image = torch.tensor([0, 127, 255], dtype=torch.uint8)
    >>> y = dequantize(image, generator=torch.Generator().manual_seed(0))
    >>> (y * 256).floor().int().tolist()
    [0, 127, 255]
    """
    _check_levels(levels)
    if not isinstance(x, Tensor) or x.is_floating_point() or x.is_complex():
        seen = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x must be an integer tensor of values 0 .. {levels - 1}, got {seen}")
    if values_readable(x) and x.numel():
        low, high = (int(value) for value in torch.aminmax(_signed(x)))
        if low < 0 or high >= levels:
            raise ValueError(f"x must lie in 0 .. {levels - 1}, got values {low} .. {high}")
    dtype = dtype or torch.get_default_dtype()
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"dtype must be float32 or float64 to hold {levels} levels, got {dtype}")
    noise = torch.rand(x.shape, dtype=dtype, **noise_source(x.device, generator)).to(x.device)
    x = x.to(dtype)
    y = (x + noise) / levels
    # where rounding has carried y over an end of its interval, take the middle
    return torch.where((y * levels).floor() == x, y, (x + 0.5) / levels)


def bits_per_dim(log_prob: Nats, dim: int, levels: int = 256) -> Nats:
    """Bits per pixel that a code built on the model needs: lower is better.

    log2(levels) - log_prob / (dim log 2)

    It bounds the true cost from above if, and only if, ``log_prob`` is a density of images
    dequantised to [0, 1) with this number of levels.

    Args:
        log_prob: nats per image, a tensor of any shape or a number.
        dim: D, the number of pixels.
        levels: number of grey levels.

    Returns:
        Bits per dimension, shaped like ``log_prob``.

    Raises:
        TypeError: if ``log_prob`` is an integer tensor or neither tensor nor number, or ``dim`` or
            ``levels`` no integer.
        ValueError: if ``log_prob`` holds NaN (not seen inside ``vmap`` and ``torch.compile``), or
            ``dim`` or ``levels`` is out of range.

    Source: chapter `nice`, eq-nice-bits; Theis, van den Oord and Bethge (2016).

    >>> round(bits_per_dim(1980.50, 784), 2)
    4.36
    """
    check_positive(dim, "dim")
    _check_levels(levels)
    if isinstance(log_prob, Tensor):
        log_prob = at_least_float32(log_prob, "log_prob")
        _refuse_nan(int(log_prob.isnan().sum()) if values_readable(log_prob) else 0)
    elif isinstance(log_prob, Real):
        log_prob = float(log_prob)
        _refuse_nan(int(math.isnan(log_prob)))
    else:
        raise TypeError(f"log_prob must be a tensor or a number, got {type(log_prob).__name__}")
    return math.log2(levels) - log_prob / (dim * math.log(2))
