"""What a data set is: the registry's record of one, and what a reader gets back."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

__all__ = [
    "DataError",
    "DataWarning",
    "Dataset",
    "Default",
    "MissingDataError",
    "RawFile",
    "Source",
    "Spec",
    "Splits",
    "WrongFileError",
    "names",
    "register",
    "spec_of",
    "verify",
]

Splits = dict[str, Any]
Parser = Callable[[Mapping[str, bytes]], Splits]


class DataError(ValueError):
    """A data file is wrong, or a data set is nowhere to be had."""


class WrongFileError(DataError):
    """A file is there, but it is not the one it should be."""


class MissingDataError(DataError):
    """A data set could not be had from any of its sources."""


class DataWarning(UserWarning):
    """The data are not what was hoped for, and the run goes on with something else."""


class RawFile(NamedTuple):
    """Size in bytes and sha256 of a file's raw, uncompressed content."""

    size: int
    sha256: str


class Source(Protocol):
    """Anything that brings raw files; ``str(source)`` is how it is named to the reader."""

    def fetch(self, wanted: Collection[str]) -> dict[str, bytes]:
        """Return the raw bytes of those of ``wanted`` that this source has."""


@dataclass(frozen=True)
class Default:
    """What stands in when the full set is out of reach: files in ``embedded/`` and a parser.

    Args:
        label: what it is in a few words, for the printed line.
        about: what it is and how it differs from the full set, in a sentence or two.
        licence: under which terms it is shipped.
        parse: makes the splits of the raw files, as in :class:`Spec`.
        files: raw size and sha256 of the embedded files (stored as ``embedded/<name>.xz``).
    """

    label: str
    about: str
    licence: str
    parse: Parser
    files: Mapping[str, RawFile] = field(default_factory=dict)


@dataclass(frozen=True)
class Spec:
    """The registry's record of one data set.

    Args:
        name: the name given to :func:`lib.data.load`, and the folder's name.
        about: what the full set is, in a sentence or two.
        licence: what is known of its terms.
        parse: makes ``{split: examples}`` of ``{file name: raw bytes}``; None if there is only
            a default.
        files: raw size and sha256 of each file of the full set; none for a set whose few numbers
            stand in the source itself.
        sources: where the files are to be had, tried in turn until none is missing; a source may
            have some of the files only.
        default: what stands in when they are not, or the name of another set that does.

    >>> tiny = Spec("squares", "The first squares.", "public domain", lambda raw: {"train": [0, 1]})
    >>> tiny.files, tiny.default
    ({}, None)
    """

    name: str
    about: str
    licence: str
    parse: Parser | None
    files: Mapping[str, RawFile] = field(default_factory=dict)
    sources: tuple[Source, ...] = ()
    default: Default | str | None = None


@dataclass(frozen=True)
class Dataset:
    """Named splits and where they come from.

    ``full`` is True when this is the whole of the set called ``name``, False when it is an
    embedded default; what holds for a default is not a result on the full set.
    """

    name: str
    splits: Mapping[str, Any]
    source: str
    licence: str
    full: bool
    about: str = ""

    def __getitem__(self, split: str) -> Any:
        """The examples of one split."""
        if split not in self.splits:
            raise KeyError(f"{self.name} has no split {split!r}, only {', '.join(self.splits)}")
        return self.splits[split]

    def counts(self) -> dict[str, int]:
        """The number of examples in each split; a tuple of arrays counts by its first."""
        lengths = {name: s[0] if isinstance(s, tuple) else s for name, s in self.splits.items()}
        return {name: len(examples) for name, examples in lengths.items()}

    def summary(self) -> str:
        """One line: the name, the source and the number of examples."""
        counts = ", ".join(f"{name} {count:,}" for name, count in self.counts().items())
        extent = "" if self.full else " (not the full set)"
        return f"{self.name}{extent}: {counts}; source: {self.source}"

    def describe(self) -> str:
        """The summary, what the set is, and its licence."""
        return f"{self.summary()}\n{self.about}\nLicence: {self.licence}"


_REGISTRY: dict[str, Spec] = {}


def register(spec: Spec) -> Spec:
    """Add a set to the registry; from then on :func:`lib.data.load` knows it by name.

    Raises:
        ValueError: if the name is taken, or is no plain file name.
    """
    if spec.name in _REGISTRY:
        raise ValueError(f"a data set called {spec.name!r} is registered already")
    if not spec.name.isidentifier():
        raise ValueError(f"name must be letters, digits and underscores, got {spec.name!r}")
    _REGISTRY[spec.name] = spec
    return spec


def names() -> list[str]:
    """The names of all registered sets.

    >>> "peoples_daily" in names()
    True
    """
    return sorted(_REGISTRY)


def spec_of(name: str) -> Spec:
    """The registered record of ``name``; an unknown name is answered with the known ones."""
    if not isinstance(name, str) or name not in _REGISTRY:
        raise ValueError(f"no data set is called {name!r}; known: {', '.join(names())}")
    return _REGISTRY[name]


def verify(path: object, data: bytes, expected: RawFile) -> bytes:
    """Return ``data`` if its size and sha256 are the expected ones.

    Raises:
        WrongFileError: naming the file, what was expected and what was seen.
    """
    seen = RawFile(len(data), hashlib.sha256(data).hexdigest())
    if seen == expected:
        return data
    hint = "; delete it to have it fetched anew" if isinstance(path, Path) else ""
    cut = " (it is cut off)" if seen.size < expected.size else ""
    raise WrongFileError(
        f"{path} is not the file it should be{cut}: expected {expected.size:,} raw bytes with "
        f"sha256 {expected.sha256}, seen {seen.size:,} raw bytes with sha256 {seen.sha256}{hint}"
    )
