"""Held-out images to noise and back along the deterministic sampler: how much of an image survives."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from difftrain.core.registry import NonNegativeInt, PositiveInt
from difftrain.core.rng import Rng
from difftrain.diagnostics.base import (
    DIAGNOSTICS,
    Clean,
    Result,
    Subject,
    by_sample,
    plain,
    trailing_timesteps,
)
from difftrain.diagnostics.reverse_process import descent, end_of
from difftrain.objective.losses import per_sample
from difftrain.objective.parameterization import estimate
from difftrain.objective.schedule import expand_like

WINDOW = 11  # pixels of the window of SSIM, and so the smallest image it is defined for
QUANTITIES = ("mse", "psnr", "ssim")


@DIAGNOSTICS.register("inversion")
@dataclass(frozen=True)
class Inversion:
    """x_t = alpha_t x0_hat + sigma_t eps_hat upwards from an image, the estimates at (x_s, t); DDIM downwards again; error of the result.

    DDIM inversion: Song et al. 2021, arXiv:2010.02502; the reconstruction errors of Guo et al. 2024, arXiv:2312.04410. The output is
    taken at the next level's time and converted at the level where x stands, as diffusers does. Nothing is clipped on the way, guidance
    is 1, images are floats in [0, 1]. mse, psnr = -10 log10(mse) in dB and ssim (torchmetrics, window 11; not of smaller images) are means
    over images. Of latent models `encoder` has the same numbers of the encoder's round trip alone: the ceiling. `noise_mean` and
    `noise_std` are those of all inverted noises, 0 and 1 for an ideal model. `value` is the mse.
    """

    num: PositiveInt = 200
    steps: PositiveInt = 50
    seed: NonNegativeInt = 0

    def check(self, subject: Subject) -> None:
        trailing_timesteps(subject.schedule.num_timesteps, self.steps)

    @torch.no_grad()
    def __call__(self, subject: Subject) -> Result:
        clean = subject.held_out.spread(self.num)
        timesteps = trailing_timesteps(subject.schedule.num_timesteps, self.steps)
        rows = by_sample(
            len(clean),
            (8,),
            subject.block_size,
            lambda indices: self.rows(subject, clean, indices, timesteps),
        )
        found: dict[str, Any] = dict(zip(QUANTITIES, plain(rows[:, :3].mean(0)), strict=True))
        if subject.encoder is not None:
            found["encoder"] = dict(zip(QUANTITIES, plain(rows[:, 3:6].mean(0)), strict=True))
        mean, square = rows[:, 6:].mean(0)
        return {
            "value": found["mse"],
            **found,
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

    def rows(
        self, subject: Subject, clean: Clean, indices: list[int], timesteps: list[int]
    ) -> Tensor:
        """[B, 8]: qualities of the reconstruction, those of the encoder, mean and mean square of the noise."""
        x0, labels = clean.x0(indices), clean.labels_of(indices)
        image = clean.pixels(indices) if clean.pixels is not None else subject.pixels(x0)
        noise = inverted(subject, x0, timesteps, labels)
        back = end_of(
            descent(
                subject, noise, timesteps, labels, "ddim", Rng(self.seed, 0, indices), clips=False
            )
        )
        qualities = [similarity(subject.pixels(found), image) for found in (back, x0)]
        return torch.cat(
            [*qualities, torch.stack([per_sample(noise), per_sample(noise**2)], dim=1).double()],
            dim=1,
        )


def inverted(subject: Subject, x0: Tensor, timesteps: list[int], labels: Tensor | None) -> Tensor:
    """x at the last of the ascending timesteps [B, ...]."""
    x = x0
    for k, t in enumerate(timesteps):
        stands, level = (
            subject.level(timesteps[k - 1] if k else -1, len(x)),
            subject.level(t, len(x)),
        )
        if (
            k == 0 and subject.parameterization == "sample"
        ):  # at sigma = 0 an x0 says nothing about eps
            stands = level
        found = estimate(subject.parameterization, subject.output(x, t, labels), x, stands)
        x = expand_like(level.alpha, x) * found.x0 + expand_like(level.sigma, x) * found.eps
    return x


def similarity(image: Tensor, other: Tensor) -> Tensor:
    """QUANTITIES [B, 3] float64 of images [B, C, H, W] in [0, 1]; SSIM is NaN of images smaller than its window."""
    mse = per_sample((image.double() - other.double()) ** 2)
    ssim = torch.full_like(mse, torch.nan)
    if image.ndim == 4 and min(image.shape[-2:]) >= WINDOW:
        from torchmetrics.functional.image import structural_similarity_index_measure

        ssim = structural_similarity_index_measure(
            image.double(), other.double(), data_range=1.0, kernel_size=WINDOW, reduction="none"
        )
    return torch.stack([mse, -10 * mse.clamp(min=1e-12).log10(), ssim.reshape(-1)], dim=1)
