"""Single-file checkpoints in the keys of the original code, written from tiny pipelines.

Known are SD 1.x and SDXL. (What diffusers reads of SD 3 asks for an identity as CLIP's projection,
and of Flux for the real width.)
"""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

State = dict[str, Tensor]

RESNET = [
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
]
UNET_ENDS = [
    ("time_embedding.linear_1", "time_embed.0"),
    ("time_embedding.linear_2", "time_embed.2"),
    ("add_embedding.linear_1", "label_emb.0.0"),
    ("add_embedding.linear_2", "label_emb.0.2"),
    ("conv_in", "input_blocks.0.0"),
    ("conv_norm_out", "out.0"),
    ("conv_out", "out.2"),
]
OPEN_CLIP = [
    ("encoder.layers.", "transformer.resblocks."),
    ("self_attn", "attn"),
    ("layer_norm1", "ln_1"),
    ("layer_norm2", "ln_2"),
    ("fc1", "c_fc"),
    ("fc2", "c_proj"),
    ("final_layer_norm", "ln_final"),
    ("embeddings.token_embedding", "token_embedding"),
    ("embeddings.position_embedding.weight", "positional_embedding"),
    ("text_projection.weight", "text_projection"),
]


def write_single_file(folder: Path, file: Path) -> None:
    """The weights of a stable_diffusion or stable_diffusion_xl pipeline's folder in one file."""
    states = {
        "model.diffusion_model.": unet(folder / "unet"),
        "first_stage_model.": vae(folder / "vae"),
    }
    if (folder / "text_encoder_2").is_dir():
        states |= {
            "conditioner.embedders.0.transformer.": clip(folder / "text_encoder"),
            "conditioner.embedders.1.model.": open_clip(folder / "text_encoder_2"),
        }
    else:
        states["cond_stage_model.transformer."] = clip(folder / "text_encoder")
    save_file(
        {
            prefix + key: value.contiguous()
            for prefix, state in states.items()
            for key, value in state.items()
        },
        file,
    )


def weights(folder: Path) -> State:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def renamed(key: str, pairs: list[tuple[str, str]]) -> str:
    for ours, theirs in pairs:
        key = key.replace(ours, theirs)
    return key


# UNet: input_blocks and output_blocks count all blocks; a resampling layer ends its level


def unet(folder: Path) -> State:
    layers = json.loads((folder / "config.json").read_text())["layers_per_block"]
    state = weights(folder)
    return {unet_key(key, layers, set(state)): value for key, value in state.items()}


def unet_key(key: str, layers: int, known: set[str]) -> str:
    if match := re.match(
        r"down_blocks\.(\d+)\.(resnets|attentions|downsamplers)\.(\d+)\.(.*)", key
    ):
        level, kind, place, rest = int(match[1]), match[2], int(match[3]), match[4]
        number = 1 + level * (layers + 1) + (layers if kind == "downsamplers" else place)
        inner = {
            "resnets": f"0.{renamed(rest, RESNET)}",
            "attentions": f"1.{rest}",
            "downsamplers": f"0.{rest.replace('conv', 'op')}",
        }
        return f"input_blocks.{number}.{inner[kind]}"
    if match := re.match(r"up_blocks\.(\d+)\.(resnets|attentions|upsamplers)\.(\d+)\.(.*)", key):
        level, kind, place, rest = int(match[1]), match[2], int(match[3]), match[4]
        number = level * (layers + 1) + (layers if kind == "upsamplers" else place)
        attends = any(other.startswith(f"up_blocks.{level}.attentions.") for other in known)
        inner = {
            "resnets": f"0.{renamed(rest, RESNET)}",
            "attentions": f"1.{rest}",
            "upsamplers": f"{2 if attends else 1}.{rest}",
        }
        return f"output_blocks.{number}.{inner[kind]}"
    if match := re.match(r"mid_block\.(resnets|attentions)\.(\d+)\.(.*)", key):
        is_resnet = match[1] == "resnets"
        if is_resnet:
            return f"middle_block.{2 * int(match[2])}.{renamed(match[3], RESNET)}"
        return f"middle_block.1.{match[3]}"
    return next(
        key.replace(ours, theirs, 1) for ours, theirs in UNET_ENDS if key.startswith(f"{ours}.")
    )


# VAE: the decoder's levels count from the finest; attention's linear layers are 1x1 convolutions


def vae(folder: Path) -> State:
    levels = len(json.loads((folder / "config.json").read_text())["block_out_channels"])
    state = {vae_key(key, levels): value for key, value in weights(folder).items()}
    return {
        key: value[:, :, None, None] if "attn_1" in key and value.ndim == 2 else value
        for key, value in state.items()
    }


def vae_key(key: str, levels: int) -> str:
    key = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", key)
    key = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", key)
    key = re.sub(
        r"up_blocks\.(\d+)\.resnets", lambda match: f"up.{levels - 1 - int(match[1])}.block", key
    )
    key = re.sub(
        r"up_blocks\.(\d+)\.upsamplers\.0",
        lambda match: f"up.{levels - 1 - int(match[1])}.upsample",
        key,
    )
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", key)
    attention = [
        ("mid_block.attentions.0", "mid.attn_1"),
        ("group_norm", "norm"),
        ("to_q", "q"),
        ("to_k", "k"),
        ("to_v", "v"),
    ]
    return renamed(
        key,
        [
            *attention,
            ("to_out.0", "proj_out"),
            ("conv_norm_out", "norm_out"),
            ("conv_shortcut", "nin_shortcut"),
        ],
    )


# Text


def clip(folder: Path) -> State:
    return {
        f"text_model.{key.removeprefix('text_model.')}": value
        for key, value in weights(folder).items()
    }


def open_clip(folder: Path) -> State:
    """OpenCLIP's names: q, k and v in one matrix, and the projection transposed."""
    state: State = {}
    for key, value in weights(folder).items():
        name = renamed(key.removeprefix("text_model."), OPEN_CLIP)
        if match := re.match(r"(.*attn)\.[qkv]_proj\.(weight|bias)", name):
            parts = [
                weights(folder)[re.sub(r"[qkv]_proj", f"{letter}_proj", key)] for letter in "qkv"
            ]
            state[f"{match[1]}.in_proj_{match[2]}"] = torch.cat(parts)
        else:
            state[name] = value.T if name == "text_projection" else value
    return state
