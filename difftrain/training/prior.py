"""Prior preservation: the network also trains on samples of its base model."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from difftrain.core.console import wing_logger
from difftrain.core.digests import digest, weights_digest
from difftrain.core.errors import InputError
from difftrain.core.files import write_text
from difftrain.core.processes import barrier, is_main
from difftrain.core.registry import NonNegative, PositiveInt
from difftrain.data.captions import Captions, is_blank
from difftrain.data.images import Original, open_image
from difftrain.data.items import Item, MapDataset
from difftrain.data.transform import Size
from difftrain.generation.generator import SampleGenerator, blocks
from difftrain.generation.pictures import to_pil
from difftrain.models.adapters import base_weights
from difftrain.models.conditioning.base import Conditioning

MADE = "made.json"  # says that all samples are there, and what they were made of
SEED_OFFSET = 2  # so that the noise is not that of grids and scores
logger = wing_logger(__name__)


@dataclass(frozen=True)
class Prior:
    """Prior preservation: ``(E w error + weight E error of base samples) / 2``.

    On average, half of what is trained on are `num` samples of the base model. w is a data item's
    own weight. The paper's loss lacks the factor 1/2: here both halves are in one mean. The samples
    are generated with the recipe's sampler and guidance.

    Args:
        num: Number of samples of the base model.
        weight: Factor of the error of a base sample.
        prompts: Prompts of a text-to-image model, such as [a photo of a dog], taken in turn.
        labels: Class ids of a class-conditional model, taken in turn.

    Reference:
        Ruiz et al. 2023, "DreamBooth: Fine Tuning Text-to-Image Diffusion Models for Subject-Driven
        Generation", arXiv:2208.12242.
    """

    num: PositiveInt
    weight: NonNegative = 1.0
    prompts: list[str] | None = None
    labels: list[int] | None = None

    def check(self, conditioning: Conditioning, takes_prompts: bool) -> None:
        """Refuse a block that does not say what the samples show.

        Args:
            conditioning: What the network is conditioned on.
            takes_prompts: Whether it is conditioned on prompts.

        Raises:
            InputError: With what to write instead.
        """
        if takes_prompts and (not self.prompts or self.labels is not None):
            raise InputError(
                "prior: the model takes prompts. Write prompts: [a photo of a dog], and no labels."
            )
        if any(is_blank(prompt) for prompt in self.prompts or []):
            raise InputError(
                "prior.prompts: one of them is empty, and the samples are trained on under their "
                "prompts. Write what they show, such as prompts: [a photo of a dog]."
            )
        if not takes_prompts and self.prompts is not None:
            raise InputError(
                "prior.prompts: the model takes no prompts. Write labels: [0, 1], or leave both "
                "out."
            )
        num = (conditioning.num_classes or 0) if conditioning.conditions else 0
        wrong = [label for label in self.labels or [] if not 0 <= label < num]
        if wrong:
            if not num:
                raise InputError("prior.labels: the model takes no class labels. Leave labels out.")
            raise InputError(
                f"prior.labels: {wrong[0]} is not a class of the model. Write labels from 0 to "
                f"{num - 1}."
            )

    def labels_of(self, indices: Sequence[int], conditioning: Conditioning) -> Tensor | None:
        """Return the labels [B] of the samples of these indices."""
        if self.prompts:
            return conditioning.ids_of([self.prompts[i % len(self.prompts)] for i in indices])
        if self.labels:
            return torch.tensor([self.labels[i % len(self.labels)] for i in indices])
        return conditioning.labels_of(indices)


class PriorImages(MapDataset):
    """The samples of the base model in a folder.

    Args:
        folder: The folder.
        labels: Their labels, if the model takes labels.
        captions: Their prompts, if the model takes prompts.
        num: Number of samples.
    """

    def __init__(
        self, folder: Path, labels: list[int] | None, captions: list[str] | None, num: int
    ):
        self.files = [folder / f"{i:06d}.png" for i in range(num)]
        self.labels, self.prompts = labels, captions

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> Item:
        label = None if self.labels is None else self.labels[i]
        caption = None if self.prompts is None else self.prompts[i]
        name = str(self.files[i])
        return Item(open_image(self.files[i], name), label, caption, name)


class WithPrior(MapDataset):
    """A data set, followed by equally many samples of the base model.

    Args:
        data: The data set.
        prior: The samples of the base model, repeated as often as needed.
        weight: Factor of the error of a base sample.
    """

    def __init__(self, data: MapDataset, prior: PriorImages, weight: float):
        self.data, self.prior, self.prior_weight = data, prior, weight
        self.class_names = data.class_names

    def __len__(self) -> int:
        return 2 * len(self.data)

    def __getitem__(self, i: int) -> Any:
        dataset, place = self._place(i)
        return dataset[place]

    def weight(self, i: int) -> float:
        """Return the weight of item i in the loss."""
        own = self.data.weight(i) if i < len(self.data) else self.prior_weight
        return 1.0 if own is None else own

    def shown(self, i: int, captions: Captions) -> Captions:
        """Return how the caption of item i is shown: a base sample keeps the prompt it shows."""
        return self.data.shown(i, captions) if i < len(self.data) else captions.plain()

    def original(self, i: int) -> Original:
        """Return what is known of item i before it is decoded."""
        dataset, place = self._place(i)
        return dataset.original(place)

    def size(self, i: int) -> Size:
        """Return (height, width) of image i."""
        dataset, place = self._place(i)
        return dataset.size(place)

    def captions(self) -> Iterator[tuple[str, str | None]]:
        """Yield (name, caption) of the data set's own items."""
        yield from self.data.captions()

    def _place(self, i: int) -> tuple[MapDataset, int]:
        """Return the data set of item i, and its index in it."""
        if i < len(self.data):
            return self.data, i
        return self.prior, (i - len(self.data)) % len(self.prior)


@torch.no_grad()
def prior_images(
    prior: Prior,
    generator: SampleGenerator,
    base: nn.Module,
    folder: Path,
    device: torch.device,
) -> PriorImages:
    """Return the samples of the base model, generated where the folder lacks them. Collective.

    Args:
        prior: What the samples show, and how many there are.
        generator: Generates them.
        base: The network before training.
        folder: Where they are kept.
        device: Where the network is.
    """
    sampler = generator.with_seed(generator.sampling.seed + SEED_OFFSET)
    weights = weights_digest(base_weights(base))
    mark = digest(repr(dataclasses.replace(prior, weight=1.0)), repr(sampler.sampling), weights)
    labels = prior.labels_of(range(prior.num), generator.conditioning)
    done = folder / MADE
    is_made = done.is_file() and json.loads(done.read_text())["of"] == mark
    verb = "using" if is_made else "generating"
    where = "from" if is_made else "into"
    logger.info(f"prior: {verb} {prior.num} samples of the base model {where} {folder}")
    if not is_made:
        folder.mkdir(parents=True, exist_ok=True)
        for indices in blocks(prior.num, sampler.sampling.block_size):
            own = None if labels is None else labels[indices]
            images = sampler(base, indices, device, own)
            for i, image in zip(indices, images, strict=True):
                to_pil(image).save(folder / f"{i:06d}.png")
        barrier()
        if is_main():
            write_text(done, json.dumps({"of": mark, "num": prior.num}) + "\n")
        barrier()
    if labels is None:
        return PriorImages(folder, None, None, prior.num)
    captions = generator.conditioning.captions_of(labels)
    class_ids = labels.tolist() if captions is None else None
    return PriorImages(folder, class_ids, captions, prior.num)
