"""The law that noise words are drawn from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real

import numpy as np
import torch
from torch import Tensor, nn

from lib.nce._checks import check_ids

__all__ = ["UnigramNoise"]


class UnigramNoise(nn.Module):
    """Words drawn in proportion to a power of their counts.

    ::

        U(w) = count(w)^power / sum_v count(v)^power,    0 where count(w) = 0

    A word that was never counted is never drawn, whatever the power, 0 included. The tables are
    buffers outside the state dict: they follow ``.to(device)``, draws are made there, and
    ``.half()`` leaves them in float64.

    Args:
        counts: how often each word occurs (V,); any non-negative numbers, not all 0.
        power: at least 0; 1 for the unigram law itself, 0 for the uniform one.

    Raises:
        ValueError: if ``counts`` is empty, not a vector, negative, infinite or all 0, or ``power``
            is negative or infinite.
        TypeError: if ``counts`` does not hold numbers.

    Source: chapter `nce`, eq-nce-noise; Mikolov et al. (2013).

    >>> noise = UnigramNoise([3, 0, 1], power=1.0)
    >>> noise.log_prob(torch.tensor([0, 1, 2])).exp()
    tensor([0.7500, 0.0000, 0.2500])
    >>> noise.sample((2, 4), generator=torch.Generator().manual_seed(0)).shape
    torch.Size([2, 4])
    """

    _log_probs: Tensor
    _support: Tensor
    _cumulative: Tensor

    def __init__(self, counts: Tensor | np.ndarray | Sequence[float], power: float = 0.75) -> None:
        super().__init__()
        if not (isinstance(power, float | Real) and 0 <= power < math.inf):
            raise ValueError(f"power must be a finite number of at least 0, got {power!r}")
        self.power = float(power)
        given = _as_tensor(counts)
        exact = _checked(given)
        typed = isinstance(counts, Tensor | np.ndarray)
        dtype = given.dtype if typed else torch.get_default_dtype()
        self.dtype = torch.promote_types(dtype, torch.float32)
        support = exact.nonzero().squeeze(1)
        log_counts = exact[support].log()
        log_weights = self.power * (log_counts - log_counts.max())  # at most 0: cannot overflow
        log_probs = log_weights - log_weights.logsumexp(0)
        cumulative = log_probs.exp().cumsum(0)
        everywhere = cumulative.new_full((len(exact),), -math.inf)
        self.register_buffer("_log_probs", everywhere.index_copy(0, support, log_probs), False)
        self.register_buffer("_support", support, False)
        self.register_buffer("_cumulative", cumulative / cumulative[-1], False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> UnigramNoise:
        """Follow ``.to(device)`` but not ``.to(dtype)``: rare words vanish in low precision."""
        return super()._apply(lambda table: table.to(fn(table).device), recurse)

    def __len__(self) -> int:
        return len(self._log_probs)

    @property
    def probs(self) -> Tensor:
        """The probabilities (V,) in float64."""
        return self._log_probs.exp()

    def sample(
        self, shape: int | Sequence[int] = (), generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw word ids, independently and with replacement.

        Args:
            shape: of the result.
            generator: source of the draws, on the device of the noise.

        Returns:
            Ids of that shape, int64.

        Raises:
            ValueError: if a size is negative.
            TypeError: if a size is not an integer.
        """
        size = tuple(shape) if isinstance(shape, Sequence) else (shape,)
        if not all(isinstance(n, Integral) and not isinstance(n, bool) for n in size):
            raise TypeError(f"shape must be an integer or a tuple of integers, got {shape!r}")
        if any(n < 0 for n in size):
            raise ValueError(f"shape must not hold negative sizes, got {size}")
        device = self._cumulative.device
        uniform = torch.rand(size, generator=generator, dtype=torch.float64, device=device)
        return self._support[torch.searchsorted(self._cumulative, uniform, right=True)]

    def log_prob(self, ids: Tensor) -> Tensor:
        """The log-probabilities of ``ids`` in nats, of the same shape.

        They are -inf for words that were never counted; float64 if the counts were, else float32
        (a list is of torch's default dtype).

        Raises:
            ValueError: if an id lies outside ``0 .. V - 1``.
            TypeError: if ``ids`` is not a tensor of integers.
        """
        return self._log_probs[check_ids(ids, len(self), "ids")].to(self.dtype)

    def extra_repr(self) -> str:
        return f"{len(self)}, power={self.power:g}"


def _as_tensor(counts: object) -> Tensor:
    """A list goes by way of numpy: torch would round its floats to float32."""
    if isinstance(counts, Tensor):
        return counts.detach()
    try:
        numbers = counts if isinstance(counts, np.ndarray) else np.array(counts)
        if numbers.dtype == object and numbers.ndim == 1:  # integers beyond 64 bits
            numbers = np.array([float(number) for number in numbers])
        return torch.tensor(numbers)
    except (TypeError, ValueError, RuntimeError) as error:
        seen = type(counts).__name__
        raise TypeError(f"counts must be numbers (V,), got {seen}: {error}") from None


def _checked(counts: Tensor) -> Tensor:
    """The ``counts`` in float64."""
    if counts.dtype == torch.bool or counts.is_complex():
        raise TypeError(f"counts must be real numbers, got {counts.dtype}")
    if counts.dim() != 1 or len(counts) == 0:
        raise ValueError(f"counts must have shape (V,), V >= 1, got {tuple(counts.shape)}")
    exact = counts.double()
    wrong = ~(exact.isfinite() & (exact >= 0))
    if wrong.any():
        word = int(wrong.nonzero()[0])
        seen = counts[word].item()
        raise ValueError(f"counts must be finite and not negative, got {seen} for word {word}")
    if not exact.any():
        raise ValueError(f"counts must not all be 0: none of the {len(counts)} words was seen")
    return exact
