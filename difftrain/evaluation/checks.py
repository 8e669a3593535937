"""What every score asks of feature rows: [N, D], one width, finite, and enough of them."""

import torch
from torch import Tensor

from difftrain.core.errors import InputError
from difftrain.evaluation.rows import Rows

SHOWN = 5


def check_features(features: Tensor, name: str, num_features: int | None = None) -> None:
    """Check the features of a batch.

    Args:
        features: What should be [N, D] and finite.
        name: What a message calls them.
        num_features: The width D that is expected, if one is.

    Raises:
        InputError: If they have another shape, or values that are not finite.
    """
    if features.ndim != 2:
        raise InputError(
            f"{name} must be [N, D], one row a sample, but these are {list(features.shape)}."
        )
    check_width(features.shape[1], name, num_features)
    refuse_broken_rows(broken_rows(features), len(features), name)


def check_rows(rows: Rows, name: str, num_features: int | None = None, at_least: int = 0) -> None:
    """Check the rows of a set.

    Args:
        rows: The rows.
        name: Whose they are, such as "generated".
        num_features: The width that is expected, if one is.
        at_least: The fewest rows that the score can be computed from.

    Raises:
        InputError: If there are too few, of another width, or some that are not finite.
    """
    check_width(rows.width, f"{name} features", num_features)
    check_count(len(rows), name, at_least)
    broken = [torch.empty(0, dtype=torch.long)]
    start = 0
    for block in rows.blocks():
        broken.append(broken_rows(block) + start)
        start += len(block)
    refuse_broken_rows(torch.cat(broken), len(rows), f"{name} features")


def check_pair(reference: Rows, generated: Rows, at_least: int) -> None:
    """Check both sides of a distance.

    Args:
        reference: The rows of one side.
        generated: The rows of the other side, which must be as wide.
        at_least: The fewest rows of each side.

    Raises:
        InputError: If there are too few, of different widths, or some that are not finite.
    """
    check_rows(reference, "reference", at_least=at_least)
    check_rows(generated, "generated", reference.width, at_least)


def check_count(count: int, name: str, at_least: int) -> None:
    """Check the number of samples.

    Args:
        count: How many there are.
        name: Whose they are, such as "generated".
        at_least: How many are needed.

    Raises:
        InputError: If there are fewer.
    """
    if count < at_least:
        raise InputError(
            f"{count} {name} samples are too few: this score needs at least {at_least}."
        )


def check_width(width: int, name: str, expected: int | None) -> None:
    """Check the width of features.

    Args:
        width: How many numbers a row has.
        name: What a message calls the features.
        expected: How many it should have; None accepts any number.

    Raises:
        InputError: If it has another number of them.
    """
    if expected is not None and width != expected:
        raise InputError(
            f"{name} have {width} columns, expected {expected}: compare features of one extractor."
        )


def broken_rows(features: Tensor) -> Tensor:
    """Return the numbers [n] of the rows of features [N, D] that are not finite."""
    return (~torch.isfinite(features)).any(dim=1).nonzero().flatten()


def refuse_broken_rows(broken: Tensor, total: int, name: str) -> None:
    """Refuse rows that are not finite.

    Args:
        broken: Their numbers [n].
        total: How many rows there are altogether.
        name: What a message calls the features.

    Raises:
        InputError: If there are any.
    """
    if len(broken):
        numbers = ", ".join(map(str, broken[:SHOWN].tolist()))
        more = ", ..." if len(broken) > SHOWN else ""
        raise InputError(
            f"{name}: {len(broken)} of {total} rows are not finite (samples {numbers}{more}). "
            "A score of them would mean nothing. Look at these samples."
        )
