"""Prior preservation: samples of the base model, made before training, are trained on beside the data, so that it forgets less.

Ruiz et al. 2023, "DreamBooth: Fine Tuning Text-to-Image Diffusion Models for Subject-Driven Generation", arXiv:2208.12242.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from difftrain.adapters import base_weights
from difftrain.conditioning import Conditioning
from difftrain.data.items import ImageDataset, Item, open_image
from difftrain.data.originals import Original, captions_of, original
from difftrain.distributed import barrier, is_main
from difftrain.registry import InputError, NonNegative, PositiveInt
from difftrain.runlog import write_atomically
from difftrain.sampling import SampleGenerator, blocks, to_pil
from difftrain.storage import digest, weights_digest

MADE = "made.json"  # says that all samples are there, and of what
SEED = 2  # added to that of sampling: other noise than that of the grids and scores


@dataclass(frozen=True)
class Prior:
    """E weight_data error + weight E error of samples of the base model: half of what is trained on, on average, are `num` such samples.

    Ruiz et al. 2023, arXiv:2208.12242, their prior-preservation loss; both halves are in one mean here, so that the whole loss is half of
    theirs. prompts: of text-to-image models, such as [a photo of a dog]; labels: class ids of class-conditional ones; taken in turn.
    The samples are made with the recipe's sampler and guidance.
    """

    num: PositiveInt
    weight: NonNegative = 1.0
    prompts: list[str] | None = None
    labels: list[int] | None = None

    def check(self, conditioning: Conditioning, takes_text: bool) -> None:
        """Refuse what does not say of what the samples are to be."""
        if takes_text and (not self.prompts or self.labels is not None):
            raise InputError("prior: the model takes prompts. Write prompts: [a photo of a dog], and no labels.")
        if not all(prompt.strip() for prompt in self.prompts or []):
            raise InputError("prior.prompts: one of them is empty, and samples are trained on under their prompts. Write what they are to "
                             "be of, such as prompts: [a photo of a dog].")
        if not takes_text and self.prompts is not None:
            raise InputError("prior.prompts: the model takes no prompts. Write labels: [0, 1], or leave both out.")
        num = conditioning.num_classes if conditioning.conditions else 0
        wrong = [label for label in self.labels or [] if not 0 <= label < (num or 0)]
        if wrong:
            raise InputError(f"prior.labels: {wrong[0]} is no class of the model; it has {f'0 to {num - 1}' if num else 'none'}.")

    def labels_of(self, indices: Sequence[int], conditioning: Conditioning) -> Any:
        """The labels [B] of samples."""
        if self.prompts:
            return conditioning.ids_of([self.prompts[i % len(self.prompts)] for i in indices])
        if self.labels:
            return torch.tensor([self.labels[i % len(self.labels)] for i in indices])
        return conditioning.labels_of(indices)


class PriorImages:
    """The samples in a folder, with their labels or captions."""

    class_names: list[str] | None = None

    def __init__(self, folder: Path, labels: list[int] | None, captions: list[str] | None, num: int):
        self.files = [folder / f"{i:06d}.png" for i in range(num)]
        self.labels, self.captions = labels, captions

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> Item:
        label = self.labels[i] if self.labels is not None else None
        caption = self.captions[i] if self.captions is not None else None
        return Item(open_image(self.files[i], str(self.files[i])), label, caption, str(self.files[i]))


class WithPrior:
    """A table of images, and as many items that are samples of the base model, whose error counts `weight`."""

    def __init__(self, data: ImageDataset, prior: PriorImages, weight: float):
        self.data, self.prior, self.prior_weight, self.class_names = data, prior, weight, data.class_names

    def __len__(self) -> int:
        return 2 * len(self.data)

    def __getitem__(self, i: int) -> Any:
        table, own = self._place(i)
        return table[own]

    def weight(self, i: int) -> float:
        """What item i counts in the loss."""
        return 1.0 if i < len(self.data) else self.prior_weight

    def original(self, i: int) -> Original:
        return original(*self._place(i))

    def captions_of_all(self) -> Iterator[tuple[str, str | None]]:
        yield from captions_of(self.data)

    def _place(self, i: int) -> tuple[ImageDataset, int]:
        if i < len(self.data):
            return self.data, i
        return self.prior, (i - len(self.data)) % len(self.prior)


@torch.no_grad()
def prior_images(prior: Prior, generator: SampleGenerator, base: nn.Module, folder: Path, device: torch.device) -> PriorImages:
    """The samples, made by all processes where they are not in the folder yet. Collective."""
    made = generator.with_seed(generator.sampling.seed + SEED)
    mark = digest(repr(dataclasses.replace(prior, weight=1.0)), repr(made.sampling), weights_digest(base_weights(base)))
    labels = prior.labels_of(range(prior.num), generator.conditioning)
    done = folder / MADE
    is_made = done.is_file() and json.loads(done.read_text())["of"] == mark
    if is_main():
        print(f"prior: {prior.num} samples of the base model {'are taken from' if is_made else 'are made in'} {folder}", flush=True)
    if not is_made:
        folder.mkdir(parents=True, exist_ok=True)
        for indices in blocks(prior.num, made.sampling.block_size):
            own = labels[indices] if labels is not None else None
            for i, image in zip(indices, made(base, indices, device, own), strict=True):
                to_pil(image).save(folder / f"{i:06d}.png")
        barrier()
        if is_main():
            write_atomically(done, json.dumps({"of": mark, "num": prior.num}) + "\n")
        barrier()
    captions = generator.conditioning.captions_of(labels) if labels is not None else None
    return PriorImages(folder, labels.tolist() if labels is not None and captions is None else None, captions, prior.num)
