"""Word pairs with similarity ratings, and analogies, to judge word vectors by."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import permutations

from ._sources import Package
from ._spec import Default, RawFile, Spec, Splits

__all__ = ["SPECS"]

Pair = tuple[str, str, float]
_FOLDER = "gensim/test/test_data"


def _lines(data: bytes) -> list[list[str]]:
    """The fields of every line that is no comment and no heading, in lower case."""
    text = data.decode().lower()
    return [line.split() for line in text.splitlines() if line.strip() and line[0] not in "#:"]


def _rated(data: bytes) -> list[Pair]:
    return [(first, second, float(score)) for first, second, score in _lines(data)]


def _parse(raw: Mapping[str, bytes]) -> Splits:
    return {
        "wordsim353": _rated(raw["wordsim353.tsv"]),
        "simlex999": _rated(raw["simlex999.txt"]),
        "analogies": [tuple(words) for words in _lines(raw["questions-words.txt"])],
    }


# The default: frequent words of the embedded verses, three levels of likeness chosen by us.
_LEVELS = {
    9.0: "man-men woman-women lord-god house-houses king-prince son-daughter father-mother "
    "brother-sister heart-soul speak-say go-come great-mighty earth-land evil-wicked day-night "
    "gold-silver sheep-flock",
    5.0: "bread-eat water-drink land-people king-people child-mother field-land "
    "silver-tabernacle word-mouth hand-eyes wife-house morning-day servant-master law-judgment",
    1.0: "bread-night king-water wisdom-cattle silver-brother mouth-mountain gold-sister "
    "sheep-law eyes-years wife-fire altar-child month-heart fool-water",
}
_RELATIONS = (
    "man-woman men-women father-mother son-daughter brother-sister king-queen",
    "day-days house-houses son-sons daughter-daughters servant-servants year-years city-cities",
    "say-said come-came go-went see-saw know-knew give-gave take-took",
)


def _parse_default(raw: Mapping[str, bytes]) -> Splits:
    rated = [
        (*pair.split("-"), score) for score, pairs in _LEVELS.items() for pair in pairs.split()
    ]
    relations = [[pair.split("-") for pair in pairs.split()] for pairs in _RELATIONS]
    analogies = [(*a, *b) for pairs in relations for a, b in permutations(pairs, 2)]
    return {"wordsim353": rated, "simlex999": list(rated), "analogies": analogies}


SPECS = (
    Spec(
        name="word_similarity",
        about=(
            "WordSim-353 and SimLex-999 (pairs of words with the mean of human ratings, 0 to 10) "
            "and the 19,544 analogies of questions-words (a is to b as c is to d), all in lower "
            "case, as shipped with the tests of gensim."
        ),
        licence="not stated for the three lists: read from the package, not shipped",
        parse=_parse,
        files={
            "wordsim353.tsv": RawFile(
                7_186, "f92a022fc2537793a15bc3a8c162ebcd74990e033a228bb6388cb71e4c0b1e1d"
            ),
            "simlex999.txt": RawFile(
                18_126, "d5e0501971478a511430ee880bd0121e94ac701ba86d90544d83e6d2ba3db05d"
            ),
            "questions-words.txt": RawFile(
                603_955, "8c29b3332afc46f3fb8be04cb5297bf96f39aa7131272dff57869b4485b22a36"
            ),
        },
        sources=(
            Package(
                "PyPI",
                "gensim==4.4.0",
                {
                    name: f"{_FOLDER}/{name}"
                    for name in ("wordsim353.tsv", "simlex999.txt", "questions-words.txt")
                },
                # One wheel for every machine: only three text files are read out of it.
                options=(
                    *("--platform", "manylinux_2_28_x86_64", "--python-version", "3.11"),
                    *("--implementation", "cp", "--abi", "cp311"),
                ),
            ),
        ),
        default=Default(
            label="a tiny list of our own, not WordSim-353 and not SimLex-999",
            about=(
                "Pairs of words of the embedded verses at three levels of likeness that the "
                "authors of this book chose, the same under both names, and analogies of three "
                "kinds: enough to exercise the code, no measure of quality."
            ),
            licence="MIT, as this library",
            parse=_parse_default,
        ),
    ),
)
