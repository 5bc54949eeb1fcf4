"""Put an equation's number, and its name in words, into the line that ``check`` printed.

A notebook cannot know the numbers that the book gives to equations; the page that is about to be
written can. Labels that have no number on the page stay as they are.
"""

import re

EQUATION = re.compile(r'id="equation-([\w-]+)"[^>]*>\s*<span class="eqno">(\([^<]*\))')
CHECKED = re.compile(r'<a href="#equation-([\w-]+)">[\w-]+</a>')
WRAPPER = re.compile(r'<div class="output text_html">(\s*<div class="formula-check")')
STEM = re.compile(r"^eq-(vae-clustering|[a-z]+)-")


def number_checks(body):
    """``body`` with "eq-crf-recursion" read as "(1.4) recursion" in each check's line."""
    numbers = dict(EQUATION.findall(body))

    def named(match):
        label = match[1]
        if label not in numbers:
            return match[0]
        name = STEM.sub("", label).replace("-", " ")
        return f'<a href="#equation-{label}" title="{label}">{numbers[label]} {name}</a>'

    # without text_html, to which the theme gives a light ground in dark mode
    return WRAPPER.sub(r'<div class="output">\1', CHECKED.sub(named, body))


def fill(app, pagename, templatename, context, doctree):
    if context.get("body"):
        context["body"] = number_checks(context["body"])


def setup(app):
    app.connect("html-page-context", fill)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
