"""Step-wise variation regularization of Smooth Diffusion: a step of the noise moves x0_hat equally far, wherever it is taken."""

import contextlib
import math
from typing import Any, Literal

import torch
from torch import Tensor

from difftrain.batch import DenoisingPass
from difftrain.distributed import mean_over_processes
from difftrain.registry import REGULARIZERS, InputError, NonNegative, NonNegativeInt, Positive, PositiveInt, UnitInterval
from difftrain.regularizers.base import WeightedTerm
from difftrain.schedule import expand_like

COARSEST = 2.0**-3  # first step that the calibration tries, for each element of eps
NEGLIGIBLE = 1e-3  # change of the gradient over the coarsest step, relative to it, of which no digits are needed
LARGEST_ERROR = 0.05  # of the calibrated difference


@REGULARIZERS.register("step_variation")
class StepVariation(WeightedTerm):
    """(r - m)^2, r = |d <sigma y, x0_hat> / d eps|, y ~ N(0, I / dim), m <- decay m + (1 - decay) mean(r).

    Guo et al. 2024, "Smooth Diffusion: Crafting Smooth Latent Spaces in Diffusion Models", arXiv:2312.04410, equations 9, 10
    and 14; estimator, rate and starting value are those of the published code. The length r [B] is that of a vector-Jacobian product
    with a random direction of the output, over x_t = alpha x0 + sigma eps. The mean m is one number for all t and all processes, a
    buffer that is saved; it is updated before it is used, and its own gradient is kept. A network whose x0_hat does not depend on
    x_t has r = 0.

    method: both give the same value. `finite_difference` has its gradient from first derivatives alone: with the unit direction
    n = grad / r, that of sum_b (dL / dr_b) <sigma y_b, x0_hat(eps + h n) - x0_hat(eps)> / h becomes that of the term as h goes to 0. It
    goes with every attention kernel, activation checkpointing and torch.compile; it needs float32: under autocast both of its
    passes leave it. `double_backward` is exact, and needs `Objective.context()` held around forward and backward.
    central: the difference over eps - h n and eps + h n: an error of order h^2 rather than h, for one more pass.
    step_size: h, the length of the step in eps; None: found at the first evaluation by comparing h with h / 2, then kept and saved.
    measured_batches: m starts at 0, as published (458 updates to 99 %); with k > 0 it is the plain mean of the first k batches.
    """

    differentiates_input = True
    mean_variation: Tensor
    num_updates: Tensor
    h: Tensor

    def __init__(
        self, weight: NonNegative = 1.0, decay: UnitInterval = 0.99,
        method: Literal["finite_difference", "double_backward"] = "finite_difference", central: bool = False,
        step_size: Positive | None = None, measured_batches: NonNegativeInt = 0, every: PositiveInt = 1, warmup: NonNegativeInt = 0,
    ):
        super().__init__(weight, every, warmup)
        self.decay, self.method, self.central, self.measured_batches = decay, method, central, measured_batches
        self.needs_double_backward = method == "double_backward"
        self.needs_full_precision = method == "finite_difference"
        if self.needs_double_backward and (central or step_size is not None):
            raise InputError("regularizer step_variation: central and step_size belong to method: finite_difference; leave them out, "
                             "or write method: finite_difference.")
        self.register_buffer("mean_variation", torch.zeros((), dtype=torch.float64))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.long))
        self.register_buffer("h", torch.zeros((), dtype=torch.float64))  # the step that was found, 0: not yet
        self.step_size, self.has_h = step_size, step_size is not None

    def forward(self, p: DenoisingPass) -> Tensor:  # [B]
        training = torch.is_grad_enabled()
        twice = training and self.needs_double_backward
        imprecise = self.needs_full_precision and torch.is_autocast_enabled(p.x_t.device.type)
        with torch.enable_grad(), self._precision(p):
            x_t, x0 = (p.x_t, p.estimate.x0) if training and not imprecise else self._pass_of_its_own(p)
            sigma = expand_like(p.level.sigma, x0)
            direction = sigma * self.direction(p).to(x0)
            slope = sigma * torch.autograd.grad((direction * x0).sum(), x_t, create_graph=twice, retain_graph=training,
                                                materialize_grads=True)[0]  # by eps
            r = torch.linalg.vector_norm(slope.flatten(1), dim=1)
            if not training:
                return ((r - self.mean_variation) ** 2).to(r)
            moving = r if twice else self._difference(p, x_t, x0, direction, slope, r)
        return self._penalty(p, r.detach(), moving)

    @staticmethod
    def direction(p: DenoisingPass) -> Tensor:
        """y [B, ...]: N(0, 1) over the root of the number of elements, so of length 1 on average."""
        shape = p.x_t.shape[1:]
        return p.rng.normal(shape, "direction") / math.sqrt(shape.numel())

    @staticmethod
    def _pass_of_its_own(p: DenoisingPass) -> tuple[Tensor, Tensor]:
        """x_t and x0_hat with a graph between them, where that of the pass is none or in half precision."""
        x_t = p.x_t.detach().requires_grad_(True)
        return x_t, p.predict(x_t, p.t).x0

    def _precision(self, p: DenoisingPass) -> Any:
        """In half precision a difference is no more than rounding: autocast is left for it."""
        return torch.autocast(p.x_t.device.type, enabled=False) if self.needs_full_precision else contextlib.nullcontext()

    def _penalty(self, p: DenoisingPass, r: Tensor, moving: Tensor) -> Tensor:
        """(r - m)^2 [B], with the gradient 2 (r - m - rate mean(r - m)) of `moving`: that by every r of the batch, through m too.

        The mean over all processes goes in as a number, so none of them waits for another in its backward.
        """
        mean_r, mean_of_one = mean_over_processes(torch.stack([p.mean(r), p.mean(torch.ones_like(r))]).double())
        rate = torch.where(self.num_updates < self.measured_batches, 1 / (self.num_updates + 1.0).double(), 1 - self.decay)
        mean = self.mean_variation + rate * (mean_r - self.mean_variation)
        self.mean_variation.copy_(mean)
        self.num_updates += 1
        p.record("mean_variation", mean)
        deviation = r - mean.to(r)
        factor = 2 * (deviation - (rate * (mean_r - mean_of_one * mean)).to(r))
        return deviation**2 + factor * (moving - moving.detach())

    def _difference(self, p: DenoisingPass, x_t: Tensor, x0: Tensor, direction: Tensor, slope: Tensor, r: Tensor) -> Tensor:
        """<direction, x0_hat(eps + h n) - x0_hat(eps)> / h [B]: nearly r, with nearly its gradient by the weights."""
        along_n = expand_like(p.level.sigma, x_t) * slope / expand_like(torch.where(r > 0, r, 1.0), slope)  # in x_t
        x_t = x_t.detach()
        if not self.has_h and not bool(self.h > 0):
            self.h.fill_(self._best_step(p, x_t, along_n, direction))
        self.has_h = True
        h = self.h.to(x_t) if self.step_size is None else x_t.new_tensor(self.step_size)
        ahead = p.predict(x_t + h * along_n, p.t).x0
        back = p.predict(x_t - h * along_n, p.t).x0 if self.central else x0
        return (direction * (ahead - back)).flatten(1).sum(1) / (2 * h if self.central else h)

    def _best_step(self, p: DenoisingPass, x_t: Tensor, along_n: Tensor, direction: Tensor) -> float:
        """The h, halved from a coarse one on, whose difference is closest to that of h / 2, by all processes' samples.

        Compared are differences of gradients by x_t: of backward passes, with their rounding, as are those by the weights.
        """

        def gradient(x: Tensor) -> Tensor:
            x = x.requires_grad_(True)
            return torch.autograd.grad((direction * p.predict(x, p.t).x0).sum(), x, materialize_grads=True)[0]

        def curvature(h: float) -> Tensor:
            back = gradient(x_t - h * along_n) if self.central else base
            return (gradient(x_t + h * along_n) - back) / (2 * h if self.central else h)

        base = gradient(x_t.clone())
        h = best = coarsest = COARSEST * math.sqrt(x_t[0].numel())
        negligible = (NEGLIGIBLE / coarsest * base).square().sum()  # a network that is linear in x_t has no curvature to agree upon
        coarse, least, worse = curvature(h), math.inf, 0
        while worse < 4:
            fine = curvature(h / 2)
            squares = torch.stack([(fine - coarse).square().sum(), fine.square().sum() + negligible])
            difference, size = mean_over_processes(squares.double()).tolist()
            error = math.sqrt(difference / size) if size > 0 else 0.0
            best, least, worse = (h, error, 0) if error < least else (best, least, worse + 1)
            h, coarse = h / 2, fine
        if not least <= LARGEST_ERROR:
            raise InputError(f"regularizer step_variation: the finite difference does not settle. At its best step of {best:.3g} it "
                             f"differs by {100 * least:.0f} % from that at half the step: the network computes with too few digits, "
                             "or is not smooth. Write model: {dtype: float32}, or method: double_backward.")
        return best
