"""Formula and transcription side by side: what has changed must be read again by a person.

No machine reads LaTeX as a mathematician does. So the page of formulas keeps both as they were when
they were last read, and a formula that changed while its transcription stood still is not written
there before somebody says by name that the two have been read against each other.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence

from lib.book.chapter import Cell, Chapter
from lib.book.dataflow import check_calls, slice_of
from lib.book.independence import own_pieces
from lib.book.ledger import label_of

__all__ = ["to_be_read", "transcriptions"]

# what changes the look of a formula, not its meaning
_TYPESETTING = re.compile(
    r"\\[,;:!> ]|\\q?quad(?![a-z])|\\(left|right|[bB]igg?[lr]?)(?![a-z])|[\s&]"
)
_ENTRY = re.compile(
    r"`(eq-[\w-]+)`\n\n\$\$\n(.*?)\n\$\$\n(.*?)(?=\n\*\*\{eq\}|\n## |\Z)", re.DOTALL
)
_CODE = re.compile(r"```python\n(.*?)\n```", re.DOTALL)


def transcriptions(chapter: Chapter) -> dict[str, str]:
    """The code of each label that feeds ``printed=`` and nothing else, as the chapter has it."""
    found: dict[str, list[str]] = {}
    for cell in chapter.code("check"):
        tree = cell.tree()
        for call in check_calls(tree):
            given = {keyword.arg: keyword.value for keyword in call.keywords}
            label, printed = label_of(call), given.pop("printed", None)
            if label is not None and printed is not None:
                lines = found.setdefault(label, [])
                lines += _own_lines(cell, tree, call, printed, list(given.values()))
                expression = ast.get_source_segment(cell.python, printed) or ""
                if expression != "printed":
                    lines.append(f"printed = {' '.join(expression.split())}")
    return {label: "\n".join(lines) for label, lines in found.items()}


def _own_lines(
    cell: Cell, tree: ast.Module, call: ast.Call, printed: ast.expr, others: list[ast.expr]
) -> list[str]:
    numbers: set[int] = set()
    for piece in own_pieces(slice_of(tree, call, [printed]), slice_of(tree, call, others)):
        node = piece.node
        assert isinstance(node, ast.stmt)
        last = node.end_lineno or node.lineno
        if isinstance(node, ast.For | ast.While | ast.If | ast.With):
            last = max(node.lineno, node.body[0].lineno - 1)
        numbers |= set(range(node.lineno, last + 1))
    lines = cell.python.splitlines()
    return [lines[number - 1] for number in sorted(numbers)]


def to_be_read(page: str, chapters: Sequence[Chapter]) -> list[str]:
    """Labels whose formula is not the one of ``page``, while the transcription still is."""
    known = {label: (latex, _code(rest)) for label, latex, rest in _ENTRY.findall(page)}
    changed = []
    for chapter in chapters:
        code = transcriptions(chapter)
        for equation in chapter.equations:
            latex, transcription = known.get(equation.label or "", (None, None))
            if latex is None or transcription != code.get(equation.label or "", ""):
                continue  # new, or transcribed anew: then the check judges
            if _meaning(latex) != _meaning(equation.latex):
                changed.append(equation.label or "")
    return changed


def _code(entry: str) -> str:
    return "\n".join(_CODE.findall(entry))


def _meaning(latex: str) -> str:
    return _TYPESETTING.sub("", latex)
