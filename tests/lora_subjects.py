"""Denoisers of the tiny pipelines with LoRA layers that do something, and diffusers' own calls of them on fixed inputs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from difftrain.denoisers import DiffusersDenoiser

FAMILIES = ["stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3", "flux"]
IDS = torch.arange(14).view(2, 7) + 1


class Text(nn.Module):
    """Text encoders as a denoiser that trains them holds them."""

    def __init__(self, encoders: dict[str, nn.Module]):
        super().__init__()
        self.encoders = nn.ModuleDict(encoders)


def denoiser_of(pipe: Any, text: bool = False) -> DiffusersDenoiser:
    """A pipeline's network as a denoiser; text: with its text encoders."""
    denoiser = DiffusersDenoiser(pipe.unet if hasattr(pipe, "unet") else pipe.transformer)
    names = [name for name in ("text_encoder", "text_encoder_2", "text_encoder_3") if getattr(pipe, name, None) is not None]
    if text:
        denoiser.text = Text({name: getattr(pipe, name) for name in names})
    return denoiser


def pipeline(folder: Path, **options: Any) -> Any:
    return diffusers.DiffusionPipeline.from_pretrained(folder, **options)


def trained(denoiser: DiffusersDenoiser, adapter: Any, seed: int = 0) -> DiffusersDenoiser:
    """The denoiser with the adapter applied and moved away from its beginning, where B = 0 and nothing would be seen."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapter.apply(denoiser)
        with torch.no_grad():
            for parameter in (p for p in denoiser.parameters() if p.requires_grad):
                parameter += 0.3 * torch.randn_like(parameter)
    return denoiser.eval()


def forward(model: nn.Module) -> Tensor:
    """The model's output on fixed inputs, in diffusers' own call."""
    return {"UNet2DConditionModel": unet, "SD3Transformer2DModel": sd3, "FluxTransformer2DModel": flux,
            "DiTTransformer2DModel": dit, "UNet2DModel": dit}[type(model).__name__](model)


def unet(model: Any) -> Tensor:
    draw, config = drawer(model), model.config
    added = {"text_embeds": draw(2, 12), "time_ids": draw(2, 6)} if config.get("addition_embed_type") else None
    text = draw(2, 5, config["cross_attention_dim"])
    return model(draw(2, 4, 8, 8), torch.tensor([3, 700]), text, added_cond_kwargs=added).sample


def sd3(model: Any) -> Tensor:
    draw, config = drawer(model), model.config
    text, pooled = draw(2, 5, config["joint_attention_dim"]), draw(2, config["pooled_projection_dim"])
    return model(draw(2, 16, 8, 8), text, pooled, torch.tensor([3.0, 700.0])).sample


def flux(model: Any) -> Tensor:
    draw, config = drawer(model), model.config
    return model(
        draw(2, 16, 64), draw(2, 5, config["joint_attention_dim"]), draw(2, config["pooled_projection_dim"]), torch.tensor([0.1, 0.7]),
        img_ids=torch.zeros(16, 3), txt_ids=torch.zeros(5, 3), guidance=torch.full((2,), 3.5),
    ).sample


def dit(model: Any) -> Tensor:
    return model(drawer(model)(2, 4, 8, 8), torch.tensor([3, 700]), class_labels=torch.tensor([1, 2])).sample


def drawer(model: Any) -> Callable[..., Tensor]:
    """Normal numbers in the model's precision, the same at each use."""
    generator = torch.Generator().manual_seed(1)
    return lambda *shape: torch.randn(*shape, generator=generator).to(model.dtype)


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return forward(model)


def difference(one: Tensor, other: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    one, other = one.detach().double(), other.detach().double()
    return float((one - other).abs().max() / other.abs().max())
