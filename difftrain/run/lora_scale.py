"""The scale of a run's own LoRA, as `--lora-scale` gives it."""

import math

from difftrain.core.errors import InputError
from difftrain.models.adapters import NAME
from difftrain.models.model import DenoiserNetwork
from difftrain.run.model import ModelPlan


def check_lora_scale(scale: float | None, model: ModelPlan) -> None:
    """Refuse a scale for a run without a LoRA, and one that is not finite.

    Args:
        scale: What is asked for; None asks for nothing.
        model: The run's model.

    Raises:
        InputError: With what to write instead.
    """
    if scale is None:
        return
    if not model.makes_lora:
        raise InputError(
            f"--lora-scale {scale}: the run did not train a LoRA. Leave --lora-scale out."
        )
    if not math.isfinite(scale):
        raise InputError(f"--lora-scale {scale}: expected a finite number, such as 0.8.")


def set_lora_scale(denoiser: DenoiserNetwork, scale: float | None) -> None:
    """Set the scale of the run's LoRA; 0 is the base model, None leaves it as it was trained."""
    if scale is None:
        return
    from difftrain.models.lora.files import set_scales

    set_scales(denoiser, {NAME: scale})
