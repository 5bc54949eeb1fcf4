"""Interleaved timing of rivals in one process, and a plain table of the outcome.

Machines drift, so rivals take turns - A B C, C B A, A B C ... - and are compared round by round:
a ratio is the median over rounds of that round's ratio, never a ratio of two averages.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

__all__ = ["arguments", "interleave", "median_ms", "print_table", "ratio"]


def arguments(description: str, *, rounds: int = 5, threads: int = 2) -> argparse.Namespace:
    """Parse ``--rounds`` and ``--threads``, and set the number of torch threads."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=rounds, help="rounds per comparison")
    parser.add_argument("--threads", type=int, default=threads, help="torch threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    return options


def interleave(
    rivals: Mapping[str, Callable[[], object]],
    rounds: int = 5,
    *,
    seconds: float = 0.1,
    warmup: int = 2,
    device: str | torch.device = "cpu",
) -> dict[str, list[float]]:
    """Time every rival once a round, in an order that is reversed from round to round.

    Args:
        rivals: name -> a call without arguments.
        rounds: number of rounds, each giving one time per rival.
        seconds: a rival is repeated within its turn until about this long has passed.
        warmup: untimed calls of each rival before the first round.
        device: where the work happens; CUDA is synchronised around each turn.

    Returns:
        name -> seconds per call, one figure a round.
    """
    synchronize = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None

    def turn(call: Callable[[], object], repeats: int) -> float:
        synchronize()
        begin = time.perf_counter()
        for _ in range(repeats):
            call()
        synchronize()
        return (time.perf_counter() - begin) / repeats

    repeats = {}
    for name, call in rivals.items():
        turn(call, warmup)
        repeats[name] = max(1, round(seconds / max(turn(call, 1), 1e-6)))
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for round_number in range(rounds):
        names = list(rivals) if round_number % 2 == 0 else list(rivals)[::-1]
        for name in names:
            times[name].append(turn(rivals[name], repeats[name]))
    return times


def median_ms(times: Sequence[float]) -> float:
    """The median in milliseconds."""
    return 1e3 * statistics.median(times)


def ratio(times: Mapping[str, Sequence[float]], slow: str, fast: str) -> float:
    """How many times faster ``fast`` is than ``slow``: the median of the rounds' ratios."""
    pairs = zip(times[slow], times[fast], strict=True)
    return statistics.median(a / b for a, b in pairs)


def print_table(title: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print aligned columns; floats get three significant digits, None an em dash."""

    def text(cell: object) -> str:
        if cell is None:
            return "—"
        return f"{cell:.3g}" if isinstance(cell, float) else str(cell)

    lines = [list(header), *([text(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print(f"\n{title}")
    for number, line in enumerate(lines):
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
        if number == 0:
            print("  ".join("-" * width for width in widths))
