"""lib.crf against enumeration, naive float64 recursions and two independent libraries."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import kl_divergence

from lib.crf import (
    CRF,
    LinearChainCRF,
    allowed_transitions,
    distribution,
    inference,
    scaled,
    viterbi,
)
from lib.crf.semiring import Chain

INF = torch.inf
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
SHAPES = [(3, 4, 3), (2, 5, 2), (4, 3, 4), (1, 1, 3), (3, 6, 1), (2, 1, 1)]


def problem(
    seed: int,
    shape: tuple[int, int, int],
    dtype: torch.dtype = torch.float64,
    scale: float = 1.5,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Generic scores and a ragged mask whose first sequence is full and whose last is shortest."""
    batch, length, tags = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return (scale * torch.randn(*size, generator=generator, dtype=torch.float64)).to(dtype)

    lengths = torch.linspace(length, max(1, length // 2), batch).long()
    mask = torch.arange(length) < lengths[:, None]
    return normal(batch, length, tags), normal(tags, tags), normal(tags), normal(tags), mask


class Enumeration:
    """Every path of one sequence with its score, by the definition, in float64."""

    def __init__(self, h: Tensor, a: Tensor, s: Tensor, e: Tensor, length: int) -> None:
        h, a, s, e = (x.detach().double() for x in (h, a, s, e))
        self.paths = torch.tensor(list(itertools.product(range(len(s)), repeat=length)))
        self.scores = torch.stack(
            [
                s[y[0]]
                + sum(h[t, y[t]] for t in range(length))
                + sum(a[y[t], y[t + 1]] for t in range(length - 1))
                + e[y[-1]]
                for y in self.paths
            ]
        )
        self.log_z = torch.logsumexp(self.scores, 0)
        self.p = (self.scores - self.log_z).exp()

    def probability(self, condition: Tensor) -> Tensor:
        return (self.p * condition).sum()

    def mean(self, values: Tensor) -> Tensor:
        return (self.p * torch.where(self.p == 0, 0, values)).sum()


def enumerations(scores: tuple[Tensor, ...]) -> list[Enumeration]:
    h, a, s, e, mask = scores
    return [Enumeration(h[b], a, s, e, int(mask[b].sum())) for b in range(len(h))]


def naive_log_partition(h: Tensor, a: Tensor, s: Tensor, e: Tensor, mask: Tensor) -> Tensor:
    """The textbook recursion with torch.logsumexp in float64, differentiable by autograd."""
    h, a, s, e = (x.double() for x in (h, a, s, e))
    alpha = s + h[:, 0]
    for t in range(1, h.shape[1]):
        step = torch.logsumexp(alpha[:, :, None] + a, 1) + h[:, t]
        alpha = torch.where(mask[:, t, None], step, alpha)
    return torch.logsumexp(alpha + e, 1)


def leaves(scores: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.clone().requires_grad_() for x in scores[:4])


# --- exact inference against enumeration


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_partition_and_log_prob_equal_enumeration(seed: int, shape: tuple[int, int, int]) -> None:
    scores = problem(seed, shape)
    crf = LinearChainCRF(*scores)
    tags = torch.randint(shape[2], shape[:2], generator=torch.Generator().manual_seed(seed))
    for b, truth in enumerate(enumerations(scores)):
        n = truth.paths.shape[1]
        index = (truth.paths == tags[b, :n]).all(1).nonzero().item()
        torch.testing.assert_close(crf.log_partition[b], truth.log_z, rtol=1e-13, atol=1e-12)
        torch.testing.assert_close(crf.score(tags)[b], truth.scores[index], rtol=1e-13, atol=1e-12)
        torch.testing.assert_close(
            crf.log_prob(tags)[b], truth.scores[index] - truth.log_z, rtol=1e-13, atol=1e-12
        )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_marginals_and_entropy_equal_enumeration(seed: int, shape: tuple[int, int, int]) -> None:
    scores = problem(seed, shape)
    crf = LinearChainCRF(*scores)
    batch, length, tags = shape
    node, pair = (
        torch.zeros(batch, length, tags).double(),
        torch.zeros(batch, length - 1, tags, tags).double(),
    )
    entropy = torch.zeros(batch).double()
    for b, truth in enumerate(enumerations(scores)):
        entropy[b] = -truth.mean(truth.scores - truth.log_z)
        for t in range(truth.paths.shape[1]):
            for i in range(tags):
                here = truth.paths[:, t] == i
                node[b, t, i] = truth.probability(here)
                for j in range(tags if t else 0):
                    pair[b, t - 1, j, i] = truth.probability(here & (truth.paths[:, t - 1] == j))
    torch.testing.assert_close(crf.marginals, node, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(crf.pair_marginals, pair, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(crf.entropy(), entropy, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_kl_equals_enumeration(seed: int) -> None:
    shape = (3, 4, 3)
    scores, others = problem(seed, shape), problem(seed + 100, shape)
    kl = kl_divergence(LinearChainCRF(*scores), LinearChainCRF(*others))
    for b, (p, q) in enumerate(zip(enumerations(scores), enumerations(others), strict=True)):
        truth = p.mean((p.scores - p.log_z) - (q.scores - q.log_z))
        torch.testing.assert_close(kl[b], truth, rtol=1e-11, atol=1e-12)
    same = LinearChainCRF(*scores)
    torch.testing.assert_close(
        kl_divergence(same, same), torch.zeros(3).double(), atol=1e-13, rtol=0
    )


def test_kl_is_infinite_where_q_forbids_what_p_allows_and_finite_the_other_way() -> None:
    h, a, s, e, mask = problem(4, (2, 4, 3))
    forbidden = a.clone()
    forbidden[0, 1] = -INF
    p, q = LinearChainCRF(h, a, s, e, mask), LinearChainCRF(h, forbidden, s, e, mask)
    assert (kl_divergence(p, q) == INF).all()
    back = kl_divergence(q, p)
    for b, (truth_q, truth_p) in enumerate(
        zip(enumerations((h, forbidden, s, e, mask)), enumerations((h, a, s, e, mask)), strict=True)
    ):
        truth = truth_q.mean((truth_q.scores - truth_q.log_z) - (truth_p.scores - truth_p.log_z))
        torch.testing.assert_close(back[b], truth, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", [1, 2, 7, 100])
def test_topk_and_mode_equal_enumeration(shape: tuple[int, int, int], k: int) -> None:
    scores = problem(k, shape)
    crf = LinearChainCRF(*scores)
    best, tags = crf.topk(k)
    assert best.shape == (shape[0], k)
    assert tags.shape == (shape[0], k, shape[1])
    for b, truth in enumerate(enumerations(scores)):
        order = truth.scores.argsort(descending=True)[:k]
        n, found = truth.paths.shape[1], len(order)
        torch.testing.assert_close(best[b, :found], truth.scores[order], rtol=1e-13, atol=1e-12)
        assert torch.equal(tags[b, :found, :n], truth.paths[order])
        assert torch.equal(crf.mode[b, :n], truth.paths[order[0]])
        assert (best[b, found:] == -INF).all()
        assert (tags[b, found:] == -1).all()
        assert (tags[b, :, n:] == -1).all()
        assert (crf.mode[b, n:] == -1).all()


def test_topk_under_ties_returns_distinct_paths() -> None:
    crf = LinearChainCRF(torch.zeros(1, 3, 3), torch.zeros(3, 3))
    scores, tags = crf.topk(30)
    assert (scores[0, :27] == 0).all()
    assert (scores[0, 27:] == -INF).all()
    assert len({tuple(path) for path in tags[0, :27].tolist()}) == 27


def test_topk_scores_its_own_paths() -> None:
    scores = problem(5, (3, 9, 4), torch.float32)
    crf = LinearChainCRF(*scores)
    best, tags = crf.topk(20)
    assert (best.diff() <= 0).all()
    torch.testing.assert_close(crf.score(tags.transpose(0, 1)).T, best)


@pytest.mark.parametrize("seed", range(2))
def test_samples_have_the_frequencies_of_the_paths(seed: int) -> None:
    scores = problem(seed, (2, 3, 3), scale=0.7)
    crf = LinearChainCRF(*scores)
    torch.manual_seed(seed)
    n = 20_000
    samples = crf.sample((n,))
    assert samples.shape == (n, 2, 3)
    for b, truth in enumerate(enumerations(scores)):
        length = truth.paths.shape[1]
        assert (samples[:, b, length:] == -1).all()
        counts = (samples[:, b, None, :length] == truth.paths).all(2).sum(0)
        assert counts.sum() == n
        error = (counts / n - truth.p) / (truth.p * (1 - truth.p) / n).sqrt()
        assert error.abs().max() < 4.5


def test_sampling_follows_torch_distributions() -> None:
    crf = LinearChainCRF(*problem(1, (3, 4, 2)))
    assert crf.sample().shape == (3, 4)
    assert crf.sample((2, 5)).shape == (2, 5, 3, 4)
    assert crf.log_prob(crf.sample((2, 5))).shape == (2, 5, 3)
    assert crf.batch_shape == (3,)
    assert crf.event_shape == (4,)
    assert not crf.has_rsample
    assert crf.support.check(crf.sample()).all()
    torch.manual_seed(3)
    first = crf.sample((4,))
    torch.manual_seed(3)
    assert torch.equal(first, crf.sample((4,)))


@pytest.mark.parametrize("seed", range(3))
def test_span_log_prob_equals_enumeration(seed: int) -> None:
    scores = problem(seed, (3, 4, 3))
    crf, with_grad = LinearChainCRF(*scores), LinearChainCRF(*leaves(scores), scores[4])
    generator = torch.Generator().manual_seed(seed)
    shortest = int(scores[4].sum(1).min())
    for start in range(shortest):
        for size in range(1, shortest - start + 1):
            tags = torch.randint(3, (3, size), generator=generator)
            span = crf.span_log_prob(start, tags)
            for b, truth in enumerate(enumerations(scores)):
                here = (truth.paths[:, start : start + size] == tags[b]).all(1)
                torch.testing.assert_close(
                    span[b], truth.probability(here).log(), rtol=1e-11, atol=1e-12
                )
            torch.testing.assert_close(with_grad.span_log_prob(start, tags), span)


def test_span_log_prob_does_not_underflow_and_forbidden_spans_are_minus_inf() -> None:
    h = torch.zeros(2, 5, 2)
    h[:, 1:4, 1] = -500.0
    for start in (1, np.int64(1)):
        span = LinearChainCRF(h, torch.zeros(2, 2)).span_log_prob(start, torch.ones(2, 3).long())
        torch.testing.assert_close(span, torch.full((2,), -1500.0))
    a = torch.tensor([[0.0, -INF], [0.0, 0.0]])
    span = LinearChainCRF(h, a).span_log_prob(1, torch.tensor([[0, 1], [1, 0]]))
    assert span[0] == -INF
    assert span[1].isfinite()
    with pytest.raises(ValueError, match=r"tags must not be a forbidden span.* sequences \[0\]"):
        LinearChainCRF(h.requires_grad_(), a).span_log_prob(1, torch.tensor([[0, 1], [1, 0]]))


# --- derivatives


@pytest.mark.parametrize("shape", [(3, 4, 3), (2, 1, 2), (2, 5, 1)])
def test_first_derivatives_by_finite_differences(shape: tuple[int, int, int]) -> None:
    scores = problem(0, shape)
    mask = scores[4]
    tags = torch.randint(shape[2], shape[:2], generator=torch.Generator().manual_seed(1))
    other = LinearChainCRF(*problem(9, shape))
    for function in (
        lambda *x: LinearChainCRF(*x, mask).log_partition,
        lambda *x: LinearChainCRF(*x, mask).log_prob(tags),
        lambda *x: LinearChainCRF(*x, mask).score(tags),
        lambda *x: LinearChainCRF(*x, mask).marginals,
        lambda *x: LinearChainCRF(*x, mask).pair_marginals,
        lambda *x: LinearChainCRF(*x, mask).entropy(),
        lambda *x: LinearChainCRF(*x, mask).span_log_prob(0, tags[:, :1]),
        lambda *x: kl_divergence(LinearChainCRF(*x, mask), other),
        lambda *x: kl_divergence(other, LinearChainCRF(*x, mask)),
    ):
        assert torch.autograd.gradcheck(function, leaves(scores))


def test_second_derivatives_by_finite_differences() -> None:
    scores = problem(2, (2, 4, 3))
    mask, tags = scores[4], torch.tensor([[0, 2, 1, 1], [2, 0, 0, 0]])
    for function in (
        lambda *x: LinearChainCRF(*x, mask).log_partition,
        lambda *x: LinearChainCRF(*x, mask).log_prob(tags),
    ):
        assert torch.autograd.gradgradcheck(function, leaves(scores))


def test_third_derivatives_raise() -> None:
    h, *rest = problem(2, (2, 4, 3))
    h.requires_grad_()
    (first,) = torch.autograd.grad(
        LinearChainCRF(h, *rest).log_partition.sum(), h, create_graph=True
    )
    (second,) = torch.autograd.grad(first.square().sum(), h, create_graph=True)
    with pytest.raises(NotImplementedError, match="third derivatives"):
        second.sum().backward()


def test_gradients_flow_to_whichever_input_wants_them() -> None:
    scores = problem(3, (2, 4, 3))
    full = leaves(scores)
    LinearChainCRF(*full, scores[4]).log_partition.sum().backward()
    for index in range(4):
        some = [x.clone() for x in scores[:4]]
        some[index].requires_grad_()
        LinearChainCRF(*some, scores[4]).log_partition.sum().backward()
        torch.testing.assert_close(some[index].grad, full[index].grad)


@pytest.mark.parametrize(
    ("spread", "stickiness"), [(0.1, 0.0), (3.0, 0.0), (0.5, 8.0), (0.05, 15.0)]
)
def test_long_sequences_in_float32_match_float64(spread: float, stickiness: float) -> None:
    batch, length, tags = 3, 2000, 4
    torch.manual_seed(0)
    h = torch.randn(batch, length, tags)
    a = spread * torch.randn(tags, tags) + stickiness * torch.eye(tags)
    s, e = torch.randn(tags), torch.randn(tags)
    mask = torch.arange(length) < torch.tensor([[length], [1500], [700]])
    inputs = leaves((h, a, s, e, mask))
    crf = LinearChainCRF(*inputs, mask)
    crf.log_partition.sum().backward()
    truths = tuple(x.double().requires_grad_() for x in (h, a, s, e))
    log_z = naive_log_partition(*truths, mask)
    log_z.sum().backward()
    torch.testing.assert_close(crf.log_partition.double(), log_z, rtol=1e-7, atol=0)
    for ours, truth in zip(inputs, truths, strict=True):
        error = (ours.grad - truth.grad).abs().max() / truth.grad.abs().max()
        assert error < 2e-7
    assert (crf.marginals - truths[0].grad).abs().max() < 1e-7


# --- extreme scores: right or an error, never a finite wrong number, never NaN


def extreme(seed: int) -> tuple[Tensor, ...]:
    """Small problems whose scores mix ordinary numbers, huge gaps and forbidden entries."""
    generator = torch.Generator().manual_seed(seed)

    def pick(options: list[float]) -> float:
        return options[int(torch.randint(len(options), (1,), generator=generator))]

    batch, length, tags = 3, int(pick([1, 2, 3, 5])), int(pick([2, 3, 4]))
    h, a, s, e, mask = problem(seed, (batch, length, tags))
    for x, levels in (
        (h, [0.0, 800.0, -800.0, 90.0, -1e4, -INF]),
        (a, [0.0, -30.0, -400.0, -1e4, -INF]),
        (s, [0.0, -1e4, -INF]),
        (e, [0.0, 50.0, -1e4, -INF]),
    ):
        rate = pick([0.0, 0.2, 0.5])
        hit = torch.rand(x.shape, generator=generator) < rate
        level = torch.tensor(levels, dtype=torch.float64)
        draws = level[torch.randint(len(levels), x.shape, generator=generator)]
        x.add_(torch.where(hit, draws, 0))
    return h, a, s, e, mask


@pytest.mark.parametrize("seeds", [range(i, i + 60) for i in range(0, 240, 60)])
def test_extreme_scores_are_right_or_refused(seeds: range) -> None:
    refused = 0
    for seed in seeds:
        scores = extreme(seed)
        truths = enumerations(scores)
        crf = LinearChainCRF(*scores)
        if any(truth.log_z == -INF for truth in truths):
            refused += 1
            for name in ("log_partition", "marginals", "mode", "sample", "entropy"):
                with pytest.raises(ValueError, match="no path is allowed"):
                    getattr(crf, name)()
            continue
        inputs = leaves(scores)
        LinearChainCRF(*inputs, scores[4]).log_partition.sum().backward()
        mode, (best, _) = crf.mode, crf.topk(3)
        for b, truth in enumerate(truths):
            n = truth.paths.shape[1]
            node = torch.stack(
                [
                    torch.stack([truth.probability(truth.paths[:, t] == i) for t in range(n)])
                    for i in range(len(scores[2]))
                ],
                1,
            )
            torch.testing.assert_close(crf.log_partition[b], truth.log_z, rtol=1e-12, atol=1e-10)
            torch.testing.assert_close(crf.marginals[b, :n], node, rtol=0, atol=1e-11)
            torch.testing.assert_close(inputs[0].grad[b, :n], node, rtol=0, atol=1e-11)
            entropy = -truth.mean(truth.scores - truth.log_z)
            torch.testing.assert_close(crf.entropy()[b], entropy, rtol=0, atol=2e-8)
            torch.testing.assert_close(best[b, 0], truth.scores.max(), rtol=1e-12, atol=1e-10)
            index = (truth.paths == mode[b, :n]).all(1).nonzero().item()
            torch.testing.assert_close(
                truth.scores[index], truth.scores.max(), rtol=1e-12, atol=1e-10
            )
        assert all(x.grad.isfinite().all() for x in inputs)
        assert (crf.score(crf.sample((5,))) > -INF).all()
    assert 0 < refused < len(seeds)


def test_groups_that_do_not_communicate_are_not_lost() -> None:
    """Group 0 leads by 900 nats at the start, group 1 by 899 at the end: both matter."""
    length = 40
    h = torch.zeros(1, length, 2, dtype=torch.float64)
    h[0, 0, 0], h[0, -1, 1] = 900.0, 899.0
    for forbidden in (-INF, -1e5):
        a = torch.tensor([[0.0, forbidden], [forbidden, 0.0]], dtype=torch.float64)
        crf = LinearChainCRF(h, a)
        truth = torch.tensor([900.0, 899.0]).double()
        torch.testing.assert_close(crf.log_partition[0], truth.logsumexp(0))
        torch.testing.assert_close(crf.marginals[0], truth.softmax(0).expand(length, -1))
        assert (crf.mode == 0).all()


def test_a_dear_switch_is_taken_where_it_pays() -> None:
    """Two groups joined by -1e4 alone, each favoured for half of a long sequence."""
    length = 2000
    h = torch.zeros(1, length, 2)
    h[0, :1000, 0] = h[0, 1000:, 1] = 30.0
    a = torch.tensor([[0.0, -1e4], [-1e4, 0.0]])
    crf = LinearChainCRF(h, a)
    torch.testing.assert_close(crf.log_partition, torch.tensor([50_000.0]))
    assert crf.mode[0].tolist() == [0] * 1000 + [1] * 1000
    torch.testing.assert_close(crf.marginals[0, :, 0], (torch.arange(length) < 1000).float())


@pytest.mark.parametrize("gap", [10.0, 80.0, 300.0, 800.0])
def test_wide_emissions_in_long_sequences(gap: float) -> None:
    torch.manual_seed(1)
    batch, length, tags = 2, 300, 4
    h = gap * torch.randn(batch, length, tags)
    a, s, e = torch.randn(tags, tags), torch.randn(tags), torch.randn(tags)
    mask = torch.arange(length) < torch.tensor([[length], [171]])
    inputs, truths = leaves((h, a, s, e)), tuple(x.double().requires_grad_() for x in (h, a, s, e))
    LinearChainCRF(*inputs, mask).log_partition.sum().backward()
    naive_log_partition(*truths, mask).sum().backward()
    for ours, truth in zip(inputs, truths, strict=True):
        torch.testing.assert_close(ours.grad.double(), truth.grad, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shift", [25.0, 29.9, -29.9, 1e3, -1e5])
def test_a_constant_added_to_all_emissions_only_moves_log_z(shift: float) -> None:
    h, a, s, e, mask = problem(3, (3, 200, 4), scale=0.01)
    plain, moved = LinearChainCRF(h, a, s, e, mask), LinearChainCRF(h + shift, a, s, e, mask)
    expected = plain.log_partition + shift * mask.sum(1)
    torch.testing.assert_close(moved.log_partition, expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(moved.marginals, plain.marginals, rtol=1e-9, atol=0)
    torch.testing.assert_close(moved.entropy(), plain.entropy(), rtol=1e-9, atol=0)
    assert torch.equal(moved.mode, plain.mode)


def test_both_routes_agree_and_each_is_taken_where_it_should() -> None:
    scores = problem(0, (3, 12, 4))
    fast = [x.clone() for x in scaled.expectations(*scores)]
    wide = (scores[0] * 300, *scores[1:])
    assert scaled.expectations(*wide) is None
    chain = Chain.extend(*scores)
    assert chain.emissions.shape == (13, 3, 5)
    slow = inference._log_expectations(*scores)
    (log_z, node, edges), (exact_log_z, exact_node, exact_edges) = fast, slow
    torch.testing.assert_close(log_z, exact_log_z, rtol=1e-13, atol=0)
    torch.testing.assert_close(node, exact_node, rtol=1e-11, atol=1e-14)
    edges[:, -1, -1] = exact_edges[:, -1, -1] = 0  # from padding to padding, used by nobody
    torch.testing.assert_close(edges, exact_edges, rtol=1e-11, atol=1e-14)


def test_the_torch_loop_equals_the_numpy_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = problem(6, (3, 90, 4))
    numpy = [x.clone() for x in scaled.expectations(*scores)]
    half = scaled.log_partition(*scores)
    monkeypatch.setattr(scaled, "_NUMPY_LIMIT", 0)
    for a, b in zip(numpy, scaled.expectations(*scores), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(half, scaled.log_partition(*scores), rtol=1e-14, atol=0)
    torch.testing.assert_close(half, numpy[0], rtol=1e-14, atol=0)


@pytest.mark.parametrize("in_torch", [False, True])
@pytest.mark.parametrize("seed", range(14))
def test_chunked_viterbi_equals_the_k_best_recursion(
    seed: int, in_torch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sticky chains, ties and constraints make chunks converge late or not at all."""
    monkeypatch.setattr(viterbi, "_SHORTEST", 2)
    monkeypatch.setattr(viterbi, "_WORK", 2**22)
    if in_torch:
        monkeypatch.setattr(viterbi, "_NUMPY_WORK", 0)
    h, a, s, e, mask = problem(seed, (4, 61, 4), torch.float32)
    kind = seed % 7
    if kind == 1:
        h, a = 0.02 * h, 20 * torch.eye(4) + 0.01 * a
    elif kind == 2:
        h, a, s, e = (x.round() for x in (h, a, s, e))
    elif kind == 3:
        a, s, e = (
            x.masked_fill(~allowed, -INF)
            for x, allowed in zip((a, s, e), allowed_transitions("SBME", "BMES"), strict=True)
        )
    elif kind == 4:  # nothing follows the last tag, nor the first itself, and yet there is padding
        a[3], a[0, 0] = -INF, -INF
    elif kind == 5:  # only the last tag may end, and nothing follows it
        a[3], e[:3] = -INF, -INF
    elif kind == 6:
        h, a = 1e5 * h, 1e6 * a
    crf = LinearChainCRF(h, a, s, e, mask)
    best, _ = crf.topk(1)
    torch.testing.assert_close(crf.score(crf.mode), best[:, 0])


@pytest.mark.parametrize("in_torch", [False, True])
def test_decoding_in_a_thread_leaves_the_others_their_torch_threads(
    in_torch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if in_torch:
        monkeypatch.setattr(viterbi, "_NUMPY_WORK", 0)
    forward, seen = viterbi._forward, []

    def elsewhere(call: Callable[[], Any]) -> Any:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(call).result()

    def watched(*arguments: Any) -> Any:
        seen.append(elsewhere(torch.get_num_threads))
        return forward(*arguments)

    monkeypatch.setattr(viterbi, "_forward", watched)
    crf = LinearChainCRF(*problem(12, (4, 40, 3)))
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        mode = elsewhere(lambda: crf.mode)
        seen.append(torch.get_num_threads())
        assert torch.equal(mode, crf.mode)
        seen.append(torch.get_num_threads())
    finally:
        torch.set_num_threads(before)
    assert seen[0] == seen[1] == seen[-1] == 3


@pytest.mark.parametrize("far", [-1e30, 1e30, -3e12])
def test_a_position_far_from_0_drowns_nothing(far: float) -> None:
    """What all tags of a position share changes no probability, however large."""
    h, a, s, e, mask = problem(9, (3, 7, 4), torch.float32)
    flat, shifted = h.clone(), h.clone()
    for row, place in enumerate((0, 2, 1)):
        flat[row, place], shifted[row, place] = 0.0, far
    tags = torch.randint(4, (3, 7), generator=torch.Generator().manual_seed(0))
    near, other = (LinearChainCRF(x, a, s, e, mask) for x in (flat, shifted))
    for name in ("mode", "marginals", "pair_marginals"):
        torch.testing.assert_close(getattr(other, name), getattr(near, name))
    for name, arguments in (
        ("log_prob", (tags,)),
        ("entropy", ()),
        ("span_log_prob", (0, tags[:, :2])),
    ):
        torch.testing.assert_close(*(getattr(p, name)(*arguments) for p in (other, near)))
    torch.testing.assert_close(other.topk(3)[1], near.topk(3)[1])
    torch.testing.assert_close(other.topk(1)[0][:, 0], torch.full((3,), far))
    draws = []
    for p in (other, near):
        torch.manual_seed(0)
        draws.append(p.sample((20,)))
    assert torch.equal(*draws)
    slopes = [x.requires_grad_() for x in (shifted, flat)]
    for x in slopes:
        LinearChainCRF(x, a, s, e, mask).log_prob(tags).sum().backward()
    torch.testing.assert_close(*(x.grad for x in slopes))


@pytest.mark.parametrize("huge", [1e4, 1e6, 1e9])
def test_a_huge_score_that_no_path_can_take_changes_nothing(huge: float) -> None:
    h, a, s, e, mask = problem(13, (3, 6, 4))
    a[:, 2], s[2] = -INF, -INF  # never tag 2
    tempting = h.clone()
    tempting[:, 1:5, 2] = huge
    plain, other = (LinearChainCRF(x, a, s, e, mask) for x in (h, tempting))
    further = LinearChainCRF(0.5 * h, a, s, e, mask)
    tolerance = {"rtol": 1e-14 * huge, "atol": 1e-14 * huge}
    for quantity in ("log_partition", "marginals", "pair_marginals", "mode"):
        ours, theirs = (getattr(p, quantity) for p in (other, plain))
        torch.testing.assert_close(ours, theirs, **tolerance)
    torch.testing.assert_close(other.entropy(), plain.entropy(), **tolerance)
    torch.testing.assert_close(
        kl_divergence(other, further), kl_divergence(plain, further), **tolerance
    )
    torch.testing.assert_close(kl_divergence(other, plain), torch.zeros(3).double(), **tolerance)


@pytest.mark.parametrize("name", ["transitions", "start", "end"])
def test_parameters_far_from_0_drown_nothing(name: str) -> None:
    """What all transitions, start or end scores share changes no probability either."""
    h, a, s, e, mask = problem(10, (3, 7, 4))
    a[2, 1] = -INF
    given = {"transitions": a, "start": s, "end": e}
    flat, moved = ({**given, name: torch.where(given[name] > -INF, x, -INF)} for x in (0, 1e30))
    near, other = (LinearChainCRF(h, **x, mask=mask) for x in (flat, moved))
    tags = near.mode.masked_fill(~mask, 0)
    for quantity in ("mode", "marginals", "pair_marginals"):
        torch.testing.assert_close(getattr(other, quantity), getattr(near, quantity))
    for method, arguments in (("log_prob", (tags,)), ("entropy", ()), ("topk", (3,))):
        ours, theirs = (getattr(p, method)(*arguments) for p in (other, near))
        torch.testing.assert_close(ours[-1], theirs[-1])
    counted = mask.sum(1) - 1 if name == "transitions" else torch.ones(3)
    torch.testing.assert_close(other.log_partition, 1e30 * counted.double())
    torch.testing.assert_close(other.topk(1)[0][:, 0], 1e30 * counted.double())
    torch.testing.assert_close(
        torch.distributions.kl_divergence(other, near), torch.zeros(3).double()
    )


def test_scores_far_from_0_drown_nothing_where_values_are_not_checked() -> None:
    h, a, s, e, mask = problem(11, (3, 7, 4))
    h[:, 1] = 0.0
    tags = torch.randint(4, (3, 7), generator=torch.Generator().manual_seed(1))
    expected = LinearChainCRF(h, a, s, e, mask).log_prob(tags)
    h[:, 1] = -1e30

    def log_prob(h: Tensor, mask: Tensor, tags: Tensor) -> Tensor:
        return LinearChainCRF(h, a, s, e, mask, validate_args=False).log_prob(tags)

    torch.testing.assert_close(log_prob(h, mask, tags), expected)
    rows = (x.unsqueeze(1) for x in (h, mask, tags))
    torch.testing.assert_close(torch.func.vmap(log_prob)(*rows).squeeze(1), expected)
    compiled = torch.compile(log_prob, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(h, mask, tags), expected)


# --- padding, dtypes, layouts


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_padding_is_never_read(dtype: torch.dtype) -> None:
    h, a, s, e, mask = problem(7, (4, 6, 3), dtype)
    other = LinearChainCRF(*problem(8, (4, 6, 3), dtype)[:4], mask)
    tags = torch.randint(3, (4, 6), generator=torch.Generator().manual_seed(0))
    clean = LinearChainCRF(h.requires_grad_(), a, s, e, mask)
    for junk in (math.nan, INF, -INF, 1e30, -700.0, 50.0):
        dirty_h = h.detach().masked_fill(~mask[..., None], junk).requires_grad_()
        dirty_tags = tags.masked_fill(~mask, -100 if junk == INF else 10**6)
        dirty = LinearChainCRF(dirty_h, a, s, e, mask)
        assert torch.equal(dirty.log_partition, clean.log_partition)
        assert torch.equal(dirty.log_prob(dirty_tags), clean.log_prob(tags))
        assert torch.equal(dirty.marginals, clean.marginals)
        assert torch.equal(dirty.pair_marginals, clean.pair_marginals)
        assert torch.equal(dirty.mode, clean.mode)
        assert torch.equal(dirty.entropy(), clean.entropy())
        assert torch.equal(dirty.topk(3)[1], clean.topk(3)[1])
        assert torch.equal(dirty.span_log_prob(0, tags[:, :1]), clean.span_log_prob(0, tags[:, :1]))
        assert torch.equal(kl_divergence(dirty, other), kl_divergence(clean, other))
        assert torch.equal(kl_divergence(other, dirty), kl_divergence(other, clean))
        (dirty.log_prob(dirty_tags).sum() + dirty.entropy().sum()).backward()
        assert (dirty_h.grad[~mask] == 0).all()
        assert dirty_h.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_float32_results(dtype: torch.dtype) -> None:
    h, a, s, e, mask = (x.to(dtype) if x.is_floating_point() else x for x in problem(8, (3, 7, 4)))
    crf = LinearChainCRF(h, a, s, e, mask)
    exact = LinearChainCRF(h.float(), a.float(), s.float(), e.float(), mask)
    tags = exact.mode
    for name in ("log_partition", "marginals", "pair_marginals"):
        assert getattr(crf, name).dtype == torch.float32
        assert torch.equal(getattr(crf, name), getattr(exact, name))
    assert torch.equal(crf.log_prob(tags), exact.log_prob(tags))
    assert crf.entropy().dtype == torch.float32
    h.requires_grad_()
    LinearChainCRF(h, a, s, e, mask).log_prob(tags).sum().backward()
    assert h.grad.dtype == dtype


def test_autocast_changes_nothing() -> None:
    h, _, _, _, mask = problem(8, (3, 7, 4), torch.float32)
    crf, tags = CRF(4), torch.randint(4, (3, 7))
    outside = crf.loss(h, tags, mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = crf.loss(h, tags, mask)
        inside.backward()
        mixed = crf(h.bfloat16(), mask)
        assert mixed.marginals.dtype == torch.float32
    assert torch.equal(inside, outside)
    assert crf.transitions.grad.dtype == torch.float32


def test_mixed_dtypes_promote() -> None:
    h, a, s, e, mask = problem(8, (3, 7, 4))
    crf = LinearChainCRF(h.float(), a, s.half(), e, mask)
    assert crf.log_partition.dtype == torch.float64


def test_layout_masks_and_tag_dtypes_do_not_matter() -> None:
    h, a, s, e, mask = problem(9, (4, 6, 3), torch.float32)
    reference = LinearChainCRF(h, a, s, e, mask)
    tags = reference.mode
    strided = h.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    wide = torch.zeros(4, 6, 6)
    wide[..., ::2] = h
    for emissions in (strided, wide[..., ::2]):
        assert not emissions.is_contiguous()
        crf = LinearChainCRF(emissions, a.T.contiguous().T, s, e, mask.long())
        assert torch.equal(crf.log_partition, reference.log_partition)
        assert torch.equal(crf.marginals, reference.marginals)
        assert torch.equal(crf.mode, reference.mode)
    for dtype in (torch.int32, torch.int16):
        assert torch.equal(reference.log_prob(tags.to(dtype)), reference.log_prob(tags))


def test_inputs_are_left_as_they_are() -> None:
    scores = problem(10, (3, 5, 3))
    copies = [x.clone() for x in scores]
    crf = LinearChainCRF(*scores)
    tags = crf.mode
    kept = tags.clone()
    for result in (crf.marginals, crf.log_prob(tags), crf.entropy(), crf.topk(2), crf.sample()):
        assert result is not None
    assert all(map(torch.equal, scores, copies))
    assert torch.equal(tags, kept)


def test_results_do_not_share_memory_between_calls() -> None:
    scores = problem(11, (3, 5, 3))
    first = LinearChainCRF(*scores)
    results = [first.log_partition, first.marginals, first.pair_marginals, first.mode]
    copies = [x.clone() for x in results]
    second = LinearChainCRF(*problem(12, (5, 8, 4)))
    assert second.marginals.isfinite().all()
    assert second.mode.shape == (5, 8)
    assert all(map(torch.equal, results, copies))


def test_an_empty_batch_has_empty_results() -> None:
    crf = LinearChainCRF(torch.zeros(0, 4, 3, requires_grad=True), torch.zeros(3, 3))
    tags = torch.zeros(0, 4, dtype=torch.long)
    assert crf.log_prob(tags).shape == (0,)
    assert crf.marginals.shape == (0, 4, 3)
    assert crf.pair_marginals.shape == (0, 3, 3, 3)
    assert crf.entropy().shape == (0,)
    assert crf.mode.shape == (0, 4)
    assert crf.topk(2)[1].shape == (0, 2, 4)
    assert crf.sample((5,)).shape == (5, 0, 4)
    crf.log_prob(tags).sum().backward()


def test_devices_without_float64_compute_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = problem(19, (3, 5, 4), torch.float32)
    plain = LinearChainCRF(*scores)
    monkeypatch.setattr(distribution, "_WITHOUT_FLOAT64", {"cpu"})
    moved = LinearChainCRF(*scores)
    assert moved.device.type == "cpu"
    assert torch.equal(moved.marginals, plain.marginals)
    assert torch.equal(moved.log_prob(moved.mode), plain.log_prob(plain.mode))


def test_expand_repeats_one_sequence() -> None:
    h, a, s, e, _ = problem(13, (1, 4, 3))
    crf = LinearChainCRF(h, a, s, e)
    wide = crf.expand((5,))
    assert wide.batch_shape == (5,)
    torch.testing.assert_close(wide.log_partition, crf.log_partition.expand(5))
    assert torch.equal(wide.mode, crf.mode.expand(5, -1))
    with pytest.raises(ValueError, match="one axis"):
        crf.expand((2, 3))


# --- errors


def test_bad_inputs_are_named() -> None:
    h, a, s, e, mask = problem(14, (2, 4, 3), torch.float32)
    crf = LinearChainCRF(h, a, s, e, mask)
    tags = torch.zeros(2, 4, dtype=torch.long)
    left, hole, empty = mask.clone(), mask.clone(), mask.clone()
    left[1, 0], hole[0, 1], empty[1] = False, False, False
    nan, big = h.clone(), a.clone()
    nan[1, 0, 2], big[0, 1] = math.nan, INF
    for error, message, call in (
        (ValueError, r"emissions must have shape .* got \(4, 3\)", lambda: LinearChainCRF(h[0], a)),
        (ValueError, r"got \(2, 0, 3\)", lambda: LinearChainCRF(h[:, :0], a)),
        (TypeError, "emissions must be a floating-point", lambda: LinearChainCRF(h.long(), a)),
        (ValueError, r"transitions must have shape \(3, 3\)", lambda: LinearChainCRF(h, a[:2])),
        (ValueError, r"start must have shape \(3,\)", lambda: LinearChainCRF(h, a, s[:2])),
        (ValueError, r"end must have shape \(3,\)", lambda: LinearChainCRF(h, a, s, e[None])),
        (ValueError, r"mask must have shape \(2, 4\)", lambda: LinearChainCRF(h, a, s, e, mask.T)),
        (TypeError, "mask must be bool", lambda: LinearChainCRF(h, a, s, e, mask.float())),
        (ValueError, r"row 1 = \[0, 1, 0, 0\]", lambda: LinearChainCRF(h, a, s, e, left)),
        (ValueError, r"row 0 = \[1, 0, 1, 1\]", lambda: LinearChainCRF(h, a, s, e, hole)),
        (ValueError, r"row 1 = \[0, 0, 0, 0\]", lambda: LinearChainCRF(h, a, s, e, empty)),
        (ValueError, r"emissions .* got nan at \[1, 0, 2\]", lambda: LinearChainCRF(nan, a)),
        (ValueError, r"transitions .* got inf at \[0, 1\]", lambda: LinearChainCRF(h, big)),
        (ValueError, r"here \(2, 4\), got \(2, 3\)", lambda: crf.score(tags[:, :3])),
        (TypeError, "tags must be integers", lambda: crf.log_prob(tags.float())),
        (ValueError, r"tags must lie in 0\.\.2 .*got 3", lambda: crf.log_prob(tags + 3)),
        (ValueError, "got -1", lambda: crf.log_prob(tags - 1)),
        (ValueError, "k must be at least 1, got 0", lambda: crf.topk(0)),
        (TypeError, "k must be an integer", lambda: crf.topk(2.0)),
        (ValueError, r"tags must have shape \(B, L\)", lambda: crf.span_log_prob(0, tags[:1])),
        (ValueError, r"got 2\.\.5", lambda: crf.span_log_prob(2, tags)),
        (ValueError, "a sequence of length 2", lambda: crf.span_log_prob(1, tags[:, :2])),
        (ValueError, "tags must lie in", lambda: crf.span_log_prob(0, tags[:, :2] + 5)),
        (ValueError, "same sequences", lambda: kl_divergence(crf, LinearChainCRF(h[:1], a))),
        (ValueError, "different masks", lambda: kl_divergence(crf, LinearChainCRF(h, a))),
        (ValueError, "num_tags must be at least 1", lambda: CRF(0)),
        (ValueError, "three tables", lambda: CRF(3, constraints=(mask,))),
        (ValueError, "boolean tables", lambda: CRF(3, constraints=(a, s, e))),
        (ValueError, "reduction", lambda: CRF(3).loss(h, tags, reduction="max")),
        (ValueError, "smoothing", lambda: CRF(3).init_from_counts(tags, smoothing=0.0)),
        (ValueError, r"tags must have .* \(4,\)", lambda: CRF(3).init_from_counts(tags[0])),
        (TypeError, "tags must be .* list", lambda: CRF(3).init_from_counts(tags.tolist())),
    ):
        with pytest.raises(error, match=message):
            call()


def test_nan_emissions_without_validation_stay_nan() -> None:
    h, a, s, e, mask = problem(15, (3, 4, 3))
    h[1, 0, 1] = math.nan
    crf = LinearChainCRF(h, a, s, e, mask, validate_args=False)
    assert crf.log_partition.isnan().tolist() == [False, True, False]
    assert crf.marginals[1, 0].isnan().any()
    with pytest.raises(ValueError, match="not a number"):
        crf.mode  # noqa: B018


def test_a_forbidden_gold_path_raises_or_is_minus_inf() -> None:
    h, a, s, e, mask = problem(16, (2, 4, 3))
    a[0, 1] = -INF
    tags = torch.tensor([[2, 0, 1, 0], [2, 2, 0, 1]])
    with pytest.raises(ValueError, match=r"forbidden path .*\[0\]"):
        LinearChainCRF(h, a, s, e, mask).log_prob(tags)
    loose = LinearChainCRF(h, a, s, e, mask, validate_args=False).log_prob(tags)
    assert loose[0] == -INF
    assert loose[1].isfinite()  # the forbidden pair lies in the padding


# --- what no test of ordinary numbers finds


@pytest.mark.parametrize(
    ("transitions", "start", "tags", "position"),
    [
        ([[0.0, 0.0], [0.0, 0.0]], [0.0, -400.0], [1], 0),
        ([[0.0, -400.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]], [0.0, -INF, -INF], [1], 1),
        ([[0.0, -5e3], [-5e3, 0.0]], [0.0, 0.0], [0, 1], 1),
    ],
)
@pytest.mark.parametrize("needs_grad", [False, True])
def test_span_log_prob_of_what_float64_cannot_hold(
    transitions: list, start: list, tags: list, position: int, needs_grad: bool
) -> None:
    """exp(-400) is too small for the scaled messages to keep beside 1, not for a logarithm."""
    a, s = torch.tensor(transitions).double(), torch.tensor(start).double()
    h = torch.zeros(1, 4, len(s), dtype=torch.float64)
    truth = Enumeration(h[0], a, s, torch.zeros_like(s), 4)
    here = (truth.paths[:, position : position + len(tags)] == torch.tensor(tags)).all(1)
    crf = LinearChainCRF(h.requires_grad_(needs_grad), a, s)
    span = crf.span_log_prob(position, torch.tensor([tags]))
    exact = (truth.scores[here].logsumexp(0) - truth.log_z)[None]
    assert exact < -390
    torch.testing.assert_close(span, exact, rtol=1e-12, atol=0)


def test_kl_is_infinite_however_improbable_the_path_that_q_forbids() -> None:
    h = torch.zeros(2, 3, 2, dtype=torch.float64)
    a = torch.tensor([[0.0, -400.0], [-400.0, 0.0]], dtype=torch.float64)
    p = LinearChainCRF(h, a)
    for length, expected in ((3, INF), (1, 0.0)):  # one position takes no transition
        mask = (torch.arange(3) < length).expand(2, 3)
        forbids = LinearChainCRF(h, a.masked_fill(a < 0, -INF), mask=mask)
        kl = kl_divergence(LinearChainCRF(h, a, mask=mask), forbids)
        torch.testing.assert_close(kl, torch.full((2,), expected).double())
    node = h.clone()
    node[1, 2, 0] = -INF
    assert kl_divergence(p, LinearChainCRF(node, a)).tolist() == [0.0, INF]
    free = h.clone().requires_grad_()
    kl_divergence(LinearChainCRF(free, a), LinearChainCRF(node, a)).sum().backward()
    assert free.grad.isfinite().all()


@pytest.mark.parametrize("needs_grad", [False, True])
def test_rounding_never_makes_a_probability_exceed_one(needs_grad: bool) -> None:
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        h = torch.randn(3, 400, 4, generator=generator, dtype=torch.float64)
        h += 30 * torch.randint(-1, 2, h.shape, generator=generator)
        a = torch.randn(4, 4, generator=generator, dtype=torch.float64)
        crf = LinearChainCRF(h.requires_grad_(needs_grad), a)
        best = crf.mode
        assert (crf.log_prob(best) <= 0).all()
        assert (crf.log_prob(best[None]) <= 0).all()
        assert (crf.span_log_prob(0, best[:, :3]) <= 0).all()
        assert (crf.entropy() >= 0).all()
        assert (kl_divergence(crf, crf) >= 0).all()


def test_the_fisher_information_survives_the_floor_of_the_divergence() -> None:
    """At q = p the divergence is 0 up to rounding, and its second derivative is not."""
    h, a, s, e, mask = problem(21, (2, 3, 3))
    p = LinearChainCRF(h, a, s, e, mask)
    fisher = torch.autograd.functional.hessian(
        lambda x: kl_divergence(p, LinearChainCRF(h, x, s, e, mask)).sum(), a
    )
    exact = torch.autograd.functional.hessian(
        lambda x: LinearChainCRF(h, x, s, e, mask).log_partition.sum(), a
    )
    torch.testing.assert_close(fisher, exact, rtol=1e-10, atol=1e-12)
    assert fisher.abs().max() > 0.1


@pytest.mark.parametrize("bad", [-1, -3, 3, 4])
def test_tags_out_of_range_are_errors_without_validation_too(bad: int) -> None:
    h, a, s, e, _ = problem(22, (3, 4, 3))
    tags = torch.tensor([[0, 1, 2, 0], [1, bad, 0, 2], [0, 0, 0, 0]])
    free = h.clone().requires_grad_()
    for call in (
        lambda: LinearChainCRF(h, a, s, e, validate_args=False).score(tags),
        lambda: LinearChainCRF(h, a, s, e, validate_args=False).log_prob(tags),
        lambda: LinearChainCRF(free, a, s, e, validate_args=False).log_prob(tags),
        lambda: torch.func.grad(lambda x: LinearChainCRF(x, a).log_prob(tags).sum())(h),
    ):
        with pytest.raises((IndexError, RuntimeError, ValueError)):
            call()


def test_nan_stays_nan_in_span_log_prob() -> None:
    crf = LinearChainCRF(torch.full((1, 3, 2), math.nan), torch.zeros(2, 2), validate_args=False)
    assert crf.span_log_prob(0, torch.tensor([[0, 1]])).isnan().all()


def test_results_in_float64_are_exact_in_float64_whatever_was_mixed() -> None:
    h, a, s, e, mask = problem(23, (3, 6, 4))
    mixed, double = (LinearChainCRF(x, a, s, e, mask) for x in (h.float(), h.float().double()))
    assert torch.equal(mixed.marginals, double.marginals)
    assert torch.equal(mixed.pair_marginals, double.pair_marginals)
    free = h.float().requires_grad_()
    LinearChainCRF(free, a, s, e, mask).log_partition.sum().backward()
    assert free.grad.dtype == torch.float32


def test_expand_keeps_validation_and_the_class() -> None:
    class Named(LinearChainCRF):
        pass

    h, a, s, e, _ = problem(13, (1, 4, 3))
    strict = Named(h, a, s, e).expand((2,))
    assert isinstance(strict, Named)
    assert strict.event_shape == (4,)
    with pytest.raises(ValueError, match="tags must lie in"):
        strict.log_prob(torch.full((2, 4), 7))
    assert strict.expand((2,)).batch_shape == (2,)
    with pytest.raises(ValueError, match=r"from a batch of 1, got \(5,\) from \(2,\)"):
        strict.expand((5,))
    loose = LinearChainCRF(h, a, validate_args=False).expand((2,))
    assert loose._validate_args is False


def test_forward_mode_agrees_with_reverse_mode() -> None:
    *scores, mask = problem(24, (2, 4, 3))
    *tangents, _ = problem(25, (2, 4, 3))
    tags = torch.tensor([[0, 2, 1, 1], [2, 0, 0, 0]])
    other = LinearChainCRF(*problem(26, (2, 4, 3))[:4], mask)
    for function in (
        lambda *x: LinearChainCRF(*x, mask).log_partition,
        lambda *x: LinearChainCRF(*x, mask).log_prob(tags),
        lambda *x: LinearChainCRF(*x, mask).marginals,
        lambda *x: LinearChainCRF(*x, mask).entropy(),
        lambda *x: LinearChainCRF(*x, mask).span_log_prob(1, tags[:, :1]),
        lambda *x: kl_divergence(LinearChainCRF(*x, mask), other),
        lambda *x: kl_divergence(other, LinearChainCRF(*x, mask)),
    ):
        rows = torch.func.jacrev(function, (0, 1, 2, 3))(*scores)
        exact = sum(
            (row * x).flatten(-x.dim()).sum(-1) for row, x in zip(rows, tangents, strict=True)
        )
        _, ours = torch.func.jvp(function, tuple(scores), tuple(tangents))
        torch.testing.assert_close(ours, exact)
        with torch.autograd.forward_ad.dual_level():
            duals = map(torch.autograd.forward_ad.make_dual, scores, tangents)
            ours = torch.autograd.forward_ad.unpack_dual(function(*duals)).tangent
        torch.testing.assert_close(ours, exact)
    loss = lambda *x: -LinearChainCRF(*x, mask).log_prob(tags).sum()  # noqa: E731
    hessian = torch.func.hessian(loss, (0, 1, 2, 3))(*scores)
    exact = torch.autograd.functional.hessian(loss, tuple(scores))
    torch.testing.assert_close(hessian, exact)


def test_a_distribution_from_outside_works_inside_a_transform() -> None:
    h, a, s, e, mask = problem(27, (2, 5, 3))
    crf = LinearChainCRF(h, a, s, e, mask)
    tags = torch.randint(3, (4, 2, 5), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.func.vmap(crf.log_prob)(tags), crf.log_prob(tags))
    torch.testing.assert_close(torch.func.vmap(crf.score)(tags), crf.score(tags))
    spans = torch.func.vmap(lambda y: crf.span_log_prob(0, y[:, :2]))(tags)
    each = torch.stack([crf.span_log_prob(0, y[:, :2]) for y in tags])
    torch.testing.assert_close(spans, each)
    compiled = torch.compile(crf.log_prob, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tags[0]), crf.log_prob(tags[0]))


def test_compiles_with_gradient_where_start_and_end_are_left_out() -> None:
    h, a, _, _, _ = problem(28, (2, 5, 3))
    h.requires_grad_()
    tags = torch.tensor([[0, 1, 2, 0, 1], [2, 2, 1, 0, 0]])

    def loss(h: Tensor) -> Tensor:
        return -LinearChainCRF(h, a).log_prob(tags).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    ours, exact = (torch.autograd.grad(function(h), h) for function in (compiled, loss))
    torch.testing.assert_close(ours, exact)
    with pytest.raises(ValueError, match="tags must not be negative"):
        torch.compile(
            lambda h: LinearChainCRF(h, a).log_prob(tags - 1), fullgraph=True, backend="aot_eager"
        )(h)


def test_what_is_no_tensor_or_lies_elsewhere_is_named() -> None:
    h, a, s, e, mask = problem(14, (2, 4, 3), torch.float32)
    crf = LinearChainCRF(h, a, s, e, mask)
    tags = torch.zeros(2, 4, dtype=torch.long)
    for error, message, call in (
        (
            TypeError,
            "tags must be a tensor of integers, got list",
            lambda: crf.score([[0] * 4] * 2),
        ),
        (TypeError, "got list", lambda: CRF(3).loss(h, [[0] * 4] * 2)),
        (TypeError, "got ndarray", lambda: crf.span_log_prob(0, tags[:, :1].numpy())),
        (TypeError, "start must be an integer, got 1.0", lambda: crf.span_log_prob(1.0, tags)),
        (TypeError, "must hold tensors, got list", lambda: CRF(1, constraints=([[1]], [1], [1]))),
        (TypeError, "tags must be strings, got 1", lambda: allowed_transitions([1], "BIO")),
        (ValueError, r"transitions must be on cpu.*meta", lambda: LinearChainCRF(h, a.to("meta"))),
        (
            ValueError,
            r"mask must be on cpu.*meta",
            lambda: LinearChainCRF(h, a, mask=mask.to("meta")),
        ),
        (
            ValueError,
            r"tags must have shape \(B, T\), got \(5, 2, 4\)",
            lambda: CRF(3).loss(h, tags.expand(5, 2, 4)),
        ),
        (
            ValueError,
            "smoothing must be above 0 and finite",
            lambda: CRF(3).init_from_counts(tags, smoothing=INF),
        ),
    ):
        with pytest.raises(error, match=message):
            call()


# --- the layer, its constraints and its checkpoints


def legal(tags: list[str], scheme: str) -> bool:
    """Whether tag names form complete spans, by reading them from left to right."""
    middle = {"BMES": "M", "BIOES": "I", "BIO": "I"}[scheme]
    open_kind: str | None = None
    for tag in tags:
        prefix, kind = tag[0], tag[2:]
        if prefix in (middle, "E") and open_kind != kind:
            return False
        if prefix in ("B", "S", "O") and open_kind is not None and scheme != "BIO":
            return False
        if prefix == "B":
            open_kind = kind
        elif prefix in ("S", "O", "E"):
            open_kind = None
    return open_kind is None or scheme == "BIO"


@pytest.mark.parametrize(
    ("scheme", "names"),
    [
        ("BMES", ["S", "B", "M", "E"]),
        ("BMES", ["O", "E-x", "B-x", "S-y", "M-x"]),
        ("BIO", ["O", "B-x", "I-x", "I-y", "B-y"]),
        ("BIO", ["I", "B"]),
        ("BIOES", ["I-x", "O", "B-x", "E-x", "S-x", "B-y", "E-y"]),
    ],
)
def test_constraints_allow_exactly_the_legal_sequences(scheme: str, names: list[str]) -> None:
    transitions, start, end = allowed_transitions(names, scheme)
    for length in (1, 2, 3, 4):
        for path in itertools.product(range(len(names)), repeat=length):
            moves = itertools.pairwise(path)
            allowed = start[path[0]] and end[path[-1]] and all(transitions[i, j] for i, j in moves)
            assert bool(allowed) == legal([names[i] for i in path], scheme)


def test_bmes_counts_two_to_the_n_minus_one_sequences() -> None:
    crf = CRF(4, constraints=allowed_transitions("smbe", "BMES"))
    for parameter in crf.parameters():
        torch.nn.init.zeros_(parameter)
    for n in (1, 2, 3, 6, 40):
        log_z = crf(torch.zeros(1, n, 4, dtype=torch.float64)).log_partition
        torch.testing.assert_close(log_z, torch.tensor([(n - 1) * math.log(2.0)]).double())


def test_bad_constraints_are_named() -> None:
    for message, tags, scheme in (
        ("scheme must be one of", ["B"], "IOB1"),
        ("tag 'X' does not belong to BMES", ["B", "X"], "BMES"),
        ("tag 'M' does not belong to BIO", ["M"], "BIO"),
        ("tag 'Bx' does not belong", ["Bx"], "BIO"),
        ("tag 'O-x' does not belong", ["O-x"], "BIO"),
        ("distinct", ["B", "B"], "BIO"),
        ("at least one", [], "BIO"),
    ):
        with pytest.raises(ValueError, match=message):
            allowed_transitions(tags, scheme)


def test_constraints_hold_in_training_decoding_and_sampling() -> None:
    torch.manual_seed(0)
    names = ["O", "B-x", "I-x", "B-y", "I-y"]
    constraints = allowed_transitions(names, "BIO")
    crf = CRF(5, constraints=constraints)
    emissions = 5 * torch.randn(6, 9, 5)
    mask = torch.arange(9) < torch.randint(1, 10, (6, 1))
    crf(emissions, mask).log_partition.sum().backward()
    for parameter, allowed in zip(
        (crf.transitions, crf.start_transitions, crf.end_transitions), constraints, strict=True
    ):
        assert (parameter.grad[~allowed] == 0).all()
        assert (parameter.grad[allowed] > 0).all()
    distribution = crf(emissions, mask)
    paths = torch.cat(
        [
            crf.decode(emissions, mask)[None],
            distribution.sample((20,)),
            distribution.topk(5)[1].transpose(0, 1),
        ]
    )
    for path in paths.flatten(0, 1).tolist():
        assert legal([names[i] for i in path if i >= 0], "BIO")
    free = CRF(5)
    free.load_state_dict(crf.state_dict())
    decoded = free.decode(emissions, mask).tolist()
    assert not all(legal([names[i] for i in path if i >= 0], "BIO") for path in decoded)


def test_losses_are_a_probability_over_legal_paths() -> None:
    constraints = allowed_transitions("sbme", "BMES")
    crf = CRF(4, constraints=constraints).double()
    torch.manual_seed(1)
    emissions = torch.randn(1, 5, 4, dtype=torch.float64)
    total = 0.0
    for path in itertools.product(range(4), repeat=5):
        if legal(["SBME"[i] for i in path], "BMES"):
            total += (-crf.loss(emissions, torch.tensor([path]))).exp().item()
        else:
            with pytest.raises(ValueError, match="forbidden path"):
                crf.loss(emissions, torch.tensor([path]))
    assert total == pytest.approx(1.0, abs=1e-12)


def test_init_from_counts_is_the_chain_of_the_corpus() -> None:
    tags = torch.tensor([[0, 1, 1, 2], [1, 2, -1, -1], [0, 2, 2, 2]])
    crf = CRF(3)
    crf.init_from_counts(tags, tags >= 0, smoothing=0.5)
    counts = torch.full((3, 4), 0.5)
    for row in tags.tolist():
        row = [t for t in row if t >= 0]
        for i, j in zip(row, [*row[1:], 3], strict=True):
            counts[i, j] += 1
    truth = (counts / counts.sum(1, keepdim=True)).log()
    torch.testing.assert_close(crf.transitions.data, truth[:, :3])
    torch.testing.assert_close(crf.end_transitions.data, truth[:, 3])
    torch.testing.assert_close(
        crf.start_transitions.data.exp(), torch.tensor([2.5, 1.5, 0.5]) / 4.5
    )


def test_state_dict_keys_and_shapes_are_stable() -> None:
    for crf in (
        CRF(5),
        CRF(5, constraints=allowed_transitions(["O", "B", "I", "B-x", "I-x"], "BIO")),
    ):
        shapes = {name: tuple(value.shape) for name, value in crf.state_dict().items()}
        assert shapes == {
            "start_transitions": (5,),
            "end_transitions": (5,),
            "transitions": (5, 5),
        }
    assert crf.to(torch.float64).allowed.dtype == torch.bool
    assert repr(crf) == "CRF(5, constrained)"


def test_training_finds_the_transitions_of_a_markov_chain() -> None:
    torch.manual_seed(0)
    truth = LinearChainCRF(
        torch.zeros(400, 12, 3), torch.tensor([[2.0, 0, 0], [0, 0, 2.0], [0, 1.0, 0]])
    )
    tags = truth.sample()
    crf = CRF(3)
    optimizer = torch.optim.LBFGS(crf.parameters(), max_iter=60)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = crf.loss(torch.zeros(400, 12, 3), tags)
        loss.backward()
        return loss

    optimizer.step(closure)
    # at the maximum of the likelihood the expected transitions are the observed ones
    expected = crf(torch.zeros(1, 12, 3)).pair_marginals.sum((0, 1))
    pairs = tags[:, :-1] * 3 + tags[:, 1:]
    observed = torch.bincount(pairs.flatten(), minlength=9).view(3, 3) / 400
    torch.testing.assert_close(expected, observed, atol=1e-3, rtol=0)
    assert crf.loss(torch.zeros(400, 12, 3), tags) <= -truth.log_prob(tags).mean()


# --- peers


@pytest.mark.parametrize("seed", range(4))
def test_pytorch_crf_agrees(seed: int) -> None:
    torchcrf = pytest.importorskip("torchcrf")
    torch.manual_seed(seed)
    batch, length, tags = 5, 9, 4
    peer = torchcrf.CRF(tags, batch_first=True)
    for parameter in peer.parameters():
        torch.nn.init.normal_(parameter)
    ours = CRF(tags)
    assert not any(ours.load_state_dict(peer.state_dict(), strict=True))
    emissions = torch.randn(batch, length, tags)
    mask = torch.arange(length) < torch.randint(1, length + 1, (batch, 1))
    gold = torch.randint(tags, (batch, length))
    inputs = [emissions.clone().requires_grad_() for _ in range(2)]
    for reduction in ("none", "sum", "mean", "token_mean"):
        torch.testing.assert_close(
            ours.loss(emissions, gold, mask, reduction),
            -peer(emissions, gold, mask, reduction),
            rtol=1e-5,
            atol=1e-5,
        )
    ours.loss(inputs[0], gold, mask).backward()
    (-peer(inputs[1], gold, mask, "mean")).backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-4, atol=1e-6)
    for name, parameter in peer.named_parameters():
        torch.testing.assert_close(
            ours.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-5
        )
    decoded = [[t for t in row if t >= 0] for row in ours.decode(emissions, mask).tolist()]
    assert decoded == peer.decode(emissions, mask)
    constrained = CRF(tags, constraints=allowed_transitions("SBME", "BMES"))
    assert not any(constrained.load_state_dict(peer.state_dict(), strict=True))
    back = torchcrf.CRF(tags)
    assert not any(back.load_state_dict(constrained.state_dict(), strict=True))


@pytest.mark.parametrize("seed", range(2))
def test_torch_struct_agrees(seed: int) -> None:
    torch_struct = pytest.importorskip("torch_struct")
    batch, length, tags = 3, 6, 3
    h, a, s, e, _ = problem(seed, (batch, length, tags), torch.float32)
    other = problem(seed + 50, (batch, length, tags), torch.float32)

    def edges(h: Tensor, a: Tensor, s: Tensor, e: Tensor) -> Tensor:
        """Their potentials are (B, T-1, to, from)."""
        potentials = a.T + h[:, 1:, :, None]
        potentials = potentials.expand(batch, length - 1, tags, tags).clone()
        potentials[:, 0] += (s + h[:, 0])[:, None, :]
        potentials[:, -1] += e[:, None]
        return potentials

    peer = torch_struct.LinearChainCRF(edges(h, a, s, e))
    ours = LinearChainCRF(h, a, s, e)
    torch.testing.assert_close(ours.log_partition, peer.partition, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.pair_marginals.mT, peer.marginals, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.entropy(), peer.entropy, rtol=1e-4, atol=1e-4)
    best, _ = peer.struct.from_parts(peer.argmax)
    assert torch.equal(ours.mode, best)
    three, _ = ours.topk(3)
    torch.testing.assert_close(three.T, peer.kmax(3), rtol=1e-5, atol=1e-5)
    q = LinearChainCRF(*other[:4])
    peer_q = torch_struct.LinearChainCRF(edges(*other[:4]))
    torch.testing.assert_close(
        kl_divergence(ours, q), peer.kl(peer_q).squeeze(), rtol=1e-3, atol=1e-3
    )


# --- transforms


def test_torch_func_transforms() -> None:
    h, a, s, e, mask = problem(17, (3, 5, 4))
    tags = torch.randint(4, (3, 5), generator=torch.Generator().manual_seed(0))

    def loss(h: Tensor, a: Tensor) -> Tensor:
        return -LinearChainCRF(h, a, s, e, mask).log_prob(tags).sum()

    inputs = h.clone().requires_grad_(), a.clone().requires_grad_()
    truth = torch.autograd.grad(loss(*inputs), inputs)
    for ours, exact in zip(torch.func.grad(loss, (0, 1))(h, a), truth, strict=True):
        torch.testing.assert_close(ours, exact)
    hessian = torch.func.jacrev(torch.func.grad(loss, 1), 1)(h, a)
    exact = torch.autograd.functional.hessian(lambda a: loss(h, a), a)
    torch.testing.assert_close(hessian, exact)

    many_h, many_a = torch.stack([h, 2 * h, -h]), torch.stack([a, a.T, a + 1])
    each = torch.func.vmap(torch.func.grad(loss, (0, 1)), (0, None))(many_h, a)
    per_model = torch.func.vmap(loss, (None, 0))(h, many_a)
    modes = torch.func.vmap(lambda h: LinearChainCRF(h, a, s, e, mask).mode)(many_h)
    entropies = torch.func.vmap(lambda a: LinearChainCRF(h, a, s, e, mask).entropy())(many_a)
    samples = torch.func.vmap(
        lambda h: LinearChainCRF(h, a, s, e, mask).sample((2,)), randomness="different"
    )(many_h)
    assert samples.shape == (3, 2, 3, 5)
    for i in range(3):
        for ours, exact in zip(each, torch.func.grad(loss, (0, 1))(many_h[i], a), strict=True):
            torch.testing.assert_close(ours[i], exact)
        torch.testing.assert_close(per_model[i], loss(h, many_a[i]))
        assert torch.equal(modes[i], LinearChainCRF(many_h[i], a, s, e, mask).mode)
        torch.testing.assert_close(entropies[i], LinearChainCRF(h, many_a[i], s, e, mask).entropy())


def test_compiles_into_one_graph() -> None:
    torch.manual_seed(0)
    crf = CRF(4, constraints=allowed_transitions("sbme", "BMES"))
    emissions = torch.randn(3, 8, 4, requires_grad=True)
    mask = torch.arange(8) < torch.tensor([[8], [5], [1]])
    tags = crf.decode(emissions, mask)

    def everything(emissions: Tensor) -> tuple[Tensor, ...]:
        distribution = crf(emissions, mask)
        return (
            crf.loss(emissions, tags, mask),
            distribution.marginals,
            distribution.pair_marginals,
            distribution.entropy(),
            distribution.mode,
            distribution.topk(2)[1],
            distribution.span_log_prob(0, tags[:, :1]),
        )

    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    eager, traced = everything(emissions), compiled(emissions)
    for a, b in zip(eager, traced, strict=True):
        torch.testing.assert_close(a, b)
    gradients = [
        torch.autograd.grad(x[0] + x[3].sum(), (emissions, crf.transitions))
        for x in (eager, traced)
    ]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_equals_cpu() -> None:
    h, a, s, e, mask = problem(18, (5, 40, 6), torch.float32)
    cpu = LinearChainCRF(h, a, s, e, mask)
    cuda = LinearChainCRF(*(x.cuda() for x in (h, a, s, e, mask)))
    assert cuda.marginals.device.type == "cuda"
    torch.testing.assert_close(cuda.marginals.cpu(), cpu.marginals)
    torch.testing.assert_close(cuda.log_partition.cpu(), cpu.log_partition)
    torch.testing.assert_close(cuda.pair_marginals.cpu(), cpu.pair_marginals)
    torch.testing.assert_close(cuda.entropy().cpu(), cpu.entropy())
    assert torch.equal(cuda.mode.cpu(), cpu.mode)
    assert torch.equal(cuda.topk(3)[1].cpu(), cpu.topk(3)[1])
    assert cuda.sample((2,)).shape == (2, 5, 40)


def test_the_formulas_that_docstrings_cite_stand_in_the_chapter() -> None:
    root = Path(__file__).resolve().parents[1]
    code = "".join(path.read_text() for path in sorted((root / "lib" / "crf").glob("*.py")))
    cited = set(re.findall(r"eq-crf-[a-z-]*[a-z]", code))
    chapter = (root / "chapters" / "crf.md").read_text(encoding="utf-8")
    labels = set(re.findall(r"^\$\$ \((eq-crf-[a-z-]+)\)$", chapter, re.MULTILINE))
    assert len(cited) > 8
    assert cited <= labels
