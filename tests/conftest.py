"""Settings of all tests: hypothesis is deterministic and does not look at the clock."""

import pytest
import torch
from helpers.tiny_pipelines import pipelines  # noqa: F401  # a fixture
from hypothesis import HealthCheck, settings
from markupsafe import Markup, escape

from difftrain.report.charts import Chart

settings.register_profile(
    "difftrain",
    max_examples=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("difftrain")

torch.set_num_threads(1)


def outline(chart: Chart) -> Markup:
    """An empty picture in place of a chart."""
    return Markup(f'<svg role="img" aria-label="{escape(chart.alt)}"></svg>')


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Features and classifiers are kept for these tests alone, and shared by them."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("DIFFTRAIN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def undrawn_charts():
    """Drawing takes longer than a tiny run. Only the tests of the report draw its charts."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("difftrain.report.drawing.svg", outline)
        yield


@pytest.fixture
def without_report(monkeypatch):
    """The report has its own tests, and takes longer than a tiny run."""
    monkeypatch.setattr(
        "difftrain.run.session.write_report",
        lambda folder: (folder / "report.html").write_text("<html>"),
    )
