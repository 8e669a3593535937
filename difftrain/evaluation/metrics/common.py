"""What several families of metrics share: the real-vs-real floor, and names that belong to one network's features."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from difftrain.evaluation.checks import check_rows
from difftrain.evaluation.dealing import dealt_values
from difftrain.evaluation.evidence import Evidence
from difftrain.evaluation.extractor import FEATURES
from difftrain.evaluation.rows import Rows
from difftrain.evaluation.views import Joined, Selected
from difftrain.registry import InputError
from difftrain.rng import Rng

Scores = dict[str, dict[str, Any]]


def floor_of(
    evidence: Evidence, splits: int, distance: Callable[[Rows, Rows], float], output: str = FEATURES, most: int | None = None
) -> dict[str, float | int]:
    """What real images score against real ones: {"floor": mean, "floor_std", "floor_count"}; {} where no real images are known.

    The mean over `splits` draws of two disjoint sets of `floor_count` images each, alike in labels, from reference and training images;
    floor_std is the standard deviation of those draws. most: a bound on floor_count. Collective: the draws are dealt out over processes.
    """
    rows, labels = pool(evidence, output)
    if rows is None:
        return {}
    if evidence.training is not None and output in evidence.training.outputs:
        check_rows(evidence.training.outputs[output], "training")
    count = min(len(evidence.reference), max(2, len(evidence.generated)), len(rows) // 2, most or len(rows))
    if count < 2:
        raise InputError(f"{len(rows)} real images are too few for the floor of a distance: it needs at least 4.")

    def floor(split: int) -> float:
        a, b = disjoint_halves(labels, count, Rng(evidence.seed, split).shared("floor"))
        return distance(Selected(rows, a), Selected(rows, b))

    floors = dealt_values(range(splits), floor)
    return {"floor": float(floors.mean()), "floor_std": float(floors.std(correction=0)), "floor_count": count}


def pool(evidence: Evidence, output: str = FEATURES) -> tuple[Rows | None, Tensor]:
    """An output's rows of all real images, reference then training, and their labels [P], 0 where a set has none. None: only statistics
    of the reference are known."""
    if output not in evidence.reference.outputs:
        return None, torch.zeros(0, dtype=torch.long)
    sets = [s for s in (evidence.reference, evidence.training) if s is not None and output in s.outputs]
    rows = Joined([s.outputs[output] for s in sets])
    labels = [s.labels for s in sets if s.labels is not None]
    return rows, torch.cat(labels) if len(labels) == len(sets) else torch.zeros(len(rows), dtype=torch.long)


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
