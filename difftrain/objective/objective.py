"""The objective: one part for each slot, and a list of regularizers, as a loss.

It draws timesteps and noise, evaluates the denoiser once, weights each sample's error, and takes
the one mean. Parts do not know each other.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from difftrain.core.errors import InputError
from difftrain.core.registry import GIVEN, registered_name
from difftrain.core.rng import Rng
from difftrain.objective.losses import Squared
from difftrain.objective.noise import White
from difftrain.objective.parameterization import Estimate, Parameterization, estimate, target
from difftrain.objective.schedule import NoiseSchedule, diffuse
from difftrain.objective.slots import (
    ERRORS,
    NOISES,
    PERTURBATIONS,
    REGULARIZERS,
    TIMESTEPS,
    VARIANCES,
    WEIGHTINGS,
    Error,
    NoiseSampler,
    Perturbation,
    Regularizer,
    TimestepSampler,
    Variance,
    Weighting,
)
from difftrain.objective.timesteps import Uniform
from difftrain.objective.types import Batch, Cond, Denoiser, DenoisingPass, Losses
from difftrain.objective.variance import FixedVariance
from difftrain.objective.weightings import Unit, weight_table


class ActiveTerm(NamedTuple):
    """A regularizer that is evaluated at a step.

    Args:
        name: The name of its term.
        weight: The factor of its term at this step.
        regularizer: The regularizer.
    """

    name: str
    weight: float
    regularizer: Regularizer


class Objective(nn.Module):
    """``E[w(t) error(output, target)]`` over x0, t and eps, plus the terms of the regularizers.

    It has no parameters. Its buffers are the state of the regularizers.

    Args:
        schedule: Noise levels by timestep.
        parameterization: What the denoiser outputs.
        weighting: Weight of a sample's error by its noise level.
        timesteps: Distribution of the timesteps.
        noise: The noise that is the target.
        perturbation: Change of the noise in the input alone.
        error: Distance between output and target.
        variance: Fixed or learned variance of the reverse process.
        regularizers: Additional loss terms.

    Raises:
        InputError: If the parts have no meaning together.
    """

    def __init__(
        self,
        schedule: Annotated[NoiseSchedule, GIVEN],
        parameterization: Annotated[Parameterization, GIVEN],
        weighting: Annotated[Weighting, WEIGHTINGS] = Unit(),
        timesteps: Annotated[TimestepSampler, TIMESTEPS] = Uniform(),
        noise: Annotated[NoiseSampler, NOISES] = White(),
        perturbation: Annotated[Perturbation | None, PERTURBATIONS] = None,
        error: Annotated[Error, ERRORS] = Squared(),
        variance: Annotated[Variance, VARIANCES] = FixedVariance(),
        regularizers: Annotated[list[Regularizer], REGULARIZERS] = [],  # noqa: B006
    ):
        super().__init__()
        self.schedule, self.parameterization = schedule, parameterization
        self.weighting, self.error = weighting, error
        self.timesteps, self.noise = timesteps, noise
        self.perturbation, self.variance = perturbation, variance
        self.regularizers = nn.ModuleDict(named(regularizers))
        self.trains_implied_eps = perturbation is not None and perturbation.target == "implied_eps"
        self._check()
        self.weights = weight_table(weighting, self.trained_error, schedule)  # [T] float64

    @property
    def trained_error(self) -> Parameterization:
        """The parameterization whose error is trained: epsilon if it is that of the implied eps."""
        return "epsilon" if self.trains_implied_eps else self.parameterization

    def forward(self, denoiser: Denoiser, batch: Batch, rng: Rng) -> Losses:
        """Compute the losses of one micro-batch.

        Args:
            denoiser: (x_t [B, ...], time [B], cond) -> output.
            batch: The clean samples and their conditions.
            rng: Random draws, with the step and the samples' places in the global batch.

        Returns:
            The total with gradient, and what the log shows.
        """
        # Draw timesteps and noise.
        timesteps = self.timesteps(self.schedule.num_timesteps, rng)
        t, level = timesteps.t, self.schedule.level(timesteps.t)
        eps = self.noise(batch.x0, rng)
        # The target stays eps: the network must explain an input noisier than its label.
        eps_in = eps if self.perturbation is None else self.perturbation(eps, level, rng)
        x_t = diffuse(batch.x0, eps_in, level)
        active = self.active_regularizers(rng.step)
        if any(term.regularizer.differentiates_input for term in active):
            x_t.requires_grad_(True)

        # Evaluate the denoiser, and weight each sample's error.
        output, log_variance = self._evaluate(denoiser, x_t, t, batch.cond, rng)
        implied = estimate(self.parameterization, output, x_t, level)
        if self.trains_implied_eps:
            errors = self.error(implied.eps, eps)
        else:
            errors = self.error(output, target(self.parameterization, batch.x0, eps, level))
        importance = timesteps.importance
        if batch.weights is not None:
            importance = importance * batch.weights.cpu()
        importance = importance.to(errors)
        addends = {"error": (self.weights[t].to(errors) * importance * errors).mean()}
        if log_variance is not None:
            bound = self.variance.bound(batch, t, x_t, implied, log_variance, self.schedule)
            addends["variational_bound"] = (importance * bound).mean()

        # Add the terms of the regularizers.
        def predict(x: Tensor, t: Tensor, rows: Tensor | slice | None = None) -> Estimate:
            cond = batch.cond
            if rows is not None:
                cond = {name: value[rows] for name, value in cond.items()}
            output, _ = self._evaluate(denoiser, x, t, cond, rng)
            return estimate(self.parameterization, output, x, self.schedule.level(t))

        p = DenoisingPass(
            batch, t, level, eps, x_t, implied, predict, self.schedule, rng, importance
        )
        measures: dict[str, Tensor] = {}
        for name, weight, regularizer in active:
            own_rng = rng.child(f"regularizers.{name}")
            record = partial(record_measure, measures, name)
            value = regularizer(replace(p, rng=own_rng, record=record))
            addends[name] = weight * (p.mean(value) if value.ndim else value)

        # Sum the terms.
        total = addends["error"]
        if len(addends) > 1:
            total = torch.stack([addend.to(errors) for addend in addends.values()]).sum()
        terms = {name: addend.detach() for name, addend in addends.items()}
        return Losses(total, terms, errors.detach(), level.log_snr, measures)

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        """Set up what the regularizers in use need of the network.

        That is attention kernels with a second derivative, and compiled graphs that keep what a
        second backward needs. It changes nothing if no regularizer in use asks for them.

        `Trainer` enters it. Your own training loop enters it around forward and backward, because
        activation checkpointing computes the forward again in the backward.

        Example:
            with objective.context():
                losses = objective(denoiser, batch, Rng(seed, step, range(len(batch.x0))))
                losses.total.backward()
        """
        used = self.used_regularizers().values()
        with contextlib.ExitStack() as stack:
            if any(regularizer.needs_double_backward for regularizer in used):
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            if any(regularizer.differentiates_input for regularizer in used):
                stack.enter_context(keep_compiled_graphs())
            yield

    def used_regularizers(self) -> dict[str, Regularizer]:
        """Return the regularizers whose weight is not 0, by the names of their terms."""
        found = cast(dict[str, Regularizer], dict(self.regularizers.items()))
        return {name: each for name, each in found.items() if each.weight > 0}

    def active_regularizers(self, step: int) -> list[ActiveTerm]:
        """Return the regularizers that are evaluated at a step, with their weights at this step."""
        active = []
        for name, regularizer in self.used_regularizers().items():
            if step % regularizer.every == 0:
                warm = min(1.0, (step + 1) / max(1, regularizer.warmup))
                weight = regularizer.weight * regularizer.every * warm
                active.append(ActiveTerm(name, weight, regularizer))
        return active

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load the regularizers' states by the names of their terms.

        A recipe may change between two runs: a regularizer without a saved state keeps its initial
        one, and a saved state without a regularizer is ignored.

        Args:
            state_dict: The saved state.
            strict: Whether each regularizer's own keys must match exactly.
            assign: As in `torch.nn.Module.load_state_dict`.
        """
        saved = {term_of(key) for key in state_dict} & set(self.regularizers)
        state = {key: value for key, value in state_dict.items() if term_of(key) in saved}
        for key, value in self.state_dict().items():
            if term_of(key) not in saved:
                state[key] = value
        return super().load_state_dict(state, strict, assign)

    def _evaluate(
        self, denoiser: Denoiser, x_t: Tensor, t: Tensor, cond: Cond, rng: Rng
    ) -> tuple[Tensor, Tensor | None]:
        """Return the prediction, and what predicts the variance, with the step's own dropout."""
        with rng.global_state("dropout", x_t.device):
            output = denoiser(x_t, self.schedule.model_time(t).to(x_t.device), cond)
        return self.variance.split(output.to(torch.promote_types(output.dtype, x_t.dtype)), x_t)

    def _check(self) -> None:
        if self.schedule.has_zero_terminal_snr and self.parameterization == "epsilon":
            raise InputError(
                "parameterization epsilon says nothing about x0 where SNR = 0, and this schedule "
                "ends there. Write parameterization: v_prediction (flow_prediction on a flow "
                "schedule), or a schedule without zero terminal SNR."
            )
        stated_for = self.weighting.stated_for
        if stated_for not in (None, self.trained_error) and not self.error.squared:
            raise InputError(
                f"weighting {registered_name(self.weighting)!r} is stated for the {stated_for} "
                f"error. It converts to {self.trained_error} for the squared error alone, and this "
                f"error is {registered_name(self.error)!r}. Write error: {{type: squared}}, "
                f"weighting: {{type: unit}}, or parameterization: {stated_for}."
            )
        if self.trains_implied_eps and self.variance.output_channels > 1:
            raise InputError(
                "perturbation target implied_eps is not defined with a learned variance. "
                "Write target: clean, or variance: {type: fixed}."
            )


def named(regularizers: Sequence[Regularizer]) -> dict[str, nn.Module]:
    """Check regularizers, and name their terms.

    Args:
        regularizers: The regularizers.

    Returns:
        The regularizers by registered name or class name. The second one of a name gets "_2".

    Raises:
        InputError: If a regularizer lacks a member of the protocol.
    """
    found: dict[str, nn.Module] = {}
    counts = {"error": 1, "variational_bound": 1}  # the objective's own terms
    for regularizer in regularizers:
        name = registered_name(regularizer)
        counts[name] = counts.get(name, 0) + 1
        term = name if counts[name] == 1 else f"{name}_{counts[name]}"
        found[term] = complete(regularizer, name)
    return found


def complete(regularizer: Regularizer, name: str) -> nn.Module:
    """Return a regularizer that has all members of the protocol.

    Raises:
        InputError: If it lacks one.
    """
    members = [*Regularizer.__annotations__, "check"]
    missing = [member for member in members if not hasattr(regularizer, member)]
    if missing or not isinstance(regularizer, nn.Module):
        lacks = f"has no {', no '.join(missing)}" if missing else "is not a torch.nn.Module"
        raise InputError(
            f"regularizer {name} {lacks}. Derive the class {type(regularizer).__name__} from "
            "difftrain.objective.regularizers.WeightedTerm, which has defaults for all members but "
            "forward."
        )
    return regularizer


def term_of(key: str) -> str:
    """Return the term to which a key of the state belongs: regularizers.TERM.buffer."""
    return key.split(".")[1]


def record_measure(measures: dict[str, Tensor], term: str, name: str, value: Tensor) -> None:
    """Note a measure of a regularizer, without gradient, under the name of its term."""
    measures[f"{term}.{name}"] = value.detach()


def keep_compiled_graphs() -> contextlib.AbstractContextManager[Any]:
    """Let compiled graphs survive their backward pass, for a second one.

    torch.compile otherwise frees ("donates") the buffers of a graph in its backward.
    """
    import torch._functorch.config as compiler

    return cast(contextlib.AbstractContextManager[Any], compiler.patch("donated_buffer", False))
