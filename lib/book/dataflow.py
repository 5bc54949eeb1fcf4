"""Which statements of a cell feed an expression: the part of a check that is the formula."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

__all__ = ["Piece", "Slice", "check_calls", "pieces", "slice_of", "used_names"]

_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
# a bare call such as torch.manual_seed(0) changes no variable
_MODULES = {"F", "itertools", "math", "nn", "np", "plt", "random", "torch"}
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.GeneratorExp, ast.DictComp)


@dataclass(frozen=True)
class Piece:
    """A simple statement, or the head of a loop, condition or context around it."""

    node: ast.AST  # what makes two pieces the same
    defines: set[str] = field(compare=False)
    uses: set[str] = field(compare=False)
    certain: bool = field(compare=False)  # always runs and gives its names entirely new values
    heads: tuple[Piece, ...] = field(default=(), compare=False)

    @property
    def formula(self) -> str | None:
        """The field in which a formula can stand: of a head one, of a statement any."""
        heads = {ast.For: "iter", ast.While: "test", ast.If: "test", ast.With: "items"}
        return heads.get(type(self.node))


@dataclass
class Slice:
    """The pieces of a cell that feed an expression, and every name they use."""

    pieces: set[Piece] = field(default_factory=set)
    names: set[str] = field(default_factory=set)


def check_calls(tree: ast.AST) -> list[ast.Call]:
    """The calls of ``check`` in source order."""
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "check"
    ]
    return sorted(calls, key=lambda call: (call.lineno, call.col_offset))


def used_names(node: ast.AST) -> set[str]:
    """Names that ``node`` reads from the scope around it."""
    if isinstance(node, ast.Name):
        return {node.id} if isinstance(node.ctx, ast.Load) else set()
    names = _union(used_names(child) for child in ast.iter_child_nodes(node))
    if isinstance(node, _SCOPES):
        names -= {child.arg for child in ast.walk(node.args) if isinstance(child, ast.arg)}
        names -= _stored_names(node)
    if isinstance(node, _COMPREHENSIONS):
        names -= _stored_names(node)
    return names


def pieces(statement: ast.stmt, heads: tuple[Piece, ...] = ()) -> Iterator[Piece]:
    """``statement`` taken apart, heads first."""
    if isinstance(statement, ast.For | ast.While | ast.If | ast.With):
        head = _head(statement, heads)
        yield head
        for child in [*statement.body, *getattr(statement, "orelse", [])]:
            yield from pieces(child, (*heads, head))
    elif isinstance(statement, ast.FunctionDef | ast.ClassDef):
        yield Piece(statement, {statement.name}, used_names(statement), not heads, heads)
    elif isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        stored = _union(_stored_names(target) for target in targets)
        changed = _union(_changed_names(target) for target in targets)
        uses = used_names(statement) | changed
        if isinstance(statement, ast.AugAssign):
            uses, changed = uses | stored, changed | stored
        yield Piece(statement, stored | changed, uses, not (heads or changed), heads)
    elif isinstance(statement, ast.Expr):
        uses = used_names(statement)
        yield Piece(statement, _changed_by_call(statement.value), uses, False, heads)


def slice_of(tree: ast.Module, call: ast.Call, expressions: list[ast.expr]) -> Slice:
    """What feeds ``expressions`` of ``call``, following names back through the cell."""
    found = Slice(names=_union(used_names(expression) for expression in expressions))
    wanted = set(found.names)
    before = [statement for statement in tree.body if statement.lineno <= call.lineno]
    for statement in reversed(before):
        parts = list(pieces(statement))
        growing = True
        while growing:  # in a loop, a later line may feed an earlier one
            size = len(found.pieces)
            for part in parts:
                if part not in found.pieces and part.defines & wanted:
                    if part.certain:
                        wanted -= part.defines
                    for feeding in (part, *part.heads):
                        found.pieces.add(feeding)
                        wanted |= feeding.uses
                        found.names |= feeding.uses
            growing = len(found.pieces) > size
    return found


def _head(statement: ast.stmt, heads: tuple[Piece, ...]) -> Piece:
    if isinstance(statement, ast.For):
        return Piece(
            statement, _stored_names(statement.target), used_names(statement.iter), False, heads
        )
    if isinstance(statement, ast.With):
        items = statement.items
        targets = [item.optional_vars for item in items if item.optional_vars]
        stored = _union(_stored_names(target) for target in targets)
        uses = _union(used_names(item.context_expr) for item in items)
        return Piece(statement, stored, uses, False, heads)
    assert isinstance(statement, ast.While | ast.If)
    return Piece(statement, set(), used_names(statement.test), False, heads)


def _stored_names(node: ast.AST) -> set[str]:
    names = [child for child in ast.walk(node) if isinstance(child, ast.Name)]
    return {name.id for name in names if isinstance(name.ctx, ast.Store)}


def _changed_names(target: ast.AST) -> set[str]:
    """Names of containers into which ``target`` stores: ``a`` for ``a[t]`` and ``a.b``."""
    places = [n for n in ast.walk(target) if isinstance(n, ast.Subscript | ast.Attribute)]
    return {_base(place) for place in places if isinstance(place.ctx, ast.Store)} - {""}


def _changed_by_call(node: ast.expr) -> set[str]:
    """Names that a bare call may change: ``a`` for ``a.append(b)``, also ``b`` for ``f_(b)``."""
    if not isinstance(node, ast.Call):
        return set()
    changed = {_base(node.func)} if isinstance(node.func, ast.Attribute) else set()
    if ast.unparse(node.func).endswith("_"):
        changed |= {_base(argument) for argument in node.args}
    return changed - _MODULES - {""}


def _base(node: ast.AST) -> str:
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Call):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def _union(sets: Iterable[set[str]]) -> set[str]:
    return {name for names in sets for name in names}
