"""Listings and tables that read well in the book, on Colab and in a terminal."""

from __future__ import annotations

import ast
import html
import inspect
import textwrap
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np

__all__ = ["Table", "claims", "emit", "show", "table"]

VERDICTS = ("reproduced", "corrected", "not reproduced", "refined")


def emit(thing: object) -> None:
    """Display ``thing`` in a notebook, print it elsewhere."""
    try:
        from IPython import get_ipython
        from IPython.display import display
    except ImportError:
        print(thing)
        return
    if get_ipython() is None:
        print(thing)
    else:
        display(thing)


class _Listing:
    """Source code that a notebook highlights."""

    def __init__(self, source: str) -> None:
        self.source = source

    def __repr__(self) -> str:
        return self.source

    def _repr_markdown_(self) -> str:
        fence = "```"
        while fence in self.source:
            fence += "`"
        return f"{fence}python\n{self.source}\n{fence}"


def show(obj: Any, docstring: bool = False) -> None:
    """List the source of an imported function, method, property or class, highlighted.

    What is printed is what is imported, so the page cannot drift from the library.

    Args:
        obj: a function, method, property, class or module.
        docstring: keep the docstrings.

    Raises:
        TypeError: if ``obj`` has no Python source.

    >>> from lib.training import mean_std
    >>> show(mean_std)
    def mean_std(values: Iterable[float]) -> tuple[float, float]:
        array = np.asarray(list(values), dtype=np.float64)
        if array.ndim != 1 or len(array) < 2:
            raise ValueError(f"values must be at least two numbers, got shape {array.shape}")
        return float(array.mean()), float(array.std(ddof=1))
    """
    for attribute in ("fget", "func", "wrapped"):  # property, cached_property, lazy_property
        obj = getattr(obj, attribute, obj)
    try:
        source = inspect.getsource(inspect.unwrap(obj))
    except (TypeError, OSError) as error:
        raise TypeError(f"show needs an object with Python source, got {obj!r}") from error
    source = textwrap.dedent(source).strip()
    emit(_Listing(source if docstring else _without_docstrings(source)))


def _without_docstrings(source: str) -> str:
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if ast.get_docstring(node) is None or len(node.body) < 2:
            continue
        first, second = node.body[:2]
        stop = min([second.lineno, *(d.lineno for d in getattr(second, "decorator_list", []))])
        between = range(first.lineno - 1, stop - 1)
        last = (first.end_lineno or first.lineno) - 1
        for i in between:
            if i <= last or not lines[i].strip():
                lines[i] = "\0"
    return "\n".join(line for line in lines if line != "\0")


class Table:
    """Rows under a caption: HTML in a notebook, aligned text in a terminal."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], caption: str | None = None) -> None:
        if not rows:
            raise ValueError("rows must hold at least one row")
        self.rows, self.caption = list(rows), caption
        self.columns = list(dict.fromkeys(key for row in rows for key in row))

    def _cells(self) -> list[list[str]]:
        return [[_text(row.get(column)) for column in self.columns] for row in self.rows]

    def _numeric(self) -> list[bool]:
        return [
            all(isinstance(row.get(c), Real | tuple | None) for row in self.rows)
            for c in self.columns
        ]

    def __repr__(self) -> str:
        lines = [self.columns, *self._cells()]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        numeric = self._numeric()
        text = [
            "  ".join(
                cell.rjust(width) if right else cell.ljust(width)
                for cell, width, right in zip(line, widths, numeric, strict=True)
            ).rstrip()
            for line in lines
        ]
        rule = "  ".join("-" * width for width in widths)
        return "\n".join([*([self.caption] if self.caption else []), text[0], rule, *text[1:]])

    def _repr_html_(self) -> str:
        digits = "font-variant-numeric: tabular-nums; white-space: nowrap"
        number = f' style="text-align: right; {digits}"'
        prose = ' style="text-align: left"'
        styles = [number if numeric else prose for numeric in self._numeric()]
        head = "".join(
            f'<th scope="col"{style.replace(f"; {digits}", "")}>{html.escape(column)}</th>'
            for column, style in zip(self.columns, styles, strict=True)
        )
        body = "".join(
            "<tr>"
            + "".join(
                f"<td{style}>{html.escape(cell)}</td>"
                for cell, style in zip(row, styles, strict=True)
            )
            + "</tr>"
            for row in self._cells()
        )
        caption = f"<caption>{html.escape(self.caption)}</caption>" if self.caption else ""
        return (
            f'<table class="table book-table">{caption}<thead><tr>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table>"
        )


def table(rows: Sequence[Mapping[str, Any]], caption: str | None = None) -> Table:
    """A table from a list of rows, each a mapping from column to value.

    Args:
        rows: floats are rounded to four digits, ``(mean, sd)`` reads "mean ± sd" with two digits
            of the sd, None is a dash; columns stand in the order in which they first appear.
        caption: what the table says.

    Raises:
        ValueError: if there is no row.

    >>> table([{"model": "CRF", "F1": (0.91234, 0.0031), "seconds": 12.3456}], caption="Results")
    Results
    model               F1  seconds
    -----  ---------------  -------
    CRF    0.9123 ± 0.0031    12.35
    """
    return Table(rows, caption)


def claims(rows: Sequence[tuple[str, str, str]]) -> Table:
    """The essay's claims, graded: rows of (claim, verdict, evidence).

    Raises:
        ValueError: if a verdict is not one of "reproduced", "corrected", "not reproduced",
            "refined".

    >>> claims([("addition commutes", "reproduced", "error 0")])
    claim              verdict     evidence
    -----------------  ----------  --------
    addition commutes  reproduced  error 0
    """
    for claim, verdict, _ in rows:
        if verdict not in VERDICTS:
            raise ValueError(f"verdict must be one of {VERDICTS}, got {verdict!r} for {claim!r}")
    return Table([{"claim": c, "verdict": v, "evidence": e} for c, v, e in rows])


def _text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, tuple):
        if len(value) != 2:
            raise ValueError(f"a tuple in a table is (mean, sd), got {value!r}")
        return _mean_sd(*value)
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, Integral):
        return f"{int(value):,}" if abs(int(value)) >= 10_000 else str(int(value))
    return f"{float(value):.4g}" if isinstance(value, Real) else str(value)


def _mean_sd(mean: float, sd: float) -> str:
    if not (np.isfinite(sd) and sd > 0):
        return f"{mean:.4g} ± {sd:.2g}"
    decimals = max(0, 1 - int(np.floor(np.log10(sd))))
    return f"{mean:.{decimals}f} ± {sd:.{decimals}f}"
