"""The parts of a report: how files are read, how numbers read as text, how charts are drawn."""

import math
import subprocess
import sys

import numpy as np
import pytest
from helpers.reports import write_lines
from markupsafe import Markup

from difftrain.report.bands import bands_of
from difftrain.report.charts import Curves, Dots, StepCurves, WeightCurves, smoothed
from difftrain.report.diagnostics import DRAWN, cards_of
from difftrain.report.drawing import svg
from difftrain.report.headline import summary
from difftrain.report.page import Card, Picture, environment
from difftrain.report.records import by_step, read_lines
from difftrain.report.style import Level
from difftrain.report.text import duration, flat, number, recipe_value, shown


def test_long_logs_are_thinned_evenly_and_keep_their_end(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text("".join(f'{{"step": {step}, "loss": 1.0}}\n' for step in range(1_000_000)))
    records, every = read_lines(path)
    steps = [record["step"] for record in records]
    assert every == 500
    assert steps[:-2] == list(range(0, 1_000_000, 500))
    assert steps[-2:] == [999_998, 999_999]


def test_step_run_again_after_a_resume_counts_once_as_run_last():
    records = [
        {"step": 1, "loss": 1},
        {"step": 2, "loss": 2},
        {"step": 3, "loss": 3},
        {"step": 2, "loss": 20},
    ]
    assert by_step(records) == [
        {"step": 1, "loss": 1},
        {"step": 2, "loss": 20},
        {"step": 3, "loss": 3},
    ]


def test_bands_average_samples_not_records():
    few, many = (
        {"step": 1, "bands": [{"log_snr": [0, 1], "error": error, "count": count}]}
        for error, count in [(1.0, 1), (4.0, 2)]
    )
    bands = bands_of([few, many])
    assert bands.intervals == [(0, 1)]
    assert bands.error(slice(None)) == pytest.approx([3.0])


def test_bands_without_samples_are_nothing():
    assert (
        bands_of(
            [{"step": 1, "bands": [{"log_snr": [0, 1], "error": None, "count": 0}]}, {"step": 2}]
        )
        is None
    )


def test_moving_average_keeps_a_constant_to_its_ends():
    assert smoothed(np.full(30, 2.5), 7) == pytest.approx(np.full(30, 2.5))


def test_same_data_give_the_same_chart_and_matplotlib_is_left_as_it_was():
    import matplotlib

    before = dict(matplotlib.rcParams)
    chart = StepCurves("a", {"a": ([1, 2], [1.0, 3.0])})

    assert svg(chart) == svg(chart)
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.41234567, "0.4123"),
        (1234567, "1,234,567"),
        (12345.6, "12,346"),
        (0, "0"),
        (None, "–"),
        (math.nan, "–"),
        (True, "–"),
        ("1", "–"),
    ],
)
def test_numbers_as_text(value, text):
    assert shown(value) == text


def test_durations_as_text():
    assert [duration(seconds) for seconds in (12.34, 147.8, 7500)] == [
        "12.3 s",
        "2 min 28 s",
        "2 h 5 min",
    ]


def test_summary_of_no_recipe_is_empty():
    assert summary({}) == ""


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        (3, "3"),
        ("p2", "p2"),
        ([1, 2], "[1, 2]"),
        ({"type": "p2", "gamma": 1.0}, "{type: p2, gamma: 1.0}"),
    ],
)
def test_recipe_values_are_written_as_a_recipe_does(value, text):
    assert recipe_value(value) == text


def test_nested_mappings_become_dotted_keys():
    assert flat({"a": {"b": 1, "c": {"d": [2]}}, "e": {}}) == {"a.b": 1, "a.c.d": [2]}


def test_integers_beyond_floats_are_no_numbers():
    assert math.isnan(number(10**400))


def test_lines_with_a_wanted_key_are_read_wherever_they_are(tmp_path):
    records = [{"step": step} for step in range(100)]
    records[33]["changed"] = {}
    write_lines(tmp_path / "log.jsonl", records)
    read, every = read_lines(tmp_path / "log.jsonl", limit=10, always="changed")

    assert every == 10
    assert [record["step"] for record in read] == [
        *range(0, 31, 10),
        33,
        *range(40, 91, 10),
        98,
        99,
    ]


# Templates and charts


def test_attributes_are_escaped():
    macros = environment().get_template("macros.html").module
    shown_picture = macros.picture(Picture('"x"<y>', "data:image/png;base64,a+/="))

    assert 'alt="&#34;x&#34;&lt;y&gt;"' in shown_picture
    assert 'src="data:image/png;base64,a+/="' in shown_picture


def test_chart_escapes_its_label_and_its_names():
    curves = {"<b>": ([1, 2], [1.0, 3.0]), "$a^b$": ([1, 2], [2.0, 3.0])}
    drawn = svg(StepCurves('"<i>"', curves))

    assert isinstance(drawn, Markup)
    assert 'aria-label="&#34;&lt;i&gt;&#34;"' in drawn
    assert "&lt;b&gt;" in drawn
    assert "$a^b$" in drawn
    assert "<b>" not in drawn


@pytest.mark.parametrize(
    "chart",
    [
        StepCurves("a", {}),
        StepCurves("a", {"a": ([1, 2], [math.nan, math.inf])}),
        Curves("a", {"a": ([math.nan], [1.0])}, "t"),
        WeightCurves("a", {"a": ([], [])}),
        Dots("a", {}),
    ],
)
def test_chart_without_finite_points_is_replaced_by_a_sentence(chart):
    macros = environment().get_template("macros.html").module

    assert chart.is_empty
    assert "There are no numbers to draw yet." in macros.card(Card("title", chart))


def test_level_that_is_not_known_is_not_drawn():
    curves = {"a": ([1, 2], [1.0, 3.0])}

    unknown = svg(StepCurves("a", curves, level=Level("real", math.nan)))
    known = svg(StepCurves("a", curves, level=Level("real", 2.0)))

    assert unknown == svg(StepCurves("a", curves))
    assert "real" in known


def test_report_imports_neither_torch_nor_matplotlib():
    code = (
        "import sys, difftrain.report; "
        "sys.exit(bool({'torch', 'torchmetrics', 'matplotlib'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_report_draws_without_torch_and_without_pyplot(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    code = (
        "import sys; from pathlib import Path; from difftrain.report import write_report; "
        f"write_report(Path({str(tmp_path)!r})); assert 'matplotlib' in sys.modules; "
        "sys.exit(bool({'torch', 'matplotlib.pyplot'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert "<svg" in (tmp_path / "report.html").read_text()


# Diagnostics


T = [0, 500, 999]
DIAGNOSTICS = {
    "denoising_error": {
        "value": 0.2,
        "log_snr": [8.0, 0.0, -8.0],
        "held_out": {"x0_error": [0.1, None, 0.9]},
        "training": {"x0_error": [0.1, 0.3, 0.8]},
        "held_out_standard_error": {"x0_error": [0.01, 0.01, 0.02]},
        "gap": {"loss": [0.0, None, 0.1]},
        "gap_standard_error": {"loss": [0.1, 0.1, None]},
    },
    "prediction_error": {
        "value": 0.25,
        "standard_error": 0.0123,
        "t": T,
        "nu": [0.1, 0.2, 0.3],
        "rejected": [0.05, 0.1, 0.2],
        "nominal_rejected": 0.05,
    },
    "exposure_bias": {
        "t": T,
        "consecutive": {"delta": [0.1, 0.2, 0.3], "floor": [0.1, 0.1, 0.1]},
        "one_step": {"delta": [0.1, 0.1, 0.2], "floor": [0.0, 0.0, 0.0]},
        "eps_norm": {"t": T, "gap": [0.0, 0.1, -0.1]},
        "drift": {"steps": [1, 2, 3], "error": [0.1, 0.2, 0.3]},
    },
    "cumulative_error": {"t": T, "u": [0.0, 0.1, 0.2], "training": [0.0, 0.0, 0.1]},
    "smoothness": {
        "value": None,
        "position": [0.0, 0.5, 1.0],
        "by_interval": [0.3, 0.4],
        "mean_distance": 0.35,
    },
    "inversion": {"value": 0.1},
}


def test_each_diagnostic_with_curves_is_drawn():
    cards = cards_of(DIAGNOSTICS)

    assert set(DIAGNOSTICS) - set(DRAWN) == {"inversion"}
    assert len({card.title for card in cards}) == len(cards) == 9
    for card in cards:
        drawn = svg(card.chart)
        assert drawn.startswith("<svg"), card.title
        assert "NaN" not in drawn
        assert card.note.endswith(".")
    assert cards_of({}) == []


def test_a_standard_error_is_shown_where_it_is_known():
    x, low, high = cards_of(DIAGNOSTICS)[0].chart.band
    notes = {card.title: card.note for card in cards_of(DIAGNOSTICS)}

    assert x == [8.0, 0.0, -8.0]
    assert (low[0], high[2]) == pytest.approx((0.08, 0.94))
    assert notes["Spread of the prediction error"].endswith("is 0.25 ± 0.0123.")
    assert notes["Error of x0 by noise level"].endswith("is 0.2.")
    assert notes["Smoothness of interpolation"].endswith("is not known.")


def test_diagnostic_numbers_that_are_not_known_are_left_out_of_a_chart():
    holes = {"log_snr": [1.0, 0.0], "held_out": {"x0_error": [None, None]}}

    (card,) = cards_of({"denoising_error": holes})
    assert card.chart.is_empty
