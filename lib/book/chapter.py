"""A chapter's source as cells and display equations, each with its line in the file."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.book._check import STEMS

__all__ = ["Cell", "Chapter", "Equation", "read_book", "read_chapter"]

_FENCED = re.compile(r"^(`{3,}|~{3,})[^\n]*\n.*?^\1[`~]*[ \t]*$", re.MULTILINE | re.DOTALL)
_DIRECTIVE = re.compile(r"[`~]+\{(?!code|eval-rst|literalinclude)")
_FRONT_MATTER = re.compile(r"\A---\n.*?^---$", re.MULTILINE | re.DOTALL)
_DISPLAY = re.compile(r"\$\$(.+?)\$\$(?:[ \t]*\(([^)\s]+)\))?", re.DOTALL)
_INLINE = re.compile(r"(?<![\\$])\$([^$]+?)\$")
_RELATION = re.compile(r"[=<>]|\\(le|ge|ne|ll|gg|approx|propto|to|equiv|sim)(?![A-Za-z])")
_CODE_SPAN = re.compile(r"`[^`\n]*`")
_MAGIC = re.compile(r"^([ \t]*)[%!].*$", re.MULTILINE)


@dataclass(frozen=True)
class Cell:
    """A cell; ``line`` is where its text or its fence begins, counted from 1."""

    kind: str
    source: str
    line: int
    tags: frozenset[str]
    metadata: dict[str, Any]

    @property
    def python(self) -> str:
        """The code without notebook magics, line by line in the same place."""
        return _MAGIC.sub(r"\1pass", self.source)

    def tree(self) -> ast.Module:
        """The code parsed; line 1 is the first line of the cell."""
        return ast.parse(self.python)


@dataclass(frozen=True)
class Equation:
    """A display equation, from line ``start`` to line ``end``."""

    latex: str
    label: str | None
    start: int
    end: int


@dataclass(frozen=True)
class Chapter:
    """A chapter of the book, as its Markdown source has it."""

    path: Path
    metadata: dict[str, Any]
    cells: tuple[Cell, ...]
    equations: tuple[Equation, ...]
    prose: str  # without front matter and code, but line for line

    @property
    def stem(self) -> str:
        return self.path.stem

    @property
    def excused(self) -> dict[str, str]:
        """Labels that need no check, with the reason."""
        return self.metadata.get("excused") or {}

    @property
    def statements(self) -> list[str]:
        """The formulas within the text that state something: those with a relation sign."""
        text = _CODE_SPAN.sub(" ", _DISPLAY.sub(" ", self.prose))
        inline = [" ".join(found.split()) for found in _INLINE.findall(text)]
        return [formula for formula in inline if _RELATION.search(formula)]

    def code(self, *tags: str) -> list[Cell]:
        """The code cells that carry one of ``tags``, or all of them."""
        code = [cell for cell in self.cells if cell.kind == "code"]
        return [cell for cell in code if not tags or cell.tags & set(tags)]


def read_chapter(path: Path) -> Chapter:
    """Read a MyST notebook.

    Raises:
        ImportError: if jupytext, which parses it, is not installed.
    """
    try:
        from jupytext.myst import myst_to_notebook
    except ImportError as error:
        raise ImportError("reading chapters needs jupytext: pip install jupytext") from error
    text = path.read_text(encoding="utf-8")
    notebook = myst_to_notebook(text, add_source_map=True)
    metadata = dict(notebook.metadata)
    cells = []
    for cell, line in zip(notebook.cells, metadata.pop("source_map"), strict=True):
        code = cell.cell_type == "code"
        tags = frozenset(cell.metadata.get("tags", []))
        start = line if code else line + 1
        cells.append(Cell(cell.cell_type, cell.source, start, tags, dict(cell.metadata)))
    prose = _FENCED.sub(_without_code, _FRONT_MATTER.sub(_only_lines, text))
    return Chapter(path, metadata, tuple(cells), tuple(_equations(prose)), prose)


def read_book(folder: Path) -> list[Chapter]:
    """The chapters that are there, in the order of the book."""
    paths = [folder / f"{stem}.md" for stem in STEMS]
    return [read_chapter(path) for path in paths if path.exists()]


def _without_code(match: re.Match[str]) -> str:
    """Only the lines of a block of code; a directive such as ``{note}`` holds prose."""
    return match.group() if _DIRECTIVE.match(match.group()) else _only_lines(match)


def _only_lines(match: re.Match[str]) -> str:
    return "\n" * match.group().count("\n")


def _equations(prose: str) -> list[Equation]:
    prose = _CODE_SPAN.sub(lambda code: " " * len(code.group()), prose)

    def line(position: int) -> int:
        return prose.count("\n", 0, position) + 1

    return [
        Equation(found[1].strip(), found[2], line(found.start()), line(found.end()))
        for found in _DISPLAY.finditer(prose)
    ]
