"""Write every chapter's notebook from its Markdown: ``python -m lib.book.pairs``.

One way only: the Markdown is the source. The public address in the chapters' install line, in
README.md and in CITATION.cff is taken from ``_config.yml``. Unchanged cells keep their ids, so the
notebooks' diffs stay small.
"""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["chapter_sources", "public_address", "write_pairs"]

_ADDRESS = re.compile(r"(git\+|repository-code: \")https://[^\s\"'`]+")


def public_address(root: Path) -> str:
    """The address of the repository, as ``_config.yml`` names it."""
    match = re.search(r"^repository:\s*\n\s+url:\s*(\S+)", (root / "_config.yml").read_text(), re.M)
    if match is None:
        raise ValueError(f"{root / '_config.yml'} must name repository: url:")
    return match.group(1)


def chapter_sources(root: Path) -> list[Path]:
    """The Markdown files of ``chapters/`` that are notebooks: those that name a kernel."""
    pages = sorted((root / "chapters").glob("*.md"))
    return [page for page in pages if "\nkernelspec:" in page.read_text().split("\n---", 1)[0]]


def write_pairs(root: Path) -> list[Path]:
    """Bring each chapter's install line and notebook in step, and return the notebooks."""
    import jupytext

    address, sources = public_address(root), chapter_sources(root)
    for page in [*sources, root / "README.md", root / "CITATION.cff"]:
        text = page.read_text() if page.exists() else ""
        linked = _ADDRESS.sub(rf"\g<1>{address}", text)
        if linked != text:
            page.write_text(linked)
    written = []
    for source in sources:
        target = source.with_suffix(".ipynb")
        notebook = jupytext.read(source)
        if target.exists():
            _keep_ids(notebook.cells, jupytext.read(target).cells)
        jupytext.write(notebook, target)
        written.append(target)
    return written


def _keep_ids(cells: list, old: list) -> None:
    """Give each cell the id of the first unused old cell with the same source."""
    known: dict[tuple[str, str], list[str]] = {}
    for cell in old:
        known.setdefault((cell.cell_type, cell.source), []).append(cell.get("id", ""))
    for cell in cells:
        ids = known.get((cell.cell_type, cell.source))
        if ids and ids[0]:
            cell["id"] = ids.pop(0)


if __name__ == "__main__":
    for path in write_pairs(Path.cwd()):
        print(path.relative_to(Path.cwd()))
