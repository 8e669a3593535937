"""Learning rate as a function of the step, so that a resumed run continues by computing it.

A schedule is called as `schedule(step, num_steps)` and returns the factor on the optimizer's rate.
"""

import math
from dataclasses import dataclass
from typing import Protocol

from difftrain.core.registry import NonNegativeInt, Registry, UnitInterval

LEARNING_RATES = Registry(
    "lr_schedule", "learning rate as a function of the step", ["difftrain.training.lr"]
)


class LearningRate(Protocol):
    """The factor on the learning rate as a function of the step."""

    def __call__(self, step: int, num_steps: int) -> float:
        """Return the factor of one step.

        Args:
            step: The step, counted from 0.
            num_steps: Number of steps of the run.
        """
        ...


def remarks(schedule: LearningRate, num_steps: int) -> list[str]:
    """Return sentences about steps that teach less than one would expect.

    Args:
        schedule: The learning rate.
        num_steps: Number of steps of the run.
    """
    found = []
    warmup = getattr(schedule, "warmup", 0)
    if warmup > num_steps:
        share = 100 * num_steps / warmup
        found.append(
            f"warmup: {warmup} steps are more than the {num_steps} of the run, so the learning "
            f"rate reaches {share:.0f} % of its peak"
        )
    if num_steps > 1 and schedule(num_steps - 1, num_steps) == 0:
        found.append(
            "the learning rate of the last step is 0, so its batch teaches nothing; with final: "
            "0.01, for example, it does"
        )
    return found


def warmed_up(step: int, warmup: int) -> float:
    """Return (step + 1) / warmup during warm-up, then 1.

    Args:
        step: The step, counted from 0.
        warmup: Number of steps of the warm-up.
    """
    return min(1.0, (step + 1) / warmup) if warmup else 1.0


def progress(step: int, num_steps: int, warmup: int) -> float:
    """Return how far a run is after its warm-up, from 0 at the end of the warm-up to 1.

    Args:
        step: The step, counted from 0. The last one and all later ones give 1.
        num_steps: Number of steps of the run.
        warmup: Number of steps of the warm-up.
    """
    return min(1.0, max(0, step - warmup) / max(1, num_steps - 1 - warmup))


@LEARNING_RATES.register("constant")
@dataclass(frozen=True)
class Constant:
    """1, after a linear warm-up of `warmup` steps.

    Args:
        warmup: Number of steps of the warm-up.
    """

    warmup: NonNegativeInt = 0

    def __call__(self, step: int, num_steps: int) -> float:
        """Return the factor of one step; see `LearningRate`."""
        return warmed_up(step, self.warmup)


@LEARNING_RATES.register("linear")
@dataclass(frozen=True)
class Linear:
    """From 1 to `final` in a straight line, after a linear warm-up.

    With `final: 0` the last step changes nothing.

    Args:
        warmup: Number of steps of the warm-up.
        final: The factor of the last step.
    """

    warmup: NonNegativeInt = 0
    final: UnitInterval = 0.0

    def __call__(self, step: int, num_steps: int) -> float:
        """Return the factor of one step; see `LearningRate`."""
        line = 1 - (1 - self.final) * progress(step, num_steps, self.warmup)
        return warmed_up(step, self.warmup) * line


@LEARNING_RATES.register("cosine")
@dataclass(frozen=True)
class Cosine:
    """From 1 to `final` along half a cosine, after a linear warm-up. There are no restarts.

    With `final: 0` the last step changes nothing.

    Args:
        warmup: Number of steps of the warm-up.
        final: The factor of the last step.

    Reference:
        Loshchilov and Hutter 2017, "SGDR: Stochastic Gradient Descent with Warm Restarts",
        arXiv:1608.03983.
    """

    warmup: NonNegativeInt = 0
    final: UnitInterval = 0.0

    def __call__(self, step: int, num_steps: int) -> float:
        """Return the factor of one step; see `LearningRate`."""
        half_cosine = 0.5 * (1 + math.cos(math.pi * progress(step, num_steps, self.warmup)))
        return warmed_up(step, self.warmup) * (self.final + (1 - self.final) * half_cosine)
