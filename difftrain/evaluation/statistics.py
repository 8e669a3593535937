"""Mean and covariance of features, and the Frechet distance of two such pairs.

The statistics keep count, mean and the centred sum of outer products in float64, which merge exactly over batches and
processes: C = C1 + C2 + (n1 n2 / n) d d^T with d = mean2 - mean1. Raw sums of squares would lose the covariance of
features that lie far from zero.
"""

import json
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from difftrain.distributed import num_processes, on_all, share
from difftrain.evaluation.checks import broken_rows, check_features, check_rows
from difftrain.evaluation.rows import Rows, as_rows
from difftrain.registry import InputError
from difftrain.storage import write_beside

KEYS = ("mu", "sigma", "mu_s", "sigma_s", "num_samples", "protocol")
SPATIAL = "spatial"
UNKNOWN = math.nan  # the count of a published file
TOLERANCE = 1e-7  # relative: how far off a distance may be before the slower and exact way is taken


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
        self.others: dict[str, FeatureStatistics] = {}  # of other outputs of the same images, "spatial"; filled by `load`
        self.add_state("moments", torch.zeros(num_features + 1, num_features + 1, dtype=torch.float64), dist_reduce_fx=merged)

    def update(self, features: Tensor) -> None:
        """Add features [N, D]. Raises InputError for another width or values that are not finite."""
        check_features(features, "features", self.num_features)
        if not self.count_is_known:
            raise InputError("these statistics come from a file that does not say of how many images: no more can be added.")
        if len(features):
            self.moments = merged(torch.stack([self.moments, moments_of(features.detach().to(self.moments))]))

    def compute(self) -> tuple[Tensor, Tensor]:
        """(mean [D], cov [D, D]) over all processes."""
        return self.mean, self.cov

    @property
    def count_is_known(self) -> bool:
        return not bool(self.moments[0, 0].isnan())

    @property
    def count(self) -> int:
        """Number of samples; 0 where a published file did not say it."""
        return int(self.moments[0, 0].nan_to_num(nan=0.0))

    @property
    def mean(self) -> Tensor:  # [D]
        self._require(1)
        return self.moments[0, 1:]

    @property
    def cov(self) -> Tensor:  # [D, D]
        self._require(2)
        return self.moments[1:, 1:] / (self.count - 1 if self.count_is_known else 1)

    def save(self, path: str | Path, protocol: dict[str, Any]) -> None:
        """Write mu, sigma, num_samples and protocol (JSON text) to `path`, an .npz file, whole or not at all; mu_s and sigma_s too for
        spatial statistics in `others`."""
        path = Path(path)
        if path.suffix != ".npz":
            raise InputError(f"{path}: statistics are saved as an .npz file.")
        arrays: dict[str, Any] = {"mu": self.mean.cpu().numpy(), "sigma": self.cov.cpu().numpy()}
        if SPATIAL in self.others:
            spatial = self.others[SPATIAL]
            arrays |= {"mu_s": spatial.mean.cpu().numpy(), "sigma_s": spatial.cov.cpu().numpy()}
        text = json.dumps(protocol, sort_keys=True)
        with write_beside(path) as beside:
            np.savez(beside, **arrays, num_samples=self.count, protocol=text)

    @classmethod
    def load(cls, path: str | Path) -> "FeatureStatistics":
        """The statistics in `path`, an .npz file of our own or a published one.

        Own files hold their protocol. Published ones hold mu and sigma (pytorch-fid, EDM), and mu_s and sigma_s of the spatial features
        beside them (ADM): `protocol` then says what is assumed, and the count is not known. Raises InputError for anything else.
        """
        file = opened(path)
        count = int(file["num_samples"]) if "num_samples" in file else None
        statistics = cls.of_moments(path, file["mu"], file["sigma"], count)
        if "mu_s" in file:
            statistics.others[SPATIAL] = cls.of_moments(path, file["mu_s"], file["sigma_s"], count)
        statistics.protocol = json.loads(str(file["protocol"])) if "protocol" in file else assumed(statistics)
        return statistics

    @classmethod
    def of_moments(cls, path: str | Path, mean: np.ndarray, cov: np.ndarray, count: int | None) -> "FeatureStatistics":
        """Statistics with this mean [D] and covariance [D, D]; path: where they are from, for messages."""
        mean, cov = (np.asarray(array, dtype=np.float64) for array in (mean, cov))
        if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
            raise InputError(f"{path}: mu must be [D] and sigma [D, D], got {list(mean.shape)} and {list(cov.shape)}.")
        if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
            raise InputError(f"{path}: mu or sigma hold numbers that are not finite. The file is broken; make or fetch it again.")
        if count is not None and count < 2:
            raise InputError(f"{path}: num_samples = {count}, a covariance needs at least 2.")
        if np.abs(cov - cov.T).max(initial=0) > 1e-5 * np.abs(cov).max(initial=0):  # some published files were float32
            raise InputError(f"{path}: sigma is not symmetric, so it is no covariance matrix.")
        symmetric = torch.from_numpy((cov + cov.T) / 2)
        statistics = cls(len(mean))
        scale = UNKNOWN if count is None else count
        statistics.moments = packed(scale, torch.from_numpy(mean), symmetric if count is None else symmetric * (count - 1))
        return statistics

    def _require(self, at_least: int) -> None:
        if self.count_is_known and self.count < at_least:
            raise InputError(f"{self.count} samples are too few for this statistic: it needs at least {at_least}.")


def statistics_of(features: Tensor | Rows, dealt: bool = False, name: str = "features") -> FeatureStatistics:
    """Statistics of all rows, added in fixed blocks, so that the sums' order does not depend on who made the rows.

    dealt: collective; each process adds its share of the blocks and all get the merged whole. name: whose rows, for messages.
    """
    rows = as_rows(features)
    statistics = FeatureStatistics(rows.width)

    def add() -> None:
        for block in share(rows.blocks()) if dealt else rows.blocks():
            if len(broken_rows(block)):
                check_rows(rows, name)  # looks at all of them, for a message that says how many
            statistics.update(block)

    if dealt and num_processes() > 1:
        on_all(add)
        statistics.sync()
    else:
        add()
    return statistics


def opened(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file that belong to statistics, or an InputError that says what the file is instead."""
    if Path(path).suffix in (".pkl", ".pickle"):
        raise InputError(
            f"{path}: a pickle can run any code when it is opened, so it is not read. Where you trust it, write its mean and covariance "
            "to an .npz file: numpy.savez('stats.npz', mu=mean, sigma=cov)."
        )
    try:
        with np.load(path, allow_pickle=False) as file:
            keys = list(file)
            arrays = {key: file[key] for key in KEYS if key in keys}  # ADM's files hold the images too: gigabytes that are not read
    except (ValueError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: cannot be read as an .npz file of feature statistics ({error}).") from error
    together = [("mu", "sigma")] + [pair for pair in (("mu_s", "sigma_s"), ("num_samples", "protocol")) if arrays.keys() & set(pair)]
    missing = [key for pair in together for key in pair if key not in arrays]
    if missing:
        raise InputError(f"{path}: not a file of feature statistics, {' and '.join(missing)} is missing; it has {', '.join(keys)}.")
    return arrays


def assumed(statistics: FeatureStatistics) -> dict[str, Any]:
    """The protocol of a published file, which does not say how it was made."""
    return {
        "source": "published statistics", "keys": "mu, sigma, mu_s, sigma_s" if statistics.others else "mu, sigma",
        "num_features": statistics.num_features, "num_samples": None,
        "assumed": "the same images' preparation and network as of the generated images, covariance with ddof 1",
    }  # fmt: skip


def packed(count: float, mean: Tensor, centred: Tensor) -> Tensor:
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


def frechet_distance(a: FeatureStatistics | Tensor | Rows, b: FeatureStatistics | Tensor | Rows) -> float:
    """|m1 - m2|^2 + Tr S1 + Tr S2 - 2 Tr sqrt(S1 S2), in float64; of statistics, or of features [N, D].

    The squared 2-Wasserstein distance of two Gaussians (Frechet 1957; Dowson & Landau 1982, "The Frechet distance between
    multivariate normal distributions"), for image features Heusel et al. 2017, arXiv:1706.08500. Zero, up to rounding, for
    equal statistics. Raises InputError for fewer than 2 samples or different widths.
    """
    a, b = (s if isinstance(s, FeatureStatistics) else statistics_of(s) for s in (a, b))
    if a.num_features != b.num_features:
        raise InputError(f"features of width {a.num_features} and {b.num_features} cannot be compared: use one extractor for both.")
    fewer, more = sorted((a, b), key=lambda s: s.count if s.count_is_known else math.inf)
    apart = (a.mean - b.mean).square().sum()
    return float(apart + a.cov.trace() + b.cov.trace() - 2 * trace_of_root(fewer.cov, more.cov))


def trace_of_root(s1: Tensor, s2: Tensor) -> Tensor:
    """Tr sqrt(S1 S2): the sum of the roots of the eigenvalues of L^T S2 L with S1 = L L^T: real and not negative.

    Fastest with the smaller rank first. An eigenvalue comes with an error of eps times the largest, which its root enlarges where it is
    small; where that is not negligible beside the distance (ill-conditioned or nearly equal covariances) the roots are found without
    squares: they are the singular values of L^T K with S2 = K K^T.
    """
    left = factor(s1)
    product = left.T @ s2 @ left
    values = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0)
    total = values.sqrt().sum()
    if 2 * uncertainty(values) <= TOLERANCE * (s1.trace() + s2.trace() - 2 * total):
        return total
    return torch.linalg.svdvals(left.T @ factor(s2)).sum()


def uncertainty(values: Tensor) -> Tensor:
    """How far the sum of the roots of these eigenvalues [r] may be off: each is off by some eps of the largest."""
    if not len(values):
        return values.sum()
    error = 8 * torch.finfo(values.dtype).eps * values.max()
    return torch.minimum(error / (2 * values.sqrt()), error.sqrt()).nan_to_num(nan=0.0).sum()


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
