"""Shared by several tests: batches, draws, Gaussian data with a known optimum, closeness."""

import json
import math
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from difftrain.core.rng import Rng
from difftrain.objective.objective import Objective
from difftrain.objective.parameterization import Parameterization
from difftrain.objective.regularizers import WeightedTerm
from difftrain.objective.schedule import NoiseLevel, NoiseSchedule, expand_like
from difftrain.objective.types import Batch, DenoisingPass, Losses, Timesteps
from helpers.places import TESTS

PARAMETERIZATIONS = get_args(Parameterization)
GOLDEN = TESTS / "golden"


def golden(name: str) -> dict[str, Any]:
    """Read stored reference numbers; each file states its source."""
    content = json.loads((GOLDEN / f"{name}.json").read_text())
    assert content["source"]
    assert content["made"]
    return content


def float64(values: Any) -> Tensor:
    """Return numbers as float64, also the strings of a data file ("inf", "1/9")."""
    if isinstance(values, list):
        return torch.stack([float64(value) for value in values])
    if isinstance(values, str) and "/" in values:
        above, below = values.split("/")
        values = float(above) / float(below)
    return torch.tensor(float(values), dtype=torch.float64)


def assert_close(
    actual: Any, expected: Any, *, relative: float = 0.0, absolute: float = 0.0
) -> None:
    """Assert |actual - expected| <= absolute + relative |expected|; infinities must agree."""
    actual = torch.as_tensor(actual, dtype=torch.float64).detach()
    expected = torch.as_tensor(expected, dtype=torch.float64).detach()
    assert actual.shape == expected.shape, f"{list(actual.shape)} != {list(expected.shape)}"
    same = actual == expected  # infinities
    distance = torch.where(same, 0.0, (actual - expected).abs())
    allowed = absolute + relative * torch.where(same, 0.0, expected.abs())
    assert bool((distance <= allowed).all()), (
        f"off by up to {distance.max().item():.3g}:\n{actual}\n{expected}"
    )


def assert_within_standard_errors(values: Tensor, expected: float | Tensor, count: float) -> None:
    """Assert that the mean of independent values [N] is within `count` standard errors."""
    error = values.std() / math.sqrt(len(values))
    away = ((values.mean() - expected) / error).abs().item()
    assert away <= count, (
        f"{values.mean().item():.6g} is {away:.1f} standard errors of {error.item():.2g} away from "
        f"{float(expected):.6g}"
    )


class RememberingRng(Rng):
    """Draws the numbers of Rng once, for many objectives on the same draws."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.known: dict[Any, Tensor] = {}

    def normal(self, shape: Any, stream: str) -> Tensor:
        key = ("normal", tuple(shape), stream)
        if key not in self.known:
            self.known[key] = super().normal(shape, stream)
        return self.known[key].clone()

    def uniform(self, stream: str, shape: Any = ()) -> Tensor:
        key = ("uniform", tuple(shape), stream)
        if key not in self.known:
            self.known[key] = super().uniform(stream, shape)
        return self.known[key].clone()


def rng(num: int = 4, seed: int = 0, step: int = 0) -> Rng:
    return Rng(seed, step, range(num))


def images(num: int = 4, channels: int = 2, size: int = 3, seed: int = 0) -> Tensor:
    """Return random numbers [num, channels, size, size], float64, in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(num, channels, size, size, generator=generator, dtype=torch.float64) - 1


def toy_batch() -> Batch:
    """Return the batch of the golden numbers: sin(0.37 i), i the flat index over (4, 2, 3, 3)."""
    return Batch(torch.sin(0.37 * flat_index(4, 2, 3, 3)))


def toy_eps() -> Tensor:
    return torch.cos(0.53 * flat_index(4, 2, 3, 3))


def toy_network(x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
    """Return f(x, t) = 0.5 x + 0.001 t."""
    # An integer tensor times a Python float would be float32.
    return 0.5 * x + expand_like(0.001 * t.double(), x)


def flat_index(*shape: int) -> Tensor:
    return torch.arange(math.prod(shape), dtype=torch.float64).reshape(shape)


@dataclass(frozen=True)
class GivenPerturbation:
    """Adds gamma xi to eps, with the test's own xi."""

    xi: Tensor
    gamma: float = 0.1
    target: str = "clean"

    def __call__(self, eps: Tensor, level: NoiseLevel, rng: Rng) -> Tensor:
        return eps + self.gamma * self.xi


def mixture(kind: Parameterization, level: NoiseLevel) -> tuple[Tensor, Tensor]:
    """Return (p, q) of the target p x0 + q eps, independently of the library."""
    one, zero = torch.ones_like(level.alpha), torch.zeros_like(level.alpha)
    return {
        "epsilon": (zero, one),
        "sample": (one, zero),
        "v_prediction": (-level.sigma, level.alpha),
        "flow_prediction": (-one, one),
    }[kind]


class NoError:
    """A weighting of 0, which leaves only the terms of the regularizers."""

    stated_for = None

    def __call__(self, level: NoiseLevel) -> Tensor:
        return torch.zeros_like(level.alpha)


def term_alone(
    regularizer: Any,
    kind: Parameterization,
    schedule: NoiseSchedule,
    t: Any = None,
    eps: Tensor | None = None,
    importance: Tensor | None = None,
) -> Objective:
    """Return the objective whose loss is this regularizer's term.

    The timesteps t [B], their importance [B] and the noise eps are random where they are None.
    """
    parts: dict[str, Any] = {}
    if t is not None:
        t = torch.as_tensor(t)
        if importance is None:
            importance = torch.ones(len(t), dtype=torch.float64)
        parts["timesteps"] = lambda num, rng: Timesteps(t, importance)
    if eps is not None:
        parts["noise"] = lambda x0, rng: eps
    return Objective(schedule, kind, NoError(), regularizers=[regularizer], **parts)


class Onlooker(WeightedTerm):
    """A regularizer of nearly weight 0 that keeps the passes it gets."""

    def __init__(self, differentiates_input: bool = True):
        super().__init__(weight=1e-300)
        self.differentiates_input = differentiates_input
        self.passes: list[DenoisingPass] = []

    def forward(self, p: DenoisingPass) -> Tensor:
        self.passes.append(p)
        return p.x_t.new_zeros(())


def a_pass(
    network: Any,
    batch: Batch,
    kind: Parameterization,
    schedule: NoiseSchedule,
    rng: Rng,
    **given: Any,
) -> DenoisingPass:
    """Return the denoising pass that a regularizer gets; `given` is as for term_alone."""
    onlooker = Onlooker()
    term_alone(onlooker, kind, schedule, **given)(network, batch, rng)
    return onlooker.passes[0]


def gradients(losses: Losses, network: torch.nn.Module) -> Tensor:
    """Return the total's gradient with respect to all parameters, in one vector."""
    found = torch.autograd.grad(losses.total, list(network.parameters()), allow_unused=True)
    pairs = zip(network.parameters(), found, strict=True)
    return torch.cat(
        [torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in pairs]
    )


def relative_distance(one: Tensor, other: Tensor) -> float:
    """Return |one - other| / |other| of whole vectors."""
    return ((one.double() - other.double()).norm() / other.double().norm()).item()


@dataclass(frozen=True)
class Gaussian:
    """Data x0 ~ N(mean, std^2), independent in every place, and its optimal denoiser.

    The input is x = alpha x0 + sigma (eps + gamma xi). The target p x0 + q eps and x are jointly
    Gaussian, so E[target | x] is linear in x and leaves a known variance.
    """

    mean: float = 0.3
    std: float = 0.7
    gamma: float = 0.0

    def batch(self, num: int, seed: int = 0) -> Batch:
        z = torch.randn(
            num, 1, 2, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        return Batch(self.mean + self.std * z)

    def input_variance(self, level: NoiseLevel) -> Tensor:
        return level.alpha**2 * self.std**2 + level.sigma**2 * (1 + self.gamma**2)

    def slope(self, kind: Parameterization, level: NoiseLevel) -> Tensor:
        """Return Cov(target, x) / Var(x), [B]."""
        p, q = mixture(kind, level)
        return (p * level.alpha * self.std**2 + q * level.sigma) / self.input_variance(level)

    def optimal_error(self, kind: Parameterization, level: NoiseLevel) -> Tensor:
        """Return Var(target | x), [B]: the least mean squared error."""
        p, q = mixture(kind, level)
        covariance = p * level.alpha * self.std**2 + q * level.sigma
        return p**2 * self.std**2 + q**2 - covariance**2 / self.input_variance(level)

    def conditional_mean(self, kind: Parameterization, x: Tensor, level: NoiseLevel) -> Tensor:
        """Return E[target | x]."""
        p, _ = mixture(kind, level)
        return expand_like(p * self.mean, x) + expand_like(self.slope(kind, level), x) * (
            x - expand_like(level.alpha * self.mean, x)
        )

    def denoiser(self, kind: Parameterization, schedule: NoiseSchedule) -> Any:
        """Return the optimal network for `kind`'s own (clean) target."""
        return lambda x, time, cond: self.conditional_mean(kind, x, level_at(schedule, time))

    def denoiser_by_eps(self, kind: Parameterization, schedule: NoiseSchedule) -> Any:
        """Return the network whose output implies, at this input, eps = E[eps | x]."""

        def output(x: Tensor, time: Tensor, cond: Any) -> Tensor:
            level = level_at(schedule, time)
            alpha, sigma = expand_like(level.alpha, x), expand_like(level.sigma, x)
            eps = self.conditional_mean("epsilon", x, level)
            # At alpha = 0 the implied eps is x for every x0.
            x0 = torch.where(alpha > 0, (x - sigma * eps) / alpha, self.mean)
            p, q = mixture(kind, level)
            return expand_like(p, x) * x0 + expand_like(q, x) * eps

        return output


def level_at(schedule: NoiseSchedule, time: Tensor) -> NoiseLevel:
    """Return the level of what the denoiser is fed: the index, or for flow models T sigma."""
    if schedule.kind == "diffusion":
        return schedule.level(time)
    times = (schedule.sigma * schedule.num_timesteps).float()
    return schedule.level(torch.searchsorted(times, time))
