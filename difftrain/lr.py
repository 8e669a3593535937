"""Learning rate as a function of the step: nothing is saved, and a resumed run continues by computing it.

Each schedule is called as `schedule(step, num_steps)` with step from 0 and returns the factor on the optimizer's rate.
"""

import math
from dataclasses import dataclass
from typing import Protocol

from difftrain.registry import LEARNING_RATES, NonNegativeInt, UnitInterval


class LearningRate(Protocol):
    def __call__(self, step: int, num_steps: int) -> float: ...


def warmed_up(step: int, warmup: int) -> float:
    """(step + 1) / warmup during warm-up, then 1."""
    return min(1.0, (step + 1) / warmup) if warmup else 1.0


def progress(step: int, num_steps: int, warmup: int) -> float:
    """0 at the end of the warm-up, 1 at the last step."""
    return min(1.0, max(0, step - warmup) / max(1, num_steps - 1 - warmup))


@LEARNING_RATES.register("constant")
@dataclass(frozen=True)
class Constant:
    """1, after a linear warm-up of `warmup` steps."""

    warmup: NonNegativeInt = 0

    def __call__(self, step: int, num_steps: int) -> float:
        return warmed_up(step, self.warmup)


@LEARNING_RATES.register("linear")
@dataclass(frozen=True)
class Linear:
    """From 1 to `final` in a straight line, after a linear warm-up."""

    warmup: NonNegativeInt = 0
    final: UnitInterval = 0.0

    def __call__(self, step: int, num_steps: int) -> float:
        return warmed_up(step, self.warmup) * (1 - (1 - self.final) * progress(step, num_steps, self.warmup))


@LEARNING_RATES.register("cosine")
@dataclass(frozen=True)
class Cosine:
    """From 1 to `final` along half a cosine, after a linear warm-up. Loshchilov and Hutter 2017, arXiv:1608.03983 (no restarts)."""

    warmup: NonNegativeInt = 0
    final: UnitInterval = 0.0

    def __call__(self, step: int, num_steps: int) -> float:
        half_cosine = 0.5 * (1 + math.cos(math.pi * progress(step, num_steps, self.warmup)))
        return warmed_up(step, self.warmup) * (self.final + (1 - self.final) * half_cosine)
