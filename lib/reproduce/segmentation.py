"""Words as tags: the s/b/m/e scheme, its encoding as tensors, and the scores of a segmentation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "TAGS",
    "Scores",
    "alphabet",
    "encode",
    "pieces",
    "spans",
    "tags_of",
    "word_scores",
    "words_of",
]

TAGS = "sbme"


def tags_of(words: Iterable[str]) -> list[int]:
    """The tag of each character: s alone, or b, m, ..., m, e.

    >>> tags_of(["今天", "天气", "不", "错"])
    [1, 3, 1, 3, 0, 0]
    """
    tags: list[int] = []
    for word in words:
        tags += [0] if len(word) == 1 else [1, *[2] * (len(word) - 2), 3]
    return tags


def words_of(text: str, tags: Sequence[int]) -> list[str]:
    """Cut before every s and b, as the essay does: this reads illegal sequences too.

    >>> words_of("今天天气不错", [1, 3, 1, 3, 0, 0])
    ['今天', '天气', '不', '错']
    """
    words: list[str] = []
    for character, tag in zip(text, tags, strict=True):
        if tag < 2 or not words:
            words.append(character)
        else:
            words[-1] += character
    return words


def pieces(sentences: Iterable[Sequence[str]], longest: int) -> list[list[str]]:
    """Cut sentences of more than ``longest`` characters before the word that would not fit.

    >>> pieces([["今天", "天气", "不", "错"], ["好"]], longest=4)
    [['今天', '天气'], ['不', '错'], ['好']]
    """
    result = []
    for sentence in sentences:
        piece: list[str] = []
        for word in sentence:
            if piece and sum(map(len, piece)) + len(word) > longest:
                result.append(piece)
                piece = []
            piece.append(word)
        if piece:
            result.append(piece)
    return result


def alphabet(sentences: Iterable[Sequence[str]], at_least: int = 2) -> dict[str, int]:
    """Number the characters seen ``at_least`` times from 1; 0 is any other one, and padding."""
    counts = Counter(character for words in sentences for word in words for character in word)
    return {c: i for i, c in enumerate((c for c, n in counts.items() if n >= at_least), start=1)}


def encode(
    sentences: Sequence[Sequence[str]], characters: dict[str, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, tags and mask, each (N, T), padded on the right with 0, 0 and False."""
    lengths = torch.tensor([sum(map(len, words)) for words in sentences])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    ids, tags = torch.zeros(mask.shape, dtype=torch.long), torch.zeros(mask.shape, dtype=torch.long)
    ids[mask] = torch.tensor([characters.get(c, 0) for words in sentences for c in "".join(words)])
    tags[mask] = torch.tensor([tag for words in sentences for tag in tags_of(words)])
    return ids, tags, mask


class Scores(NamedTuple):
    """Word scores by the bakeoff's definition, and the essay's own."""

    precision: float
    recall: float
    f1: float
    oov_recall: float
    set_recall: float


def spans(words: Iterable[str]) -> set[tuple[int, int]]:
    """First and last-plus-one position of each word."""
    result, start = set(), 0
    for word in words:
        result.add((start, start + len(word)))
        start += len(word)
    return result


def word_scores(
    gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]], known: Iterable[str]
) -> Scores:
    """Compare two segmentations of the same texts.

    A word is right if it begins and ends where a gold word does. ``oov_recall`` counts only gold
    words that are not ``known`` from training; ``set_recall`` compares the sets of words of each
    sentence and forgets where and how often they stand.

    >>> s = word_scores([["no", "no", "man"]], [["no", "n", "o", "man"]], known=["no"])
    >>> s.precision, round(s.recall, 3), s.oov_recall, s.set_recall
    (0.5, 0.667, 1.0, 1.0)
    """
    known = set(known)
    counts: Counter[str] = Counter()
    for right, guess in zip(gold, predicted, strict=True):
        truth, found = spans(right), spans(guess)
        start = 0
        for word in right:
            hit = (start, start + len(word)) in found
            start += len(word)
            counts["unknown"] += word not in known
            counts["unknown hit"] += hit and word not in known
        counts["gold"] += len(truth)
        counts["guess"] += len(found)
        counts["hit"] += len(truth & found)
        counts["types"] += len(set(right))
        counts["types hit"] += len(set(right) & set(guess))
    precision, recall = counts["hit"] / counts["guess"], counts["hit"] / counts["gold"]
    return Scores(
        precision,
        recall,
        2 * precision * recall / max(precision + recall, 1e-12),
        counts["unknown hit"] / max(counts["unknown"], 1),
        counts["types hit"] / counts["types"],
    )
