"""What makes a notebook a chapter: checked formulas, listings, tables and the figure style.

A chapter says once, in its setup cell::

    from lib.book import check, claims, show, style, table
    style()
"""

from lib.book._check import STEMS, Record, check, recorded
from lib.book._display import Table, claims, show, table
from lib.book._style import BLUE, GREEN, INK, ORANGE, PINK, style

__all__ = [
    "BLUE",
    "GREEN",
    "INK",
    "ORANGE",
    "PINK",
    "STEMS",
    "Record",
    "Table",
    "check",
    "claims",
    "recorded",
    "show",
    "style",
    "table",
]
