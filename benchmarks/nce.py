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
PARTS = 10  # of an epoch, after each of which our quality is looked at


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
        # word2vec's start; from torch's normal one SGD comes to a precision of 0.06
        nn.init.uniform_(self.inputs.weight, -0.5 / DIM, 0.5 / DIM)
        nn.init.zeros_(self.outputs.weight)

    def forward(self, bags: Tensor, offsets: Tensor, candidates: Tensor) -> Tensor:
        scores = (self.outputs(candidates) @ self.inputs(bags, offsets).unsqueeze(2)).squeeze(2)
        target = torch.zeros_like(scores)
        target[:, 0] = 1
        return F.binary_cross_entropy_with_logits(scores, target, reduction="sum") / len(scores)


# each at the best of its rates for batches of 1,024 words of this text
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": functools.partial(torch.optim.SGD, lr=150.0),
    "Adagrad": functools.partial(torch.optim.Adagrad, lr=0.03),
}


def embedding_bag_epoch(
    corpus: Corpus, negatives: int, optimizer: str = "SGD"
) -> tuple[EmbeddingBagCBOW, Callable[[], None]]:
    """A model and an epoch of its training; bags are laid out once, outside the clock."""
    places = np.arange(LENGTH)[:, None] + np.delete(np.arange(-WINDOW, WINDOW + 1), WINDOW)
    inside = (places >= 0) & (places < LENGTH)
    sentences = corpus.sentences
    bags = torch.from_numpy(sentences[:, places.clip(0, LENGTH - 1)][:, inside])
    lengths = torch.from_numpy(np.tile(inside.sum(1), len(sentences)))
    bags, targets = bags.flatten(), torch.from_numpy(sentences.ravel())
    ends = lengths.cumsum(0)
    law = targets.bincount(minlength=VOCABULARY).double() ** 0.75
    model = EmbeddingBagCBOW()
    stepper = OPTIMIZERS[optimizer](model.parameters())

    def epoch() -> None:
        for begin in range(0, len(targets), 1024):
            end = min(begin + 1024, len(targets))
            first = int(ends[begin - 1]) if begin else 0
            noise = torch.multinomial(law, (end - begin) * negatives, replacement=True)
            candidates = torch.cat((targets[begin:end, None], noise.view(-1, negatives)), 1)
            offsets = ends[begin:end] - lengths[begin:end] - first
            loss = model(bags[first : int(ends[end - 1])], offsets, candidates)
            stepper.zero_grad()
            loss.backward()
            stepper.step()

    return model, epoch


def words_a_second(rounds: int, words: int = 320_000) -> None:
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
                sentences, epochs=1, window=WINDOW, negatives=negatives, batch_size=16_384
            ),
        }
        if architecture == "cbow":
            _, rivals["EmbeddingBag"] = embedding_bag_epoch(corpus, negatives)
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


@dataclass(frozen=True)
class Case:
    """A peer's training, which ours is to equal."""

    architecture: str
    negatives: int
    words: int
    epochs: int
    peer: str
    target: float
    rate: float = 0.0  # gensim's

    def __str__(self) -> str:
        size = f"{self.epochs} x {self.words // 1000}k"
        return f"{self.architecture}, k={self.negatives}, {size}, {self.peer}"

    def train_peer(self, corpus: Corpus, seed: int) -> tuple[float, float]:
        """Seconds that the peer takes for all its epochs, and its precision after them."""
        torch.manual_seed(seed)
        if self.peer == "gensim":
            model, lines = gensim_model(
                corpus, self.architecture, self.negatives, seed + 1, self.rate
            )
            seconds = spent(
                lambda: model.train(lines, total_examples=len(lines), epochs=self.epochs)
            )
            return seconds, corpus.precision(gensim_vectors(model))
        bag, epoch = embedding_bag_epoch(corpus, self.negatives, self.peer.split()[-1])
        seconds = sum(spent(epoch) for _ in range(self.epochs))
        return seconds, corpus.precision(bag.inputs.weight.detach())

    def train_ours(self, corpus: Corpus, seed: int, goals: list[float]) -> tuple:
        """Seconds until each goal is reached, None if never, and the last precision."""
        torch.manual_seed(seed)
        model = Word2Vec(VOCABULARY, DIM, self.architecture)
        batch = min(16_384, corpus.sentences.size // 64)  # what fit chooses for the whole text
        options = {"window": WINDOW, "negatives": self.negatives, "batch_size": batch}
        parts = [list(torch.from_numpy(p)) for p in np.array_split(corpus.sentences, PARTS)]
        reached: list[float | None] = [None] * len(goals)
        seconds = precision = 0.0
        for part in parts * (self.epochs + 2):
            seconds += spent(functools.partial(model.fit, part, epochs=1, **options))
            precision = corpus.precision(model.vectors)
            reached = [
                seconds if old is None and precision >= goal else old
                for old, goal in zip(reached, goals, strict=True)
            ]
            if None not in reached:
                break
        return reached, precision


def spent(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def time_to_quality(rounds: int, cases: list[Case]) -> None:
    """A peer's whole training against ours until it is as good, a seed a round."""
    rows = []
    for case in cases:
        ratios = []
        for seed in range(rounds):
            corpus = Corpus.draw(case.words, seed)
            theirs, goal = case.train_peer(corpus, seed)
            ours, last = case.train_ours(corpus, seed, [0.9 * goal, goal])
            speedup = [None if seconds is None else theirs / seconds for seconds in ours]
            rows.append([f"{case}, seed {seed}", goal, theirs, *ours, last, *speedup, case.target])
            ratios.append(speedup)
        columns = zip(*ratios, strict=True)
        medians = [None if None in c else float(np.median(c)) for c in columns]
        rows.append(["  median", *[None] * 5, *medians, case.target])
    header = ["", "its p@10", "its s", "our s to 0.9", "to all", "our p@10"]
    print_table("Time to quality", [*header, "x at 0.9", "x at all", "target"], rows)


def main() -> None:
    options = arguments(__doc__ or "", rounds=3)
    words_a_second(2 * options.rounds + 1)
    cases = [  # gensim's rate is the best of 0.025, 0.05, 0.1 and 0.2 for this text
        Case("cbow", 5, 1_000_000, 1, "gensim", 0.7, rate=0.05),
        Case("cbow", 16, 1_000_000, 1, "gensim", 1.0, rate=0.05),
        Case("cbow", 5, 1_000_000, 1, "EmbeddingBag, SGD", 5.0),
        Case("cbow", 5, 1_000_000, 1, "EmbeddingBag, Adagrad", 5.0),
        Case("skipgram", 5, 400_000, 1, "gensim", 2.0, rate=0.05),
        Case("skipgram", 5, 200_000, 5, "gensim", 2.0, rate=0.025),
    ]
    time_to_quality(options.rounds, cases)


if __name__ == "__main__":
    main()
