"""Draws of real samples against real samples, in counts like those of a score."""

import torch
from torch import Tensor

from difftrain.core.errors import InputError
from difftrain.evaluation.evidence import MAIN, Evidence
from difftrain.evaluation.rows import ConcatenatedRows, Rows


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
