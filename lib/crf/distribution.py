"""The linear-chain CRF as a torch distribution over tag sequences."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints, register_kl

from lib._common import at_least_float32, bool_mask, check_positive
from lib.crf import functions
from lib.crf.checks import check_mask, check_scores, check_span, check_tags
from lib.crf.inference import path_score
from lib.crf.semiring import Chain, best_paths, logsumexp, trace

__all__ = ["LinearChainCRF"]

_WITHOUT_FLOAT64 = {"mps"}  # device types


class LinearChainCRF(Distribution):
    r"""The distribution of a linear-chain CRF over tag sequences y_1 .. y_n.

        log p(y) = start(y_1) + sum_t h_t(y_t) + sum_t A(y_t, y_{t+1}) + end(y_n) - log Z

    All results are exact sums over all C^n sequences. They are computed in float64 - on the CPU for
    a device without it - and returned in the dtype of the scores, at least float32. Each access
    computes anew: keep what you use twice.
    ``log_partition``, ``log_prob``, ``marginals``, ``pair_marginals``, ``entropy``,
    ``span_log_prob`` and ``kl_divergence`` are differentiable twice, counted from log Z: log_prob
    has first and second, marginals have first derivatives. They work under torch.func and
    torch.compile (as single operations, without their value checks), and so does ``mode``;
    ``sample`` and ``topk`` compile into T unrolled steps.

    Args:
        emissions: scores h of shape (B, T, C) in nats; -inf forbids a tag at a position.
        transitions: scores A of shape (C, C), [from, to]; -inf forbids a transition.
        start: scores of the first tag, (C,); 0 by default.
        end: scores of the last tag, (C,); 0 by default.
        mask: (B, T), True = keep; every sequence holds at least one position and is padded on the
            right. What stands in the padding is never read and has gradient 0.
        validate_args: check values too, not only shapes and dtypes; the default, also after
            torch.compile has switched off the checks of torch.distributions.

    Raises:
        TypeError: if scores are not floating-point or the mask is.
        ValueError: if shapes do not fit, a mask has holes, left padding or an empty sequence, a
            score is NaN or +inf, or (whatever ``validate_args``) no sequence is allowed.

    Source: chapter ``crf``, eq-crf-model; Lafferty, McCallum and Pereira (2001), "Conditional
    random fields".

    >>> crf = LinearChainCRF(torch.zeros(1, 3, 2), torch.tensor([[0.0, 0.0], [-torch.inf, 0.0]]))
    >>> crf.log_partition.exp()  # 000, 001, 011, 111
    tensor([4.])
    >>> crf.marginals[0, :, 0]
    tensor([0.7500, 0.5000, 0.2500])
    >>> crf.log_prob(torch.tensor([[0, 0, 1]])).exp()
    tensor([0.2500])
    """

    arg_constraints = {  # noqa: RUF012 - the name and the form are torch's
        "emissions": constraints.independent(constraints.real, 2),
        "transitions": constraints.independent(constraints.real, 2),
    }

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
            raise ValueError(
                "emissions must have shape (B, T, C) with T and C at least 1, "
                f"got {tuple(emissions.shape)}"
            )
        batch, length, tags = emissions.shape
        free = emissions.new_zeros(tags)
        self.emissions = emissions
        self.transitions = at_least_float32(transitions, "transitions")
        self.start = at_least_float32(free if start is None else start, "start")
        self.end = at_least_float32(free if end is None else end, "end")
        if mask is None:
            mask = torch.ones(batch, length, dtype=torch.bool, device=emissions.device)
        self.mask = bool_mask(mask, (batch, length))
        for name, shape in (("transitions", (tags, tags)), ("start", (tags,)), ("end", (tags,))):
            if tuple(getattr(self, name).shape) != shape:
                raise ValueError(
                    f"{name} must have shape {shape} beside emissions of shape "
                    f"{tuple(emissions.shape)}, got {tuple(getattr(self, name).shape)}"
                )
        self.device = emissions.device
        if self.device.type in _WITHOUT_FLOAT64:
            self.emissions, self.transitions, self.start, self.end, self.mask = (
                x.cpu() for x in self._scores
            )
        self.dtype = reduce(torch.promote_types, (x.dtype for x in self._scores[:4]))
        super().__init__(torch.Size([batch]), torch.Size([length]), validate_args=False)
        self._validate_args = validate_args is not False and not functions.transformed()
        if self._validate_args:
            check_mask(self.mask)
            check_scores(self.emissions, "emissions", self.mask)
            for name in ("transitions", "start", "end"):
                check_scores(getattr(self, name), name)

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self) -> constraints.Constraint:
        """Sequences of integers from -1 (padding) to C - 1."""
        return constraints.independent(constraints.integer_interval(-1, len(self.start) - 1), 1)

    @property
    def _scores(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.emissions, self.transitions, self.start, self.end, self.mask

    def _returned(self, values: Tensor) -> Tensor:
        return values.to(self.device, self.dtype)

    def expand(
        self,
        batch_shape: torch.Size | list[int] | tuple[int, ...],
        _instance: LinearChainCRF | None = None,
    ) -> LinearChainCRF:
        """The same distribution for every sequence of a batch (n,), out of a batch of 1."""
        shape = torch.Size(batch_shape)
        if len(shape) != 1:
            raise ValueError(f"batch_shape must have one axis, got {tuple(shape)}")
        wide = LinearChainCRF(
            self.emissions.expand(*shape, -1, -1),
            *self._scores[1:4],
            self.mask.expand(*shape, -1),
            validate_args=False,
        )
        wide.device = self.device
        return wide

    @property
    def log_partition(self) -> Tensor:
        """log Z in nats, (B,)."""
        return self._returned(functions.log_partition(*self._scores))

    def _checked(self, tags: Tensor) -> Tensor:
        return check_tags(tags, self.mask, len(self.start), values=self._validate_args)

    def score(self, tags: Tensor) -> Tensor:
        """The unnormalised log-probability in nats of ``tags`` (..., B, T), (..., B).

        Tags in the padding may be any number. A forbidden path scores -inf.

        Raises:
            TypeError: if ``tags`` are not integers.
            ValueError: if their shape does not fit or one is out of range.
        """
        return self._returned(path_score(*self._scores, self._checked(tags)))

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(tags) in nats for tags ``value`` (..., B, T), (..., B).

        Raises:
            TypeError: if ``value`` does not hold integers.
            ValueError: if its shape does not fit or a tag is out of range, or if the path is
                forbidden; without validation a forbidden path has -inf.

        Source: chapter ``crf``, eq-crf-nll.
        """
        tags = self._checked(value)
        if tags.dim() == 2 and (
            functions.gradient_wanted(*self._scores) or functions.transformed()
        ):
            log_prob = -functions.Expectations.apply(*self._scores, tags)[0]
        else:
            log_z = functions.log_partition(*self._scores)
            log_prob = path_score(*self._scores, tags) - log_z
        if self._validate_args and (log_prob == -torch.inf).any():
            place = (log_prob == -torch.inf).nonzero()[0].tolist()
            raise ValueError(f"tags must not take a forbidden path (score -inf), as at {place}")
        return self._returned(log_prob)

    @property
    def marginals(self) -> Tensor:
        """p(y_t = i), (B, T, C); 0 in the padding. Source: chapter ``crf``, eq-crf-marginals."""
        return self._returned(functions.Expectations.apply(*self._scores, None)[1])

    @property
    def pair_marginals(self) -> Tensor:
        """p(y_t = i, y_{t+1} = j), (B, T-1, C, C); 0 where t+1 is padding."""
        return self._returned(functions.PairMarginals.apply(*self._scores))

    def _centered(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Scores in float64 with a largest emission of 0: the same distribution, more digits."""
        emissions, transitions, start, end, mask = self._scores
        top = emissions.detach().amax(2, keepdim=True)
        top = torch.where(top == -torch.inf, 0, top).double()
        return emissions.double() - top, transitions.double(), start.double(), end.double(), mask

    def entropy(self) -> Tensor:
        """H(p) = log Z - E[score] in nats, (B,). Source: chapter ``crf``, eq-crf-entropy."""
        scores = self._centered()
        log_z, *expected = functions.Expectations.apply(*scores, None)
        return self._returned(log_z - _mean_score(scores, *expected))

    @property
    def mode(self) -> Tensor:
        """The most probable tags (Viterbi), (B, T) long, -1 in the padding.

        Source: chapter ``crf``, eq-crf-viterbi.
        """
        return functions.best_path(*self._scores).to(self.device)

    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        """The k best paths: their scores (B, k), falling, and their tags (B, k, T).

        Where there are fewer than k allowed paths, the rest has score -inf and tags -1. Tags in
        the padding are -1. Not differentiable; ``score`` of the returned tags is.

        Raises:
            TypeError: if ``k`` is not an integer.
            ValueError: if ``k`` is below 1.
        """
        check_positive(k, "k")
        with torch.no_grad():
            scores, tags = best_paths(Chain.extend(*self._scores), k)
        return self._returned(scores), tags.to(self.device)

    def sample(self, sample_shape: torch.Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        """Exact samples (*sample_shape, B, T), -1 in the padding: filter forwards, draw backwards.

        Source: chapter ``crf``, eq-crf-sampling.
        """
        sample_shape = torch.Size(sample_shape)
        with torch.no_grad():
            chain = Chain.extend(*self._scores)
            after = functions.LogMessages.apply(*self._scores)[0] + chain.emissions  # (N, B, K)
            after = after.repeat(1, sample_shape.numel(), 1)

            def draw(scores: Tensor, dim: int) -> Tensor:  # arg max of Gumbel-perturbed scores
                return (scores - torch.empty_like(scores).exponential_().log()).argmax(dim)

            paths = trace(after, chain.transitions, draw)
        return paths.view(self._extended_shape(sample_shape)).to(self.device)

    def span_log_prob(self, start: int, tags: Tensor) -> Tensor:
        """log p(y_start = tags_0, .., y_{start+L-1} = tags_{L-1}) in nats, (B,).

        Args:
            start: first position of the span, from 0.
            tags: (B, L); the span must lie within every sequence.

        Raises:
            ValueError: if the span leaves a sequence, or a shape or a tag is out of range; where
                gradients are wanted also if the span is forbidden, which else has -inf.
        """
        tags = check_span(start, tags, self.mask, len(self.start), values=self._validate_args)
        stop = start + tags.shape[1]
        if functions.gradient_wanted(*self._scores):
            other = torch.ones_like(self.emissions, dtype=torch.bool)
            other[:, :start] = other[:, stop:] = False
            other[:, start:stop].scatter_(2, tags.unsqueeze(2), False)
            clamped = self.emissions.masked_fill(other, -torch.inf)
            whole = functions.log_partition(*self._scores)
            return self._returned(functions.log_partition(clamped, *self._scores[1:]) - whole)
        return self._returned(self._span_log_prob(start, tags))

    def _span_log_prob(self, start: int, tags: Tensor) -> Tensor:
        """By the chain rule forwards: each factor is normalised on its own."""
        chain = Chain.extend(*self._scores)
        before, behind = functions.LogMessages.apply(*self._scores)
        window = slice(start, start + tags.shape[1])
        ahead = (behind + chain.emissions)[window]  # (L, B, K)
        first = (before[start] + ahead[0]).log_softmax(-1)  # (B, K)
        moves = chain.transitions[tags.T[:-1]] + ahead[1:]  # (L-1, B, K)
        factors = torch.cat([first.unsqueeze(0), moves - logsumexp(moves, 2).unsqueeze(2)])
        factors = factors.gather(2, tags.T.unsqueeze(2)).squeeze(2)  # (L, B)
        return factors.nan_to_num(-torch.inf, neginf=-torch.inf).sum(0)


def _mean_score(scores: tuple[Tensor, ...], node: Tensor, edges: Tensor) -> Tensor:
    """The mean of the score, (B,), given expected counts; what never happens may score -inf."""
    emissions, transitions, start, end, _ = scores

    def mean(p: Tensor, score: Tensor) -> Tensor:
        return (p * torch.where(p == 0, 0, score)).flatten(1).sum(1)

    return (
        mean(node, emissions)
        + mean(edges[:, :-1, :-1], transitions)
        + mean(node[:, 0], start)
        + mean(edges[:, :-1, -1], end)
    )


@register_kl(LinearChainCRF, LinearChainCRF)
def _kl(p: LinearChainCRF, q: LinearChainCRF) -> Tensor:
    """KL(p || q) = E_p[log p - log q] in nats, (B,)."""
    if p.emissions.shape != q.emissions.shape:
        raise ValueError(
            "p and q must be over the same sequences, got emissions of shapes "
            f"{tuple(p.emissions.shape)} and {tuple(q.emissions.shape)}"
        )
    if p._validate_args and not torch.equal(p.mask, q.mask):
        raise ValueError("p and q must be over the same sequences, got different masks")
    ours, theirs = p._centered(), q._centered()
    log_z, *expected = functions.Expectations.apply(*ours, None)
    own = _mean_score(ours, *expected) - log_z
    other = _mean_score(theirs, *expected) - functions.log_partition(*theirs)
    return (own - other).to(p.device, torch.promote_types(p.dtype, q.dtype))
