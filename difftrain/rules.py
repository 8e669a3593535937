"""Rules between a recipe's regularizers, its model and the way it is launched: each one sentence and one remedy."""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend
from torch import nn

from difftrain.objective import Objective
from difftrain.registry import InputError
from difftrain.schedule import NoiseSchedule


@dataclass(frozen=True)
class Launch:
    """What `accelerate launch` decided and a regularizer may not stand."""

    sharded: bool = False
    compiled: bool = False
    precision: str = "no"

    @staticmethod
    def of(accelerator: Accelerator) -> "Launch":
        compiled = accelerator.state.dynamo_plugin.backend != DynamoBackend.NO
        return Launch(accelerator.distributed_type == DistributedType.FSDP, compiled, accelerator.mixed_precision)


def in_use(objective: Objective) -> Iterator[tuple[str, Any]]:
    """(name, regularizer) of those whose weight is not 0."""
    return ((name, r) for name, r in objective.regularizers.items() if cast(Any, r).weight > 0)


def check_regularizers(objective: Objective, schedule: NoiseSchedule, shape: tuple[int, ...], model: nn.Module, dtype: str) -> None:
    """shape: of a micro-batch x0 [B, ...]. model: the diffusers model, with or without weights, and the dtype they will have."""
    for name, regularizer in in_use(objective):
        if hasattr(regularizer, "check"):
            regularizer.check(schedule, shape)
        if getattr(regularizer, "needs_full_precision", False) and dtype not in ("float32", "float64"):
            raise InputError(f"regularizer {name} takes differences of outputs, which in {dtype} are no more than rounding. Write model: "
                             "{dtype: float32} (accelerate's mixed precision may stay on: these passes leave it).")
        if regularizer.needs_double_backward:
            other = attention_without_math(model)
            if other is not None:
                raise InputError(f"regularizer {name} goes back through the network twice, which needs PyTorch's own attention (its math "
                                 f"kernel), but the model's attention is {other}. Write method: finite_difference where the regularizer "
                                 "has one, or give the model diffusers' default attention processor.")


def check_launch(objective: Objective, launch: Launch) -> None:
    """Refuses what the regularizers do not stand of the launch."""
    for name, regularizer in in_use(objective):
        if regularizer.needs_double_backward:
            reason = "FSDP does not support" if launch.sharded else "a compiled network does not support" if launch.compiled else None
            if reason is not None:
                other = "without FSDP" if launch.sharded else "without dynamo_backend"
                raise InputError(f"regularizer {name} goes back through the network twice, which {reason}. Write method: "
                                 f"finite_difference where the regularizer has one, or launch {other}.")
            if launch.precision == "fp16":
                raise InputError(f"regularizer {name} has a gradient within the loss, which fp16 does not scale: it vanishes. "
                                 "Launch with mixed_precision bf16 or no.")
        if getattr(regularizer, "needs_full_precision", False) and launch.sharded and launch.precision != "no":
            raise InputError(f"regularizer {name} takes differences of outputs, which in {launch.precision} are no more than rounding, and "
                             "under FSDP no pass leaves mixed precision. Launch with mixed_precision no, or without FSDP.")


def attention_without_math(model: nn.Module) -> str | None:
    """The first attention processor that does not call torch's scaled_dot_product_attention, if there is one."""
    for module in model.modules():
        processor = getattr(module, "processor", None)
        if processor is None or not callable(processor):
            continue
        source = inspect.getsource(type(processor))
        dispatched = "dispatch_attention_fn" in source
        if dispatched and str(getattr(getattr(processor, "_attention_backend", None), "value", "native")) not in ("native", "_native_math"):
            return f"{type(processor).__name__} with the backend {processor._attention_backend.value}"
        if not dispatched and "scaled_dot_product_attention" not in source:
            return type(processor).__name__
    return None
