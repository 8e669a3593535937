"""Builds what trains a run: objective, optimizer, learning rate, average; and checks the launch."""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend, ProjectConfiguration
from torch import nn

from difftrain.core.errors import InputError, nearest
from difftrain.core.launch import check_strategy
from difftrain.core.rng import Rng
from difftrain.objective.objective import Objective
from difftrain.recipe.schema import Recipe
from difftrain.run.model import ModelPlan
from difftrain.training.optimizers import Optimizer
from difftrain.training.settings import Training


@dataclass(frozen=True)
class Launch:
    """Settings of the launcher. Some regularizers do not work with all of them.

    Args:
        num_processes: World size.
        sharded: Whether weights are sharded (FSDP).
        compiled: Whether the network is compiled.
        precision: Mixed precision: "no", "fp16" or "bf16".
    """

    num_processes: int = 1
    sharded: bool = False
    compiled: bool = False
    precision: str = "no"

    @staticmethod
    def of(accelerator: Accelerator) -> "Launch":
        """Ask accelerate."""
        return Launch(
            accelerator.num_processes,
            accelerator.distributed_type == DistributedType.FSDP,
            accelerator.state.dynamo_plugin.backend != DynamoBackend.NO,
            accelerator.mixed_precision,
        )


@dataclass(frozen=True)
class TrainingPlan:
    """How a run trains.

    Attributes:
        recipe: The run's recipe.
        settings: How long, and in what batches.
        objective: The loss.
        optimizer: The optimizer's constructor.
    """

    recipe: Recipe
    settings: Training
    objective: Objective
    optimizer: Optimizer

    @classmethod
    def of(cls, recipe: Recipe, model: ModelPlan, launch: Launch) -> "TrainingPlan":
        """Build the parts, and refuse what cannot train together.

        Args:
            recipe: The recipe.
            model: The run's model.
            launch: What the launcher decided.

        Raises:
            InputError: With what to write instead.
        """
        settings: Training = recipe.training.build()
        micro_batch = settings.micro_batch_of(launch.num_processes)
        check_trackers(settings.trackers)
        optimizer: Optimizer = recipe.optimizer.build()
        optimizer.build(nn.Linear(1, 1))  # options out of bounds, which only the class knows
        objective: Objective = recipe.objective.build(
            schedule=model.schedule, parameterization=model.parameterization
        )
        # Draws that the parts may refuse: timesteps of the schedule, noise of the data's shape
        objective.timesteps(model.schedule.num_timesteps, Rng(0))
        objective.noise(torch.zeros(1, *model.shape), Rng(0))
        check_regularizers(objective, model, (micro_batch, *model.shape))
        check_launch(objective, launch)
        return cls(recipe, settings, objective, optimizer)


def make_accelerator(recipe: Recipe) -> Accelerator:
    """Make accelerate's view of processes, precision and trackers."""
    trackers = recipe.training.arguments["trackers"]
    check_trackers(trackers)
    folders = ProjectConfiguration(project_dir=recipe.output, logging_dir=recipe.output)
    return Accelerator(log_with=trackers or None, project_config=folders)


def check_trackers(names: list[str]) -> None:
    """Refuse trackers that accelerate does not know, and those whose package is missing.

    accelerate would leave the latter out without a word.
    """
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import LoggerType

    known = [str(name) for name in LoggerType if name != "all"]
    installed = [str(name) for name in get_available_trackers()]
    for name in set(names) - {"all"}:
        if name not in known:
            raise InputError(f"training.trackers: unknown tracker {name!r}{nearest(name, known)}.")
        if name not in installed:
            raise InputError(
                f"training.trackers: the package of {name!r} is not installed. Install it, or "
                "leave the tracker out."
            )


def check_regularizers(objective: Objective, model: ModelPlan, shape: tuple[int, ...]) -> None:
    """Refuse regularizers that do not fit the data or the network.

    Args:
        objective: The loss.
        model: The run's model.
        shape: Shape of a micro-batch x0 [B, ...].
    """
    dtype = model.model.dtype
    for name, regularizer in objective.used_regularizers().items():
        regularizer.check(model.schedule, shape)
        if regularizer.needs_full_precision and dtype not in ("float32", "float64"):
            raise InputError(
                f"regularizer {name} subtracts outputs of the network, and in {dtype} the "
                "difference is lost to rounding. Write model: {dtype: float32} (accelerate's mixed "
                "precision may stay on: these passes run without it)."
            )
        if not regularizer.needs_double_backward:
            continue
        other = attention_without_math(model.skeleton.model)
        if other is not None:
            raise InputError(
                f"regularizer {name} goes back through the network twice, which needs PyTorch's "
                f"own attention (its math kernel), but the model's attention is {other}. Write "
                "method: finite_difference where the regularizer has one, or give the model "
                "diffusers' default attention processor."
            )


def check_launch(objective: Objective, launch: Launch) -> None:
    """Refuse strategies that do not work here, and regularizers that do not work with the launch.

    Raises:
        InputError: With what to use instead.
    """
    check_strategy()
    for name, regularizer in objective.used_regularizers().items():
        if regularizer.needs_double_backward:
            check_double_backward(name, launch)
        mixes = launch.sharded and launch.precision != "no"
        if regularizer.needs_full_precision and mixes:
            raise InputError(
                f"regularizer {name} subtracts outputs of the network. In {launch.precision} the "
                "difference is lost to rounding, and FSDP cannot run single passes without mixed "
                "precision. Launch with mixed_precision no, or without FSDP."
            )


def check_double_backward(name: str, launch: Launch) -> None:
    """Refuse a launch under which a network cannot be differentiated twice."""
    twice = f"regularizer {name} goes back through the network twice, which"
    remedy = "Write method: finite_difference where the regularizer has one, or launch"
    if launch.sharded:
        raise InputError(f"{twice} FSDP does not support. {remedy} without FSDP.")
    if launch.compiled:
        raise InputError(
            f"{twice} a compiled network does not support. {remedy} without dynamo_backend."
        )
    if launch.precision == "fp16":
        raise InputError(
            f"regularizer {name} takes a gradient inside the loss. The loss scaling of fp16 does "
            "not cover it, so it underflows to 0. Launch with mixed_precision bf16 or no."
        )


def attention_without_math(model: nn.Module) -> str | None:
    """Return the first attention that does not use PyTorch's own; None if all of them do."""
    for module in model.modules():
        processor: Any = getattr(module, "processor", None)
        if processor is None or not callable(processor):
            continue
        name = type(processor).__name__
        try:
            source = inspect.getsource(type(processor))
        except (OSError, TypeError):  # a class whose source cannot be looked at
            return name
        if "dispatch_attention_fn" in source:
            backend = getattr(processor, "_attention_backend", None)
            value = "native" if backend is None else str(backend.value)
            if value not in ("native", "_native_math"):
                return f"{name} with the backend {value}"
        elif "scaled_dot_product_attention" not in source:
            return name
    return None
