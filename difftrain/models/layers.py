"""Layers of a network or text encoder, selected by a preset, ends of names, or patterns."""

import fnmatch
from collections import Counter
from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

from torch import nn

from difftrain.core.errors import InputError, nearest

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

ATTENTION = (
    "*.to_q",
    "*.to_k",
    "*.to_v",
    "*.to_out.0",
    "*.add_q_proj",
    "*.add_k_proj",
    "*.add_v_proj",
    "*.to_add_out",
)
MLP = (
    "*.ff.net.*",
    "*.ff_context.net.*",
    "single_transformer_blocks.*.proj_mlp",
    "single_transformer_blocks.*.proj_out",
)
PRESETS = {
    "attention": ATTENTION,
    "attention_mlp": ATTENTION + MLP,
    "all_linear": ("*",),
    "all_linear_conv": ("*",),
}
TEXT_ATTENTION = ("*.q_proj", "*.k_proj", "*.v_proj", "*.out_proj")
TEXT_PRESETS = {
    "attention": TEXT_ATTENTION,
    "attention_mlp": (*TEXT_ATTENTION, "*.fc1", "*.fc2"),
    "all_linear": ("*",),
}
# The convolutions from and to the few channels of x_t, which no preset selects.
OUTERMOST = ("conv_in", "conv_out")


def layers_in(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that can take a LoRA, by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LAYERS)}


def largest_rank(layer: nn.Module) -> int:
    """Return the largest rank of a layer's weight as a matrix [out, in x kernel]."""
    out, *inner = layer.get_parameter("weight").shape
    return min(out, prod(inner))


def select(
    model: nn.Module, targets: str | list[str], presets: Mapping[str, tuple[str, ...]], key: str
) -> list[str]:
    """Return the names of the layers that a preset or a list means, in the network's order.

    Args:
        model: The network.
        targets: The name of a preset, or a list of ends of names and of patterns (with * ? [).
        presets: The patterns of each preset.
        key: The recipe's key, for messages.

    Raises:
        InputError: If the preset is unknown, or a target matches no layer.
    """
    layers = layers_in(model)
    if isinstance(targets, str):
        found = {targets: of_preset(layers, targets, presets, key)}
    else:
        found = {}
        for target in targets:
            found[target] = [name for name in layers if matches(name, target)]
    unmatched: list[Any] = [target for target, names in found.items() if not names]
    if not found:
        unmatched = [targets]
    if unmatched:
        known = counted(end_of(name) for name in layers)
        raise InputError(
            f"{key}: {unmatched[0]!r} matches no layer of this {type(model).__name__}. Its layers: "
            f"{known}. Write a list of such names, or of patterns."
        )
    chosen = set[str]().union(*found.values())
    return [name for name in layers if name in chosen]


def of_preset(
    layers: Mapping[str, nn.Module], preset: str, presets: Mapping[str, tuple[str, ...]], key: str
) -> list[str]:
    """Return the names of the layers that a preset means; arguments as for `select`."""
    if preset not in presets:
        raise InputError(
            f"{key}: unknown preset {preset!r}{nearest(preset, presets)}; or write a list of "
            f"layer names: [{preset}]."
        )
    chosen = []
    for name, layer in layers.items():
        fits = isinstance(layer, nn.Linear) or preset == "all_linear_conv"
        if not fits or name in OUTERMOST:
            continue
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in presets[preset]):
            chosen.append(name)
    return chosen


def matches(name: str, target: str) -> bool:
    """Return whether a layer's name ends in `target`, or matches it if it is a pattern."""
    if any(mark in target for mark in "*?["):
        return fnmatch.fnmatchcase(name, target)
    return name == target or name.endswith(f".{target}")


def end_of(name: str) -> str:
    """Return a name from its last word on: to_out.0 of a.1.to_out.0, fc.weight of a.fc.weight."""
    parts = name.split(".")
    start = 0
    for place, part in enumerate(parts):
        if not part.isdigit() and part not in ("weight", "bias"):
            start = place
    return ".".join(parts[start:])


def counted(names: Iterable[str]) -> str:
    """Return names with how often each occurs: "to_q (8), to_k (8)"."""
    return ", ".join(f"{name} ({count})" for name, count in Counter(names).most_common())
