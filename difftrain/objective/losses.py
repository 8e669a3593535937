"""Distances between output and target for each sample: [B], means over all other dimensions.

Differences are taken in float32 or wider.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from difftrain.core.registry import Positive
from difftrain.objective.parameterization import check_same_shape
from difftrain.objective.slots import ERRORS


def per_sample(values: Tensor) -> Tensor:
    """Average [B, ...] over all dimensions but the first."""
    return values.flatten(1).mean(1)


def difference(output: Tensor, target: Tensor) -> Tensor:
    """Return output - target in float32 or wider.

    Raises:
        ValueError: If the shapes differ.
    """
    check_same_shape(output, target)
    wide = torch.promote_types(output.dtype, torch.float32)
    return output.to(wide) - target.to(wide)


@ERRORS.register("squared")
@dataclass(frozen=True)
class Squared:
    """Squared error: ``d^2``, d = output - target."""

    squared: ClassVar[bool] = True

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the mean squared error of each sample [B]."""
        return per_sample(difference(output, target) ** 2)


@ERRORS.register("huber")
@dataclass(frozen=True)
class Huber:
    """Huber error: ``d^2 / 2`` for |d| <= delta, ``delta (|d| - delta / 2)`` beyond.

    d = output - target. As delta goes to infinity it is half the squared error.

    Args:
        delta: Where the error becomes linear.

    Reference:
        Huber 1964, "Robust Estimation of a Location Parameter".
    """

    delta: Positive = 1.0
    squared: ClassVar[bool] = False

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the mean Huber error of each sample [B]."""
        d = difference(output, target)
        return per_sample(F.huber_loss(d, torch.zeros_like(d), reduction="none", delta=self.delta))


@ERRORS.register("pseudo_huber")
@dataclass(frozen=True)
class PseudoHuber:
    """Pseudo-Huber error: ``2 c (sqrt(d^2 + c^2) - c)``, d = output - target.

    It tends to d^2 for small d and to 2 c |d| for large d. This is the smooth form that the
    trainers of diffusers and kohya call huber.

    Args:
        c: Where the error becomes linear.
    """

    c: Positive = 0.1
    squared: ClassVar[bool] = False

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the mean pseudo-Huber error of each sample [B]."""
        root = (difference(output, target) ** 2 + self.c**2).sqrt()
        return per_sample(2 * self.c * (root - self.c))


@ERRORS.register("l1")
@dataclass(frozen=True)
class L1:
    """Absolute error: ``|d|``, d = output - target."""

    squared: ClassVar[bool] = False

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the mean absolute error of each sample [B]."""
        return per_sample(difference(output, target).abs())
