"""Errors of the network at true noised samples, by noise level, held-out against training."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from difftrain.core.registry import NonNegativeInt, PositiveInt
from difftrain.diagnostics.base import DIAGNOSTICS, Clean, Diagnostic, Result, Subject
from difftrain.diagnostics.gathering import (
    by_sample,
    json_number,
    json_numbers,
    mean_of_known,
    standard_error,
)
from difftrain.diagnostics.spacing import spread_timesteps
from difftrain.generation.generator import blocks
from difftrain.objective.losses import Squared
from difftrain.objective.parameterization import estimate, target

BAND_WIDTH = 2.0  # in units of log-SNR, as in the log of training
KINDS = ("loss", "x0_error", "eps_error")


@DIAGNOSTICS.register("denoising_error")
@dataclass(frozen=True)
class DenoisingError(Diagnostic):
    """loss(t) = E (output - target)^2, x0_error(t) = E (x0_hat - x0)^2,
    eps_error(t) = E (eps_hat - eps)^2.

    x_t ~ q(x_t | x0). They are means over pixels and images, unweighted; x0_hat is not clipped,
    the input is not perturbed, dropout is off. Noise is keyed by image and timestep, so the
    numbers are repeatable. `gap` is held-out minus training error, where training images are known,
    with its standard error. At high noise it shows how the two sets differ by themselves; a larger
    gap at low noise means that the network memorizes its training images. `value` is the held-out
    loss, mean over the timesteps. `standard_error` is that of `value` over held-out images, whose
    errors at all timesteps belong together; `held_out_standard_error` and
    `training_standard_error` are those of the curves.

    Args:
        num: Images of either set, at most.
        num_timesteps: Evenly spread timesteps; of a shorter schedule all.
        seed: Seed of the noise.

    Reference:
        The x0 error by timestep motivates the weighting of Yu et al. 2024, "Unmasking Bias in
        Diffusion Model Training", arXiv:2310.08442.
    """

    num: PositiveInt = 1000
    num_timesteps: PositiveInt = 50
    seed: NonNegativeInt = 0

    @torch.no_grad()
    def __call__(self, subject: Subject) -> Result:
        """Measure the errors. Collective."""
        # The errors of both sets
        total = subject.schedule.num_timesteps
        timesteps = spread_timesteps(total, min(self.num_timesteps, total))
        held_out = subject.held_out.spread(self.num)
        errors = self._errors(subject, held_out, timesteps)
        curves = {
            "held_out": mean_curves(errors),
            "held_out_standard_error": by_kind(standard_error(errors)),
        }
        training = None if subject.training is None else subject.training.spread(self.num)
        training_errors = None
        if training is not None:
            training_errors = self._errors(subject, training, timesteps)
            curves["training"] = mean_curves(training_errors)
            curves["training_standard_error"] = by_kind(standard_error(training_errors))
        # What they say
        log_snr = subject.schedule.level(torch.tensor(timesteps)).log_snr
        result: Result = {
            "value": mean_of_known(curves["held_out"]["loss"]),
            "standard_error": json_number(standard_error(errors[..., 0].mean(1))),
            "t": timesteps,
            "log_snr": subject.log_snr(timesteps),
            **curves,
            "bands": error_bands(log_snr, errors.mean(0)),
            "protocol": subject.protocol(
                self, held_out, error_of=subject.parameterization, pixels="[-1, 1] or latents"
            ),
        }
        if training is not None and training_errors is not None:
            gap, gap_error = gap_of_means(errors, training_errors)
            result["gap"] = by_kind(gap)
            result["gap_standard_error"] = by_kind(gap_error)
            result["protocol"]["num_training_images"] = len(training)
        return result

    def encode(self, subject: Subject) -> None:
        """Make and keep the latents of the held-out images, so that later calls need no encoder."""
        held_out = subject.held_out.spread(self.num)
        for indices in blocks(len(held_out), subject.block_size):
            held_out.x0(indices)

    def _errors(self, subject: Subject, clean: Clean, timesteps: list[int]) -> Tensor:
        """Return the errors [N, timesteps, KINDS] of a set."""

        def rows(indices: list[int]) -> Tensor:
            return torch.stack([self._at(subject, clean, indices, t) for t in timesteps], dim=1)

        return by_sample(
            len(clean), (len(timesteps), len(KINDS)), subject.block_size, subject.denoiser, rows
        )

    def _at(self, subject: Subject, clean: Clean, indices: list[int], t: int) -> Tensor:
        """Return the errors [B, KINDS] of some samples at one timestep."""
        x0, eps, x_t = subject.noised(clean, indices, t, self.seed)
        level, kind = subject.level(t, len(x0)), subject.parameterization
        output = subject.output(x_t, t, clean.labels_of(indices))
        implied = estimate(kind, output, x_t, level)
        squared = Squared()
        errors = [
            squared(output, target(kind, x0, eps, level)),
            squared(implied.x0, x0),
            squared(implied.eps, eps),
        ]
        return torch.stack(errors, dim=1)


def mean_curves(errors: Tensor) -> dict[str, list[float | None]]:
    """Return the mean over samples of errors [N, timesteps, KINDS], by kind."""
    return {kind: json_numbers(errors[..., k].mean(0)) for k, kind in enumerate(KINDS)}


def by_kind(numbers: Tensor) -> dict[str, list[float | None]]:
    """Return numbers [timesteps, KINDS] by kind."""
    return {kind: json_numbers(numbers[:, k]) for k, kind in enumerate(KINDS)}


def gap_of_means(held_out: Tensor, training: Tensor) -> tuple[Tensor, Tensor]:
    """Compare the means over samples of [N, ...] and [M, ...].

    Returns:
        Their difference [...], and its standard error [...], NaN where a side has one sample.
    """
    difference = held_out.mean(0) - training.mean(0)
    if min(len(held_out), len(training)) < 2:
        return difference, torch.full_like(difference, torch.nan)
    variance = held_out.var(0) / len(held_out) + training.var(0) / len(training)
    return difference, variance.sqrt()


def error_bands(log_snr: Tensor, errors: Tensor) -> list[dict[str, Any]]:
    """Gather mean errors in bands of log-SNR, noisiest first; a level at SNR = 0 is in no band.

    Args:
        log_snr: [timesteps].
        errors: [timesteps, KINDS].

    Returns:
        Of each band its interval, its number of timesteps, and the mean errors by kind.
    """
    places: dict[int, list[int]] = {}
    for t, value in enumerate(log_snr):
        if torch.isfinite(value):
            places.setdefault(int(torch.floor(value / BAND_WIDTH)), []).append(t)
    found = []
    for band in sorted(places):
        means = json_numbers(errors[places[band]].mean(0))
        interval = [BAND_WIDTH * band, BAND_WIDTH * (band + 1)]
        about = {"log_snr": interval, "timesteps": len(places[band])}
        found.append({**about, **dict(zip(KINDS, means, strict=True))})
    return found
