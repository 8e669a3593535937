"""Builds what a run trains on: data set, captions, buckets, cache, prior samples, loader."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from difftrain.core.console import wing_logger
from difftrain.core.errors import InputError
from difftrain.core.registry import Part
from difftrain.data.buckets import BucketPlan
from difftrain.data.cache.building import Cache, build_cache
from difftrain.data.cache.dataset import CachedDataset
from difftrain.data.captions import Captions
from difftrain.data.classes import with_classes_of
from difftrain.data.items import MapDataset, StreamDataset, refuse_other_than_images
from difftrain.data.left_out import account
from difftrain.data.loader import Loader
from difftrain.data.metadata import check_captions
from difftrain.data.unreadable import TRAINING, ReadErrors
from difftrain.models.pipelines.truncation import truncated, truncated_captions
from difftrain.recipe.schema import Recipe, Validation
from difftrain.run.model import ModelPlan
from difftrain.training.prior import Prior, PriorImages, WithPrior
from difftrain.training.settings import Training

logger = wing_logger(__name__)


@dataclass(frozen=True)
class DataPlan:
    """A run's training data.

    Attributes:
        recipe: The run's recipe.
        model: The run's model.
        data: The data set.
        training: How long, and in what batches.
        captions: How captions are shown; None without a model that takes prompts.
        cache: What is encoded once; None without a cache.
        prior: Samples of the base model that are trained on too; None without them.
        validation: The loss on held-out images; None without it.
        held_out: The held-out images; None without validation.
        errors: What becomes of items that cannot be read.
    """

    recipe: Recipe
    model: ModelPlan
    data: MapDataset | StreamDataset
    training: Training
    captions: Captions | None
    cache: Cache | None
    prior: Prior | None
    validation: Validation | None
    held_out: MapDataset | None
    errors: ReadErrors

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        model: ModelPlan,
        data: MapDataset | StreamDataset,
        errors: ReadErrors,
    ) -> "DataPlan":
        """Open what the recipe names, and check the rules between its blocks.

        Args:
            recipe: The recipe.
            model: The run's model.
            data: The data set, which the facts of the model were taken from.
            errors: What becomes of items that cannot be read.

        Raises:
            InputError: If blocks of the recipe do not fit each other, with what to write instead.
        """
        takes_prompts = model.model.takes_prompts
        captions = model.captions
        cache: Cache | None = None if recipe.cache is None else recipe.cache.build()
        prior: Prior | None = None if recipe.prior is None else recipe.prior.build()
        validation: Validation | None = (
            None if recipe.validation is None else recipe.validation.build()
        )
        held_out = None
        if validation is not None:
            held_out = opened("validation.data", validation.data, "held-out images are")
        for error in data.not_opened():
            errors.met(error, TRAINING)
        if isinstance(data, MapDataset):
            data = of_model(data, model, "data")
        if held_out is not None:
            held_out = of_model(held_out, model, "validation.data")
        check_buckets(recipe, model)
        check_captioned(captions, cache, data, held_out)
        if cache is not None:
            check_cache(cache, model, captions, data)
        if prior is not None:
            check_prior(model, data)
            prior.check(model.conditioning, takes_prompts)
        training: Training = recipe.training.build()
        return cls(
            recipe, model, data, training, captions, cache, prior, validation, held_out, errors
        )

    @property
    def caches_text(self) -> bool:
        """Whether states of captions are cached."""
        return self.cache is not None and self.cache.text and not self.model.trains_text

    def bucket_plan(self, data: MapDataset | StreamDataset) -> BucketPlan | None:
        """Read the sizes of all images and assign them to buckets. Collective.

        Args:
            data: The data set, with prior samples behind it if there are any.
        """
        if self.recipe.buckets is None:
            return None
        transform = self.model.transform
        assert transform is not None
        buckets = self.recipe.buckets.build()
        plan: BucketPlan = buckets.plan(data, transform, self.recipe.seed, self.training.batch_size)
        return plan

    def loader(
        self,
        process_index: int,
        num_processes: int,
        device: torch.device | None = None,
        prior: PriorImages | None = None,
    ) -> Loader:
        """Build one rank's data loader, with prior samples, buckets and cache. Collective.

        This may take long: sizes are read, and what the cache lacks is encoded.

        Args:
            process_index: This process's rank.
            num_processes: World size.
            device: Where what the cache lacks is encoded.
            prior: Samples of the base model, if there are any.
        """
        data: Any = self.data
        if prior is not None and self.prior is not None:
            assert isinstance(self.data, MapDataset)
            data = WithPrior(self.data, prior, self.prior.weight)
        buckets = self.bucket_plan(data)
        if buckets is not None:
            logger.info(buckets.table())
        for line in self.unseen():
            logger.info(line)
        if self.cache is not None:
            data = self._cached(data, buckets, device or torch.device("cpu"))
        loading = self.recipe.loader.build()
        return Loader(
            data,
            self.model.transform,
            seed=self.recipe.seed,
            batch_size=self.training.batch_size,
            micro_batch_size=self.training.micro_batch_of(num_processes),
            process_index=process_index,
            num_processes=num_processes,
            captions=self.captions,
            buckets=buckets,
            num_workers=loading.num_workers,
            on_error=loading.on_error,
        )

    def unseen(self) -> list[str]:
        """Return lines about files that are left out, and text that the encoders cut off."""
        lines = [f"data: {line}" for line in self.account()]
        return lines + [f"text: {line}" for line in self.cut_off()]

    def account(self) -> list[str]:
        """Return lines about what of the data is read and what is left out, as far as known."""
        if not isinstance(self.data, MapDataset):
            return []
        unreadable = self.errors.left_out(TRAINING)
        left_out = [*self.data.left_out(), *unreadable]
        if not left_out:
            return []
        num_never_items = len(self.data.not_opened())
        num_read = len(self.data) - len(unreadable) + num_never_items
        return account(num_read, left_out).splitlines()

    def cut_off(self) -> list[str]:
        """Return a sentence for each place whose captions or prompts are longer than is read."""
        tokenizer = self.model.model.tokenizer
        if tokenizer is None or self.captions is None:
            return []
        found = []
        if isinstance(self.data, MapDataset):
            found.append(truncated_captions(self.data, self.captions, tokenizer))
        sampled = self.model.generator.sampling.prompts or []
        found.append(truncated(sampled, tokenizer, "sampling.prompts"))
        of_prior = [] if self.prior is None else self.prior.prompts or []
        found.append(truncated(of_prior, tokenizer, "prior.prompts"))
        if self.held_out is not None:
            name = "captions of validation.data"
            found.append(truncated_captions(self.held_out, self.captions, tokenizer, name))
        return [line for line in found if line is not None]

    def _cached(self, data: Any, buckets: BucketPlan | None, device: torch.device) -> CachedDataset:
        """Return the data with cached latents and states of captions.

        Frozen text encoders are freed when nothing is left for them to do.
        """
        assert self.cache is not None
        assert self.model.transform is not None
        model = self.model.model
        text = model.text if self.caches_text else None
        if self.model.trains_text and self.cache.text:
            logger.info("cache: the text encoders train, so states of captions are not cached")
        cached = build_cache(
            data,
            self.model.transform,
            self.model.encoder,
            text,
            self.captions,
            self.cache,
            buckets,
            device,
            self.errors,
        )
        if text is not None:
            self.model.conditioning.to(device).remember()
            model.release_text()
        return cached


def opened(key: str, data: Part, they_are: str) -> MapDataset:
    """Open images that are read as a whole.

    Args:
        key: What a message calls the block, such as "evaluation.reference".
        data: The block.
        they_are: Subject and verb of the sentence that refuses a stream: "held-out images are".

    Raises:
        InputError: If there are no images, or if the data is a stream.
    """
    found = data.build()
    refuse_other_than_images(found, key)
    if not isinstance(found, MapDataset):
        raise InputError(
            f"{key}: a stream has no end, and {they_are} read as a whole. Write streaming: false."
        )
    return found


def of_model(data: MapDataset, model: ModelPlan, key: str) -> MapDataset:
    """Return a data set with the class ids of a model, if that takes classes.

    Args:
        data: The data set.
        model: The model.
        key: What messages call the data set.

    Raises:
        InputError: If the data set holds a class that the model does not have.
    """
    num_classes = model.conditioning.num_classes
    if model.model.takes_prompts or not model.conditioning.conditions or num_classes is None:
        return data
    return with_classes_of(data, model.facts.class_names, num_classes, key)


# Rules between blocks


def check_buckets(recipe: Recipe, model: ModelPlan) -> None:
    """Refuse buckets for a model of one size, and sides that the model cannot take."""
    if recipe.buckets is None:
        return
    name, unit = model.model.name, model.model.size_multiple
    if unit is None:
        raise InputError(
            f"buckets: the model {name} takes images of one size. Leave buckets out, or write a "
            "text-to-image model."
        )
    step = recipe.buckets.arguments["step"]
    if step % unit:
        raise InputError(
            f"buckets.step: {step}, but {name} takes multiples of {unit} pixels. Write step: "
            f"{-(-step // unit) * unit}."
        )


def check_captioned(
    captions: Captions | None,
    cache: Cache | None,
    data: MapDataset | StreamDataset,
    held_out: MapDataset | None,
) -> None:
    """Refuse captions that are missing, and renderings that nothing caches."""
    if captions is None:
        return
    if captions.variants > 1 and cache is None:
        raise InputError(
            f"captions.variants: {captions.variants} has no effect without cached text, "
            "because each sample then gets a new rendering. Leave it out, or write cache: "
            "{folder: ...}."
        )
    if isinstance(data, MapDataset):
        check_captions(data)
    if held_out is not None:
        check_captions(held_out, "validation.data")


def check_cache(
    cache: Cache,
    model: ModelPlan,
    captions: Captions | None,
    data: MapDataset | StreamDataset,
) -> None:
    """Refuse a cache that cannot hold what the recipe draws, and a file in its place."""
    path = Path(cache.folder).expanduser().absolute()
    there = next(place for place in (path, *path.parents) if place.exists())
    if not there.is_dir():
        raise InputError(
            f"cache.folder: {cache.folder!r} cannot be a folder, because {there} is a file. "
            "Write the path of a folder, or of a new one."
        )
    assert model.transform is not None
    has_text = model.model.takes_prompts and not model.trains_text
    cache.check(data, model.transform, captions, model.encoder is not None, has_text)


def check_prior(model: ModelPlan, data: MapDataset | StreamDataset) -> None:
    """Refuse a prior without a base model, and data to which no samples can be added."""
    if model.model.path is None:
        raise InputError(
            "prior: it trains on samples of a pretrained model, but this model is randomly "
            "initialized. Leave prior out, or write model: {path: ...}."
        )
    if data.is_stream or data.items_are != "images":
        these = "a stream" if data.is_stream else f"a data set of {data.items_are}"
        raise InputError(
            "prior: samples of the base model are added to a data set of images, but data is "
            f"{these}. Leave prior out."
        )
