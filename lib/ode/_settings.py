"""What a solver is told besides the problem: its options, tolerances and norm."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ._adaptive import Control, rms
from ._methods import METHODS, Method
from ._problem import Problem
from ._transforms import real_dtype

__all__ = ["choose", "control_for", "gather_settings"]

_FIXED_OPTIONS = ("step_size", "grid_constructor", "interp", "perturb")
_ADAPTIVE_OPTIONS = tuple(
    f.name for f in dataclasses.fields(Control) if f.name not in ("rtol", "atol")
)


def choose(method: str | None) -> tuple[Method, bool]:
    name = "dopri5" if method is None else method
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    return METHODS[name], name == "dopri5"


def gather_settings(
    method: Method, adaptive: bool, step_size: float | None, options: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The options that mean something to ``method``; the others are refused by name."""
    settings = dict(options or {})
    if step_size is not None:
        if "step_size" in settings:
            raise ValueError("step_size is given twice: as an argument and in options")
        settings["step_size"] = step_size
    settings.pop("dtype", None)  # times are float64 here in any case
    allowed = _ADAPTIVE_OPTIONS if adaptive else _FIXED_OPTIONS
    unknown = sorted(set(settings) - set(allowed))
    if not adaptive:  # those of torchdiffeq's adaptive methods do no harm
        unknown = [name for name in unknown if name != "norm"]
    if unknown:
        raise ValueError(
            f"{method.name} has no option {', '.join(map(repr, unknown))}; "
            f"it has {', '.join(allowed)}"
        )
    if settings.get("step_size") is not None and settings.get("grid_constructor") is not None:
        raise ValueError("step_size and grid_constructor exclude each other")
    if settings.pop("perturb", False):
        raise ValueError("perturb is not supported; put the times of the jumps into t")
    for name in ("step_t", "jump_t"):
        if name in settings and settings[name] is None:
            del settings[name]
        elif name in settings:
            settings[name] = torch.as_tensor(settings[name], dtype=torch.float64).flatten().tolist()
    return settings


def control_for(problem: Problem, settings: dict[str, Any], rtol: Any, atol: Any) -> Control:
    """The control of the steps; an ``atol`` of 0 becomes the least that can be divided by."""
    rtol, atol = _tolerance("rtol", rtol, problem), _tolerance("atol", atol, problem)
    if not bool(torch.as_tensor(rtol + atol > 0).all()):
        raise ValueError("rtol and atol must not both be 0")
    tiny = torch.finfo(problem.y0.dtype).tiny
    least = atol.clamp_min(tiny) if isinstance(atol, Tensor) else max(atol, tiny)
    norm = _norm(problem, settings.get("norm"))
    return Control(**{**settings, "rtol": rtol, "atol": least, "norm": norm})


def _tolerance(name: str, value: Any, problem: Problem) -> Any:
    """A tolerance as a number, or as a tensor that broadcasts to the state; each of a tuple."""
    y = problem.y0
    if isinstance(value, (tuple, list)):
        parts = problem.shape_state(y) if problem.joined else ()
        if len(parts) != len(value):
            raise ValueError(
                f"{name} must be a number, a tensor, or as many of them as y0 has tensors, "
                f"got {len(value)} for {len(parts) or 'a single tensor'}"
            )
        each = [_fill(name, v, y, part.shape) for v, part in zip(value, parts, strict=True)]
        return torch.cat([tolerance.reshape(-1) for tolerance in each])
    if isinstance(value, Tensor):
        return _fill(name, value, y, y.shape)
    if not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}")
    return value


def _fill(name: str, value: float | Tensor, y: Tensor, shape: torch.Size) -> Tensor:
    """A tolerance for every element of a part of ``y``, which has that shape."""
    tolerance = torch.as_tensor(value, dtype=real_dtype(y), device=y.device)
    if tolerance.requires_grad:
        raise ValueError(f"{name} must not require a gradient")
    if not bool((tolerance.isfinite() & (tolerance >= 0)).all()):
        raise ValueError(f"{name} must be finite and at least 0, got {tolerance.tolist()}")
    try:
        return tolerance.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"{name} must broadcast to the state's shape {tuple(shape)}, "
            f"got {tuple(tolerance.shape)}"
        ) from None


def _norm(problem: Problem, given: Callable[[Any], Any] | None) -> Callable[[Tensor], Any]:
    """The size of an error: its root mean square, or the largest among those of a tuple."""
    if not problem.joined:
        return given or rms
    chosen = given or (lambda parts: max((float(rms(p)) for p in parts if p.numel()), default=0.0))
    return lambda x: chosen(problem.shape_state(x))
