"""A trained LoRA in the form that kohya's scripts and ComfyUI read.

Each layer is (down [rank, in], up [out, rank], scale), written as name.lora_down.weight,
name.lora_up.weight and name.alpha, and read as up down alpha / rank. Each family of pipelines knows
the names; what families share is here.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Factors(NamedTuple):
    """The LoRA of one layer: the weight changes by scale * up @ down.

    Args:
        down: [rank, in], of a convolution with its kernel behind.
        up: [out, rank], of a convolution with its kernel behind.
        scale: The scale.
    """

    down: Tensor
    up: Tensor
    scale: float

    def scaled(self) -> "Factors":
        """Return the same product with the scale inside `up`."""
        return Factors(self.down, self.up * self.scale, 1.0)


Layers = dict[str, Factors]
"""LoRA of layers by name."""


def kohya_state(layers: Mapping[str, Layers]) -> dict[str, Tensor]:
    """Return the tensors of a file in kohya's keys.

    Args:
        layers: Layers by kohya's prefix ("lora_unet", "lora_te1"), then by name with dots.
    """
    state: dict[str, Tensor] = {}
    for prefix, inner in layers.items():
        for name, (down, up, scale) in inner.items():
            key = f"{prefix}_{name.replace('.', '_')}"
            state[f"{key}.lora_down.weight"] = down
            state[f"{key}.lora_up.weight"] = up
            state[f"{key}.alpha"] = torch.tensor(scale * len(down), dtype=torch.float32)
    return state


def unscaled_state(layers: Mapping[str, Layers]) -> dict[str, Tensor]:
    """Return the tensors of a file in diffusers' keys, which carry no alpha.

    Args:
        layers: Layers by folder in the pipeline, then by name.
    """
    state: dict[str, Tensor] = {}
    for folder, inner in layers.items():
        for name, factors in inner.items():
            scaled = factors.scaled()
            state[f"{folder}.{name}.lora_A.weight"] = scaled.down
            state[f"{folder}.{name}.lora_B.weight"] = scaled.up
    return state


def version_metadata(version: str, architecture: str) -> dict[str, str]:
    """Return what a kohya file's header says about the version of the base model.

    Args:
        version: kohya's name of it.
        architecture: Its name in the model specification.
    """
    return {
        "ss_base_model_version": version,
        "modelspec.architecture": f"{architecture}/lora",
    }


def side_by_side(model: nn.Module, names: Sequence[str], layers: Layers) -> Factors:
    """Fuse the LoRA of layers whose outputs stand side by side in one layer.

    The downs are stacked and the ups are block-diagonal, so the rank is the sum of the ranks. A
    layer without LoRA gets zeros.

    Args:
        model: The network, for the layers' sizes.
        names: The layers in the order of their outputs; at least one has LoRA.
        layers: Their LoRA by name.

    Returns:
        One LoRA of scale 1.
    """
    like = next(layers[name].down for name in names if name in layers)
    downs, ups = [], []
    for name in names:
        if name in layers:
            scaled = layers[name].scaled()
            downs.append(scaled.down)
            ups.append(scaled.up)
        else:
            size = len(model.get_parameter(f"{name}.weight"))
            downs.append(torch.zeros_like(like))
            ups.append(like.new_zeros(size, len(like)))
    up: Tensor = torch.block_diag(*ups)  # type: ignore[no-untyped-call]
    return Factors(torch.cat(downs), up, 1.0)
