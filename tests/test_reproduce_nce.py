"""The helpers of chapter ``nce`` against direct counts, quadrature and the library's own loss."""

from __future__ import annotations

import pytest
import torch

from lib.nce import Vocabulary, nce_loss
from lib.reproduce import quartic, words


def test_draws_have_the_moments_of_the_quartic() -> None:
    x = quartic.draw((200_000,), 1.0, 0.5, torch.Generator().manual_seed(0))
    law = (quartic.features(quartic.GRID)[:, :2] @ torch.tensor([1, 0.5]).double()).softmax(0)
    for power in (1, 2, 4):
        mean = (law * quartic.GRID**power).sum()
        error = (x**power).std() / len(x) ** 0.5
        assert ((x**power).mean() - mean).abs() < 4 * error


def test_fits_stand_where_the_gradient_is_zero() -> None:
    x = quartic.draw((3, 400), 1.0, 0.5, torch.Generator().manual_seed(1))
    best = quartic.likelihood_fits(x)
    theta = best[:, :2].clone().requires_grad_()
    moments = quartic.features(x)[..., :2].mean(1)
    log_z = (theta @ quartic.features(quartic.GRID)[:, :2].T).logsumexp(1) + torch.log(
        quartic.GRID[1] - quartic.GRID[0]
    )
    torch.testing.assert_close(log_z.detach(), best[:, 2])
    (slope,) = torch.autograd.grad(((theta * moments).sum(1) - log_z).sum(), theta)
    assert slope.abs().max() < 1e-8

    law = quartic.normal(0.8)
    torch.manual_seed(2)
    found = quartic.contrast_fits(x, law, 4, best).requires_grad_()
    torch.manual_seed(2)
    noise = law.sample((3, 1600))
    for row in range(3):
        a, b, c = found[row]
        scores = [-a * y**2 - b * y**4 for y in (x[row], noise[row].view(400, 4))]
        log_u = [law.log_prob(y) for y in (x[row], noise[row].view(400, 4))]
        loss = nce_loss(*scores, *log_u, log_partition=c)
        assert torch.autograd.grad(loss, found)[0].abs().max() < 1e-8


def test_cooccurrences_by_hand() -> None:
    sentences = [torch.tensor([0, 1, 0, 2]), torch.tensor([2]), torch.tensor([1, 2])]
    counts = torch.zeros(3, 3)
    for sentence in sentences:
        for i, first in enumerate(sentence):
            for j, second in enumerate(sentence):
                counts[first, second] += 0 < abs(i - j) <= 2
    assert words.cooccurrences(sentences, 3, window=2).equal(counts)


def test_similarity_and_analogies_by_hand() -> None:
    vocabulary = Vocabulary(["man", "woman", "king", "queen"])
    vectors = torch.tensor([[1.0, 0, 0], [1, 1, 0], [1, 0, 1], [1, 1, 1]])
    rated = [
        ("man", "woman", 2.0),
        ("man", "queen", 1.0),
        ("king", "queen", 3.0),
        ("man", "x", 9.0),
    ]
    covered, correlation = words.similarity(vectors, vocabulary, rated)
    assert covered == 3
    assert correlation == pytest.approx(1)
    asked = [["man", "woman", "king", "queen"], ["man", "woman", "king", "x"]]
    assert words.analogies(vectors, vocabulary, asked) == (1, 1.0)


def test_full_rank_factors_return_the_shifted_positive_table() -> None:
    counts = torch.rand(6, 6, generator=torch.Generator().manual_seed(0)) * 50
    noise = counts.sum(0) / counts.sum()
    left, right = words.ppmi_vectors(counts, noise, 1, 6)
    table = (counts / counts.sum(1, keepdim=True) / noise).log().clamp_min(0)
    torch.testing.assert_close(left @ right.T, table, atol=1e-4, rtol=1e-4)


def test_the_huffman_tree_is_the_shortest_code() -> None:
    counts = torch.tensor([40.0, 3, 3, 9, 1, 22, 5])
    turns = words.huffman_turns(counts)
    lengths = turns.abs().sum(1)
    assert (2.0**-lengths).sum() == 1  # every leaf of a full binary tree, once
    first, *rest = sorted(counts.tolist())
    cost = 0.0  # each merge of the two rarest adds one turn for all the words below
    while rest:
        cost += first + rest[0]
        first, *rest = sorted([first + rest[0], *rest[1:]])
    assert (lengths * counts).sum() == cost
    assert not turns[:, -1].any()
    scores = torch.randn(3, 7, generator=torch.Generator().manual_seed(0)).double()
    log_p = words.tree_log_probs(scores, turns)
    torch.testing.assert_close(log_p.exp().sum(1), torch.ones(3).double())
    by_hand = [
        sum(torch.nn.functional.logsigmoid(t * s) for t, s in zip(turns[4], row, strict=True) if t)
        for row in scores
    ]
    torch.testing.assert_close(log_p[:, 4], torch.stack(by_hand))


def test_a_factorised_softmax_finds_the_law() -> None:
    law = torch.rand(5, 5, generator=torch.Generator().manual_seed(0)).softmax(1)
    scores = words.factorised(
        lambda s: -(law * s.log_softmax(1)).sum(), 5, rank=5, steps=400, seed=1
    )
    torch.testing.assert_close(scores.softmax(1), law, atol=2e-3, rtol=0)
