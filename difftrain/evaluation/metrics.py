"""Scores of a generated set against real images. Each metric says what it needs and returns named scores."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from difftrain.evaluation.evidence import Evidence, Need
from difftrain.evaluation.kernel import kernel_distance
from difftrain.evaluation.neighbours import nearest_distances, precision_recall
from difftrain.evaluation.statistics import FeatureStatistics, frechet_distance
from difftrain.registry import METRICS, InputError, PositiveInt
from difftrain.rng import Rng

Scores = dict[str, dict[str, Any]]


@METRICS.register("frechet_distance")
@dataclass(frozen=True)
class FrechetDistance:
    """|m1 - m2|^2 + Tr(S1 + S2 - 2 sqrt(S1 S2)) of generated and reference features.

    Heusel et al. 2017, arXiv:1706.08500; it is the FID only with the FID's features. `floor` is what real images score
    against real ones: the mean over `splits` draws of two disjoint sets of `floor_count` images each, alike in labels, from
    reference and training images; `floor_std` is the standard deviation of those draws. The distance falls with the number of
    images, so a value compares with its floor when about `floor_count` images are generated.
    """

    splits: PositiveInt = 10
    scores: ClassVar[tuple[str, ...]] = ("frechet_distance",)
    needs: ClassVar[frozenset[Need]] = frozenset({"reference"})

    def __call__(self, evidence: Evidence) -> Scores:
        reference = evidence.reference.features
        value = frechet_distance(statistics_of(evidence.generated.features), statistics_of(reference))
        floors, count = self.floors(evidence)
        floor, floor_std = float(floors.mean()), float(floors.std(correction=0))
        return {
            "frechet_distance": {
                "value": value, "floor": floor, "floor_std": floor_std, "floor_count": count, "features": evidence.features_name,
            }
        }

    def floors(self, evidence: Evidence) -> tuple[Tensor, int]:
        """The distances [splits] of real against real, and the images in each half."""
        features, labels = evidence.pool()
        count = min(len(evidence.reference.features), len(features) // 2)
        if count < 2:
            raise InputError(f"{len(features)} real images are too few for the floor of the Frechet distance: it needs at least 4.")
        halves = [disjoint_halves(labels, count, Rng(evidence.seed, split).shared("floor")) for split in range(self.splits)]
        distances = [frechet_distance(statistics_of(features[a]), statistics_of(features[b])) for a, b in halves]
        return torch.tensor(distances, dtype=torch.float64), count


def statistics_of(features: Tensor, block: int = 1024) -> FeatureStatistics:
    """Statistics of features [N, D], added in fixed blocks, so that the sums' order does not depend on who made the rows."""
    statistics = FeatureStatistics(features.shape[1])
    for rows in features.split(block):
        statistics.update(rows)
    return statistics


def disjoint_halves(labels: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two disjoint random sets of `count` row numbers with (to one row) equal labels; count <= len(labels) // 2.

    Rows are shuffled, ordered by label and paired with the next one; of the pairs, evenly spread ones are taken, one row to each set.
    """
    shuffled = torch.randperm(len(labels), generator=generator)
    ordered = shuffled[labels[shuffled].argsort(stable=True)]
    num_pairs = len(labels) // 2
    offset = float(torch.rand((), generator=generator, dtype=torch.float64))
    chosen = ((torch.arange(count, dtype=torch.float64) + offset) * (num_pairs / count)).long().clamp(max=num_pairs - 1)
    return ordered[2 * chosen], ordered[2 * chosen + 1]


@METRICS.register("kernel_distance")
@dataclass(frozen=True)
class KernelDistance:
    """Unbiased MMD^2 of generated and reference features, kernel (x.y / D + 1)^degree; Binkowski et al. 2018, arXiv:1801.01401."""

    degree: PositiveInt = 3
    scores: ClassVar[tuple[str, ...]] = ("kernel_distance",)
    needs: ClassVar[frozenset[Need]] = frozenset({"reference"})

    def __call__(self, evidence: Evidence) -> Scores:
        value = kernel_distance(evidence.reference.features, evidence.generated.features, self.degree)
        return {"kernel_distance": {"value": value, "degree": self.degree, "features": evidence.features_name}}


@METRICS.register("precision_recall")
@dataclass(frozen=True)
class PrecisionRecall:
    """Shares of each set inside the other's k-nearest-neighbour balls; Kynkaanniemi et al. 2019, arXiv:1904.06991."""

    neighbours: PositiveInt = 3
    scores: ClassVar[tuple[str, ...]] = ("precision", "recall")
    needs: ClassVar[frozenset[Need]] = frozenset({"reference"})

    def __call__(self, evidence: Evidence) -> Scores:
        precision, recall = precision_recall(evidence.reference.features, evidence.generated.features, self.neighbours)
        setting = {"neighbours": self.neighbours, "features": evidence.features_name}
        return {"precision": {"value": precision, **setting}, "recall": {"value": recall, **setting}}


@METRICS.register("class_agreement")
@dataclass(frozen=True)
class ClassAgreement:
    """The share of generated images that the features' classifier gives the label that was asked for."""

    scores: ClassVar[tuple[str, ...]] = ("class_agreement",)
    needs: ClassVar[frozenset[Need]] = frozenset({"labels", "classifier"})

    def __call__(self, evidence: Evidence) -> Scores:
        labels, predicted = evidence.generated.labels, evidence.generated.predicted
        assert labels is not None
        assert predicted is not None
        return {"class_agreement": {"value": float((labels == predicted).double().mean()), "classifier": evidence.features_name}}


@METRICS.register("nearest_neighbour_ratio")
@dataclass(frozen=True)
class NearestNeighbourRatio:
    """mean_g min_i |g - x_i| / mean_r min_i |r - x_i|: generated g and reference r to training images x, pixels in [0, 1].

    About 1 when generated images are as far from the training set as unseen real ones are; towards 0 when they are copies.
    """

    scores: ClassVar[tuple[str, ...]] = ("nearest_neighbour_ratio",)
    needs: ClassVar[frozenset[Need]] = frozenset({"reference", "training", "pixels"})

    def __call__(self, evidence: Evidence) -> Scores:
        assert evidence.training is not None
        assert evidence.generated.pixels is not None
        training = flat(evidence.training.images.pixels)
        generated = float(nearest_distances(flat(evidence.generated.pixels), training).mean())
        reference = float(nearest_distances(flat(evidence.reference.images.pixels), training).mean())
        if reference == 0:
            raise InputError("nearest_neighbour_ratio: every reference image is a training image too. Give held-out images as reference.")
        return {"nearest_neighbour_ratio": {"value": generated / reference, "generated": generated, "reference": reference}}


def flat(pixels: Tensor) -> Tensor:  # uint8 [N, C, H, W] -> [N, C H W] in [0, 1]
    return pixels.flatten(1).float() / 255
