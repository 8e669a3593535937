"""Numbers of many samples from several processes, the same for any number of these.

Work is cut into blocks of sample indices, which are shared out. Sums are taken from the gathered
rows, in one order.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from difftrain.core.processes import gathered_from_processes, num_processes
from difftrain.evaluation.agreement import summed, together
from difftrain.generation.generator import blocks, rounds
from difftrain.objective.types import Denoiser


def by_sample(
    num: int,
    width: Sequence[int],
    size: int,
    denoiser: Denoiser,
    rows: Callable[[list[int]], Tensor],
) -> Tensor:
    """Gather a row of numbers for each sample. Collective.

    Args:
        num: Number of samples.
        width: Shape of one row.
        size: Samples in a block.
        denoiser: The network that `rows` calls, equally often for each block.
        rows: Gives the rows [B, *width] of a block's indices.

    Returns:
        [num, *width] float64 on the CPU, on every process.
    """

    def own() -> Tensor:
        found = torch.zeros(num, *width, dtype=torch.float64)
        for indices, counts in rounds(num, size, denoiser):
            found_here = rows(indices)
            if counts:
                found[indices] = found_here.double().cpu()
        return found

    return summed(own)


def by_block(
    num: int,
    width: Sequence[int],
    size: int,
    denoiser: Denoiser,
    sums: Callable[[list[int]], Tensor],
) -> Tensor:
    """Sum numbers of all blocks, in the blocks' order. Collective.

    The memory does not grow with the number of blocks, see `in_order`.

    Args:
        num: Number of samples.
        width: Shape of the numbers.
        size: Samples in a block.
        denoiser: The network that `sums` calls, equally often for each block.
        sums: Gives the numbers [*width] of a block's indices.

    Returns:
        [*width] float64 on the CPU, on every process.
    """
    total = torch.zeros(*width, dtype=torch.float64)
    for _, numbers in in_order(num, width, size, denoiser, sums):
        total += numbers
    return total


def in_order(
    num: int,
    width: Sequence[int],
    size: int,
    denoiser: Denoiser,
    numbers: Callable[[list[int]], Tensor],
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield the numbers of each block, in the blocks' order, on every process. Collective.

    Every process computes one block, all of them exchange these, and so on. The memory holds the
    numbers of one block for each process.

    Args:
        num: Number of samples.
        width: Shape of the numbers.
        size: Samples in a block.
        denoiser: The network that `numbers` calls, equally often for each block.
        numbers: Gives the numbers [*width] of a block's indices.

    Yields:
        The indices of a block, and its numbers [*width], float64 on the CPU.
    """
    all_blocks = list(blocks(num, size, index=0, of=1))
    own = rounds(num, size, denoiser)

    def next_numbers() -> Tensor:
        indices, _ = next(own, ([], False))
        if not indices:
            return torch.zeros(*width, dtype=torch.float64)
        return numbers(indices).double().cpu()

    for start in range(0, len(all_blocks), num_processes()):
        found = gathered_from_processes(together(next_numbers))
        yield from zip(all_blocks[start:], found, strict=False)


def power_sums(x: Tensor) -> Tensor:
    """Return (sum, sum of squares) [2, D] float64 over the samples of x [B, ...]."""
    flat = x.flatten(1).double()
    return torch.stack([flat.sum(0), flat.square().sum(0)])


def population_std(sums: Tensor, num: int) -> Tensor:
    """Return the std [..., D] (ddof 0) of `num` samples with power sums [..., 2, D]."""
    mean, square = sums[..., 0, :] / num, sums[..., 1, :] / num
    return (square - mean**2).clamp(min=0).sqrt()


def standard_error(values: Tensor) -> Tensor:
    """Return the standard error of the mean over samples: std (ddof 1) / sqrt(N).

    Args:
        values: One number or several of each sample, [N, ...].

    Returns:
        [...], NaN for a single sample, which says nothing about the spread.
    """
    if len(values) < 2:
        return torch.full_like(values[0], torch.nan)
    error: Tensor = values.std(0) / math.sqrt(len(values))
    return error


def json_number(value: Tensor) -> float | None:
    """Return a value [] as a number for JSON; None if it is not finite."""
    return json_numbers(value[None])[0]


def json_numbers(values: Tensor) -> list[float | None]:
    """Return values [n] as numbers for JSON, in which one that is not finite is None."""
    numbers: list[float | None] = values.tolist()
    for i in (~values.isfinite()).nonzero().flatten().tolist():
        numbers[i] = None
    return numbers


def mean_of_known(values: Sequence[float | None]) -> float | None:
    """Return the mean of the values that are not None; None if there are none."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None
