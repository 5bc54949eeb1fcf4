"""Hand nbval's run of a chapter to the book build, so that each chapter is executed once.

When every cell of chapters/X.ipynb has passed, its outputs go into the jupyter-cache that
``jupyter-book build`` reads.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "_ext"))

import execution_cache  # noqa: E402

_failed: set[Path] = set()
_outputs: dict[Path, list] = defaultdict(list)


def pytest_configure(config):
    is_worker = hasattr(config, "workerinput")
    if config.getoption("nbval_lax", False):
        from nbval.kernel import RunningKernel

        RunningKernel.execute_cell_input = _execute
        if not is_worker:
            execution_cache.refresh()


def _execute(self, cell_input, allow_stdin=None):
    """As nbval does, but with a history, in which IPython looks for a semicolon at the end."""
    return self.kc.execute(cell_input, allow_stdin=allow_stdin, stop_on_error=False)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    if report.when == "call" and hasattr(item, "cell_num"):
        if report.outcome != "passed" or item.cell_num != len(_outputs[item.path]):
            _failed.add(item.path)
        _outputs[item.path].append(item.test_outputs or [])


def pytest_runtest_teardown(item, nextitem):
    path = getattr(item, "path", None)
    if path in _outputs and (nextitem is None or nextitem.path != path):
        outputs = _outputs.pop(path)
        if path not in _failed and path.with_suffix(".md").exists():
            _store(path.with_suffix(".md"), outputs)


def _store(source: Path, outputs: list) -> None:
    import jupytext
    import nbformat
    from jupyter_cache import get_cache
    from jupyter_cache.base import CacheBundleIn

    notebook = jupytext.read(source)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if len(code) != len(outputs):
        return
    for number, (cell, output) in enumerate(zip(code, outputs, strict=True), 1):
        cell.execution_count = number
        cell.outputs = [nbformat.from_dict(entry) for entry in output]
    get_cache(execution_cache.BUILD / ".jupyter_cache").cache_notebook_bundle(
        CacheBundleIn(notebook, str(source)), check_validity=False, overwrite=True
    )
