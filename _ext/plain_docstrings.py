"""Read docstrings as plain text: a star is a product or (B, *event), a bar an absolute value.

The house's docstrings hold formulas in plain text and use no emphasis and no substitutions, which
is what reStructuredText would see in ``|det dz/dx|`` or ``(B, *event)``.
"""

from __future__ import annotations

import re

from sphinx.application import Sphinx

_LITERAL_OR_MARK = re.compile(r"(``.*?``|:\w+:`.*?`)|(?<!\\)([*|])")


def _escape(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list) -> None:
    in_example = False
    for number, line in enumerate(lines):
        in_example = bool(line.strip()) and (in_example or line.lstrip().startswith(">>>"))
        if not in_example:
            lines[number] = _LITERAL_OR_MARK.sub(lambda m: m[1] or "\\" + m[2], line)


def setup(app: Sphinx) -> dict[str, bool]:
    # Before napoleon, which makes its own markup
    app.connect("autodoc-process-docstring", _escape, priority=400)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
