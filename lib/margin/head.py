"""A classification layer with a margin, whose loss never writes the cosines out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lib._common import Reduction, at_least_float32, check_positive, no_autocast, values_readable
from lib.margin.losses import (
    _check_angle,
    _check_margin,
    _check_scale,
    _check_target,
    _folded,
    _own_and_rest,
    _softplus_loss,
    _turned,
)

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
    of the weights itself.

    Args:
        dim: size D of the features.
        num_classes: C.
        loss: the function psi of the target's cosine, named by its loss: ``"am"``,
            ``"arc"``, ``"simple_a"``, or ``"softmax"`` for none.
        margin: default 0.35 for ``"am"``; 0.5 (radians) for ``"arc"``; the integer factor m,
            default 4, for ``"simple_a"``; 0 for ``"softmax"``.
        scale: s, the largest size of a logit.
        class_chunk: classes at a time when memory matters more than the last third of the speed;
            None keeps the one (B, C) tensor.
        validate_args: whether to look for zero or not finite features and centres and for targets
            out of range; values cannot be read, and are not checked, under ``torch.compile`` and
            the transforms of ``torch.func``.
        device: where ``weight`` is made.
        dtype: of ``weight``.

    Attributes:
        weight: centres (C, D) of any length; only their directions count.

    Under autocast, and for half-precision features or weights, both methods compute in float32.
    Under ``torch.compile`` and the transforms of ``torch.func``, ``loss`` takes the plain road
    through ``forward``; so must second derivatives, as in ``am_softmax_loss(head(x), target)``.

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
        scale: float = 30.0,
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
        _check_scale(scale)
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
        classes, dim = self.weight.shape
        return (
            f"{dim}, {classes}, loss={self.kind!r}, margin={self.margin}, scale={self.scale}, "
            f"class_chunk={self.class_chunk}"
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
                direction, or a mean is asked of no sample.
            TypeError: if ``x`` is not floating-point or ``target`` not an integer tensor.
        """
        x, weight = self._inputs(x)
        index, keep = _check_target(
            target, x.shape[:1], len(weight), ignore_index, reduction, self.validate_args
        )
        x = x.masked_fill(~keep.unsqueeze(-1), 1.0)
        with no_autocast(x):
            if values_readable(x, weight, target):
                norms = self._norm(x.detach(), "x"), self._norm(weight.detach(), "weight")
                tile = self.class_chunk or (_TILE if x.device.type == "cpu" else len(weight))
                own, rest = _OwnAndRest.apply(
                    x, weight, *norms, index, self.scale, tile, self.class_chunk is None
                )
            else:
                cosine = self._unit(x, "x") @ self._unit(weight, "weight").t()
                own, rest = _own_and_rest(cosine, index, keep, self.scale)
            spoilt = _SPOIL[self.kind](own, self.margin)
            return _softplus_loss(spoilt, rest, keep, self.scale, reduction)

    def _inputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features and centres in one common precision of at least float32."""
        x, weight = at_least_float32(x, "x"), at_least_float32(self.weight, "weight")
        if x.ndim != 2 or x.shape[1] != weight.shape[1]:
            raise ValueError(f"x must have shape (B, {weight.shape[1]}), got {tuple(x.shape)}")
        dtype = torch.promote_types(x.dtype, weight.dtype)
        return x.to(dtype), weight.to(dtype)

    def _unit(self, vectors: Tensor, name: str) -> Tensor:
        return vectors / self._norm(vectors, name)

    def _norm(self, vectors: Tensor, name: str) -> Tensor:
        """Lengths of the rows (N, 1); a zero row that is not refused counts as of length 1."""
        norm = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
        fine = (norm > 0) & (norm < math.inf)
        if self.validate_args and values_readable(vectors) and not fine.all():
            row = int((~fine).squeeze(1).nonzero()[0])
            raise ValueError(
                f"{name} needs rows with a direction, but row {row} has length {norm[row].item()}"
            )
        return norm.masked_fill(norm == 0, 1.0)


def _choose_margin(loss: str, margin: float | None) -> float:
    """The given margin or the default of ``loss``, after a look at its range."""
    defaults = {"am": 0.35, "arc": 0.5, "simple_a": 4, "softmax": 0.0}
    if loss not in defaults:
        raise ValueError(f"loss must be one of {', '.join(defaults)}, got {loss!r}")
    margin = defaults[loss] if margin is None else margin
    if loss == "simple_a":
        check_positive(margin, "margin")  # type: ignore[arg-type]
    elif loss == "arc":
        _check_angle(margin)
    else:
        _check_margin(margin)
    if loss == "softmax" and margin != 0:
        raise ValueError(f'margin must be 0 for loss="softmax", got {margin}')
    return margin


_SPOIL: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "am": torch.sub,
    "arc": _turned,
    "simple_a": _folded,
    "softmax": torch.sub,
}


class _OwnAndRest(torch.autograd.Function):
    """The target's cosine, and the log of the sum of exp(scale c) over all others, both (B,)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        x_norm: Tensor,
        norm: Tensor,
        target: Tensor,
        scale: float,
        tile: int,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        unit, shrink = x / x_norm, 1 / norm  # (B, D), (C, 1)
        centre = weight.index_select(0, target) * shrink.index_select(0, target)  # (B, D)
        peak = x.new_full((len(x), 1), -2.0 * scale)  # below every logit
        total = torch.zeros_like(peak)
        kept: list[Tensor] = []
        peaks: list[Tensor] = []
        keep = keep and any(ctx.needs_input_grad)
        spare = None if keep else x.new_empty(len(x), min(tile, len(weight)))
        for first, centres in _tiles(weight, shrink, tile):
            logits = _wrong_logits(scale * unit, centres, target - first, spare)
            above = torch.maximum(peak, logits.amax(1, keepdim=True))
            logits.sub_(above).exp_()
            total = total * (peak - above).exp() + logits.sum(1, keepdim=True)
            peak = above
            if keep:
                kept.append(logits)
                peaks.append(above)
        rest = peak + total.log()  # (B, 1)
        for logits, above in zip(kept, peaks, strict=True):
            logits.mul_((above - rest.clamp_min(-2.0 * scale)).exp())
        ctx.save_for_backward(unit, weight, x_norm, shrink, target, centre, rest, *kept)
        ctx.scale, ctx.tile = scale, tile
        return (unit * centre).sum(1), rest.squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_own: Tensor, grad_rest: Tensor) -> tuple[Tensor | None, ...]:
        unit, weight, x_norm, shrink, target, centre, rest, *kept = ctx.saved_tensors
        need_x, need_weight = ctx.needs_input_grad[:2]
        push, pull = ctx.scale * grad_rest.unsqueeze(1), grad_own.unsqueeze(1)  # (B, 1)
        pushed, floor = unit * push, rest.clamp_min(-2.0 * ctx.scale)
        grad_unit = torch.zeros_like(unit)
        grad_weight = torch.empty_like(weight) if need_weight else None
        with no_autocast(unit):
            spare = None if kept else unit.new_empty(len(unit), min(ctx.tile, len(weight)))
            for first, centres in _tiles(weight, shrink, ctx.tile):
                if kept:
                    wrong = kept[first // ctx.tile]  # (B, n), the softmax over the wrong classes
                else:
                    wrong = _wrong_logits(ctx.scale * unit, centres, target - first, spare)
                    wrong.sub_(floor).exp_()
                grad_unit.addmm_(wrong, centres)
                if grad_weight is not None:
                    rows = slice(first, first + len(centres))
                    grad = torch.mm(wrong.t(), pushed, out=grad_weight[rows])
                    _project_(grad, centres, shrink[rows])
            grad_x = None
            if need_x:
                grad_x = _project_(grad_unit.mul_(push).addcmul_(centre, pull), unit, 1 / x_norm)
            if grad_weight is not None:
                grad_centre = _project_(unit * pull, centre, shrink.index_select(0, target))
                grad_weight.index_add_(0, target, grad_centre)
        return grad_x, grad_weight, None, None, None, None, None, None


def _tiles(weight: Tensor, shrink: Tensor, tile: int) -> Iterator[tuple[int, Tensor]]:
    """The first class of each tile and its centres (n, D) of length 1, all in one buffer."""
    buffer = torch.empty_like(weight[:tile])
    for first in range(0, len(weight), tile):
        rows = weight[first : first + tile]
        yield first, torch.mul(rows, shrink[first : first + tile], out=buffer[: len(rows)])


def _wrong_logits(query: Tensor, centres: Tensor, column: Tensor, spare: Tensor | None) -> Tensor:
    """Logits (B, n) of a tile, into ``spare`` if given; -inf where the class is the target."""
    out = None if spare is None else spare[:, : len(centres)]
    logits = torch.mm(query, centres.t(), out=out)
    column = column.unsqueeze(1)
    inside = (column >= 0) & (column < len(centres))
    column = column.clamp(0, len(centres) - 1)
    return logits.scatter_(1, column, logits.gather(1, column).masked_fill(inside, -math.inf))


def _project_(grad: Tensor, unit: Tensor, shrink: Tensor) -> Tensor:
    """Carry a gradient by a unit vector back to the vector of length 1 / shrink, in place."""
    along = (grad * unit).sum(1, keepdim=True)
    return grad.addcmul_(unit, along, value=-1).mul_(shrink)
