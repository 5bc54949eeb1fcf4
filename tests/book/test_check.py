"""``check`` refuses what it must; listings, tables and figures say what they are told to say."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys

import equation_numbers
import numpy as np
import pytest
import torch

from lib.book import BLUE, GREEN, ORANGE, PINK, check, claims, recorded, show, style, table

RNG = np.random.default_rng(20180518)
X = RNG.normal(size=(3, 4))


def say(capsys, **values):
    check("eq-crf-x", **values)
    return capsys.readouterr().out.strip()


def test_agreement_is_one_quiet_line(capsys):
    assert say(capsys, printed=X, oracle=X) == "eq-crf-x: printed = oracle, error 0"
    line = say(capsys, printed=X, oracle=X + 3e-11, lib=X)
    assert line == "eq-crf-x: printed = oracle = lib, error 3e-11"
    line = say(capsys, printed=X, oracle=X, lib=torch.tensor(X) + 7e-11)
    assert line == "eq-crf-x: printed = oracle = lib, error 7e-11"


@pytest.mark.parametrize("make", [np.asarray, torch.tensor, lambda x: x.tolist()])
def test_arrays_tensors_and_numbers_mix(make, capsys):
    assert "printed = oracle" in say(capsys, printed=X, oracle=make(X))
    assert "printed = oracle" in say(capsys, printed=float(X[0, 0]), oracle=make(X[0, 0]))
    grad = torch.tensor(X, requires_grad=True)
    assert "printed = oracle" in say(capsys, printed=grad, oracle=X)


def test_the_tolerance_is_relative_and_exactly_there():
    for factor, passes in [(0.99, True), (1.01, False)]:
        for name in ("oracle", "lib"):
            values = {"printed": 1e6 * X, "oracle": 1e6 * X, "lib": 1e6 * X}
            off = X.copy()
            off[2, 1] += factor * 1e-9 * abs(X[2, 1])
            values[name] = 1e6 * off
            with contextlib.nullcontext() if passes else pytest.raises(AssertionError, match=name):
                check("eq-crf-x", **values)


def test_small_numbers_are_compared_absolutely():
    check("eq-crf-x", printed=1e-13, oracle=0.0)
    with pytest.raises(AssertionError, match="differ by 1e-11"):
        check("eq-crf-x", printed=1e-11, oracle=0.0)


def test_the_place_of_the_largest_difference_is_named():
    wrong = X.copy()
    wrong[1, 2] += 0.5
    with pytest.raises(AssertionError, match=r"differ by 0\.5 at \(1, 2\)"):
        check("eq-crf-x", printed=X, oracle=wrong)


def test_monte_carlo_within_four_standard_errors(capsys):
    line = say(capsys, printed=1.0, oracle=1.03, standard_error=0.01)
    assert line == "eq-crf-x: printed = oracle within 3.0 standard errors"
    with pytest.raises(AssertionError, match="printed and oracle"):
        check("eq-crf-x", printed=1.0, oracle=1.05, standard_error=0.01)
    errors = np.full(4, 0.01)
    errors[2] = 0.001
    with pytest.raises(AssertionError, match=r"at \(2,\)"):
        check("eq-crf-x", printed=np.ones(4), oracle=np.ones(4) + 0.03, standard_error=errors)


def test_lib_is_held_to_the_tolerance_even_under_monte_carlo():
    with pytest.raises(AssertionError, match="printed and lib"):
        check("eq-crf-x", printed=1.0, oracle=1.0, lib=1.001, standard_error=0.01)


def test_too_few_samples_are_no_oracle():
    check("eq-crf-x", printed=[1.0, 40.0], oracle=[1.0, 40.0], standard_error=0.99)
    with pytest.raises(ValueError, match="more than a tenth of the largest printed value, 40"):
        check("eq-crf-x", printed=[1.0, 40.0], oracle=[1.0, 40.0], standard_error=1.01)


def test_a_looser_tolerance_is_recorded():
    check("eq-crf-x", printed=1.0, oracle=1.0, rtol=1e-6, atol=1e-10)
    check("eq-crf-x", printed=1.0, oracle=1.0)
    assert [record.tolerance for record in recorded()[-2:]] == ["1e-6 + 1e-10", "1e-9"]


@pytest.mark.parametrize("error", [0.0, -0.1, np.full(3, 0.1)])
def test_standard_errors_make_sense(error):
    with pytest.raises(ValueError, match="standard_error must be positive"):
        check("eq-crf-x", printed=1.0, oracle=1.0, standard_error=error)


def test_integers_and_booleans_must_be_equal(capsys):
    paths = torch.tensor([[0, 2, 1], [1, 1, 0]])
    assert say(capsys, printed=paths, oracle=paths.numpy()).endswith("printed = oracle, exactly")
    assert say(capsys, printed=[True, False], oracle=[1, 0], rtol=1e-5).endswith("exactly")
    with pytest.raises(
        AssertionError, match=r"differ in 1 of 6 places, first at \(0, 1\): 2 and 3"
    ):
        check("eq-crf-x", printed=paths, oracle=[[0, 3, 1], [1, 1, 0]])
    with pytest.raises(AssertionError, match="printed and lib differ"):
        check("eq-crf-x", printed=3, oracle=3, lib=4)


@pytest.mark.parametrize("name", ["oracle", "lib"])
@pytest.mark.parametrize("shape", [(4, 3), (1, 3, 4), (12,), (1, 1), ()])
def test_nothing_is_broadcast(name, shape):
    values = {"printed": X, "oracle": X, name: np.broadcast_to(X.ravel()[0], shape)}
    with pytest.raises(ValueError, match=r"shapes must be the same.*\(3, 4\)"):
        check("eq-crf-x", **values)


@pytest.mark.parametrize("name", ["printed", "oracle", "lib"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_are_finite(name, value):
    values = {"printed": X, "oracle": X, "lib": X}
    values[name] = np.where(X[2, 3] == X, value, X)
    with pytest.raises(ValueError, match=f"{name} has 1 values not finite"):
        check("eq-crf-x", **values)


def test_nothing_is_not_enough():
    with pytest.raises(ValueError, match=r"printed is empty, shape \(0, 3\)"):
        check("eq-crf-x", printed=np.empty((0, 3)), oracle=np.empty((0, 3)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_transcription_is_in_double_precision(dtype):
    with pytest.raises(TypeError, match="printed must be float64, got"):
        check("eq-crf-x", printed=torch.ones(2, dtype=dtype), oracle=torch.ones(2))


def test_a_float_is_not_compared_as_an_integer():
    with pytest.raises(TypeError, match="printed must be float64, got int64"):
        check("eq-crf-x", printed=2, oracle=2.5)


def test_only_numbers():
    with pytest.raises(TypeError, match="oracle must hold numbers"):
        check("eq-crf-x", printed=1.0, oracle="one")


def test_labels_and_tolerances_are_looked_at():
    with pytest.raises(ValueError, match="label must read"):
        check("crf:recursion", printed=1.0, oracle=1.0)
    refused = [(1e-4, 0.0), (-1e-9, 0.0), (1e-9, float("inf")), (1e-9, -1.0), (1e-9, 1e-8)]
    for rtol, atol in [*refused, (float("nan"), 0.0), (1e-9, float("nan"))]:
        with pytest.raises(ValueError, match="rtol must be"):
            check("eq-crf-x", printed=1.0, oracle=1.0, rtol=rtol, atol=atol)


def test_what_passed_is_recorded_and_what_failed_is_not():
    before = len(recorded())
    check("eq-crf-kept", printed=2.0, oracle=2.0 + 4e-10, lib=2.0, by="enumeration", rtol=1e-8)
    with pytest.raises(AssertionError):
        check("eq-crf-lost", printed=2.0, oracle=3.0)
    (record,) = recorded()[before:]
    assert (record.label, record.by, record.against_lib) == ("eq-crf-kept", "enumeration", True)
    assert record.tolerance == "1e-8"
    assert record.error == pytest.approx(2e-10, rel=1e-6)  # relative to the oracle, 2
    assert 'href="#equation-eq-crf-kept"' in record._repr_html_()


def test_inputs_are_left_alone():
    printed = torch.tensor(X)
    kept = printed.clone()
    check("eq-crf-x", printed=printed, oracle=X, lib=printed)
    assert printed.equal(kept)


class Shown:
    """A class to list."""

    def value(self):
        """What it is worth.

        >>> Shown().value()
        1
        """
        # the unit
        return 1

    @property
    def half(self):
        "Half of it."
        return 0.5

    def nothing(self):
        """Only words."""


def test_show_lists_the_source_without_docstrings(capsys):
    show(Shown)
    assert capsys.readouterr().out == (
        "class Shown:\n    def value(self):\n        # the unit\n        return 1\n\n"
        "    @property\n    def half(self):\n        return 0.5\n\n    def nothing(self):\n"
        '        """Only words."""\n'
    )
    show(Shown.value)
    assert capsys.readouterr().out == "def value(self):\n    # the unit\n    return 1\n"


def test_show_can_keep_docstrings_and_unwraps_properties(capsys):
    show(Shown.half, docstring=True)
    assert (
        capsys.readouterr().out == '@property\ndef half(self):\n    "Half of it."\n    return 0.5\n'
    )


def test_show_refuses_what_has_no_source():
    with pytest.raises(TypeError, match="Python source"):
        show(len)


def test_a_table_in_text():
    shown = repr(table([{"model": "CRF", "F1": (0.9, 0.0123), "n": 12345}, {"model": "MEMM"}]))
    assert shown.splitlines() == [
        "model             F1       n",
        "-----  -------------  ------",
        "CRF    0.900 ± 0.012  12,345",
        "MEMM               –       –",
    ]


def test_a_table_in_html_is_captioned_scoped_and_escaped():
    shown = table([{"a<b": "x & y", "v": 0.123456}], caption="A > B")._repr_html_()
    assert "<caption>A &gt; B</caption>" in shown
    assert shown.count('<th scope="col"') == 2
    assert "a&lt;b" in shown
    assert "x &amp; y" in shown
    assert "0.1235" in shown
    assert not re.search(r"color|#[0-9a-f]{3}|background", shown)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ((1234.5, 67.8), "1234 ± 68"),
        ((0.5, 0.0), "0.5 ± 0"),
        ((-0.00123, 0.00045), "-0.00123 ± 0.00045"),
        (True, "yes"),
        (None, "–"),
        (2018, "2018"),
        (np.float32(0.25), "0.25"),
        (np.int64(3), "3"),
        ("word", "word"),
        (float("nan"), "nan"),
    ],
)
def test_values_in_tables(value, text):
    assert repr(table([{"v": value}])).splitlines()[-1].strip() == text


def test_tables_need_rows_and_pairs():
    with pytest.raises(ValueError, match="at least one row"):
        table([])
    with pytest.raises(ValueError, match=r"\(mean, sd\)"):
        repr(table([{"v": (1.0, 2.0, 3.0)}]))


def test_claims_are_graded_in_four_words():
    assert "reproduced" in repr(claims([("it works", "reproduced", "error 0")]))
    with pytest.raises(ValueError, match=r"verdict must be one of.*'confirmed' for 'it works'"):
        claims([("it works", "confirmed", "error 0")])


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


@pytest.mark.parametrize("colour", [BLUE, GREEN, ORANGE, PINK])
@pytest.mark.parametrize("page", ["#ffffff", "#14181e"])
def test_colours_stand_out_on_light_and_dark_pages(colour, page):
    light, dark = sorted([luminance(colour), luminance(page)], reverse=True)
    assert (light + 0.05) / (dark + 0.05) >= 3


def test_style_gives_each_line_a_second_cue():
    import matplotlib as mpl

    with mpl.rc_context():
        style()
        cycle = list(mpl.rcParams["axes.prop_cycle"])
        assert [line["color"] for line in cycle] == [BLUE, GREEN, ORANGE, PINK]
        assert len({str(line["linestyle"]) for line in cycle}) == 4
        assert not mpl.rcParams["axes.spines.top"]


def test_colab_lays_no_card_under_figures_so_they_bring_their_own(monkeypatch):
    import matplotlib as mpl

    for module, ground in [("unrelated", "none"), ("google.colab", "white")]:
        monkeypatch.setitem(sys.modules, module, sys)
        with mpl.rc_context():
            style()
            assert mpl.rcParams["savefig.facecolor"] == ground


DRAW = """
import io, matplotlib
matplotlib.use("svg")
import matplotlib.pyplot as plt
from lib.book import style
style()
plt.plot([1, 3, 2])
plt.xlabel("epoch")
out = io.BytesIO()
plt.savefig(out, format="svg", metadata={"Date": None})
print(out.getvalue().decode())
"""


def test_figures_are_the_same_in_every_run_and_keep_their_text():
    command = [sys.executable, "-c", DRAW]
    runs = {subprocess.run(command, capture_output=True, check=True).stdout for _ in range(2)}
    assert len(runs) == 1
    assert b">epoch</text>" in runs.pop()


EQUATION = (
    '<div class="math notranslate nohighlight" id="equation-eq-vae-clustering-joint-kl">\n'
    '<span class="eqno">(8.2)<a class="headerlink" href="#x">#</a></span>'
)
LINE = '<div class="output text_html">\n<div class="formula-check" style="">{}</div></div>'


def test_the_book_puts_the_number_into_the_line():
    label = "eq-vae-clustering-joint-kl"
    link = f'<a href="#equation-{label}">{label}</a>: printed = oracle'
    numbered = equation_numbers.number_checks(EQUATION + LINE.format(link))
    assert f'<a href="#equation-{label}" title="{label}">(8.2) joint kl</a>: printed' in numbered
    assert "text_html" not in numbered
    assert equation_numbers.number_checks(link) == link
    assert record_link(label) in link


def record_link(label):
    check(label, printed=1.0, oracle=1.0)
    return re.search(r"<a.*?</a>", recorded()[-1]._repr_html_())[0]


def test_only_what_colab_has_is_imported():
    code = "import sys, lib.book; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"jupytext", "nbformat", "yaml", "scipy", "sklearn", "pygments"} & set(
        done.stdout.split()
    )
