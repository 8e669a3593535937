"""How wide, and how Gaussian, the error of x0_hat is: the measurement behind DDPM-IP's choice of gamma."""

import math
from dataclasses import dataclass
from typing import Literal

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
    plain,
)

TESTED, SIGNIFICANT = 100, 0.05  # images a test of one pixel, and its level


@DIAGNOSTICS.register("prediction_error")
@dataclass(frozen=True)
class PredictionError:
    """nu_t = mean over pixels of the population std over images of e = x0_hat - x0, x_t ~ q(x_t | x0), x0_hat clipped to [-1, 1] (pixels).

    Ning et al. 2023, "Input Perturbation Reduces Exposure Bias in Diffusion Models", arXiv:2301.11706, as their published code computes
    it. On training images, at t = 0, T/num_timesteps, 2 T/num_timesteps and so on. The curve `rejected` is the fraction of pixels whose
    errors in 100 images, drawn without replacement, fail a Shapiro-Wilk test at 5 % (of Gaussian errors 5 % fail). Pixels without any
    spread are in nu_t but cannot be tested; `tested` is the fraction that can. `value` is the mean of nu_t.
    """

    num: PositiveInt = 1000
    num_timesteps: PositiveInt = 100
    images: Literal["training", "held_out"] = "training"
    seed: NonNegativeInt = 0

    def check(self, subject: Subject) -> None:
        found = subject.training if self.images == "training" else subject.held_out
        if found is None:
            raise InputError("the training data is a stream. Write images: held_out.")
        if min(len(found), self.num) < TESTED:
            raise InputError(
                f"{TESTED} images are tested at each pixel, got {min(len(found), self.num)}. Write num: {TESTED} or more, or "
                "give more images."
            )

    @torch.no_grad()
    def __call__(self, subject: Subject) -> Result:
        self.check(subject)
        known = subject.training if self.images == "training" else subject.held_out
        assert known is not None
        clean = known.spread(self.num)
        total = subject.schedule.num_timesteps
        count = min(self.num_timesteps, total)
        timesteps = [k * total // count for k in range(count)]
        nu, rejected, tested = [], [], []
        for t in timesteps:
            errors = self.errors(subject, clean, t)
            nu.append(errors.std(0, correction=0).mean())
            share, testable = rejection(errors, Rng(self.seed, t).shared("diagnostics.tested"))
            rejected.append(share)
            tested.append(testable)
        curves = {
            name: plain(torch.tensor(v, dtype=torch.float64))
            for name, v in (("nu", nu), ("rejected", rejected), ("tested", tested))
        }
        return {
            "value": mean_of(curves["nu"]),
            "mean_rejected": mean_of(curves["rejected"]),
            "nominal_rejected": SIGNIFICANT,
            "t": timesteps,
            "log_snr": subject.log_snr(timesteps),
            **curves,
            "protocol": subject.protocol(
                self, clean, ddof=0, clipped=subject.clips, images_a_test=TESTED
            ),
        }

    def errors(self, subject: Subject, clean: Clean, t: int) -> Tensor:
        """e [N, D]."""

        def rows(indices: list[int]) -> Tensor:
            x0, _, x_t = subject.noised(clean, indices, t, self.seed)
            return (subject.estimate(x_t, t, clean.labels_of(indices)).x0 - x0).flatten(1)

        return by_sample(len(clean), (math.prod(subject.shape),), subject.block_size, rows)


def rejection(errors: Tensor, generator: torch.Generator) -> tuple[float, float]:
    """(fraction of the testable columns of errors [N, D] that fail the test, fraction that is testable).

    The test does not change with place and scale, so the published standardising by grand mean and std is left out.
    """
    chosen = torch.rand(errors.shape, generator=generator).argsort(0)[
        :TESTED
    ]  # each pixel its own images
    _, p = shapiro_wilk(errors.gather(0, chosen))
    known = p[p.isfinite()]
    return (known < SIGNIFICANT).double().mean().item(), len(known) / len(p)


LEAST, MOST = 12, 5000


def shapiro_wilk(x: Tensor) -> tuple[Tensor, Tensor]:
    """(W, p) of each column of x [n, D], both [D] float64; NaN for a column without spread.

    W = (sum a_i x_(i))^2 / sum (x_i - mean)^2; ln(1 - W) is standardised to a normal number, whose upper tail is p.
    """
    n = len(x)
    assert LEAST <= n <= MOST, n
    ordered = x.double().sort(0).values
    centred = ordered - ordered.mean(0)
    spread = centred.square().sum(0)
    w = (weights(n)[:, None] * centred).sum(0).square() / torch.where(spread > 0, spread, math.nan)
    log_n = math.log(n)
    mean = polynomial((-1.5861, -0.31082, -0.083751, 0.0038915), log_n)
    std = math.exp(polynomial((-0.4803, -0.082676, 0.0030302), log_n))
    z = ((1 - w).clamp(min=1e-19).log() - mean) / std
    return w, 0.5 * torch.erfc(z / math.sqrt(2))


def weights(n: int) -> Tensor:
    """a [n] float64, antisymmetric, of norm 1: normal scores with the outermost two corrected by polynomials in 1 / sqrt(n)."""
    places = (torch.arange(1, n + 1, dtype=torch.float64) - 0.375) / (n + 0.25)
    scores = math.sqrt(2) * torch.erfinv(2 * places - 1)
    square, u = float(scores.square().sum()), 1 / math.sqrt(n)
    last, second = (float(score) / math.sqrt(square) for score in (scores[-1], scores[-2]))
    last += polynomial((0.0, 0.221157, -0.147981, -2.07119, 4.434685, -2.706056), u)
    second += polynomial((0.0, 0.042981, -0.293762, -1.752461, 5.682633, -3.582633), u)
    inner = (square - 2 * float(scores[-1]) ** 2 - 2 * float(scores[-2]) ** 2) / (
        1 - 2 * last**2 - 2 * second**2
    )
    a = scores / math.sqrt(inner)
    a[-1], a[-2], a[0], a[1] = last, second, -last, -second
    return a


def polynomial(coefficients: tuple[float, ...], x: float) -> float:
    """c_0 + c_1 x + c_2 x^2 + ..."""
    return sum(c * x**k for k, c in enumerate(coefficients))
