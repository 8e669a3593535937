"""Settings of all tests: float64 laws are deterministic, quick, and never timed by hypothesis; the test processes share the cores."""

import torch
from hypothesis import HealthCheck, settings
from tiny_pipelines import pipelines  # noqa: F401  # a fixture

settings.register_profile("difftrain", max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("difftrain")

torch.set_num_threads(1)
