"""Failures that all processes agree on, so that none waits for a process that has given up.

Work that ends in a collective runs inside `together`, `summed` or `dealt_values`. Each of them
exchanges once whether every process has succeeded, before the collective itself. A process that
fails elsewhere makes this exchange alone, with `agree`: it meets the exchange that the other
processes make next.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from difftrain.core.errors import InputError
from difftrain.core.processes import (
    num_processes,
    objects_from_processes,
    share,
    sum_over_processes,
)

T = TypeVar("T")


@dataclass(frozen=True)
class Failure:
    """Why something has no result.

    Args:
        reason: What went wrong, for the user.
        is_input: Whether the user can correct it (an `InputError`).
    """

    reason: str
    is_input: bool

    @classmethod
    def of(cls, error: Exception) -> "Failure":
        """Describe an exception."""
        if isinstance(error, InputError):
            return cls(str(error), is_input=True)
        kind = type(error).__name__
        return cls(f"{kind}: {error}" if str(error) else kind, is_input=False)


class AgreedError(Exception):
    """A failure of at least one process that is raised on all of them.

    Args:
        failure: What went wrong.
        rank: The first process on which it did.
    """

    def __init__(self, failure: Failure, rank: int):
        super().__init__(failure.reason)
        self.failure, self.rank = failure, rank


class AgreedInputError(AgreedError, InputError):
    """An `AgreedError` that the user can correct."""


def agree(error: Exception | None) -> None:
    """Exchange whether every process has succeeded. Collective.

    Args:
        error: The error of this process; None if it has succeeded.

    Raises:
        AgreedError: On every process, if any of them had an error; that of the first counts.
    """
    own = None if error is None else Failure.of(error)
    for rank, failure in enumerate(objects_from_processes(own)):
        if failure is not None:
            kind = AgreedInputError if failure.is_input else AgreedError
            raise kind(failure, rank) from error


def together(action: Callable[[], T]) -> T:
    """Run an action on every process, and go on only if it succeeds on all. Collective.

    Args:
        action: What each process does. It must not itself be collective.

    Returns:
        This process's own result.

    Raises:
        AgreedError: On every process, if the action fails on any of several. A single process
            raises its own error.
    """
    if num_processes() == 1:
        return action()
    try:
        result = action()
    except Exception as error:
        agree(error)
        raise
    agree(None)
    return result


def summed(part: Callable[[], Tensor], dealt: bool = True) -> Tensor:
    """Sum what the processes compute. Collective if `dealt`.

    Args:
        part: Gives this process's part of the sum, of one shape everywhere.
        dealt: Whether the work is shared out; otherwise `part` is the whole.

    Raises:
        AgreedError: On every process, if `part` fails on any of several.
    """
    return sum_over_processes(together(part)) if dealt else part()


def dealt_values(
    items: Sequence[T], value: Callable[[T], float | Tensor], dealt: bool = True
) -> Tensor:
    """Compute one number for each item, each on one of the processes. Collective if `dealt`.

    Every process gets the same bits whatever the number of processes, since each number is that of
    one process plus zeros.

    Args:
        items: The same items on every process.
        value: Gives the number of an item. It must not itself be collective.
        dealt: Whether the items are shared out; otherwise this process computes all of them.

    Returns:
        The numbers [n], float64.

    Raises:
        AgreedError: On every process, if `value` fails on any of several.
    """

    def own() -> Tensor:
        values = torch.zeros(len(items), dtype=torch.float64)
        for place in share(range(len(items))) if dealt else range(len(items)):
            values[place] = value(items[place])
        return values

    return summed(own, dealt)
