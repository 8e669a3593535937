"""LoRA files: written for diffusers and for kohya's scripts and ComfyUI, loaded, scaled, merged.

What `save_lora` writes, `pipe.load_lora_weights` of diffusers loads, with its scale, through the adapter metadata in the header.
"""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn

from difftrain.adapters import NAME, folder_of, lora_layers
from difftrain.denoisers import DiffusersDenoiser
from difftrain.lora.keys import Factors, kohya_metadata, kohya_state
from difftrain.lora.models import active_in, fitting, inject, models_of, peft_layers, rescale, weights_of, with_lora
from difftrain.pipelines.files import keys_of, looks_local, readable_errors
from difftrain.registry import InputError
from difftrain.storage import write_beside

FILE = "pytorch_lora_weights.safetensors"
CONFIG = ("r", "lora_alpha", "target_modules", "exclude_modules", "use_dora", "use_rslora")  # older peft refuses keys that it lacks
OTHERS = {".hada_": "LoHa", ".lokr_": "LoKr", ".oft_": "OFT", ".boft_": "BOFT", ".on_input": "(IA)3"}  # by a part of their keys


def save_lora(denoiser: DiffusersDenoiser, folder: Path, metadata: Mapping[str, str]) -> Path:
    """The trained LoRA or DoRA of the denoiser and its text encoders as diffusers' file in `folder`; metadata goes into its header."""
    state: dict[str, Tensor] = {}
    config: dict[str, Any] = {}
    for prefix, model in with_lora(denoiser).items():
        state |= {f"{prefix}.{file_key(model, prefix, key)}": value for key, value in weights_of(model, NAME).items()}
        given = model.peft_config[NAME].to_dict()
        config |= {f"{prefix}.{key}": plain(given[key]) for key in CONFIG if given[key] is not None}
    header = {**metadata, "lora_adapter_metadata": json.dumps(config, sort_keys=True)}
    return write(state, folder / FILE, header)


def save_kohya(denoiser: DiffusersDenoiser, file: Path, metadata: Mapping[str, str]) -> Path:
    """The trained LoRA under the names of kohya's scripts and ComfyUI; InputError for DoRA and for models unknown there.

    DoRA is refused because its readers differ: ComfyUI divides by the norm of W, or takes norms per input, where peft divides by that
    of W + B A per output, and diffusers drops the magnitudes.
    """
    models = with_lora(denoiser)
    config = next(iter(models.values())).peft_config[NAME]
    if config.use_dora:
        raise InputError("a kohya file of a DoRA: its readers apply the magnitudes in different ways, or drop them; "
                         "use the diffusers file in lora/, or merge it into the model.")
    layers = {prefix: {module_key(model, prefix, name): factors_of(layer) for name, layer in lora_layers(model).items()}
              for prefix, model in models.items()}
    scale = next(iter(layers[folder_of(denoiser)].values())).scale
    known = kohya_metadata(denoiser.model, config.r, scale * config.r)
    return write(kohya_state(denoiser.model, layers), file, {**metadata, **known})


def load_lora(
    denoiser: DiffusersDenoiser, source: Path | str, scale: float = 1.0, name: str = NAME, encoders: Mapping[str, nn.Module] | None = None
) -> None:
    """Add a LoRA, in diffusers' or kohya's keys, frozen and at this scale, to those that are active.

    source: a file, a folder that holds one, a run's folder, or a hub id. encoders: text encoders by their folder's name, where the
    denoiser does not bring them. Several add up; at scale 0 a LoRA takes no part at all. Between 0 and 1 a DoRA scales what is within
    its norm. InputError for a file of another model, an incomplete one, or one with values that are not finite.
    """
    models = models_of(denoiser, encoders)
    if any(lora_layers(model, name) for model in models.values()):
        raise InputError(f"lora: the name {name!r} is taken; give each LoRA a name of its own.")
    state, alphas, config = read(denoiser, source)
    strangers = [key for key in state if key.split(".")[0] not in models]
    if strangers or not state:
        found = strangers[0] if strangers else "no LoRA"
        raise InputError(f"lora: {str(source)!r} holds {found}, but this {type(denoiser.model).__name__} "
                         f"comes with {', '.join(models)} alone; the LoRA is of another kind of model, or text encoders are missing here.")
    refuse_nonfinite(source, {**state, **(alphas or {})})
    trained = {id(p) for model in models.values() for p in model.parameters() if p.requires_grad}
    active = active_in(models)
    for prefix, model in models.items():
        part = {key: value for key, value in state.items() if key.startswith(f"{prefix}.")}
        if part:
            with fitting(source, prefix, model, part, name):
                inject(prefix, model, part, alphas, config, name)
    rescale(models, {name: scale}, active)
    for parameter in (p for model in models.values() for p in model.parameters()):
        parameter.requires_grad_(id(parameter) in trained)


def set_scales(denoiser: DiffusersDenoiser, scales: Mapping[str, float], encoders: Mapping[str, nn.Module] | None = None) -> None:
    """Let the named LoRAs act, each at its scale, and no others."""
    rescale(models_of(denoiser, encoders), scales, [])


def merge(denoiser: DiffusersDenoiser, encoders: Mapping[str, nn.Module] | None = None) -> None:
    """Fold the active LoRAs into the weights, in their own precision, and remove all LoRA layers."""
    from diffusers.utils import recurse_remove_peft_layers

    for model in models_of(denoiser, encoders).values():
        layers = peft_layers(model)
        for layer in layers:
            layer.merge()
        if layers:
            recurse_remove_peft_layers(model)
            del model.peft_config
            model._hf_peft_config_loaded = False


# Writing


def factors_of(layer: Any) -> Factors:
    """The layer's LoRA at scale 1, however it is scaled at the moment."""
    rank = layer.r[NAME]
    scale = layer.lora_alpha[NAME] / (math.sqrt(rank) if layer.use_rslora[NAME] else rank)
    return Factors(layer.lora_A[NAME].weight.detach(), layer.lora_B[NAME].weight.detach(), scale)


def module_key(model: nn.Module, prefix: str, name: str) -> str:
    """A layer's name in files: a CLIPTextModel had its layers in a text_model, and other programs and older versions look there."""
    return f"text_model.{name}" if prefix.startswith("text") and not hasattr(model, "text_model") else name


def file_key(model: nn.Module, prefix: str, key: str) -> str:
    """A peft key as diffusers' files have it, where text encoders say lora_linear_layer.down and .up for lora_A and lora_B."""
    if not prefix.startswith("text"):
        return key
    return module_key(model, prefix, key).replace(".lora_A.", ".lora_linear_layer.down.").replace(".lora_B.", ".lora_linear_layer.up.")


def plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, list)) else value


def write(state: dict[str, Tensor], file: Path, header: Mapping[str, str]) -> Path:
    """Write the file, whole or not at all."""
    from safetensors.torch import save_file

    with write_beside(file) as beside:
        save_file({key: value.detach().cpu().contiguous() for key, value in state.items()}, beside, {"format": "pt", **header})
    return file


# Reading


def read(denoiser: DiffusersDenoiser, source: Path | str) -> tuple[dict[str, Tensor], dict[str, Any] | None, dict[str, Any] | None]:
    """Weights by diffusers' keys; alphas by layer, where the file has such; the adapter's configuration, where it states that."""
    from diffusers import loaders

    path = located(str(source))
    refuse_unreadable(path)
    kind = type(denoiser.model).__name__
    with readable_errors(path, "lora"), converting(path):
        if kind == "FluxTransformer2DModel":
            return loaders.FluxLoraLoaderMixin.lora_state_dict(path, return_alphas=True, return_lora_metadata=True)
        if folder_of(denoiser) == "transformer":
            state, config = loaders.SD3LoraLoaderMixin.lora_state_dict(path, return_lora_metadata=True)
            return state, None, config
        return loaders.StableDiffusionLoraLoaderMixin.lora_state_dict(path, unet_config=denoiser.model.config, return_lora_metadata=True)


def located(path: str) -> str:
    """The file that a local path means, which is that file, a folder that holds it, or a run's folder; a hub id as it is."""
    if not looks_local(path):
        return path
    local = Path(path).expanduser()
    named = [file for file in (local, local / FILE, local / "lora" / FILE) if file.is_file()]
    files = named[:1] or sorted(local.glob("*.safetensors"))
    if not files:
        raise InputError(f"lora: there is no LoRA file at {path!r}; write the path of a .safetensors file, the folder of one, the folder "
                         "of a run that trained one, or a hub id.")
    if len(files) > 1:
        raise InputError(f"lora: {path!r} holds {len(files)} .safetensors files; write the path of one, such as {str(files[0])!r}.")
    return str(files[0])


def refuse_unreadable(path: str) -> None:
    """InputError for a local file that holds what is not read here, or what diffusers would drop in silence."""
    from safetensors import SafetensorError

    if not looks_local(path):
        return
    try:
        keys = keys_of(Path(path))
    except SafetensorError as error:
        raise InputError(f"lora: {path!r} is no safetensors file ({error}).") from error
    if any("dora_scale" in key for key in keys):
        raise InputError(f"lora: {path!r} is a DoRA in kohya's keys, whose magnitudes (dora_scale) diffusers does not read; "
                         "use a DoRA in diffusers' keys.")
    for key, kind in ((key, kind) for key in keys for part, kind in OTHERS.items() if part in key):
        raise InputError(f"lora: {path!r} is a {kind} (it holds {key}), and only LoRA and DoRA are read. "
                         "Fold it into its model with the program that made it, and use that model.")


@contextlib.contextmanager
def converting(path: str) -> Iterator[None]:
    """What diffusers raises over keys that it cannot convert, as an InputError of one line."""
    try:
        yield
    except AssertionError as error:
        raise InputError(f"lora: diffusers cannot convert the keys of {path!r}: in kohya's it knows the widths of FLUX.1 alone. "
                         "Use the file in diffusers' keys, which runs leave in lora/.") from error
    except (KeyError, ValueError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else shorten(str(error), 300)
        raise InputError(f"lora: nothing can be loaded from {path!r}: {reason}") from error


def refuse_nonfinite(source: Path | str, values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if not torch.as_tensor(value).isfinite().all():
            raise InputError(f"lora: {str(source)!r} holds values that are not finite, first in {key}. Use another file.")
