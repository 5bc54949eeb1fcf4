"""Words to ids and back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lib._common import check_positive

__all__ = ["Vocabulary"]


class Vocabulary:
    """A bijection between words and the ids ``0 .. V - 1``, with how often each word was seen.

    Args:
        counts: occurrences by word, or words alone (each then counted as given). Ids follow the
            order given.

    Raises:
        ValueError: if it is empty, a word is given twice or a count is negative.
        TypeError: if a word is not a string or a count not an integer.

    Source: chapter `nce`.

    >>> vocabulary = Vocabulary.from_sentences([["a", "rose", "is", "a", "rose"]], min_count=2)
    >>> vocabulary.words, vocabulary.counts.tolist()
    (['a', 'rose'], [2, 2])
    >>> vocabulary.encode(["a", "red", "rose"], unknown="skip")
    tensor([0, 1])
    """

    def __init__(self, counts: dict[str, int] | Iterable[str]) -> None:
        if isinstance(counts, str):
            raise TypeError(f"counts must be a dict or an iterable of words, got {counts!r}")
        pairs = list(counts.items()) if isinstance(counts, dict) else [(w, 1) for w in counts]
        if not pairs:
            raise ValueError("counts must hold at least one word, got none")
        self.words = [word for word, _ in pairs]
        self._ids = {word: id for id, word in enumerate(self.words)}
        for id, (word, count) in enumerate(pairs):
            if not isinstance(word, str):
                raise TypeError(f"counts must have words as keys, got {word!r} at position {id}")
            if self._ids[word] != id:
                raise ValueError(f"counts must name each word once, got {word!r} again")
            if not isinstance(count, int | np.integer):
                raise TypeError(f"counts must be integers, got {count!r} for {word!r}")
            if count < 0:
                raise ValueError(f"counts must not be negative, got {count} for {word!r}")
        self.counts = torch.tensor([count for _, count in pairs], dtype=torch.int64)

    @classmethod
    def from_sentences(
        cls,
        sentences: Iterable[Sequence[str]],
        *,
        min_count: int = 5,
        max_size: int | None = None,
    ) -> Vocabulary:
        """Count the words of tokenised sentences; the most frequent word gets id 0.

        Args:
            sentences: each a sequence of words.
            min_count: rarer words are left out, at least 1.
            max_size: at most so many words are kept; words of equal count in alphabetical order.

        Raises:
            ValueError: if no word is frequent enough, or a limit is below 1.
            TypeError: if a word is not a string, or a sentence is a plain string, whose items
                would be characters.
        """
        check_positive(min_count, "min_count")
        if max_size is not None:
            check_positive(max_size, "max_size")
        counter: Counter[str] = Counter()
        for number, sentence in enumerate(sentences):
            if isinstance(sentence, str):
                raise TypeError(
                    f"sentences must be sequences of words, got the string {sentence!r} as "
                    f"sentence {number}: split it first"
                )
            counter.update(iter(sentence))  # None and a mapping mean something else to it
        for word in counter:
            if not isinstance(word, str):
                raise TypeError(f"sentences must hold words, got {word!r}")
        kept = [(word, count) for word, count in counter.items() if count >= min_count]
        if not kept:
            most = max(counter.values(), default=0)
            raise ValueError(
                f"sentences must hold a word that occurs at least min_count={min_count} times, "
                f"got {len(counter)} words, the most frequent {most} times"
            )
        kept.sort(key=lambda pair: (-pair[1], pair[0]))
        return cls(dict(kept[:max_size]))

    def __len__(self) -> int:
        return len(self.words)

    def __contains__(self, word: object) -> bool:
        return word in self._ids

    def __iter__(self) -> Iterator[str]:
        return iter(self.words)

    def __getitem__(self, word: str) -> int:
        """The id of ``word``; a `KeyError` names it if it is unknown."""
        try:
            return self._ids[word]
        except KeyError:
            raise KeyError(f"{word!r} is not among the {len(self)} words") from None

    def __repr__(self) -> str:
        return f"Vocabulary({len(self)} words)"

    def encode(
        self, sentence: Iterable[str], *, unknown: Literal["error", "skip"] = "error"
    ) -> Tensor:
        """The ids of the words of one sentence (T,), int64.

        Args:
            sentence: its words.
            unknown: what to do with words that are not in the vocabulary.

        Raises:
            KeyError: if a word is unknown and ``unknown`` is ``"error"``; it names the word.
            TypeError: if ``sentence`` is a plain string.
        """
        if isinstance(sentence, str):
            raise TypeError(f"sentence must be a sequence of words, got the string {sentence!r}")
        if unknown == "skip":
            ids = [self._ids[word] for word in sentence if word in self._ids]
        elif unknown == "error":
            ids = [self[word] for word in sentence]
        else:
            raise ValueError(f'unknown must be "error" or "skip", got {unknown!r}')
        return torch.tensor(ids, dtype=torch.int64)

    def decode(self, ids: Tensor | Iterable[int]) -> list[str]:
        """The words of ``ids`` (T,).

        Raises:
            ValueError: if an id lies outside ``0 .. V - 1``.
            TypeError: if an id is not an integer.
        """
        numbers = ids.tolist() if isinstance(ids, Tensor) else ids
        if not isinstance(numbers, Iterable):
            raise TypeError(f"ids must be integers (T,), got the single {numbers!r}")
        numbers = list(numbers)
        for number in numbers:
            if isinstance(number, bool) or not isinstance(number, int | np.integer):
                raise TypeError(f"ids must be integers (T,), got {number!r}")
            if not 0 <= number < len(self):
                raise ValueError(f"ids must lie in 0 .. {len(self) - 1}, got {number}")
        return [self.words[number] for number in numbers]
