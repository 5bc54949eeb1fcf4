"""The pictures of chapter ``nce``: the spread of NCE's estimates, and InfoNCE's ceiling."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lib.book import BLUE, GREEN, INK, ORANGE, PINK

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_ceiling", "draw_spread"]

COLOURS, MARKS = (BLUE, ORANGE, GREEN, PINK), "osD^"
DASHES = ("-", (0, (4, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1, 1.5)))


def draw_spread(
    counts: Sequence[int],
    seen: Mapping[str, Sequence[float]],
    expected: Mapping[str, Sequence[float]],
    floor: float,
    repeats: int,
) -> Figure:
    """Standard deviation of an estimate against K: lines from theory, marks from repeats.

    Args:
        counts: the numbers of noise points K.
        seen: name of the noise -> standard deviations over ``repeats`` fits.
        expected: name -> standard deviations from the formula.
        floor: the standard deviation of maximum likelihood.
        repeats: how many fits stand behind each mark; its bar is two standard errors.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.4))
    for i, (name, marks) in enumerate(seen.items()):
        colour, beside = COLOURS[i], [count * 1.04 ** (i - 1) for count in counts]
        bars = [2 * value / math.sqrt(2 * (repeats - 1)) for value in marks]
        axes.errorbar(beside, marks, bars, color=colour, marker=MARKS[i], ls="none", lw=1)
        axes.plot(counts, expected[name], color=colour, ls=DASHES[i])
        axes.text(counts[0] * 0.88, expected[name][0], name, color=colour, ha="right", va="center")
    axes.axhline(floor, color=INK, lw=0.9, ls="-")
    axes.text(counts[0] * 0.88, floor * 0.98, "likelihood", color=INK, ha="right", va="top")
    axes.set_xscale("log")
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.set(xlabel="noise points per data point, K", ylabel="standard deviation of a")
    axes.set_xlim(counts[0] * 0.5, counts[-1] * 1.3)
    axes.set_ylim(bottom=floor * 0.85)
    return figure


def draw_ceiling(
    truth: Sequence[float], bounds: Mapping[int, Sequence[tuple[float, float]]]
) -> Figure:
    """InfoNCE's bound against the true mutual information, a curve for each number N.

    Args:
        truth: mutual informations in nats.
        bounds: N -> (mean, sd over seeds) of log N - L at each of them.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.4))
    axes.plot(truth, truth, color=INK, lw=0.9, ls="-")
    axes.text(truth[-1], truth[-1], " truth", color=INK, va="center")
    for (n, curve), colour, mark, dash in zip(bounds.items(), COLOURS, MARKS, DASHES, strict=False):
        mean, sd = zip(*curve, strict=True)
        axes.errorbar(truth, mean, sd, color=colour, marker=mark, ls=dash, ms=4)
        axes.plot([0, truth[-1]], [math.log(n)] * 2, color=colour, lw=0.6, alpha=0.6)
        axes.text(truth[-1], mean[-1], f"  N = {n}", color=colour, va="center")
    axes.set(xlabel="mutual information, nats", ylabel="log N − loss, nats")
    axes.set_xlim(0, truth[-1] * 1.18)
    axes.set_ylim(0, truth[-1] * 1.05)
    return figure
