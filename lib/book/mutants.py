"""Wrong versions of a formula: flipped signs, lost factors, shifted indices, other functions."""

from __future__ import annotations

import ast
import copy
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

__all__ = ["Mutant", "mutants_of"]

_OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Pow: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
_COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.Gt,
    ast.Gt: ast.Lt,
    ast.LtE: ast.GtE,
    ast.GtE: ast.LtE,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
}
_FUNCTIONS = {
    "log": "exp",
    "log1p": "log",
    "log2": "log",
    "expm1": "exp",
    "sum": "mean",
    "prod": "sum",
    "max": "min",
    "amax": "amin",
    "argmax": "argmin",
    "maximum": "minimum",
    "any": "all",
    "sin": "cos",
    "sinh": "cosh",
    "tanh": "sigmoid",
    "sqrt": "square",
    "cumsum": "cumprod",
    "var": "std",
    "softmax": "log_softmax",
    "softplus": "relu",
    "logsigmoid": "softplus",
    "erf": "tanh",
    "floor": "ceil",
    "triu": "tril",
    "logcumsumexp": "cumsum",
    "logsumexp": "amax",
    "logaddexp": "maximum",
    "trace": "det",
    "lgamma": "digamma",
}
_FUNCTIONS |= {b: a for a, b in _FUNCTIONS.items() if b not in _FUNCTIONS}
_UNEVEN = {
    "exp",
    "logsumexp",
    "sum",
    "mean",
    "softmax",
    "sigmoid",
    "logsigmoid",
    "softplus",
    "tanh",
}
_REDUCTIONS = {*_FUNCTIONS, "norm", "diff", "flip", "roll", "unsqueeze", "transpose", "select"}
_OPTIONAL = {"transpose", "flip", "roll", "sqrt", "square", "abs", "cumsum", "triu", "tril", "conj"}
_SIGNATURE = {"annotation", "returns", "decorator_list", "args"}
_MODULES = {"torch", "np", "math", "F", "special"}
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
        for kind, wrong in _wrong_versions(place):
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
    name = _name(node)
    if field == "func":
        return "value" if isinstance(node.func, ast.Attribute) else "skip"
    if name in _NOT_FORMULAS:
        return "skip"
    method = isinstance(node.func, ast.Attribute) and _module(node.func) is None
    return "axis" if field == "args" and name in _REDUCTIONS and (method or index) else "value"


def _wrong_versions(place: _Place) -> Iterator[tuple[str, ast.AST]]:
    node, role = place.node, place.role
    if isinstance(node, ast.operator):
        if type(node) in _OPERATORS:
            yield "sign", _OPERATORS[type(node)]()
    elif isinstance(node, ast.BinOp):
        yield from _wrong_operation(node, role)
    elif isinstance(node, ast.UnaryOp):
        if not isinstance(node.op, ast.USub):
            yield "comparison", node.operand
        elif isinstance(node.operand, ast.Constant):
            if isinstance(node.operand.value, int | float):
                yield from _wrong_number(-node.operand.value, role)
        else:
            yield "sign", node.operand
    elif isinstance(node, ast.Constant) and not _negated(place):
        yield from _wrong_number(node.value, role)
    elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
        yield from _wrong_index(node)
    elif isinstance(node, ast.Attribute) and node.attr in {"T", "mT", "H"}:
        yield "transpose", node.value
    elif isinstance(node, ast.Call):
        yield from _wrong_call(node)
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in _COMPARISONS:
        flipped = [_COMPARISONS[type(node.ops[0])](), *node.ops[1:]]
        yield "comparison", ast.Compare(node.left, flipped, node.comparators)
    elif isinstance(node, ast.BoolOp):
        other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield "comparison", ast.BoolOp(other, node.values)
    elif isinstance(node, ast.IfExp):
        yield "comparison", ast.IfExp(node.test, node.orelse, node.body)


def _wrong_operation(node: ast.BinOp, role: str) -> Iterator[tuple[str, ast.AST]]:
    left, right, operator = node.left, node.right, type(node.op)
    if operator not in _OPERATORS:
        return
    additive = operator in (ast.Add, ast.Sub)
    kind = "index" if role == "index" else "sign" if additive else "factor"
    yield kind, ast.BinOp(left, _OPERATORS[operator](), right)
    if additive or operator in (ast.Mult, ast.Div):
        yield "dropped", left
    if operator in (ast.Add, ast.Mult):
        yield "dropped", right
    if additive and role == "value":
        yield "factor", ast.BinOp(left, node.op, ast.BinOp(ast.Constant(2), ast.Mult(), right))


def _wrong_number(value: object, role: str) -> Iterator[tuple[str, ast.AST]]:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if role == "axis" and isinstance(value, int):
        yield "axis", _number({0: 1, -1: -2}.get(value, value - 1 if value > 0 else value + 1))
    elif role == "index" and isinstance(value, int):
        yield "index", _number(value + 1 if value >= 0 else value - 1)
        if value > 0:
            yield "index", _number(value - 1)
    else:
        yield "number", _number(value + 1 if isinstance(value, int) else 2 * value or 1.0)
        if value < 0:
            yield "sign", _number(-value)


def _wrong_index(node: ast.Subscript) -> Iterator[tuple[str, ast.AST]]:
    items = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]

    def with_items(changed: list[ast.expr]) -> ast.expr:
        whole = ast.Tuple(changed, ast.Load()) if isinstance(node.slice, ast.Tuple) else changed[0]
        return ast.Subscript(node.value, whole, ast.Load())

    for i, item in enumerate(items):
        if isinstance(item, ast.Name):
            yield "index", with_items([*items[:i], _less_one(item), *items[i + 1 :]])
        elif isinstance(item, ast.Slice):
            for bound in ("lower", "upper"):
                if isinstance(name := getattr(item, bound), ast.Name):
                    shifted = copy.copy(item)
                    setattr(shifted, bound, _less_one(name))
                    yield "index", with_items([*items[:i], shifted, *items[i + 1 :]])
            if item.step is not None and ast.unparse(item.step) == "-1":
                yield "index", node.value
    if len(items) == 2 and "None" in map(ast.unparse, items):
        yield "index", with_items(items[::-1])
    plain = [i for i, item in enumerate(items) if not isinstance(item, ast.Slice | ast.Constant)]
    if len(plain) >= 2 and ast.dump(items[plain[0]]) != ast.dump(items[plain[1]]):
        swapped = list(items)
        swapped[plain[0]], swapped[plain[1]] = items[plain[1]], items[plain[0]]
        yield "index", with_items(swapped)


def _wrong_call(node: ast.Call) -> Iterator[tuple[str, ast.AST]]:
    name, args = _name(node), node.args
    function = isinstance(node.func, ast.Name) or _module(node.func) is not None
    operand = args[0] if function and args else getattr(node.func, "value", None)
    if name in _FUNCTIONS:
        other = "max" if isinstance(node.func, ast.Name) and name == "sum" else _FUNCTIONS[name]
        yield "function", ast.Call(_renamed(node.func, other), args, node.keywords)
    if name in _UNEVEN and isinstance(operand, ast.Name | ast.Subscript | ast.BinOp | ast.Call):
        negative = ast.UnaryOp(ast.USub(), operand)
        if function:
            yield "sign", ast.Call(node.func, [negative, *args[1:]], node.keywords)
        else:
            method = ast.Attribute(negative, name, ast.Load())
            yield "sign", ast.Call(method, args, node.keywords)
    if name in _OPTIONAL and isinstance(operand, ast.expr):
        yield "function", operand
    if name in {"range", "arange"} and args and isinstance(args[-1], ast.Name):
        yield "index", ast.Call(node.func, [*args[:-1], _less_one(args[-1])], node.keywords)
    if name == "where" and len(args) == 3:
        yield "comparison", ast.Call(node.func, [args[0], args[2], args[1]], node.keywords)
    if name == "einsum" and args and isinstance(args[0], ast.Constant):
        for wrong in _wrong_einsum(str(args[0].value)):
            yield "index", ast.Call(node.func, [ast.Constant(wrong), *args[1:]], node.keywords)


def _wrong_einsum(rule: str) -> Iterator[str]:
    """The rule with the letters of one operand reversed."""
    operands = re.findall(r"[A-Za-z]{2,}", rule.split("->")[0])
    for operand in operands:
        if operand != operand[::-1]:
            yield rule.replace(operand, operand[::-1], 1)


def _name(call: ast.Call) -> str:
    """The last part of the name of the function called."""
    return ast.unparse(call.func).rsplit(".", 1)[-1]


def _module(func: ast.expr) -> str | None:
    """The module of a function such as ``torch.exp`` or ``torch.linalg.det``."""
    if not isinstance(func, ast.Attribute):
        return None
    base = ast.unparse(func.value).split(".")[0]
    return base if base in _MODULES else None


def _renamed(func: ast.expr, name: str) -> ast.expr:
    if isinstance(func, ast.Attribute):
        return ast.Attribute(func.value, name, ast.Load())
    return ast.Name(name, ast.Load())


def _less_one(node: ast.expr) -> ast.BinOp:
    return ast.BinOp(node, ast.Sub(), ast.Constant(1))


def _number(value: float) -> ast.expr:
    number = ast.Constant(abs(value))
    return ast.UnaryOp(ast.USub(), number) if value < 0 else number


def _negated(place: _Place) -> bool:
    return isinstance(place.parent, ast.UnaryOp) and isinstance(place.parent.op, ast.USub)
