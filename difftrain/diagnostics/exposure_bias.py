"""How far sampled x_t are from true ones: spread, norms of eps_hat, drift without noise."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from difftrain.core.registry import NonNegativeInt, PositiveInt
from difftrain.core.rng import Rng
from difftrain.diagnostics.base import DIAGNOSTICS, Clean, Diagnostic, Result, Subject
from difftrain.diagnostics.gathering import (
    by_block,
    by_sample,
    json_number,
    json_numbers,
    mean_of_known,
    population_std,
    power_sums,
    standard_error,
)
from difftrain.diagnostics.gaussian_floor import gaussian_std, mean_of_std
from difftrain.diagnostics.reverse_process import Stage, descent, last_state, one_step
from difftrain.diagnostics.spacing import spread_timesteps
from difftrain.diagnostics.within_groups import pooled_variance

# Of the length of the reverse process: published starts are 100, 300, 500, 700, 1000 of 1000 steps.
DRIFTS = (0.1, 0.3, 0.5, 0.7, 1.0)
FLOOR = "a perfect model of Gaussian data with the images' variance by pixel"

FEWEST = 3  # images of a standard error: on the std of two both have the influence 0


@DIAGNOSTICS.register("exposure_bias")
@dataclass(frozen=True)
class ExposureBias(Diagnostic):
    """delta_s = (p_s - sigma_s)^2, p_s = the std of x_s - alpha_s x0 over images, mean over pixels.

    The std is that of the population. In `consecutive` x_s lies on one reverse process that
    starts at q(x_T | x0) of held-out images; in `one_step` each step starts at a true x_t ~ q(x_t
    | x0). A perfect model does not score 0: a stochastic process forgets its x0. `floor` is what
    a perfect model scores, by closed form, on as many Gaussian images with these images' variance
    in each pixel; pixels of real images depend on each other, so the data's own floor may lie to
    either side. Read delta against the floor and against another model's. `value` is the mean of
    the consecutive deltas, `floor` that of its floor.

    The variance of a conditional model's images is that within classes or captions: squares about
    each one's mean, pooled over all of them and divided by images minus classes, so it has no
    bias however few images a class has. Classes of different variance count with their mean. A
    single image of a class says nothing about it. Where most images are alone, as with unique
    captions, the variance is that over all images: the floor of a model that ignores captions. The
    protocol states which one it is, and its degrees of freedom.

    A learned variance is that of the ancestral steps, in the floor too. `standard_error` is that of
    `value` over images, by the influence of each image on the curve of the stds (their delta
    method): a second run of the consecutive process, a fifth more time at 20 steps. The curve
    `std_standard_error` of `consecutive` is that of each std.

    `eps_norm`: mean over images of |eps_hat|_2 along that process and at true x_t; `gap` is their
    difference. `drift`: mean |x0_out - x0| after the last n steps with x_s the posterior's mean,
    from a true x_t; published with 1,000 steps (Ning et al. 2023, arXiv:2301.11706).

    Args:
        num: Images, at most.
        steps: Evenly spread timesteps.
        step: "ancestral", or "ddim" for a deterministic process for all but the drift, with its
            own floor.
        seed: Seed of the noise.

    Reference:
        Ning et al. 2024, "Elucidating the Exposure Bias in Diffusion Models", arXiv:2308.15321; the
        estimator of their published code.
    """

    num: PositiveInt = 1000
    steps: PositiveInt = 20
    step: Literal["ancestral", "ddim"] = "ancestral"
    seed: NonNegativeInt = 0

    def check(self, subject: Subject) -> None:
        """Refuse more steps than the schedule has timesteps.

        Raises:
            InputError: If there are fewer timesteps.
        """
        super().check(subject)
        spread_timesteps(subject.schedule.num_timesteps, self.steps)

    @torch.no_grad()
    def __call__(self, subject: Subject) -> Result:
        """Measure spread, norms and drift. Collective."""
        # Power sums of x_s - alpha_s x0 and norms of eps_hat, along the process and at true x_t
        clean = subject.held_out.spread(self.num)
        if subject.conditioning.conditions:
            clean = clean.by_label()
        timesteps = spread_timesteps(subject.schedule.num_timesteps, self.steps)
        below = [-1, *timesteps[:-1]]
        num, pixels = len(clean), math.prod(subject.shape)
        width = (2, self.steps, 2 * pixels + 1)
        pooled = pooled_variance(subject, clean)

        def block_sums(indices: list[int]) -> Tensor:
            return self._sums(subject, clean, indices, timesteps)

        sums = by_block(num, width, subject.block_size, subject.denoiser, block_sums)
        powers = torch.unflatten(sums[..., 1:], -1, (2, pixels))
        consecutive, one = population_std(powers, num).mean(-1)
        along, true = sums[..., 0] / num
        # Against the closed form
        sigma = subject.schedule.level_before(torch.tensor(below), steps=0).sigma
        of_images = mean_of_std(num)

        def curves(std: Tensor, is_consecutive: bool) -> dict[str, Any]:
            floor = of_images * gaussian_std(
                subject, pooled.variance, timesteps, self.step, is_consecutive
            )
            return {
                "std": json_numbers(std),
                "delta": json_numbers((std - sigma) ** 2),
                "floor": json_numbers((floor - sigma) ** 2),
            }

        of_consecutive, of_one_step = curves(consecutive, True), curves(one, False)
        # How sure the numbers are
        influences = self._influences(subject, clean, timesteps, powers[0] / num)
        if num < FEWEST:
            influences = torch.full_like(influences, torch.nan)
        of_consecutive["std_standard_error"] = json_numbers(standard_error(influences))
        of_value = (influences * 2 * (consecutive - sigma)).mean(1)

        return {
            "value": mean_of_known(of_consecutive["delta"]),
            "standard_error": json_number(standard_error(of_value)),
            "floor": mean_of_known(of_consecutive["floor"]),
            "t": below,
            "log_snr": subject.log_snr(below),
            "sigma": json_numbers(sigma),
            "consecutive": of_consecutive,
            "one_step": of_one_step,
            "eps_norm": {
                "t": timesteps,
                "log_snr": subject.log_snr(timesteps),
                "sampling": json_numbers(along),
                "true": json_numbers(true),
                "gap": json_numbers(along - true),
            },
            "drift": self._drift(subject, clean, timesteps),
            "protocol": subject.protocol(
                self,
                clean,
                ddof=0,
                clipped=subject.clips,
                sampler=self.step,
                spacing="evenly spread",
                pixels="[-1, 1] or latents",
                floor=f"{FLOOR} {pooled.over}",
                floor_groups=pooled.num_groups,
                floor_degrees_of_freedom=pooled.degrees_of_freedom,
            ),
        }

    def _sums(
        self, subject: Subject, clean: Clean, indices: list[int], timesteps: list[int]
    ) -> Tensor:
        """Sum over a block, along the process and at true x_t.

        Returns:
            [2, steps, 1 + 2 D], timesteps ascending: the sum of |eps_hat|_2 at t, and power sums
            of x_s - alpha_s x0 one step below.
        """
        x0, labels = clean.x0(indices), clean.labels_of(indices)
        rng = Rng(self.seed, 0, indices)

        def row(stage: Stage) -> Tensor:
            norm = stage.estimate.eps.flatten(1).double().norm(dim=1).sum()
            sums = power_sums(residual(subject, stage, x0))
            return torch.cat([norm[None], sums.flatten()])

        # Along the process
        stages = self._process(subject, clean, indices, timesteps)
        along = [row(stage) for stage in stages][::-1]
        # At true x_t
        single = []
        for t, below in zip(timesteps, [-1, *timesteps[:-1]], strict=True):
            _, _, x_t = subject.noised(clean, indices, t, self.seed)
            found, predicted = subject.reverse_estimate(x_t, t, labels)
            x = one_step(subject, x_t, found, predicted, t, below, self.step, rng.child("one_step"))
            single.append(row(Stage(t, below, found, x)))
        return torch.stack([torch.stack(along), torch.stack(single)])

    def _process(
        self, subject: Subject, clean: Clean, indices: list[int], timesteps: list[int]
    ) -> Iterator[Stage]:
        """Yield the consecutive steps from q(x_T | x0) of some images."""
        _, _, start = subject.noised(clean, indices, timesteps[-1], self.seed)
        rng = Rng(self.seed, 0, indices)
        return descent(subject, start, timesteps, clean.labels_of(indices), self.step, rng)

    def _influences(
        self, subject: Subject, clean: Clean, timesteps: list[int], moments: Tensor
    ) -> Tensor:
        """Return the influence of each image on p_s along the process, [N, steps].

        It is the mean over pixels of ((r - mean)^2 - var) / (2 std), r = x_s - alpha_s x0. A pixel
        without spread has none.

        Args:
            subject: The network and its schedule.
            clean: The images.
            timesteps: Table indices, ascending.
            moments: Mean of r and of r^2 over images [steps, 2, D].
        """

        def rows(indices: list[int]) -> Tensor:
            x0, found = clean.x0(indices), []
            stages = self._process(subject, clean, indices, timesteps)
            for (mean, square), stage in zip(moments.flip(0), stages, strict=True):
                r = residual(subject, stage, x0).flatten(1).cpu().double()
                variance = (square - mean**2).clamp(min=0)
                influence = ((r - mean) ** 2 - variance) / (2 * variance.sqrt())
                found.append(torch.where(variance > 0, influence, 0.0).mean(1))
            return torch.stack(found[::-1], dim=1)

        return by_sample(len(clean), (len(timesteps),), subject.block_size, subject.denoiser, rows)

    def _drift(self, subject: Subject, clean: Clean, timesteps: list[int]) -> dict[str, Any]:
        """Measure the drift after the last n steps."""
        total = len(timesteps)
        starts = sorted({max(1, round(fraction * total)) for fraction in DRIFTS})

        def rows(indices: list[int]) -> Tensor:
            labels, found = clean.labels_of(indices), []
            for n in starts:
                x0, _, x = subject.noised(clean, indices, timesteps[n - 1], self.seed)
                rng = Rng(self.seed, 0, indices)
                out = last_state(descent(subject, x, timesteps[:n], labels, "mean", rng))
                found.append((out - x0).abs().flatten(1).mean(1))
            return torch.stack(found, dim=1)

        errors = by_sample(len(clean), (len(starts),), subject.block_size, subject.denoiser, rows)
        return {
            "steps": starts,
            "t": [timesteps[n - 1] for n in starts],
            "error": json_numbers(errors.mean(0)),
            "standard_error": json_numbers(standard_error(errors)),
        }


def residual(subject: Subject, stage: Stage, x0: Tensor) -> Tensor:
    """Return x_s - alpha_s x0 [B, ...] after a step."""
    level = subject.schedule.level_before(torch.tensor([stage.below]), steps=0)
    return stage.x - level.alpha.to(x0) * x0
