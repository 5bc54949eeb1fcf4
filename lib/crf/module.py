"""A CRF layer whose checkpoints are those of pytorch-crf."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lib._common import Reduction, check_positive, reduce_loss
from lib.crf.distribution import LinearChainCRF

__all__ = ["CRF"]


class CRF(nn.Module):
    """Learned transitions: maps emissions to a :class:`LinearChainCRF`.

    The parameters ``start_transitions (C,)``, ``end_transitions (C,)`` and ``transitions (C, C)``
    carry the names and the layout of pytorch-crf, so that its checkpoints load with
    ``strict=True``; what constraints forbid is -inf in training and in decoding alike and stays
    out of the state dict.

    Args:
        num_tags: number of tags C.
        constraints: ``(transitions (C, C), start (C,), end (C,))``, boolean, True = allowed, as
            :func:`allowed_transitions` makes them.

    Raises:
        TypeError: if ``constraints`` are not tensors.
        ValueError: if ``num_tags`` is below 1 or ``constraints`` have other shapes.

    Source: chapter ``crf``; Lafferty, McCallum and Pereira (2001).

    >>> crf = CRF(4)
    >>> emissions = torch.zeros(2, 3, 4)
    >>> tags = torch.tensor([[0, 1, 2], [3, 3, -1]])
    >>> crf.loss(emissions, tags, mask=tags >= 0, reduction="none").shape
    torch.Size([2])
    >>> crf.decode(emissions, mask=tags >= 0).shape
    torch.Size([2, 3])
    """

    allowed: Tensor | None
    allowed_start: Tensor | None
    allowed_end: Tensor | None

    def __init__(self, num_tags: int, *, constraints: Sequence[Tensor] | None = None) -> None:
        super().__init__()
        check_positive(num_tags, "num_tags")
        self.num_tags = num_tags
        self.start_transitions = nn.Parameter(torch.empty(num_tags))
        self.end_transitions = nn.Parameter(torch.empty(num_tags))
        self.transitions = nn.Parameter(torch.empty(num_tags, num_tags))
        names = ("allowed", "allowed_start", "allowed_end")
        shapes = ((num_tags, num_tags), (num_tags,), (num_tags,))
        if constraints is not None and len(constraints) != len(names):
            raise ValueError(
                "constraints must be the three tables (transitions, start, end), "
                f"got {len(constraints)}"
            )
        for name, shape, table in zip(
            names, shapes, constraints or (None, None, None), strict=True
        ):
            if table is not None and not isinstance(table, Tensor):
                raise TypeError(f"constraints must hold tensors, got {type(table).__name__}")
            if table is not None and (table.dtype != torch.bool or tuple(table.shape) != shape):
                raise ValueError(
                    f"constraints must hold boolean tables, here of shape {shape}, "
                    f"got {table.dtype} {tuple(table.shape)}"
                )
            self.register_buffer(name, table, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters from U(-0.1, 0.1)."""
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.1, 0.1)

    def forward(self, emissions: Tensor, mask: Tensor | None = None) -> LinearChainCRF:
        """The distribution over tag sequences given ``emissions`` (B, T, C) and ``mask`` (B, T)."""
        scores = []
        for score, allowed in (
            (self.transitions, self.allowed),
            (self.start_transitions, self.allowed_start),
            (self.end_transitions, self.allowed_end),
        ):
            scores.append(score if allowed is None else score.masked_fill(~allowed, -torch.inf))
        transitions, start, end = scores
        return LinearChainCRF(emissions, transitions, start, end, mask)

    def loss(
        self,
        emissions: Tensor,
        tags: Tensor,
        mask: Tensor | None = None,
        reduction: Reduction | Literal["token_mean"] = "mean",
    ) -> Tensor:
        """The negative log-likelihood of ``tags`` (B, T) in nats.

        Args:
            emissions: (B, T, C).
            tags: (B, T), integers; in the padding they may be any number.
            mask: (B, T), True = keep; all True by default.
            reduction: ``"mean"`` or ``"sum"`` over sequences, ``"none"`` (B,), or ``"token_mean"``:
                the sum divided by the number of kept positions.

        Raises:
            ValueError: as :meth:`LinearChainCRF.log_prob` does.
        """
        distribution = self(emissions, mask)
        values = -distribution.log_prob(tags)
        if values.dim() != 1:
            raise ValueError(f"tags must have shape (B, T), got {tuple(tags.shape)}")
        if reduction == "token_mean":
            return values.sum() / distribution.mask.sum()
        return reduce_loss(values, reduction)

    @torch.no_grad()
    def init_from_counts(
        self, tags: Tensor, mask: Tensor | None = None, *, smoothing: float = 1.0
    ) -> None:
        """Start from the tag bigrams of a corpus: log p(next tag or end | tag), log p(first tag).

        Args:
            tags: (B, T), integers; in the padding they may be any number.
            mask: (B, T), True = keep; all True by default.
            smoothing: added to every count, above 0 and finite.

        Raises:
            TypeError: if ``tags`` are not integers.
            ValueError: if ``smoothing`` is not above 0 and finite or ``tags`` do not fit.
        """
        if not 0 < smoothing < torch.inf:
            raise ValueError(f"smoothing must be above 0 and finite, got {smoothing}")
        if not isinstance(tags, Tensor):
            raise TypeError(f"tags must be a tensor of integers, got {type(tags).__name__}")
        if tags.dim() != 2 or not tags.shape[1]:
            raise ValueError(f"tags must have shape (B, T), got {tuple(tags.shape)}")
        zeros = torch.zeros(*tags.shape, self.num_tags, device=tags.device)
        free = zeros.new_zeros(self.num_tags, requires_grad=True)
        moves = zeros.new_zeros(self.num_tags, self.num_tags, requires_grad=True)
        last = free.detach().clone().requires_grad_()
        with torch.enable_grad():  # the gradient of a score is what it counts
            score = LinearChainCRF(zeros, moves, free, last, mask).score(tags).sum()
        first, last, moves = torch.autograd.grad(score, (free, last, moves))
        total = torch.cat([moves, last.unsqueeze(1)], 1) + smoothing
        total = (total / total.sum(1, keepdim=True)).log()
        self.transitions.copy_(total[:, :-1])
        self.end_transitions.copy_(total[:, -1])
        self.start_transitions.copy_(((first + smoothing) / (first + smoothing).sum()).log())

    def decode(self, emissions: Tensor, mask: Tensor | None = None) -> Tensor:
        """The most probable tags (B, T), -1 beyond the end of a sequence."""
        return self(emissions, mask).mode

    def extra_repr(self) -> str:
        constrained = "" if self.allowed is None else ", constrained"
        return f"{self.num_tags}{constrained}"
