"""Transcription and oracle are two roads: they share inputs, neither steps nor the library."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterable, Iterator

from lib.book.chapter import Cell, Chapter
from lib.book.dataflow import Piece, Slice, check_calls, pieces, slice_of

__all__ = ["dependences", "own_pieces"]

REPEATED_SHARE = 1 / 2  # of a transcription that may stand in its oracle in one piece
SHARED_FACTOR = 4  # times what is the transcription's own may be shared with the oracle
_COMPARED = ("printed", "oracle")
_OPERATIONS = (ast.BinOp, ast.Call, ast.Subscript, ast.UnaryOp, ast.Compare, ast.Attribute)
_HOUSE = ("book",)  # what a check cell may use of lib: it computes no mathematics


def dependences(chapter: Chapter) -> Iterator[tuple[int, str]]:
    """Where a transcription or an oracle leans on lib, or the one on the other; with its line."""
    from_lib: set[str] = set()
    for cell in chapter.code("setup", "check"):
        tree = cell.tree()
        from_lib |= _imported_from_lib(tree)
        for call in check_calls(tree):
            given = {keyword.arg: keyword.value for keyword in call.keywords}
            label = ast.unparse(call.args[0]).strip("'") if call.args else "?"
            roads = {
                name: slice_of(tree, call, [given[name]]) for name in _COMPARED if name in given
            }
            for name, road in roads.items():
                if names := road.names & from_lib:
                    yield (
                        cell.line,
                        f"{name}= of {label} leans on lib through {', '.join(sorted(names))}; "
                        "draw inputs first, then hand them to lib",
                    )
            if len(roads) == len(_COMPARED):
                for problem in _one_road(given, roads["printed"], roads["oracle"]):
                    yield cell.line, f"oracle= of {label} {problem}"
        from_lib = _carry(cell, from_lib)


def own_pieces(printed: Slice, others: Slice) -> list[Piece]:
    """What feeds the transcription and nothing else, in the order of the cell."""
    own = printed.pieces - others.pieces
    return sorted(own, key=lambda piece: getattr(piece.node, "lineno", 0))


def _one_road(given: dict[str | None, ast.expr], printed: Slice, oracle: Slice) -> Iterator[str]:
    """What makes two slices of a cell one: repeated expressions, or too many shared statements."""
    ours = [*_formulas(printed.pieces - oracle.pieces), given["printed"]]
    theirs = [*_formulas(oracle.pieces - printed.pieces), given["oracle"]]
    own = sum(map(_size, ours))
    repeated = _expressions(ours).keys() & _expressions(theirs).keys()
    longest = max(repeated, key=lambda text: _expressions(ours)[text], default="")
    if longest and _expressions(ours)[longest] >= REPEATED_SHARE * own:
        yield f"repeats the transcription: {longest}"
    shared = sum(map(_size, _formulas(printed.pieces & oracle.pieces)))
    if shared > SHARED_FACTOR * own:
        yield f"is computed from it: {shared} operations feed both, {own} the transcription alone"


def _formulas(found: Iterable[Piece]) -> Iterator[ast.AST]:
    """The statements of ``found``; of a head the part in which a formula can stand."""
    for piece in found:
        part = getattr(piece.node, piece.formula) if piece.formula else piece.node
        yield from part if isinstance(part, list) else [part]


def _size(node: ast.AST) -> int:
    return sum(isinstance(child, _OPERATIONS) for child in ast.walk(node))


def _expressions(nodes: Iterable[ast.AST]) -> dict[str, int]:
    """The expressions in ``nodes``, whatever their names are, with their numbers of operations."""
    found = {}
    for node in nodes:
        nameless = _Nameless().visit(copy.deepcopy(node))
        for child in ast.walk(nameless):
            if isinstance(child, ast.expr) and (size := _size(child)):
                found[ast.unparse(child)] = size
    return found


class _Nameless(ast.NodeTransformer):
    def visit_Name(self, node: ast.Name) -> ast.Name:
        return ast.Name("_", node.ctx)


def _imported_from_lib(tree: ast.Module) -> set[str]:
    """Names that stand for lib, its modules or something in them, the house's own aside."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [alias for alias in node.names if _is_mathematics(alias.name)]
            names |= {alias.asname or alias.name.split(".")[0] for alias in found}
        elif isinstance(node, ast.ImportFrom):
            found = [a for a in node.names if _is_mathematics(f"{node.module}.{a.name}")]
            names |= {alias.asname or alias.name for alias in found}
    return names


def _is_mathematics(module: str) -> bool:
    parts = module.split(".")
    return parts[0] == "lib" and (len(parts) == 1 or parts[1] not in _HOUSE)


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
