"""Where the whole reverse process has got to: MMD of its states and of noised held-out samples."""

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
from difftrain.diagnostics.base import DIAGNOSTICS, Clean, Diagnostic, Result, Subject
from difftrain.diagnostics.gathering import (
    by_sample,
    json_number,
    json_numbers,
    mean_of_known,
)
from difftrain.diagnostics.mmd_error import error_of_u, pair_kernel
from difftrain.diagnostics.reverse_process import descent
from difftrain.diagnostics.spacing import spread_timesteps
from difftrain.objective.mmd import BANDWIDTHS, mean_distance, mmd, squared_distances

NAME = "cumulative_error"


@DIAGNOSTICS.register(NAME)
@dataclass(frozen=True)
class CumulativeError(Diagnostic):
    """MMD^2(X_t, Y_t), with the model's states X_t from N(0, I) down to t, and Y_t ~ q(x_t | x0).

    Y_t are noised held-out images; there are as many X_t. The kernel is the sum over m in 1/4,
    1/2, 1, 2, 4 of exp(-|x - y|^2 / (m b)). The bandwidth b is fixed at each t: the mean squared
    distance of two Y_t, which knows nothing of the model, so models that see the same images
    share it. `u` is the unbiased estimate, 0 on average for a perfect model and below 0 at times;
    `v` is the biased one, `v_floor` its expectation if X_t were more Y_t. `training` is u of
    noised training images, as if the model had made them. The levels that are reported include t
    = -1, the clean images. The memory holds num x num_timesteps images twice. `value` is the mean
    of u. `standard_error` is that of `value` over pairs of X_t and Y_t at fixed bandwidths, by the
    variance of a U-statistic, and `u_standard_error` that of each u. Ancestral steps draw with the
    learned variance, if the model has one.

    Args:
        num: Images, at most.
        steps: Evenly spread timesteps of the reverse process, which takes the held-out images'
            labels.
        num_timesteps: Levels that are reported, in addition to t = -1.
        step: "ancestral" or "ddim".
        bandwidths: The diagnostics.json of another run, whose bandwidths are used instead.
        seed: Seed of the noise.

    Reference:
        Li and van der Schaar 2024, "On Error Propagation of Diffusion Models", arXiv:2308.05021:
        the cumulative error, with the estimator of their regularizer.
    """

    num: PositiveInt = 500
    steps: PositiveInt = 100
    num_timesteps: PositiveInt = 10
    step: Literal["ancestral", "ddim"] = "ancestral"
    bandwidths: str | None = None
    seed: NonNegativeInt = 0

    def check(self, subject: Subject) -> None:
        """Refuse fewer than two images, and a file without the bandwidths that are needed.

        Raises:
            InputError: If there are too few images, or if the file lacks bandwidths.
        """
        super().check(subject)
        if min(self.num, len(subject.held_out)) < 2:
            raise InputError(
                "at least 2 images are compared, got 1. Write a larger num, or give more images."
            )
        if self.bandwidths:
            read_bandwidths(self.bandwidths, self._levels(subject)[1])

    @torch.no_grad()
    def __call__(self, subject: Subject) -> Result:
        """Measure the discrepancies. Collective."""
        self.check(subject)
        # The states of the reverse process
        clean = subject.held_out.spread(self.num)
        training = None if subject.training is None else subject.training.spread(len(clean))
        timesteps, kept = self._levels(subject)
        given = read_bandwidths(self.bandwidths, kept) if self.bandwidths else None
        width = (len(kept), math.prod(subject.shape))

        def rows(indices: list[int]) -> Tensor:
            return self._states(subject, clean, indices, timesteps, kept)

        sampled = by_sample(len(clean), width, subject.block_size, subject.denoiser, rows)
        # Their discrepancy from noised samples, level by level
        names = ["u", "v", "v_floor", "bandwidth"] + ["training"] * (training is not None)
        found: dict[str, list[float]] = {name: [] for name in names}
        pairs = torch.zeros(len(clean), len(clean), dtype=torch.float64)
        errors = []
        for k, t in enumerate(kept):
            noised = self._noised(subject, clean, t, self.seed)
            bandwidth = given[k] if given else float(mean_distance(squared_distances(noised)))
            v, u = mmd(sampled[:, k], noised, bandwidth)
            # Of n samples and themselves U is -(2/n) (k(x, x) - mean of k), and V is 0.
            _, u_of_equal = mmd(noised, noised, bandwidth)
            found["u"].append(float(u))
            found["v"].append(float(v))
            found["v_floor"].append(float(-u_of_equal))
            found["bandwidth"].append(bandwidth)
            of_pairs = pair_kernel(sampled[:, k], noised, bandwidth)
            errors.append(error_of_u(of_pairs))
            pairs += of_pairs / len(kept)
            if training is not None:
                of_training = self._noised(subject, training, t, self.seed + 1)
                found["training"].append(float(mmd(of_training, noised, bandwidth)[1]))
        return {
            "value": mean_of_known(found["u"]),
            "standard_error": json_number(torch.tensor(error_of_u(pairs))),
            "t": kept,
            "log_snr": subject.log_snr(kept),
            **found,
            "u_standard_error": json_numbers(torch.tensor(errors, dtype=torch.float64)),
            "protocol": subject.protocol(
                self,
                clean,
                clipped=subject.clips,
                sampler=self.step,
                steps=len(timesteps),
                spacing="evenly spread",
                kernel_widths=BANDWIDTHS,
                bandwidths_from=self.bandwidths or "the noised held-out images",
                pixels="[-1, 1] or latents",
            ),
        }

    def _levels(self, subject: Subject) -> tuple[list[int], list[int]]:
        """Return the timesteps of the reverse process, ascending, and the reported levels."""
        total = subject.schedule.num_timesteps
        timesteps = spread_timesteps(total, min(self.steps, total))
        num = len(timesteps)
        reported = spread_timesteps(num, min(self.num_timesteps, num))
        return timesteps, [-1, *(timesteps[k] for k in reported)]

    def _states(
        self,
        subject: Subject,
        clean: Clean,
        indices: list[int],
        timesteps: list[int],
        kept: list[int],
    ) -> Tensor:
        """Return the model's own states [B, kept, D] at the kept levels."""
        rng = Rng(self.seed, 0, indices)
        x = rng.normal(subject.shape, "diagnostics.initial").to(subject.device)
        at = {timesteps[-1]: x}
        for stage in descent(subject, x, timesteps, clean.labels_of(indices), self.step, rng):
            if stage.below in kept:
                at[stage.below] = stage.x
        return torch.stack([at[t].flatten(1) for t in kept], dim=1)

    def _noised(self, subject: Subject, clean: Clean, t: int, seed: int) -> Tensor:
        """Return samples [N, D] float64 of q(x_t | x0)."""

        def rows(indices: list[int]) -> Tensor:
            _, _, x_t = subject.noised(clean, indices, t, seed)
            return x_t.flatten(1)

        return by_sample(
            len(clean), (math.prod(subject.shape),), subject.block_size, subject.denoiser, rows
        )


def read_bandwidths(file: str, timesteps: list[int]) -> list[float]:
    """Read the bandwidths at some timesteps from a diagnostics.json.

    Args:
        file: The file.
        timesteps: Where bandwidths are wanted.

    Raises:
        InputError: If the file has none there.
    """
    try:
        stored: Any = json.loads(Path(file).expanduser().read_text())[NAME]
        found = dict(zip(stored["t"], stored["bandwidth"], strict=True))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"bandwidths: {file!r} holds none ({error!r}). Write the diagnostics.json of a run "
            f"that was diagnosed with {NAME}."
        ) from error
    missing = [t for t in timesteps if t not in found]
    if missing:
        raise InputError(
            f"bandwidths: {file!r} has none for t = {', '.join(map(str, missing))}. Diagnose both "
            "runs with the same steps and num_timesteps."
        )
    return [float(found[t]) for t in timesteps]
