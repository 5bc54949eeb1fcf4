"""One step of word2vec on a batch of running text: the loss, its gradient, the update.

What makes it fast. A batch is running text, so each row is fetched once per word, not once per
pair, and the words beside each word are a band: sums over windows are small matrix products.
Blocks of neighbouring words share M noise words in place of k of their own, each counted k / M
times; the expected gradient is the same, and the noise terms are matrix products too. The gradient
is written out by hand and summed over the places of each word, so that each row is updated once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lib.nce._text import Groups

__all__ = ["NOISE_BLOCK", "Batch", "Table", "band_block", "cbow_step", "skipgram_step"]

NOISE_BLOCK = 64  # words that share their noise words
_EPSILON = 1e-10  # keeps 0 / 0 from rows that have met no gradient


@dataclass(frozen=True)
class Table:
    """Word vectors (V, D) and, for each, the sum of its mean squared gradients so far (V,)."""

    vectors: Tensor
    squares: Tensor

    def descend(self, groups: Groups, gradient: Tensor, learning_rate: float) -> None:
        """One step of row-wise Adagrad against the ``gradient`` (U, D) of ``groups.rows``.

        A frequent word, many stale gradients of which meet in a batch, has a long past and takes
        a short step; a rare word takes a long one. No step exceeds ``learning_rate * sqrt(D)``.
        """
        length = torch.linalg.vector_norm(gradient, dim=1)
        squares = self.squares.index_select(0, groups.rows) + length.square() / gradient.shape[1]
        self.squares[groups.rows] = squares
        step = gradient.mul_((-learning_rate / (squares.sqrt() + _EPSILON)).unsqueeze(1))
        self.vectors.scatter_add_(0, groups.rows.unsqueeze(1).expand_as(step), step)


@dataclass(frozen=True)
class Batch:
    """N words of running text with the noise of their blocks, on the device of the vectors."""

    ids: Tensor  # (N,)
    sentence: Tensor  # (N,) int32, whose words they are
    noise: Tensor  # (N / NOISE_BLOCK, M)
    words: Groups  # of ids
    words_and_noise: Groups  # of ids, then noise
    window: int  # W
    weight: float  # k / M


def band_block(window: int) -> int:
    """Words per row of the band of neighbours: a power of 2, at least ``window``."""
    return max(16, 1 << (window - 1).bit_length())


def _around(sentence: Tensor, window: int) -> Tensor:
    return F.pad(sentence, (window, window), value=torch.iinfo(sentence.dtype).min)


def _neighbours(sentence: Tensor, window: int) -> Tensor:
    """The places of each word's neighbours (N, 2W + 1); N stands for none, and for itself."""
    n, width = len(sentence), 2 * window + 1
    step = torch.arange(-window, window + 1, dtype=torch.int32, device=sentence.device)
    step[window] = n  # past every place
    places = torch.arange(n, dtype=torch.int32, device=sentence.device).unsqueeze(1) + step
    around = _around(sentence, window).unfold(0, width, 1)
    return places.masked_fill_(around != sentence.unsqueeze(1), n).clamp_max_(n)


def _beside(sentence: Tensor, window: int, block: int, dtype: torch.dtype) -> Tensor:
    """Which words stand within ``window`` of each other in one sentence: 1 or 0, in ``dtype``.

    Of each ``block`` of R words the answer (N / R, R, R + 2W) has a row; its columns are the words
    from W before the block to W after it.
    """
    width = block + 2 * window
    column = torch.arange(width, device=sentence.device)
    distance = (column - column[window : window + block].unsqueeze(1)).abs()
    near = ((distance > 0) & (distance <= window)).to(dtype)
    around = _around(sentence, window).unfold(0, width, block)
    return near * (sentence.view(-1, block, 1) == around.unsqueeze(1))


def _rows(vectors: Tensor, ids: Tensor) -> Tensor:
    """The rows of ``ids`` (N,) as bags of one word: unlike index_select, bags are read ahead."""
    return F.embedding_bag(ids.unsqueeze(1), vectors, mode="sum")


def _fetch(vectors: Tensor, ids: Tensor, before: int, after: int) -> Tensor:
    """The rows of ``ids``, with so many rows of zeros around them."""
    rows = _rows(vectors, F.pad(ids, (before, after)))
    rows[:before] = 0
    rows[before + len(ids) :] = 0
    return rows


def _overlap_add(parts: Tensor, window: int) -> Tensor:
    """The transpose of `_windows`: add up blocks (N / R, R + 2W, D) where they overlap."""
    rows = parts[:, window:-window].contiguous()
    rows[1:, :window] += parts[:-1, -window:]
    rows[:-1, -window:] += parts[1:, :window]
    return rows.flatten(0, 1)


def _group_sum(groups: Groups, values: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum the rows of ``values`` (N, D), times ``weights`` (N,) -> (U, D)."""
    if weights is not None:
        weights = weights[groups.order]
    return F.embedding_bag(
        groups.order, values, groups.starts, mode="sum", per_sample_weights=weights
    )


def _noise_terms(
    outputs: Table,
    noise: Tensor,
    hidden: Tensor,
    weight: Tensor,
    d_hidden: Tensor,
    d_other: Tensor,
    share: Tensor | None = None,
) -> Tensor:
    """Score each block of ``hidden`` (N, D) against its ``noise`` (N / NOISE_BLOCK, M).

    Returns the loss, each word's terms times its ``weight`` (N,); adds the gradient to
    ``d_hidden`` and writes that of the noise vectors to ``d_other``. Scores are times ``share``
    (N,), if given.
    """
    dim = hidden.shape[1]
    other = _rows(outputs.vectors, noise.view(-1)).view(*noise.shape, dim)
    blocks = hidden.view(-1, NOISE_BLOCK, dim)
    weight = weight.view(-1, NOISE_BLOCK, 1)
    score = torch.bmm(blocks, other.mT)
    slope = weight
    if share is not None:
        share = share.view_as(weight)
        score.mul_(share)
        slope = weight * share
    loss = (F.softplus(score).sum(2, keepdim=True) * weight).sum(dtype=torch.float64)
    d_score = score.sigmoid_().mul_(slope)
    d_hidden.view_as(blocks).baddbmm_(d_score, other)
    torch.bmm(d_score.mT, blocks, out=d_other.view_as(other))
    return loss


def cbow_step(inputs: Table, outputs: Table, batch: Batch, learning_rate: float) -> Tensor:
    """Predict each word from the mean of its neighbours; return (sum of losses, their number).

    The rows are sums; to make them means, the scores are divided: they are fewer numbers.
    """
    n = len(batch.ids)
    neighbours = _neighbours(batch.sentence, batch.window)  # (N, 2W + 1)
    width = neighbours.shape[1]
    count = (neighbours < n).sum(1, dtype=torch.int32)
    share = count.clamp_min(1).to(inputs.vectors).reciprocal_()  # (N,)
    weight = (count > 0).to(share)  # (N,)
    rows = _fetch(inputs.vectors, batch.ids, 0, 1)
    # empty bags make room for the gradients of the noise vectors
    starts = torch.arange(n + batch.noise.numel(), dtype=torch.int32, device=rows.device)
    starts = starts.mul_(width).clamp_max_(n * width)
    sources = F.embedding_bag(neighbours.view(-1), rows, starts, mode="sum")
    total, d_other = sources[:n], sources[n:]  # (N, D), (N / NOISE_BLOCK * M, D)

    own = _fetch(outputs.vectors, batch.ids, 0, 1)
    d_total = own[:n]
    score = torch.linalg.vecdot(total, d_total).mul_(share)
    loss = (F.softplus(-score) * weight).sum(dtype=torch.float64)
    d_score = score.sigmoid_().sub_(1).mul_(weight).mul_(share)
    d_total.mul_(d_score.unsqueeze(1))
    weights = weight * batch.weight
    loss += _noise_terms(outputs, batch.noise, total, weights, d_total, d_other, share)

    bags = neighbours.index_select(0, batch.words.order).view(-1)
    d_inputs = F.embedding_bag(bags, own, batch.words.starts.int() * width, mode="sum")
    times = torch.cat((d_score, d_score.new_ones(len(d_other))))
    inputs.descend(batch.words, d_inputs, learning_rate)
    both = batch.words_and_noise
    outputs.descend(both, _group_sum(both, sources, times), learning_rate)
    return torch.stack((loss, weight.sum(dtype=torch.float64)))


def skipgram_step(inputs: Table, outputs: Table, batch: Batch, learning_rate: float) -> Tensor:
    """Predict each neighbour from each word; return (sum of losses, number of pairs)."""
    n, dim, window = len(batch.ids), inputs.vectors.shape[1], batch.window
    block = band_block(window)
    beside = _beside(batch.sentence, window, block, inputs.vectors.dtype)  # (N / R, R, R + 2W)
    hidden = _rows(inputs.vectors, batch.ids)
    centres = hidden.view(-1, block, dim)
    rows = _fetch(outputs.vectors, batch.ids, window, window)
    around = rows.unfold(0, beside.shape[2], block).mT  # (N / R, R + 2W, D)
    score = torch.bmm(centres, around.mT)
    loss = (F.softplus(-score) * beside).sum(2).sum(dtype=torch.float64)
    d_score = score.sigmoid_().sub_(1).mul_(beside)
    d_hidden = torch.bmm(d_score, around).view(n, dim)
    count = beside.sum(2).view(n)

    sources = hidden.new_empty(n + batch.noise.numel(), dim)
    sources[:n] = _overlap_add(torch.bmm(d_score.mT, centres), window)
    loss += _noise_terms(outputs, batch.noise, hidden, count * batch.weight, d_hidden, sources[n:])
    inputs.descend(batch.words, _group_sum(batch.words, d_hidden), learning_rate)
    both = batch.words_and_noise
    outputs.descend(both, _group_sum(both, sources), learning_rate)
    return torch.stack((loss, count.sum(dtype=torch.float64)))
