"""LoRA files: written for diffusers and for kohya's scripts and ComfyUI, loaded, scaled, merged.

`pipe.load_lora_weights` of diffusers loads what `save_lora` writes, with its scale, through the
adapter metadata in the header.
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

from difftrain.core.errors import InputError
from difftrain.core.files import write_beside
from difftrain.models.adapters import NAME, lora_layers, mark_adapted
from difftrain.models.files import keys_of, looks_local, readable_errors
from difftrain.models.lora.formats import LoraFile
from difftrain.models.lora.kohya import Factors
from difftrain.models.lora.layers import (
    active_in,
    all_parts,
    fitting,
    inject,
    peft_layers,
    rescale,
    trained_parts,
    weights_of,
)
from difftrain.models.model import DenoiserNetwork

FILE = "pytorch_lora_weights.safetensors"
# Of peft's configuration; an older peft rejects keys that it does not know.
CONFIG = ("r", "lora_alpha", "target_modules", "exclude_modules", "use_dora", "use_rslora")
# Adapters of other kinds by a part of their keys.
OTHERS = {
    ".hada_": "LoHa",
    ".lokr_": "LoKr",
    ".oft_": "OFT",
    ".boft_": "BOFT",
    ".on_input": "(IA)3",
}


def save_lora(denoiser: DenoiserNetwork, folder: Path, metadata: Mapping[str, str]) -> Path:
    """Write the trained LoRA or DoRA of the denoiser and its text encoders as diffusers' file.

    Args:
        denoiser: The trained network.
        folder: Where the file is written.
        metadata: Goes into the file's header.

    Returns:
        The file.
    """
    state: dict[str, Tensor] = {}
    config: dict[str, Any] = {}
    for prefix, model in trained_parts(denoiser).items():
        for key, value in weights_of(model, NAME).items():
            state[f"{prefix}.{file_key(model, prefix, key)}"] = value
        given = model.peft_config[NAME].to_dict()
        for key in CONFIG:
            if given[key] is not None:
                config[f"{prefix}.{key}"] = plain(given[key])
    header = {**metadata, "lora_adapter_metadata": json.dumps(config, sort_keys=True)}
    return write(state, folder / FILE, header)


def save_kohya(denoiser: DenoiserNetwork, file: Path, metadata: Mapping[str, str]) -> Path:
    """Write the trained LoRA under the names of kohya's scripts and ComfyUI.

    DoRA is refused because its readers differ: ComfyUI divides by the norm of W, or takes norms per
    input, where peft divides by the norm of W + B A per output, and diffusers drops the magnitudes.

    Args:
        denoiser: The trained network.
        file: Where to write.
        metadata: Goes into the file's header.

    Returns:
        The file.

    Raises:
        InputError: If it is a DoRA, or these programs have no names for the layers.
    """
    models = trained_parts(denoiser)
    config = next(iter(models.values())).peft_config[NAME]
    if config.use_dora:
        raise InputError(
            "programs that read kohya's keys apply the magnitudes of a DoRA in different ways, or "
            "drop them. Use the diffusers file in lora/, or merge it into the model."
        )
    layers = {}
    for prefix, model in models.items():
        layers[prefix] = {
            module_key(model, prefix, name): factors_of(layer)
            for name, layer in lora_layers(model).items()
        }
    scale = next(iter(layers[denoiser.folder].values())).scale
    known = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(config.r),
        "ss_network_alpha": f"{scale * config.r:g}",
        **denoiser.lora_format.kohya_metadata(denoiser.model),
    }
    state = denoiser.lora_format.kohya_state(denoiser.model, layers)
    return write(state, file, {**metadata, **known})


def load_lora(
    denoiser: DenoiserNetwork,
    source: Path | str,
    scale: float = 1.0,
    name: str = NAME,
    encoders: Mapping[str, nn.Module] | None = None,
) -> None:
    """Add a frozen LoRA, in diffusers' or kohya's keys, to those that are active.

    Several add up; at scale 0 a LoRA is inactive. Between 0 and 1 the scale of a DoRA acts inside
    its norm.

    Args:
        denoiser: The network.
        source: A file, a folder that holds one, a run's folder, or a hub id.
        scale: Multiplies the LoRA's change of the weights.
        name: The LoRA's name in the network.
        encoders: Text encoders by folder, where they are not the denoiser's own.

    Raises:
        InputError: If the file is made for another model, incomplete, or holds values that are not
            finite.
    """
    models = all_parts(denoiser, encoders)
    if any(lora_layers(model, name) for model in models.values()):
        raise InputError(f"lora: the name {name!r} is taken. Give each LoRA a name of its own.")

    # Read the file and refuse what does not belong here.
    state, alphas, config = read(denoiser, source)
    strangers = [key for key in state if key.split(".")[0] not in models]
    if not state:
        raise InputError(
            f"lora: {str(source)!r} holds no LoRA weights. Write the path of a LoRA file."
        )
    if strangers:
        raise InputError(
            f"lora: {str(source)!r} holds {strangers[0]}, but this "
            f"{type(denoiser.model).__name__} comes with {', '.join(models)} alone. Use a LoRA of "
            "this kind of model, or give its text encoders."
        )
    refuse_nonfinite(source, {**state, **(alphas or {})})

    # Add the layers; peft changes what is active and what trains, which is set again.
    trained: set[int] = set()
    for model in models.values():
        trained.update(id(p) for p in model.parameters() if p.requires_grad)
    active = active_in(models)
    for prefix, model in models.items():
        part = {key: value for key, value in state.items() if key.startswith(f"{prefix}.")}
        if part:
            with fitting(source, prefix, model, part, name):
                inject(prefix, model, part, alphas, config, name)
    rescale(models, {name: scale}, active)
    for model in models.values():
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in trained)


def set_scales(
    denoiser: DenoiserNetwork,
    scales: Mapping[str, float],
    encoders: Mapping[str, nn.Module] | None = None,
) -> None:
    """Activate the named LoRAs, each at its scale, and no others.

    Args:
        denoiser: The network.
        scales: Scales by name of the LoRA.
        encoders: Text encoders by folder, where they are not the denoiser's own.
    """
    rescale(all_parts(denoiser, encoders), scales, [])


def merge(denoiser: DenoiserNetwork, encoders: Mapping[str, nn.Module] | None = None) -> None:
    """Fold the active LoRAs into the weights, in their precision, and remove all LoRA layers.

    Args:
        denoiser: The network.
        encoders: Text encoders by folder, where they are not the denoiser's own.
    """
    from diffusers.utils import recurse_remove_peft_layers

    for model in all_parts(denoiser, encoders).values():
        layers = peft_layers(model)
        for layer in layers:
            layer.merge()
        if layers:
            recurse_remove_peft_layers(model)
            del model.peft_config
            mark_adapted(model, False)


# Writing


def factors_of(layer: Any) -> Factors:
    """Return a layer's LoRA at scale 1, whatever scale is set at the moment."""
    rank = layer.r[NAME]
    divisor = math.sqrt(rank) if layer.use_rslora[NAME] else rank
    scale = layer.lora_alpha[NAME] / divisor
    return Factors(layer.lora_A[NAME].weight.detach(), layer.lora_B[NAME].weight.detach(), scale)


def module_key(model: nn.Module, prefix: str, name: str) -> str:
    """Return a layer's name in files.

    Older versions of CLIPTextModel had their layers in a text_model, and other programs look there.
    """
    is_flat_text = prefix.startswith("text") and not hasattr(model, "text_model")
    return f"text_model.{name}" if is_flat_text else name


def file_key(model: nn.Module, prefix: str, key: str) -> str:
    """Return a peft key as diffusers' files have it.

    Those of text encoders say lora_linear_layer.down and .up for lora_A and lora_B.
    """
    if not prefix.startswith("text"):
        return key
    name = module_key(model, prefix, key)
    name = name.replace(".lora_A.", ".lora_linear_layer.down.")
    return name.replace(".lora_B.", ".lora_linear_layer.up.")


def plain(value: Any) -> Any:
    """Return a setting of peft as JSON knows it; sets and lists become sorted lists."""
    return sorted(value) if isinstance(value, (set, list)) else value


def write(state: Mapping[str, Tensor], file: Path, header: Mapping[str, str]) -> Path:
    """Write a safetensors file, whole or not at all.

    Args:
        state: The tensors.
        file: Where to write.
        header: The file's metadata.

    Returns:
        The file.
    """
    from safetensors.torch import save_file

    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    with write_beside(file) as beside:
        save_file(tensors, beside, {"format": "pt", **header})
    return file


# Reading


def read(denoiser: DenoiserNetwork, source: Path | str) -> LoraFile:
    """Read a LoRA file for a network.

    Args:
        denoiser: The network.
        source: A file, a folder that holds one, a run's folder, or a hub id.

    Raises:
        InputError: If there is no such file, or it cannot be read as a LoRA.
    """
    path = located(str(source))
    refuse_unreadable(path)
    with readable_errors(path, "lora"), converting(path):
        return denoiser.lora_format.read(denoiser.model, path)


def located(path: str) -> str:
    """Return the file that a path means; a hub id unchanged.

    Args:
        path: A file, a folder that holds one, a run's folder, or a hub id.

    Raises:
        InputError: If there is no LoRA file, or more than one.
    """
    if not looks_local(path):
        return path
    local = Path(path).expanduser()
    for file in (local, local / FILE, local / "lora" / FILE):
        if file.is_file():
            return str(file)
    files = sorted(local.glob("*.safetensors"))
    if not files:
        raise InputError(
            f"lora: there is no LoRA file at {path!r}. Write the path of a .safetensors file, the "
            "folder of one, the folder of a run that trained one, or a hub id."
        )
    if len(files) > 1:
        raise InputError(
            f"lora: {path!r} holds {len(files)} .safetensors files. Write the path of one, such "
            f"as {str(files[0])!r}."
        )
    return str(files[0])


def refuse_unreadable(path: str) -> None:
    """Refuse a local file that is no LoRA, or that diffusers would read in part without a word.

    Args:
        path: A file, or a hub id, which passes.

    Raises:
        InputError: If the file is damaged, a LoHa or the like, or a DoRA in kohya's keys.
    """
    from safetensors import SafetensorError

    if not looks_local(path):
        return
    try:
        keys = keys_of(Path(path))
    except SafetensorError as error:
        raise InputError(f"lora: {path!r} is not a safetensors file ({error}).") from error
    if any("dora_scale" in key for key in keys):
        raise InputError(
            f"lora: {path!r} is a DoRA in kohya's keys, whose magnitudes (dora_scale) diffusers "
            "does not read. Use a DoRA in diffusers' keys."
        )
    for key in keys:
        for part, kind in OTHERS.items():
            if part in key:
                raise InputError(
                    f"lora: {path!r} is a {kind} (it holds {key}), and only LoRA and DoRA are "
                    "read. Fold it into its model with the program that made it, and use that "
                    "model."
                )


@contextlib.contextmanager
def converting(path: str) -> Iterator[None]:
    """Turn what diffusers raises over keys that it cannot convert into an InputError of one line.

    Args:
        path: What is read.

    Raises:
        InputError: In place of diffusers' error.
    """
    try:
        yield
    except InputError:
        raise
    except AssertionError as error:
        raise InputError(
            f"lora: diffusers cannot convert the keys of {path!r}: in kohya's it knows the widths "
            "of FLUX.1 alone. Use the file in diffusers' keys, which runs leave in lora/."
        ) from error
    except (KeyError, ValueError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else shorten(str(error), 300)
        raise InputError(f"lora: nothing can be loaded from {path!r}: {reason}") from error


def refuse_nonfinite(source: Path | str, values: Mapping[str, Any]) -> None:
    """Refuse a file with values that are not finite.

    Args:
        source: The file, for messages.
        values: Its tensors and alphas by key.

    Raises:
        InputError: With the first such key.
    """
    for key, value in values.items():
        if not torch.as_tensor(value).isfinite().all():
            raise InputError(
                f"lora: {str(source)!r} holds values that are not finite, first in {key}. Use "
                "another file."
            )
