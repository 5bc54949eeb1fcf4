"""The pictures of chapter ``mixup``: mixtures, chords, wrong labels and the Taylor series."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from lib.book import BLUE, GREEN, INK, ORANGE, PINK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_chords", "draw_mixtures", "draw_noise", "draw_taylor"]

COLOURS = (BLUE, GREEN, ORANGE, PINK)
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))


def _label_ends(axes: Axes, x: float, ends: Mapping[str, float], gap: float) -> None:
    """Names at the right ends of lines, pushed apart to at least ``gap``."""
    colours = dict(zip(ends, COLOURS, strict=False))
    last = -float("inf")
    for name in sorted(ends, key=lambda name: ends[name]):
        last = max(ends[name], last + gap)
        axes.text(x, last, name, color=colours[name], va="center", size=9)


def draw_mixtures(pictures: Mapping[str, Tensor]) -> Figure:
    """Pictures (H, W) in a row, each with its name below."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(pictures), figsize=(6.4, 1.7))
    for axes, (name, picture) in zip(panels, pictures.items(), strict=True):
        axes.imshow(picture, cmap="gray", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[], xlabel=name)
        axes.spines[:].set_visible(False)
    return figure


def draw_chords(shares: Tensor, curves: Mapping[str, Tensor]) -> Figure:
    """How far a probability is from the straight line between its ends, on the way.

    Args:
        shares: (K,), of the first picture.
        curves: name -> mean probability (K,) of the first picture's class.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5.6, 3.2))
    axes.axhline(0, color=INK, lw=0.8)
    axes.text(0.02, 0.004, "affine", color=INK, size=9)
    for (name, curve), colour, dash in zip(curves.items(), COLOURS, DASHES, strict=False):
        line = shares * curve[-1] + (1 - shares) * curve[0]
        axes.plot(shares, curve - line, color=colour, ls=dash, label=name)
    axes.legend(loc="upper left")
    axes.set(xlabel=r"share $\lambda$ of the first picture", xlim=(0, 1))
    axes.set(ylabel="probability minus line")
    return figure


def draw_noise(
    epochs: Sequence[int], accuracy: Mapping[str, Tensor], memorised: Mapping[str, Tensor]
) -> Figure:
    """Test accuracy, and the share of wrong training labels reproduced, over epochs (K,)."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(6.4, 3.0), sharex=True)
    for axes, curves in zip(panels, (accuracy, memorised), strict=True):
        for curve, colour, dash in zip(curves.values(), COLOURS, DASHES, strict=False):
            axes.plot(epochs, 100 * curve, color=colour, ls=dash, marker="o", ms=3)
        axes.set(xlabel="epoch")
    ends = {name: 100 * float(curve[-1]) for name, curve in memorised.items()}
    _label_ends(panels[1], 1.04 * epochs[-1], ends, 8)
    panels[0].set(ylabel="test accuracy, %")
    panels[1].set(ylabel="wrong labels reproduced, %", ylim=(0, 100))
    return figure


def draw_taylor(distances: Sequence[float], explained: Mapping[str, Sequence[float]]) -> Figure:
    """The share of the measured rise of the loss that two terms of Taylor's series explain (K,)."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5.6, 3.2))
    axes.axhline(1, color=INK, lw=0.8)
    for curve, colour, dash in zip(explained.values(), COLOURS, DASHES, strict=False):
        axes.plot(distances, curve, color=colour, ls=dash)
    ends = {name: curve[-1] for name, curve in explained.items()}
    _label_ends(axes, 1.06 * distances[-1], ends, 0.08)
    axes.set(xscale="log", xlim=(distances[0], distances[-1]), ylim=(0, 1.05))
    axes.set(xlabel="distance to the partner (1: as it is)", ylabel="explained share of the rise")
    return figure
