"""LoRA layers in a denoiser and its text encoders: where they are, which act and how strongly, and adding those of a file."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any

from torch import Tensor, nn

from difftrain.adapters import folder_of, lora_layers
from difftrain.denoisers import DiffusersDenoiser
from difftrain.registry import InputError


def models_of(denoiser: DiffusersDenoiser, encoders: Mapping[str, nn.Module] | None = None) -> dict[str, Any]:
    """The denoiser's model and the text encoders by their folder in a pipeline, which is the prefix of their keys."""
    text = getattr(denoiser, "text", None)
    return {folder_of(denoiser): denoiser.model, **(dict(text.encoders.items()) if text is not None else {}), **(encoders or {})}


def with_lora(denoiser: DiffusersDenoiser) -> dict[str, Any]:
    """Those of them that hold the trained LoRA."""
    found = {prefix: model for prefix, model in models_of(denoiser).items() if lora_layers(model)}
    assert found, "no LoRA was added to this denoiser"
    return found


def peft_layers(model: nn.Module) -> list[Any]:
    from peft.tuners.lora import LoraLayer

    return [layer for layer in model.modules() if isinstance(layer, LoraLayer)]


def active_in(models: Mapping[str, nn.Module]) -> list[str]:
    return list(dict.fromkeys(name for model in models.values() for layer in peft_layers(model) for name in layer.active_adapters))


def rescale(models: Mapping[str, nn.Module], scales: Mapping[str, float], others: list[str]) -> None:
    """Set these scales and let them act beside the others; one of scale 0 is left out, so that not a bit of the base changes."""
    active = [*others, *(name for name, scale in scales.items() if scale != 0 and name not in others)]
    for layer in (layer for model in models.values() for layer in peft_layers(model)):
        for name, scale in scales.items():
            layer.set_scale(name, scale)
        layer.set_adapter(active, inference_mode=True)


def weights_of(model: Any, name: str) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)


def inject(prefix: str, model: Any, state: dict[str, Tensor], alphas: Any, config: dict[str, Any] | None, name: str) -> None:
    """Add the layers of one model, and fill them."""
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    given = {"prefix": prefix, "adapter_name": name, "network_alphas": alphas or None, "metadata": config}
    if prefix.startswith("text"):
        StableDiffusionLoraLoaderMixin.load_lora_into_text_encoder(state, text_encoder=model, **given)
    elif hasattr(model, "load_lora_adapter"):
        model.load_lora_adapter(state, **given)
    else:
        inject_ours(prefix, model, state, config, name)


def inject_ours(prefix: str, model: Any, state: dict[str, Tensor], config: dict[str, Any] | None, name: str) -> None:
    """For models that diffusers loads no LoRA into (UNet2DModel, DiT), whose files come from here and state their configuration."""
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    if config is None:
        raise ValueError("it does not state its rank and alpha (lora_adapter_metadata)")
    own = {key.removeprefix(f"{prefix}."): value for key, value in state.items()}
    settings = {key.removeprefix(f"{prefix}."): value for key, value in config.items() if key.startswith(f"{prefix}.")}
    inject_adapter_in_model(LoraConfig(**settings), model, name, state_dict=own)
    set_peft_model_state_dict(model, own, name)


@contextlib.contextmanager
def fitting(source: Path | str, prefix: str, model: Any, state: Mapping[str, Tensor], name: str) -> Iterator[None]:
    """Refuse a file whose tensors are not those of the LoRA that the model has afterwards: each has a place, and none is lacking."""
    try:
        given = in_peft_keys(prefix, model, state)
        refuse_misshapen(model, given)
        yield
        problem = misplaced(set(given), set(weights_of(model, name)))
    except (ValueError, RuntimeError, KeyError) as error:
        problem = f"{shorten(str(error), 300).rstrip('.')}. It was made for another model."
    if problem:
        raise InputError(f"lora: {str(source)!r} does not fit this {type(model).__name__}: {problem}")


def in_peft_keys(prefix: str, model: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The file's tensors by the names that they get when diffusers loads them into the model."""
    from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_peft, convert_unet_state_dict_to_peft

    own = {key.removeprefix(f"{prefix}."): value for key, value in state.items()}
    if not prefix.startswith("text"):
        return own if "lora_A" in next(iter(own)) else convert_unet_state_dict_to_peft(own)
    own = convert_state_dict_to_peft(convert_state_dict_to_diffusers(own))
    return own if hasattr(model, "text_model") else {key.removeprefix("text_model."): value for key, value in own.items()}


def refuse_misshapen(model: nn.Module, given: Mapping[str, Tensor]) -> None:
    """ValueError for an A [rank, in, ...] or B [out, rank, ...] that does not go with its layer's weight [out, in, ...]."""
    layers = dict(model.named_modules())
    for key, value in given.items():
        layer, _, part = key.partition(".lora_")
        weight = getattr(getattr(layers.get(layer), "base_layer", layers.get(layer)), "weight", None)
        if weight is None or part not in ("A.weight", "B.weight"):
            continue
        sides = slice(1, None) if part == "A.weight" else slice(1)
        if value.shape[sides] != weight.shape[sides]:
            raise ValueError(f"{key} is {list(value.shape)}, but the layer's weight in the model is {list(weight.shape)}")


def misplaced(given: set[str], placed: set[str]) -> str:
    """What tells the file's tensors from those of the LoRA in the model, by their names; "" where they are the same."""
    if strangers := sorted(given - placed):
        return (f"{len(given) - len(strangers)} of its {len(given)} tensors have a place there, {strangers[0]} has none. "
                "It was made for another model.")
    if lacking := sorted(placed - given):
        return f"it lacks {len(lacking)} tensor(s), such as {lacking[0]}, which would stay at random values. Use a complete file."
    return ""
