"""The noise that is added and is the target, and the perturbation that only the input sees."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from difftrain.registry import NOISES, PERTURBATIONS, NonNegative
from difftrain.rng import Rng
from difftrain.schedule import NoiseLevel


@NOISES.register("white")
@dataclass(frozen=True)
class White:
    """eps ~ N(0, I)."""

    def __call__(self, x0: Tensor, rng: Rng) -> Tensor:
        return rng.normal(x0.shape[1:], "noise").to(x0)


@NOISES.register("offset")
@dataclass(frozen=True)
class Offset:
    """eps = z + strength c, z ~ N(0, I), c ~ N(0, 1) one number for each sample and channel.

    Guttenberg 2023, "Diffusion with Offset Noise" (CrossLabs). strength = 0 is white noise.
    """

    strength: NonNegative = 0.1

    def __call__(self, x0: Tensor, rng: Rng) -> Tensor:
        eps = rng.normal(x0.shape[1:], "noise")
        if self.strength > 0:
            eps = eps + self.strength * rng.normal((x0.shape[1], *[1] * (x0.ndim - 2)), "noise.offset")
        return eps.to(x0)


@PERTURBATIONS.register("input_perturbation")
@dataclass(frozen=True)
class InputPerturbation:
    """eps_in = eps + gamma xi, xi ~ N(0, I): the input x_t = alpha x0 + sigma eps_in, the target stays eps.

    Ning et al. 2023, "Input Perturbation Reduces Exposure Bias in Diffusion Models", arXiv:2301.11706.
    gamma = 0 draws nothing and is the plain objective. For outputs other than epsilon the paper's target has two
    readings: `clean` keeps the parameterization's own target (x0, v, u of the unperturbed pair), as other trainers do;
    `implied_eps` compares the eps that the output implies at the perturbed input with the clean eps, which is the
    published loss, whatever the network outputs.
    """

    gamma: NonNegative = 0.1
    target: Literal["clean", "implied_eps"] = "clean"

    def __call__(self, eps: Tensor, level: NoiseLevel, rng: Rng) -> Tensor:
        if self.gamma == 0:
            return eps
        return eps + self.gamma * rng.normal(eps.shape[1:], "perturbation").to(eps)
