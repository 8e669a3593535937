"""The distance of output and target, per sample: [B], the mean over all other dimensions, in float32 or wider."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from difftrain.parameterization import same_shape
from difftrain.registry import ERRORS, Positive


def per_sample(values: Tensor) -> Tensor:
    """Mean over all dimensions but the first."""
    return values.flatten(1).mean(1)


def difference(output: Tensor, target: Tensor) -> Tensor:
    """output - target in float32 or wider; shapes must agree."""
    same_shape(output, target)
    wide = torch.promote_types(output.dtype, torch.float32)
    return output.to(wide) - target.to(wide)


@ERRORS.register("squared")
@dataclass(frozen=True)
class Squared:
    """(output - target)^2."""

    squared: ClassVar[bool] = True

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        return per_sample(difference(output, target) ** 2)


@ERRORS.register("huber")
@dataclass(frozen=True)
class Huber:
    """d^2/2 for |d| <= delta, delta (|d| - delta/2) beyond, d = output - target.

    Huber 1964, "Robust Estimation of a Location Parameter". delta to infinity is half the squared error.
    """

    delta: Positive = 1.0
    squared: ClassVar[bool] = False

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        d = difference(output, target)
        return per_sample(F.huber_loss(d, torch.zeros_like(d), reduction="none", delta=self.delta))


@ERRORS.register("pseudo_huber")
@dataclass(frozen=True)
class PseudoHuber:
    """2 c (sqrt(d^2 + c^2) - c), d = output - target.

    The smooth form that diffusers' and kohya's trainers call huber; tends to d^2 for small d and 2 c |d| for large d.
    """

    c: Positive = 0.1
    squared: ClassVar[bool] = False

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        return per_sample(2 * self.c * ((difference(output, target) ** 2 + self.c**2).sqrt() - self.c))


@ERRORS.register("l1")
@dataclass(frozen=True)
class L1:
    """|output - target|."""

    squared: ClassVar[bool] = False

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        return per_sample(difference(output, target).abs())
