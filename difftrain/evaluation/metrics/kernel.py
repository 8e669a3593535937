"""Kernel distances of generated and reference features: polynomial (KID) and Gaussian (CMMD)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

from difftrain.core.errors import InputError
from difftrain.core.registry import NonNegativeInt, Positive, PositiveInt, registered_name
from difftrain.evaluation.distances.kernel import (
    gaussian_discrepancy,
    kernel_distance,
    kernel_distances,
)
from difftrain.evaluation.evidence import MAIN, Evidence
from difftrain.evaluation.metrics.floor import ratio_to_floor, real_floor
from difftrain.evaluation.parts import part_block
from difftrain.evaluation.requirements import check_features_name
from difftrain.evaluation.rows import Rows
from difftrain.evaluation.slots import METRICS, Metric, Scores

FLOOR_COUNT = 5000  # at most, on a side: all pairs of more samples cost more than they tell
FLOOR_FROM = 2  # samples on a side from which a floor extrapolates to other counts: always
MOST_SUBSETS = 10_000
MOST_DEGREE = 32  # of the polynomial kernel
SIGMAS = (1e-6, 1e6)  # widths of the Gaussian kernel


@METRICS.register("kernel_distance")
@dataclass(frozen=True)
class KernelDistance(Metric):
    """Unbiased MMD^2 of generated and reference features, kernel (x.y / D + 1)^degree.

    Its `floor`, of all pairs of real samples, has expectation 0, or lies below 0 where its sets are
    alike in labels. So there is no ratio to it; `floor_std` says which values differ from it. Both
    fall as 1 / count + 1 / reference_count, so a floor of fewer samples is extrapolated.

    Args:
        subsets: If above 0, the value is the mean over this many random subsets, with their `std`.
            0 takes all pairs, with the same expectation and the smaller variance. None takes what
            the features' protocol says, else 0.
        subset_size: Samples of each side in a subset; None as above, else 1000.
        degree: Degree of the kernel; None as above, else 3.
        splits: Number of draws of the floor.

    Reference:
        Binkowski et al. 2018, "Demystifying MMD GANs", arXiv:1801.01401.
    """

    subsets: NonNegativeInt | None = None
    subset_size: PositiveInt | None = None
    degree: PositiveInt | None = None
    splits: PositiveInt = 10
    better = "lower"
    score: ClassVar[str] = "kernel_distance"
    needs = frozenset({"reference images"})

    @property
    def scores(self) -> tuple[str, ...]:
        """The distance."""
        return (self.score,)

    def fewest(self, width: int, preset: Mapping[str, Any]) -> int:
        """Return how many samples it needs of each set."""
        subsets = preset.get("kid_subsets", 0) if self.subsets is None else self.subsets
        if not subsets:
            return 2
        return self.subset_size or int(preset.get("kid_subset_size", 1000))

    def check(self, num_generated: int, preset: Mapping[str, Any]) -> None:
        """Refuse subsets of one sample, and a degree at which the kernel overflows."""
        name = registered_name(self)
        subsets = preset.get("kid_subsets", 0) if self.subsets is None else self.subsets
        if subsets and self.subset_size == 1:
            raise InputError(
                f"metric {name!r}: subset_size: 1 has no pairs. Write at least 2, such as 1000."
            )
        if subsets > MOST_SUBSETS:
            raise InputError(
                f"metric {name!r}: subsets: {subsets} would take days. Write at most "
                f"{MOST_SUBSETS}; the published number is 100."
            )
        if self.degree is not None and self.degree > MOST_DEGREE:
            raise InputError(
                f"metric {name!r}: degree: {self.degree} overflows. Write at most {MOST_DEGREE}; "
                "the published degree is 3."
            )

    def num_real(self, num_generated: int, num_reference: int) -> int:
        """Return how many real samples the floor draws from."""
        return floor_pool(num_generated, num_reference)

    def __call__(self, evidence: Evidence) -> Scores:
        """Compute the distance. Collective."""
        reference = evidence.reference.outputs[MAIN]
        generated = evidence.generated.outputs[MAIN]
        degree = evidence.setting(self.degree, "kid_degree", 3)
        subsets = evidence.setting(self.subsets, "kid_subsets", 0)
        size = evidence.setting(self.subset_size, "kid_subset_size", 1000)
        score: dict[str, Any]
        if subsets:
            found = kernel_distances(
                reference, generated, subsets, size, degree, evidence.seed, dealt=True
            )
            spread = {"std": float(found.std(correction=0)), "subset_size": size}
            score = {"value": float(found.mean()), **spread}
        else:
            score = {"value": kernel_distance(reference, generated, degree, dealt=True)}
        score |= {"subsets": subsets, "degree": degree, **evidence.counts()}

        def distance(a: Rows, b: Rows) -> float:
            return kernel_distance(a, b, degree)

        floor = partial(real_floor, evidence, self.splits, distance, FLOOR_FROM, most=FLOOR_COUNT)
        return {self.score: score | evidence.floor([part_block(self), degree], floor)}


@METRICS.register("kid")
@dataclass(frozen=True)
class Kid(KernelDistance):
    """Unbiased MMD^2 of the Inception's features, kernel (x.y / D + 1)^degree: the KID.

    The field has this name for these features and no others. Unless the features' protocol says
    otherwise it is the mean over 100 subsets of 1000 samples.

    Args:
        subsets: As of kernel_distance, else 100.
        subset_size: As of kernel_distance.
        degree: As of kernel_distance.
        splits: As of kernel_distance.

    Reference:
        Binkowski et al. 2018, "Demystifying MMD GANs", arXiv:1801.01401.
    """

    score: ClassVar[str] = "kid"
    only_with = "inception"
    instead = "kernel_distance"
    titles: ClassVar[Mapping[str, str]] = {"kid": "KID"}

    def fewest(self, width: int, preset: Mapping[str, Any]) -> int:
        """Return how many samples it needs of each set."""
        return KernelDistance.fewest(self, width, {"kid_subsets": 100, **preset})

    def __call__(self, evidence: Evidence) -> Scores:
        """Compute the distance. Collective."""
        check_features_name(self, evidence.features_name)
        published = {"kid_subsets": 100, **evidence.preset}
        return KernelDistance.__call__(self, replace(evidence, preset=published))


@METRICS.register("gaussian_mmd")
@dataclass(frozen=True)
class GaussianMmd(Metric):
    """scale * MMD^2 of generated and reference features, kernel exp(-|x - y|^2 / (2 sigma^2)).

    Pairs of a sample with itself are included. That biases it upwards in proportion to
    1 / count + 1 / reference_count, exactly so for equal distributions. A `floor` of fewer samples
    is therefore extrapolated to these counts, and `floor_ratio` is about 1 for a perfect generator.
    With CLIP's features and the defaults it is the CMMD.

    Args:
        sigma: Width of the kernel.
        scale: A factor.
        normalised: Whether rows are brought to length 1 first.
        splits: Number of draws of the floor.

    Reference:
        Gretton et al. 2012, "A Kernel Two-Sample Test"; of images Jayasumana et al. 2024,
        arXiv:2401.09603.
    """

    sigma: Positive = 10.0
    scale: Positive = 1000.0
    normalised: bool = True
    splits: PositiveInt = 10
    scores = ("gaussian_mmd",)
    needs = frozenset({"reference images"})
    better = "lower"
    titles: ClassVar[Mapping[str, str]] = {"gaussian_mmd": "Gaussian MMD"}

    def check(self, num_generated: int, preset: Mapping[str, Any]) -> None:
        """Refuse widths whose square is 0 or infinite in floating point, or near it."""
        low, high = SIGMAS
        if not low <= self.sigma <= high:
            raise InputError(
                f"metric 'gaussian_mmd': sigma: {self.sigma:g} is outside {low:g} to {high:g}. "
                "Write a width of the size of the features' distances, such as 10."
            )

    def num_real(self, num_generated: int, num_reference: int) -> int:
        """Return how many real samples the floor draws from."""
        return floor_pool(num_generated, num_reference)

    def __call__(self, evidence: Evidence) -> Scores:
        """Compute the discrepancy. Collective."""
        fixed = {"sigma": self.sigma, "scale": self.scale, "normalised": self.normalised}
        score = scaled_mmd(evidence, self.sigma, self.scale, self.normalised, self.splits)
        return {"gaussian_mmd": score | fixed}


@METRICS.register("cmmd")
@dataclass(frozen=True)
class Cmmd(Metric):
    """1000 MMD^2 of CLIP's features at length 1, kernel exp(-|x - y|^2 / 200).

    Pairs of a sample with itself are included, as published.

    Args:
        splits: Number of draws of the floor.

    Reference:
        Jayasumana et al. 2024, "Rethinking FID: Towards a Better Evaluation Metric for Image
        Generation", arXiv:2401.09603.
    """

    splits: PositiveInt = 10
    scores = ("cmmd",)
    only_with = "clip"
    instead = "gaussian_mmd"
    needs = frozenset({"reference images"})
    better = "lower"
    titles: ClassVar[Mapping[str, str]] = {"cmmd": "CMMD"}

    def num_real(self, num_generated: int, num_reference: int) -> int:
        """Return how many real samples the floor draws from."""
        return floor_pool(num_generated, num_reference)

    def __call__(self, evidence: Evidence) -> Scores:
        """Compute the discrepancy. Collective."""
        check_features_name(self, evidence.features_name)
        return {"cmmd": scaled_mmd(evidence, 10.0, 1000.0, True, self.splits)}


def floor_pool(num_generated: int, num_reference: int) -> int:
    """Return how many real samples a floor of at most `FLOOR_COUNT` a side draws from."""
    return min(num_generated, FLOOR_COUNT) + min(num_reference, FLOOR_COUNT)


def scaled_mmd(
    evidence: Evidence, sigma: float, scale: float, normalised: bool, splits: int
) -> dict[str, Any]:
    """Compute a scaled MMD^2 under the Gaussian kernel, with floor and ratio. Collective.

    Args:
        evidence: What there is.
        sigma: Width of the kernel.
        scale: The factor.
        normalised: Whether rows are brought to length 1 first.
        splits: Number of draws of the floor.
    """

    def distance(a: Rows, b: Rows, dealt: bool = False) -> float:
        return scale * gaussian_discrepancy(a, b, sigma, normalised, dealt=dealt)

    reference = evidence.reference.outputs[MAIN]
    value = distance(reference, evidence.generated.outputs[MAIN], dealt=True)
    block = ["gaussian", sigma, scale, normalised, splits]
    floor = partial(real_floor, evidence, splits, distance, FLOOR_FROM, most=FLOOR_COUNT)
    score = {"value": value, **evidence.counts(), **evidence.floor(block, floor)}
    return score | ratio_to_floor(score)
