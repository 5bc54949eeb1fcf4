"""Which one of many? InfoNCE, the loss that compares candidates."""

from __future__ import annotations

import math
from functools import reduce
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor

from lib._common import Reduction, at_least_float32, no_autocast, reduce_loss
from lib.nce._checks import check_shape, check_values
from lib.nce._unit import unit

__all__ = ["info_nce_loss"]


def info_nce_loss(
    query: Tensor,
    key: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    negatives: Tensor | None = None,
    normalize: bool = True,
    reduction: Reduction = "mean",
    validate_args: bool = True,
) -> Tensor:
    """InfoNCE: pick each query's own key out of all the keys of the batch.

    ::

        score(i, j) = <query_i, key_j> / temperature
        loss_i = -score(i, i) + log sum_j exp score(i, j)

    ``log N - loss``, with N candidates, never exceeds the mutual information of query and key on
    average, nor log N. One pair alone has nothing to be told from: its loss is 0. For the loss
    symmetric in its two arguments, average it with that of ``(key, query)``.

    Args:
        query: one vector per pair (B, D).
        key: the matching vectors, in the same order (B, D).
        temperature: positive number or scalar tensor (which may be learned).
        negatives: keys to be told apart from instead of the other keys of the batch: shared by
            all queries (M, D), or each query's own (B, M, D).
        normalize: whether to compare directions (cosines) rather than inner products.
        reduction: over the batch.
        validate_args: whether to look for values that are not finite, zero vectors that have no
            direction, inner products that overflow and a temperature tensor that is not positive,
            as in `nce_loss`.

    Returns:
        The loss in nats, scalar or (B,), in at least float32.

    Raises:
        ValueError: if shapes disagree or are empty, ``temperature`` is not positive, or
            ``validate_args`` finds a fault.
        TypeError: if an input is not a floating-point tensor, or ``temperature`` not a number.

    Source: chapter `nce`, eq-nce-info; van den Oord, Li and Vinyals (2018).

    >>> query = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> round(info_nce_loss(query, query, temperature=1.0).item(), 4)
    0.3133
    """
    query, key = at_least_float32(query, "query"), at_least_float32(key, "key")
    if query.dim() != 2 or 0 in query.shape:
        raise ValueError(f"query must have shape (B, D), none empty, got {tuple(query.shape)}")
    check_shape(key, query.shape, "key")
    vectors = {"query": query, "key": key}
    if negatives is not None:
        vectors["negatives"] = at_least_float32(negatives, "negatives")
        _check_negatives(negatives, query)
    dtype = reduce(torch.promote_types, (value.dtype for value in vectors.values()))
    vectors = {name: value.to(dtype) for name, value in vectors.items()}
    _check_temperature(temperature, dtype, validate_args)
    if validate_args:
        for name, value in vectors.items():
            check_values(value.isfinite(), f"{name} must be finite", value)
            if normalize:
                zero = "must have no zero vector, which has no direction"
                check_values((value != 0).any(-1), f"{name} {zero}")
    if normalize:
        vectors = {name: unit(value) for name, value in vectors.items()}
    with no_autocast(query):
        scores = _info_scores(vectors) / temperature
    own = torch.arange(len(query), device=query.device)
    if negatives is not None:
        own = torch.zeros_like(own)
    loss = F.cross_entropy(scores, own, reduction="none")
    if validate_args and not normalize:
        check_values(loss.isfinite(), "query and key must have finite inner products / temperature")
    return reduce_loss(loss, reduction)


def _info_scores(vectors: dict[str, Tensor]) -> Tensor:
    """Scores (B, B) of the batch's keys, or (B, 1 + M) of the own key and the given negatives."""
    query, key, negatives = vectors["query"], vectors["key"], vectors.get("negatives")
    if negatives is None:
        return query @ key.T
    own = (query * key).sum(-1, keepdim=True)
    if negatives.dim() == 2:
        return torch.cat((own, query @ negatives.T), dim=-1)
    return torch.cat((own, (negatives @ query.unsqueeze(-1)).squeeze(-1)), dim=-1)


def _check_negatives(negatives: Tensor, query: Tensor) -> None:
    (b, d), shape = query.shape, tuple(negatives.shape)
    if len(shape) < 2 or shape[:-2] not in ((), (b,)) or shape[-1] != d or 0 in shape:
        raise ValueError(
            f"negatives must have shape (M, {d}) or ({b}, M, {d}), M >= 1, got {shape}"
        )


def _check_temperature(
    temperature: float | Tensor, dtype: torch.dtype, validate_args: bool
) -> None:
    smallest = torch.finfo(dtype).tiny  # 1 / temperature must be finite too
    message = f"temperature must be positive and finite, at least {smallest:.1e}"
    if isinstance(temperature, Tensor):
        if temperature.dim():
            shape = tuple(temperature.shape)
            raise ValueError(f"temperature must be a number or a scalar tensor, got shape {shape}")
        if validate_args:
            value = temperature.to(dtype)
            check_values(value.isfinite() & (value >= smallest), message, value)
    elif not isinstance(temperature, Real):
        raise TypeError(f"temperature must be a number or a scalar tensor, got {temperature!r}")
    elif not smallest <= temperature < math.inf:
        raise ValueError(f"{message}, got {temperature}")
