"""The loss of many classes without their cosines: one pass over tiles, and its gradient."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lib._common import no_autocast
from lib.margin._checks import lengths
from lib.margin._softplus import own_and_rest

__all__ = ["OwnAndRest"]


class OwnAndRest(torch.autograd.Function):
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
        ctx.save_for_backward(x, weight, unit, x_norm, shrink, target, centre, rest, *kept)
        ctx.scale, ctx.tile = scale, tile
        return (unit * centre).sum(1), rest.squeeze(1)

    @staticmethod
    def backward(ctx: Any, grad_own: Tensor, grad_rest: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, unit, x_norm, shrink, target, centre, rest, *kept = ctx.saved_tensors
        need_x, need_weight = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():  # create_graph=True: the gradient must have a derivative too
            wanted = [v for v, needed in ((x, need_x), (weight, need_weight)) if needed]
            with no_autocast(x):
                both = _plain(x, weight, target, ctx.scale)
                grads = iter(
                    torch.autograd.grad(both, wanted, (grad_own, grad_rest), create_graph=True)
                )
            found = [next(grads) if needed else None for needed in (need_x, need_weight)]
            return *found, None, None, None, None, None, None
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


def _plain(x: Tensor, weight: Tensor, target: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The same two, by way of all the cosines (B, C)."""
    units = [vectors / lengths(vectors, "", validate_args=False) for vectors in (x, weight)]
    keep = torch.ones_like(target, dtype=torch.bool)
    return own_and_rest(units[0] @ units[1].t(), target, keep, scale)


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
