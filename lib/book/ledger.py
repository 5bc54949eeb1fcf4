"""The formula ledger: every printed result has a check below it, and every check a formula."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence

from lib.book._check import STEMS
from lib.book.chapter import Chapter
from lib.book.dataflow import check_calls
from lib.book.independence import dependences

__all__ = ["EXCUSED_SHARE", "REACH", "label_of", "scan", "scan_book"]

REACH = 10  # lines from the end of an equation to the cell that checks it
EXCUSED_SHARE = 1 / 4  # of the labels of a chapter, for definitions and cited theorems
_OTHER_DISPLAYS = re.compile(
    r"\\begin\{(align|alignat|equation|eqnarray|flalign|gather|multline)|\\\[|\\displaystyle"
    r"|\{math\}|<math"
)


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
    found = [*_equations(chapter), *_checks(chapter), *_excuses(chapter), *dependences(chapter)]
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
            yield equation.start, "a display equation without a label: $$ ... $$ (eq-<stem>-<name>)"
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
    yield from _other_displays(chapter)


def _other_displays(chapter: Chapter) -> Iterator[tuple[int, str]]:
    """Display mathematics that is not written with ``$$`` and would escape the ledger."""
    inside = {n for e in chapter.equations for n in range(e.start, e.end + 1)}
    for number, line in enumerate(chapter.prose.splitlines(), 1):
        if number in inside:
            continue
        if "$$" in line:
            yield number, "$$ without its partner"
        if _OTHER_DISPLAYS.search(line):
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
        tree = cell.tree()
        calls = check_calls(tree)
        for problem in (*_disarmed(tree), *_mathematics_by_code(tree)):
            yield cell.line, problem
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


def _disarmed(tree: ast.Module) -> Iterator[str]:
    """Ways around ``check``: not calling it, or calling something else by its name."""
    statements = [node.value for node in tree.body if isinstance(node, ast.Expr)]
    for call in check_calls(tree):
        if call not in statements:
            yield f"the check of {label_of(call)} must be a statement of its own"
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom | ast.Import):
            for alias in node.names:
                origin = (getattr(node, "module", None), alias.name, alias.asname or alias.name)
                if "check" in origin[1:] and origin != ("lib.book", "check", "check"):
                    yield "check must be that of lib.book, under its own name"
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            if node.id == "check":
                yield "check is given another meaning"
        elif isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == "check":
            yield "check is given another meaning"


def _mathematics_by_code(tree: ast.Module) -> Iterator[str]:
    """Formulas that a cell displays, out of the ledger's sight."""
    for node in ast.walk(tree):
        words = node.value if isinstance(node, ast.Constant) else getattr(node, "name", "")
        displayed = isinstance(words, str) and ("$$" in words or _OTHER_DISPLAYS.search(words))
        if displayed or (isinstance(node, ast.alias) and words in ("Math", "Latex")):
            yield "a formula must stand in the text, between $$ and $$, not come out of a cell"


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
