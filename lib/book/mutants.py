"""The wrong versions of a formula, in a fixed order, each ready to be put in its place."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from lib.book.falsify import FUNCTIONS, called_name, module_of, wrong_versions

__all__ = ["Mutant", "mutants_of"]

_REDUCTIONS = {*FUNCTIONS, "norm", "diff", "flip", "roll", "unsqueeze", "transpose", "select"}
_SIGNATURE = {"annotation", "returns", "decorator_list", "args"}
# the arguments of these make inputs and shapes, not formulas
_NOT_FORMULAS = {
    *("rand", "randn", "randint", "randperm", "normal", "multinomial", "bernoulli", "uniform"),
    *("manual_seed", "Generator", "default_rng", "standard_normal", "integers", "permutation"),
    *("choice", "sample", "rsample", "linspace", "logspace", "zeros", "ones", "empty", "full"),
    *("eye", "zeros_like", "ones_like", "reshape", "view", "expand", "permute", "to", "float"),
}


@dataclass(frozen=True)
class Mutant:
    """One wrong version: ``field`` of ``parent`` holds ``wrong`` in place of ``right``."""

    description: str
    parent: ast.AST
    field: str
    index: int | None
    right: ast.AST
    wrong: ast.AST

    def put(self, node: ast.AST) -> None:
        """Place ``node``, right or wrong, in the tree."""
        if self.index is None:
            setattr(self.parent, self.field, node)
        else:
            getattr(self.parent, self.field)[self.index] = node


@dataclass(frozen=True)
class _Place:
    parent: ast.AST
    field: str
    index: int | None
    node: ast.AST
    role: str  # "value", "index" or "axis"


def mutants_of(roots: Iterable[tuple[ast.AST, str | None]]) -> list[Mutant]:
    """The wrong versions of some expressions: kinds alternate, in a fixed order.

    Args:
        roots: nodes, each with the one field to look into, or None for all.
    """
    kinds: dict[str, list[Mutant]] = {}
    seen: Counter[str] = Counter()
    for place in (place for node, field in roots for place in _places(node, "value", field)):
        for kind, wrong in _versions(place):
            mutant = _described(
                Mutant("", place.parent, place.field, place.index, place.node, wrong)
            )
            seen[mutant.description] += 1
            if (times := seen[mutant.description]) > 1:
                mutant = replace(mutant, description=f"{mutant.description} ({times})")
            kinds.setdefault(kind, []).append(mutant)
    longest = max(map(len, kinds.values()), default=0)
    return [group[turn] for turn in range(longest) for group in kinds.values() if turn < len(group)]


def _described(mutant: Mutant) -> Mutant:
    """The mutant with its description, in which a lone number or operator has its context."""
    number = mutant.right.operand if isinstance(mutant.right, ast.UnaryOp) else mutant.right
    if not isinstance(number, ast.Constant | ast.operator):
        text = f"{ast.unparse(mutant.right)} -> {ast.unparse(mutant.wrong)}"
    else:
        before = ast.unparse(mutant.parent)
        mutant.put(mutant.wrong)
        text = f"{before} -> {ast.unparse(mutant.parent)}"
        mutant.put(mutant.right)
    return replace(mutant, description=text)


def _places(node: ast.AST, role: str, only: str | None = None) -> Iterator[_Place]:
    """The expressions in ``node`` that belong to a formula, outermost first."""
    for field, value in ast.iter_fields(node):
        if only not in (None, field) or (field in _SIGNATURE and not isinstance(node, ast.Call)):
            continue
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if not isinstance(child, ast.AST):
                continue
            inner = _role(node, field, index, role)
            if inner == "skip":
                continue
            if isinstance(child, ast.expr) or (isinstance(node, ast.AugAssign) and field == "op"):
                yield _Place(node, field, index, child, inner)
            yield from _places(child, inner)


def _role(node: ast.AST, field: str, index: int | None, role: str) -> str:
    if isinstance(node, ast.JoinedStr) or (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    ):
        return "skip"
    if isinstance(node, ast.Subscript) and field == "slice":
        return "index"
    if isinstance(node, ast.keyword):
        skipped = node.arg in {"keepdim", "keepdims", "dtype", "generator"}
        return "skip" if skipped else "axis" if node.arg in {"dim", "axis", "dims"} else "value"
    if isinstance(node, ast.Call):
        return _role_in_call(node, field, index)
    return role


def _role_in_call(node: ast.Call, field: str, index: int | None) -> str:
    name = called_name(node)
    if field == "func":
        return "value" if isinstance(node.func, ast.Attribute) else "skip"
    if name in _NOT_FORMULAS:
        return "skip"
    method = isinstance(node.func, ast.Attribute) and module_of(node.func) is None
    return "axis" if field == "args" and name in _REDUCTIONS and (method or index) else "value"


def _versions(place: _Place) -> Iterator[tuple[str, ast.AST]]:
    negated = isinstance(place.parent, ast.UnaryOp) and isinstance(place.parent.op, ast.USub)
    if isinstance(place.node, ast.Constant) and negated:
        return  # the number with its sign has its turn
    yield from wrong_versions(place.node, place.role)
