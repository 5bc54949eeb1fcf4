"""``check``: a printed formula, an independent oracle and the library, held against each other."""

from __future__ import annotations

import contextlib
import html
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from lib.book._display import emit

__all__ = ["STEMS", "Record", "check", "recorded"]

STEMS = ("vae", "crf", "nce", "ode", "margin", "mixup", "nice", "vae_clustering")
RTOL, ATOL = 1e-9, 1e-12  # what two roads to the same double differ by
LOOSEST_RTOL, LOOSEST_ATOL = 1e-5, 1e-9  # where an oracle is itself an approximation
LOOSEST_SAMPLING = 0.1  # four standard errors of a Monte Carlo oracle, relative to what is printed

_records: list[Record] = []


@dataclass(frozen=True)
class Record:
    """One passed check, as the ledger keeps it.

    ``error`` is the largest difference, relative where the oracle exceeds 1 in size; for a
    Monte Carlo oracle it is counted in standard errors; for integers it is 0.
    """

    label: str
    by: str
    against_lib: bool
    tolerance: str
    error: float
    verdict: str

    def __repr__(self) -> str:
        return f"{self.label}: {self.verdict}"

    def _repr_html_(self) -> str:
        label = html.escape(self.label)
        return (
            '<div class="formula-check" style="font-size: 0.85em; opacity: 0.8">'
            f'<a href="#equation-{label}">{label}</a>: {html.escape(self.verdict)}</div>'
        )


def check(
    label: str,
    *,
    printed: ArrayLike | Tensor,
    oracle: ArrayLike | Tensor,
    lib: ArrayLike | Tensor | None = None,
    by: str = "",
    rtol: float = RTOL,
    atol: float = ATOL,
    standard_error: ArrayLike | Tensor | None = None,
) -> None:
    """Hold a printed formula against an independent oracle and the library's value.

    ``|printed - oracle| <= atol + rtol * |oracle|`` and ``|lib - printed| <= atol + rtol *
    |printed|``, element by element; with ``standard_error`` the first becomes ``|printed - oracle|
    <= 4 * standard_error``. Integers and booleans must be equal. One quiet line says so.

    Args:
        label: name of the display equation, ``eq-<stem>-<name>``.
        printed: the formula as printed, transcribed literally; float64, or integers.
        oracle: the same quantity by an independent road; same shape.
        lib: the library's value, if it computes this quantity; same shape.
        by: a few words that name the oracle, such as ``"enumeration"`` or ``"autograd"``.
        rtol: relative tolerance, at most 1e-5: what is further off is another number.
        atol: absolute tolerance, at most 1e-9.
        standard_error: of a Monte Carlo oracle; a positive scalar or of the same shape; four of
            them may make at most a tenth of the largest printed value.

    Raises:
        AssertionError: if two values differ by more than the tolerance.
        TypeError: if ``printed`` is not in double precision.
        ValueError: if shapes differ (nothing is broadcast), a value is empty or not finite, or a
            tolerance is too loose to tell a right formula from a wrong one.

    >>> x = np.array([0.25, -1.5])  # exact in binary
    >>> check("eq-crf-square", printed=(x + 1) ** 2, oracle=x * x + 2 * x + 1, by="expansion")
    eq-crf-square: printed = oracle, error 0
    """
    if not label.startswith("eq-"):
        raise ValueError(f"label must read eq-<stem>-<name>, got {label!r}")
    if not (0 <= rtol <= LOOSEST_RTOL and 0 <= atol <= LOOSEST_ATOL):
        raise ValueError(
            f"{label}: rtol must be in [0, {short(LOOSEST_RTOL)}] and atol in "
            f"[0, {short(LOOSEST_ATOL)}], got {rtol}, {atol}; a Monte Carlo oracle has a "
            "standard_error instead"
        )
    values = {
        "printed": _array(label, "printed", printed),
        "oracle": _array(label, "oracle", oracle),
    }
    if lib is not None:
        values["lib"] = _array(label, "lib", lib)
    shapes = {name: value.shape for name, value in values.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"{label}: shapes must be the same, got {shapes}")

    if all(value.dtype.kind in "biu" for value in values.values()):
        record = _compare_integers(label, by, values)
    elif values["printed"].dtype not in (np.float64, np.complex128):
        raise TypeError(f"{label}: printed must be float64, got {values['printed'].dtype}")
    else:
        unit = None if standard_error is None else _array(label, "standard_error", standard_error)
        record = _compare(label, by, values, rtol, atol, unit)
    _records.append(record)
    emit(record)


def recorded() -> tuple[Record, ...]:
    """Every check passed so far in this process, in order."""
    return tuple(_records)


def short(number: float) -> str:
    """One digit and the power of ten: 3e-16, 1e-9, 0."""
    return f"{number:.0e}".replace("e-0", "e-") if number else "0"


@contextlib.contextmanager
def unrecorded() -> Iterator[None]:
    """Forget the checks passed inside."""
    known = len(_records)
    try:
        yield
    finally:
        del _records[known:]


def _array(label: str, name: str, value: Any) -> np.ndarray:
    """``value`` as a non-empty, finite NumPy array of numbers."""
    if isinstance(value, Tensor):
        if value.dtype == torch.bfloat16:  # which NumPy does not know
            raise TypeError(f"{label}: {name} must be float64, got {value.dtype}")
        value = value.detach().cpu().resolve_conj().numpy()
    array = np.asarray(value)
    if array.dtype.kind not in "biufc":
        raise TypeError(f"{label}: {name} must hold numbers, got {array.dtype}")
    if array.size == 0:
        raise ValueError(f"{label}: {name} is empty, shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{label}: {name} has {(~np.isfinite(array)).sum()} values not finite")
    return array


def _compare_integers(label: str, by: str, values: dict[str, np.ndarray]) -> Record:
    for other in list(values)[1:]:
        wrong = values["printed"] != values[other]
        if wrong.any():
            at = tuple(int(i) for i in np.argwhere(wrong)[0])
            raise AssertionError(
                f"{label}: printed and {other} differ in {wrong.sum()} of {wrong.size} places, "
                f"first at {at}: {values['printed'][at]} and {values[other][at]}"
            )
    return Record(label, by, "lib" in values, "exact", 0.0, f"{' = '.join(values)}, exactly")


def _compare(
    label: str,
    by: str,
    values: dict[str, np.ndarray],
    rtol: float,
    atol: float,
    standard_error: np.ndarray | None,
) -> Record:
    oracle, printed = np.abs(values["oracle"]), np.abs(values["printed"])
    names, against_lib = " = ".join(values), "lib" in values
    off = 0.0
    if against_lib:
        off = _within(label, "lib", values, atol + rtol * printed, np.maximum(printed, 1))
    if standard_error is None:
        error = _within(label, "oracle", values, atol + rtol * oracle, np.maximum(oracle, 1))
        error = max(error, off)
        verdict = f"{names}, error {short(error)}"
        tolerance = short(rtol) + (f" + {short(atol)}" if atol > ATOL else "")
        return Record(label, by, against_lib, tolerance, error, verdict)
    if standard_error.shape not in ((), oracle.shape) or not (standard_error > 0).all():
        raise ValueError(
            f"{label}: standard_error must be positive and a scalar or of shape {oracle.shape}, "
            f"got shape {standard_error.shape}, smallest {standard_error.min()}"
        )
    if 4 * standard_error.max() > LOOSEST_SAMPLING * printed.max():
        raise ValueError(
            f"{label}: four standard errors, {4 * standard_error.max():.2g}, are more than a tenth "
            f"of the largest printed value, {printed.max():.2g}: draw more samples"
        )
    error = _within(label, "oracle", values, 4 * standard_error, standard_error)
    verdict = f"{names} within {error:.1f} standard errors"
    return Record(label, by, against_lib, "4 standard errors", error, verdict)


def _within(
    label: str,
    other: str,
    values: dict[str, np.ndarray],
    allowed: np.ndarray,
    unit: np.ndarray,
) -> float:
    """The largest difference from ``printed``, in ``unit``; an error where it is not allowed."""
    gap = np.abs(values["printed"] - values[other])
    if (gap > allowed).any():
        at = np.unravel_index(np.argmax(gap - allowed), gap.shape)
        raise AssertionError(
            f"{label}: printed and {other} differ by {gap[at]:.3g} at {tuple(int(i) for i in at)}, "
            f"allowed {np.broadcast_to(allowed, gap.shape)[at]:.3g}: "
            f"{values['printed'][at]} and {values[other][at]}"
        )
    return float((gap / unit).max())
