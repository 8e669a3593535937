"""Count, mean and covariance of features in float64, merged exactly over batches and processes.

Two parts merge by Chan's rule: C = C1 + C2 + (n1 n2 / n) d d^T with d = mean2 - mean1, where C is
the centred sum of outer products. Raw sums of squares would lose the covariance of features that
lie far from zero.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from difftrain.core.errors import InputError
from difftrain.core.processes import num_processes, share, sum_over_processes
from difftrain.evaluation.agreement import together
from difftrain.evaluation.checks import broken_rows, check_features, check_rows
from difftrain.evaluation.distances.factors import factor
from difftrain.evaluation.rows import Rows, as_rows


class GaussianSummary(Protocol):
    """What a Frechet distance reads.

    `Moments`, `FeatureStatistics`, which gathers them, and `FewSamples` have it.
    """

    @property
    def num_features(self) -> int:
        """The width D of the features."""
        ...

    @property
    def count_is_known(self) -> bool:
        """Whether the number of samples is known; published files do not state it."""
        ...

    @property
    def count(self) -> int:
        """The number of samples; 0 if it is not known."""
        ...

    @property
    def mean(self) -> Tensor:
        """The mean [D]."""
        ...

    @property
    def cov(self) -> Tensor:
        """The covariance [D, D] with ddof 1."""
        ...

    @property
    def variance(self) -> Tensor:
        """The trace of the covariance."""
        ...

    def factor(self) -> Tensor:
        """Return L [D, r] with the covariance L L^T."""
        ...

    def projected(self, onto: Tensor) -> Tensor:
        """Return K^T cov K [r, r] for a matrix K [D, r]."""
        ...


@dataclass(frozen=True)
class Moments:
    """Count, mean and covariance (ddof 1, nothing added to the diagonal) of features.

    Args:
        packed: [[count, mean^T], [mean, C]], [D + 1, D + 1] float64, where C is the centred sum
            of outer products. A count of NaN stands for one that is not known; C is then the
            covariance.
    """

    packed: Tensor

    @classmethod
    def known(cls, mean: Tensor, cov: Tensor, count: int | None) -> "Moments":
        """Build moments from a mean [D] and a covariance [D, D].

        Args:
            mean: The mean.
            cov: The covariance with ddof 1.
            count: The number of samples; None if it is not known.
        """
        if count is None:
            return cls(pack(math.nan, mean, cov))
        return cls(pack(count, mean, cov * (count - 1)))

    @property
    def num_features(self) -> int:
        """The width D of the features."""
        return len(self.packed) - 1

    @property
    def count_is_known(self) -> bool:
        """Whether the number of samples is known."""
        return not bool(self.packed[0, 0].isnan())

    @property
    def count(self) -> int:
        """The number of samples; 0 if it is not known."""
        return int(self.packed[0, 0].nan_to_num(nan=0.0))

    @property
    def mean(self) -> Tensor:
        """The mean [D].

        Raises:
            InputError: If there are no samples.
        """
        self._require(1)
        return self.packed[0, 1:]

    @property
    def cov(self) -> Tensor:
        """The covariance [D, D].

        Raises:
            InputError: If there are fewer than 2 samples.
        """
        self._require(2)
        return self.packed[1:, 1:] / (self.count - 1 if self.count_is_known else 1)

    @property
    def variance(self) -> Tensor:
        """The trace of the covariance."""
        return self.cov.trace()

    def factor(self) -> Tensor:
        """Return L [D, rank] with the covariance L L^T."""
        return factor(self.cov)

    def projected(self, onto: Tensor) -> Tensor:
        """Return K^T cov K [r, r] for a matrix K [D, r]."""
        return onto.T @ self.cov @ onto

    def _require(self, at_least: int) -> None:
        if self.count_is_known and self.count < at_least:
            raise InputError(
                f"{self.count} samples are too few for this statistic: it needs at least "
                f"{at_least}."
            )


def pack(count: float, mean: Tensor, centred: Tensor) -> Tensor:
    """Put count, mean [D] and centred sum [D, D] into one float64 tensor [D + 1, D + 1]."""
    packed = torch.zeros(len(mean) + 1, len(mean) + 1, dtype=torch.float64, device=mean.device)
    packed[0, 0] = count
    packed[0, 1:] = mean
    packed[1:, 0] = mean
    packed[1:, 1:] = centred
    return packed


def packed_moments(features: Tensor) -> Tensor:
    """Return the packed moments [D + 1, D + 1] of one batch of features [N, D] with N >= 1."""
    mean = features.mean(dim=0)
    return pack(len(features), mean, (features - mean).T @ (features - mean))


def merged_moments(parts: Tensor) -> Tensor:
    """Merge packed moments [K, D + 1, D + 1] of K sets into those [D + 1, D + 1] of their union.

    Reference:
        Chan, Golub and LeVeque 1983, "Algorithms for Computing the Sample Variance".
    """
    total = parts[0]
    for part in parts[1:]:
        n1, n2 = total[0, 0], part[0, 0]
        weight = n2 / (n1 + n2).clamp(min=1)
        apart = part[0, 1:] - total[0, 1:]
        centred = total[1:, 1:] + part[1:, 1:] + n1 * weight * torch.outer(apart, apart)
        total = pack(int(n1 + n2), total[0, 1:] + weight * apart, centred)
    return total


def reduced_moments(packed: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Merge the packed moments [D + 1, D + 1] of all processes into those of all samples.

    Collective. There are two sums over the processes: first of count and sum of the samples, then
    of the outer products, centred at the mean of all samples. So a process holds its own matrix and
    the sum, however many processes there are.

    Args:
        packed: The moments of this process's samples; it may have none.
        group: The processes; None takes all of them.

    Returns:
        The packed moments, the same on every process.
    """
    count, mean = packed[0, 0], packed[0, 1:]
    sums = sum_over_processes(torch.cat([count[None], count * mean]), group)
    common = sums[1:] / sums[0].clamp(min=1)
    apart = mean - common
    centred = torch.addr(packed[1:, 1:], apart, apart, alpha=float(count))
    return pack(float(sums[0]), common, sum_over_processes(centred, group))


def with_batch(packed: Tensor, features: Tensor) -> Tensor:
    """Add a batch of features [N, D] to packed moments [D + 1, D + 1].

    Raises:
        InputError: If the features have another width, or values that are not finite.
    """
    check_features(features, "features", len(packed) - 1)
    if not len(features):
        return packed
    return merged_moments(torch.stack([packed, packed_moments(features.detach().to(packed))]))


def moments_of(features: Tensor | Rows, dealt: bool = False, name: str = "features") -> Moments:
    """Compute the moments of all rows.

    Rows are added in fixed blocks, so the order of the sums does not depend on how the rows were
    made.

    Args:
        features: [N, D].
        dealt: Whether the blocks are shared out over the processes. Collective if so.
        name: Whose features they are, for messages.

    Returns:
        The moments, the same on all processes.

    Raises:
        InputError: If rows are not finite.
    """
    rows = as_rows(features)

    def own() -> Tensor:
        packed = torch.zeros(rows.width + 1, rows.width + 1, dtype=torch.float64)
        for block in share(rows.blocks()) if dealt else rows.blocks():
            if len(broken_rows(block)):
                check_rows(rows, name)  # looks at all rows, for a message that counts them
            packed = with_batch(packed, block)
        return packed

    if not dealt or num_processes() == 1:
        return Moments(own())
    return Moments(reduced_moments(together(own)))
