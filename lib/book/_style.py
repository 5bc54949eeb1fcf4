"""The house style of figures: four colours, thin ink, SVG that is the same in every run."""

from __future__ import annotations

import sys

__all__ = ["BLUE", "GREEN", "INK", "ORANGE", "PINK", "style"]

# Okabe and Ito's colours that keep a contrast of 3:1 against white and against the dark page
BLUE, GREEN, ORANGE, PINK = "#0072B2", "#009E73", "#D55E00", "#CC79A7"
INK = "#5f6871"


def style(images: bool = False) -> None:
    """Give matplotlib the style of the book; called once, in the setup cell.

    Lines come in the order BLUE, GREEN, ORANGE, PINK with a dash pattern as the second cue. Figures
    are SVG on a transparent ground: the book lays a light card under them in the dark. On Colab,
    which does not, the ground is white.

    Args:
        images: draw PNG at double resolution instead, for grids of many pictures.
    """
    import matplotlib as mpl
    from cycler import cycler

    colours = cycler(color=[BLUE, GREEN, ORANGE, PINK])
    dashes = cycler(linestyle=["-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5))])
    ground = "white" if "google.colab" in sys.modules else "none"
    mpl.rcParams.update(
        {
            "axes.axisbelow": True,
            "axes.edgecolor": INK,
            "axes.grid": False,
            "axes.labelcolor": INK,
            "axes.labelsize": 10,
            "axes.linewidth": 0.8,
            "axes.prop_cycle": colours + dashes,
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.titlesize": 10,
            "axes.titlecolor": INK,
            "figure.constrained_layout.use": True,
            "figure.dpi": 100,
            "figure.facecolor": ground,
            "figure.figsize": (6.4, 3.6),
            "axes.facecolor": "none",
            "font.size": 10,
            "grid.alpha": 0.3,
            "grid.color": INK,
            "grid.linewidth": 0.6,
            "image.cmap": "viridis",
            "legend.fontsize": 9,
            "legend.frameon": False,
            "legend.labelcolor": INK,
            "lines.linewidth": 1.8,
            "lines.markersize": 5,
            "savefig.facecolor": ground,
            "svg.fonttype": "none",
            "svg.hashsalt": "why-it-works",
            "text.color": INK,
            "xtick.color": INK,
            "xtick.labelsize": 9,
            "ytick.color": INK,
            "ytick.labelsize": 9,
        }
    )
    _choose_format("retina" if images else "svg")


def _choose_format(name: str) -> None:
    """Tell a running notebook how to store figures; elsewhere there is nothing to tell."""
    try:
        from IPython import get_ipython
        from matplotlib_inline.backend_inline import set_matplotlib_formats
    except ImportError:
        return
    if get_ipython() is not None:
        metadata = {} if name == "retina" else {"metadata": {"Date": None}}
        set_matplotlib_formats(name, **metadata)
