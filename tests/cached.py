"""What the tests of the cache put into one: captioned pictures, a small autoencoder, and a text encoder of one table."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from commands import TINY_VAE, pictures
from torch import Tensor, nn

from difftrain.cache import Cache, build_cache
from difftrain.captions import Captions
from difftrain.data.image_folder import ImageFolder
from difftrain.data.transform import Transform
from difftrain.latents import LatentEncoder

FIXED, PLAIN = Transform(8), Captions()


class Words(nn.Module):
    """Each of the first `length` bytes of a prompt to a row of a drawn table; keeps the prompts that it has been given."""

    def __init__(self, seed: int = 0, length: int = 12):
        super().__init__()
        torch.manual_seed(seed)
        self.length = length
        self.table = nn.Embedding(256, 4)
        self.prompts: list[str] = []

    def tokenize(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        cut = [prompt.encode()[: self.length] for prompt in prompts]
        ids = torch.tensor([[*found, *[0] * (self.length - len(found))] for found in cut])
        return {"ids.text_encoder": ids}

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        self.prompts += prompts
        words = self.table(self.tokenize(prompts)["ids.text_encoder"])
        return {"encoder_hidden_states": words, "text_embeds": words.mean(1)}


class Encoder(LatentEncoder):
    """Counts the images that it has encoded."""

    def __init__(self, seed: int = 0, **options: Any):
        from diffusers import AutoencoderKL

        torch.manual_seed(seed)
        super().__init__("made here", vae=AutoencoderKL(**TINY_VAE), **options)
        self.images = 0

    def moments(self, pixels: Tensor, names: Sequence[str] | None = None) -> Tensor:
        self.images += len(pixels)
        return super().moments(pixels, names)


def photos(folder: Path, num: int = 10, size: tuple[int, int] = (14, 10)) -> Path:
    """Pictures of noise with a caption beside each."""
    pictures(folder, num, size)
    for i in range(num):
        (folder / f"{i:03d}.txt").write_text(f"photo, no {i}")
    return folder


def captioned(folder: Path) -> ImageFolder:
    return ImageFolder(str(folder), captions="sidecar")


class Made:
    """A cache built with parts of its own, and how much they had to encode for it."""

    def __init__(
        self, data: Any, place: str, transform: Transform = FIXED, captions: Captions = PLAIN, encoder: Encoder | None = None,
        text: Words | None = None, variants: int = 1, **options: Any,
    ):
        self.encoder, self.text = encoder or Encoder(), text or Words()
        settings = Cache(place, variants, **{name: options.pop(name) for name in ("latents", "text") if name in options})
        data = captioned(data) if not hasattr(data, "__getitem__") else data
        self.table = build_cache(data, transform, self.encoder, self.text, captions, settings, **options)

    @property
    def encoded(self) -> tuple[int, int]:
        """(images, prompts)."""
        return self.encoder.images, len(self.text.prompts)
