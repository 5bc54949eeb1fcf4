"""The pictures of chapter ``margin``: features, margins, pulls, rounding and the open set."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lib.book import BLUE, GREEN, INK, ORANGE, PINK
from lib.reproduce.planes import Plane

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_features", "draw_psi", "draw_pull", "draw_roc", "draw_rounding"]

COLOURS = (BLUE, GREEN, ORANGE, PINK)
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
MARKS = "os^Dv"


def draw_features(panels: Mapping[str, Plane], classes: Tensor, trio: Sequence[int]) -> Figure:
    """Two-dimensional features by class, at most 5, with the centres and a trio of samples."""
    import matplotlib.pyplot as plt

    figure, row = plt.subplots(1, len(panels), figsize=(6.4, 3.3))
    for axes, (name, (points, centres, _)) in zip(row, panels.items(), strict=True):
        size = points.norm(dim=1).quantile(0.99)
        for k, centre in enumerate(centres / centres.norm(dim=1, keepdim=True)):
            colour = (*COLOURS, INK)[k]
            x, y = points[classes == k].t()
            axes.scatter(x, y, s=5, color=colour, marker=MARKS[k], alpha=0.35, linewidths=0)
            axes.plot([0, size * centre[0]], [0, size * centre[1]], color=colour, lw=1, ls="-")
            axes.text(*(1.2 * size * centre), str(k), color=colour, ha="center", va="center")
        for letter, point in zip("abc", points[list(trio)], strict=True):
            axes.scatter(*point, s=42, facecolor="none", edgecolor=INK, linewidths=1.4, zorder=3)
            axes.annotate(letter, point, (6, 4), textcoords="offset points", weight="bold")
        axes.set(xlim=(-1.3 * size, 1.3 * size), ylim=(-1.3 * size, 1.3 * size))
        axes.set(aspect="equal", xticks=[], yticks=[], xlabel=name)
        axes.spines[["left", "bottom"]].set_visible(False)
    return figure


def draw_psi(curves: Mapping[str, Callable[[Tensor], Tensor]]) -> Figure:
    """What each loss puts in the place of the cosine; grey where the simpler A has no margin."""
    places = {"softmax": (33, 0.93), "AM": (118, -1.3), "simpler A": (14, -1.1), "Arc": (72, -0.6)}
    figure, axes = _over_angles(curves, places, 180)
    for left, right in ((2 / 5, 2 / 3), (4 / 5, 1)):
        axes.axvspan(180 * left, 180 * right, color=INK, alpha=0.15, lw=0)
    axes.set(ylabel="ψ")
    return figure


def draw_pull(
    curves: Mapping[str, Callable[[Tensor], Tensor]], rest: float, scale: float
) -> Figure:
    """How hard each loss pulls to the own centre, the wrong classes weighing ``rest``."""

    def pull(psi: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def slope(theta: Tensor) -> Tensor:
            theta = theta.clone().requires_grad_()
            loss = torch.logaddexp(torch.zeros(()), math.log(rest) - scale * psi(theta))
            return torch.autograd.grad(loss.sum(), theta)[0]

        return slope

    places = {"softmax": (84, 8), "AM": (58, 9), "simpler A": (29, 108), "Arc": (36, 24)}
    figure, axes = _over_angles({name: pull(psi) for name, psi in curves.items()}, places, 120)
    axes.axhline(0, color=INK, lw=0.6, ls="-")
    axes.set(ylabel="pull (nats per radian)")
    return figure


def _over_angles(
    curves: Mapping[str, Callable[[Tensor], Tensor]],
    places: Mapping[str, tuple[float, float]],
    last: int,
) -> tuple[Figure, Axes]:
    """Named curves over the angle to the own centre, up to ``last`` degrees."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.4))
    degrees = torch.linspace(0, last, 4 * last + 1).double()
    looks = zip((INK, *COLOURS), ("-", *DASHES), strict=False)
    for (name, curve), (colour, dash) in zip(curves.items(), looks, strict=False):
        width = 1.2 if colour == INK else 1.8
        axes.plot(degrees, curve(degrees.deg2rad()), color=colour, ls=dash, lw=width)
        axes.text(*places[name], name, color=colour)
    axes.set(xlabel="angle to the own centre (degrees)", xlim=(0, last))
    axes.set_xticks(range(0, last + 1, 30))
    return figure, axes


def draw_rounding(
    errors: Mapping[str, Tensor], product: Tensor, predicted: Tensor, failed: float
) -> Figure:
    """Largest error of the loss against s m, with the prediction; beyond ``failed`` it is inf."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.4))
    for (name, error), colour, dash, mark in zip(
        errors.items(), (ORANGE, BLUE), DASHES, MARKS, strict=False
    ):
        axes.plot(product, error, color=colour, ls=dash, marker=mark, ms=3)
        last = int(error.isfinite().nonzero().max())
        end = (float(product[last]), float(error[last]))
        axes.annotate(
            name, end, (-14, 8), textcoords="offset points", color=colour, ha="right"
        )  # fmt: skip
    axes.plot(product, predicted, color=INK, lw=1, ls="-")
    early = len(product) // 4
    axes.annotate(
        r"$2^{-24} s\,e^{sm}$", (float(product[early]), float(predicted[early])), (-4, 10),
        textcoords="offset points", color=INK, ha="right",
    )  # fmt: skip
    axes.axvspan(failed, float(product[-1]), color=ORANGE, alpha=0.15, lw=0)
    axes.text(failed + 0.3, 1e-7, "not finite", color=ORANGE, va="center")
    axes.set(xlabel="scale × margin", ylabel="largest error (nats)", yscale="log")
    axes.set(xlim=(product[0], product[-1]), ylim=(1e-8, 10))
    return figure


def draw_roc(
    curves: Mapping[str, tuple[Tensor, Tensor]], rate: Callable[[Tensor, Tensor], float]
) -> Figure:
    """Answerable queries accepted against unanswerable ones accepted, over all thresholds.

    Args:
        curves: name -> best cosines with an answer (N,), and without (M,).
        rate: the number to print behind the name.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(4.6, 3.6))
    axes.plot([0, 1], [0, 1], color=INK, lw=0.8, ls="-")
    for (name, (with_answer, without)), colour, dash in zip(
        curves.items(), COLOURS, DASHES, strict=False
    ):
        threshold = torch.cat([with_answer, without]).sort(descending=True).values
        accepted = [(group.unsqueeze(1) >= threshold).double().mean(0) for group in
                    (without, with_answer)]  # fmt: skip
        label = f"{name}, AUC {rate(with_answer, without):.2f}"
        axes.plot(*accepted, color=colour, ls=dash, label=label)
    axes.set(xlabel="unanswerable queries accepted", ylabel="answerable queries accepted")
    axes.set(xlim=(0, 1), ylim=(0, 1.01))
    axes.legend(loc="lower right")
    return figure
