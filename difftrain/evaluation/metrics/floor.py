"""The floor of a distance: what real samples score against other real ones."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from difftrain.core.errors import InputError
from difftrain.core.rng import Rng
from difftrain.evaluation.agreement import dealt_values
from difftrain.evaluation.checks import check_rows
from difftrain.evaluation.evidence import MAIN, Evidence
from difftrain.evaluation.rows import ConcatenatedRows, Rows, SelectedRows


def real_floor(
    evidence: Evidence,
    splits: int,
    distance: Callable[[Rows, Rows], float],
    output: str = MAIN,
    most: int | None = None,
) -> dict[str, Any]:
    """Measure the distance of real samples to real samples. Collective.

    It is the mean over several draws of two disjoint sets, alike in labels, from reference and
    training samples.

    Args:
        evidence: What there is.
        splits: Number of draws.
        distance: The distance of two sets of rows. It must not be collective.
        output: Which rows are compared.
        most: The most samples on a side.

    Returns:
        {"floor": the mean, "floor_std": the standard deviation of the draws, "floor_count":
        samples on a side}; {} if no real samples are known, but only statistics of them.

    Raises:
        InputError: If there are fewer than 4 real samples.
    """
    pooled = real_rows(evidence, output)
    if pooled is None:
        return {}
    rows, labels = pooled
    if evidence.training is not None and output in evidence.training.outputs:
        check_rows(evidence.training.outputs[output], "training")
    # As many samples a side as are compared, if there are enough real ones
    compared = min(len(evidence.reference), max(2, len(evidence.generated)))
    count = min(compared, len(rows) // 2, most or len(rows))
    if count < 2:
        raise InputError(
            f"{len(rows)} real samples are too few for the floor of a distance: it needs at "
            "least 4."
        )

    def floor(split: int) -> float:
        a, b = disjoint_halves(labels, count, Rng(evidence.seed, split).shared("floor"))
        return distance(SelectedRows(rows, a), SelectedRows(rows, b))

    floors = dealt_values(range(splits), floor)
    return {
        "floor": float(floors.mean()),
        "floor_std": float(floors.std(correction=0)),
        "floor_count": count,
    }


def real_rows(evidence: Evidence, output: str = MAIN) -> tuple[Rows, Tensor] | None:
    """Gather an output's rows of all real samples, reference then training.

    Returns:
        The rows [P] and their labels [P], 0 where a set has none; None if only statistics of the
        reference are known.
    """
    if output not in evidence.reference.outputs:
        return None
    sets = [evidence.reference]
    if evidence.training is not None and output in evidence.training.outputs:
        sets.append(evidence.training)
    rows = ConcatenatedRows([found.outputs[output] for found in sets])
    labels = [found.labels for found in sets if found.labels is not None]
    if len(labels) < len(sets):
        return rows, torch.zeros(len(rows), dtype=torch.long)
    return rows, torch.cat(labels)


def disjoint_halves(
    labels: Tensor, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw two disjoint random sets of rows with (to one row) equal labels.

    Rows are shuffled, ordered by label and paired with the next one. Of the pairs, evenly spread
    ones are taken, one row to each set.

    Args:
        labels: Labels [P] of the rows.
        count: Rows in a set, at most P // 2.
        generator: The source of randomness.

    Returns:
        Row numbers of both sets, each [count].
    """
    shuffled = torch.randperm(len(labels), generator=generator)
    ordered = shuffled[labels[shuffled].argsort(stable=True)]
    num_pairs = len(labels) // 2
    offset = float(torch.rand((), generator=generator, dtype=torch.float64))
    places = (torch.arange(count, dtype=torch.float64) + offset) * (num_pairs / count)
    chosen = places.long().clamp(max=num_pairs - 1)
    return ordered[2 * chosen], ordered[2 * chosen + 1]
