"""Feature statistics as a `torchmetrics.Metric`, for your own loops on one process or several."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torchmetrics import Metric as TorchMetric

from difftrain.core.errors import InputError
from difftrain.evaluation.distances.moments import (
    Moments,
    merged_moments,
    reduced_moments,
    with_batch,
)


def reduced_state(packed: Tensor, group: ProcessGroup | None = None) -> list[Tensor]:
    """Merge packed moments over processes, and return them as torchmetrics expects: in a list."""
    return [reduced_moments(packed, group)]


class FeatureStatistics(TorchMetric):
    """Count, mean [D] and covariance [D, D] (ddof 1) of features, batch by batch in float64.

    Several processes each update their own; `compute()` gives the mean and covariance over all of
    them and `sync()` merges the state. `count`, `mean` and `cov` show what this process holds.

    Args:
        num_features: The width D of the features, at least 1.

    Raises:
        InputError: If the width is below 1.
    """

    full_state_update = False
    packed: Tensor

    def __init__(self, num_features: int):
        super().__init__(dist_sync_fn=reduced_state)
        if num_features < 1:
            raise InputError(f"num_features = {num_features}: expected at least 1.")
        empty = torch.zeros(num_features + 1, num_features + 1, dtype=torch.float64)
        self.add_state("packed", empty, dist_reduce_fx=merged_moments)

    def update(self, features: Tensor) -> None:
        """Add the features [N, D] of a batch.

        Raises:
            InputError: If they have another width, or values that are not finite.
        """
        self.packed = with_batch(self.packed, features)

    def compute(self) -> tuple[Tensor, Tensor]:
        """Return (mean [D], covariance [D, D]) over all processes. Collective.

        Raises:
            InputError: If there are fewer than 2 samples.
        """
        return self.mean, self.cov

    def sync(self, dist_sync_fn: Callable[..., Any] | None = None, **options: Any) -> None:
        """Merge the state of all processes; `unsync()` brings back this process's own. Collective.

        Args:
            dist_sync_fn: Another way of merging, as torchmetrics calls it.
            options: Further arguments of `torchmetrics.Metric.sync`.
        """
        super().sync(dist_sync_fn or self.dist_sync_fn, **options)

    @property
    def moments(self) -> Moments:
        """What this process holds."""
        return Moments(self.packed)

    @property
    def num_features(self) -> int:
        """The width D of the features."""
        return self.moments.num_features

    @property
    def count_is_known(self) -> bool:
        """Whether the number of samples is known, which it always is here."""
        return self.moments.count_is_known

    @property
    def count(self) -> int:
        """The number of samples on this process."""
        return self.moments.count

    @property
    def mean(self) -> Tensor:
        """The mean [D] on this process."""
        return self.moments.mean

    @property
    def cov(self) -> Tensor:
        """The covariance [D, D] on this process."""
        return self.moments.cov

    @property
    def variance(self) -> Tensor:
        """The trace of the covariance on this process."""
        return self.moments.variance

    def factor(self) -> Tensor:
        """Return L [D, rank] with the covariance L L^T on this process."""
        return self.moments.factor()

    def projected(self, onto: Tensor) -> Tensor:
        """Return K^T cov K [r, r] for a matrix K [D, r]."""
        return self.moments.projected(onto)
