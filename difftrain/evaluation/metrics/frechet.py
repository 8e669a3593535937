"""Frechet distances of generated and reference features: the general one, the FID and the spatial FID by their names.

Beside the value stand the floor (real against real), and where asked for the spread over disjoint subsets and the limit of
infinitely many generated images.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from difftrain.evaluation.checks import check_count, check_rows
from difftrain.evaluation.dealing import dealt_values
from difftrain.evaluation.evidence import Evidence, Need, check_name
from difftrain.evaluation.extractor import FEATURES
from difftrain.evaluation.metrics.common import Scores, floor_of
from difftrain.evaluation.statistics import FeatureStatistics, frechet_distance, statistics_of
from difftrain.evaluation.views import Selected
from difftrain.registry import METRICS, InputError, NonNegativeInt, PositiveInt
from difftrain.rng import Rng

POINTS = 15  # of the fit that extrapolates


@METRICS.register("frechet_distance")
@dataclass(frozen=True)
class FrechetDistance:
    """|m1 - m2|^2 + Tr(S1 + S2 - 2 sqrt(S1 S2)) of generated and reference features.

    Heusel et al. 2017, arXiv:1706.08500; it is the FID only with the FID's features. `floor` is what real images score against real ones,
    over `splits` draws of `floor_count` images a side. The distance falls with the number of images, so a value compares with its floor
    when about `floor_count` images are generated. subsets: also the distances of so many disjoint subsets of the generated images, whose
    standard deviation over sqrt(subsets) estimates the standard error of `value`; their mean is biased further upwards, as each has fewer
    images. extrapolate: also the limit of infinitely many generated images, `*_infinity` (Chong & Forsyth 2020, arXiv:1911.07023).
    """

    splits: PositiveInt = 10
    subsets: NonNegativeInt = 0
    extrapolate: bool = False
    score: ClassVar[str] = "frechet_distance"
    output: ClassVar[str] = FEATURES
    only_with: ClassVar[str | None] = None
    instead: ClassVar[str] = "frechet_distance"
    needs: ClassVar[frozenset[Need]] = frozenset()

    @property
    def scores(self) -> tuple[str, ...]:
        return (self.score, f"{self.score}_infinity") if self.extrapolate else (self.score,)

    def fewest(self, width: int, preset: Mapping[str, Any]) -> int:
        return max(2, 2 * self.subsets, max(4 * width, POINTS) if self.extrapolate else 0)

    def __call__(self, evidence: Evidence) -> Scores:
        check_name(self, evidence.features_name)
        generated, reference = evidence.generated.outputs[self.output], evidence.reference
        check_rows(generated, "generated", at_least=2)
        if self.output in reference.outputs:
            check_rows(reference.outputs[self.output], "reference", generated.width, at_least=2)
        known = reference.statistics(self.output)
        fixed = {"count": len(generated), "reference_count": known.count or None, "features": evidence.features_name}
        score: dict[str, Any] = {"value": frechet_distance(evidence.generated.statistics(self.output), known), **fixed}
        score |= floor_of(evidence, self.splits, frechet_distance, self.output)
        if self.subsets:
            score["subsets"] = self.spread(evidence, known)
        return {self.score: score, **({f"{self.score}_infinity": {**self.limit(evidence, known), **fixed}} if self.extrapolate else {})}

    def spread(self, evidence: Evidence, reference: FeatureStatistics) -> dict[str, float | int]:
        """Over disjoint random subsets of the generated images: how many, of how many images, mean, std and the value's standard error."""
        total = len(evidence.generated)
        if self.subsets < 2:
            raise InputError("subsets: 1 has no spread. Write subsets: 10, or 0 for none.")
        check_count(total, "generated", 2 * self.subsets)
        order = torch.randperm(total, generator=Rng(evidence.seed).shared("frechet_distance.subsets"))
        parts = list(order[: total - total % self.subsets].chunk(self.subsets))
        found = self.distances(evidence, reference, parts)
        std = float(found.std())
        return {"num": self.subsets, "count": len(parts[0]), "mean": float(found.mean()), "std": std,
                "standard_error": std / self.subsets**0.5}  # fmt: skip

    def limit(self, evidence: Evidence, reference: FeatureStatistics) -> dict[str, Any]:
        """The intercept of a straight line through the distances of N generated images over 1 / N, and the line's points.

        The bias is a / N once N is well above the number of features, so the fewest are a tenth of all or twice the features.
        """
        total, width = len(evidence.generated), reference.num_features
        fewest = max(total // 10, 2 * width)
        if total < 2 * fewest or total < POINTS:
            raise InputError(
                f"extrapolate: {total} generated images are too few for {width} features: give at least {max(4 * width, POINTS)}, "
                "or write extrapolate: false."
            )
        counts = torch.linspace(fewest, total, POINTS, dtype=torch.float64).round().long().tolist()
        drawn = [torch.randperm(total, generator=Rng(evidence.seed, i).shared("frechet_distance.points"))[:n] for i, n in enumerate(counts)]
        found = self.distances(evidence, reference, drawn)
        intercept, slope = fitted_line(1 / torch.tensor(counts, dtype=torch.float64), found)
        points = [{"count": n, "value": value} for n, value in zip(counts, found.tolist(), strict=True)]
        return {"value": intercept, "slope": slope, "points": points}

    def distances(self, evidence: Evidence, reference: FeatureStatistics, subsets: list[Tensor]) -> Tensor:
        """The distance [n] of each subset of the generated images to the reference, dealt out over processes."""
        rows = evidence.generated.outputs[self.output]
        return dealt_values(subsets, lambda subset: frechet_distance(statistics_of(Selected(rows, subset.sort().values)), reference))


def fitted_line(x: Tensor, y: Tensor) -> tuple[float, float]:
    """(intercept, slope) of the least-squares line y = intercept + slope x."""
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    return float(y.mean() - slope * x.mean()), float(slope)


@METRICS.register("fid")
@dataclass(frozen=True)
class Fid(FrechetDistance):
    """The Frechet distance under the name that the field has for it with the Inception's features, and with no others.

    Heusel et al. 2017, arXiv:1706.08500. Its number belongs to a protocol: `features: {type: inception, protocol: ...}`.
    """

    score: ClassVar[str] = "fid"
    only_with: ClassVar[str | None] = "inception"


@METRICS.register("sfid")
@dataclass(frozen=True)
class Sfid(FrechetDistance):
    """The Frechet distance of the Inception's spatial features, 7 channels of a 17 x 17 map: sensitive to where things are.

    Nash et al. 2021, "Generating Images with Sparse Representations", arXiv:2103.03841.
    """

    score: ClassVar[str] = "sfid"
    output: ClassVar[str] = "spatial"
    only_with: ClassVar[str | None] = "inception"
    instead: ClassVar[str] = "frechet_distance, which uses their own features"
    needs: ClassVar[frozenset[Need]] = frozenset({"spatial"})
