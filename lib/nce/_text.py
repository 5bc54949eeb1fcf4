"""Running text, cut into batches, and the places where each word occurs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from numbers import Integral

import numpy as np
import torch
from torch import Tensor

__all__ = ["Groups", "Text", "group"]


@dataclass(frozen=True)
class Groups:
    """The places of each distinct id in a vector of ids: a sort of the places, cut into runs."""

    rows: Tensor  # (U,) the distinct ids
    order: Tensor  # (N,) places, sorted by id
    starts: Tensor  # (U,) where the run of each id begins in order


def group(ids: Tensor, size: int, device: torch.device) -> Groups:
    """Group the places of ``ids`` (N,), all below ``size``; the answer is put on ``device``."""
    numbers = ids.numpy()
    order = _radix_order(numbers, size)
    ordered = numbers[order]
    first = np.ones(len(ordered), dtype=bool)
    np.not_equal(ordered[1:], ordered[:-1], out=first[1:])
    starts = np.flatnonzero(first)
    tables = ordered[starts], order, starts
    return Groups(*(torch.from_numpy(table).to(device) for table in tables))


def _radix_order(numbers: np.ndarray, size: int) -> np.ndarray:
    """A stable argsort by 16 bits at a time, for which numpy has a radix sort."""
    order = numbers.astype(np.uint16).argsort(kind="stable")
    for shift in range(16, size.bit_length(), 16):
        digit = (numbers >> shift).astype(np.uint16)
        order = order[digit[order].argsort(kind="stable")]
    return order


@dataclass(frozen=True)
class Text:
    """Sentences of word ids laid end to end, on the CPU: the words and whose sentence they are."""

    ids: Tensor  # (N,)
    sentence: Tensor  # (N,) int32

    @classmethod
    def from_sentences(cls, sentences: Iterable[Sequence[int] | Tensor], size: int) -> Text:
        """Lay ``sentences`` of ids below ``size`` end to end."""
        sentences = list(sentences)
        lengths = torch.tensor(
            [_length(sentence, number) for number, sentence in enumerate(sentences)],
            dtype=torch.int64,
            device="cpu",  # whatever the default device
        )
        longest = int(lengths.max()) if len(lengths) else 0
        if longest < 2:
            raise ValueError(
                "sentences must hold at least one of two words or more, got "
                f"{len(sentences)} sentences, the longest of {longest}"
            )
        ids = _flat_ids(sentences)
        wrong = (ids < 0) | (ids >= size)
        if wrong.any():
            place = int(wrong.nonzero()[0])
            number = int(torch.searchsorted(lengths.cumsum(0), place, right=True))
            raise ValueError(
                f"sentences must hold ids in 0 .. {size - 1}, got {int(ids[place])} in "
                f"sentence {number}"
            )
        numbers = torch.arange(len(lengths), dtype=torch.int32, device="cpu")
        return cls(ids, torch.repeat_interleave(numbers, lengths))

    def __len__(self) -> int:
        return len(self.ids)

    def subsampled(self, threshold: float, generator: torch.Generator | None) -> Text:
        """Keep each word of share f with probability sqrt(t / f) + t / f, t the ``threshold``."""
        ratio = threshold * len(self) / self.ids.bincount()
        keep = (ratio.sqrt() + ratio)[self.ids]
        kept = torch.rand(len(self), generator=generator, device="cpu") < keep
        return Text(self.ids[kept], self.sentence[kept])

    def padded(self, multiple: int) -> Text:
        """Fill up to a ``multiple`` of words with some that have no neighbours."""
        missing = -len(self) % multiple
        ids = torch.cat((self.ids, self.ids.new_zeros(missing)))
        alone = -1 - torch.arange(missing, dtype=torch.int32, device="cpu")
        return Text(ids, torch.cat((self.sentence, alone)))

    def batches(self, size: int, generator: torch.Generator | None) -> Iterator[Text]:
        """Runs of ``size`` words in random order, the last run of the text perhaps shorter."""
        ids, sentence = self.ids.split(size), self.sentence.split(size)
        for number in torch.randperm(len(ids), generator=generator, device="cpu").tolist():
            yield Text(ids[number], sentence[number])


def _length(sentence: Sequence[int] | Tensor, number: int) -> int:
    if isinstance(sentence, Tensor) and sentence.dim() > 0:
        return sentence.shape[0]
    flat = getattr(sentence, "ndim", 1) == 0  # a number in an array's or a tensor's clothes
    if flat or isinstance(sentence, str) or not hasattr(sentence, "__len__"):
        raise TypeError(
            f"sentences must be sequences of word ids, got {sentence!r} as sentence "
            f"{number}; Vocabulary.encode turns words into ids"
        )
    return len(sentence)


def _flat_ids(sentences: list[Sequence[int] | Tensor]) -> Tensor:
    tensors = [sentence for sentence in sentences if isinstance(sentence, Tensor)]
    if len(tensors) == len(sentences):
        ids = torch.cat([tensor for tensor in tensors if tensor.numel()]).cpu()
    else:
        lists = (s.tolist() if isinstance(s, Tensor) else s for s in sentences)
        ids = torch.from_numpy(_integers(list(chain.from_iterable(lists))))
    if ids.is_floating_point() or ids.dtype == torch.bool or ids.dim() != 1:
        shape = tuple(ids.shape)
        raise TypeError(f"sentences must hold integer word ids, got {ids.dtype} of shape {shape}")
    return ids.long()


def _integers(words: list[int]) -> np.ndarray:
    try:
        numbers = np.array(words)
    except ValueError:  # ragged
        raise TypeError("sentences must hold integer word ids, got nested sequences") from None
    if numbers.dtype.kind in "iub":
        return numbers
    for word in words:
        if not isinstance(word, Integral):
            raise TypeError(
                f"sentences must hold integer word ids, got {word!r}; "
                "Vocabulary.encode turns words into ids"
            )
    try:
        return np.array(words, dtype=np.int64)  # numpy mixes uint64 and int64 to float64
    except OverflowError:
        raise ValueError(f"sentences must hold ids of 64 bits, got {max(words, key=abs)}") from None
