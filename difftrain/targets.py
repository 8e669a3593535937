"""Layers of a diffusers or text model by what a recipe writes: a preset, ends of names, patterns."""

import fnmatch
from collections import Counter
from collections.abc import Iterable
from math import prod

from torch import nn

from difftrain.registry import InputError, nearest

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

ATTENTION = ("*.to_q", "*.to_k", "*.to_v", "*.to_out.0", "*.add_q_proj", "*.add_k_proj", "*.add_v_proj", "*.to_add_out")
MLP = ("*.ff.net.*", "*.ff_context.net.*", "single_transformer_blocks.*.proj_mlp", "single_transformer_blocks.*.proj_out")
PRESETS = {"attention": ATTENTION, "attention_mlp": ATTENTION + MLP, "all_linear": ("*",), "all_linear_conv": ("*",)}
TEXT_ATTENTION = ("*.q_proj", "*.k_proj", "*.v_proj", "*.out_proj")
TEXT_PRESETS = {"attention": TEXT_ATTENTION, "attention_mlp": (*TEXT_ATTENTION, "*.fc1", "*.fc2"), "all_linear": ("*",)}


def layers_in(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that can take a LoRA, by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LAYERS)}


def largest_rank(layer: nn.Module) -> int:
    """The rank of the layer's weight as a matrix [out, in x kernel]."""
    out, *inner = layer.get_parameter("weight").shape
    return min(out, prod(inner))


def select(model: nn.Module, targets: str | list[str], presets: dict[str, tuple[str, ...]], key: str) -> list[str]:
    """Names of the layers that a preset or a list of names and patterns means; InputError for one that matches nothing."""
    layers = layers_in(model)
    if isinstance(targets, str):
        if targets not in presets:
            raise InputError(f"{key}: unknown preset {targets!r}{nearest(targets, presets)}; or write a list of layer names: [{targets}].")
        inner = {name for name, layer in layers.items() if isinstance(layer, nn.Linear) or targets == "all_linear_conv"}
        chosen = [name for name in inner - {"conv_in", "conv_out"} if any(fnmatch.fnmatchcase(name, p) for p in presets[targets])]
        missing = [] if chosen else [targets]
    else:
        found = {target: [name for name in layers if matches(name, target)] for target in targets}
        chosen, missing = [name for names in found.values() for name in names], [t for t, names in found.items() if not names]
    if missing or not chosen:
        raise InputError(f"{key}: {missing[0] if missing else targets!r} matches no layer of this {type(model).__name__}. "
                         f"Its layers: {counted(end_of(name) for name in layers)}. Write a list of such names, or of patterns.")
    return [name for name in layers if name in set(chosen)]


def matches(name: str, target: str) -> bool:
    """Whether a layer's name ends in `target`, or matches it as a pattern where it is one."""
    if any(mark in target for mark in "*?["):
        return fnmatch.fnmatchcase(name, target)
    return name == target or name.endswith(f".{target}")


def end_of(name: str) -> str:
    """The last part of a name that is no number, with what follows: to_out.0 of a.1.to_out.0."""
    parts = name.split(".")
    start = max((i for i, part in enumerate(parts) if not (part.isdigit() or part in ("weight", "bias"))), default=0)
    return ".".join(parts[start:])


def counted(names: Iterable[str]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in Counter(names).most_common())
