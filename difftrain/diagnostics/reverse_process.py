"""A reverse chain over some of the schedule's timesteps, level by level, with keyed noise: what sampling does, open to inspection."""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from difftrain.core.rng import Rng
from difftrain.diagnostics.base import Subject
from difftrain.objective.parameterization import Estimate
from difftrain.objective.transitions import ancestral, ddim, posterior

Step = Literal["ancestral", "mean", "ddim"]


class Stage(NamedTuple):
    """One step: from level t, where the network gave `estimate`, to x at level `below` (-1: the clean image)."""

    t: int
    below: int
    estimate: Estimate
    x: Tensor


def one_step(
    subject: Subject, x: Tensor, estimate: Estimate, t: int, below: int, step: Step, rng: Rng
) -> Tensor:
    """x at level `below`. ancestral: drawn from q(x_s | x_t, x0_hat); mean: that posterior's mean; ddim: deterministic, and on flow
    schedules the Euler step."""
    level, before = subject.level(t, len(x)), subject.level(below, len(x))
    if step == "ancestral":
        return ancestral(
            x, estimate, level, before, rng.normal(x.shape[1:], f"diagnostics.step {below}").to(x)
        )
    return (
        posterior(estimate.x0, x, level, before).mean
        if step == "mean"
        else ddim(x, estimate, level, before)
    )


def descent(
    subject: Subject,
    x: Tensor,
    timesteps: Sequence[int],
    labels: Tensor | None,
    step: Step,
    rng: Rng,
    guidance: float = 1.0,
    clips: bool | None = None,
) -> Iterator[Stage]:
    """From x at the last of the ascending timesteps down to the clean image."""
    for k in reversed(range(len(timesteps))):
        t, below = timesteps[k], timesteps[k - 1] if k else -1
        estimate = subject.estimate(x, t, labels, guidance, clips)
        x = one_step(subject, x, estimate, t, below, step, rng)
        yield Stage(t, below, estimate, x)


def end_of(stages: Iterator[Stage]) -> Tensor:
    """x0 at the end of a descent."""
    x = torch.empty(0)
    for stage in stages:
        x = stage.x
    return x
