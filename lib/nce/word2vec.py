"""Word vectors from running text, by negative sampling."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lib._common import at_least_float32, bool_mask, check_positive, no_autocast
from lib.nce._checks import check_ids, check_values
from lib.nce._steps import NOISE_BLOCK, Batch, Table, band_block, cbow_step, skipgram_step
from lib.nce._text import Text, group
from lib.nce._unit import unit
from lib.nce.noise import UnigramNoise

__all__ = ["Word2Vec"]

Architecture = Literal["cbow", "skipgram"]


class Word2Vec(nn.Module):
    """Word vectors that tell a word from its neighbours (CBOW), or they from it (skip-gram).

    ::

        score(w | h) = <output_w, h>,    h = mean of the neighbours' inputs, or the centre's input

    Trained by negative sampling with K words from the noise law U, the scores settle at
    ``log p(w | h) - log U(w) - log K``: for U the unigram law, the pointwise mutual information
    shifted by log K.

    Args:
        vocab_size: number of words V.
        dim: length of the vectors D.
        architecture: ``"cbow"`` or ``"skipgram"``.
        generator: source of the initial vectors.

    Attributes:
        input_vectors: parameter (V, D), what a word says of the words around it.
        output_vectors: parameter (V, D), what a word wants to hear from the words around it.
        input_squares, output_squares: buffers (V,), sums of squared gradients; with them in the
            state dict, training goes on where it stopped.

    Raises:
        ValueError: if a size is below 1 or the architecture is unknown.
        TypeError: if a size is not an integer.

    Source: chapter `nce`, eq-nce-pmi; Mikolov et al. (2013), Levy and Goldberg (2014).

    >>> generator = torch.Generator().manual_seed(0)
    >>> model = Word2Vec(6, 4, "skipgram", generator=generator)
    >>> sentences = [[0, 1, 2], [3, 4, 5]] * 100  # two topics
    >>> losses = model.fit(sentences, epochs=20, window=2, negatives=2, generator=generator)
    >>> ids, similarities = model.most_similar(0, k=2)
    >>> sorted(ids.tolist())
    [1, 2]
    """

    input_squares: Tensor
    output_squares: Tensor

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        architecture: Architecture = "cbow",
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_positive(vocab_size, "vocab_size")
        check_positive(dim, "dim")
        if architecture not in get_args(Architecture):
            raise ValueError(f'architecture must be "cbow" or "skipgram", got {architecture!r}')
        self.architecture = architecture
        self.input_vectors = nn.Parameter(torch.empty(vocab_size, dim))
        self.output_vectors = nn.Parameter(torch.empty(vocab_size, dim))
        self.register_buffer("input_squares", torch.empty(vocab_size))
        self.register_buffer("output_squares", torch.empty(vocab_size))
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Forget everything: inputs small and random, outputs and squares 0."""
        vocab_size, dim = self.input_vectors.shape
        device = getattr(generator, "device", "cpu")
        start = torch.rand(vocab_size, dim, generator=generator, device=device) - 0.5
        self.input_vectors.copy_(start / dim)
        for zero in (self.output_vectors, self.input_squares, self.output_squares):
            zero.zero_()

    @property
    def vectors(self) -> Tensor:
        """The word vectors (V, D): the inputs, without gradient."""
        return self.input_vectors.detach()

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Score every word, given input words; differentiable.

        Args:
            ids: the centre word (...) for skip-gram, its C neighbours (..., C) for CBOW.
            mask: which neighbours to keep (..., C); CBOW only.

        Returns:
            Scores (..., V) in nats: up to a constant, log-probabilities less log U.

        Raises:
            ValueError: if an id is out of range, a word has no neighbour, or skip-gram gets a mask.
            TypeError: if ``ids`` are not integers.
        """
        ids = check_ids(ids, len(self.input_vectors), "ids")
        hidden = self.input_vectors[ids]
        if self.architecture == "cbow":
            if ids.dim() == 0:
                raise ValueError("ids must have shape (..., C), the neighbours of a word, got ()")
            keep = torch.ones_like(ids, dtype=torch.bool)
            if mask is not None:
                keep = bool_mask(mask, tuple(ids.shape))
            check_values(keep.any(-1), "mask must keep at least one neighbour of each word")
            kept = hidden.masked_fill(~keep.unsqueeze(-1), 0)  # times 0, NaN would stay NaN
            hidden = kept.sum(-2) / keep.sum(-1, keepdim=True)
        elif mask is not None:
            raise ValueError("mask must be None for skip-gram, whose input is a single word")
        return hidden @ self.output_vectors.T

    @torch.no_grad()
    def fit(
        self,
        sentences: Iterable[Sequence[int] | Tensor],
        *,
        epochs: int = 5,
        window: int = 5,
        negatives: int = 5,
        subsample: float | None = None,
        power: float = 0.75,
        learning_rate: float = 0.1,
        batch_size: int | None = None,
        generator: torch.Generator | None = None,
    ) -> list[float]:
        """Train on ``sentences``, from where the last call stopped.

        Each pair's K noise words are drawn from `UnigramNoise` of these sentences' counts, a larger
        number being shared, at a smaller weight, by neighbouring words; steps are row-wise Adagrad,
        which keeps frequent words from running away. Windows end with their sentence and batch.

        Args:
            sentences: each a sequence of word ids; one-word sentences teach nothing.
            epochs: passes over the text.
            window: how many words to each side are neighbours.
            negatives: noise words per pair K.
            subsample: threshold t; a word of share f is kept with probability
                ``sqrt(t / f) + t / f``. None keeps all.
            power: of the counts, in the noise law.
            learning_rate: of the first step of a row; later ones shrink by themselves.
            batch_size: words per step; None for 256 to 16,384 of them, by the length of the text.
            generator: source of order, noise and subsampling, on the CPU whatever the device.

        Returns:
            For each epoch, the mean loss in nats of a prediction: of a word for CBOW, of a pair
            for skip-gram, its noise terms included. Summed over batches in float64.

        Raises:
            ValueError: if an id is out of range, no sentence has two words, subsampling leaves no
                neighbours, or a setting is not positive.
            TypeError: if sentences are not sequences of integers, or vectors are in half precision.
        """
        for name, count in (("epochs", epochs), ("window", window), ("negatives", negatives)):
            check_positive(count, name)
        window, negatives = int(window), int(negatives)  # a short numpy integer would overflow
        _check_rate(learning_rate, "learning_rate")
        if subsample is not None:
            _check_rate(subsample, "subsample")
        if self.input_vectors.element_size() < 4:
            seen = self.input_vectors.dtype
            raise TypeError(f"input_vectors must be float32 or float64 to be trained, got {seen}")
        text = Text.from_sentences(sentences, len(self.input_vectors))
        window = min(window, int(text.sentence.bincount().max()) - 1)  # none stands further
        noise = UnigramNoise(text.ids.bincount(minlength=len(self.input_vectors)), power)
        size = _batch_size(batch_size, len(text), window)
        _keep_freed_memory()
        history = []
        for epoch in range(epochs):
            kept = text if subsample is None else text.subsampled(subsample, generator)
            total = torch.zeros(2, dtype=torch.float64, device=self.input_vectors.device)
            if len(kept):
                with no_autocast(self.input_vectors):
                    for run in kept.padded(_multiple(window)).batches(size, generator):
                        total += self._step(run, noise, window, negatives, learning_rate, generator)
            loss, terms = total.tolist()
            if terms == 0:
                raise ValueError(
                    f"subsample={subsample} left no two neighbours in epoch {epoch}; raise it"
                )
            history.append(loss / terms)
        return history

    def _step(
        self,
        run: Text,
        noise: UnigramNoise,
        window: int,
        negatives: int,
        learning_rate: float,
        generator: torch.Generator | None,
    ) -> Tensor:
        """Train on one batch; return the sum of its losses and their number."""
        size, device = self.input_vectors.shape[0], self.input_vectors.device
        shared = max(32, 4 * negatives)
        drawn = noise.sample((len(run) // NOISE_BLOCK, shared), generator)
        batch = Batch(
            ids=run.ids.to(device),
            sentence=run.sentence.to(device),
            noise=drawn.to(device),
            words=group(run.ids, size, device),
            words_and_noise=group(torch.cat((run.ids, drawn.view(-1))), size, device),
            window=window,
            weight=negatives / shared,
        )
        inputs = Table(self.input_vectors.data, self.input_squares)
        outputs = Table(self.output_vectors.data, self.output_squares)
        step = cbow_step if self.architecture == "cbow" else skipgram_step
        return step(inputs, outputs, batch, learning_rate)

    @torch.no_grad()
    def most_similar(
        self, query: int | Tensor, k: int = 10, *, exclude: Sequence[int] | Tensor = ()
    ) -> tuple[Tensor, Tensor]:
        """The ``k`` words whose vectors point most nearly the same way.

        Args:
            query: a word id, itself left out of the answer, or a vector (D,).
            k: how many, at most the words that are left.
            exclude: further ids to leave out.

        Returns:
            Ids (k,) and cosines (k,) in at least float32, the nearest first. A zero vector has
            cosine 0 to all.

        Raises:
            ValueError: if an id or ``k`` is out of range, the query is a zero vector, or a vector
                is not finite.
            TypeError: if ``query`` is neither an id nor a vector, or ``exclude`` holds no ids.
        """
        vectors = at_least_float32(self.vectors)
        words = exclude.tolist() if isinstance(exclude, Tensor) else exclude
        if not isinstance(words, Iterable):
            raise TypeError(f"exclude must be a sequence of word ids, got {exclude!r}")
        left_out = [_word_id(word, "exclude must hold word ids") for word in words]
        if isinstance(query, Tensor) and query.is_floating_point():
            if query.shape != vectors.shape[1:]:
                wanted = tuple(vectors.shape[1:])
                raise ValueError(f"query must have shape {wanted}, got {tuple(query.shape)}")
            direction = at_least_float32(query).to(vectors.device)
        else:
            word = query.item() if isinstance(query, Tensor) and query.dim() == 0 else query
            left_out.append(_word_id(word, "query must be a word id or a vector"))
        for word in left_out:
            if not 0 <= word < len(vectors):
                raise ValueError(f"ids must lie in 0 .. {len(vectors) - 1}, got {word}")
        check_positive(k, "k")
        available = len(vectors) - len(set(left_out))
        if k > available:
            raise ValueError(f"k must be at most the {available} words that are left, got {k}")
        if not (isinstance(query, Tensor) and query.is_floating_point()):
            direction = vectors[left_out[-1]]
        if not (direction.isfinite().all() and direction.any()):
            raise ValueError("query must be finite and not zero: a zero vector has no direction")
        check_values(vectors.isfinite(), "input_vectors must be finite", vectors)
        with no_autocast(vectors):
            cosines = (unit(vectors) @ unit(direction).to(vectors)).clamp_(-1, 1)
        cosines[left_out] = -math.inf
        similarities, ids = cosines.topk(k)
        return ids, similarities

    def extra_repr(self) -> str:
        vocab_size, dim = self.input_vectors.shape
        return f"{vocab_size}, {dim}, architecture={self.architecture!r}"


def _word_id(word: object, message: str) -> int:
    if isinstance(word, bool) or not isinstance(word, Integral):
        raise TypeError(f"{message}, got {word!r}")
    return int(word)


def _check_rate(value: float, name: str) -> None:
    if not (isinstance(value, Real) and 0 < value < math.inf):
        raise ValueError(f"{name} must be a positive number, got {value!r}")


def _keep_freed_memory() -> None:
    """Keep what a batch frees for the next batch; page faults cost a fifth of the time.

    glibc hands memory back to the system when more than twice the largest block that was ever
    freed lies idle; blocks above 32 MiB do not count. A block that is never written costs nothing.
    """
    torch.empty(31 << 20, dtype=torch.uint8, device="cpu")


def _multiple(window: int) -> int:
    """Batches are whole blocks of shared noise and whole rows of the band."""
    return max(NOISE_BLOCK, band_block(window))


def _batch_size(wanted: int | None, words: int, window: int) -> int:
    if wanted is None:
        wanted = min(16_384, max(256, words // 64))
    check_positive(wanted, "batch_size")
    return math.ceil(wanted / _multiple(window)) * _multiple(window)
