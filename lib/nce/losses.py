"""Data or noise? The binary losses that need no normaliser: NCE and negative sampling."""

from __future__ import annotations

import math
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib._common import Reduction, at_least_float32, reduce_loss
from lib.nce._checks import check_shape, check_values

__all__ = ["NCELoss", "nce_loss", "negative_sampling_loss"]


def nce_loss(
    data_scores: Tensor,
    noise_scores: Tensor,
    data_log_noise: Tensor,
    noise_log_noise: Tensor,
    *,
    log_partition: float | Tensor = 0.0,
    reduction: Reduction = "mean",
    validate_args: bool = True,
) -> Tensor:
    """Noise contrastive estimation: tell one data point from K noise points.

    The model's log density is ``score - log_partition``; U is the law of the noise::

        logit(x) = score(x) - log_partition - log(K) - log U(x)
        loss = -log sigmoid(logit(x_data)) - sum_k log sigmoid(-logit(x_k))

    Args:
        data_scores: unnormalised log densities of the data, in nats (B,).
        noise_scores: the same of the noise (B, K), K >= 1.
        data_log_noise: log U of the data, in nats (B,); finite, as the noise must cover the data.
        noise_log_noise: log U of the noise (B, K).
        log_partition: log Z in nats, a number, a scalar tensor or one per sample (B,).
        reduction: over the batch; the sum over the K noise points is always taken.
        validate_args: whether to look for scores that are NaN or plus infinity and for infinite
            ``log U``; values cannot be read, and are not checked, under ``vmap`` and
            ``torch.compile``.

    Any leading shape may stand in place of (B,), the empty one included. Scores of minus infinity
    are allowed (a model of bounded support) and so is the infinite loss that follows when they
    are the data's. Plus infinity, an overflow more often than a density, would pass for a perfect
    fit, and is refused.

    Returns:
        The loss in nats, scalar or (B,), in at least float32.

    Raises:
        ValueError: if shapes disagree, a batch or K is empty, or ``validate_args`` finds a fault.
        TypeError: if an input is not a floating-point tensor, or ``log_partition`` not a number.

    Source: chapter `nce`, eq-nce-loss; Gutmann and Hyvarinen (2010).

    >>> data, noise = torch.tensor([2.0]), torch.tensor([[0.0, -1.0]])
    >>> log_u = torch.tensor([-1.0]), torch.tensor([[-1.0, -1.0]])
    >>> round(nce_loss(data, noise, *log_u, log_partition=0.5).item(), 4)
    1.0181
    """
    data_scores = at_least_float32(data_scores, "data_scores")
    noise_scores = at_least_float32(noise_scores, "noise_scores")
    data_log_noise = at_least_float32(data_log_noise, "data_log_noise")
    noise_log_noise = at_least_float32(noise_log_noise, "noise_log_noise")
    _check_samples(data_scores, noise_scores, "data_scores", "noise_scores")
    check_shape(data_log_noise, data_scores.shape, "data_log_noise")
    check_shape(noise_log_noise, noise_scores.shape, "noise_log_noise")
    log_z = _log_partition(log_partition, data_scores)
    if validate_args:
        _check_scores(data_scores, "data_scores")
        _check_scores(noise_scores, "noise_scores")
        covered = "must be finite: the noise must be able to draw every point"
        check_values(data_log_noise.isfinite(), f"data_log_noise {covered}", data_log_noise)
        check_values(noise_log_noise.isfinite(), f"noise_log_noise {covered}", noise_log_noise)
        check_values(log_z.isfinite(), "log_partition must be finite", log_z)
    log_k = math.log(noise_scores.shape[-1])
    positive = data_scores - log_z - (log_k + data_log_noise)
    negative = noise_scores - log_z.unsqueeze(-1) - (log_k + noise_log_noise)
    return reduce_loss(_binary_loss(positive, negative), reduction)


class NCELoss(nn.Module):
    """`nce_loss` with a learned normaliser: the parameter ``log_partition``, in nats.

    ::

        log p(x) = score(x) - log_partition

    Args:
        log_partition: the value to start from.
        reduction: over the batch.
        validate_args: as in `nce_loss`.

    Shapes, result and errors are those of `nce_loss`. The scores' own parameters and
    ``log_partition`` must both be given to the optimiser.

    Source: chapter `nce`, eq-nce-loss; Gutmann and Hyvarinen (2010).

    >>> loss = NCELoss(log_partition=0.5)
    >>> [name for name, _ in loss.named_parameters()]
    ['log_partition']
    >>> log_u = torch.tensor([-1.0]), torch.tensor([[-1.0, -1.0]])
    >>> round(loss(torch.tensor([2.0]), torch.tensor([[0.0, -1.0]]), *log_u).item(), 4)
    1.0181
    """

    def __init__(
        self,
        log_partition: float = 0.0,
        *,
        reduction: Reduction = "mean",
        validate_args: bool = True,
    ) -> None:
        super().__init__()
        start = torch.tensor(float(_log_partition(log_partition, torch.zeros(()))))
        if not start.isfinite():
            raise ValueError(f"log_partition must be finite, got {log_partition}")
        reduce_loss(torch.zeros(1), reduction)
        self.log_partition = nn.Parameter(start)
        self.reduction = reduction
        self.validate_args = validate_args

    def forward(
        self,
        data_scores: Tensor,
        noise_scores: Tensor,
        data_log_noise: Tensor,
        noise_log_noise: Tensor,
    ) -> Tensor:
        """The loss in nats of scores (B,) and (B, K) under the noise's log densities."""
        return nce_loss(
            data_scores,
            noise_scores,
            data_log_noise,
            noise_log_noise,
            log_partition=self.log_partition,
            reduction=self.reduction,
            validate_args=self.validate_args,
        )

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}"


def negative_sampling_loss(
    positive: Tensor,
    negative: Tensor,
    reduction: Reduction = "mean",
    *,
    validate_args: bool = True,
) -> Tensor:
    """Negative sampling: NCE that leaves out log Z, log K and the noise's density.

    ::

        loss = -log sigmoid(positive) - sum_k log sigmoid(-negative_k)

    With nothing divided out the scores settle at ``log p(x) - log U(x) - log K``: for words, their
    pointwise mutual information shifted by log K.

    Args:
        positive: scores of the data, in nats (B,).
        negative: scores of the K noise points of each (B, K), K >= 1.
        reduction: over the batch; the sum over the K noise points is always taken.
        validate_args: whether to look for scores that are NaN or plus infinity, as in `nce_loss`.

    Returns:
        The loss in nats, scalar or (B,), in at least float32.

    Raises:
        ValueError: if shapes disagree, a batch or K is empty, or a score is NaN or plus infinity.
        TypeError: if an input is not a floating-point tensor.

    Source: chapter `nce`, eq-nce-negative-sampling; Mikolov et al. (2013).

    >>> round(negative_sampling_loss(torch.tensor([2.0]), torch.tensor([[0.0, -1.0]])).item(), 4)
    1.1333
    """
    positive = at_least_float32(positive, "positive")
    negative = at_least_float32(negative, "negative")
    _check_samples(positive, negative, "positive", "negative")
    if validate_args:
        _check_scores(positive, "positive")
        _check_scores(negative, "negative")
    return reduce_loss(_binary_loss(positive, negative), reduction)


def _binary_loss(positive: Tensor, negative: Tensor) -> Tensor:
    """Cross entropy of one positive (B,) and K negative logits (B, K), summed to (B,)."""
    return -F.logsigmoid(positive) - F.logsigmoid(-negative).sum(-1)


def _check_samples(one: Tensor, many: Tensor, one_name: str, many_name: str) -> None:
    if many.dim() != one.dim() + 1 or many.shape[:-1] != one.shape:
        wanted = ", ".join([*map(str, one.shape), "K"])
        raise ValueError(
            f"{many_name} must have shape ({wanted}), K noise points for each of the "
            f"{one_name} {tuple(one.shape)}, got {tuple(many.shape)}"
        )
    if many.shape[-1] == 0:
        raise ValueError(f"{many_name} must hold at least one noise point for each, got K = 0")
    if one.numel() == 0:
        raise ValueError(f"{one_name} must hold at least one sample, got shape {tuple(one.shape)}")


def _check_scores(scores: Tensor, name: str) -> None:
    check_values(scores < math.inf, f"{name} must not be NaN or plus infinity", scores)


def _log_partition(value: float | Tensor, scores: Tensor) -> Tensor:
    """``value`` as a tensor that is scalar or shaped like ``scores``."""
    if isinstance(value, Real):
        return torch.as_tensor(value, dtype=scores.dtype, device=scores.device)
    if not isinstance(value, Tensor):
        raise TypeError(f"log_partition must be a number or a tensor, got {value!r}")
    value = at_least_float32(value, "log_partition")
    if value.dim() and value.shape != scores.shape:
        wanted = f"() or {tuple(scores.shape)}"
        raise ValueError(f"log_partition must have shape {wanted}, got {tuple(value.shape)}")
    return value
