"""The variance of x0 in each pixel within groups of samples, pooled, without bias."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from difftrain.diagnostics.base import Clean, Subject
from difftrain.diagnostics.gathering import in_order, power_sums


@dataclass(frozen=True)
class Pooled:
    """A pooled variance.

    Args:
        variance: By pixel, [D] float64; NaN without degrees of freedom.
        num_groups: How many groups there are.
        degrees_of_freedom: Samples minus groups.
        over: What the groups are, in words.
    """

    variance: Tensor
    num_groups: int
    degrees_of_freedom: int
    over: str


def pooled_variance(subject: Subject, clean: Clean) -> Pooled:
    """Pool ``sum of (x0 - mean of its group)^2 / (N - number of groups)``. Collective.

    A group is a class or a caption, if the model is conditional. A group of one sample adds
    nothing to either side of the fraction. If fewer than half of the samples share their group
    with another one, then the groups say too little, and all samples are one group. The memory
    holds a few numbers by pixel, whatever the number of groups.

    Args:
        subject: The network, with its conditioning.
        clean: The samples, sorted by label if the model is conditional.
    """
    groups, over = groups_of(subject, clean)
    pixels = math.prod(subject.shape)
    squares = SquaresWithin(groups, pixels)
    for indices, of_block in in_order(
        len(clean),
        (3, 2, pixels),
        subject.block_size,
        subject.denoiser,
        lambda indices: block_parts(clean.x0(indices).cpu(), groups[indices]),
    ):
        squares.add(indices, of_block)
    num_groups = int(groups[-1]) + 1
    freedom = len(clean) - num_groups
    total = squares.total()
    variance = total / freedom if freedom else torch.full_like(total, torch.nan)
    return Pooled(variance, num_groups, freedom, over)


def groups_of(subject: Subject, clean: Clean) -> tuple[Tensor, str]:
    """Return each sample's group [N], counted from 0 and ascending, and what groups are."""
    one_group = torch.zeros(len(clean), dtype=torch.long)
    if clean.labels is None or not subject.conditioning.conditions:
        return one_group, "over all images"
    _, groups, counts = torch.unique(clean.labels.cpu(), return_inverse=True, return_counts=True)
    if 2 * int(counts[counts > 1].sum()) < len(clean):
        return one_group, "over all images, since most are alone in their class or caption"
    if len(counts) == 1:
        return groups, "over all images"
    return groups, "within classes or captions"


def block_parts(x0: Tensor, groups: Tensor) -> Tensor:
    """Return what a block of sorted samples says about variances within groups.

    Args:
        x0: Samples [B, ...].
        groups: Their groups [B], ascending.

    Returns:
        [3, 2, D] float64: power sums of the first group and of the last one, which may go on in
        other blocks, and (sum of squares about the mean, 0) of the groups between them. Of a
        single group the last two are 0.
    """
    flat = x0.flatten(1).double()
    parts = torch.zeros(3, 2, flat.shape[1], dtype=torch.float64)
    first, last = int(groups[0]), int(groups[-1])
    parts[0] = power_sums(flat[groups == first])
    if last > first:
        parts[1] = power_sums(flat[groups == last])
    for group in range(first + 1, last):
        own = flat[groups == group]
        parts[2, 0] += (own - own.mean(0)).square().sum(0)
    return parts


class SquaresWithin:
    """Sums squares about the means of groups, from blocks of sorted samples.

    Args:
        groups: The groups of all samples [N], ascending.
        pixels: D.
    """

    def __init__(self, groups: Tensor, pixels: int):
        self.groups = groups
        self.closed = torch.zeros(pixels, dtype=torch.float64)
        self.open_group, self.open_count = -1, 0
        self.open_sums = torch.zeros(2, pixels, dtype=torch.float64)

    def add(self, indices: list[int], parts: Tensor) -> None:
        """Add the next block.

        Args:
            indices: Its samples.
            parts: [3, 2, D], see `block_parts`.
        """
        groups = self.groups[indices]
        first, last = int(groups[0]), int(groups[-1])
        self._extend(first, parts[0], int((groups == first).sum()))
        if last > first:
            self.closed += parts[2, 0]
            self._extend(last, parts[1], int((groups == last).sum()))

    def total(self) -> Tensor:
        """Return the sum of squares [D] about the means of all groups."""
        return self.closed + self._squares_of_open()

    def _extend(self, group: int, sums: Tensor, count: int) -> None:
        """Add samples to the open group, after the end of another one."""
        if group != self.open_group:
            self.closed += self._squares_of_open()
            self.open_group, self.open_count = group, 0
            self.open_sums = torch.zeros_like(self.open_sums)
        self.open_sums += sums
        self.open_count += count

    def _squares_of_open(self) -> Tensor:
        """Return the sum of squares [D] about the mean of the open group."""
        total, squares = self.open_sums
        about_mean: Tensor = squares - total**2 / max(1, self.open_count)
        return about_mean.clamp(min=0)
