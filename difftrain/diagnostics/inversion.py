"""Held-out images to noise and back along the deterministic sampler: what survives."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from difftrain.core.registry import NonNegativeInt, PositiveInt
from difftrain.core.rng import Rng
from difftrain.diagnostics.base import DIAGNOSTICS, Clean, Diagnostic, Result, Subject
from difftrain.diagnostics.gathering import by_sample, json_numbers, standard_error
from difftrain.diagnostics.reverse_process import descent, last_state
from difftrain.diagnostics.spacing import trailing_timesteps
from difftrain.evaluation.distances.structural_similarity import structural_similarity
from difftrain.objective.losses import per_sample
from difftrain.objective.parameterization import estimate
from difftrain.objective.schedule import expand_like

QUANTITIES = ("mse", "psnr", "ssim")
LEAST_MSE = 1e-12  # an error of 0 is 120 dB


@DIAGNOSTICS.register("inversion")
@dataclass(frozen=True)
class Inversion(Diagnostic):
    """x_t = alpha_t x0_hat + sigma_t eps_hat upwards from an image, DDIM downwards; the error.

    The output is taken at the next level's time and converted at the level of x, as diffusers
    does. Nothing is clipped on the way, guidance is 1, images are floats in [0, 1]. mse, psnr =
    -10 log10(mse) in dB and ssim (window 11; not of smaller images) are means over images. Of
    latent models `encoder` has the same numbers of the encoder's round trip alone: the ceiling.
    `noise_mean` and `noise_std` are those of all inverted noises, 0 and 1 for an ideal model.
    `value` is the mse, `standard_error` its standard error over images; psnr and ssim have theirs
    as `psnr_standard_error` and `ssim_standard_error`.

    Args:
        num: Images, at most.
        steps: Steps up and down, in diffusers' `trailing` spacing.
        seed: Seed of the encoder's draws.

    Reference:
        DDIM inversion: Song et al. 2021, "Denoising Diffusion Implicit Models", arXiv:2010.02502.
        The reconstruction errors: Guo et al. 2024, "Smooth Diffusion", arXiv:2312.04410.
    """

    num: PositiveInt = 200
    steps: PositiveInt = 50
    seed: NonNegativeInt = 0
    needs_images: ClassVar[bool] = True

    def check(self, subject: Subject) -> None:
        """Refuse tensors, and more steps than the schedule has timesteps.

        Raises:
            InputError: If samples are not images, or if there are fewer timesteps.
        """
        super().check(subject)
        trailing_timesteps(subject.schedule.num_timesteps, self.steps)

    @torch.no_grad()
    def __call__(self, subject: Subject) -> Result:
        """Measure the error. Collective."""
        self.check(subject)
        clean = subject.held_out.spread(self.num)
        timesteps = trailing_timesteps(subject.schedule.num_timesteps, self.steps)

        def own_rows(indices: list[int]) -> Tensor:
            return self._rows(subject, clean, indices, timesteps)

        rows = by_sample(len(clean), (8,), subject.block_size, subject.denoiser, own_rows)
        of_result = json_numbers(rows[:, :3].mean(0))
        found: dict[str, Any] = dict(zip(QUANTITIES, of_result, strict=True))
        if subject.encoder is not None:
            of_encoder = json_numbers(rows[:, 3:6].mean(0))
            found["encoder"] = dict(zip(QUANTITIES, of_encoder, strict=True))
        errors = ("standard_error", "psnr_standard_error", "ssim_standard_error")
        mean, square = rows[:, 6:].mean(0)
        return {
            "value": found["mse"],
            **found,
            **dict(zip(errors, json_numbers(standard_error(rows[:, :3])), strict=True)),
            "noise_mean": float(mean),
            "noise_std": float((square - mean**2).clamp(min=0).sqrt()),
            "protocol": subject.protocol(
                self,
                clean,
                range="[0, 1]",
                clipped=False,
                sampler="ddim",
                eta=0,
                steps=self.steps,
                spacing="trailing",
                guidance=1.0,
            ),
        }

    def _rows(
        self, subject: Subject, clean: Clean, indices: list[int], timesteps: list[int]
    ) -> Tensor:
        """Measure some images.

        Returns:
            [B, 8]: how similar the result is, how similar the encoder's round trip is, and mean
            and mean square of the noise.
        """
        x0, labels = clean.x0(indices), clean.labels_of(indices)
        image = subject.pixels(x0) if clean.pixels is None else clean.pixels(indices)
        noise = inverted(subject, x0, timesteps, labels)
        rng = Rng(self.seed, 0, indices)
        back = last_state(descent(subject, noise, timesteps, labels, "ddim", rng, clips=False))
        of_result = similarity(subject.pixels(back), image)
        of_encoder = similarity(subject.pixels(x0), image)
        of_noise = torch.stack([per_sample(noise), per_sample(noise**2)], dim=1).double()
        return torch.cat([of_result, of_encoder, of_noise], dim=1)


def inverted(subject: Subject, x0: Tensor, timesteps: list[int], labels: Tensor | None) -> Tensor:
    """Invert the deterministic sampler.

    Args:
        subject: The network and its schedule.
        x0: Clean samples [B, ...].
        timesteps: Table indices, ascending.
        labels: Labels [B], if the network takes any.

    Returns:
        x [B, ...] at the last of the timesteps.
    """
    x, kind = x0, subject.parameterization
    for k, t in enumerate(timesteps):
        level = subject.level(t, len(x))
        at_x = subject.level(timesteps[k - 1] if k else -1, len(x))
        if k == 0 and kind == "sample":  # at sigma = 0 an x0 says nothing about eps
            at_x = level
        found = estimate(kind, subject.output(x, t, labels), x, at_x)
        x = expand_like(level.alpha, x) * found.x0 + expand_like(level.sigma, x) * found.eps
    return x


def similarity(image: Tensor, other: Tensor) -> Tensor:
    """Return mse, psnr and ssim [B, 3] float64 of images [B, C, H, W] in [0, 1].

    SSIM is NaN of images smaller than its window.
    """
    mse = per_sample((image.double() - other.double()) ** 2)
    psnr = -10 * mse.clamp(min=LEAST_MSE).log10()
    return torch.stack([mse, psnr, structural_similarity(image, other)], dim=1)
