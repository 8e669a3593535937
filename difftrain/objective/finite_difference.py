"""Finite differences along a direction, and the calibration of their step."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from difftrain.core.processes import mean_over_processes

COARSEST = 2.0**-3  # the first step that the calibration tries, for each element of x
NEGLIGIBLE = 1e-3  # relative change of the gradient over the coarsest step that needs no digits
PATIENCE = 4  # halvings without improvement after which the calibration ends


class Change(NamedTuple):
    """How much a function changes along a direction, so that its slope is value / length.

    Args:
        value: The difference of the function's values [B, ...].
        length: The distance between its arguments, in multiples of the direction.
    """

    value: Tensor
    length: Tensor | float


def change_along(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    direction: Tensor,
    h: Tensor | float,
    value: Tensor | None = None,
) -> Change:
    """Return the change of a function along a direction.

    Args:
        function: Takes and returns [B, ...].
        x: Where the change is taken [B, ...].
        direction: Of the shape of x.
        h: The step, in multiples of the direction.
        value: The function's value at x, for a one-sided difference from x to x + h direction, with
            an error of order h. None: a central difference from x - h direction to
            x + h direction, with an error of order h^2.
    """
    ahead = function(x + h * direction)
    if value is not None:
        return Change(ahead - value, h)
    return Change(ahead - function(x - h * direction), 2 * h)


class Calibration(NamedTuple):
    """The best step, and the relative error of the difference there.

    Args:
        h: The step.
        error: The relative distance between the differences at h and at h / 2; inf if no two steps
            agree, NaN if the gradient is not finite.
    """

    h: float
    error: float


def calibrate(
    gradient: Callable[[Tensor], Tensor], x: Tensor, direction: Tensor, central: bool
) -> Calibration:
    """Find the step whose difference is closest to that at half the step. Collective.

    Steps are halved from a coarse one on. The differences are those of gradients with respect to x:
    of backward passes, which round like the gradients with respect to the weights.

    Args:
        gradient: Returns the gradient [B, ...] of a scalar at a point [B, ...].
        x: Where the differences are taken [B, ...].
        direction: Of the shape of x.
        central: Whether the differences are central.
    """
    base = gradient(x)

    def slope(h: float) -> Tensor:
        change = change_along(gradient, x, direction, h, None if central else base)
        return change.value / change.length

    # A function that is linear in x has no curvature for two steps to agree upon.
    h = coarsest = COARSEST * math.sqrt(x[0].numel())
    negligible = (NEGLIGIBLE / coarsest * base).square().sum()
    if not mean_over_processes(negligible).isfinite():
        return Calibration(coarsest, math.nan)
    best, num_worse = Calibration(coarsest, math.inf), 0
    coarse = slope(h)
    while num_worse < PATIENCE:
        # All processes compare the same two numbers, so they stop together.
        fine = slope(h / 2)
        distance = (fine - coarse).square().sum()
        size = fine.square().sum() + negligible
        squares = mean_over_processes(torch.stack([distance, size]).double())
        error = relative_error(*squares.tolist())
        if error < best.error:
            best, num_worse = Calibration(h, error), 0
        else:
            num_worse += 1
        h, coarse = h / 2, fine
    return best


def relative_error(squared_distance: float, squared_size: float) -> float:
    """Return the relative error from two sums of squares; 0 if both are 0."""
    return 0.0 if squared_size == 0 else math.sqrt(squared_distance / squared_size)
