"""LoRA layers in a network and its text encoders: where they are, which are active, and loading."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

from torch import Tensor, nn

from difftrain.core.errors import InputError
from difftrain.models.adapters import lora_layers
from difftrain.models.model import DenoiserNetwork


def all_parts(
    denoiser: DenoiserNetwork, encoders: Mapping[str, nn.Module] | None = None
) -> dict[str, nn.Module]:
    """Return the network and text encoders by folder, which is the prefix of their keys.

    Args:
        denoiser: The network, with the text encoders that train.
        encoders: Other text encoders by folder.
    """
    return {**denoiser.parts(), **(encoders or {})}


def trained_parts(denoiser: DenoiserNetwork) -> dict[str, Any]:
    """Return those of the denoiser's parts that hold the trained LoRA, by folder."""
    found = {prefix: part for prefix, part in denoiser.parts().items() if lora_layers(part)}
    assert found, "no LoRA was added to this denoiser"
    return found


def peft_layers(model: nn.Module) -> list[Any]:
    """Return all of peft's LoRA layers in a model."""
    from peft.tuners.lora import LoraLayer

    return [layer for layer in model.modules() if isinstance(layer, LoraLayer)]


def active_in(models: Mapping[str, nn.Module]) -> list[str]:
    """Return the names of the active LoRAs, each once."""
    names: dict[str, None] = {}
    for model in models.values():
        for layer in peft_layers(model):
            names.update(dict.fromkeys(layer.active_adapters))
    return list(names)


def rescale(
    models: Mapping[str, nn.Module], scales: Mapping[str, float], others: Sequence[str]
) -> None:
    """Set the scales of LoRAs, and activate them in addition to others.

    A LoRA of scale 0 is inactive, so that the base computes exactly what it did before.

    Args:
        models: The models that hold them.
        scales: Scales by name of the LoRA.
        others: LoRAs that stay active.
    """
    active = list(others)
    for name, scale in scales.items():
        if scale != 0 and name not in active:
            active.append(name)
    for model in models.values():
        for layer in peft_layers(model):
            for name, scale in scales.items():
                layer.set_scale(name, scale)
            layer.set_adapter(active, inference_mode=True)


def weights_of(model: Any, name: str) -> dict[str, Tensor]:
    """Return the weights of a named LoRA in a model, by peft's keys."""
    from peft import get_peft_model_state_dict

    found: dict[str, Tensor] = get_peft_model_state_dict(
        model, adapter_name=name, save_embedding_layers=False
    )
    return found


def inject(
    prefix: str,
    model: Any,
    state: dict[str, Tensor],
    alphas: Any,
    config: dict[str, Any] | None,
    name: str,
) -> None:
    """Add LoRA layers to one model, and load their weights.

    Args:
        prefix: The model's folder, with which its keys begin.
        model: The network or text encoder.
        state: The weights by diffusers' keys.
        alphas: Alphas by layer, where the file has them.
        config: The configuration of the adapter, where the file states it.
        name: The LoRA's name.
    """
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    options = {
        "prefix": prefix,
        "adapter_name": name,
        "network_alphas": alphas or None,
        "metadata": config,
    }
    if prefix.startswith("text"):
        load = StableDiffusionLoraLoaderMixin.load_lora_into_text_encoder
        load(state, text_encoder=model, **options)
    elif hasattr(model, "load_lora_adapter"):
        model.load_lora_adapter(state, **options)
    else:
        inject_by_config(prefix, model, state, config, name)


def inject_by_config(
    prefix: str, model: Any, state: dict[str, Tensor], config: dict[str, Any] | None, name: str
) -> None:
    """Add LoRA layers to a model that diffusers loads no LoRA into (UNet2DModel, DiT).

    This library writes its files, and they state their configuration.

    Args:
        prefix: The model's folder, with which its keys begin.
        model: The network.
        state: The weights.
        config: The configuration of the adapter.
        name: The LoRA's name.

    Raises:
        ValueError: If the file does not state its configuration.
    """
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    if config is None:
        raise ValueError("it does not state its rank and alpha (lora_adapter_metadata)")
    start = f"{prefix}."
    own = {key.removeprefix(start): value for key, value in state.items()}
    settings = {}
    for key, value in config.items():
        if key.startswith(start):
            settings[key.removeprefix(start)] = value
    inject_adapter_in_model(LoraConfig(**settings), model, name, state_dict=own)
    set_peft_model_state_dict(model, own, name)


@contextlib.contextmanager
def fitting(
    source: Path | str, prefix: str, model: Any, state: Mapping[str, Tensor], name: str
) -> Iterator[None]:
    """Refuse a file whose tensors are not exactly those of the LoRA that the model then has.

    Args:
        source: The file, for messages.
        prefix: The model's folder, with which its keys begin.
        model: The network or text encoder.
        state: The file's tensors for it.
        name: The LoRA's name.

    Raises:
        InputError: If a tensor has no place, has a different shape, or is missing.
    """
    try:
        given = in_peft_keys(prefix, model, state)
        refuse_misshapen(model, given)
        yield
        problem = misplaced(set(given), set(weights_of(model, name)))
    except (ValueError, RuntimeError, KeyError) as error:
        reason = shorten(str(error), 300).rstrip(".")
        problem = f"{reason}. It was made for another model."
    if problem:
        raise InputError(
            f"lora: {str(source)!r} does not fit this {type(model).__name__}: {problem}"
        )


def in_peft_keys(prefix: str, model: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a file's tensors by the names that they have once diffusers has loaded them.

    Args:
        prefix: The model's folder, with which its keys begin.
        model: The network or text encoder.
        state: The file's tensors for it.
    """
    from diffusers.utils import (
        convert_state_dict_to_diffusers,
        convert_state_dict_to_peft,
        convert_unet_state_dict_to_peft,
    )

    own: dict[str, Tensor] = {key.removeprefix(f"{prefix}."): value for key, value in state.items()}
    if not prefix.startswith("text"):
        is_peft = "lora_A" in next(iter(own))
        return own if is_peft else dict(convert_unet_state_dict_to_peft(own))
    own = convert_state_dict_to_peft(convert_state_dict_to_diffusers(own))
    if hasattr(model, "text_model"):
        return own
    return {key.removeprefix("text_model."): value for key, value in own.items()}


def refuse_misshapen(model: nn.Module, given: Mapping[str, Tensor]) -> None:
    """Refuse an A [rank, in, ...] or B [out, rank, ...] of another size than its layer's weight.

    Args:
        model: The network or text encoder.
        given: The tensors by peft's keys.

    Raises:
        ValueError: With both shapes.
    """
    layers = dict(model.named_modules())
    for key, value in given.items():
        name, _, part = key.partition(".lora_")
        layer = layers.get(name)
        base = getattr(layer, "base_layer", layer)
        weight = getattr(base, "weight", None)
        if weight is None or part not in ("A.weight", "B.weight"):
            continue
        sides = slice(1, None) if part == "A.weight" else slice(1)
        if value.shape[sides] != weight.shape[sides]:
            raise ValueError(
                f"{key} is {list(value.shape)}, but the layer's weight in the model is "
                f"{list(weight.shape)}"
            )


def misplaced(given: set[str], placed: set[str]) -> str:
    """Describe how a file's tensors differ by name from those of the LoRA in the model.

    Args:
        given: Keys of the file.
        placed: Keys of the LoRA in the model.

    Returns:
        A sentence; "" if they are the same.
    """
    strangers = sorted(given - placed)
    if strangers:
        return (
            f"{len(given) - len(strangers)} of its {len(given)} tensors have a place there, "
            f"{strangers[0]} has none. It was made for another model."
        )
    lacking = sorted(placed - given)
    if lacking:
        return (
            f"it lacks {len(lacking)} tensor(s), such as {lacking[0]}, which would stay at random "
            "values. Use a complete file."
        )
    return ""
