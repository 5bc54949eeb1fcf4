"""The linear-chain CRF as a torch distribution over tag sequences."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints, register_kl
from torch.nn.functional import pad

from lib._common import at_least_float32, bool_mask, check_positive
from lib.crf import functions
from lib.crf.checks import check_mask, check_scores, check_span, check_tags
from lib.crf.inference import exact_log_messages, log_messages, path_score
from lib.crf.semiring import Chain, best_paths, logsumexp, trace

__all__ = ["LinearChainCRF"]

_WITHOUT_FLOAT64 = {"mps"}  # device types


class LinearChainCRF(Distribution):
    r"""The distribution of a linear-chain CRF over tag sequences y_1 .. y_n.

        log p(y) = start(y_1) + sum_t h_t(y_t) + sum_t A(y_t, y_{t+1}) + end(y_n) - log Z

    All results are exact sums over all C^n sequences. They are computed in float64 - on the CPU for
    a device without it - and returned in the dtype of the scores, at least float32. Each access
    computes anew: keep what you use twice.
    ``log_partition``, ``log_prob`` and ``span_log_prob`` have first and second derivatives;
    ``marginals``, ``pair_marginals``, ``entropy`` and ``kl_divergence``, derivatives of log Z
    themselves, have first ones. They work under torch.func, forward mode included (but for
    ``pair_marginals``), and under torch.compile, as single operations and without their value
    checks; so does ``mode``; ``sample`` and ``topk`` compile into T unrolled steps.

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
        ValueError: if shapes or devices do not fit, a mask has holes, left padding or an empty
            sequence, a score is NaN or +inf, or (whatever ``validate_args``) no sequence is
            allowed.

    Source: chapter ``crf``, eq-crf-family and eq-crf-score; Lafferty, McCallum and Pereira (2001),
    "Conditional random fields".

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
        start = emissions.new_zeros(tags) if start is None else start
        end = emissions.new_zeros(tags) if end is None else end
        self.emissions = emissions
        self.transitions = at_least_float32(transitions, "transitions")
        self.start = at_least_float32(start, "start")
        self.end = at_least_float32(end, "end")
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
        for name in ("transitions", "start", "end", "mask"):
            if getattr(self, name).device != self.device:
                raise ValueError(
                    f"{name} must be on {self.device}, as emissions are, "
                    f"got {getattr(self, name).device}"
                )
        if self.device.type in _WITHOUT_FLOAT64:
            self.emissions, self.transitions, self.start, self.end, self.mask = (
                x.cpu() for x in self._given
            )
        self.dtype = reduce(torch.promote_types, (x.dtype for x in self._given[:4]))
        self.emissions, self.transitions, self.start, self.end = (
            x.to(self.dtype) for x in self._given[:4]
        )
        super().__init__(torch.Size([batch]), torch.Size([length]), validate_args=False)
        self._validate_args = validate_args is not False
        if self._readable:
            check_mask(self.mask)
        self._far = functions.transformed() or self._check_scores()

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self) -> constraints.Constraint:
        """Sequences of integers from -1 (padding) to C - 1."""
        return constraints.independent(constraints.integer_interval(-1, len(self.start) - 1), 1)

    @property
    def _given(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.emissions, self.transitions, self.start, self.end, self.mask

    def _check_scores(self) -> bool:
        """Refuse bad scores if that is wanted; say whether some are far from 0."""
        emissions, transitions, start, end, mask = self._given
        far = [
            check_scores(emissions, "emissions", mask, values=self._validate_args),
            check_scores(transitions, "transitions", values=self._validate_args),
            check_scores(start, "start", values=self._validate_args),
            check_scores(end, "end", values=self._validate_args),
        ]
        return any(far)

    @property
    def _scores(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Scores of the same distribution in which float64 loses nothing."""
        return self._centered() if self._far else self._given

    @property
    def _readable(self) -> bool:
        """Whether to check values: if that is wanted and no transform hides them."""
        return self._validate_args and not functions.transformed()

    def _returned(self, values: Tensor) -> Tensor:
        return values.to(self.device, self.dtype)

    def expand(
        self,
        batch_shape: torch.Size | list[int] | tuple[int, ...],
        _instance: LinearChainCRF | None = None,
    ) -> LinearChainCRF:
        """The same distribution for every sequence of a batch (n,), out of a batch of 1."""
        shape = torch.Size(batch_shape)
        if len(shape) != 1 or self.batch_shape[0] not in (1, shape[0]):
            raise ValueError(
                "batch_shape must have one axis and be reached from a batch of 1, "
                f"got {tuple(shape)} from {tuple(self.batch_shape)}"
            )
        new = self._get_checked_instance(LinearChainCRF, _instance)
        new.device, new.dtype = self.device, self.dtype
        new.emissions, new.mask = (
            self.emissions.expand(*shape, -1, -1),
            self.mask.expand(*shape, -1),
        )
        new.transitions, new.start, new.end = self.transitions, self.start, self.end
        super(LinearChainCRF, new).__init__(shape, self.event_shape, validate_args=False)
        new._validate_args, new._far = self._validate_args, self._far
        return new

    @property
    def log_partition(self) -> Tensor:
        """log Z in nats, (B,). Source: chapter ``crf``, eq-crf-recursion."""
        return self._returned(self._add_tops(functions.log_partition(*self._scores)))

    def _checked(self, tags: Tensor) -> Tensor:
        return check_tags(tags, self.mask, len(self.start), values=self._readable)

    def score(self, tags: Tensor) -> Tensor:
        """The unnormalised log-probability in nats of ``tags`` (..., B, T), (..., B).

        Tags in the padding may be any number. A forbidden path scores -inf.

        Raises:
            TypeError: if ``tags`` are not integers.
            ValueError: if their shape does not fit or one is out of range.
        """
        return self._returned(path_score(*self._given, self._checked(tags)))

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(tags) in nats for tags ``value`` (..., B, T), (..., B).

        Raises:
            TypeError: if ``value`` does not hold integers.
            ValueError: if its shape does not fit or a tag is out of range, or if the path is
                forbidden; without validation a forbidden path has -inf.

        Source: chapter ``crf``, eq-crf-nll.
        """
        tags, scores = self._checked(value), self._scores
        if tags.dim() == 2 and (functions.gradient_wanted(*scores) or functions.transformed()):
            log_prob = -functions.expectations(*scores, tags)[0]
        else:
            log_z = functions.log_partition(*scores)
            log_prob = -_not_negative(log_z - path_score(*scores, tags))
        if self._readable and (log_prob == -torch.inf).any():
            place = (log_prob == -torch.inf).nonzero()[0].tolist()
            raise ValueError(f"tags must not take a forbidden path (score -inf), as at {place}")
        return self._returned(log_prob)

    @property
    def marginals(self) -> Tensor:
        """p(y_t = i), (B, T, C); 0 in the padding. Source: chapter ``crf``, eq-crf-marginal."""
        return self._returned(functions.expectations(*self._scores, None)[1])

    @property
    def pair_marginals(self) -> Tensor:
        """p(y_t = i, y_{t+1} = j), (B, T-1, C, C); 0 where t+1 is padding.

        Source: chapter ``crf``, eq-crf-pair.
        """
        return self._returned(functions.PairMarginals.apply(*self._scores))

    def _tops(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The largest emission at each position (B, T, 1), transition, start and end score."""
        h, a, s, e = self._given[:4]
        return _top(h, 2), _top(a, (0, 1)), _top(s, 0), _top(e, 0)

    def _centered(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Scores in float64 whose largest are 0: the same distribution, more digits."""
        h, a, s, e = (x.double() - top for x, top in zip(self._given, self._tops(), strict=False))
        return h, a, s, e, self.mask

    def _add_tops(self, values: Tensor) -> Tensor:
        """Scores (B, ...) of paths with what ``_scores`` have left out of them."""
        if not self._far:
            return values
        emission, transition, start, end = self._tops()
        total = torch.where(self.mask, emission.squeeze(2), 0).sum(1) + start + end
        total = total + (self.mask.sum(1) - 1) * transition.squeeze()
        return (values.mT + total).mT if values.dim() > 1 else values + total

    def entropy(self) -> Tensor:
        """H(p) = log Z - E[score] in nats, (B,). Source: chapter ``crf``, eq-crf-entropy."""
        scores = self._centered()
        log_z, *expected = functions.expectations(*scores, None)
        return self._returned(_not_negative(log_z - _mean_score(scores, *expected)))

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

        Source: chapter ``crf``, eq-crf-kbest.
        """
        check_positive(k, "k")
        with torch.no_grad():
            scores, tags = best_paths(Chain.extend(*self._scores), k)
        return self._returned(self._add_tops(scores)), tags.to(self.device)

    def sample(self, sample_shape: torch.Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        """Exact samples (*sample_shape, B, T), -1 in the padding: filter forwards, draw backwards.

        Source: chapter ``crf``, eq-crf-sampling.
        """
        sample_shape = torch.Size(sample_shape)
        scores = [x.detach() for x in self._scores]
        with torch.no_grad():
            chain = Chain.extend(*scores)
            after = functions.LogMessages.apply(*scores)[0] + chain.emissions  # (N, B, K)
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

        Source: chapter ``crf``, eq-crf-span.
        """
        tags = check_span(start, tags, self.mask, len(self.start), values=self._readable)
        scores = self._scores
        if functions.gradient_wanted(*scores):
            other = torch.arange(len(self.start), device=tags.device) != tags.unsqueeze(2)
            other = pad(other, (0, 0, start, self.mask.shape[1] - start - tags.shape[1]))
            clamped = scores[0].masked_fill(other, -torch.inf)
            whole = functions.log_partition(*scores)
            try:
                part = functions.log_partition(clamped, *scores[1:])
            except ValueError as error:
                raise ValueError(
                    "tags must not be a forbidden span where gradients are wanted "
                    f"(use torch.no_grad to have -inf): {error}"
                ) from error
            return self._returned(-_not_negative(whole - part))
        log_prob = self._span_log_prob(start, tags, *log_messages(*scores))
        if (log_prob == -torch.inf).any():  # forbidden, or out of reach of the scaled messages
            log_prob = self._span_log_prob(start, tags, *exact_log_messages(*scores))
        return self._returned(log_prob)

    def _span_log_prob(self, start: int, tags: Tensor, before: Tensor, behind: Tensor) -> Tensor:
        """By the chain rule forwards: each factor is normalised on its own."""
        chain = Chain.extend(*self._scores)
        window = slice(start, start + tags.shape[1])
        ahead = (behind + chain.emissions)[window]  # (L, B, K)
        first = (before[start] + ahead[0]).log_softmax(-1)  # (B, K)
        moves = chain.transitions[tags.T[:-1]] + ahead[1:]  # (L-1, B, K)
        total = logsumexp(moves, 2).unsqueeze(2)
        moves = torch.where(total == -torch.inf, total, moves - total)
        factors = torch.cat([first.unsqueeze(0), moves])
        return factors.gather(2, tags.T.unsqueeze(2)).squeeze(2).sum(0)


def _top(scores: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """The largest score in float64, 0 if all are -inf, without a derivative."""
    top = scores.detach().amax(dim, keepdim=True)
    return torch.where(top == -torch.inf, 0, top).double()


def _not_negative(values: Tensor) -> Tensor:
    """Of values that only rounding can make negative; derivatives pass as they are."""
    return values - values.detach().clamp(max=0)


def _mean_score(scores: tuple[Tensor, ...], node: Tensor, edges: Tensor) -> Tensor:
    """The mean of the score, (B,), given expected counts; what never happens may score -inf."""
    emissions, transitions, start, end, _ = scores

    def mean(p: Tensor, score: Tensor) -> Tensor:
        return (p * torch.where((p == 0) | (score == -torch.inf), 0, score)).flatten(1).sum(1)

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
    if (p._readable or q._readable) and not torch.equal(p.mask, q.mask):
        raise ValueError("p and q must be over the same sequences, got different masks")
    ours, theirs = p._centered(), q._centered()
    log_z, *expected = functions.expectations(*ours, None)
    own = _mean_score(ours, *expected) - log_z
    other = _mean_score(theirs, *expected) - functions.log_partition(*theirs)
    kl = torch.where(_allows(p, q), _not_negative(own - other), torch.inf)
    return kl.to(p.device, torch.promote_types(p.dtype, q.dtype))


def _allows(p: LinearChainCRF, q: LinearChainCRF) -> Tensor:
    """Whether q allows all that p allows, however improbable, (B,): no path of p breaks a rule."""
    h, a, s, e = (
        torch.where(ours > -torch.inf, (theirs == -torch.inf).to(ours.dtype), ours).detach()
        for ours, theirs in zip(p._scores[:4], q._scores[:4], strict=True)
    )
    return path_score(h, a, s, e, p.mask, functions.best_path(h, a, s, e, p.mask)) == 0
