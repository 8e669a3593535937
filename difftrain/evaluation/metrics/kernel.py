"""Kernel distances of generated and reference features: polynomial (KID) and Gaussian (CMMD), general and by their published names."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from difftrain.evaluation.evidence import Evidence, Need, check_name
from difftrain.evaluation.extractor import FEATURES
from difftrain.evaluation.kernel import gaussian_discrepancy, kernel_distance, kernel_distances
from difftrain.evaluation.metrics.common import Scores, floor_of
from difftrain.evaluation.rows import Rows
from difftrain.registry import METRICS, NonNegativeInt, Positive, PositiveInt

FLOOR_COUNT = 5000  # at most: all pairs of more images cost more than they tell


@METRICS.register("kernel_distance")
@dataclass(frozen=True)
class KernelDistance:
    """Unbiased MMD^2 of generated and reference features, kernel (x.y / D + 1)^degree; Binkowski et al. 2018, arXiv:1801.01401.

    subsets > 0: the mean over so many random subsets of `subset_size` images a side, with their `std`; 0: all pairs, of the same
    expectation and the smaller variance. Left out, all three are those of the features' protocol, else 0, 1000 and 3. `floor`, of all pairs
    of `floor_count` images a side, has expectation 0; `floor_std` tells which values are not 0.
    """

    subsets: NonNegativeInt | None = None
    subset_size: PositiveInt | None = None
    degree: PositiveInt | None = None
    splits: PositiveInt = 10
    score: ClassVar[str] = "kernel_distance"
    scores: ClassVar[tuple[str, ...]] = ("kernel_distance",)
    needs: ClassVar[frozenset[Need]] = frozenset({"reference images"})

    def fewest(self, width: int, preset: Mapping[str, Any]) -> int:
        subsets = self.subsets if self.subsets is not None else preset.get("kid_subsets", 0)
        return (self.subset_size or int(preset.get("kid_subset_size", 1000))) if subsets else 2

    def __call__(self, evidence: Evidence) -> Scores:
        degree = chosen(self.degree, evidence, "kid_degree", 3)
        reference, generated = evidence.reference.outputs[FEATURES], evidence.generated.outputs[FEATURES]
        subsets, size = chosen(self.subsets, evidence, "kid_subsets", 0), chosen(self.subset_size, evidence, "kid_subset_size", 1000)
        score: dict[str, Any]
        if subsets:
            found = kernel_distances(reference, generated, subsets, size, degree, evidence.seed, dealt=True)
            score = {"value": float(found.mean()), "std": float(found.std(correction=0)), "subsets": subsets, "subset_size": size}
        else:
            score = {"value": kernel_distance(reference, generated, degree, dealt=True), "subsets": 0}
        floor = floor_of(evidence, self.splits, lambda a, b: kernel_distance(a, b, degree), most=FLOOR_COUNT)
        return {self.score: {**score, "degree": degree, **counts(evidence), **floor}}


@METRICS.register("kid")
@dataclass(frozen=True)
class Kid(KernelDistance):
    """The kernel distance under the name that the field has for it with the Inception's features; Binkowski et al. 2018, arXiv:1801.01401.

    Without a protocol that says otherwise: the mean over 100 subsets of 1000 images.
    """

    score: ClassVar[str] = "kid"
    scores: ClassVar[tuple[str, ...]] = ("kid",)
    only_with: ClassVar[str] = "inception"
    instead: ClassVar[str] = "kernel_distance"

    def fewest(self, width: int, preset: Mapping[str, Any]) -> int:
        return KernelDistance.fewest(self, width, {"kid_subsets": 100, **preset})

    def __call__(self, evidence: Evidence) -> Scores:
        check_name(self, evidence.features_name)
        published = {"kid_subsets": 100, **evidence.preset}
        return KernelDistance.__call__(self, replace(evidence, preset=published))


@METRICS.register("gaussian_mmd")
@dataclass(frozen=True)
class GaussianMmd:
    """scale * MMD^2 of generated and reference features, kernel exp(-|x - y|^2 / (2 sigma^2)), pairs of a row with itself included.

    normalised: rows are brought to length 1 first. With CLIP's features and these defaults it is the CMMD of Jayasumana et al. 2024,
    arXiv:2401.09603. Biased upwards by 1 / count, as its `floor`, of `floor_count` images a side, is.
    """

    sigma: Positive = 10.0
    scale: Positive = 1000.0
    normalised: bool = True
    splits: PositiveInt = 10
    scores: ClassVar[tuple[str, ...]] = ("gaussian_mmd",)
    needs: ClassVar[frozenset[Need]] = frozenset({"reference images"})

    def __call__(self, evidence: Evidence) -> Scores:
        fixed = {"sigma": self.sigma, "scale": self.scale, "normalised": self.normalised}
        return {"gaussian_mmd": {**scaled(evidence, self.sigma, self.scale, self.normalised, self.splits), **fixed}}


@METRICS.register("cmmd")
@dataclass(frozen=True)
class Cmmd:
    """1000 MMD^2 of CLIP's features at length 1, kernel exp(-|x - y|^2 / 200), pairs of a row with itself included.

    Jayasumana et al. 2024, "Rethinking FID: Towards a Better Evaluation Metric for Image Generation", arXiv:2401.09603.
    """

    splits: PositiveInt = 10
    scores: ClassVar[tuple[str, ...]] = ("cmmd",)
    only_with: ClassVar[str] = "clip"
    instead: ClassVar[str] = "gaussian_mmd"
    needs: ClassVar[frozenset[Need]] = frozenset({"reference images"})

    def __call__(self, evidence: Evidence) -> Scores:
        check_name(self, evidence.features_name)
        return {"cmmd": scaled(evidence, sigma=10.0, scale=1000.0, normalised=True, splits=self.splits)}


def scaled(evidence: Evidence, sigma: float, scale: float, normalised: bool, splits: int) -> dict[str, Any]:
    def distance(dealt: bool) -> Callable[[Rows, Rows], float]:
        return lambda a, b: scale * gaussian_discrepancy(a, b, sigma, normalised, dealt=dealt)

    value = distance(dealt=True)(evidence.reference.outputs[FEATURES], evidence.generated.outputs[FEATURES])
    return {"value": value, **counts(evidence), **floor_of(evidence, splits, distance(dealt=False), most=FLOOR_COUNT)}


def chosen(own: int | None, evidence: Evidence, key: str, otherwise: int) -> int:
    """What the metric was given, else what the features' protocol says, else the default."""
    return own if own is not None else evidence.preset.get(key, otherwise)


def counts(evidence: Evidence) -> dict[str, Any]:
    return {"count": len(evidence.generated), "reference_count": len(evidence.reference), "features": evidence.features_name}
