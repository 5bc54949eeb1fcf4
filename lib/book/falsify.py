"""Wrong versions of one piece of a formula: another sign, factor, index or function."""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Iterator

__all__ = ["FUNCTIONS", "called_name", "module_of", "wrong_versions"]

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
FUNCTIONS = {
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
FUNCTIONS |= {b: a for a, b in FUNCTIONS.items() if b not in FUNCTIONS}
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
_OPTIONAL = {"transpose", "flip", "roll", "sqrt", "square", "abs", "cumsum", "triu", "tril", "conj"}
_MODULES = {"torch", "np", "math", "F", "special"}


def wrong_versions(node: ast.AST, role: str) -> Iterator[tuple[str, ast.AST]]:
    """Wrong versions of one node, each with its kind.

    Args:
        node: an expression or an operator; it is shared with its wrong versions, not changed.
        role: "value", "index" for what selects an element, or "axis".
    """
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
    elif isinstance(node, ast.Constant):
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
    name, args = called_name(node), node.args
    function = isinstance(node.func, ast.Name) or module_of(node.func) is not None
    operand = args[0] if function and args else getattr(node.func, "value", None)
    if name in FUNCTIONS:
        other = "max" if isinstance(node.func, ast.Name) and name == "sum" else FUNCTIONS[name]
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


def _renamed(func: ast.expr, name: str) -> ast.expr:
    if isinstance(func, ast.Attribute):
        return ast.Attribute(func.value, name, ast.Load())
    return ast.Name(name, ast.Load())


def _less_one(node: ast.expr) -> ast.BinOp:
    return ast.BinOp(node, ast.Sub(), ast.Constant(1))


def _number(value: float) -> ast.expr:
    number = ast.Constant(abs(value))
    return ast.UnaryOp(ast.USub(), number) if value < 0 else number


def called_name(call: ast.Call) -> str:
    """The last part of the name of the function called."""
    return ast.unparse(call.func).rsplit(".", 1)[-1]


def module_of(func: ast.expr) -> str | None:
    """The module of a function such as ``torch.exp`` or ``torch.linalg.det``."""
    if not isinstance(func, ast.Attribute):
        return None
    base = ast.unparse(func.value).split(".")[0]
    return base if base in _MODULES else None
