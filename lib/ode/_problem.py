"""A problem as the solvers see it: one tensor as the state, a checked field, times in order."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, SupportsFloat

import torch
from torch import Tensor, nn

from ._errors import FieldError, TimeOrderError
from ._methods import Field
from ._transforms import concrete, readable, real_dtype

__all__ = ["NO_TIMES", "Prepared", "Problem", "State", "module_of"]

State = Tensor | tuple[Tensor, ...]
NO_TIMES: list[float] = []  # known by its identity: an empty list of the user's is an error


class Prepared(nn.Module):
    """A field that computes once for a whole solve what depends on neither time nor state."""

    def prepared(self, y: Tensor) -> Field:
        """This field for states like ``y``."""
        raise NotImplementedError

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.prepared(y)(t, y)


def module_of(func: Callable[..., Any]) -> nn.Module | None:
    """The module that ``func`` is, or is a method of."""
    owner = func if isinstance(func, nn.Module) else getattr(func, "__self__", None)
    return owner if isinstance(owner, nn.Module) else None


@dataclass(frozen=True)
class Problem:
    """A problem with one tensor as its state, and the way back to the state that was given.

    Attributes:
        func: the field, checked: it returns slopes of the shape and dtype of its state.
        y0: the initial state.
        t: the times (T,) on the device of ``y0``, or an empty tensor.
        values: the times as numbers where they can be read.
        shape_state: turns (..., *y0.shape) into the user's kind of state.
        joined: whether that is a tuple, of which ``y0`` is the concatenation.
    """

    func: Field
    y0: Tensor
    t: Tensor
    values: list[float] | None
    shape_state: Callable[[Tensor], Any]
    joined: bool = False

    @classmethod
    def of(cls, func: Callable[..., Any], y0: State, t: Tensor | Sequence[float]) -> Problem:
        shape_state: Callable[[Tensor], Any] = _same
        joined = not isinstance(y0, Tensor)
        if not callable(func):
            raise TypeError(f"func must be callable as func(t, y), got {type(func).__name__}")
        owner, pointwise = module_of(func), getattr(func, "pointwise", None)
        if isinstance(y0, Tensor):
            state = y0
        else:
            func, state, shape_state = _join(func, y0)
            pointwise = None
        if not (state.is_floating_point() or state.is_complex()):
            raise TypeError(f"y0 must be floating-point or complex, got {state.dtype}")
        if real_dtype(state) in (torch.float16, torch.bfloat16):
            func, state, shape_state = _widen(func, state, shape_state)
        else:
            func = _bare(func, state)
        times, values = _times(t, state)
        if values is not None and concrete(state.detach().isfinite().all()) is False:
            raise ValueError("y0 must be finite, got nan or inf in it")
        return cls(_checked(func, pointwise, owner), state, times, values, shape_state, joined)


def _times(t: Tensor | Sequence[float], y: Tensor) -> tuple[Tensor, list[float] | None]:
    """The times as a tensor beside ``y`` and, where they can be read, as numbers in order."""
    if t is NO_TIMES:
        return y.new_empty(0, dtype=real_dtype(y)), None
    if isinstance(t, Tensor):
        times, values = t, readable(t) if t.dim() == 1 else None
    else:
        items = list(t) if isinstance(t, Iterable) else [t]
        if not isinstance(t, Iterable) or any(getattr(item, "ndim", 0) for item in items):
            raise TypeError(f"t must be a tensor (T,) or numbers, got {t!r}")
        if any(isinstance(item, Tensor) for item in items):
            times = torch.stack([torch.as_tensor(item, dtype=torch.float64) for item in items])
            values = readable(times)
        else:
            if not all(isinstance(item, SupportsFloat) for item in items):
                raise TypeError(f"t must be a tensor (T,) or numbers, got {items[:3]}")
            values = [float(item) for item in items]
            times = torch.tensor(values, dtype=torch.float64)
    if times.dim() != 1 or len(times) == 0:
        raise ValueError(f"t must have shape (T,) with T at least 1, got {tuple(times.shape)}")
    if times.is_complex() or times.dtype == torch.bool:
        raise TypeError(f"t must hold real numbers, got {times.dtype}")
    if not times.is_floating_point():
        times = times.double()
    if values is not None:
        _check_order(values, y)
    return times.to(y.device), values


def _check_order(values: list[float], y: Tensor) -> None:
    for index, value in enumerate(values):
        if not math.isfinite(value):
            raise TimeOrderError(f"t must be finite, got t[{index}] = {value}", y=y.detach())
    pairs = list(pairwise(values))
    rising = bool(pairs) and pairs[0][1] > pairs[0][0]
    for index, (a, b) in enumerate(pairs):
        if a == b or (b > a) != rising:
            raise TimeOrderError(
                "t must be strictly increasing or strictly decreasing, "
                f"got t[{index}] = {a:g} before t[{index + 1}] = {b:g}",
                t=values[0],
                y=y.detach(),
            )


def _bare(func: Callable[..., Any], y: Tensor) -> Callable[..., Any]:
    """The forward of a module nobody watches: its ``__call__`` costs two small operations."""
    watched = getattr(nn.modules.module, "_has_any_global_hook", lambda: True)
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if (
        not isinstance(func, nn.Module)
        or torch.compiler.is_compiling()
        or type(func).__call__ is not nn.Module.__call__
        or watched()
        or any(getattr(func, kind, True) for kind in kinds)
    ):
        return func
    overridden = getattr(func.forward, "__func__", None) is not Prepared.forward
    return func.prepared(y) if isinstance(func, Prepared) and not overridden else func.forward


def _checked(func: Callable[..., Any], pointwise: bool | None, owner: nn.Module | None) -> Field:
    """``func``, refusing to return anything but the derivative of its state."""

    def field(t: Tensor, y: Tensor) -> Tensor:
        slope = func(t, y)
        if isinstance(slope, Tensor) and slope.shape == y.shape:
            if slope.dtype is y.dtype:
                return slope
            if y.is_complex() or not slope.is_complex():
                return slope.to(y.dtype)
        is_tensor = isinstance(slope, Tensor)
        seen = f"{tuple(slope.shape)} of {slope.dtype}" if is_tensor else type(slope).__name__
        raise FieldError(
            f"func must return a tensor of shape {tuple(y.shape)} of {y.dtype}, like its state, "
            f"got {seen} at {_when(t)}"
        )

    field.pointwise, field.owner = pointwise, owner  # type: ignore[attr-defined]
    return field


def _when(t: Tensor) -> str:
    value = concrete(t) if t.numel() == 1 else None
    return "some time" if value is None else f"t = {value:.6g}"


def _join(
    func: Callable[..., Any], y0: Sequence[Tensor]
) -> tuple[Callable[..., Any], Tensor, Callable[[Tensor], Any]]:
    """Carry a tuple of tensors as one vector."""
    if not isinstance(y0, (tuple, list)) or not y0 or not all(isinstance(y, Tensor) for y in y0):
        raise TypeError(f"y0 must be a tensor or a tuple of tensors, got {type(y0).__name__}")
    shapes = [y.shape for y in y0]
    dtypes = [y.dtype for y in y0]
    if not all(dtype.is_complex or dtype.is_floating_point for dtype in dtypes):
        raise TypeError(f"y0 must be floating-point or complex, got {', '.join(map(str, dtypes))}")
    sizes = [y.numel() for y in y0]

    def split(y: Tensor, like: Sequence[torch.dtype]) -> tuple[Tensor, ...]:
        parts = y.split(sizes, dim=-1)
        return tuple(
            (part if dtype.is_complex or not y.is_complex() else part.real)
            .reshape((*y.shape[:-1], *shape))
            .to(dtype)
            for part, shape, dtype in zip(parts, shapes, like, strict=True)
        )

    def joined(t: Tensor, y: Tensor) -> Tensor:
        slopes = func(t, split(y, dtypes))
        several = isinstance(slopes, (tuple, list, Tensor))
        seen = [_kind(slope) for slope in slopes] if several else [_kind(slopes)]
        if not several or seen != [tuple(shape) for shape in shapes]:
            raise FieldError(
                f"func must return a tuple of the shapes {[tuple(s) for s in shapes]} of its "
                f"state, got {seen if several else seen[0]} at {_when(t)}"
            )
        if any(s.is_complex() > dtype.is_complex for s, dtype in zip(slopes, dtypes, strict=True)):
            raise FieldError(f"func must return real slopes of what is real in y0, at {_when(t)}")
        return torch.cat([slope.reshape(-1).to(y.dtype) for slope in slopes])

    return joined, torch.cat([y.reshape(-1) for y in y0]), lambda y: split(y, dtypes)


def _widen(
    func: Callable[..., Any], y0: Tensor, shape_state: Callable[[Tensor], Any]
) -> tuple[Callable[..., Any], Tensor, Callable[[Tensor], Any]]:
    """Add up in float32 what ``func`` computes in half precision."""
    half, wide = y0.dtype, torch.promote_types(y0.dtype, torch.float32)

    def widened(t: Tensor, y: Tensor) -> Any:
        return func(t.to(real_dtype(y0)), y.to(half))

    return widened, y0.to(wide), lambda y: shape_state(y.to(half))


def _kind(slope: Any) -> Any:
    return tuple(slope.shape) if isinstance(slope, Tensor) else type(slope).__name__


def _same(y: Tensor) -> Any:
    return y
