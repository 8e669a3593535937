"""How wide, and how Gaussian, the error of x0_hat is: the measurement behind DDPM-IP's gamma."""

import math
from dataclasses import dataclass
from typing import Literal

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
    standard_error,
)

NUM_TESTED = 100  # images in the test of one pixel
SIGNIFICANCE = 0.05


@DIAGNOSTICS.register("prediction_error")
@dataclass(frozen=True)
class PredictionError(Diagnostic):
    """nu_t = the std over images of e = x0_hat - x0, x_t ~ q(x_t | x0), mean over pixels.

    The std is that of the population. x0_hat of pixels is clipped to [-1, 1]. It is measured at t
    = 0, T / num_timesteps, 2 T / num_timesteps and so on, as by the published code. The curve
    `rejected` is the fraction of pixels whose errors in 100 random images
    fail a Shapiro-Wilk test at 5 % (of Gaussian errors 5 % fail). Pixels without any spread count
    in nu_t but cannot be tested; `tested` is the fraction that can. `value` is the mean of nu_t.
    `standard_error` is that of `value` over images, `nu_standard_error` that of each nu_t, by the
    influence of each image on a std (delta method).

    Args:
        num: Images, at most.
        num_timesteps: Timesteps; of a shorter schedule all.
        images: Which images, those of training or held-out ones.
        seed: Seed of the noise and of the subsets.

    Reference:
        Ning et al. 2023, "Input Perturbation Reduces Exposure Bias in Diffusion Models",
        arXiv:2301.11706.
    """

    num: PositiveInt = 1000
    num_timesteps: PositiveInt = 100
    images: Literal["training", "held_out"] = "training"
    seed: NonNegativeInt = 0

    def check(self, subject: Subject) -> None:
        """Refuse a subject without training images, or with too few images.

        Raises:
            InputError: If they are needed.
        """
        super().check(subject)
        num = min(len(self._clean(subject)), self.num)
        if num < NUM_TESTED:
            raise InputError(
                f"{NUM_TESTED} images are tested at each pixel, got {num}. Write num: {NUM_TESTED} "
                "or more, or give more images."
            )

    @torch.no_grad()
    def __call__(self, subject: Subject) -> Result:
        """Measure the errors. Collective."""
        self.check(subject)
        clean = self._clean(subject).spread(self.num)
        total = subject.schedule.num_timesteps
        count = min(self.num_timesteps, total)
        timesteps = [k * total // count for k in range(count)]
        # The curves
        nu, influences, rejected, tested = [], [], [], []
        for t in timesteps:
            errors = self._errors(subject, clean, t)
            nu.append(float(errors.std(0, correction=0).mean()))
            influences.append(influence_on_nu(errors))
            generator = Rng(self.seed, t).shared("diagnostics.tested")
            share_rejected, share_tested = rejection(errors, generator)
            rejected.append(share_rejected)
            tested.append(share_tested)
        of_images = torch.stack(influences, dim=1)
        curves = {
            "nu_standard_error": json_numbers(standard_error(of_images)),
            "nu": json_numbers(torch.tensor(nu, dtype=torch.float64)),
            "rejected": json_numbers(torch.tensor(rejected, dtype=torch.float64)),
            "tested": json_numbers(torch.tensor(tested, dtype=torch.float64)),
        }
        return {
            "value": mean_of_known(curves["nu"]),
            "standard_error": json_number(standard_error(of_images.mean(1))),
            "mean_rejected": mean_of_known(curves["rejected"]),
            "nominal_rejected": SIGNIFICANCE,
            "t": timesteps,
            "log_snr": subject.log_snr(timesteps),
            **curves,
            "protocol": subject.protocol(
                self, clean, ddof=0, clipped=subject.clips, images_a_test=NUM_TESTED
            ),
        }

    def _clean(self, subject: Subject) -> Clean:
        """Return the set that is looked at."""
        if self.images == "held_out":
            return subject.held_out
        if subject.training is None:
            raise InputError(
                f"it looks at training images, but {subject.why_no_training}. Write images: "
                "held_out."
            )
        return subject.training

    def _errors(self, subject: Subject, clean: Clean, t: int) -> Tensor:
        """Return e [N, D] at one timestep."""

        def rows(indices: list[int]) -> Tensor:
            x0, _, x_t = subject.noised(clean, indices, t, self.seed)
            found = subject.estimate(x_t, t, clean.labels_of(indices))
            return (found.x0 - x0).flatten(1)

        return by_sample(
            len(clean), (math.prod(subject.shape),), subject.block_size, subject.denoiser, rows
        )


def influence_on_nu(errors: Tensor) -> Tensor:
    """Return the influence of each image on the mean over pixels of the std over images.

    Args:
        errors: [N, D] float64.

    Returns:
        The mean over pixels of ((e - mean)^2 - var) / (2 std), [N]; 0 of pixels without spread.
    """
    squares = (errors - errors.mean(0)) ** 2
    variance = squares.mean(0)
    influence = (squares - variance) / (2 * variance.sqrt())
    return torch.where(variance > 0, influence, 0.0).mean(1)


def rejection(errors: Tensor, generator: torch.Generator) -> tuple[float, float]:
    """Test the errors of each pixel for normality.

    The test does not change with place and scale, so the published standardising by grand mean
    and std is left out.

    Args:
        errors: [N, D] float64.
        generator: Draws 100 of the N images, for each pixel its own.

    Returns:
        The fraction of the testable pixels that fail, and the fraction that is testable.
    """
    chosen = torch.rand(errors.shape, generator=generator).argsort(0)[:NUM_TESTED]
    _, p = shapiro_wilk(errors.gather(0, chosen))
    known = p[p.isfinite()]
    return (known < SIGNIFICANCE).double().mean().item(), len(known) / len(p)


def shapiro_wilk(x: Tensor) -> tuple[Tensor, Tensor]:
    """Run a Shapiro-Wilk test of each column.

    Args:
        x: [n, D] float64.

    Returns:
        (W, p), both [D] float64; NaN for a column without spread.
    """
    from scipy.stats import shapiro

    w = torch.full((x.shape[1],), torch.nan, dtype=torch.float64)
    p = w.clone()
    is_testable = x.amax(0) > x.amin(0)
    if is_testable.any():
        found = shapiro(x[:, is_testable].double().cpu().numpy(), axis=0)
        w[is_testable] = torch.as_tensor(found.statistic, dtype=torch.float64)
        p[is_testable] = torch.as_tensor(found.pvalue, dtype=torch.float64)
    return w, p
