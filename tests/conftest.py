"""Settings of all tests: hypothesis is deterministic and does not look at the clock."""

import pytest
import torch
from helpers.tiny_pipelines import pipelines  # noqa: F401  # a fixture
from hypothesis import HealthCheck, settings

settings.register_profile(
    "difftrain",
    max_examples=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("difftrain")

torch.set_num_threads(1)


@pytest.fixture
def without_report(monkeypatch):
    """The report has its own tests, and takes longer than a tiny run."""
    monkeypatch.setattr(
        "difftrain.run.session.write_report",
        lambda folder: (folder / "report.html").write_text("<html>"),
    )
