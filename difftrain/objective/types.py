"""The data that flows through an objective: batches, timesteps, denoising passes, losses."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from difftrain.core.rng import Rng
from difftrain.objective.parameterization import Estimate
from difftrain.objective.schedule import NoiseLevel, NoiseSchedule

Cond = dict[str, Tensor]
"""Conditioning tensors [B, ...] by the denoiser's argument names."""

Denoiser = Callable[[Tensor, Tensor, Cond], Tensor]
"""(x_t [B, ...], time [B], cond) -> output.

The output has x_t's shape, or twice its channels with a learned variance.
"""


@dataclass(frozen=True)
class Batch:
    """Clean samples and their conditions.

    Args:
        x0: Clean samples: images [B, C, H, W], clips [B, C, F, H, W], or tensors [B, ...].
        cond: Conditioning tensors [B, ...] by the denoiser's argument names.
        weights: How much each sample counts [B], as in prior preservation. None: all
            count the same.
    """

    x0: Tensor
    cond: Cond = field(default_factory=dict)
    weights: Tensor | None = None


@dataclass(frozen=True)
class Losses:
    """What an objective returns: the loss, and what the log shows of it.

    Args:
        total: The loss [], with gradient.
        terms: Each addend of the total by name, already weighted: detached scalars.
        errors: The unweighted error of each sample [B], detached.
        log_snr: The noise level of each sample [B], for the error by band of noise levels.
        measures: What regularizers record besides their terms, no part of the total, such as
            "error_propagation.u_statistic".
    """

    total: Tensor
    terms: dict[str, Tensor]
    errors: Tensor
    log_snr: Tensor
    measures: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Timesteps:
    """Timesteps that a sampler drew.

    Args:
        t: Table indices [B], long.
        importance: Target density over sampling density [B], float64. The objective applies it
            once.
    """

    t: Tensor
    importance: Tensor


class Predict(Protocol):
    """Evaluates the denoiser of a pass again."""

    def __call__(self, x: Tensor, t: Tensor, rows: Tensor | slice | None = None) -> Estimate:
        """Return what the denoiser implies at other inputs.

        Conditions, dropped labels and the seed of dropout are those that the rows had in the pass.

        Args:
            x: Inputs [b, ...].
            t: Their table indices [b], long.
            rows: Which rows of the batch the inputs belong to. None: all of them, in order.
        """
        ...


def record_nothing(name: str, value: Tensor) -> None:
    """Ignore a measure."""


@dataclass(frozen=True)
class DenoisingPass:
    """One evaluated batch, as a regularizer sees it.

    Args:
        batch: The clean samples and their conditions.
        t: Table indices [B], long.
        level: Noise levels [B].
        eps: The noise that is the target [B, ...], without perturbation.
        x_t: The denoiser's input [B, ...].
        estimate: x0 and eps that the output implies [B, ...].
        predict: Evaluates the same denoiser again, with the conditions of this pass.
        schedule: The noise schedule.
        rng: The regularizer's own random draws.
        importance: What the objective multiplies each sample's values with [B]. None: 1.
        record: `record(name, value)` logs a scalar that is not the term.
    """

    batch: Batch
    t: Tensor
    level: NoiseLevel
    eps: Tensor
    x_t: Tensor
    estimate: Estimate
    predict: Predict
    schedule: NoiseSchedule
    rng: Rng
    importance: Tensor | None = None
    record: Callable[[str, Tensor], None] = record_nothing

    def mean(self, values: Tensor) -> Tensor:
        """Average over the micro-batch as the objective does, each sample times its importance.

        Args:
            values: One number for each sample [B].

        Returns:
            The mean [].
        """
        if self.importance is None:
            return values.mean()
        return (self.importance.to(values) * values).mean()
