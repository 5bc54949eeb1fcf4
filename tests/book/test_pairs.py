"""Every chapter's Markdown and notebook hold the same cells, and no notebook stores outputs.

Independent of file times, which mean nothing in a fresh clone.
"""

from __future__ import annotations

from pathlib import Path

import jupytext
import nbformat
import pytest

from lib.book.pairs import chapter_sources, write_pairs

ROOT = Path(__file__).resolve().parents[2]
SOURCES = chapter_sources(ROOT)
MAKE = "run `make pairs`"

each = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)


def out_of_step(source):
    """Cells in which a chapter and its notebook differ."""
    ours = _cells(jupytext.read(source))
    theirs = _cells(nbformat.read(source.with_suffix(".ipynb"), as_version=4))
    if len(ours) != len(theirs):
        return [f"{len(ours)} cells and {len(theirs)}"]
    return [a for a, b in zip(ours, theirs, strict=True) if a != b]


def stored(notebook):
    """Code cells that keep outputs or a count."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [cell.source for cell in code if cell.outputs or cell.execution_count is not None]


def _cells(notebook):
    return [
        (c.cell_type, c.source, c.metadata.get("tags", []), c.metadata.get("mystnb", {}))
        for c in notebook.cells
    ]


@pytest.fixture
def pair(tmp_path):
    (tmp_path / "chapters").mkdir()
    (tmp_path / "_config.yml").write_text("repository:\n  url: https://example.org/a/b\n")
    source = tmp_path / "chapters/x.md"
    source.write_text(
        "---\nkernelspec: {display_name: Python 3, language: python, name: python3}\n---\n"
        "\n# X\n\n```{code-cell}\n:tags: [check]\n\n1 + 1\n```\n"
    )
    write_pairs(tmp_path)
    return source


@pytest.mark.parametrize(("old", "new"), [("1 + 1", "1 + 2"), ("# X", "# Y"), ("[check]", "[a]")])
def test_a_change_in_one_of_the_pair_is_seen(pair, old, new):
    assert not out_of_step(pair)
    pair.write_text(pair.read_text().replace(old, new))
    assert out_of_step(pair)


def test_a_new_cell_is_seen(pair):
    pair.write_text(pair.read_text() + "\n```{code-cell}\n2\n```\n")
    assert out_of_step(pair) == ["3 cells and 2"]


def test_stored_outputs_are_seen(pair):
    notebook = nbformat.read(pair.with_suffix(".ipynb"), as_version=4)
    assert not stored(notebook)
    notebook.cells[1].execution_count = 3
    assert stored(notebook) == ["1 + 1"]
    notebook.cells[1].execution_count = None
    notebook.cells[1].outputs = [nbformat.v4.new_output("stream", text="2")]
    assert stored(notebook) == ["1 + 1"]


def test_every_notebook_has_a_source():
    notebooks = {path.stem for path in (ROOT / "chapters").glob("*.ipynb")}
    assert notebooks == {path.stem for path in SOURCES}, MAKE


@each
def test_the_pair_is_in_step(source):
    assert not out_of_step(source), MAKE


@each
def test_no_outputs_are_stored(source):
    notebook = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    nbformat.validate(notebook)
    assert not stored(notebook), MAKE
