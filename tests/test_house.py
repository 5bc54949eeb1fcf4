"""The house keeps its own rules: who imports whom, one public address, a wheel that is whole."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import lib
from lib.book.pairs import chapter_sources, public_address, write_pairs

ROOT = Path(__file__).resolve().parents[1]
STEMS = ("vae", "crf", "nce", "ode", "margin", "mixup", "nice", "vae_clustering")
PRESENT = [
    s for s in STEMS if (ROOT / f"lib/{s}.py").exists() or (ROOT / f"lib/{s}/__init__.py").exists()
]


@functools.cache
def _modules_after(statement):
    code = f"import sys; {statement}; print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("stem", PRESENT)
def test_a_stem_pulls_in_torch_alone(stem):
    with_torch = _modules_after("import torch, numpy, torch.distributions")
    new = {name.split(".")[0] for name in _modules_after(f"import lib.{stem}") - with_torch}
    unwanted = {"matplotlib", "IPython", "scipy", "sklearn", "tqdm", "pooch", "lightning_fabric"}
    assert not new & unwanted


@pytest.mark.parametrize("stem", PRESENT)
def test_a_stem_knows_nothing_of_the_other_rooms(stem):
    ours = {name for name in _modules_after(f"import lib.{stem}") if name.startswith("lib.")}
    rooms = {name.split(".")[1] for name in ours}
    assert not rooms & {"data", "book", "training", "reproduce"}
    assert len(rooms & set(STEMS)) <= 2


@pytest.mark.parametrize("stem", PRESENT)
def test_public_names_are_declared_and_documented(stem):
    module = __import__(f"lib.{stem}", fromlist=["__all__"])
    for name in module.__all__:
        thing = getattr(module, name)
        assert not callable(thing) or (thing.__doc__ and len(thing.__doc__) > 20), name


def test_lib_is_this_one():
    assert Path(lib.__file__).resolve().parent == ROOT / "lib"


def test_one_public_address():
    address = public_address(ROOT)
    for page in [ROOT / "README.md", ROOT / "CITATION.cff", *chapter_sources(ROOT)]:
        assert address in page.read_text(), f"{page.name} does not name {address}: run `make pairs`"


def test_both_licences_are_there_in_full():
    code, text = (ROOT / "LICENSE").read_text(), (ROOT / "LICENSE-TEXT").read_text()
    assert code.startswith("MIT License")
    assert "LICENSE-TEXT" in code
    assert text.startswith("Attribution 4.0 International")
    assert [number for number in range(1, 9) if f"Section {number} -- " in text] == [*range(1, 9)]


def test_pairs_are_written_one_way(tmp_path):
    (tmp_path / "chapters").mkdir()
    (tmp_path / "_config.yml").write_text("repository:\n  url: https://example.org/a/b\n")
    page = tmp_path / "chapters/x.md"
    page.write_text(
        "---\nkernelspec:\n  display_name: Python 3\n  name: python3\n---\n\n# X\n\n"
        '```{code-cell}\n%pip install "d @ git+https://example.org/old"\n```\n'
    )
    (tmp_path / "chapters/plain.md").write_text("# Plain\n")
    (tmp_path / "README.md").write_text("`d @ git+https://example.org/old` https://kexue.fm\n")
    (tmp_path / "CITATION.cff").write_text('repository-code: "https://example.org/old"\n')
    (first,) = write_pairs(tmp_path)
    assert "git+https://example.org/a/b" in page.read_text()
    assert (tmp_path / "README.md").read_text() == (
        "`d @ git+https://example.org/a/b` https://kexue.fm\n"
    )
    citation = (tmp_path / "CITATION.cff").read_text()
    assert citation == 'repository-code: "https://example.org/a/b"\n'
    before = first.read_text()
    write_pairs(tmp_path)
    assert first.read_text() == before, "ids of unchanged cells must stay"


def test_wheel_holds_lib_and_nothing_else(tmp_path):
    build = [sys.executable, "-m", "uv", "build", "--wheel", "-q", "-o", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"lib"}
    for path in (ROOT / "lib").rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            assert path.relative_to(ROOT).as_posix() in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def _statements(path):
    return ast.walk(ast.parse(path.read_text()))


def test_no_test_is_switched_off_for_good():
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in _statements(path):
            if isinstance(node, ast.Attribute) and node.attr in ("skip", "xfail"):
                used_as_mark = isinstance(node.value, ast.Attribute) and node.value.attr == "mark"
                assert not used_as_mark, f"{path.name}:{node.lineno}: unconditional {node.attr}"
