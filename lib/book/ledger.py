"""The formula ledger: every printed result has a check below it, and every check a formula."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence

from lib.book._check import STEMS
from lib.book.chapter import Cell, Chapter
from lib.book.dataflow import check_calls, pieces, slice_of

__all__ = ["EXCUSED_SHARE", "REACH", "UNLABELLED_SHARE", "label_of", "scan", "scan_book"]

REACH = 10  # lines from the end of an equation to the cell that checks it
EXCUSED_SHARE = 1 / 4  # of the labels of a chapter, for definitions and cited theorems
UNLABELLED_SHARE = 1 / 3  # of the display equations of a chapter, for steps on the way
_COMPARED = ("printed", "oracle")


def scan_book(chapters: Sequence[Chapter]) -> list[str]:
    """Every breach of the ledger's rules in the book, one line each."""
    places: dict[str, list[str]] = {}
    for chapter in chapters:
        for equation in chapter.equations:
            place = f"{chapter.path.name}:{equation.start}"
            places.setdefault(equation.label or "", []).append(place)
    places.pop("", None)
    twice = [
        f"{where[1]}: {label} is printed before, at {where[0]}"
        for label, where in places.items()
        if len(where) > 1
    ]
    return [problem for chapter in chapters for problem in scan(chapter)] + twice


def scan(chapter: Chapter) -> list[str]:
    """Every breach of the ledger's rules in a chapter, one line each."""
    found = [*_equations(chapter), *_checks(chapter), *_excuses(chapter), *_borrowed(chapter)]
    return [f"{chapter.path.name}:{line}: {problem}" for line, problem in sorted(found)]


def label_of(call: ast.Call) -> str | None:
    """The label in a call of ``check``, if it is a literal."""
    first = call.args[0] if call.args else None
    return first.value if isinstance(first, ast.Constant) and isinstance(first.value, str) else None


def _equations(chapter: Chapter) -> Iterator[tuple[int, str]]:
    checked: dict[str | None, list[int]] = {}
    for cell in chapter.code("check"):
        for call in check_calls(cell.tree()):
            checked.setdefault(label_of(call), []).append(cell.line)
    for equation in chapter.equations:
        if equation.label is None:
            continue
        if not _well_named(chapter, equation.label):
            stem = chapter.stem.replace("_", "-")
            yield equation.start, f"label {equation.label} does not read eq-{stem}-<name>"
        if equation.label in chapter.excused:
            continue
        lines = checked.get(equation.label, [])
        if not lines:
            yield equation.end, f"{equation.label} is printed but not checked"
        elif not any(0 < line - equation.end <= REACH for line in lines):
            away = min((line - equation.end for line in lines), key=abs)
            yield equation.end, f"the check of {equation.label} stands {away} lines below, not 1-10"
    unlabelled = [equation for equation in chapter.equations if equation.label is None]
    if len(unlabelled) > UNLABELLED_SHARE * len(chapter.equations):
        lines_of = ", ".join(str(equation.start) for equation in unlabelled)
        yield (
            unlabelled[0].start,
            f"{len(unlabelled)} of {len(chapter.equations)} display equations have no label, more "
            f"than a third: lines {lines_of}",
        )
    yield from _other_displays(chapter)


def _other_displays(chapter: Chapter) -> Iterator[tuple[int, str]]:
    """Display mathematics that is not written with ``$$`` and would escape the ledger."""
    inside = {n for e in chapter.equations for n in range(e.start, e.end + 1)}
    for number, line in enumerate(chapter.prose.splitlines(), 1):
        if number in inside:
            continue
        if "$$" in line:
            yield number, "$$ without its partner"
        if re.search(r"\\begin\{(align|equation|gather|multline)|\\\[", line):
            yield number, "display mathematics must stand between $$ and $$"


def _well_named(chapter: Chapter, label: str) -> bool:
    stem = chapter.stem.replace("_", "-")
    if not re.fullmatch(rf"eq-{stem}(-[a-z0-9]+)+", label):
        return False
    longer = [s.replace("_", "-") for s in STEMS if s.startswith(f"{chapter.stem}_")]
    return not any(label.startswith(f"eq-{other}-") for other in longer)


def _checks(chapter: Chapter) -> Iterator[tuple[int, str]]:
    labels = {equation.label for equation in chapter.equations}
    for cell in chapter.code():
        calls = check_calls(cell.tree())
        if "check" in cell.tags and not calls:
            yield cell.line, "a cell tagged check that calls no check"
        for call in calls:
            label, given = label_of(call), {keyword.arg: keyword.value for keyword in call.keywords}
            if label is None:
                yield cell.line, "the first argument of check must be a label, written out"
            elif label not in labels:
                yield cell.line, f"{label} is checked but not printed"
            if "check" not in cell.tags:
                yield cell.line, f"the cell that checks {label} is not tagged check"
            if not {"printed", "oracle"} <= given.keys():
                yield cell.line, f"the check of {label} must name printed= and oracle="
            by = given.get("by")
            if not (isinstance(by, ast.Constant) and isinstance(by.value, str) and by.value):
                yield cell.line, f'the check of {label} does not name its oracle, by="..."'


def _excuses(chapter: Chapter) -> Iterator[tuple[int, str]]:
    labels = [equation.label for equation in chapter.equations if equation.label]
    checked = {label_of(call) for cell in chapter.code() for call in check_calls(cell.tree())}
    for label, reason in chapter.excused.items():
        if label not in labels:
            yield 1, f"{label} is excused but not printed"
        if label in checked:
            yield 1, f"{label} is excused but checked all the same"
        if not isinstance(reason, str) or len(reason.split()) < 3:
            yield 1, f"the excuse of {label} gives no reason: {reason!r}"
    if len(chapter.excused) > EXCUSED_SHARE * len(labels):
        yield 1, f"{len(chapter.excused)} of {len(labels)} labels are excused, more than a quarter"


def _borrowed(chapter: Chapter) -> Iterator[tuple[int, str]]:
    """Transcriptions and oracles that lean on the library they are meant to test."""
    from_lib: set[str] = set()
    for cell in chapter.code("setup", "check"):
        tree = cell.tree()
        from_lib |= _imported_from_lib(tree)
        for call in check_calls(tree):
            for keyword in call.keywords:
                if keyword.arg in _COMPARED:
                    names = slice_of(tree, call, [keyword.value]).names & from_lib
                    if names:
                        yield (
                            cell.line,
                            f"{keyword.arg}= of {label_of(call)} leans on lib through "
                            f"{', '.join(sorted(names))}; draw inputs first, then hand them to lib",
                        )
        from_lib = _carry(cell, from_lib)


def _imported_from_lib(tree: ast.Module) -> set[str]:
    """Names that stand for the eight modules or something in them."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [alias for alias in node.names if _is_stem(alias.name)]
            names |= {alias.asname or alias.name.split(".")[0] for alias in found}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                module = f"{node.module}.{alias.name}"
                if _is_stem(module):
                    names.add(alias.asname or alias.name)
    return names


def _is_stem(module: str) -> bool:
    parts = module.split(".")
    return parts[0] == "lib" and (len(parts) == 1 or parts[1] in STEMS or parts[1] == "_common")


def _carry(cell: Cell, from_lib: set[str]) -> set[str]:
    """Names that hold something made by the library after ``cell`` has run."""
    parts = [part for statement in cell.tree().body for part in pieces(statement)]
    names = set(from_lib)
    for part in parts:
        if part.uses & names or any(head.uses & names for head in part.heads):
            names |= part.defines
        elif part.certain:
            names -= part.defines
    return names
