"""What the tests of the cache use: captioned pictures, a small VAE and a small text encoder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from difftrain.core.digests import digest, weights_digest
from difftrain.data.cache import Cache, build_cache
from difftrain.data.captions import Captions
from difftrain.data.datasets.image_folder import ImageFolder
from difftrain.data.transform import Transform
from difftrain.models.autoencoder import LatentEncoder
from helpers.commands import pictures
from helpers.tiny_networks import TINY_VAE

FIXED = Transform(8)
PLAIN = Captions()


class Words(nn.Module):
    """Maps each of the first `length` bytes of a prompt to a row of a random table.

    It keeps the prompts that it has encoded.
    """

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

    def identity(self) -> dict[str, str]:
        return {
            "text encoder": weights_digest(self.state_dict()),
            "tokenizer": digest(str(self.length)),
            "empty prompt": "None",
        }


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
    """The data set of a folder that `photos` wrote."""
    return ImageFolder(str(folder), captions="sidecar")


class Made:
    """A cache of a folder, built with parts of its own, and how much they had to encode for it."""

    def __init__(
        self,
        folder: Path,
        place: str,
        transform: Transform = FIXED,
        captions: Captions = PLAIN,
        encoder: Encoder | None = None,
        text: Words | None = None,
        variants: int = 1,
        **options: Any,
    ):
        self.encoder, self.text = encoder or Encoder(), text or Words()
        settings = Cache(place, variants)
        self.table = build_cache(
            captioned(folder), transform, self.encoder, self.text, captions, settings, **options
        )

    @property
    def encoded(self) -> tuple[int, int]:
        """(images, prompts)."""
        return self.encoder.images, len(self.text.prompts)
