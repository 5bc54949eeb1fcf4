"""How often a sentence finds one of its own among its nearest neighbours."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lib._common import at_least_float32, check_positive
from lib.margin._checks import lengths

__all__ = ["retrieval_accuracy"]

_CELLS = 1 << 22  # similarities held at a time
_ROUNDING = 1e-13  # float64 cosines no further apart than this are equal


@torch.no_grad()
def retrieval_accuracy(
    vectors: Tensor,
    groups: Tensor | Sequence[int],
    *,
    k: int | Sequence[int] = (1, 5, 10),
    gallery: tuple[Tensor, Tensor | Sequence[int]] | None = None,
) -> dict[int, float]:
    """The share of queries with a member of their own group among the k nearest vectors.

    A query q of group g is a hit at k if fewer than k vectors of other groups are as near, by
    cosine, as the nearest vector of g. Each vector queries all the others; it is itself left
    out, and so are, of the mean, queries without a partner. A tie counts against the query: an
    encoder that maps everything to one point scores 0, not 1. So that ties are ties, cosines are
    formed in float64, whatever the precision of the vectors, and compared up to its rounding.

    Args:
        vectors: queries, of any length but zero (N, D).
        groups: the group of each, integers (N,).
        k: how many neighbours are looked at, one number or several.
        gallery: vectors (M, D) and groups (M,) to search instead; then nothing is left out but
            queries whose group the gallery lacks.

    Returns:
        Accuracy in [0, 1] by k.

    Raises:
        ValueError: if shapes disagree, k is larger than the number of candidates, a vector is
            zero or not finite, or no query has a partner.
        TypeError: if ``vectors`` is not floating-point, ``groups`` or ``k`` not integers, or
            ``gallery`` not a pair.

    Memory stays at a few million similarities whatever N.

    Source: chapter `margin`, eq-margin-hit; Su (2018), archive number 5743.

    >>> vectors = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.1, 1.0], [0.6, 0.8]])
    >>> retrieval_accuracy(vectors, [7, 7, 5, 5], k=(1, 2))
    {1: 0.5, 2: 1.0}
    """
    units, labels = _unit(vectors, "vectors"), _labels(groups, vectors, "groups")
    others, other_labels = units, labels
    if gallery is not None:
        if not isinstance(gallery, tuple | list) or len(gallery) != 2:
            raise TypeError(f"gallery must be (vectors, groups), got {type(gallery).__name__}")
        others = _unit(gallery[0], "gallery vectors").to(units.device)
        other_labels = _labels(gallery[1], gallery[0], "gallery groups")
        if others.shape[1] != units.shape[1]:
            raise ValueError(
                f"gallery vectors must have dimension {units.shape[1]}, got {others.shape[1]}"
            )
    labels, other_labels = labels.to(units.device), other_labels.to(units.device)
    ks = _numbers(k, len(others) - (gallery is None))
    ahead = []
    for rows in torch.arange(len(units), device=units.device).split(
        max(1, _CELLS // max(1, len(others)))
    ):
        similarity = units[rows] @ others.t()  # (b, M)
        same = labels[rows].unsqueeze(1) == other_labels
        wrong = similarity.masked_fill(same, -2.0)
        if gallery is None:
            same[torch.arange(len(rows)), rows] = False
        best = similarity.masked_fill_(~same, -2.0).amax(1, keepdim=True)
        ahead.append((wrong >= best - _ROUNDING).sum(1)[same.any(1)])
    rank = torch.cat(ahead)
    if len(rank) == 0:
        where = "shares its group with another" if gallery is None else "finds its group there"
        raise ValueError(f"no query has a partner: none {where}")
    return {number: (rank < number).double().mean().item() for number in ks}


def _unit(vectors: Tensor, name: str) -> Tensor:
    """Unit vectors (N, D) in float64, on the CPU where the device has no float64."""
    vectors = at_least_float32(vectors, name)
    if vectors.ndim != 2:
        raise ValueError(f"{name} must have shape (N, D), got {tuple(vectors.shape)}")
    if len(vectors) == 0:
        raise ValueError(f"{name} must hold at least one vector, got {tuple(vectors.shape)}")
    vectors = (vectors.cpu() if vectors.device.type == "mps" else vectors).double()
    return vectors / lengths(vectors, name)


def _labels(groups: Tensor | Sequence[int], vectors: Tensor, name: str) -> Tensor:
    try:
        labels = torch.as_tensor(groups)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be integers: {error}") from error
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got {labels.dtype}")
    if tuple(labels.shape) != (len(vectors),):
        raise ValueError(f"{name} must have shape ({len(vectors)},), got {tuple(labels.shape)}")
    return labels.long()


def _numbers(k: int | Sequence[int], candidates: int) -> tuple[int, ...]:
    if isinstance(k, Tensor):
        k = k.tolist()
    ks = tuple(k) if isinstance(k, Iterable) else (k,)
    if not ks:
        raise ValueError("k must hold at least one number")
    for number in ks:
        check_positive(number, "k")
        if number > candidates:
            raise ValueError(
                f"k must be at most the number of candidates {candidates}, got {number}"
            )
    return tuple(map(int, ks))
