"""The house rules of a chapter, each tried on a chapter that breaks it, then on the book."""

from __future__ import annotations

import ast
import datetime
import re
import statistics
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lib.book.chapter import read_book, read_chapter

ROOT = Path(__file__).resolve().parents[2]
BOOK = read_book(ROOT / "chapters")
TESTS = sorted((ROOT / "tests").rglob("*.py"))
SOURCES = [
    path
    for folder in ("chapters", "lib", "tests", "benchmarks", "results", "_ext", "_static")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in {".md", ".py", ".toml", ".css", ".json", ".ipynb", ".bib"}
] + [path for path in sorted(ROOT.glob("*")) if path.suffix in {".md", ".toml", ".yml", ".cff"}]

HEADINGS = ["Claim", "What you need", "Setup", "In code", "Experiment", "Results"]
HEADINGS += ["What breaks if", "The essay, graded", "Since 2018", "Exercises", "References"]
FIELDS = ("title_zh", "title", "author", "date", "archive", "url", "claim", "modules")
DRAWING = re.compile(r"(plt|fig|figure|axe?s?(\[.*\])?|axis|panel)\.")


# The rules: each takes a chapter and says what is wrong with it


def cells_are_short(chapter):
    """Median 6 lines, nine of ten at most 15, none over 25, 79 columns; blank lines are free."""
    cells = [
        (cell, [line for line in cell.source.splitlines() if line.strip()])
        for cell in chapter.code()
    ]
    lengths = [len(lines) for _, lines in cells]
    if lengths and statistics.median(lengths) > 6:
        yield f"half of the cells have more than {statistics.median(lengths)} lines"
    long = [cell.line for cell, lines in cells if len(lines) > 15]
    if len(long) > len(cells) / 10:
        yield f"{len(long)} of {len(cells)} cells have more than 15 lines, at {long}"
    for cell, lines in cells:
        if len(lines) > 25:
            yield f"line {cell.line}: a cell of {len(lines)} lines"
        wide = [line for line in lines if len(line) > 79 and not line.lstrip().startswith("%")]
        yield from (f"line {cell.line}: {len(line)} columns: {line}" for line in wide)


def headings_are_in_order(chapter):
    """One title, then the headings of all chapters, with numbered steps after Setup."""
    titles = re.findall(r"^# +(.+?)\s*$", chapter.prose, re.MULTILINE)
    if len(titles) != 1:
        yield f"one title, not {titles}"
    found = re.findall(r"^## +(.+?)\s*$", chapter.prose, re.MULTILINE)
    steps = [heading for heading in found if re.match(r"\d+\. ", heading)]
    expected = [*HEADINGS[:3], *steps, *HEADINGS[3:]]
    if found != expected:
        at = next(
            (i for i, pair in enumerate(zip(found, expected, strict=False)) if len(set(pair)) > 1),
            min(len(found), len(expected)),
        )
        seen = (found[at : at + 1] or ["the end"])[0]
        due = (expected[at : at + 1] or ["the end"])[0]
        yield f"heading {at + 1} should be {due!r} and is {seen!r}"
    numbers = [int(heading.split(".")[0]) for heading in steps]
    if not steps or numbers != list(range(1, len(steps) + 1)):
        yield f"the steps are numbered {numbers}"


def words(chapter):
    """Words of prose: no code, mathematics, tags or addresses."""
    text = re.sub(r"\$\$.*?\$\$|\$[^$\n]+\$", " ", chapter.prose, flags=re.DOTALL)
    text = re.sub(r"<[^>]+>|\]\([^)]*\)|https?://\S+", " ", text)
    return len(re.findall(r"[^\W\d_][\w'’-]*", text))


def length_is_right(chapter):
    """Between 1,500 and 3,000 words."""
    if not 1500 <= words(chapter) <= 3000:
        yield f"{words(chapter)} words, not 1,500 to 3,000"


def draws(cell):
    """Whether a cell draws a figure, and does not just define how."""
    statements = [
        statement
        for statement in cell.tree().body
        if not isinstance(statement, ast.FunctionDef | ast.Import | ast.ImportFrom)
    ]
    calls = [n for s in statements for n in ast.walk(s) if isinstance(n, ast.Call)]
    names = [ast.unparse(call.func) for call in calls]
    return any(DRAWING.match(name) or re.match(r"(draw|plot)_?", name) for name in names)


def figures_speak(chapter):
    """Alt text of 8 to 40 words that says the finding, on each cell that draws."""
    for cell in chapter.code():
        alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
        if draws(cell) and not alt:
            yield f"line {cell.line}: a figure without alt text"
        elif alt and not 8 <= len(alt.split()) <= 40:
            yield f"line {cell.line}: alt text of {len(alt.split())} words, not 8 to 40"
        elif re.match(r"(a |an |the )?(plot|figure|image|picture|graph|chart)\b", alt, re.I):
            yield f"line {cell.line}: alt text names the medium, not the finding: {alt}"


def figures_fit(chapter):
    """At most 6.4 by 3.6 inches."""
    for cell in chapter.code():
        for node in ast.walk(cell.tree()):
            if isinstance(node, ast.keyword) and node.arg == "figsize":
                size = ast.literal_eval(node.value)
                if size[0] > 6.4 or size[1] > 3.6:
                    yield f"line {cell.line}: a figure of {size} inches, over (6.4, 3.6)"


def front_matter_is_complete(chapter):
    """The essay's particulars, all of them text; dates and numbers quoted."""
    essay = chapter.metadata.get("essay") or {}
    for field in FIELDS:
        value = essay.get(field)
        if field == "modules":
            known = value and all(_is_module(module) for module in value)
            if not known:
                yield f"essay: modules must list modules of lib, not {value!r}"
        elif not isinstance(value, str) or not value.strip():
            yield f"essay: {field} must be quoted text, not {value!r}"
    try:
        datetime.date.fromisoformat(essay.get("date"))
    except (TypeError, ValueError):
        yield f"essay: date must read 'YYYY-MM-DD', not {essay.get('date')!r}"
    if not str(essay.get("url")).endswith(f"/{essay.get('archive')}"):
        yield f"essay: url {essay.get('url')!r} does not end in archive {essay.get('archive')!r}"
    for key in ("jupytext", "kernelspec"):
        if key not in chapter.metadata:
            yield f"no {key} in the front matter"


def _is_module(name):
    path = ROOT / str(name).replace(".", "/")
    return str(name).startswith("lib.") and (path.is_dir() or path.with_suffix(".py").exists())


def nothing_idle(chapter):
    """No comparison whose outcome is thrown away, no assertion that cannot fail."""
    for cell in chapter.code():
        yield from (f"line {cell.line}: {problem}" for problem in idle(cell.python))


RULES = [
    cells_are_short,
    headings_are_in_order,
    length_is_right,
    figures_speak,
    figures_fit,
    front_matter_is_complete,
    nothing_idle,
]


# Rules for any Python


def idle(code):
    """Comparisons and assertions in ``code`` that cannot fail."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Expr) and _is_verdict(node.value):
            yield f"the outcome of {ast.unparse(node)} is thrown away"
        if isinstance(node, ast.Assert) and (
            isinstance(node.test, ast.Constant)
            or (isinstance(node.test, ast.Tuple) and node.test.elts)
        ):
            yield f"{ast.unparse(node)} cannot fail"
    yield from (f"switched off: {line}" for line in re.findall(r"^\s*(# ?assert\b.*)", code, re.M))


def _is_verdict(node):
    if isinstance(node, ast.Call):
        verdicts = {"allclose", "isclose", "equal", "array_equal", "all", "any", "isfinite"}
        return ast.unparse(node.func).rsplit(".", 1)[-1] in verdicts
    if isinstance(node, ast.UnaryOp):
        return isinstance(node.op, ast.Not)
    return isinstance(node, ast.Compare | ast.BoolOp)


def toothless(code):
    """Tests in ``code`` in which nothing is asserted, here or in a function of the same file."""
    functions = {n.name: n for n in ast.walk(ast.parse(code)) if isinstance(n, ast.FunctionDef)}
    sharp = {name for name, node in functions.items() if _asserts(node, set())}
    while True:
        more = {n for n, node in functions.items() if n not in sharp and _asserts(node, sharp)}
        if not more:
            break
        sharp |= more
    return [name for name in functions if name.startswith("test_") and name not in sharp]


def _asserts(function, sharp):
    for node in ast.walk(function):
        if isinstance(node, ast.Assert):
            return True
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func).rsplit(".", 1)[-1]
            if name in sharp or re.search(r"^(raises|warns|fail)$|assert|check$", name):
                return True
    return False


# Each rule on a chapter that keeps it and on chapters that break it

ALT = "Accuracy rises with the margin up to a third and falls after it"
GOOD = f"""---
jupytext: {{formats: "ipynb,md:myst"}}
kernelspec: {{display_name: Python 3, language: python, name: python3}}
essay:
  title_zh: 题
  title: A title
  author: An author
  date: "2018-05-18"
  archive: "5542"
  url: https://kexue.fm/archives/5542
  claim: It works.
  modules: [lib.book]
---

# A chapter

## Claim
## What you need
## Setup

```{{code-cell}} ipython3
import sys
if "google.colab" in sys.modules:
    %pip install -q "why-it-works @ git+https://example.org/a/very/long/address/of/a/repository"
```

## 1. First
{"word " * 1600}
## 2. Second

```{{code-cell}} ipython3
:mystnb: {{image: {{alt: {ALT}}}}}

fig, ax = plt.subplots(figsize=(6.4, 3))
ax.plot(x)
```

```{{code-cell}} ipython3
total = 1 + 1
assert total == 2
```

## In code
## Experiment
## Results
## What breaks if
## The essay, graded
## Since 2018
## Exercises
## References
"""


@pytest.fixture
def broken(tmp_path):
    def read(old="", new=""):
        assert old in GOOD
        (tmp_path / "crf.md").write_text(GOOD.replace(old, new, 1) if old else GOOD)
        chapter = read_chapter(tmp_path / "crf.md")
        return {rule.__name__: list(rule(chapter)) for rule in RULES}

    return read


def test_a_good_chapter_keeps_all_rules(broken):
    assert broken() == {rule.__name__: [] for rule in RULES}


LINES = "total = 1 + 1\n"
TWO_LONG_CELLS = "ax.plot(x)\n" * 6 + f"```\n\n```{{code-cell}}\n{LINES * 8}" * 2


@pytest.mark.parametrize(
    ("rule", "old", "new", "problem"),
    [
        (cells_are_short, LINES, LINES * 26, "a cell of 27 lines"),
        (cells_are_short, LINES, LINES * 15, "1 of 3 cells have more than 15 lines"),
        (
            cells_are_short,
            "ax.plot(x)",
            TWO_LONG_CELLS,
            "half of",
        ),
        (cells_are_short, LINES, f"total = {'1 + ' * 20}1\n", "89 columns"),
        (headings_are_in_order, "## Results", "## Result", "should be 'Results' and is 'Result'"),
        (headings_are_in_order, "## In code\n", "", "should be 'In code' and is 'Experiment'"),
        (headings_are_in_order, "## References\n", "", "should be 'References' and is 'the end'"),
        (headings_are_in_order, "## References\n", "## References\n## More\n", "and is 'More'"),
        (headings_are_in_order, "## 2.", "## 3.", "the steps are numbered [1, 3]"),
        (headings_are_in_order, "# A chapter", "# A chapter\n# Another", "one title, not"),
        (length_is_right, "word " * 200, "", "words, not 1,500 to 3,000"),
        (length_is_right, "word " * 200, "$a b$ " * 200, "words, not 1,500 to 3,000"),
        (length_is_right, "word " * 200, "word " * 2000, "words, not 1,500 to 3,000"),
        (figures_speak, f":mystnb: {{image: {{alt: {ALT}}}}}", "", "a figure without alt text"),
        (figures_speak, ALT, "too short", "alt text of 2 words"),
        (figures_speak, ALT, "Plot of accuracy against the margin in ten runs", "names the medium"),
        (figures_fit, "(6.4, 3)", "(6.4, 4)", "a figure of (6.4, 4) inches"),
        (figures_fit, "(6.4, 3)", "(8, 3)", "a figure of (8, 3) inches"),
        (front_matter_is_complete, '"2018-05-18"', "2018-05-18", "date must be quoted text"),
        (front_matter_is_complete, '"2018-05-18"', '"18 May 2018"', "date must read"),
        (front_matter_is_complete, '"5542"', "5542", "archive must be quoted text"),
        (front_matter_is_complete, '"5542"', '"5543"', "does not end in archive"),
        (front_matter_is_complete, "claim: It works.", "claim:", "claim must be quoted text"),
        (front_matter_is_complete, "[lib.book]", "[lib.nothing]", "must list modules of lib"),
        (front_matter_is_complete, "jupytext:", "jupyter:", "no jupytext in the front matter"),
        (nothing_idle, "assert total == 2", "total == 2", "outcome of total == 2 is thrown away"),
        (nothing_idle, "assert total == 2", "torch.equal(a, b)", "is thrown away"),
        (nothing_idle, "assert total == 2", "not total", "is thrown away"),
        (nothing_idle, "assert total == 2", 'assert (total == 2, "why")', "cannot fail"),
        (nothing_idle, "assert total == 2", "assert True", "cannot fail"),
        (nothing_idle, "assert total == 2", "# assert total == 3", "switched off"),
    ],
)
def test_each_rule_is_enforced(broken, rule, old, new, problem):
    found = broken(old, new)[rule.__name__]
    assert any(problem in line for line in found), found


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("def test_a():\n    f() == 1", ["test_a"]),
        ("def test_a():\n    assert f()", []),
        ("def test_a():\n    with pytest.raises(ValueError):\n        f()", []),
        ("def test_a():\n    torch.testing.assert_close(a, b)", []),
        ("def test_a():\n    assert torch.autograd.gradcheck(f, x)", []),
        ("def g():\n    h()\ndef h():\n    assert x\ndef test_a():\n    g()", []),
        ("def g():\n    h()\ndef h():\n    print(x)\ndef test_a():\n    g()", ["test_a"]),
        ("class TestX:\n    def test_a(self):\n        f()", ["test_a"]),
    ],
)
def test_a_test_without_assertion_is_found(code, names):
    assert toothless(code) == names


# The book and the tests themselves

chapters = pytest.mark.parametrize("chapter", BOOK, ids=lambda chapter: chapter.stem)


@chapters
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_book_keeps_the_rule(chapter, rule):
    problems = list(rule(chapter))
    assert problems == [], rule.__doc__


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.name)
def test_tests_can_fail(path):
    code = path.read_text(encoding="utf-8")
    assert not list(idle(code))
    assert not toothless(code)


MACHINE = re.compile(r"(?<![\w./:-])/(?:root|work|home/\w+|Users/\w+)/")


def test_no_file_names_a_place_on_one_machine():
    assert MACHINE.search('open("' + "/".join(["", "root", "x"]))
    assert not MACHINE.search("/".join(["https:", "", "example.org", "home", "page", "x"]))
    found = [path.name for path in SOURCES if MACHINE.search(path.read_text(encoding="utf-8"))]
    assert not found


class _Images(HTMLParser):
    """The alternative texts of the pictures that cells drew."""

    def __init__(self):
        super().__init__()
        self.alts, self.depth = [], 0

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if tag == "div":
            self.depth += bool(self.depth) or "cell_output" in (given.get("class") or "")
        if tag == "img" and self.depth:
            self.alts.append(given.get("alt") or "")

    def handle_endtag(self, tag):
        self.depth -= tag == "div" and self.depth > 0


def _drawn(page):
    images = _Images()
    images.feed(page)
    return images.alts


def test_pictures_are_found_in_a_page():
    cell = '<div class="cell_output"><div><img alt="a b"></div><img src="x"></div>'
    assert _drawn(f'<div><img alt="no"></div>{cell}<img alt="no">') == ["a b", ""]


@pytest.mark.book
@chapters
def test_every_picture_in_the_book_has_its_text(chapter):
    page = (ROOT / f"_build/html/chapters/{chapter.stem}.html").read_text(encoding="utf-8")
    assert all(8 <= len(alt.split()) <= 40 for alt in _drawn(page)), _drawn(page)


@pytest.mark.book
@chapters
def test_every_check_in_the_book_carries_its_equation_number(chapter):
    page = (ROOT / f"_build/html/chapters/{chapter.stem}.html").read_text(encoding="utf-8")
    lines = re.findall(r'class="formula-check"[^>]*><a href="#equation-([\w-]+)"[^>]*>(.*?)<', page)
    labels = {equation.label for equation in chapter.equations if equation.label}
    assert {label for label, _ in lines} == labels - set(chapter.excused)
    for label, text in lines:
        assert re.fullmatch(r"\([\d.]+\) [\w ]+", text), f"{label}: {text}"
        assert f'id="equation-{label}"' in page
