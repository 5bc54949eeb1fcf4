"""Three losses that spoil a classifier, all one softplus: they differ in the target's cosine."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lib._common import Reduction, at_least_float32, check_positive, no_autocast, values_readable
from lib.margin._checks import (
    check_angle,
    check_cosine,
    check_margin,
    check_scale,
    check_target,
)
from lib.margin._softplus import folded, own_and_rest, softplus_loss, turned

__all__ = ["am_softmax_loss", "arc_softmax_loss", "simple_a_softmax_loss"]


def am_softmax_loss(
    cosine: Tensor,
    target: Tensor,
    *,
    margin: float = 0.35,
    scale: float | Tensor = 30.0,
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
        scale: s, the largest size of a logit; positive. A tensor of one number can be learned.
        reduction: ``"mean"`` over the samples that are not ignored, ``"sum"``, or ``"none"`` with
            0 for ignored samples.
        ignore_index: samples with this target count for nothing, whatever their cosines hold.
        validate_args: whether to look for cosines outside [-1, 1], targets out of range, a tensor
            ``scale`` that is not positive and a mean over no sample. Values cannot be read, and
            are not checked, under ``vmap`` and ``torch.compile``: there a mean over no sample is 0.

    Returns:
        The loss in nats, scalar or (B,).

    Raises:
        ValueError: if shapes disagree, a setting is out of range or a value check fails.
        TypeError: if ``cosine`` is not floating-point or ``target`` is not an integer tensor.

    Source: chapter `margin`, eq-margin-am; Wang et al. (2018), https://arxiv.org/abs/1801.05599.

    >>> import torch
    >>> cosine = torch.tensor([[0.9, 0.1, -0.3], [0.2, 0.6, 0.5]])
    >>> am_softmax_loss(cosine, torch.tensor([0, 1]), scale=10.0, reduction="none")
    tensor([0.0112, 2.6239])
    """
    check_margin(margin)
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
    scale: float | Tensor = 30.0,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    validate_args: bool = True,
) -> Tensor:
    """Softmax over scaled cosines whose target is turned away by an angle (ArcFace).

    The target's cosine c = cos(theta) is replaced by cos(theta + m) as long as theta <= pi - m,
    and by c - m sin(m) beyond, so that it falls all the way to theta = pi (for m up to 2.33; above
    that it leaps up at theta = pi - m)::

        loss = log(1 + sum_{i != t} exp(s c_i) / exp(s cos(theta_t + m)))

    The gradient stays finite at c = 1 and c = -1, where that of arccos does not.

    Args:
        cosine: as in `am_softmax_loss` (B, C).
        target: as in `am_softmax_loss` (B,).
        margin: m in radians, from 0 to pi.
        scale: as in `am_softmax_loss`.
        reduction: as in `am_softmax_loss`.
        ignore_index: as in `am_softmax_loss`.
        validate_args: as in `am_softmax_loss`.

    Returns:
        The loss in nats, scalar or (B,).

    Raises:
        ValueError: as `am_softmax_loss`.
        TypeError: as `am_softmax_loss`.

    Source: chapter `margin`, eq-margin-arc; Deng et al. (2019), https://arxiv.org/abs/1801.07698.

    >>> import torch
    >>> cosine = torch.tensor([[0.9, 0.1, -0.3], [0.2, 0.6, 0.5]])
    >>> arc_softmax_loss(cosine, torch.tensor([0, 1]), scale=10.0, reduction="none")
    tensor([0.0083, 3.6450])
    """
    check_angle(margin)
    return _loss(
        cosine,
        target,
        lambda own: turned(own, margin),
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
    scale: float | Tensor = 30.0,
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
        scale: as in `am_softmax_loss`.
        reduction: as in `am_softmax_loss`.
        ignore_index: as in `am_softmax_loss`.
        validate_args: as in `am_softmax_loss`.

    Returns:
        The loss in nats, scalar or (B,).

    Raises:
        ValueError: as `am_softmax_loss`.
        TypeError: as `am_softmax_loss`.

    Source: chapter `margin`, eq-margin-simple-a; Su (2018), archive number 5743, equation (7).

    >>> import torch
    >>> cosine = torch.tensor([[0.9, 0.1, -0.3], [0.2, 0.6, 0.5]])
    >>> simple_a_softmax_loss(cosine, torch.tensor([0, 1]), scale=10.0, reduction="none")
    tensor([ 3.3653, 13.4806])
    """
    check_positive(m, "m")
    return _loss(
        cosine,
        target,
        lambda own: folded(own, m),
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
    scale: float | Tensor,
    reduction: Reduction,
    ignore_index: int,
    validate_args: bool,
) -> Tensor:
    """The loss for any function ``spoil`` of the target's cosine."""
    given, cosine = cosine, at_least_float32(cosine, "cosine")
    scale = check_scale(scale, validate_args)
    if isinstance(scale, Tensor):
        scale = scale.to(cosine.dtype)  # a loss of one sample must not follow its precision
    if cosine.ndim == 0 or cosine.shape[-1] == 0:
        raise ValueError(f"cosine must have a last axis of classes, got {tuple(cosine.shape)}")
    index, keep = check_target(
        target, cosine.shape[:-1], cosine.shape[-1], ignore_index, reduction, validate_args
    )
    if validate_args and values_readable(cosine, target):
        check_cosine(cosine, keep, given.dtype)
    with no_autocast(cosine):
        own, rest = own_and_rest(cosine, index, keep, scale)
        return softplus_loss(spoil(own), rest, keep, scale, reduction)
