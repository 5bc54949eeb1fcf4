"""Three losses that spoil a classifier, all one softplus: they differ in the target's cosine."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lib._common import (
    Reduction,
    at_least_float32,
    check_positive,
    no_autocast,
    reduce_loss,
    values_readable,
)

__all__ = ["am_softmax_loss", "arc_softmax_loss", "simple_a_softmax_loss"]

_ROUNDING = 1e-4  # how far rounding may carry a float32 cosine past 1


def am_softmax_loss(
    cosine: Tensor,
    target: Tensor,
    *,
    margin: float = 0.35,
    scale: float = 30.0,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    validate_args: bool = True,
) -> Tensor:
    """Softmax over scaled cosines whose target must win by an additive margin (AM, CosFace).

    With t the target class, c_i the cosines, s the scale and m the margin::

        loss = log(1 + sum_{i != t} exp(s c_i) / exp(s (c_t - m)))

    The target is left out of the sum before it is formed, never subtracted from it afterwards.
    ``margin=0`` is the plain normalised softmax.

    Args:
        cosine: cosines between samples and class centres (B, C); any leading shape in place of
            (B,), the empty one included. Half precision is raised to float32.
        target: classes 0 .. C-1 or ``ignore_index``, integers (B,).
        margin: m, how much is taken off the target's cosine; at least 0.
        scale: s, the largest size of a logit; positive.
        reduction: ``"mean"`` over the samples that are not ignored, ``"sum"``, or ``"none"`` with
            0 for ignored samples.
        ignore_index: samples with this target count for nothing, whatever their cosines hold.
        validate_args: whether to look for cosines outside [-1, 1], targets out of range and a
            mean over no sample. Values cannot be read, and are not checked, under ``vmap`` and
            ``torch.compile``: there a mean over no sample is 0.

    Returns:
        The loss in nats, scalar or (B,).

    Raises:
        ValueError: if shapes disagree, a setting is out of range or a value check fails.
        TypeError: if ``cosine`` is not floating-point or ``target`` is not an integer tensor.

    Source: chapter `margin`, eq-margin-am; Wang et al. (2018), https://arxiv.org/abs/1801.05599.

    >>> cosine = torch.tensor([[0.9, 0.1, -0.3], [0.2, 0.6, 0.5]])
    >>> am_softmax_loss(cosine, torch.tensor([0, 1]), scale=10.0, reduction="none")
    tensor([0.0112, 2.6239])
    """
    _check_margin(margin)
    return _loss(
        cosine,
        target,
        lambda own: own - margin,
        scale=scale,
        reduction=reduction,
        ignore_index=ignore_index,
        validate_args=validate_args,
    )


def arc_softmax_loss(
    cosine: Tensor,
    target: Tensor,
    *,
    margin: float = 0.5,
    scale: float = 30.0,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    validate_args: bool = True,
) -> Tensor:
    """Softmax over scaled cosines whose target is turned away by an angle (ArcFace).

    The target's cosine c = cos(theta) is replaced by cos(theta + m) as long as theta <= pi - m,
    and by c - m sin(m) beyond, so that it falls all the way to theta = pi::

        loss = log(1 + sum_{i != t} exp(s c_i) / exp(s cos(theta_t + m)))

    The gradient stays finite at c = 1 and c = -1, where that of arccos does not.

    Args:
        cosine: as in `am_softmax_loss` (B, C).
        target: as in `am_softmax_loss` (B,).
        margin: m in radians, from 0 to pi.
        scale: s, the largest size of a logit; positive.
        reduction: as in `am_softmax_loss`.
        ignore_index: as in `am_softmax_loss`.
        validate_args: as in `am_softmax_loss`.

    Returns:
        The loss in nats, scalar or (B,).

    Raises:
        ValueError: as `am_softmax_loss`.
        TypeError: as `am_softmax_loss`.

    Source: chapter `margin`, eq-margin-arc; Deng et al. (2019), https://arxiv.org/abs/1801.07698.

    >>> cosine = torch.tensor([[0.9, 0.1, -0.3], [0.2, 0.6, 0.5]])
    >>> arc_softmax_loss(cosine, torch.tensor([0, 1]), scale=10.0, reduction="none")
    tensor([0.0083, 3.6450])
    """
    _check_angle(margin)
    return _loss(
        cosine,
        target,
        lambda own: _turned(own, margin),
        scale=scale,
        reduction=reduction,
        ignore_index=ignore_index,
        validate_args=validate_args,
    )


def simple_a_softmax_loss(
    cosine: Tensor,
    target: Tensor,
    *,
    m: int = 4,
    scale: float = 30.0,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    validate_args: bool = True,
) -> Tensor:
    """Softmax over scaled cosines whose target is min(cos(m theta), cos(theta)).

    The essay's simpler A-softmax; cos(m theta) is the Chebyshev polynomial T_m of the cosine,
    8 c^4 - 8 c^2 + 1 for m = 4::

        loss = log(1 + sum_{i != t} exp(s c_i) / exp(s min(T_m(c_t), c_t)))

    Where T_m(c) > c the loss is the plain softmax and has no margin; for m = 4 that is 46.7% of
    the angles.

    Args:
        cosine: as in `am_softmax_loss` (B, C).
        target: as in `am_softmax_loss` (B,).
        m: the factor of the angle, an integer of at least 1.
        scale: s, the largest size of a logit; positive.
        reduction: as in `am_softmax_loss`.
        ignore_index: as in `am_softmax_loss`.
        validate_args: as in `am_softmax_loss`.

    Returns:
        The loss in nats, scalar or (B,).

    Raises:
        ValueError: as `am_softmax_loss`.
        TypeError: as `am_softmax_loss`.

    Source: chapter `margin`, eq-margin-simple-a; Su (2018), archive number 5743, equation (7).

    >>> cosine = torch.tensor([[0.9, 0.1, -0.3], [0.2, 0.6, 0.5]])
    >>> simple_a_softmax_loss(cosine, torch.tensor([0, 1]), scale=10.0, reduction="none")
    tensor([ 3.3653, 13.4806])
    """
    check_positive(m, "m")
    return _loss(
        cosine,
        target,
        lambda own: _folded(own, m),
        scale=scale,
        reduction=reduction,
        ignore_index=ignore_index,
        validate_args=validate_args,
    )


def _loss(
    cosine: Tensor,
    target: Tensor,
    spoil: Callable[[Tensor], Tensor],
    *,
    scale: float,
    reduction: Reduction,
    ignore_index: int,
    validate_args: bool,
) -> Tensor:
    """The loss for any function ``spoil`` of the target's cosine."""
    slack = _slack(cosine)
    cosine = at_least_float32(cosine, "cosine")
    _check_scale(scale)
    if cosine.ndim == 0 or cosine.shape[-1] == 0:
        raise ValueError(f"cosine must have a last axis of classes, got {tuple(cosine.shape)}")
    index, keep = _check_target(
        target, cosine.shape[:-1], cosine.shape[-1], ignore_index, reduction, validate_args
    )
    if validate_args and values_readable(cosine, target):
        _check_cosine(cosine, keep, slack)
    with no_autocast(cosine):
        own, rest = _own_and_rest(cosine, index, keep, scale)
        return _softplus_loss(spoil(own), rest, keep, scale, reduction)


def _own_and_rest(cosine: Tensor, index: Tensor, keep: Tensor, scale: float) -> tuple[Tensor, ...]:
    """The target's cosine (B,) and the log of the sum of exp(scale c) over all others (B,)."""
    index, ignored = index.unsqueeze(-1), ~keep.unsqueeze(-1)
    own = cosine.gather(-1, index).masked_fill(ignored, 0.0)
    others = (scale * cosine).scatter(-1, index, -math.inf).masked_fill_(ignored, 0.0)  # (B, C)
    return own.squeeze(-1), others.logsumexp(-1)


def _softplus_loss(
    spoilt: Tensor, rest: Tensor, keep: Tensor, scale: float, reduction: Reduction
) -> Tensor:
    """log(1 + exp(rest - scale * spoilt)), reduced over the samples that are kept."""
    losses = -F.logsigmoid(scale * spoilt - rest)
    losses = losses.masked_fill(~keep, 0.0)
    if reduction == "mean":
        return losses.sum() / keep.sum().clamp_min(1)
    return reduce_loss(losses, reduction)


def _turned(cosine: Tensor, margin: float) -> Tensor:
    """cos(theta + margin) for theta <= pi - margin, then a branch that keeps falling."""
    tiny = torch.finfo(cosine.dtype).tiny ** 0.5
    sine = ((1 - cosine) * (1 + cosine)).clamp_min(tiny).sqrt()
    turned = cosine * math.cos(margin) - sine * math.sin(margin)
    beyond = cosine - margin * math.sin(margin)
    return torch.where(cosine >= -math.cos(margin), turned, beyond)


def _folded(cosine: Tensor, m: int) -> Tensor:
    """min(cos(m theta), cos(theta)), by the recursion T_{k+1} = 2 c T_k - T_{k-1}."""
    before, chebyshev = torch.ones_like(cosine), cosine
    for _ in range(m - 1):
        before, chebyshev = chebyshev, 2 * cosine * chebyshev - before
    return torch.where(chebyshev <= cosine, chebyshev, cosine)


def _check_scale(scale: float) -> None:
    if not 0 < scale < math.inf:
        raise ValueError(f"scale must be positive and finite, got {scale}")


def _check_margin(margin: float) -> None:
    if not 0 <= margin < math.inf:
        raise ValueError(f"margin must be at least 0 and finite, got {margin}")


def _check_angle(margin: float) -> None:
    if not 0 <= margin <= math.pi:
        raise ValueError(f"margin must be an angle from 0 to pi, in radians, got {margin}")


def _check_target(
    target: Tensor,
    shape: tuple[int, ...],
    num_classes: int,
    ignore_index: int,
    reduction: Reduction,
    validate_args: bool,
) -> tuple[Tensor, Tensor]:
    """Refuse targets that name no class; return them with 0 for ignored ones, and what is kept."""
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a tensor of integers, got {type(target).__name__}")
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise TypeError(f"target must be a tensor of integers, got {target.dtype}")
    if tuple(target.shape) != tuple(shape):
        raise ValueError(f"target must have shape {tuple(shape)}, got {tuple(target.shape)}")
    if reduction == "mean" and target.numel() == 0:
        raise ValueError('the batch is empty: reduction="mean" has nothing to average')
    target = target.long()
    keep = target != ignore_index
    if validate_args and values_readable(target):
        outside = keep & ((target < 0) | (target >= num_classes))
        if outside.any():
            raise ValueError(
                f"target must lie in 0 .. {num_classes - 1} or be ignore_index={ignore_index}, "
                f"got {target[outside][0].item()}"
            )
        if reduction == "mean" and not keep.any():
            raise ValueError(
                f"every target is ignore_index={ignore_index}: "
                'reduction="mean" has nothing to average'
            )
    return target.masked_fill(~keep, 0), keep


def _slack(cosine: Tensor) -> float:
    """How far rounding, in the precision in which ``cosine`` comes, may carry it past 1."""
    half = isinstance(cosine, Tensor) and cosine.dtype in (torch.half, torch.bfloat16)
    return 2 * torch.finfo(cosine.dtype).eps if half else _ROUNDING


def _check_cosine(cosine: Tensor, keep: Tensor, slack: float) -> None:
    if cosine.numel() == 0 or _within(cosine, 1 + slack):
        return
    kept = cosine[keep]
    if kept.numel() and not _within(kept, 1 + slack):
        raise ValueError(
            "cosine must lie in [-1, 1] (cosines, not scaled logits), "
            f"got values from {kept.min().item():.4g} to {kept.max().item():.4g}"
        )


def _within(values: Tensor, bound: float) -> bool:
    """Whether all values lie in [-bound, bound]; False if one is NaN."""
    low, high = values.detach().aminmax()
    return bool((low >= -bound) & (high <= bound))
