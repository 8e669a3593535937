"""Error-propagation regularizer with a bootstrapped MMD."""

from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from difftrain.core.errors import InputError
from difftrain.core.processes import gathered_from_processes, num_processes, process_index
from difftrain.core.registry import NonNegative, NonNegativeInt, PositiveInt
from difftrain.objective.mmd import mmd
from difftrain.objective.regularizers.base import WeightedTerm
from difftrain.objective.schedule import NoiseSchedule, diffuse
from difftrain.objective.slots import REGULARIZERS
from difftrain.objective.transitions import ancestral, ddim, flow_euler
from difftrain.objective.types import DenoisingPass


@REGULARIZERS.register("error_propagation")
class ErrorPropagation(WeightedTerm):
    """Error propagation: ``MMD^2(rolled, noised)`` between two sets of samples at one level s.

    `rolled` starts from q(x_head | x0) and takes head - s reverse steps; `noised` is q(x_s | x0')
    of other images x0'. A few reverse steps from noised data must end where noised data lies. Each
    training step draws ``head ~ U{1, ..., T-1}``, ``n ~ U{1, ..., length}`` and
    ``s = max(head - n, 0)``, equally on all processes. The samples at even places of the global
    batch are rolled out with their own conditions; those at odd places are noised.

    The kernel is the sum over m in 1/4, 1/2, 1, 2, 4 of ``exp(-|x - y|^2 / (m b))``, where b is the
    mean squared distance between two different samples of both halves, a constant for the gradient.
    The term is the biased V-statistic, as published, in [0, 10]. It stays above 0 for equal
    distributions. The unbiased U-statistic is logged beside it.

    It needs micro-batches of at least 4 samples.

    Args:
        weight: Factor of the term.
        length: The largest number of reverse steps.
        step: The reverse step. "ancestral", with the variance of the posterior and without clipping
            x0_hat, is the published one. "flow_euler" needs a flow schedule.
        truncate: The last k steps through which gradients go. None: all of them.
        checkpointing: Whether every step but the last is computed again in the backward pass, with
            the same noise: less memory, more time.
        gather: Whether the halves are those of the global batch over all processes, with gradients.
            Otherwise each process compares its own halves.
        every: The term is evaluated at each k-th step, with k times its weight.
        warmup: Steps over which the weight grows linearly to its full value.

    Reference:
        Li and van der Schaar 2024, "On Error Propagation of Diffusion Models", arXiv:2308.05021.
        Roll-out, kernel and estimator are those of the published code.
    """

    def __init__(
        self,
        weight: NonNegative = 1.0,
        length: PositiveInt = 5,
        step: Literal["ancestral", "ddim", "flow_euler"] = "ancestral",
        truncate: PositiveInt | None = None,
        checkpointing: bool = False,
        gather: bool = False,
        every: PositiveInt = 1,
        warmup: NonNegativeInt = 0,
    ):
        super().__init__(weight, every, warmup)
        if truncate is not None and truncate >= length:
            raise InputError(
                f"regularizer error_propagation: truncate {truncate} keeps all of the at most "
                f"{length} steps. Write a smaller number, or leave truncate out."
            )
        self.length, self.step = length, step
        self.truncate, self.checkpointing = truncate, checkpointing
        self.gather = gather

    def check(self, schedule: NoiseSchedule, shape: tuple[int, ...]) -> None:
        """Check the size of the micro-batch, and that the reverse step fits the schedule."""
        if shape[0] < 4:
            raise InputError(
                "regularizer error_propagation compares the halves of a micro-batch, which need at "
                f"least 2 samples each, but the micro-batch has {shape[0]}. "
                "Write training: {micro_batch_size: 4} or more."
            )
        if self.step == "flow_euler" and schedule.kind != "flow":
            raise InputError(
                "regularizer error_propagation: step: flow_euler needs a flow schedule. "
                "Write step: ancestral, or step: ddim."
            )
        if schedule.num_timesteps < 2:
            raise InputError(
                "regularizer error_propagation needs a schedule of at least 2 timesteps, but this "
                "one has 1. Write num_timesteps: 2 or more."
            )

    def forward(self, p: DenoisingPass) -> Tensor:  # []
        """Return the V-statistic [], and record the U-statistic."""
        x0 = p.batch.x0
        self.check(p.schedule, tuple(x0.shape))
        head, num_steps = self.draw(p)
        even = rows_at(p, 0)
        odd = rows_at(p, 1)
        if min(len(even), len(odd)) < 2:
            raise InputError(
                "regularizer error_propagation compares the samples at even and at odd places of "
                f"the batch and needs at least 2 of each, but {len(even)} of the places "
                f"{p.rng.samples} are even. Give Rng consecutive samples."
            )

        # Noise each half to its level, and take the even one down.
        noise = p.rng.normal(x0.shape[1:], "noise").to(x0)
        start = diffuse(x0[even], noise[even], p.schedule.level(torch.full((len(even),), head)))
        rolled = self.roll_out(p, start, even, head, num_steps)
        tail = torch.full((len(odd),), head - num_steps)
        noised = diffuse(x0[odd], noise[odd], p.schedule.level(tail))

        v, u = self.statistics(rolled.flatten(1), noised.flatten(1))
        p.record("u_statistic", u)
        return v

    def draw(self, p: DenoisingPass) -> tuple[int, int]:
        """Draw (head, number of reverse steps) of this training step."""
        shared = p.rng.shared("head and length")
        head = int(torch.randint(1, p.schedule.num_timesteps, (), generator=shared))
        length = int(torch.randint(1, self.length + 1, (), generator=shared))
        return head, min(head, length)

    def roll_out(
        self, p: DenoisingPass, x: Tensor, rows: list[int], head: int, num_steps: int
    ) -> Tensor:
        """Take reverse steps with the conditions of some rows.

        Args:
            p: The evaluated batch.
            x: Samples [b, ...] at the level `head`.
            rows: Their rows in the batch.
            head: The timestep to start from.
            num_steps: The number of reverse steps.

        Returns:
            [b, ...] at the level `head - num_steps`.
        """
        draws = p.rng.of(rows)
        places = torch.tensor(rows, device=x.device)

        def reverse(x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
            level, before = p.schedule.level(t), p.schedule.level_before(t)
            estimate = p.predict(x, t, places)
            if self.step == "ancestral":
                return ancestral(x, estimate, level, before, noise)
            if self.step == "ddim":
                return ddim(x, estimate, level, before)
            return flow_euler(x, estimate, level, before)

        for k in range(num_steps):
            t = torch.full_like(places, head - k)
            noise = x
            if self.step == "ancestral":
                noise = draws.normal(x.shape[1:], f"step {k}").to(x)
            is_kept = self.truncate is None or k >= num_steps - self.truncate
            has_gradient = torch.is_grad_enabled() and is_kept
            # The backward of the last step comes first, so computing it again saves no memory.
            is_last = k == num_steps - 1
            with torch.set_grad_enabled(has_gradient):
                if self.checkpointing and has_gradient and not is_last:
                    x = checkpoint(reverse, x, t, noise, use_reentrant=False)
                else:
                    x = reverse(x, t, noise)
        return x

    def statistics(self, rolled: Tensor, noised: Tensor) -> tuple[Tensor, Tensor]:
        """Compare the halves of this process, or with `gather` those of all processes.

        With `gather` each process knows the whole value, and its own samples have their whole
        gradient, times the number of processes over which gradients are averaged. No process waits
        for another one in its backward.

        Args:
            rolled: Samples [b, D] after the reverse steps.
            noised: Samples [b, D] of the other half.

        Returns:
            (V, U), both [].
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


def rows_at(p: DenoisingPass, parity: int) -> list[int]:
    """Return the rows whose places in the global batch are even (parity 0) or odd (parity 1)."""
    return [row for row, place in enumerate(p.rng.samples) if place % 2 == parity]
