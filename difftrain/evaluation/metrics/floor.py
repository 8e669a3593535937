"""The floor of a distance: what real samples score against other real ones, and the ratio to it.

Most distances fall with the number of samples. A floor is the floor of a score only with the
score's own counts, n generated and m reference samples. Where there are too few real samples for
that, it is measured with fewer and extrapolated in proportion to 1 / n + 1 / m, the leading order
of its mean and of its standard deviation. Where that does not hold either, the floor is stated with
its counts, and there is no ratio.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

from difftrain.core.rng import Rng
from difftrain.evaluation.agreement import dealt_values
from difftrain.evaluation.checks import check_rows
from difftrain.evaluation.evidence import MAIN, Evidence
from difftrain.evaluation.metrics.real_samples import disjoint_sets, floor_counts, real_rows
from difftrain.evaluation.rows import Rows, SelectedRows

# What a floor is measured with: as many samples as the score; fewer, and then extrapolated; fewer,
# so that it does not compare with the score
Basis = Literal["same counts", "extrapolated", "fewer samples"]

SPREADS = 2  # standard deviations of its draws by which a floor must lie above 0 for a ratio


def real_floor(
    evidence: Evidence,
    splits: int,
    distance: Callable[[Rows, Rows], float],
    extrapolated_from: int,
    output: str = MAIN,
    most: int | None = None,
) -> dict[str, Any]:
    """Measure the distance of real samples to real samples. Collective.

    It is the mean over several draws of two disjoint sets, alike in labels, from reference and
    training samples. The sets have the score's counts, or as many samples as there are.

    Args:
        evidence: What there is.
        splits: Number of draws.
        distance: The distance of two sets of rows. It must not be collective.
        extrapolated_from: The fewest samples on a side from which the distance extrapolates to
            other counts.
        output: Which rows are compared.
        most: The most samples on a side.

    Returns:
        {"floor": the mean; "floor_std": the standard deviation of the draws; "floor_count",
        "floor_reference_count": samples that stand for the generated ones, and for the reference;
        "floor_basis": see `Basis`}; {} if no real samples are known, but only statistics of them.
        An extrapolated floor and its standard deviation are those of the score's counts.

    Raises:
        InputError: If there are fewer than 4 real samples.
    """
    pooled = real_rows(evidence, output)
    if pooled is None:
        return {}
    rows, labels = pooled
    if evidence.training is not None and output in evidence.training.outputs:
        check_rows(evidence.training.outputs[output], "training")
    scored = (len(evidence.generated), len(evidence.reference))
    counts = floor_counts(scored, len(rows), most)

    def floor(split: int) -> float:
        generator = Rng(evidence.seed, split).shared("floor")
        a, b = disjoint_sets(labels, counts, generator)
        return distance(SelectedRows(rows, a), SelectedRows(rows, b))

    floors = dealt_values(range(splits), floor)
    basis = basis_of(counts, scored, extrapolated_from)
    if basis == "extrapolated":
        floors = floors * (inverse_counts(scored) / inverse_counts(counts))
    return {
        "floor": float(floors.mean()),
        "floor_std": float(floors.std(correction=0)),
        "floor_count": counts[0],
        "floor_reference_count": counts[1],
        "floor_basis": basis,
    }


def basis_of(counts: tuple[int, int], scored: tuple[int, int], extrapolated_from: int) -> Basis:
    """Return what a floor of these counts is to a score of those.

    Args:
        counts: Samples on both sides of the floor.
        scored: Samples on both sides of the score.
        extrapolated_from: As of `real_floor`.
    """
    if counts == scored:
        return "same counts"
    return "extrapolated" if min(counts) >= extrapolated_from else "fewer samples"


def inverse_counts(counts: tuple[int, int]) -> float:
    """Return 1 / n + 1 / m, to which a floor is proportional in leading order."""
    return 1 / counts[0] + 1 / counts[1]


def ratio_to_floor(score: Mapping[str, Any]) -> dict[str, float]:
    """Return the ratio of a biased distance to its floor: about 1 for a perfect generator.

    Args:
        score: {"value", and what `real_floor` returns}.

    Returns:
        {"floor_ratio": value / floor}; {} if the floor is not that of the score's counts, or if
        it is not clearly above 0: a single draw, or within two standard deviations of the draws.
    """
    if score.get("floor_basis") not in ("same counts", "extrapolated"):
        return {}
    if score["floor_std"] == 0 or score["floor"] <= SPREADS * score["floor_std"]:
        return {}
    return {"floor_ratio": score["value"] / score["floor"]}
