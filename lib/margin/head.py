"""A classification layer with a margin, whose loss never writes the cosines out."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lib._common import Reduction, at_least_float32, check_positive, no_autocast, values_readable
from lib.margin._checks import check_angle, check_margin, check_scale, check_target, lengths
from lib.margin._fused import OwnAndRest
from lib.margin._softplus import folded, own_and_rest, softplus_loss, turned

__all__ = ["MarginHead"]

_TILE = 2048  # classes at a time on a CPU: a tile of the cosines then stays in its cache


class MarginHead(nn.Module):
    """A layer of class centres that classifies by cosine and trains with a margin.

    With x the features, w_i the centres, c_i = x w_i / (|x| |w_i|) and t the target::

        loss = log(1 + sum_{i != t} exp(s c_i) / exp(s psi(c_t)))

    ``loss`` is fused: features and centres are normalised inside, the classes pass in tiles, and
    what is kept for the backward pass is at most one (B, C) tensor, the softmax over the wrong
    classes. With ``class_chunk`` not even that: each chunk of cosines is formed a second time
    when the gradient needs it, and the extra memory no longer grows with C beyond the gradient
    of the weights and the lengths of the centres.

    Args:
        dim: size D of the features.
        num_classes: C.
        loss: the function psi of the target's cosine, named by its loss: ``"am"``,
            ``"arc"``, ``"simple_a"``, or ``"softmax"`` for none.
        margin: default 0.35 for ``"am"``; 0.5 (radians) for ``"arc"``; the integer factor m,
            default 4, for ``"simple_a"``; 0 for ``"softmax"``.
        scale: s, the largest size of a logit; a parameter with one number is learned with the rest.
        class_chunk: classes at a time when memory matters more than the last third of the speed;
            None keeps the one (B, C) tensor.
        validate_args: whether to look for targets out of range and for features and centres
            without a direction: zero, not finite, or so short or long that squares leave the range
            of their precision. Values cannot be read, and are not checked, under
            ``torch.compile`` and the transforms of ``torch.func``.
        device: where ``weight`` is made.
        dtype: of ``weight``.

    Attributes:
        weight: centres (C, D) of any length; only their directions count.

    Under autocast, and for half-precision features or weights, both methods compute in float32. A
    backward pass inside autocast, which torch advises against, does so where ``loss`` is fused.
    With a learned scale, under ``torch.compile`` and under the transforms of ``torch.func``,
    ``loss`` takes the plain road through ``forward``, and so do its second derivatives. Forward
    mode and gradients in batches must take it too, as in ``am_softmax_loss(head(x), target)``.

    Raises:
        ValueError: if a setting is out of range or ``loss`` is unknown.

    Source: chapter `margin`, eq-margin-am and eq-margin-gradient; Wang et al. (2018).

    >>> head = MarginHead(3, 2, loss="am", margin=0.25, scale=8.0)
    >>> with torch.no_grad():
    ...     _ = head.weight.copy_(torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 1.0]]))
    >>> x = torch.tensor([[3.0, 0.0, 4.0]])
    >>> head(x)
    tensor([[0.6000, 0.8000]], grad_fn=<MmBackward0>)
    >>> round(head.loss(x, torch.tensor([1])).item(), 4)  # log(1 + exp(8 (0.6 - 0.8 + 0.25)))
    0.913
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        *,
        loss: Literal["am", "arc", "simple_a", "softmax"] = "am",
        margin: float | None = None,
        scale: float | Tensor = 30.0,
        class_chunk: int | None = None,
        validate_args: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(dim, "dim")
        check_positive(num_classes, "num_classes")
        if class_chunk is not None:
            check_positive(class_chunk, "class_chunk")
        check_scale(scale)
        self.kind, self.scale, self.class_chunk = loss, scale, class_chunk
        self.margin = _choose_margin(loss, margin)
        self.validate_args = validate_args
        self.weight = nn.Parameter(torch.empty(num_classes, dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the centres with uniform directions and lengths near 1."""
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        (classes, dim), scale = self.weight.shape, self.scale
        if isinstance(scale, Tensor):
            scale = scale.item() if values_readable(scale) else math.nan
        return (
            f"{dim}, {classes}, loss={self.kind!r}, margin={self.margin}, "
            f"scale={float(scale)}, class_chunk={self.class_chunk}"
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the cosines (B, C) of features ``x`` (B, D) with every centre, without margin.

        Raises:
            ValueError: if ``x`` has the wrong shape, or a feature or centre has no direction.
        """
        x, weight = self._inputs(x)
        with no_autocast(x):
            return self._unit(x, "x") @ self._unit(weight, "weight").t()

    def loss(
        self,
        x: Tensor,
        target: Tensor,
        *,
        reduction: Reduction = "mean",
        ignore_index: int = -100,
    ) -> Tensor:
        """Return the loss of features ``x`` (B, D) for the classes ``target`` (B,), in nats.

        Args:
            x: features (B, D); those of ignored samples are never read.
            target: classes 0 .. C-1 or ``ignore_index``, integers (B,).
            reduction: ``"mean"`` over the samples that are not ignored, ``"sum"`` or ``"none"``.
            ignore_index: the target of samples that count for nothing.

        Raises:
            ValueError: if shapes disagree, a target names no class, a feature or centre has no
                direction, a mean is asked of no sample, or the scale is no longer positive.
            TypeError: if ``x`` is not floating-point or ``target`` not an integer tensor.
        """
        x, weight = self._inputs(x)
        index, keep = check_target(
            target, x.shape[:1], len(weight), ignore_index, reduction, self.validate_args
        )
        scale = check_scale(self.scale, self.validate_args)
        x = x.masked_fill(~keep.unsqueeze(-1), 1.0)
        with no_autocast(x):
            if values_readable(x, weight, target) and not isinstance(scale, Tensor):
                norms = [
                    lengths(vectors.detach(), name, self.validate_args)
                    for vectors, name in ((x, "x"), (weight, "weight"))
                ]
                tile = self.class_chunk or (_TILE if x.device.type == "cpu" else len(weight))
                keep_softmax = self.class_chunk is None and torch.is_grad_enabled()
                own, rest = OwnAndRest.apply(x, weight, *norms, index, scale, tile, keep_softmax)
            else:
                cosine = self._unit(x, "x") @ self._unit(weight, "weight").t()
                own, rest = own_and_rest(cosine, index, keep, scale)
            spoilt = _SPOIL[self.kind](own, self.margin)
            return softplus_loss(spoilt, rest, keep, scale, reduction)

    def _inputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features and centres in one common precision of at least float32."""
        x, weight = at_least_float32(x, "x"), at_least_float32(self.weight, "weight")
        if x.ndim != 2 or x.shape[1] != weight.shape[1]:
            raise ValueError(f"x must have shape (B, {weight.shape[1]}), got {tuple(x.shape)}")
        dtype = torch.promote_types(x.dtype, weight.dtype)
        return x.to(dtype), weight.to(dtype)

    def _unit(self, vectors: Tensor, name: str) -> Tensor:
        return vectors / lengths(vectors, name, self.validate_args)


def _choose_margin(loss: str, margin: float | None) -> float:
    """The given margin or the default of ``loss``, after a look at its range."""
    defaults = {"am": 0.35, "arc": 0.5, "simple_a": 4, "softmax": 0.0}
    if not isinstance(loss, str) or loss not in defaults:
        raise ValueError(f"loss must be one of {', '.join(defaults)}, got {loss!r}")
    margin = defaults[loss] if margin is None else margin
    if loss == "simple_a":
        check_positive(margin, "margin")  # type: ignore[arg-type]
    elif loss == "arc":
        check_angle(margin)
    else:
        check_margin(margin)
    if loss == "softmax" and margin != 0:
        raise ValueError(f'margin must be 0 for loss="softmax", got {margin}')
    return margin


_SPOIL: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "am": torch.sub,
    "arc": turned,
    "simple_a": folded,
    "softmax": torch.sub,
}
