"""A recurrent encoder from word ids to unit vectors that never reads its padding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from lib._common import at_least_float32, bool_mask, check_positive, no_autocast

__all__ = ["SentenceEncoder"]


class SentenceEncoder(nn.Module):
    """Map sentences of word ids to points on the unit sphere: embedding, GRU, last state, length 1.

    ::

        h_t = GRU(embedding(ids_t), h_{t-1}),    z = h_T / |h_T|

    where T is the last word of the sentence itself. Id 0 is padding, wherever it stands: the
    result does not depend on how many zeros surround or interrupt a sentence, nor on row 0 of
    the embedding.

    Args:
        vocab_size: number of ids, padding included; at least 2.
        dim: size of the word vectors.
        hidden: size H of the sentence vectors.

    The GRU runs over packed sequences, whose lengths are read on the host: `forward` cannot be
    traced by ``torch.compile(fullgraph=True)`` or transformed by ``torch.func``.

    Source: chapter `margin`, eq-margin-encoder; Su (2018), archive number 5743.

    >>> _ = torch.manual_seed(0)
    >>> encoder = SentenceEncoder(vocab_size=10, dim=4, hidden=6)
    >>> z = encoder(torch.tensor([[3, 1, 4, 0], [0, 3, 1, 4]]))
    >>> z.shape, torch.allclose(z[0], z[1])
    (torch.Size([2, 6]), True)
    """

    def __init__(self, vocab_size: int, *, dim: int = 128, hidden: int = 128) -> None:
        super().__init__()
        for name, value in (("vocab_size", vocab_size), ("dim", dim), ("hidden", hidden)):
            check_positive(value, name)
        if vocab_size < 2:
            raise ValueError(f"vocab_size must be at least 2, as id 0 is padding, got {vocab_size}")
        self.embedding = nn.Embedding(vocab_size, dim)
        self.gru = nn.GRU(int(dim), int(hidden), batch_first=True)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return unit vectors (B, H), in at least float32.

        Args:
            ids: word ids from 1 and padding 0, integers (B, T).
            mask: True where a word is to be read (B, T); padding is not read in any case.

        Raises:
            ValueError: if shapes disagree, an id is out of range or a row is all padding.
            TypeError: if ``ids`` is not an integer tensor.
        """
        ids, keep = self._words(ids, mask)
        lengths = keep.sum(1)
        if len(ids) == 0:
            return at_least_float32(self.gru.all_weights[0][1][:0])  # (0, H), and in the graph
        if (lengths == 0).any():
            row = int((lengths == 0).nonzero()[0])
            raise ValueError(f"ids must hold a word in every row, but row {row} is all padding")
        order = keep.to(torch.uint8).argsort(dim=1, descending=True, stable=True)  # words first
        words = pack_padded_sequence(
            ids.gather(1, order), lengths.cpu(), batch_first=True, enforce_sorted=False
        )
        _, state = self.gru(PackedSequence(self.embedding(words.data), *words[1:]))
        with no_autocast(state):
            return F.normalize(at_least_float32(state[-1]), dim=1)

    def _words(self, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Check ``ids`` and ``mask``; return ids and which of them are to be read, bool (B, T)."""
        if not isinstance(ids, Tensor):
            raise TypeError(f"ids must be a tensor of integers, got {type(ids).__name__}")
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise TypeError(f"ids must be a tensor of integers, got {ids.dtype}")
        if ids.ndim != 2:
            raise ValueError(f"ids must have shape (B, T), got {tuple(ids.shape)}")
        ids, size = ids.long(), self.embedding.num_embeddings
        if ids.numel() and not (ids.min() >= 0 and ids.max() < size):
            raise ValueError(
                f"ids must lie in 0 .. {size - 1}, got {ids.min().item()} to {ids.max().item()}"
            )
        words = ids != 0
        return ids, words if mask is None else words & bool_mask(mask, tuple(ids.shape))
