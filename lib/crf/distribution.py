"""The linear-chain CRF as a torch distribution over tag sequences."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints, kl

from lib._common import at_least_float32, bool_mask, check_positive
from lib.crf import semiring

__all__ = ["LinearChainCRF"]


class LinearChainCRF(Distribution):
    """The distribution of a linear-chain CRF over tag sequences y_1 .. y_n.

        log p(y) = start(y_1) + sum_t h_t(y_t) + sum_t A(y_t, y_{t+1}) + end(y_n) - log Z

    Args:
        emissions: scores h of shape (B, T, C); -inf forbids a tag at a position.
        transitions: scores A of shape (C, C), [from, to]; -inf forbids a transition.
        start: scores of the first tag, (C,); 0 by default.
        end: scores of the last tag, (C,); 0 by default.
        mask: (B, T), True = keep; sequences are padded on the right. What stands in the padding is
            never read.
        validate_args: check values as torch.distributions does.

    Source: chapter ``crf``, eq-crf-model; Lafferty, McCallum and Pereira (2001).

    >>> crf = LinearChainCRF(torch.zeros(1, 3, 2), torch.zeros(2, 2))
    >>> crf.log_partition.exp()
    tensor([8.])
    """

    arg_constraints = {}  # noqa: RUF012
    support = constraints.independent(constraints.integer_interval(-1, 2**31), 1)
    has_enumerate_support = False

    def __init__(
        self,
        emissions: Tensor,
        transitions: Tensor,
        start: Tensor | None = None,
        end: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        validate_args: bool | None = None,
    ) -> None:
        emissions = at_least_float32(emissions, "emissions")
        if emissions.dim() != 3 or 0 in emissions.shape[1:]:
            raise ValueError(f"emissions must have shape (B, T, C), got {tuple(emissions.shape)}")
        batch, length, num_tags = emissions.shape
        if start is None:
            start = emissions.new_zeros(num_tags)
        if end is None:
            end = emissions.new_zeros(num_tags)
        for name, value, shape in (
            ("transitions", transitions, (num_tags, num_tags)),
            ("start", start, (num_tags,)),
            ("end", end, (num_tags,)),
        ):
            if tuple(value.shape) != shape:
                raise ValueError(
                    f"{name} must have shape {shape} beside emissions of shape "
                    f"{tuple(emissions.shape)}, got {tuple(value.shape)}"
                )
        if mask is None:
            mask = emissions.new_ones(batch, length, dtype=torch.bool)
        self.mask = bool_mask(mask, (batch, length))
        self.dtype = emissions.dtype
        self.emissions = emissions.masked_fill(~self.mask[..., None], 0)
        self.transitions = at_least_float32(transitions, "transitions")
        self.start = at_least_float32(start, "start")
        self.end = at_least_float32(end, "end")
        super().__init__(torch.Size([batch]), torch.Size([length]), validate_args=False)
        self._validate_args = (
            Distribution._validate_args if validate_args is None else validate_args
        )
        if self._validate_args:
            self._check_values()

    def _check_values(self) -> None:
        holes = (~self.mask[:, :-1] & self.mask[:, 1:]).any(1)
        bad = (holes | ~self.mask[:, 0]).nonzero()
        if len(bad):
            row = int(bad[0])
            raise ValueError(
                "mask must be True from the first position to the end of each sequence and False "
                f"after it, got row {row} = {self.mask[row].int().tolist()}"
            )

    @property
    def _scores(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return (
            self.emissions.double(),
            self.transitions.double(),
            self.start.double(),
            self.end.double(),
        )

    def _log_partition(self) -> Tensor:
        h, A, start, end = self._scores
        alpha = semiring.forward(h, A, start, self.mask, semiring.logsumexp)
        return semiring.logsumexp(alpha[:, -1] + end, -1)

    @property
    def log_partition(self) -> Tensor:
        """log Z in nats, (B,)."""
        return self._log_partition().to(self.dtype)

    def score(self, tags: Tensor) -> Tensor:
        """The unnormalised log-probability of ``tags`` (..., B, T)."""
        return self._score(tags).to(self.dtype)

    def _score(self, tags: Tensor) -> Tensor:
        h, A, start, end = self._scores
        if tags.shape[-2:] != self.mask.shape:
            raise ValueError(
                f"tags must have shape (..., {self.mask.shape[0]}, {self.mask.shape[1]}), "
                f"got {tuple(tags.shape)}"
            )
        num_tags = h.shape[-1]
        bad = self.mask & ((tags < 0) | (tags >= num_tags))
        if self._validate_args and bad.any():
            raise ValueError(f"tags must lie in 0..{num_tags - 1}, got {int(tags[bad][0])}")
        tags = torch.where(self.mask, tags, 0)
        node = h.expand(*tags.shape, num_tags).gather(-1, tags[..., None]).squeeze(-1)
        edge = torch.where(self.mask[:, 1:], A[tags[..., :-1], tags[..., 1:]], 0)
        last = (self.mask.sum(1) - 1).expand(tags.shape[:-1])[..., None]
        final = tags.gather(-1, last).squeeze(-1)
        return node.sum(-1) + edge.sum(-1) + start[tags[..., 0]] + end[final]

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(tags) in nats for ``value`` (..., B, T); -inf for a forbidden path."""
        score = self._score(value)
        if self._validate_args and (score == -torch.inf).any():
            raise ValueError("tags must not take a forbidden path")
        return (score - self._log_partition()).to(self.dtype)

    def _messages(self) -> tuple[Tensor, Tensor, Tensor]:
        h, A, start, end = self._scores
        alpha = semiring.forward(h, A, start, self.mask, semiring.logsumexp)
        beta = semiring.backward(h, A, end, self.mask, semiring.logsumexp)
        return alpha, beta, semiring.logsumexp(alpha[:, -1] + end, -1)

    def _marginals(self) -> Tensor:
        alpha, beta, log_z = self._messages()
        return (alpha + beta - log_z[:, None, None]).exp() * self.mask[..., None]

    def _pair_marginals(self) -> Tensor:
        h, A, _, _ = self._scores
        alpha, beta, log_z = self._messages()
        pair = alpha[:, :-1, :, None] + A + (h + beta)[:, 1:, None, :] - log_z[:, None, None, None]
        return pair.exp() * self.mask[:, 1:, None, None]

    @property
    def marginals(self) -> Tensor:
        """p(y_t = i), (B, T, C); 0 in the padding."""
        return self._marginals().to(self.dtype)

    @property
    def pair_marginals(self) -> Tensor:
        """p(y_t = i, y_{t+1} = j), (B, T-1, C, C); 0 in the padding."""
        return self._pair_marginals().to(self.dtype)

    def _expected_score(self, other: LinearChainCRF) -> Tensor:
        """E_p[score under other], (B,)."""
        h, A, start, end = other._scores
        node, pair = self._marginals(), self._pair_marginals().sum(1)
        last = (self.mask.sum(1) - 1)[:, None, None].expand(-1, 1, node.shape[-1])
        final = node.gather(1, last).squeeze(1)

        def expect(p: Tensor, score: Tensor, axes: int) -> Tensor:
            term = p * torch.where(p == 0, 0, score)
            return term.flatten(-axes).sum(-1)

        return (
            expect(node, h, 2)
            + expect(pair, A, 2)
            + expect(node[:, 0], start, 1)
            + expect(final, end, 1)
        )

    def entropy(self) -> Tensor:
        """H(p) = log Z - E_p[score] in nats, (B,)."""
        return (self._log_partition() - self._expected_score(self)).to(self.dtype)

    @property
    def mode(self) -> Tensor:
        """The most probable tags (Viterbi), (B, T) long, -1 in the padding."""
        with torch.no_grad():
            h, A, start, end = self._scores
            alpha = semiring.forward(h, A, start, self.mask, torch.amax)
            return semiring.trace(alpha, A, end, self.mask, torch.argmax)

    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        """The k best paths: scores (B, k), falling, and tags (B, k, T)."""
        check_positive(k, "k")
        with torch.no_grad():
            h, A, start, end = self._scores
            length, num_tags = h.shape[1:]
            best = (start + h[:, 0]).unsqueeze(2)  # (B, C, k)
            best = torch.nn.functional.pad(best, (0, k - 1), value=-torch.inf)
            pointers = []
            for t in range(1, length):
                keep = self.mask[:, t, None, None]
                paths = (best.unsqueeze(3) + A[:, None]).flatten(1, 2)  # (B, C k, C)
                top, pointer = paths.topk(k, 1)
                step = top.mT + h[:, t, :, None]
                best = torch.where(keep, step, best)
                stay = torch.arange(num_tags * k, device=h.device).view(num_tags, k)
                pointers.append(torch.where(keep, pointer.mT, stay).flatten(1))
            scores, state = (best + end[:, None]).flatten(1).topk(k, 1)
            states = [state]
            for pointer in reversed(pointers):
                state = pointer.gather(1, state)
                states.append(state)
            tags = torch.stack(states[::-1], 2) // k
            tags = tags.masked_fill(~self.mask[:, None] | (scores == -torch.inf)[..., None], -1)
            return scores.to(self.dtype), tags

    def sample(self, sample_shape: torch.Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        """Exact samples (forward filtering, backward sampling), (*sample_shape, B, T)."""
        shape = self._extended_shape(torch.Size(sample_shape))
        with torch.no_grad():
            h, A, start, end = self._scores
            alpha = semiring.forward(h, A, start, self.mask, semiring.logsumexp)
            n = torch.Size(sample_shape).numel()
            alpha, mask = alpha.repeat(n, 1, 1), self.mask.repeat(n, 1)

            def draw(scores: Tensor, dim: int) -> Tensor:
                noise = torch.empty_like(scores).exponential_().log()
                return (scores - noise).argmax(dim)

            return semiring.trace(alpha, A, end, mask, draw).view(shape)

    def span_log_prob(self, start: int, tags: Tensor) -> Tensor:
        """log p(y_start .. y_{start+L-1} = tags) in nats, (B,), for ``tags`` (B, L)."""
        length = self.mask.shape[1]
        if tags.dim() != 2 or len(tags) != len(self.mask) or tags.shape[1] < 1:
            raise ValueError(
                f"tags must have shape (B, L) with B = {len(self.mask)}, got {tuple(tags.shape)}"
            )
        stop = start + tags.shape[1]
        if start < 0 or stop > length or not self.mask[:, stop - 1].all():
            raise ValueError(
                f"the span {start}..{stop - 1} must lie within every sequence, got lengths "
                f"{self.mask.sum(1).tolist()}"
            )
        other = torch.ones_like(self.emissions[:, start:stop], dtype=torch.bool)
        other = other.scatter(-1, tags[..., None], False)
        clamped = self._get_clamped(start, stop, other)
        return (clamped._log_partition() - self._log_partition()).to(self.dtype)

    def _get_clamped(self, start: int, stop: int, other: Tensor) -> LinearChainCRF:
        full = torch.zeros_like(self.emissions, dtype=torch.bool)
        full[:, start:stop] = other
        h = self.emissions.masked_fill(full, -torch.inf)
        return LinearChainCRF(
            h, self.transitions, self.start, self.end, self.mask, validate_args=False
        )


@kl.register_kl(LinearChainCRF, LinearChainCRF)
def _kl(p: LinearChainCRF, q: LinearChainCRF) -> Tensor:
    """KL(p || q) = E_p[log p - log q] in nats, (B,)."""
    if p.emissions.shape != q.emissions.shape or not torch.equal(p.mask, q.mask):
        raise ValueError("p and q must be distributions over the same sequences")
    cross = q._log_partition() - p._expected_score(q)
    return (cross - p._log_partition() + p._expected_score(p)).to(p.dtype)
