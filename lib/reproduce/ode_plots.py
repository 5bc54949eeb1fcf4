"""The pictures of chapter ``ode``: orders, regions, the essay's fit, cycles, eigenvalues."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lib.book import BLUE, GREEN, INK, ORANGE, PINK
from lib.ode import step

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_cycle", "draw_fit", "draw_memory", "draw_orders", "draw_regions"]

COLOURS = (BLUE, GREEN, ORANGE, PINK)
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
MARKS = "os^D"


def draw_orders(sizes: Sequence[float], errors: Mapping[str, Sequence[float]]) -> Figure:
    """Error against step size for at most four methods, named at the larger end."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.2))
    for (name, values), colour, dash, mark in zip(
        errors.items(), COLOURS, DASHES, MARKS, strict=True
    ):
        axes.loglog(sizes, values, color=colour, ls=dash, marker=mark)
        axes.text(sizes[0] * 1.12, values[0], name, color=colour, va="center")
    axes.set(xlabel="step size", ylabel="error at the end", xlim=(sizes[-1] / 1.3, sizes[0] * 2.4))
    axes.set_xticks(list(sizes), [f"{size:.2f}" for size in sizes])
    axes.minorticks_off()
    return figure


def draw_regions() -> Figure:
    """Where one step does not enlarge y' = lambda y, by the product of lambda and the step."""
    import matplotlib.pyplot as plt

    x, w = torch.meshgrid(torch.linspace(-4, 2, 180), torch.linspace(-3, 3, 180), indexing="xy")
    z = torch.complex(x.double(), w.double())
    figure, axes = plt.subplots(figsize=(5.4, 3.5))
    axes.axvspan(-4, 0, color=PINK, alpha=0.14, lw=0)
    axes.axvline(0, color=PINK, ls=DASHES[3])
    axes.text(-3.92, -2.9, "implicit midpoint:\nthe whole half plane", color=PINK, fontsize=9)
    places = ((-1.45, 0.0), (-1.3, 1.35), (-2.4, 2.35))
    for name, colour, dash, place in zip(
        ("euler", "heun", "rk4"), COLOURS, DASHES, places, strict=False
    ):
        grown = step(lambda t, y: z * y, 0.0, 1.0, torch.ones_like(z), method=name).abs()
        axes.contour(x, w, grown, levels=[1], colors=[colour], linestyles=[dash], linewidths=1.8)
        axes.text(*place, name, color=colour)
    axes.set(aspect="equal", xlabel="real part of λ Δt", ylabel="imaginary part")
    return figure


def draw_fit(
    times: Tensor,
    seen: Tensor,
    dense: Tensor,
    curves: Mapping[str, Tensor],
    losses: Mapping[str, Sequence[float]],
) -> Figure:
    """Left, the table and the fitted curves; right, the loss of each fit against its steps."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(6.4, 3.3))
    for (name, path), colour, dash in zip(curves.items(), (ORANGE, BLUE), DASHES, strict=False):
        left.plot(dense, path, color=colour, ls=dash)
        loss = losses[name]
        right.loglog(range(1, len(loss) + 1), loss, color=colour, ls=dash)
    left.plot(times, seen[:, 0], "o", color=INK, markerfacecolor="none")
    left.plot(times, seen[:, 1], "s", color=INK, markerfacecolor="none")
    left.text(31, 300, "species 2", color=INK, ha="right")
    left.text(22, 215, "species 1", color=INK)
    left.set(xlabel="time", ylabel="population")
    first, second = curves
    right.text(120, 1e5, first, color=ORANGE)
    right.text(1.2, 2, second.replace("-", "-\n"), color=BLUE)
    right.set(xlabel="steps", ylabel="sum of squared errors")
    return figure


def draw_cycle(years: Tensor, pelts: Tensor, dense: Tensor, curve: Tensor) -> Figure:
    """Pelts counted (T, 2) and the fitted cycle (dense, 2)."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.2))
    for i, (name, colour, dash, mark) in enumerate(
        (("hare", BLUE, DASHES[0], "o"), ("lynx", ORANGE, DASHES[1], "s"))
    ):
        axes.plot(dense, curve[:, i], color=colour, ls=dash)
        axes.plot(years, pelts[:, i], mark, color=colour, ls="none")
        top = int(pelts[:, i].argmax())
        axes.annotate(
            name,
            (years[top], pelts[top, i]),
            (8, 2),
            textcoords="offset points",
            color=colour,
        )
    axes.set(xlabel="year", ylabel="pelts, thousands", xticks=range(1900, 1921, 5))
    return figure


def draw_memory(spectra: Mapping[str, Tensor], norms: Mapping[str, Tensor]) -> Figure:
    """Left, the eigenvalues of one step of each cell; right, how gradients live on."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(6.4, 3.4))
    angle = torch.linspace(-torch.pi, torch.pi, 800)
    left.plot(angle.cos(), angle.sin(), color=INK, lw=0.8, ls="-")
    for name, colour, dash, mark in zip(norms, COLOURS, DASHES, MARKS, strict=True):
        points = spectra[name]
        left.plot(points.real, points.imag, mark, color=colour, ms=3.5, alpha=0.8, ls="none")
        right.semilogy(norms[name], color=colour, ls=dash)
        right.text(len(norms[name]) * 1.02, norms[name][-1], name, color=colour, va="center")
    left.text(0.79, -0.31, "plain: most lie\nfurther left", color=BLUE)
    left.set(xlim=(0.78, 1.13), ylim=(-0.34, 0.34), xlabel="real part", ylabel="imaginary part")
    right.set(xlabel="steps back", ylabel="norm of the gradient", xlim=(0, 1.5 * len(norms[name])))
    right.set_xticks([0, 200, 400])
    return figure
