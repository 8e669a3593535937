"""How far sampled x_t are from true ones: spread along a reverse chain and after one step, norms of eps_hat, drift without noise."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from difftrain.core.registry import NonNegativeInt, PositiveInt
from difftrain.core.rng import Rng
from difftrain.diagnostics.base import (
    DIAGNOSTICS,
    Clean,
    Result,
    Subject,
    by_block,
    by_sample,
    mean_of,
    moments,
    plain,
    population_std,
    spread_timesteps,
)
from difftrain.diagnostics.reverse_process import Stage, descent, end_of, one_step
from difftrain.objective.schedule import NoiseLevel
from difftrain.objective.transitions import beta

DRIFTS = (
    0.1,
    0.3,
    0.5,
    0.7,
    1.0,
)  # of the chain's length: published starts 100, 300, 500, 700, 1000 of 1000 steps


@DIAGNOSTICS.register("exposure_bias")
@dataclass(frozen=True)
class ExposureBias:
    """delta_s = (p_s - sigma_s)^2, p_s = mean over pixels of the population std over images of x_s - alpha_s x0.

    Ning et al. 2024, "Elucidating the Exposure Bias in Diffusion Models", arXiv:2308.15321; the estimator of their published code.
    In `consecutive` x_s lies on one ancestral chain of `steps` evenly spread timesteps that starts at q(x_T | x0) of held-out images; in
    `one_step` each step starts at a true x_t ~ q(x_t | x0). A perfect model does not score 0: a stochastic chain forgets its x0. `floor`
    is what a perfect model scores, by closed form, on Gaussian data with these images' variance in each pixel (within classes, if the
    model is conditional); pixels of real images depend on each other, so the data's own floor may lie to either side. Read delta against
    the floor and against another model's. `value` is the mean of the consecutive deltas, `floor` that of its floor.

    `eps_norm`: mean over images of |eps_hat|_2 along that chain and at true x_t; `gap` is their difference. (arXiv:2308.15321.)
    `drift`: mean |x0_out - x0| after the last n steps with x_s the posterior's mean, from a true x_t; published with 1,000 steps, Ning
    et al. 2023, arXiv:2301.11706. step ddim: a deterministic chain for all but the drift; its floor is that of the same chain.
    """

    num: PositiveInt = 1000
    steps: PositiveInt = 20
    step: Literal["ancestral", "ddim"] = "ancestral"
    seed: NonNegativeInt = 0

    def check(self, subject: Subject) -> None:
        spread_timesteps(subject.schedule.num_timesteps, self.steps)

    @torch.no_grad()
    def __call__(self, subject: Subject) -> Result:
        clean = subject.held_out.spread(self.num)
        timesteps = spread_timesteps(subject.schedule.num_timesteps, self.steps)
        below = [-1, *timesteps[:-1]]
        num, pixels = len(clean), math.prod(subject.shape)
        sums = by_block(
            num,
            (2, self.steps, 2 * pixels + 1),
            subject.block_size,
            lambda i: self.sums(subject, clean, i, timesteps),
        )
        stds = population_std(sums[..., 1:].unflatten(-1, (2, pixels)), num).mean(-1)
        sigma = subject.schedule.level_before(torch.tensor(below), steps=0).sigma
        variances, shares = self.variances(subject, clean)
        curves = {}
        for kind, std in zip(("consecutive", "one_step"), stds, strict=True):
            floor = gaussian_std(
                subject, variances, shares, timesteps, self.step, consecutive=kind == "consecutive"
            )
            curves[kind] = {
                "std": plain(std),
                "delta": plain((std - sigma) ** 2),
                "floor": plain((floor - sigma) ** 2),
            }
        along, true = sums[..., 0] / num
        within = " within classes" if subject.conditioning.conditions else ""
        return {
            "value": mean_of(curves["consecutive"]["delta"]), "floor": mean_of(curves["consecutive"]["floor"]),
            "t": below, "log_snr": subject.log_snr(below), "sigma": plain(sigma), **curves,
            "eps_norm": {
                "t": timesteps, "log_snr": subject.log_snr(timesteps), "sampling": plain(along), "true": plain(true),
                "gap": plain(along - true),
            },
            "drift": self.drift(subject, clean, timesteps),
            "protocol": subject.protocol(
                self, clean, ddof=0, clipped=subject.clips, sampler=self.step, spacing="evenly spread", pixels="[-1, 1] or latents",
                floor=f"a perfect model of Gaussian data with the images' variance by pixel{within}",
            ),
        }  # fmt: skip

    def sums(
        self, subject: Subject, clean: Clean, indices: list[int], timesteps: list[int]
    ) -> Tensor:
        """[2, steps, 1 + 2 D]: along the chain and at true x_t, timesteps ascending, sum of |eps_hat|_2 at t, and moments of
        x_s - alpha_s x0 one step below."""
        x0, labels, rng = clean.x0(indices), clean.labels_of(indices), Rng(self.seed, 0, indices)

        def row(stage: Stage) -> Tensor:
            norm = stage.estimate.eps.flatten(1).double().norm(dim=1).sum()
            left = (
                stage.x
                - subject.schedule.level_before(torch.tensor([stage.below]), steps=0).alpha.to(x0)
                * x0
            )
            return torch.cat([norm[None], moments(left).flatten()])

        start = subject.noised(clean, indices, timesteps[-1], self.seed)[2]
        chain = [
            row(stage) for stage in descent(subject, start, timesteps, labels, self.step, rng)
        ][::-1]
        single = []
        for t, below in zip(timesteps, [-1, *timesteps[:-1]], strict=True):
            x_t = subject.noised(clean, indices, t, self.seed)[2]
            estimate = subject.estimate(x_t, t, labels)
            x = one_step(subject, x_t, estimate, t, below, self.step, rng.child("one_step"))
            single.append(row(Stage(t, below, estimate, x)))
        return torch.stack([torch.stack(chain), torch.stack(single)])

    def drift(self, subject: Subject, clean: Clean, timesteps: list[int]) -> dict[str, Any]:
        starts = sorted({max(1, round(fraction * len(timesteps))) for fraction in DRIFTS})

        def rows(indices: list[int]) -> Tensor:
            labels, found = clean.labels_of(indices), []
            for n in starts:
                x0, _, x = subject.noised(clean, indices, timesteps[n - 1], self.seed)
                out = end_of(
                    descent(subject, x, timesteps[:n], labels, "mean", Rng(self.seed, 0, indices))
                )
                found.append((out - x0).abs().flatten(1).mean(1))
            return torch.stack(found, dim=1)

        errors = by_sample(len(clean), (len(starts),), subject.block_size, rows)
        return {
            "steps": starts,
            "t": [timesteps[n - 1] for n in starts],
            "error": plain(errors.mean(0)),
        }

    def variances(self, subject: Subject, clean: Clean) -> tuple[Tensor, Tensor]:
        """Variance [K, D] of x0 in each class, and the classes' shares [K]; one class of all if the model is not conditional."""
        classes = clean.labels if subject.conditioning.conditions else None
        if classes is None:
            classes = torch.zeros(len(clean), dtype=torch.long)
        _, classes = classes.unique(return_inverse=True)
        counts = classes.bincount()

        def sums(indices: list[int]) -> Tensor:
            x0 = clean.x0(indices).cpu()
            return torch.stack([moments(x0[classes[indices] == k]) for k in range(len(counts))])

        found = by_block(
            len(clean), (len(counts), 2, math.prod(subject.shape)), subject.block_size, sums
        )
        each = [
            population_std(of_class, int(count)) ** 2
            for of_class, count in zip(found, counts, strict=True)
        ]
        return torch.stack(each), counts / len(clean)


def gaussian_std(
    subject: Subject,
    variances: Tensor,
    shares: Tensor,
    timesteps: list[int],
    step: str,
    consecutive: bool,
) -> Tensor:
    """p_s [steps] of the perfect model of x0 ~ N(mean, variance) by pixel [K, D], mixed by shares [K]; s one step below each timestep.

    Its x0_hat is linear in x_t, so Var(x) = V and Cov(x, x0) = C follow a recursion: with x_s = g x_t + constant + noise of variance v,
    C_s = g C, V_s = g^2 V + v, and Var(x_s - alpha_s x0) = V_s - 2 alpha_s C_s + alpha_s^2 variance.
    """
    V = C = variances
    found = []
    for k in reversed(range(len(timesteps))):
        t, s = (
            subject.schedule.level_before(torch.tensor([at]), steps=0)
            for at in (timesteps[k], timesteps[k - 1] if k else -1)
        )
        if k == len(timesteps) - 1 or not consecutive:
            V, C = t.alpha**2 * variances + t.sigma**2, t.alpha * variances
        by_x0, by_x, v = coefficients(t, s, step)
        g = by_x0 * t.alpha * variances / (t.alpha**2 * variances + t.sigma**2) + by_x
        V, C = g**2 * V + v, g * C
        of_class = V - 2 * s.alpha * C + s.alpha**2 * variances
        found.append((shares.double() @ of_class).clamp(min=0).sqrt().mean())
    return torch.stack(found[::-1])


def coefficients(t: NoiseLevel, s: NoiseLevel, step: str) -> tuple[Tensor, Tensor, Tensor]:
    """(A, B, v), each [1], of x_s = A x0_hat + B x_t + noise of variance v."""
    if step == "ddim":
        return (
            s.alpha - s.sigma * t.alpha / t.sigma,
            s.sigma / t.sigma,
            torch.zeros(1, dtype=torch.float64),
        )
    added = beta(t, s)
    return (
        s.alpha * added / t.sigma**2,
        t.alpha / s.alpha * s.sigma**2 / t.sigma**2,
        added * s.sigma**2 / t.sigma**2,
    )
