"""Two short series that fit into the source: pelts of the Hudson Bay Company, yeast of Carlson."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from ._spec import Spec, Splits

__all__ = ["SPECS"]

_HARE = (
    "30 47.2 70.2 77.4 36.3 20.6 18.1 21.4 22 25.4 27.1 40.3 57 76.6 52.3 19.5 11.2 7.6 14.6 "
    "16.2 24.7"
)
_LYNX = "4 6.1 9.8 35.2 59.4 41.7 19 13 8.3 9.1 7.4 8 12.3 19.5 45.7 51.1 29.7 15.8 9.7 10.1 8.6"
_YEAST = (
    "9.6 18.3 29.0 47.2 71.1 119.1 174.6 257.3 350.7 441.0 513.3 559.7 594.8 629.4 640.8 651.1 "
    "655.9 659.6 661.8"
)


def _table(start: int, *columns: str) -> NDArray[np.float64]:
    """Read-only columns of numbers behind a column that counts from ``start``."""
    values = [[float(number) for number in column.split()] for column in columns]
    table = np.column_stack([np.arange(start, start + len(values[0])), *values]).astype(np.float64)
    table.flags.writeable = False
    return table


def _hare_lynx(raw: Mapping[str, bytes]) -> Splits:
    return {"train": _table(1900, _HARE, _LYNX)}


def _yeast(raw: Mapping[str, bytes]) -> Splits:
    return {"train": _table(0, _YEAST)}


SPECS = (
    Spec(
        name="hare_lynx",
        about=(
            "Pelts of snowshoe hare and Canada lynx taken for the Hudson's Bay Company, 1900 to "
            "1920, in thousands: year, hare, lynx. Counts of a fur trade over a large area, not of "
            "a closed population (Elton and Nicholson 1942; MacLulich 1937; as tabulated in "
            "P. Howard's lecture notes)."
        ),
        licence="facts: numbers are not under copyright",
        parse=_hare_lynx,
    ),
    Spec(
        name="yeast",
        about=(
            "Growth of yeast, hours 0 to 18: hour, amount (T. Carlson 1913, as printed by "
            "R. Pearl 1927)."
        ),
        licence="facts: numbers are not under copyright",
        parse=_yeast,
    ),
)
