"""A trained LoRA under the names that kohya's scripts and ComfyUI know.

Each layer is (down [rank, in], up [out, rank], scale) and is written as name.lora_down.weight, name.lora_up.weight and name.alpha,
which those programs read as up down alpha / rank. UNets of SD 1 and 2 keep diffusers' layer names, joined by underscores; SDXL has
the names of its first release (input_blocks ...). Flux is fused there: one layer for to_q, to_k, to_v (and proj_mlp) side by side.
SD 3 is read under diffusers' own names, which carry no alpha.
"""

import re
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from difftrain.registry import InputError


class Factors(NamedTuple):
    down: Tensor
    up: Tensor
    scale: float

    def scaled(self) -> "Factors":
        """The same product with the scale within `up`."""
        return Factors(self.down, self.up * self.scale, 1.0)


Layers = dict[str, Factors]

RESNET = {"conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
SDXL_OUTER = {
    "conv_in": "input_blocks.0.0", "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
}
FLUX_LAYERS: dict[str, dict[str, str]] = {
    r"transformer_blocks\.(\d+)\.": {
        "attn.to_out.0": "double_blocks.{}.img_attn.proj", "attn.to_add_out": "double_blocks.{}.txt_attn.proj",
        "ff.net.0.proj": "double_blocks.{}.img_mlp.0", "ff.net.2": "double_blocks.{}.img_mlp.2",
        "ff_context.net.0.proj": "double_blocks.{}.txt_mlp.0", "ff_context.net.2": "double_blocks.{}.txt_mlp.2",
        "norm1.linear": "double_blocks.{}.img_mod.lin", "norm1_context.linear": "double_blocks.{}.txt_mod.lin",
    },
    r"single_transformer_blocks\.(\d+)\.": {"proj_out": "single_blocks.{}.linear2", "norm.linear": "single_blocks.{}.modulation.lin"},
}
FLUX_FUSED: dict[str, dict[str, tuple[str, ...]]] = {
    r"transformer_blocks\.(\d+)\.": {
        "double_blocks.{}.img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "double_blocks.{}.txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    },
    r"single_transformer_blocks\.(\d+)\.": {"single_blocks.{}.linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")},
}
VERSIONS = {"sd1": ("sd_v1", "stable-diffusion-v1"), "sd2": ("sd_v2", "stable-diffusion-v2"),
            "sdxl": ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base")}  # kohya's name, and that of the model specification


def kohya_state(model: nn.Module, layers: dict[str, Layers]) -> dict[str, Tensor]:
    """The file's tensors, from the layers of the denoiser ("unet" or "transformer") and the text encoders, each by module name."""
    kind = kind_of(model)
    if kind == "sd3":
        scaled = {f"{part}.{name}": factors.scaled() for part, inner in layers.items() for name, factors in inner.items()}
        return {**{f"{name}.lora_A.weight": factors.down for name, factors in scaled.items()},
                **{f"{name}.lora_B.weight": factors.up for name, factors in scaled.items()}}
    state: dict[str, Tensor] = {}
    for part, inner in layers.items():
        named = inner if part.startswith("text") else renamed(model, kind, inner)
        for name, (down, up, scale) in named.items():
            key = f"{prefix(kind, part)}_{name.replace('.', '_')}"
            alpha = torch.tensor(scale * len(down), dtype=torch.float32)
            state |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": alpha}
    return state


def kohya_metadata(model: nn.Module, rank: int, alpha: float) -> dict[str, str]:
    """What kohya's scripts note about a network, as far as it is known here."""
    known = {"ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": f"{alpha:g}"}
    config: Any = model.config
    kind = kind_of(model)
    if kind == "sd":
        kind = {768: "sd1", 1024: "sd2"}.get(config.get("cross_attention_dim"), "")
    if kind in VERSIONS:
        version, architecture = VERSIONS[kind]
        known |= {"ss_base_model_version": version, "modelspec.architecture": f"{architecture}/lora"}
    return known


def kind_of(model: nn.Module) -> str:
    """sd, sdxl, flux or sd3; InputError for other models, which those programs have no names for."""
    name = type(model).__name__
    config: Any = model.config
    if name == "UNet2DConditionModel":
        return "sdxl" if config.get("addition_embed_type") == "text_time" else "sd"
    kinds = {"FluxTransformer2DModel": "flux", "SD3Transformer2DModel": "sd3"}
    if name not in kinds:
        raise InputError(f"a kohya file of a {name}: neither kohya's scripts nor ComfyUI have names for its layers; "
                         "use the diffusers file in lora/ instead.")
    return kinds[name]


def prefix(kind: str, part: str) -> str:
    if not part.startswith("text"):
        return "lora_unet"
    return "lora_te" if kind == "sd" else {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}[part]


def renamed(model: nn.Module, kind: str, layers: Layers) -> Layers:
    if kind == "flux":
        return flux_layers(model, layers)
    return {sdxl_name(model, name) if kind == "sdxl" else name: factors for name, factors in layers.items()}


def sdxl_name(model: nn.Module, name: str) -> str:
    """A layer of diffusers' UNet under the name of SDXL's first release: down_blocks.1.attentions.0.x is input_blocks.4.1.x."""
    if name in SDXL_OUTER:
        return SDXL_OUTER[name]
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", name):
        kind, j, inner = match.groups()
        return f"middle_block.{2 * int(j) + (kind == 'attentions')}.{RESNET.get(inner, inner)}"
    match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", name)
    assert match is not None, name
    side, i, kind, j, inner = match.groups()
    config: Any = model.config
    first, last = int(i) * (config["layers_per_block"] + 1), config["layers_per_block"]
    if kind == "downsamplers":
        return f"input_blocks.{first + last + 1}.0.op"
    if kind == "upsamplers":
        block = model.get_submodule(f"up_blocks.{i}")
        return f"output_blocks.{first + last}.{2 if hasattr(block, 'attentions') else 1}.{inner}"
    place = f"input_blocks.{first + int(j) + 1}" if side == "down" else f"output_blocks.{first + int(j)}"
    return f"{place}.{0 if kind == 'resnets' else 1}.{RESNET.get(inner, inner)}"


def flux_layers(model: nn.Module, layers: Layers) -> Layers:
    """Flux's layers, those that are one layer there side by side; InputError for a layer outside the blocks."""
    found: Layers = {}
    for name, factors in layers.items():
        block, kind, inner = flux_place(name)
        if inner in FLUX_LAYERS.get(kind, {}):
            found[FLUX_LAYERS[kind][inner].format(block)] = factors
            continue
        fused = next((target for target, parts in FLUX_FUSED.get(kind, {}).items() if inner in parts), None)
        if fused is None:
            raise InputError(f"a kohya file: the Flux layer {name} has no name that diffusers and ComfyUI both read; "
                             "use the diffusers file in lora/, or targets: attention_mlp.")
        names = [name.removesuffix(inner) + part for part in FLUX_FUSED[kind][fused]]
        found[fused.format(block)] = side_by_side(model, names, layers)
    return found


def flux_place(name: str) -> tuple[str, str, str]:
    """(block number, pattern of the block's kind, name within it)."""
    for kind in FLUX_LAYERS:
        if match := re.match(kind, name):
            return match[1], kind, name[match.end():]
    return "", "", name


def side_by_side(model: nn.Module, names: list[str], layers: Layers) -> Factors:
    """One LoRA of the layers' outputs side by side: the downs stacked, the ups block-diagonal, zero for a layer without one.

    Its rank is the sum of the ranks, and the scales are within the ups.
    """
    like = next(layers[name].down for name in names if name in layers)
    sizes = {name: len(model.get_parameter(f"{name}.weight")) for name in names}
    parts = [layers[name].scaled() if name in layers else Factors(torch.zeros_like(like), like.new_zeros(sizes[name], len(like)), 1.0)
             for name in names]
    return Factors(torch.cat([part.down for part in parts]), torch.block_diag(*(part.up for part in parts)), 1.0)
