"""Word2Vec against gensim and the usual EmbeddingBag code: words a second, time to equal quality.

    python benchmarks/nce.py [--rounds N] [--threads N]

Vectors of 100, window 5, 12,000 words, sentences of 20 words half of which are of one topic out of
120. Quality is precision@10: how many of a word's ten nearest neighbours belong to its topic. Each
round is a seed of its own: another text, other first vectors. gensim runs with 2 workers, its
shrinking windows and subsampling off, so that all rivals see the same pairs.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from _timing import arguments, interleave, print_table, ratio
from torch import Tensor, nn

from lib.nce import Word2Vec

VOCABULARY, DIM, WINDOW, TOPICS, LENGTH = 12_000, 100, 5, 120, 20
PARTS = 5  # of an epoch, after each of which our quality is looked at


@dataclass(frozen=True)
class Corpus:
    """Sentences (S, 20) of word ids and the topic of each word (V,)."""

    sentences: np.ndarray
    topic: Tensor

    @classmethod
    @functools.cache
    def draw(cls, words: int, seed: int) -> Corpus:
        """Half the words of a sentence follow Zipf's law, half follow it within one topic."""
        rng = np.random.default_rng(seed)
        topic = rng.permutation(VOCABULARY) % TOPICS
        law = 1 / (np.arange(VOCABULARY) + 10.0)
        shape = words // LENGTH, LENGTH
        text = rng.choice(VOCABULARY, size=shape, p=law / law.sum())
        subject = rng.integers(TOPICS, size=len(text))
        for number in range(TOPICS):
            rows = np.flatnonzero(subject == number)
            members = np.flatnonzero(topic == number)
            share = law[members] / law[members].sum()
            drawn = rng.choice(members, size=(len(rows), LENGTH), p=share)
            text[rows] = np.where(rng.random(drawn.shape) < 0.5, drawn, text[rows])
        return cls(text, torch.from_numpy(topic))

    def precision(self, vectors: Tensor) -> float:
        """Precision@10 over words seen at least five times; of many, an even choice."""
        counts = np.bincount(self.sentences.ravel(), minlength=VOCABULARY)
        words = torch.from_numpy(np.flatnonzero(counts >= 5))
        words = words[:: 1 + len(words) // 1000]
        vectors = F.normalize(vectors, dim=1)
        cosines = vectors[words] @ vectors.T
        cosines[torch.arange(len(words)), words] = -2
        near = cosines.topk(10).indices
        return (self.topic[near] == self.topic[words, None]).double().mean().item()


def gensim_model(
    corpus: Corpus, architecture: str, negatives: int, seed: int, rate: float = 0.025
) -> tuple:
    """gensim's model with its vocabulary built, and the sentences as it wants them."""
    from gensim.models import Word2Vec as Gensim

    sentences = [[str(word) for word in sentence] for sentence in corpus.sentences]
    model = Gensim(
        vector_size=DIM,
        window=WINDOW,
        min_count=1,
        sample=0,
        shrink_windows=False,
        negative=negatives,
        sg=int(architecture == "skipgram"),
        workers=2,
        seed=seed,
        alpha=rate,
    )
    model.build_vocab(sentences)
    return model, sentences


def gensim_vectors(model) -> Tensor:
    """gensim's vectors in the order of our ids."""
    vectors = torch.zeros(VOCABULARY, DIM)
    order = torch.tensor([int(word) for word in model.wv.index_to_key])
    vectors[order] = torch.from_numpy(model.wv.vectors)
    return vectors


class EmbeddingBagCBOW(nn.Module):
    """CBOW as it is usually written: a bag of neighbours, private negatives, sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs = nn.EmbeddingBag(VOCABULARY, DIM, mode="mean", sparse=True)
        self.outputs = nn.Embedding(VOCABULARY, DIM, sparse=True)

    def forward(self, bags: Tensor, offsets: Tensor, candidates: Tensor) -> Tensor:
        scores = (self.outputs(candidates) @ self.inputs(bags, offsets).unsqueeze(2)).squeeze(2)
        target = torch.zeros_like(scores)
        target[:, 0] = 1
        return F.binary_cross_entropy_with_logits(scores, target, reduction="sum") / len(scores)


def embedding_bag_epoch(corpus: Corpus, negatives: int) -> Callable[[], None]:
    """An epoch of `EmbeddingBagCBOW`; bags are laid out once, outside the clock."""
    places = np.arange(LENGTH)[:, None] + np.delete(np.arange(-WINDOW, WINDOW + 1), WINDOW)
    inside = (places >= 0) & (places < LENGTH)
    sentences = corpus.sentences
    bags = torch.from_numpy(sentences[:, places.clip(0, LENGTH - 1)][:, inside])
    lengths = torch.from_numpy(np.tile(inside.sum(1), len(sentences)))
    bags, targets = bags.flatten(), torch.from_numpy(sentences.ravel())
    ends = lengths.cumsum(0)
    law = targets.bincount(minlength=VOCABULARY).double() ** 0.75
    model = EmbeddingBagCBOW()
    optimizer = torch.optim.SGD(model.parameters(), lr=5.0)

    def epoch() -> None:
        for begin in range(0, len(targets), 1024):
            end = min(begin + 1024, len(targets))
            first = int(ends[begin - 1]) if begin else 0
            noise = torch.multinomial(law, (end - begin) * negatives, replacement=True)
            candidates = torch.cat((targets[begin:end, None], noise.view(-1, negatives)), 1)
            offsets = ends[begin:end] - lengths[begin:end] - first
            loss = model(bags[first : int(ends[end - 1])], offsets, candidates)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return epoch


def words_a_second(rounds: int, words: int = 80_000) -> None:
    """One epoch of each rival, interleaved; of quality this says nothing."""
    corpus = Corpus.draw(words, seed=0)
    sentences = list(torch.from_numpy(corpus.sentences))
    rows = []
    for architecture, negatives in (("cbow", 5), ("cbow", 16), ("skipgram", 5)):
        theirs, lines = gensim_model(corpus, architecture, negatives, seed=1)
        mine = Word2Vec(VOCABULARY, DIM, architecture)
        rivals: dict[str, Callable[[], object]] = {
            "gensim": lambda: theirs.train(lines, total_examples=len(lines), epochs=1),
            "ours": lambda: mine.fit(
                sentences, epochs=1, window=WINDOW, negatives=negatives, batch_size=4096
            ),
        }
        if architecture == "cbow":
            rivals["EmbeddingBag"] = embedding_bag_epoch(corpus, negatives)
        times = interleave(rivals, rounds, warmup=1)
        speed = {name: words / np.median(seconds) / 1000 for name, seconds in times.items()}
        bag = "EmbeddingBag" if architecture == "cbow" else None
        rows.append(
            [
                f"{architecture}, k={negatives}",
                speed["gensim"],
                speed.get("EmbeddingBag"),
                speed["ours"],
                ratio(times, "gensim", "ours"),
                ratio(times, bag, "ours") if bag else None,
                5.0 if bag else None,
            ]
        )
    header = ["thousand words/s", "gensim", "EmbeddingBag", "ours", "x gensim", "x bag", "target"]
    print_table("Speed alone", header, rows)


def seconds_to(
    corpus: Corpus, model: Word2Vec, negatives: int, goals: list[float], epochs: int
) -> tuple:
    """Seconds of training until each goal is reached, None if never, and the last precision."""
    parts = np.array_split(corpus.sentences, PARTS)
    batch = min(4096, corpus.sentences.size // 64)  # what fit chooses for the whole text
    reached: list[float | None] = [None] * len(goals)
    spent = precision = 0.0
    for part in [torch.from_numpy(part) for part in parts] * (epochs + 2):
        begin = time.perf_counter()
        model.fit(list(part), epochs=1, window=WINDOW, negatives=negatives, batch_size=batch)
        spent += time.perf_counter() - begin
        precision = corpus.precision(model.vectors)
        reached = [
            spent if old is None and precision >= goal else old
            for old, goal in zip(reached, goals, strict=True)
        ]
        if None not in reached:
            break
    return reached, precision


def time_to_quality(rounds: int, cases: list[tuple[str, int, int, int, float, float]]) -> None:
    """gensim's whole training against ours until it is as good, a seed a round."""
    rows = []
    for architecture, negatives, words, epochs, rate, target in cases:
        ratios = []
        for seed in range(rounds):
            corpus = Corpus.draw(words, seed)
            theirs, lines = gensim_model(corpus, architecture, negatives, seed + 1, rate)
            begin = time.perf_counter()
            theirs.train(lines, total_examples=len(lines), epochs=epochs)
            spent = time.perf_counter() - begin
            goal = corpus.precision(gensim_vectors(theirs))
            torch.manual_seed(seed)
            mine = Word2Vec(VOCABULARY, DIM, architecture)
            (most, all_of_it), last = seconds_to(
                corpus, mine, negatives, [0.9 * goal, goal], epochs
            )
            name = f"{architecture}, k={negatives}, {epochs} x {words // 1000}k, "
            name += f"its rate {rate}, seed {seed}"
            speedup = [None if mine is None else spent / mine for mine in (most, all_of_it)]
            rows.append([name, goal, spent, most, all_of_it, last, *speedup, target])
            ratios.append(speedup)
        columns = zip(*ratios, strict=True)
        medians = [None if None in c else float(np.median(c)) for c in columns]
        rows.append(["  median", *[None] * 5, *medians, target])
    header = ["", "gensim p@10", "its s", "our s to 0.9", "to all", "our p@10"]
    print_table("Time to quality", [*header, "x at 0.9", "x at all", "target"], rows)


def main() -> None:
    options = arguments(__doc__ or "", rounds=3)
    words_a_second(options.rounds)
    cases = [  # gensim's rate is the best of 0.025, 0.05, 0.1 and 0.2 for this text
        ("cbow", 5, 1_000_000, 1, 0.05, 0.7),
        ("cbow", 16, 1_000_000, 1, 0.05, 1.0),
        ("skipgram", 5, 400_000, 1, 0.05, 2.0),
        ("skipgram", 5, 200_000, 5, 0.025, 2.0),
    ]
    time_to_quality(options.rounds, cases)


if __name__ == "__main__":
    main()
