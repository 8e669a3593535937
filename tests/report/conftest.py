"""Tests of the report draw its charts, equal charts once."""

import pickle

import pytest
from markupsafe import Markup

from difftrain.report.charts import Chart
from difftrain.report.drawing import svg

KNOWN: dict[bytes, Markup] = {}  # by what a chart holds


def drawn(chart: Chart) -> Markup:
    """Draw a chart, or return what an equal one came to."""
    content = pickle.dumps(chart)
    if content not in KNOWN:
        KNOWN[content] = svg(chart)
    return KNOWN[content]


@pytest.fixture(scope="module", autouse=True)
def drawn_charts():
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("difftrain.report.drawing.svg", drawn)
        yield
