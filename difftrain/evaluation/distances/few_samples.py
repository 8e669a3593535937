"""The Gaussian summary of rows: of no more rows than features they are the factor themselves."""

from dataclasses import dataclass

from torch import Tensor

from difftrain.evaluation.agreement import together
from difftrain.evaluation.checks import check_rows
from difftrain.evaluation.distances.factors import factor_of_rows
from difftrain.evaluation.distances.moments import GaussianSummary, moments_of
from difftrain.evaluation.rows import Rows, as_rows


@dataclass(frozen=True)
class FewSamples:
    """Mean and covariance L L^T (ddof 1) of n <= D samples, of which no [D, D] matrix is made.

    Args:
        count: The number of samples n, at least 2.
        mean: Their mean [D].
        left: L [D, n - 1].
    """

    count: int
    mean: Tensor
    left: Tensor
    count_is_known = True

    @property
    def num_features(self) -> int:
        """The width D of the features."""
        return len(self.mean)

    @property
    def cov(self) -> Tensor:
        """The covariance [D, D], computed at each call."""
        return self.left @ self.left.T

    @property
    def variance(self) -> Tensor:
        """The trace of the covariance."""
        return self.left.square().sum()

    def factor(self) -> Tensor:
        """Return L [D, n - 1]."""
        return self.left

    def projected(self, onto: Tensor) -> Tensor:
        """Return K^T cov K [r, r] for a matrix K [D, r]."""
        product = onto.T @ self.left
        return product @ product.T


def summary_of_rows(
    features: Tensor | Rows, dealt: bool = False, name: str = "features"
) -> GaussianSummary:
    """Compute mean and covariance of all rows, in the form that is cheaper to compare.

    No more rows than features are read by every process, which holds them in float64: no more
    numbers than a covariance has. More rows become `Moments`.

    Args:
        features: [N, D].
        dealt: Whether every process takes part. Collective if so.
        name: Whose features they are, for messages.

    Returns:
        The summary, the same on all processes.

    Raises:
        InputError: If rows are not finite.
    """
    rows = as_rows(features)
    if not 2 <= len(rows) <= rows.width:
        return moments_of(rows, dealt, name)

    def few() -> FewSamples:
        check_rows(rows, name)
        return FewSamples(len(rows), *factor_of_rows(rows.whole().double()))

    return together(few) if dealt else few()
