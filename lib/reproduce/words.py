"""What chapter ``nce`` does with words: a corpus with known laws, counts, and judging vectors."""

from __future__ import annotations

import heapq
import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from lib.nce import UnigramNoise, Vocabulary

__all__ = [
    "analogies",
    "cooccurrences",
    "factorised",
    "huffman_turns",
    "known_corpus",
    "ppmi_vectors",
    "similarity",
    "train_scores",
    "tree_log_probs",
]


def known_corpus(
    seed: int, *, contexts: int = 40, words: int = 200, pairs: int = 100_000
) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs (context, word) drawn from conditionals that we know.

    Returns:
        log p(w | h) (H, V), contexts (N,) and words (N,): Zipf's law, bent by six hidden traits.
    """
    generator = torch.Generator().manual_seed(seed)
    traits = torch.randn(contexts, 6, generator=generator)
    bent = traits @ torch.randn(6, words, generator=generator) / 6**0.5
    law = (bent - 1.2 * torch.log(torch.arange(words) + 5.0)).log_softmax(1)
    h = torch.randint(contexts, (pairs,), generator=generator)
    w = torch.multinomial(law.exp()[h], 1, generator=generator)[:, 0]
    return law, h, w


def train_scores(
    loss: Callable[[Tensor, Tensor], Tensor],
    h: Tensor,
    w: Tensor,
    noise: UnigramNoise,
    *,
    start: Tensor,
    negatives: int = 10,
    rank: int = 8,
    steps: int = 400,
    seed: int = 0,
) -> Tensor:
    """Learn scores (H, V) = <u_h, v_w> + b_w by Adam on batches of 1,024 pairs.

    Args:
        loss: maps scores (B, 1 + K) of each word and its noise words, and their ids, to a scalar.
        h: contexts (N,).
        w: words (N,).
        noise: law of the K noise words; with ``negatives=0`` every word is scored instead, and
            ``loss`` gets scores (B, V) and the words (B,).
        start: the first b (V,).
    """
    generator = torch.Generator().manual_seed(seed)
    u = nn.Parameter(0.1 * torch.randn(int(h.max()) + 1, rank, generator=generator))
    v = nn.Parameter(0.1 * torch.randn(len(start), rank, generator=generator))
    b = nn.Parameter(start.float().clone())
    adam = torch.optim.Adam([u, v, b], lr=0.03)
    schedule = torch.optim.lr_scheduler.LinearLR(adam, 1, 1e-3, total_iters=steps)
    for _ in range(steps):
        rows = torch.randint(len(h), (1024,), generator=generator)
        if negatives:
            drawn = noise.sample((len(rows), negatives), generator)
            ids = torch.cat((w[rows].unsqueeze(1), drawn), 1)
            scores = (v[ids] @ u[h[rows]].unsqueeze(2)).squeeze(2) + b[ids]
        else:
            ids, scores = w[rows], u[h[rows]] @ v.T + b
        adam.zero_grad()
        loss(scores, ids).backward()
        adam.step()
        schedule.step()
    return (u @ v.T + b).detach()


def cooccurrences(sentences: Iterable[Tensor], size: int, window: int = 5) -> Tensor:
    """How often word j stands within ``window`` of word i in one sentence (V, V)."""
    sentences = list(sentences)
    ids = torch.cat(sentences)
    lengths = torch.tensor([len(sentence) for sentence in sentences])
    owner = torch.repeat_interleave(torch.arange(len(sentences)), lengths)
    counts = torch.zeros(size * size)
    for step in range(1, window + 1):
        together = owner[step:] == owner[:-step]
        cells = (ids[step:] * size + ids[:-step])[together]
        counts += cells.bincount(minlength=size * size)
    table = counts.view(size, size)
    return table + table.T


def factorised(
    loss: Callable[[Tensor], Tensor], size: int, *, rank: int = 50, steps: int = 100, seed: int = 0
) -> Tensor:
    """The table of scores (V, V) of a given rank that minimises ``loss``, by Adam."""
    generator = torch.Generator().manual_seed(seed)
    u, v = (
        nn.Parameter(0.3 / math.sqrt(rank) * torch.randn(size, rank, generator=generator))
        for _ in range(2)
    )
    adam = torch.optim.Adam([u, v], lr=0.03)
    schedule = torch.optim.lr_scheduler.LinearLR(adam, 1, 1e-3, total_iters=steps)
    for _ in range(steps):
        adam.zero_grad()
        loss(u @ v.T).backward()
        adam.step()
        schedule.step()
    return (u @ v.T).detach()


def ppmi_vectors(counts: Tensor, noise: Tensor, k: int, rank: int) -> tuple[Tensor, Tensor]:
    """Factors (V, D) of ``max(0, log p(w | h) / U(w) - log k)``, the shifted positive PMI."""
    law = counts / counts.sum(1, keepdim=True).clamp_min(1)
    table = (law / noise).log().sub(math.log(k)).clamp_min(0)
    left, size, right = torch.svd_lowrank(table, rank, niter=4)
    return left * size.sqrt(), right * size.sqrt()


def huffman_turns(counts: Tensor) -> Tensor:
    """The Huffman tree of words seen ``counts`` (V,) times, as turns at its inner nodes (V, V).

    Row w holds +1 or -1 for each node that the path from the root to w turns at, one way or the
    other, and 0 elsewhere. There are V - 1 nodes: the last column stays 0.
    """
    turns = counts.new_zeros(len(counts), len(counts))
    heap = [(count, place, [place]) for place, count in enumerate(counts.tolist())]
    heapq.heapify(heap)
    for node in range(len(counts) - 1):
        rarest, next_rarest = heapq.heappop(heap), heapq.heappop(heap)
        turns[rarest[2], node], turns[next_rarest[2], node] = -1, 1
        both = rarest[0] + next_rarest[0], len(counts) + node, rarest[2] + next_rarest[2]
        heapq.heappush(heap, both)
    return turns


def tree_log_probs(scores: Tensor, turns: Tensor) -> Tensor:
    """log p(w | h) (H, V): the sum of log sigma(turn * score) over the nodes of w's path."""
    right, left = ((turns == turn).to(scores).T for turn in (1, -1))
    return F.logsigmoid(scores) @ right + F.logsigmoid(-scores) @ left


def similarity(
    vectors: Tensor, vocabulary: Vocabulary, pairs: Sequence[tuple[str, str, float]]
) -> tuple[int, float]:
    """How many pairs the vocabulary covers; Spearman's correlation of cosine and rating."""
    from scipy.stats import spearmanr

    known = [pair for pair in pairs if pair[0] in vocabulary and pair[1] in vocabulary]
    first, second, rating = zip(*known, strict=True)
    a, b = (vectors[[vocabulary[word] for word in words]] for words in (first, second))
    return len(known), float(spearmanr(F.cosine_similarity(a, b), rating).statistic)


def analogies(
    vectors: Tensor, vocabulary: Vocabulary, quadruples: Sequence[Sequence[str]]
) -> tuple[int, float]:
    """How many analogies the vocabulary covers; the share that b - a + c answers with d."""
    known = [words for words in quadruples if all(word in vocabulary for word in words)]
    ids = torch.tensor([[vocabulary[word] for word in words] for words in known])
    unit = F.normalize(vectors, dim=1)
    a, b, c, d = ids.T
    scores = (unit[b] - unit[a] + unit[c]) @ unit.T
    scores.scatter_(1, ids[:, :3], -torch.inf)
    return len(known), float((scores.argmax(1) == d).double().mean())
