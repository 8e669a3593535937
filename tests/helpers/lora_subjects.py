"""Denoisers of tiny pipelines with LoRA layers that do something, and diffusers' calls of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from difftrain.models.denoisers import DiffusersDenoiser
from difftrain.models.pipelines.pretrained import types_by_pipeline
from difftrain.models.pipelines.text_to_image import TextToImageDenoiser
from difftrain.models.slots import MODELS

FAMILIES = ["stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3", "flux"]
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
IDS = torch.arange(14).view(2, 7) + 1


def denoiser_of(pipe: Any, text: bool = False) -> DiffusersDenoiser:
    """Return a pipeline's network as a denoiser, with its text encoders if `text`."""
    network = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    name = types_by_pipeline().get(type(pipe).__name__)
    if name not in FAMILIES:
        return DiffusersDenoiser(network)
    family = MODELS.parse({"type": name, "path": str(pipe.name_or_path)}, "model").build()
    present = [name for name in ENCODERS if getattr(pipe, name, None) is not None]
    encoders = {name: getattr(pipe, name) for name in present}
    return TextToImageDenoiser(network, family, family.with_tokenizers(encoders) if text else None)


def pipeline(folder: Path, **options: Any) -> Any:
    """Load a pipeline with diffusers."""
    return diffusers.DiffusionPipeline.from_pretrained(folder, **options)


def trained(denoiser: DiffusersDenoiser, adapter: Any, seed: int = 0) -> DiffusersDenoiser:
    """Return the denoiser with an adapter moved away from its beginning, where B = 0."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapter.apply(denoiser)
        with torch.no_grad():
            for parameter in denoiser.parameters():
                if parameter.requires_grad:
                    parameter += 0.3 * torch.randn_like(parameter)
    return denoiser.eval()


def forward(model: nn.Module) -> Tensor:
    """Return the network's output on fixed inputs, in diffusers' own call."""
    return {
        "UNet2DConditionModel": unet,
        "SD3Transformer2DModel": sd3,
        "FluxTransformer2DModel": flux,
        "DiTTransformer2DModel": dit,
        "UNet2DModel": dit,
    }[type(model).__name__](model)


def unet(model: Any) -> Tensor:
    draw, config = drawer(model), model.config
    added = None
    if config.get("addition_embed_type"):
        added = {"text_embeds": draw(2, 12), "time_ids": draw(2, 6)}
    text = draw(2, 5, config["cross_attention_dim"])
    return model(draw(2, 4, 8, 8), torch.tensor([3, 700]), text, added_cond_kwargs=added).sample


def sd3(model: Any) -> Tensor:
    draw, config = drawer(model), model.config
    text = draw(2, 5, config["joint_attention_dim"])
    pooled = draw(2, config["pooled_projection_dim"])
    return model(draw(2, 16, 8, 8), text, pooled, torch.tensor([3.0, 700.0])).sample


def flux(model: Any) -> Tensor:
    draw, config = drawer(model), model.config
    return model(
        draw(2, 16, 64),
        draw(2, 5, config["joint_attention_dim"]),
        draw(2, config["pooled_projection_dim"]),
        torch.tensor([0.1, 0.7]),
        img_ids=torch.zeros(16, 3),
        txt_ids=torch.zeros(5, 3),
        guidance=torch.full((2,), 3.5),
    ).sample


def dit(model: Any) -> Tensor:
    x = drawer(model)(2, 4, 8, 8)
    return model(x, torch.tensor([3, 700]), class_labels=torch.tensor([1, 2])).sample


def drawer(model: Any) -> Callable[..., Tensor]:
    """Return a source of normal numbers in the model's precision, the same at each use."""
    generator = torch.Generator().manual_seed(1)
    return lambda *shape: torch.randn(*shape, generator=generator).to(model.dtype)


def run(model: nn.Module) -> Tensor:
    """Return the network's output on fixed inputs, without gradient."""
    with torch.no_grad():
        return forward(model)


def difference(one: Tensor, other: Tensor) -> float:
    """Return the largest difference, relative to the largest value of `other`."""
    one, other = one.detach().double(), other.detach().double()
    return float((one - other).abs().max() / other.abs().max())
