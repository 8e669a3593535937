"""Mean and covariance of features, and the Frechet distance of two such pairs.

The statistics keep count, mean and the centred sum of outer products in float64, which merge exactly over batches and
processes: C = C1 + C2 + (n1 n2 / n) d d^T with d = mean2 - mean1. Raw sums of squares would lose the covariance of
features that lie far from zero.
"""

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from difftrain.evaluation.checks import check_features
from difftrain.evaluation.storage import write_beside
from difftrain.registry import InputError


class FeatureStatistics(Metric):
    """Count, mean [D] and covariance [D, D] (ddof 1, nothing added to the diagonal) of features, in float64.

    The one state is [[count, mean^T], [mean, C]], [D + 1, D + 1], where C is the centred sum of outer products; it merges
    over processes by Chan's rule, in the order of ranks. `sync()` or `compute()` merges; `count`, `mean`, `cov` show what
    this process holds. Chan, Golub & LeVeque 1983, "Algorithms for Computing the Sample Variance".
    """

    full_state_update = False
    moments: Tensor

    def __init__(self, num_features: int):
        super().__init__()
        if num_features < 1:
            raise InputError(f"num_features = {num_features}: expected at least 1.")
        self.num_features = num_features
        self.protocol: dict[str, Any] = {}  # how the features were made; filled by `load`
        self.add_state("moments", torch.zeros(num_features + 1, num_features + 1, dtype=torch.float64), dist_reduce_fx=merged)

    def update(self, features: Tensor) -> None:
        """Add features [N, D]. Raises InputError for another width or values that are not finite."""
        check_features(features, "features", self.num_features)
        if len(features):
            self.moments = merged(torch.stack([self.moments, moments_of(features.detach().to(self.moments))]))

    def compute(self) -> tuple[Tensor, Tensor]:
        """(mean [D], cov [D, D]) over all processes."""
        return self.mean, self.cov

    @property
    def count(self) -> int:
        return int(self.moments[0, 0])

    @property
    def mean(self) -> Tensor:  # [D]
        self._require(1)
        return self.moments[0, 1:]

    @property
    def cov(self) -> Tensor:  # [D, D]
        self._require(2)
        return self.moments[1:, 1:] / (self.count - 1)

    def save(self, path: str | Path, protocol: dict[str, Any]) -> None:
        """Write mu, sigma, num_samples and protocol (JSON text) to `path`, an .npz file, whole or not at all."""
        path = Path(path)
        if path.suffix != ".npz":
            raise InputError(f"{path}: statistics are saved as an .npz file.")
        text = json.dumps(protocol, sort_keys=True)
        with write_beside(path) as beside:
            np.savez(beside, mu=self.mean.cpu().numpy(), sigma=self.cov.cpu().numpy(), num_samples=self.count, protocol=text)

    @classmethod
    def load(cls, path: str | Path) -> "FeatureStatistics":
        """The statistics in `path`, with the protocol that was saved in `.protocol`."""
        file = opened(path)
        mean, cov, count = torch.from_numpy(file["mu"]), torch.from_numpy(file["sigma"]), int(file["num_samples"])
        if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
            raise InputError(f"{path}: mu must be [D] and sigma [D, D], got {list(mean.shape)} and {list(cov.shape)}.")
        statistics = cls(len(mean))
        statistics.moments = packed(count, mean, cov * (count - 1))
        statistics.protocol = json.loads(str(file["protocol"]))
        return statistics

    def _require(self, at_least: int) -> None:
        if self.count < at_least:
            raise InputError(f"{self.count} samples are too few for this statistic: it needs at least {at_least}.")


def opened(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays mu, sigma, num_samples and protocol of an .npz file, or an InputError that says what it is instead."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except (ValueError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: cannot be read as an .npz file of feature statistics ({error}).") from error
    missing = [key for key in ("mu", "sigma", "num_samples", "protocol") if key not in arrays]
    if missing:
        raise InputError(f"{path}: not a file of feature statistics, {' and '.join(missing)} is missing; it has {', '.join(arrays)}.")
    return arrays


def packed(count: int, mean: Tensor, centred: Tensor) -> Tensor:
    """[[count, mean^T], [mean, centred]] in float64."""
    moments = torch.zeros(len(mean) + 1, len(mean) + 1, dtype=torch.float64, device=mean.device)
    moments[0, 0], moments[0, 1:], moments[1:, 0], moments[1:, 1:] = count, mean, mean, centred
    return moments


def moments_of(features: Tensor) -> Tensor:
    """Moments [D + 1, D + 1] of one batch [N, D] with N >= 1."""
    mean = features.mean(dim=0)
    return packed(len(features), mean, (features - mean).T @ (features - mean))


def merged(parts: Tensor) -> Tensor:
    """Moments of the union, from a stack [K, D + 1, D + 1]."""
    total = parts[0]
    for part in parts[1:]:
        n1, n2 = total[0, 0], part[0, 0]
        share = n2 / (n1 + n2).clamp(min=1)
        apart = part[0, 1:] - total[0, 1:]
        centred = total[1:, 1:] + part[1:, 1:] + n1 * share * torch.outer(apart, apart)
        total = packed(int(n1 + n2), total[0, 1:] + share * apart, centred)
    return total


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """|m1 - m2|^2 + Tr S1 + Tr S2 - 2 Tr sqrt(S1 S2), in float64.

    The squared 2-Wasserstein distance of two Gaussians (Frechet 1957; Dowson & Landau 1982, "The Frechet distance between
    multivariate normal distributions"), for image features Heusel et al. 2017, arXiv:1706.08500. Zero, up to rounding, for
    equal statistics. Raises InputError for fewer than 2 samples or different widths.
    """
    if a.num_features != b.num_features:
        raise InputError(f"features of width {a.num_features} and {b.num_features} cannot be compared: use one extractor for both.")
    apart = (a.mean - b.mean).square().sum()
    return float(apart + a.cov.trace() + b.cov.trace() - 2 * trace_of_root(a.cov, b.cov))


def trace_of_root(s1: Tensor, s2: Tensor) -> Tensor:
    """Tr sqrt(S1 S2): the sum of the singular values of L1^T L2 with S = L L^T, real and without roots of rounding errors."""
    return torch.linalg.svdvals(factor(s1).T @ factor(s2)).sum()


def factor(cov: Tensor) -> Tensor:
    """L [D, rank] with L L^T = cov [D, D]: Cholesky's where the rank is full, scaled eigenvectors otherwise."""
    lower, failed = torch.linalg.cholesky_ex(cov)
    pivots = lower.diagonal().square()
    # A pivot this small may be rounding: Cholesky's factor of a singular matrix is noise of size sqrt(eps) there.
    if not failed and pivots.min() > 1e-9 * pivots.max():
        return lower
    values, vectors = torch.linalg.eigh(cov)
    kept = values > len(cov) * torch.finfo(cov.dtype).eps * values.max().clamp(min=0)
    return vectors[:, kept] * values[kept].sqrt()
