"""Errors of the network at true noised images: by timestep, by band of log-SNR, and on held-out against training images."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from difftrain.core.registry import NonNegativeInt, PositiveInt
from difftrain.diagnostics.base import (
    DIAGNOSTICS,
    Clean,
    Result,
    Subject,
    by_sample,
    mean_of,
    plain,
    spread_timesteps,
)
from difftrain.generation.generator import blocks
from difftrain.objective.losses import Squared
from difftrain.objective.parameterization import estimate, target

BAND = 2.0  # width of a band, in units of log-SNR, as in the log of training
KINDS = ("loss", "x0_error", "eps_error")


@DIAGNOSTICS.register("denoising_error")
@dataclass(frozen=True)
class DenoisingError:
    """loss(t) = E (output - target)^2, x0_error(t) = E (x0_hat - x0)^2, eps_error(t) = E (eps_hat - eps)^2, with x_t ~ q(x_t | x0).

    Means over pixels and images, unweighted; x0_hat is not clipped, the input not perturbed, dropout is off. The x0 error by timestep
    motivates the weighting of Yu et al. 2024, arXiv:2310.08442. Noise is keyed by image and timestep, so the numbers are repeatable. `gap`
    is held-out minus training, where training images are known, with its standard error: above the sets' own difference, which it has at
    the noise end, the network knows its training images by heart. Both sets have `num` images at most. `value` is the held-out loss, mean
    over `num_timesteps` evenly spread timesteps.
    """

    num: PositiveInt = 1000
    num_timesteps: PositiveInt = 50
    seed: NonNegativeInt = 0

    def check(self, subject: Subject) -> None:
        """Every schedule has these levels: of a shorter one all are taken."""

    @torch.no_grad()
    def __call__(self, subject: Subject) -> Result:
        timesteps = spread_timesteps(
            subject.schedule.num_timesteps, min(self.num_timesteps, subject.schedule.num_timesteps)
        )
        sets = {"held_out": subject.held_out.spread(self.num)}
        if subject.training is not None:
            sets["training"] = subject.training.spread(self.num)
        errors = {name: self.errors(subject, clean, timesteps) for name, clean in sets.items()}
        curves = {
            name: {kind: plain(e[..., k].mean(0)) for k, kind in enumerate(KINDS)}
            for name, e in errors.items()
        }
        result: Result = {
            "value": mean_of(curves["held_out"]["loss"]),
            "t": timesteps,
            "log_snr": subject.log_snr(timesteps),
            **curves,
            "bands": bands(
                subject.schedule.level(torch.tensor(timesteps)).log_snr, errors["held_out"].mean(0)
            ),
            "protocol": subject.protocol(
                self,
                sets["held_out"],
                error_of=subject.parameterization,
                pixels="[-1, 1] or latents",
            ),
        }
        if "training" in errors:
            gap, standard_error = difference(errors["held_out"], errors["training"])
            result["gap"] = {kind: plain(gap[:, k]) for k, kind in enumerate(KINDS)}
            result["gap_standard_error"] = {
                kind: plain(standard_error[:, k]) for k, kind in enumerate(KINDS)
            }
            result["protocol"]["num_training_images"] = len(sets["training"])
        return result

    def encode(self, subject: Subject) -> None:
        """Make the latents of the held-out images now, which are kept: the calls need no encoder then."""
        held_out = subject.held_out.spread(self.num)
        for indices in blocks(len(held_out), subject.block_size):
            held_out.x0(indices)

    def errors(self, subject: Subject, clean: Clean, timesteps: list[int]) -> Tensor:
        """[N, timesteps, KINDS]."""

        def rows(indices: list[int]) -> Tensor:
            labels = clean.labels_of(indices)
            return torch.stack(
                [self.at(subject, clean, indices, labels, t) for t in timesteps], dim=1
            )

        return by_sample(len(clean), (len(timesteps), len(KINDS)), subject.block_size, rows)

    def at(
        self, subject: Subject, clean: Clean, indices: list[int], labels: Tensor | None, t: int
    ) -> Tensor:
        x0, eps, x_t = subject.noised(clean, indices, t, self.seed)
        level, kind, squared = subject.level(t, len(x0)), subject.parameterization, Squared()
        output = subject.output(x_t, t, labels)
        implied = estimate(kind, output, x_t, level)
        return torch.stack(
            [
                squared(output, target(kind, x0, eps, level)),
                squared(implied.x0, x0),
                squared(implied.eps, eps),
            ],
            dim=1,
        )


def difference(held_out: Tensor, training: Tensor) -> tuple[Tensor, Tensor]:
    """Difference of the means over the samples of [N, ...] and [M, ...], and its standard error."""
    variances = [errors.var(0) / len(errors) for errors in (held_out, training)]
    return held_out.mean(0) - training.mean(0), (variances[0] + variances[1]).sqrt()


def bands(log_snr: Tensor, errors: Tensor) -> list[dict[str, Any]]:
    """Mean errors [timesteps, KINDS] by band of log-SNR [timesteps], noisiest first; a level at SNR = 0 is in no band."""
    places = {
        t: int(torch.floor(log_snr[t] / BAND))
        for t in range(len(log_snr))
        if torch.isfinite(log_snr[t])
    }
    found = []
    for band in sorted(set(places.values())):
        inside = [t for t in places if places[t] == band]
        means = zip(KINDS, plain(errors[inside].mean(0)), strict=True)
        found.append(
            {"log_snr": [BAND * band, BAND * (band + 1)], "timesteps": len(inside), **dict(means)}
        )
    return found
