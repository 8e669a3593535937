"""How far sampled x_t are from true ones: spread, norms of eps_hat, drift without noise."""

import math
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
    json_numbers,
    mean_of_known,
    population_std,
    power_sums,
)
from difftrain.diagnostics.gaussian_floor import gaussian_std
from difftrain.diagnostics.reverse_process import Stage, descent, last_state, one_step
from difftrain.diagnostics.spacing import spread_timesteps

# Of the length of the reverse process: published starts are 100, 300, 500, 700, 1000 of 1000 steps.
DRIFTS = (0.1, 0.3, 0.5, 0.7, 1.0)
FLOOR = "a perfect model of Gaussian data with the images' variance by pixel"


@DIAGNOSTICS.register("exposure_bias")
@dataclass(frozen=True)
class ExposureBias(Diagnostic):
    """delta_s = (p_s - sigma_s)^2, p_s = the std of x_s - alpha_s x0 over images, mean over pixels.

    The std is that of the population. In `consecutive` x_s lies on one reverse process that
    starts at q(x_T | x0) of held-out images; in `one_step` each step starts at a true x_t ~ q(x_t
    | x0). A perfect model does not score 0: a stochastic process forgets its x0. `floor` is what
    a perfect model scores, by closed form, on Gaussian data with these images' variance in each
    pixel (within classes, if the model is conditional); pixels of real images depend on each
    other, so the data's own floor may lie to either side. Read delta against the floor and
    against another model's. `value` is the mean of the consecutive deltas, `floor` that of its
    floor.

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
        timesteps = spread_timesteps(subject.schedule.num_timesteps, self.steps)
        below = [-1, *timesteps[:-1]]
        num, pixels = len(clean), math.prod(subject.shape)
        width = (2, self.steps, 2 * pixels + 1)

        def block_sums(indices: list[int]) -> Tensor:
            return self._sums(subject, clean, indices, timesteps)

        sums = by_block(num, width, subject.block_size, subject.denoiser, block_sums)
        powers = torch.unflatten(sums[..., 1:], -1, (2, pixels))
        consecutive, one = population_std(powers, num).mean(-1)
        along, true = sums[..., 0] / num
        # Against the closed form
        sigma = subject.schedule.level_before(torch.tensor(below), steps=0).sigma
        variances, shares = self._variances(subject, clean)

        def curves(std: Tensor, is_consecutive: bool) -> dict[str, Any]:
            floor = gaussian_std(subject, variances, shares, timesteps, self.step, is_consecutive)
            return {
                "std": json_numbers(std),
                "delta": json_numbers((std - sigma) ** 2),
                "floor": json_numbers((floor - sigma) ** 2),
            }

        of_consecutive, of_one_step = curves(consecutive, True), curves(one, False)

        return {
            "value": mean_of_known(of_consecutive["delta"]),
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
                floor=FLOOR + (" within classes" if subject.conditioning.conditions else ""),
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
            level = subject.schedule.level_before(torch.tensor([stage.below]), steps=0)
            left = stage.x - level.alpha.to(x0) * x0
            return torch.cat([norm[None], power_sums(left).flatten()])

        # Along the process
        _, _, start = subject.noised(clean, indices, timesteps[-1], self.seed)
        stages = descent(subject, start, timesteps, labels, self.step, rng)
        along = [row(stage) for stage in stages][::-1]
        # At true x_t
        single = []
        for t, below in zip(timesteps, [-1, *timesteps[:-1]], strict=True):
            _, _, x_t = subject.noised(clean, indices, t, self.seed)
            found = subject.estimate(x_t, t, labels)
            x = one_step(subject, x_t, found, t, below, self.step, rng.child("one_step"))
            single.append(row(Stage(t, below, found, x)))
        return torch.stack([torch.stack(along), torch.stack(single)])

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
        }

    def _variances(self, subject: Subject, clean: Clean) -> tuple[Tensor, Tensor]:
        """Return the variance [K, D] of x0 in each class, and the classes' shares [K].

        All samples are one class if the model is not conditional.
        """
        labels = clean.labels if subject.conditioning.conditions else None
        if labels is None:
            labels = torch.zeros(len(clean), dtype=torch.long)
        _, classes = torch.unique(labels, return_inverse=True)
        counts = classes.bincount()

        def sums(indices: list[int]) -> Tensor:
            x0 = clean.x0(indices).cpu()
            of_class = [power_sums(x0[classes[indices] == k]) for k in range(len(counts))]
            return torch.stack(of_class)

        width = (len(counts), 2, math.prod(subject.shape))
        found = by_block(len(clean), width, subject.block_size, subject.denoiser, sums)
        variances = []
        for of_class, count in zip(found, counts.tolist(), strict=True):
            variances.append(population_std(of_class, count) ** 2)
        return torch.stack(variances), counts / len(clean)
