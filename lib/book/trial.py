"""The ledger put on trial: run the checks of a chapter, then run them on wrong formulas."""

from __future__ import annotations

import ast
import contextlib
import copy
import io
import random
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import matplotlib
import numpy as np
import torch

from lib.book import _check
from lib.book.chapter import Cell, Chapter
from lib.book.dataflow import check_calls, slice_of
from lib.book.ledger import label_of
from lib.book.mutants import Mutant, mutants_of

__all__ = ["LIMIT", "Trial", "try_chapter"]

LIMIT = 32  # wrong versions tried for each label
PATIENCE = 2.0  # seconds for a wrong version, over twenty times what the cell takes


@dataclass
class Trial:
    """How the check of one label fared: what it recorded, and which wrong versions it caught.

    A wrong version that crashes before it reaches ``check`` proves nothing and is not counted.
    """

    label: str
    records: list[_check.Record] = field(default_factory=list)
    killed: list[str] = field(default_factory=list)
    survived: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def tried(self) -> int:
        return len(self.killed) + len(self.survived)


class ChapterError(Exception):
    """A setup or check cell that does not run as it is printed."""


class _TooLong(BaseException):
    """A wrong version that does not come to an end."""


def try_chapter(chapter: Chapter, limit: int = LIMIT) -> dict[str, Trial]:
    """Run the setup and check cells, and each check on up to ``limit`` wrong formulas.

    Returns:
        one ``Trial`` per label, in the order of the chapter.

    Raises:
        ChapterError: if a cell fails as it stands, naming its line.
    """
    trials: dict[str, Trial] = {}
    space: dict[str, Any] = {"__name__": "__main__"}
    with _undisturbed():
        for cell in chapter.code("setup", "check"):
            _try_cell(chapter, cell, limit, space, trials)
    return trials


def _try_cell(
    chapter: Chapter, cell: Cell, limit: int, space: dict[str, Any], trials: dict[str, Trial]
) -> None:
    tree = cell.tree()
    trying = limit > 0 and check_calls(tree)
    before = _Snapshot(space, tree) if trying else None
    start = time.perf_counter()
    for record in _run_as_printed(chapter, cell, tree, space):
        trials.setdefault(record.label, Trial(record.label)).records.append(record)
    patience = PATIENCE + 20 * (time.perf_counter() - start)
    if before is None:
        return
    after, states = dict(space), _random_states()
    for label, mutants in _mutants(tree).items():
        _try_label(trials.setdefault(label, Trial(label)), mutants, limit, tree, before, patience)
    space.clear()
    space.update(after)
    _set_random_states(states)


def _run_as_printed(
    chapter: Chapter, cell: Cell, tree: ast.Module, space: dict[str, Any]
) -> list[_check.Record]:
    known = len(_check.recorded())
    code = compile(tree, f"<{chapter.path.name}:{cell.line}>", "exec")
    try:
        with _quietly():
            exec(code, space)
    except Exception as error:
        raise ChapterError(f"{chapter.path.name}:{cell.line}: {error!r}") from error
    return list(_check.recorded()[known:])


def _mutants(tree: ast.Module) -> dict[str, list[Mutant]]:
    """For each label the wrong versions of what feeds ``printed=`` and nothing else."""
    roots: dict[str, dict[tuple[ast.AST, str | None], None]] = {}
    for call in check_calls(tree):
        label, given = label_of(call), {keyword.arg: keyword for keyword in call.keywords}
        if label is None or "printed" not in given:
            continue
        printed = given.pop("printed")
        own = slice_of(tree, call, [printed.value]).pieces
        own -= slice_of(tree, call, [keyword.value for keyword in given.values()]).pieces
        found = roots.setdefault(label, {(printed, "value"): None})
        found[printed, "value"] = None
        for piece in sorted(own, key=lambda piece: getattr(piece.node, "lineno", 0)):
            found[piece.node, piece.formula] = None
    return {label: mutants_of(found) for label, found in roots.items()}


def _try_label(
    trial: Trial,
    mutants: list[Mutant],
    limit: int,
    tree: ast.Module,
    before: _Snapshot,
    patience: float,
) -> None:
    start = time.perf_counter()
    for mutant in mutants[: 3 * limit]:
        if trial.tried >= limit:
            break
        caught = _catches(trial.label, mutant, tree, before, patience)
        if caught is not None:
            (trial.killed if caught else trial.survived).append(mutant.description)
    trial.seconds += time.perf_counter() - start


def _catches(
    label: str, mutant: Mutant, tree: ast.Module, before: _Snapshot, patience: float
) -> bool | None:
    """Whether ``check`` catches the wrong version; None if that crashes or does not end."""
    before.restore()

    def only_this(name: str, **values: Any) -> None:
        if name == label:
            _check.check(name, **values)

    before.space["check"] = only_this
    mutant.put(mutant.wrong)
    try:
        code = compile(ast.fix_missing_locations(tree), "<wrong>", "exec")
        with _quietly(), _check.unrecorded(), _time_limit(patience):
            exec(code, before.space)
    except (Exception, _TooLong) as error:
        frames = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
        return True if _check.check.__code__ in frames else None
    finally:
        mutant.put(mutant.right)
    return False


class _Snapshot:
    """The variables and random states before a cell, to run it many times from one start."""

    def __init__(self, space: dict[str, Any], tree: ast.Module) -> None:
        self.space = space
        self._values = dict(space)
        used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        self._copies = {name: _copied(space[name]) for name in used & space.keys()}
        self._states = _random_states()

    def restore(self) -> None:
        self.space.clear()
        self.space.update(self._values)
        self.space.update({name: _copied(value) for name, value in self._copies.items()})
        _set_random_states(self._states)


def _copied(value: Any) -> Any:
    """A copy of what a cell could change in place; anything else as it is."""
    if isinstance(value, torch.Generator):
        twin = torch.Generator(value.device)
        twin.set_state(value.get_state())
        return twin
    if isinstance(value, torch.Tensor) and not value.is_leaf:
        return value.clone()
    changeable = (torch.Tensor, torch.nn.Module, np.ndarray, np.random.Generator, list, dict, set)
    if isinstance(value, changeable):
        with contextlib.suppress(Exception):
            return copy.deepcopy(value)
    return value


def _random_states() -> tuple[Any, ...]:
    legacy = np.random.get_state()  # noqa: NPY002 - chapters may draw from the global state
    return random.getstate(), legacy, torch.get_rng_state()


def _set_random_states(states: tuple[Any, ...]) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    torch.set_rng_state(states[2])


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Leave the random states, torch's default dtype and the style of figures as they were."""
    states, dtype = _random_states(), torch.get_default_dtype()
    try:
        with matplotlib.rc_context():
            yield
    finally:
        _set_random_states(states)
        torch.set_default_dtype(dtype)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        yield
        return

    def stop(*_: Any) -> None:
        raise _TooLong

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
