"""Settings of all tests: float64 laws are deterministic, quick, and never timed by hypothesis; the test processes share the cores."""

import pytest
import torch
from hypothesis import HealthCheck, settings
from tiny_pipelines import pipelines  # noqa: F401  # a fixture

settings.register_profile("difftrain", max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("difftrain")

torch.set_num_threads(1)


@pytest.fixture
def without_report(monkeypatch):
    """The report has its own tests, and takes longer than a tiny run."""
    monkeypatch.setattr("difftrain.train.write_report", lambda folder: (folder / "report.html").write_text("<html>"))
