"""Error-propagation regularizer (bootstrapped MMD): a few reverse steps from noised data must end where noised data lies."""

from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from difftrain.batch import DenoisingPass
from difftrain.distributed import gathered_from_processes, num_processes, process_index
from difftrain.registry import REGULARIZERS, InputError, NonNegative, NonNegativeInt, PositiveInt
from difftrain.regularizers.base import WeightedTerm
from difftrain.schedule import NoiseSchedule, diffuse
from difftrain.transitions import ancestral, ddim, flow_euler

BANDWIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)


@REGULARIZERS.register("error_propagation")
class ErrorPropagation(WeightedTerm):
    """MMD^2 of x_s reached by n <= length reverse steps from q(x_{s+n} | x0), and of x_s ~ q(x_s | x0') for other images x0'.

    Li and van der Schaar 2024, "On Error Propagation of Diffusion Models", arXiv:2308.05021; roll-out, kernel and estimator of
    the published code. Once a step, and the same for all processes: head ~ U{1, ..., T-1}, n ~ U{1, ..., length}, s = max(head - n, 0).
    The samples at even places of the global batch are noised to `head` and rolled down by the network, with their own conditions;
    those at odd places are noised to s. The kernel is the sum over m in 1/4, 1/2, 1, 2, 4 of exp(-|x - y|^2 / (m b)), b the mean squared
    distance of two different samples of both halves together (a constant to the gradient). The term is the biased V-statistic, as
    published, in [0, 10]: it stays above 0 for equal distributions; the unbiased U-statistic is logged beside it.

    step: the reverse step; `ancestral` (with the posterior's variance, x0_hat not clipped) is the published one.
    truncate: gradients go through the last k steps alone; by default through all.
    checkpointing: each step but the last is recomputed in the backward, with the same noise: less memory, more time.
    gather: the halves are those of the global batch of this backward over all processes, with gradients; otherwise each process
    compares its own halves.
    """

    def __init__(
        self, weight: NonNegative = 1.0, length: PositiveInt = 5, step: Literal["ancestral", "ddim", "flow_euler"] = "ancestral",
        truncate: PositiveInt | None = None, checkpointing: bool = False, gather: bool = False, every: PositiveInt = 1,
        warmup: NonNegativeInt = 0,
    ):
        super().__init__(weight, every, warmup)
        if truncate is not None and truncate >= length:
            raise InputError(f"regularizer error_propagation: truncate {truncate} keeps all of the at most {length} steps. "
                             "Write a smaller one, or leave truncate out.")
        self.length, self.step, self.truncate, self.checkpointing, self.gather = length, step, truncate, checkpointing, gather

    def check(self, schedule: NoiseSchedule, shape: tuple[int, ...]) -> None:
        if shape[0] < 4:
            raise InputError(f"regularizer error_propagation compares the halves of a micro-batch, at least 2 samples each, but the "
                             f"micro-batch has {shape[0]}. Write training: {{micro_batch_size: 4}} or more.")
        if self.step == "flow_euler" and schedule.kind != "flow":
            raise InputError("regularizer error_propagation: step flow_euler needs a flow schedule. Write step: ancestral, or ddim.")
        if schedule.num_timesteps < 2:
            raise InputError("regularizer error_propagation needs a schedule of at least 2 timesteps.")

    def forward(self, p: DenoisingPass) -> Tensor:  # []
        x0 = p.batch.x0
        self.check(p.schedule, tuple(x0.shape))
        head, steps = self.drawn(p)
        even, odd = ([i for i, place in enumerate(p.rng.samples) if place % 2 == half] for half in (0, 1))
        if min(len(even), len(odd)) < 2:
            raise InputError(f"regularizer error_propagation compares the samples at even and at odd places of the batch, at least 2 each; "
                             f"of the places {p.rng.samples} {len(even)} are even. Give Rng consecutive samples.")
        noise = p.rng.normal(x0.shape[1:], "noise").to(x0)
        start = diffuse(x0[even], noise[even], p.schedule.level(torch.full((len(even),), head)))
        rolled = self.rolled(p, start, even, head, steps)
        noised = diffuse(x0[odd], noise[odd], p.schedule.level(torch.full((len(odd),), head - steps)))
        v, u = self.statistics(rolled.flatten(1), noised.flatten(1))
        p.record("u_statistic", u)
        return v

    def drawn(self, p: DenoisingPass) -> tuple[int, int]:
        """(head, number of steps) of this training step."""
        shared = p.rng.shared("head and length")
        head = int(torch.randint(1, p.schedule.num_timesteps, (), generator=shared))
        return head, min(head, int(torch.randint(1, self.length + 1, (), generator=shared)))

    def rolled(self, p: DenoisingPass, x: Tensor, rows: list[int], head: int, steps: int) -> Tensor:
        """x at level `head` [b, ...] after `steps` reverse steps, with the conditions of those rows."""
        draws, places = p.rng.of(rows), torch.tensor(rows, device=x.device)

        def reverse(x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
            level, before, estimate = p.schedule.level(t), p.schedule.level_before(t), p.predict(x, t, places)
            if self.step == "ancestral":
                return ancestral(x, estimate, level, before, noise)
            return (ddim if self.step == "ddim" else flow_euler)(x, estimate, level, before)

        for k in range(steps):
            t = torch.full_like(places, head - k)
            noise = draws.normal(x.shape[1:], f"step {k}").to(x) if self.step == "ancestral" else x
            differentiated = torch.is_grad_enabled() and (self.truncate is None or k >= steps - self.truncate)
            recomputed = differentiated and self.checkpointing and k < steps - 1  # the last one's backward comes next: it holds no memory
            with torch.set_grad_enabled(differentiated):
                x = checkpoint(reverse, x, t, noise, use_reentrant=False) if recomputed else reverse(x, t, noise)
        return x

    def statistics(self, rolled: Tensor, noised: Tensor) -> tuple[Tensor, Tensor]:
        """(V, U) of the halves, [b, D] each: this process's, or with `gather` those of all.

        Each process then knows the whole value, and its own samples have their whole gradient, times the number of processes over which
        gradients will be averaged: no process waits for another in its backward.
        """
        if not self.gather or num_processes() == 1:
            return mmd(rolled, noised)
        own = torch.cat([rolled, noised])
        is_rolled = torch.arange(len(own), device=own.device) < len(rolled)
        parts, masks = gathered_from_processes(own), gathered_from_processes(is_rolled)
        parts[process_index()] = own
        everything, mask = torch.cat(parts), torch.cat(masks)
        v, u = mmd(everything[mask], everything[~mask])
        return v.detach() + num_processes() * (v - v.detach()), u


def mmd(x: Tensor, y: Tensor, bandwidth: float | Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(V, U): the biased and the unbiased estimate of MMD^2 of samples x [n, D] and y [m, D], in the inputs' dtype; n, m >= 2 for U.

    bandwidth: b of the kernel, by default that of x and y together. Distances are taken in float64 of centred samples, so that nothing is
    lost to cancellation far from zero.
    """
    n, m = len(x), len(y)
    distances = squared_distances(torch.cat([x, y]))
    if bandwidth is None:
        bandwidth = mean_distance(distances)
    kernel = torch.stack([torch.exp(-distances / (bandwidth * width)) for width in BANDWIDTHS]).sum(0)
    within_x, within_y, across = kernel[:n, :n].sum(), kernel[n:, n:].sum(), kernel[:n, n:].mean()
    v = within_x / n**2 + within_y / m**2 - 2 * across
    same = len(BANDWIDTHS)  # the kernel of a sample with itself
    u = (within_x - n * same) / max(1, n * (n - 1)) + (within_y - m * same) / max(1, m * (m - 1)) - 2 * across
    return v.to(x), u.detach().to(x)


def squared_distances(x: Tensor) -> Tensor:
    """|x_i - x_j|^2 [n, n] float64 of samples x [n, D]."""
    wide = x.double()
    wide = wide - wide.mean(0).detach()
    squares = wide.square().sum(1)
    distances = (squares[:, None] + squares[None, :] - 2 * wide @ wide.T).clamp(min=0)
    return distances.masked_fill(torch.eye(len(x), dtype=torch.bool, device=x.device), 0.0)


def mean_distance(distances: Tensor) -> Tensor:
    """[]: mean of the squared distances [n, n] of two different samples, without gradient."""
    n = len(distances)
    return (distances.detach().sum() / n / (n - 1)).clamp(min=1e-30)
