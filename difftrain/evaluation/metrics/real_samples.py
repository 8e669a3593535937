"""Draws of real samples against real samples, in counts like those of a score."""

import torch
from torch import Tensor

from difftrain.core.errors import InputError
from difftrain.evaluation.evidence import MAIN, Evidence, FeatureSet
from difftrain.evaluation.rows import ConcatenatedRows, Rows, SelectedRows


def real_rows(evidence: Evidence, output: str = MAIN) -> tuple[Rows, Tensor] | None:
    """Gather an output's rows of all real samples, reference then training.

    A training sample that the reference holds too is left out: on both sides of a floor it would
    bring it down.

    Returns:
        The rows [P] and their labels [P], 0 where a set has none; None if only statistics of the
        reference are known.
    """
    if output not in evidence.reference.outputs:
        return None
    rows = [evidence.reference.outputs[output]]
    labels = [evidence.reference.labels]
    if evidence.training is not None and output in evidence.training.outputs:
        others = unseen(evidence.training, evidence.reference)
        own = evidence.training.labels
        rows.append(SelectedRows(evidence.training.outputs[output], others))
        labels.append(None if own is None else own[others])
    pooled = ConcatenatedRows(rows)
    known = [of_set for of_set in labels if of_set is not None]
    if len(known) < len(labels):
        return pooled, torch.zeros(len(pooled), dtype=torch.long)
    return pooled, torch.cat(known)


def unseen(training: FeatureSet, reference: FeatureSet) -> Tensor:
    """Return the numbers [n] of the training samples that the reference does not hold."""
    every = torch.arange(len(training))
    if training.marks is None or reference.marks is None:
        return every
    return every[~torch.isin(training.marks, reference.marks)]


def floor_counts(
    scored: tuple[int, int], num_real: int, most: int | None = None
) -> tuple[int, int]:
    """Return how many real samples stand for the generated ones, and how many for the reference.

    They are the score's own counts where there are enough real samples. Otherwise the smaller side
    keeps its count up to half of them, and the larger side takes the rest. Nothing comes nearer to
    the 1 / n + 1 / m of the score.

    Args:
        scored: Generated and reference samples of the score.
        num_real: Real samples that there are.
        most: The most samples on a side.

    Raises:
        InputError: If there are fewer than 4 real samples.
    """
    if num_real < 4:
        raise InputError(
            f"{num_real} real samples are too few for the floor of a distance: it needs at least 4."
        )
    # A variance needs two samples
    wanted = [max(2, min(count, most or count)) for count in scored]
    smaller = min(*wanted, num_real // 2)
    larger = min(max(wanted), num_real - smaller)
    return (smaller, larger) if wanted[0] <= wanted[1] else (larger, smaller)


def disjoint_sets(
    labels: Tensor, counts: tuple[int, int], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw two disjoint random sets of rows with (up to rounding) equal shares of each label.

    Rows are shuffled and ordered by label. Evenly spread ones are taken, and of these evenly
    spread ones again form the second set.

    Args:
        labels: Labels [P] of the rows.
        counts: Rows in either set, together at most P.
        generator: The source of randomness.

    Returns:
        Row numbers of both sets, [counts[0]] and [counts[1]].
    """
    shuffled = torch.randperm(len(labels), generator=generator)
    ordered = shuffled[labels[shuffled].argsort(stable=True)]
    chosen = ordered[evenly_spread(sum(counts), len(ordered), generator)]
    is_second = torch.zeros(len(chosen), dtype=torch.bool)
    is_second[evenly_spread(counts[1], len(chosen), generator)] = True
    return chosen[~is_second], chosen[is_second]


def evenly_spread(count: int, total: int, generator: torch.Generator) -> Tensor:
    """Draw evenly spread places, each with the same probability.

    Args:
        count: Number of places.
        total: Places that there are, at least as many.
        generator: The source of randomness.

    Returns:
        Different places [count], ascending, of 0 to total - 1.
    """
    start = torch.randint(total, (), generator=generator)
    return (torch.arange(count) * total + start) // count
