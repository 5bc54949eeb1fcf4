"""The pictures of chapter ``crf``: the lattice, the transition tables, the reliability plot."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lib.book import BLUE, GREEN, INK, ORANGE
from lib.crf import LinearChainCRF
from lib.reproduce.segmentation import TAGS, words_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_lattice", "draw_reliability", "draw_transitions"]

COLOURS, DASHES = (BLUE, ORANGE, GREEN), ("-", (0, (4, 1.5)), (0, (1.2, 1.2)))
MEANINGS = {"s": "s  alone", "b": "b  begins", "m": "m  middle", "e": "e  ends"}
CJK = ("Noto Sans CJK SC", "Noto Sans SC", "PingFang SC", "Microsoft YaHei", "SimHei")


def _fonts() -> list[str]:
    """DejaVu and the Chinese fonts of this machine.

    Where there is none the figure keeps its characters as text, which a browser draws in a font of
    its own: the warning about missing glyphs would mislead.
    """
    from matplotlib import font_manager

    known = {font.name for font in font_manager.fontManager.ttflist}
    found = [name for name in CJK if name in known]
    if not found:
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")
    return ["DejaVu Sans", *found]


def draw_lattice(text: str, chain: LinearChainCRF, k: int = 3) -> Figure:
    """Every tag and arrow of one sentence by its probability, and the ``k`` best paths.

    Args:
        text: the characters, as many as ``chain`` has positions.
        chain: a distribution with batch size 1.
        k: number of paths, at most 3.
    """
    import matplotlib.pyplot as plt

    node, pair = chain.marginals[0].detach(), chain.pair_marginals[0].detach()
    scores, paths = chain.topk(k)
    shares = (scores[0] - chain.log_partition).exp().tolist()
    fonts = _fonts()
    figure, axes = plt.subplots(figsize=(6.4, 3.6))
    for t, i, j in (pair > 2e-3).nonzero().tolist():
        share = float(pair[t, i, j])
        axes.plot(
            [t, t + 1],
            [-i, -j],
            color=INK,
            ls="-",
            solid_capstyle="round",
            lw=0.7 + 11 * share,
            alpha=0.3,
            zorder=1,
        )
    for rank, path in enumerate(paths[0].tolist()):
        height = [-tag + 0.11 * (1 - rank) for tag in path]
        axes.plot(range(len(text)), height, color=COLOURS[rank], ls=DASHES[rank], lw=1.8, zorder=3)
        label = f"{shares[rank]:.0%}  {' / '.join(words_of(text, path))}"
        axes.text(
            0, -4.15 - 0.55 * rank, label, color=COLOURS[rank], family=fonts, size=10, va="center"
        )
        axes.plot([-0.85, -0.15], [-4.15 - 0.55 * rank] * 2, color=COLOURS[rank], ls=DASHES[rank])
    for t, character in enumerate(text):
        axes.text(t, 0.75, character, ha="center", va="center", size=15, family=fonts)
        axes.scatter([t] * 4, range(0, -4, -1), s=8, color=INK, alpha=0.5, zorder=2)
        axes.scatter([t] * 4, range(0, -4, -1), s=260 * node[t], color=INK, alpha=0.45, zorder=2)
    for i, tag in enumerate(TAGS):
        axes.text(-1.55, -i, MEANINGS[tag], va="center", size=9)
    axes.set(xlim=(-1.6, len(text) - 0.6), ylim=(-4.4 - 0.55 * (k - 1), 1.2))
    axes.axis("off")
    return figure


def draw_transitions(tables: Mapping[str, Tensor], allowed: Tensor) -> Figure:
    """Transition tables (4, 4) side by side; × marks what the scheme forbids."""
    import matplotlib.pyplot as plt
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("transitions", [ORANGE, "#f4f4f4", BLUE])
    top = max(float(table.abs().max()) for table in tables.values())
    figure, row = plt.subplots(1, len(tables), figsize=(6.4, 3.2), sharey=True)
    for axes, (name, table) in zip(row, tables.items(), strict=True):
        axes.imshow(table, cmap=colours, vmin=-top, vmax=top)
        for i in range(4):
            for j in range(4):
                number = f"{table[i, j]:.2f}".replace("-", "−")
                axes.text(j, i, number, ha="center", va="center", color="#202428")
                if not allowed[i, j]:
                    axes.text(j + 0.34, i - 0.3, "×", ha="center", va="center", color="#202428")
        axes.set(xticks=range(4), yticks=range(4), xticklabels=TAGS, yticklabels=TAGS)
        axes.set_xlabel(f"to\n{name}")
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
    row[0].set_ylabel("from")
    return figure


def draw_reliability(curves: Mapping[str, tuple[Tensor, Tensor]], bins: Sequence[float]) -> Figure:
    """How often words of a stated probability are right.

    Args:
        curves: name -> (probabilities (N,), right (N,)).
        bins: edges of the probability bins, from 0 to 1.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5.2, 3.6))
    axes.plot([0, 1], [0, 1], color=INK, lw=0.8, ls="-")
    axes.text(0.52, 0.47, "perfect", color=INK, size=9)
    marks = zip(curves.items(), COLOURS, DASHES, "os^", strict=False)
    for (name, (probability, right)), colour, dash, mark in marks:
        which = torch.bucketize(probability, torch.tensor(bins[1:-1]))
        rows = [which == i for i in range(len(bins) - 1)]
        rows = [chosen for chosen in rows if chosen.sum() > 20]
        stated = torch.stack([probability[chosen].mean() for chosen in rows])
        found = torch.stack([right[chosen].float().mean() for chosen in rows])
        axes.plot(stated, found, color=colour, ls=dash, marker=mark, label=name)
    axes.set(xlabel="stated probability of a word", ylabel="share of them right")
    axes.set(xlim=(0, 1.02), ylim=(0, 1.02))
    axes.legend(loc="upper left")
    return figure
