"""Write the page that lists every formula with its trial: ``python -m lib.book.formulas``.

A formula that changed while its transcription did not must be read again against it; then name its
label: ``python -m lib.book.formulas eq-crf-score``.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from lib.book._check import Record, short
from lib.book.chapter import Chapter, Equation, read_book
from lib.book.reading import to_be_read, transcriptions
from lib.book.trial import Trial, try_chapter

__all__ = ["page", "score", "without_errors", "write_page"]

Trials = Mapping[str, Mapping[str, Trial]]  # stem -> label -> trial

_OPENING = """\
# All formulas

Every result that the chapters print is listed here, drawn from their sources together with what
happened when it was put on trial. *Oracle* names the independent road to the same quantity. The
*error* is the largest difference between printed formula, oracle and library, relative where the
oracle exceeds 1 in size; *exact* means that integers agreed. Then the formula is falsified: a sign
turned, a factor lost, an index shifted, a function exchanged. *Caught* counts the wrong versions
that the check refused; one that slips through must be explained, or the book's tests fail. A
definition or a cited theorem is *excused*.

Under each formula its *transcription* unfolds: the lines of the chapter that were run in its place.
That the two say the same is the one thing that no test can tell. So the test of the ledger writes
this page anew and compares, and `make formulas` refuses a formula that has changed while its
transcription stood still, until somebody has read the one against the other and says so.
"""


def page(chapters: Sequence[Chapter], trials: Trials) -> str:
    """The page in Markdown, chapters in the order given."""
    parts = [_OPENING, _summary(chapters, trials)]
    for chapter in chapters:
        parts.append(f"## [{_title(chapter)}]({chapter.path.name})\n")
        code = transcriptions(chapter)
        for equation in chapter.equations:
            if equation.label:
                trial = trials[chapter.stem].get(equation.label)
                parts.append(_entry(chapter, equation, trial, code.get(equation.label)))
        parts.append(_statements(chapter))
    return "\n".join(parts)


def score(chapters: Sequence[Chapter], trials: Trials) -> str:
    """The wrong versions caught, a line a label and one for the book."""
    lines, killed, tried = [], 0, 0
    for chapter in chapters:
        for label, trial in trials[chapter.stem].items():
            killed, tried = killed + len(trial.killed), tried + trial.tried
            lines.append(f"{label}: {len(trial.killed)}/{trial.tried} in {trial.seconds:.1f} s")
            lines += [f"    slipped through: {description}" for description in trial.survived]
    share = 100 * killed / tried if tried else 0.0
    return "\n".join([*lines, f"book: {killed}/{tried} = {share:.1f} %"])


def without_errors(text: str) -> str:
    """``text`` less what may differ between two machines: the last digits of an error."""
    return re.sub(r"error \S+( standard errors)?", "error", text)


def write_page(root: Path, read: Collection[str] = ()) -> str:
    """Try all chapters, write ``chapters/formulas.md`` and return the score.

    Raises:
        SystemExit: if a formula that must be read again is not among those ``read``.
    """
    chapters = in_book_order(read_book(root / "chapters"), root)
    path = root / "chapters/formulas.md"
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    if unread := [label for label in to_be_read(before, chapters) if label not in read]:
        raise SystemExit(
            f"{', '.join(unread)}: the formula has changed and its transcription has not. Read the "
            f'one against the other; if they agree: make formulas READ="{" ".join(unread)}"'
        )
    trials = {chapter.stem: try_chapter(chapter) for chapter in chapters}
    path.write_text(page(chapters, trials), encoding="utf-8")
    return score(chapters, trials)


def in_book_order(chapters: Sequence[Chapter], root: Path) -> list[Chapter]:
    """``chapters`` as ``_toc.yml`` orders them."""
    order = re.findall(r"chapters/(\w+)", (root / "_toc.yml").read_text(encoding="utf-8"))
    return sorted(chapters, key=lambda c: order.index(c.stem) if c.stem in order else len(order))


def _summary(chapters: Sequence[Chapter], trials: Trials) -> str:
    rows = [
        "| chapter | formulas | checked | excused | caught |",
        "|---|--:|--:|--:|--:|",
    ]
    for chapter in chapters:
        labels = [equation.label for equation in chapter.equations if equation.label]
        held = trials[chapter.stem].values()
        caught = f"{sum(len(t.killed) for t in held)} of {sum(t.tried for t in held)}"
        rows.append(
            f"| [{chapter.stem}]({chapter.path.name}) | {len(labels)} | {len(held)} | "
            f"{len(chapter.excused)} | {caught} |"
        )
    return "\n".join(rows) + "\n"


def _title(chapter: Chapter) -> str:
    found = re.search(r"^# (.+)$", chapter.prose, re.MULTILINE)
    return found[1] if found else chapter.stem


def _entry(
    chapter: Chapter, equation: Equation, trial: Trial | None, transcription: str | None
) -> str:
    label = equation.label or ""
    name = label.removeprefix(f"eq-{chapter.stem.replace('_', '-')}-").replace("-", " ")
    if trial is not None:
        facts = _facts(trial)
    else:
        facts = f"excused: {chapter.excused.get(label, 'no reason given')}"
    entry = f"**{{eq}}`{label}` {name}** `{label}`\n\n$$\n{equation.latex}\n$$\n\n"
    entry += f"<small>{facts}</small>\n"
    if transcription:
        code = f"```python\n{transcription}\n```"
        summary = '<details class="transcription"><summary>transcription</summary>'
        entry += f"\n{summary}\n\n{code}\n\n</details>\n"
    return entry


def _statements(chapter: Chapter) -> str:
    """What the text states between the formulas, as comments: a change there shows here."""
    stated = dict.fromkeys(chapter.statements)
    return "".join(f"% in the text: {formula}\n" for formula in stated)


def _facts(trial: Trial) -> str:
    records = trial.records
    worst = max(records, key=lambda record: record.error)
    oracles = ", ".join(dict.fromkeys(record.by or "oracle" for record in records))
    against = " and lib" if any(record.against_lib for record in records) else ""
    return (
        f"{oracles}{against} · {_closeness(worst)} · "
        f"caught {len(trial.killed)} of {trial.tried} wrong versions"
    )


def _closeness(record: Record) -> str:
    if record.tolerance == "exact":
        return "exact"
    if "standard" in record.tolerance:
        return f"tolerance {record.tolerance}, error {record.error:.1f} standard errors"
    return f"tolerance {record.tolerance}, error {short(record.error)}"


if __name__ == "__main__":
    sys.stdout.write(write_page(Path.cwd(), sys.argv[1:]) + "\n")
