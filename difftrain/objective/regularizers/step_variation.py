"""Step-wise variation regularization of Smooth Diffusion."""

import contextlib
import math
from typing import Any, Literal

import torch
from torch import Tensor

from difftrain.core.errors import InputError
from difftrain.core.processes import mean_over_processes
from difftrain.core.registry import NonNegative, NonNegativeInt, Positive, PositiveInt, UnitInterval
from difftrain.objective.finite_difference import calibrate, change_along
from difftrain.objective.regularizers.base import WeightedTerm
from difftrain.objective.schedule import expand_like
from difftrain.objective.slots import REGULARIZERS
from difftrain.objective.types import DenoisingPass

LARGEST_ERROR = 0.05  # relative error of the calibrated difference


@REGULARIZERS.register("step_variation")
class StepVariation(WeightedTerm):
    """Step-wise variation: ``(r - m)^2``, ``r = |d <sigma y, x0_hat> / d eps|``, ``y ~ N(0, I/D)``.

    Each r [B] is the length of a vector-Jacobian product with a random output direction y, at
    ``x_t = alpha x0 + sigma eps``. The running mean ``m <- decay m + (1 - decay) mean(r)`` is one
    number for all timesteps and all processes. It is a saved buffer, it is updated before it is
    used, and its own gradient is kept. A step of the noise then moves x0_hat equally far wherever
    it is taken. A network whose x0_hat does not depend on x_t has r = 0.

    Both methods return the same value. The gradient of `finite_difference` needs first derivatives
    alone: for the unit direction n = grad / r it is the gradient of
    ``sum_b (dL / dr_b) <sigma y_b, x0_hat(eps + h n) - x0_hat(eps)> / h``, which tends to the
    gradient of the term as h goes to 0. It works with every attention kernel, with activation
    checkpointing and with torch.compile. It needs float32, so both of its passes leave autocast.
    The gradient of `double_backward` is exact. It needs `Objective.context()` around forward and
    backward.

    Args:
        weight: Factor of the term.
        decay: Decay of the running mean at each evaluation.
        method: How the gradient is computed.
        central: Whether the difference is taken from eps - h n to eps + h n: its error is of order
            h^2 instead of h, for one more pass.
        step_size: h, the length of the step in eps. None: h is calibrated at the first evaluation
            by comparing h with h / 2, and is then kept and saved.
        measured_batches: The first k batches over which m is the plain mean. With 0, as published,
            m starts at 0 and needs 458 updates to reach 99 %.
        every: The term is evaluated at each k-th step, with k times its weight.
        warmup: Steps over which the weight grows linearly to its full value.

    Reference:
        Guo et al. 2024, "Smooth Diffusion: Crafting Smooth Latent Spaces in Diffusion Models",
        arXiv:2312.04410, equations 9, 10 and 14. Estimator, decay and starting value are those of
        the published code.
    """

    differentiates_input = True
    mean_variation: Tensor
    num_updates: Tensor
    h: Tensor

    def __init__(
        self,
        weight: NonNegative = 1.0,
        decay: UnitInterval = 0.99,
        method: Literal["finite_difference", "double_backward"] = "finite_difference",
        central: bool = False,
        step_size: Positive | None = None,
        measured_batches: NonNegativeInt = 0,
        every: PositiveInt = 1,
        warmup: NonNegativeInt = 0,
    ):
        super().__init__(weight, every, warmup)
        self.decay, self.measured_batches = decay, measured_batches
        self.method, self.central = method, central
        self.step_size = step_size
        self.needs_double_backward = method == "double_backward"
        self.needs_full_precision = method == "finite_difference"
        if self.needs_double_backward and (central or step_size is not None):
            raise InputError(
                "regularizer step_variation: central and step_size are options of method: "
                "finite_difference, but this is method: double_backward. Leave them out, or write "
                "method: finite_difference."
            )
        self.register_buffer("mean_variation", torch.zeros((), dtype=torch.float64))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.long))
        self.register_buffer("h", torch.zeros((), dtype=torch.float64))  # 0: not calibrated yet
        self.knows_h = step_size is not None

    def forward(self, p: DenoisingPass) -> Tensor:  # [B]
        """Return (r - m)^2 [B], and update m if gradients are enabled."""
        training = torch.is_grad_enabled()
        imprecise = self.needs_full_precision and torch.is_autocast_enabled(p.x_t.device.type)
        with torch.enable_grad(), self._precision(p):
            # x0_hat with a graph to x_t; the pass itself may have none, or one in half precision.
            x_t, x0 = p.x_t, p.estimate.x0
            if imprecise or not training:
                x_t = p.x_t.detach().requires_grad_(True)
                x0 = p.predict(x_t, p.t).x0

            # r, the length of the gradient of <sigma y, x0_hat> with respect to eps.
            sigma = expand_like(p.level.sigma, x0)
            output_direction = sigma * self.direction(p).to(x0)
            twice = training and self.needs_double_backward
            (slope,) = torch.autograd.grad(
                (output_direction * x0).sum(),
                x_t,
                create_graph=twice,
                retain_graph=training,
                materialize_grads=True,
            )
            slope = sigma * slope
            r: Tensor = torch.linalg.vector_norm(slope.flatten(1), dim=1)
            if not training:
                return (r - self.mean_variation).square().to(r)
            moving = r if twice else self._difference(p, x_t, x0, output_direction, slope, r)
        return self._penalty(p, r.detach(), moving)

    @staticmethod
    def direction(p: DenoisingPass) -> Tensor:
        """Draw y [B, ...]: normal numbers over the root of their number, of length 1 on average."""
        shape = p.x_t.shape[1:]
        return p.rng.normal(shape, "direction") / math.sqrt(shape.numel())

    def _precision(self, p: DenoisingPass) -> contextlib.AbstractContextManager[Any]:
        """Leave autocast if a difference is taken, which in half precision is only rounding."""
        if self.needs_full_precision:
            return torch.autocast(p.x_t.device.type, enabled=False)
        return contextlib.nullcontext()

    def _penalty(self, p: DenoisingPass, r: Tensor, moving: Tensor) -> Tensor:
        """Return (r - m)^2 [B] with the gradient 2 (r - m - rate mean(r - m)) times `moving`'s.

        That is the gradient of the batch's mean through every r, and through m too. The mean over
        all processes enters as a number, so no process waits for another one in its backward.
        """
        means = torch.stack([p.mean(r), p.mean(torch.ones_like(r))]).double()
        mean_r, mean_of_one = mean_over_processes(means)
        rate = torch.where(
            self.num_updates < self.measured_batches,
            1 / (self.num_updates + 1.0).double(),
            1 - self.decay,
        )
        mean = self.mean_variation + rate * (mean_r - self.mean_variation)
        self.mean_variation.copy_(mean)
        self.num_updates += 1
        p.record("mean_variation", mean)
        deviation: Tensor = r - mean.to(r)
        factor: Tensor = 2 * (deviation - (rate * (mean_r - mean_of_one * mean)).to(r))
        return deviation.square() + factor * (moving - moving.detach())

    def _difference(
        self,
        p: DenoisingPass,
        x_t: Tensor,
        x0: Tensor,
        output_direction: Tensor,
        slope: Tensor,
        r: Tensor,
    ) -> Tensor:
        """Return <output_direction, x0_hat(eps + h n) - x0_hat(eps)> / h [B].

        It is nearly r, and so is its gradient with respect to the weights.
        """
        length = expand_like(torch.where(r > 0, r, 1.0), slope)
        n = expand_like(p.level.sigma, x_t) * slope / length  # as a direction of x_t
        x_t = x_t.detach()
        h = self._step(p, x_t, n, output_direction)
        change = change_along(
            lambda x: p.predict(x, p.t).x0, x_t, n, h, None if self.central else x0
        )
        return (output_direction * change.value).flatten(1).sum(1) / change.length

    def _step(self, p: DenoisingPass, x_t: Tensor, n: Tensor, output_direction: Tensor) -> Tensor:
        """Return h [], which is calibrated if it is neither given nor saved."""
        if self.step_size is not None:
            return x_t.new_tensor(self.step_size)
        # A flag in Python: reading the buffer at each step would wait for the device.
        if not self.knows_h and not bool(self.h > 0):
            h = self._calibrated(p, x_t, n, output_direction)
            if math.isnan(h):
                return x_t.new_tensor(h)  # nor is the loss finite; the next evaluation calibrates
            self.h.fill_(h)
        self.knows_h = True
        return self.h.to(x_t)

    def _calibrated(
        self, p: DenoisingPass, x_t: Tensor, n: Tensor, output_direction: Tensor
    ) -> float:
        """Return the calibrated h, or NaN if the pass is not finite."""

        def gradient(x: Tensor) -> Tensor:
            x = x.detach().requires_grad_(True)
            value = (output_direction * p.predict(x, p.t).x0).sum()
            return torch.autograd.grad(value, x, materialize_grads=True)[0]

        h, error = calibrate(gradient, x_t, n, self.central)
        if math.isnan(error):
            return math.nan
        if error > LARGEST_ERROR:
            raise InputError(
                "regularizer step_variation: the finite difference does not settle. At its best "
                f"step of {h:.3g} it differs by {100 * error:.0f} % from the difference at half "
                "the step: the network computes with too few digits, or is not smooth. Write "
                "model: {dtype: float32}, or method: double_backward."
            )
        return h
