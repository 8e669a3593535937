"""Where the whole reverse chain has got to: MMD of its states and of noised held-out images, at several noise levels."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from difftrain.core.errors import InputError
from difftrain.core.registry import NonNegativeInt, PositiveInt
from difftrain.core.rng import Rng
from difftrain.diagnostics.base import (
    DIAGNOSTICS,
    Clean,
    Result,
    Subject,
    by_sample,
    mean_of,
    spread_timesteps,
)
from difftrain.diagnostics.reverse_process import descent
from difftrain.objective.mmd import BANDWIDTHS, mean_distance, mmd, squared_distances

NAME = "cumulative_error"


@DIAGNOSTICS.register(NAME)
@dataclass(frozen=True)
class CumulativeError:
    """MMD^2(X_t, Y_t): X_t = chains of the model from N(0, I) stopped at t, Y_t ~ q(x_t | x0) of held-out images, as many.

    Li and van der Schaar 2024, "On Error Propagation of Diffusion Models", arXiv:2308.05021: the cumulative error, with the estimator of
    their regularizer. The kernel is the sum over m in 1/4, 1/2, 1, 2, 4 of exp(-|x - y|^2 / (m b)). The bandwidth b is fixed at each t:
    the mean squared distance of two Y_t, which knows nothing of the model, so models that are shown the same images share it; `bandwidths`
    takes those of another run's diagnostics.json instead. `u` is the unbiased estimate, 0 on average for a perfect model and below 0 at
    times; `v` is the biased one, `v_floor` its expectation if X_t were more Y_t. `training` is u of noised training images, as if the
    model had made them. Chains take `steps` evenly spread timesteps and the held-out images' labels; `num_timesteps` of the
    levels are reported, and t = -1, the clean images. The memory holds num x num_timesteps images twice. `value` is the mean of u.
    """

    num: PositiveInt = 500
    steps: PositiveInt = 100
    num_timesteps: PositiveInt = 10
    step: Literal["ancestral", "ddim"] = "ancestral"
    bandwidths: str | None = None
    seed: NonNegativeInt = 0

    def check(self, subject: Subject) -> None:
        if min(self.num, len(subject.held_out)) < 2:
            raise InputError(
                "at least 2 images are compared, got 1. Write a larger num, or give more images."
            )
        if self.bandwidths:
            read_bandwidths(self.bandwidths, self.levels(subject)[1])

    @torch.no_grad()
    def __call__(self, subject: Subject) -> Result:
        self.check(subject)
        clean = subject.held_out.spread(self.num)
        training = subject.training.spread(len(clean)) if subject.training is not None else None
        chain, kept = self.levels(subject)
        given = read_bandwidths(self.bandwidths, kept) if self.bandwidths else None
        sampled = by_sample(
            len(clean),
            (len(kept), math.prod(subject.shape)),
            subject.block_size,
            lambda indices: self.sampled(subject, clean, indices, chain, kept),
        )
        found: dict[str, list[float]] = {
            name: []
            for name in ("u", "v", "v_floor", "bandwidth", *(["training"] if training else []))
        }
        for k, t in enumerate(kept):
            noised = self.noised(subject, clean, t, self.seed)
            bandwidth = given[k] if given else float(mean_distance(squared_distances(noised)))
            v, u = mmd(sampled[:, k], noised, bandwidth)
            numbers: dict[str, Any] = {"u": u, "v": v, "bandwidth": bandwidth}
            numbers["v_floor"] = -mmd(noised, noised, bandwidth)[
                1
            ]  # of n samples and themselves U is -(2/n) (k(x, x) - mean of k), V is 0
            if training is not None:
                numbers["training"] = mmd(
                    self.noised(subject, training, t, self.seed + 1), noised, bandwidth
                )[1]
            for name, value in numbers.items():
                found[name].append(float(value))
        return {
            "value": mean_of(found["u"]), "t": kept, "log_snr": subject.log_snr(kept), **found,
            "protocol": subject.protocol(
                self, clean, clipped=subject.clips, sampler=self.step, steps=len(chain), spacing="evenly spread", kernel_widths=BANDWIDTHS,
                bandwidths_from=self.bandwidths or "the noised held-out images", pixels="[-1, 1] or latents",
            ),
        }  # fmt: skip

    def levels(self, subject: Subject) -> tuple[list[int], list[int]]:
        """The chain's timesteps, ascending, and the levels that are reported."""
        chain = spread_timesteps(
            subject.schedule.num_timesteps, min(self.steps, subject.schedule.num_timesteps)
        )
        return chain, [
            -1,
            *(chain[k] for k in spread_timesteps(len(chain), min(self.num_timesteps, len(chain)))),
        ]

    def sampled(
        self, subject: Subject, clean: Clean, indices: list[int], chain: list[int], kept: list[int]
    ) -> Tensor:
        """[B, kept, D]: the model's own chains at the kept levels."""
        rng = Rng(self.seed, 0, indices)
        x = rng.normal(subject.shape, "diagnostics.initial").to(subject.device)
        at = {chain[-1]: x}
        for stage in descent(subject, x, chain, clean.labels_of(indices), self.step, rng):
            if stage.below in kept:
                at[stage.below] = stage.x
        return torch.stack([at[t].flatten(1) for t in kept], dim=1)

    def noised(self, subject: Subject, clean: Clean, t: int, seed: int) -> Tensor:
        """[N, D] float64: samples of q(x_t | x0)."""
        return by_sample(
            len(clean),
            (math.prod(subject.shape),),
            subject.block_size,
            lambda indices: subject.noised(clean, indices, t, seed)[2].flatten(1),
        )


def read_bandwidths(file: str, timesteps: list[int]) -> list[float]:
    """b at each timestep, from a diagnostics.json with the same timesteps."""
    try:
        stored: Any = json.loads(Path(file).expanduser().read_text())[NAME]
        found = dict(zip(stored["t"], stored["bandwidth"], strict=True))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"bandwidths: {file!r} holds none ({error!r}). Write the diagnostics.json of a run that was "
            f"diagnosed with {NAME}."
        ) from error
    if missing := [t for t in timesteps if t not in found]:
        raise InputError(
            f"bandwidths: {file!r} has none for t = {', '.join(map(str, missing))}. "
            "Diagnose both runs with the same steps and num_timesteps."
        )
    return [float(found[t]) for t in timesteps]
