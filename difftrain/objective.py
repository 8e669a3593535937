"""One of each part, and a list of regularizers, as a loss.

The objective draws, evaluates the denoiser once, weighs each sample's error and takes the one mean; parts never know
their neighbours. It has no parameters; its buffers are the regularizers' state.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from difftrain import parameterization as prm
from difftrain.batch import (
    Batch,
    Cond,
    Denoiser,
    DenoisingPass,
    Error,
    Losses,
    NoiseSampler,
    Perturbation,
    Regularizer,
    TimestepSampler,
    Variance,
    Weighting,
)
from difftrain.errors import Squared
from difftrain.noise import White
from difftrain.parameterization import Estimate, Parameterization
from difftrain.registry import ERRORS, GIVEN, NOISES, PERTURBATIONS, REGULARIZERS, TIMESTEPS, VARIANCES, WEIGHTINGS, InputError, dump
from difftrain.rng import Rng
from difftrain.schedule import NoiseSchedule, diffuse
from difftrain.timesteps import Uniform
from difftrain.variance import FixedVariance
from difftrain.weightings import Unit, weight_table


class Objective(nn.Module):
    """E over (x0, t, eps) of weight(t) error(output, target), plus the regularizers' terms.

    schedule, parameterization: what x_t is, and what the network outputs. The other arguments are the slots.
    Combinations that have no meaning are refused here, with a remedy.
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
        self.weighting, self.timesteps, self.noise, self.perturbation = weighting, timesteps, noise, perturbation
        self.error, self.variance = error, variance
        self.regularizers = nn.ModuleDict(named(regularizers))
        self.trains_implied_eps = perturbation is not None and perturbation.target == "implied_eps"
        self._refuse_what_has_no_meaning()
        self.weights = weight_table(weighting, self.trained_error, schedule)  # [T] float64

    @property
    def trained_error(self) -> Parameterization:
        """The parameterization whose error is taken: the network's own, or epsilon when the implied eps is trained."""
        return "epsilon" if self.trains_implied_eps else self.parameterization

    def forward(self, denoiser: Denoiser, batch: Batch, rng: Rng) -> Losses:
        """Losses of one micro-batch; `rng` carries its seed, step and the samples' places in the global batch."""
        drawn = self.timesteps(self.schedule.num_timesteps, rng)
        t, level = drawn.t, self.schedule.level(drawn.t)
        eps = self.noise(batch.x0, rng)
        # The target stays eps: the network must explain an input noisier than its label.
        eps_in = self.perturbation(eps, level, rng) if self.perturbation is not None else eps
        active = self.active_regularizers(rng.step)
        x_t = diffuse(batch.x0, eps_in, level)
        if any(r.differentiates_input for _, _, r in active):
            x_t.requires_grad_(True)

        output, log_variance = self._evaluate(denoiser, x_t, t, batch.cond, rng)
        implied = prm.estimate(self.parameterization, output, x_t, level)
        errors = self.error(*self._compared(output, implied, batch.x0, eps, drawn.t))
        importance = drawn.importance.to(errors) if batch.weights is None else (drawn.importance * batch.weights.cpu()).to(errors)
        addends = {"error": (self.weights[t].to(errors) * importance * errors).mean()}
        if log_variance is not None:
            addends["variational_bound"] = (importance * self.variance.bound(batch, t, x_t, implied, log_variance, self.schedule)).mean()

        def predict(x: Tensor, t: Tensor, rows: Tensor | slice | None = None) -> Estimate:
            cond = batch.cond if rows is None else {name: value[rows] for name, value in batch.cond.items()}
            output, _ = self._evaluate(denoiser, x, t, cond, rng)
            return prm.estimate(self.parameterization, output, x, self.schedule.level(t))

        measures: dict[str, Tensor] = {}
        for name, weight, regularizer in active:
            own, record = rng.child(f"regularizers.{name}"), partial(noted, measures, name)
            p = DenoisingPass(batch, t, level, eps, x_t, implied, predict, self.schedule, own, importance, record)
            value = regularizer(p)
            addends[name] = weight * (p.mean(value) if value.ndim else value)
        total = torch.stack([addend.to(errors) for addend in addends.values()]).sum() if len(addends) > 1 else addends["error"]
        terms = {name: addend.detach() for name, addend in addends.items()}
        return Losses(total, terms, errors.detach(), level.log_snr, measures)

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        """What the regularizers need of the network: attention kernels that can be differentiated twice, and graphs that can be gone
        back through twice when it is compiled. Hold it around forward AND backward (activation checkpointing recomputes there)."""
        used = [cast(Any, r) for r in self.regularizers.values() if cast(Any, r).weight > 0]
        with contextlib.ExitStack() as stack:
            if any(r.needs_double_backward for r in used):
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            if any(r.differentiates_input for r in used):
                stack.enter_context(keeping_compiled_graphs())
            yield

    def active_regularizers(self, step: int) -> list[tuple[str, float, Any]]:
        """(term's name, its weight now, regularizer) of those evaluated at this step."""
        found = []
        for name, regularizer in self.regularizers.items():
            r = cast(Any, regularizer)
            if r.weight > 0 and step % r.every == 0:
                warm = min(1.0, (step + 1) / (getattr(r, "warmup", 0) or 1))
                found.append((name, r.weight * r.every * warm, r))
        return found

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Each regularizer takes its own state; one that the state does not know keeps what it starts with (a recipe may have changed)."""
        known = {name for name in self.regularizers if any(key.startswith(f"regularizers.{name}.") for key in state_dict)}
        kept = {key: value for key, value in self.state_dict().items() if key.split(".")[1] not in known}
        given = {key: value for key, value in state_dict.items() if key.split(".")[1] in known}
        return super().load_state_dict({**kept, **given}, strict, assign)

    def _evaluate(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, cond: Cond, rng: Rng) -> tuple[Tensor, Tensor | None]:
        with rng.global_state("dropout", x_t.device):
            output = denoiser(x_t, self.schedule.model_time(t).to(x_t.device), cond)
        return self.variance.split(output.to(torch.promote_types(output.dtype, x_t.dtype)), x_t)

    def _compared(self, output: Tensor, implied: Estimate, x0: Tensor, eps: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        if self.trains_implied_eps:
            return implied.eps, eps
        return output, prm.target(self.parameterization, x0, eps, self.schedule.level(t))

    def _refuse_what_has_no_meaning(self) -> None:
        if self.schedule.has_zero_terminal_snr and self.parameterization == "epsilon":
            raise InputError(
                "parameterization epsilon says nothing about x0 where SNR = 0, and this schedule ends there. "
                "Write parameterization: v_prediction (flow_prediction on a flow schedule), or a schedule without zero terminal SNR."
            )
        stated_for = self.weighting.stated_for
        if stated_for not in (None, self.trained_error) and not self.error.squared:
            raise InputError(
                f"weighting {type(self.weighting).__name__} is stated for the {stated_for} error and converts to {self.trained_error} "
                f"for the squared error alone, not for {type(self.error).__name__}. "
                "Write error: {type: squared}, weighting: {type: unit}, or parameterization: " + f"{stated_for}."
            )
        if self.trains_implied_eps and self.variance.output_channels > 1:
            raise InputError("perturbation target implied_eps is not defined with a learned variance. "
                             "Write target: clean, or variance: {type: fixed}.")


def named(regularizers: Sequence[Any]) -> dict[str, Any]:
    """Regularizers under the names of their terms: what they are registered as, a second one of a kind with _2 behind it."""
    found: dict[str, Any] = {}
    counts = {"error": 1, "variational_bound": 1}
    for regularizer in regularizers:
        kind = dump(regularizer)["type"] if hasattr(regularizer, "registered_as") else type(regularizer).__name__
        counts[kind] = counts.get(kind, 0) + 1
        found[kind if counts[kind] == 1 else f"{kind}_{counts[kind]}"] = regularizer
    return found


def noted(measures: dict[str, Tensor], term: str, name: str, value: Tensor) -> None:
    measures[f"{term}.{name}"] = value.detach()


def keeping_compiled_graphs() -> Any:
    """torch.compile frees ("donates") buffers in a graph's backward unless told that it may come twice."""
    import torch._functorch.config as compiler

    return compiler.patch("donated_buffer", False)
