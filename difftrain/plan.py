"""From a recipe to built parts.

Everything that can be refused is refused here, by the rules of `rules.py` and by the parts themselves, before the model's weights
are there and before the run folder is made: the data and the references are opened, shapes and classes are compared with the
model's config, one batch of timesteps is drawn, and the model without weights takes one input.
"""

from pathlib import Path
from typing import Any

import torch

from difftrain import rules
from difftrain.adapters import Adapter, describe, trainable
from difftrain.cache import Cache
from difftrain.captions import Captions
from difftrain.conditioning import ClassConditioning, Conditioning
from difftrain.data.facts import is_labelled, some_captions
from difftrain.data.items import ImageDataset, ImageStream, frames_of
from difftrain.data.originals import check_captions
from difftrain.data.transform import Transform
from difftrain.denoisers import (
    DiffusersDenoiser,
    check_forward,
    num_class_embeddings_in,
    planned_config,
    shape_in,
    without_weights,
)
from difftrain.distributed import num_processes
from difftrain.evaluation.evaluator import Evaluator
from difftrain.evaluation.extractor import FeatureExtractor
from difftrain.evaluation.memorization import bytes_of_one
from difftrain.evaluation.sources import DatasetImages
from difftrain.latents import LatentEncoder
from difftrain.objective import Objective
from difftrain.pipelines.text_conditioning import TextConditioning
from difftrain.pipelines.text_to_image import TEXT_TO_IMAGE, TextToImageDenoiser, TextToImageModel
from difftrain.preparation import Preparation
from difftrain.prior import Prior
from difftrain.recipe import EvaluationSettings, Recipe, Validation
from difftrain.registry import METRICS, InputError, Part
from difftrain.rng import Rng
from difftrain.sampling import SampleGenerator, Sampling
from difftrain.stated import Stated, schedule_and_parameterization, stated_beside
from difftrain.trainer import Training
from difftrain.visits import Scorer

MOST_BYTES = 2**30  # of training images held in memory, reduced, for an evaluation


class Plan:
    """The parts of one run, built from its recipe; the network comes last, by `denoiser()`."""

    def __init__(self, recipe: Recipe, trains: bool = True):
        """trains: refuse too what stands in the way of training alone, such as a batch that does not divide over the processes."""
        self.recipe = recipe
        self.training: Training = recipe.training.build()
        if trains:
            self.training.micro_batch_of(num_processes())
        rules.check_trackers(self.training.trackers)
        self.transform: Transform = recipe.transform.build()
        self.sampling: Sampling = recipe.sampling.build()
        self.optimizer = recipe.optimizer.build()
        self.optimizer.build(torch.nn.Linear(1, 1))  # refuses options out of bounds, which only the class knows
        self.pipeline: TextToImageModel | None = recipe.model.build() if recipe.model.name in TEXT_TO_IMAGE else None
        self.adapter: Adapter | None = recipe.adapter.build() if recipe.adapter else None
        rules.check_adapter(recipe, self.adapter is not None and self.adapter.makes_lora)
        rules.check_text(recipe, self.pipeline is not None, self.transform)
        rules.check_buckets(recipe, self.pipeline.unit if self.pipeline else None)
        self.config = self.pipeline.config if self.pipeline else planned_config(recipe.model)
        latents = self.pipeline.latent_shape(self.transform.resolution) if self.pipeline else None
        self.schedule, self.parameterization = schedule_and_parameterization(recipe, self.stated(latents))
        self.objective: Objective = recipe.objective.build(schedule=self.schedule, parameterization=self.parameterization)
        self.objective.timesteps(self.schedule.num_timesteps, Rng(0))
        self.evaluation: EvaluationSettings | None = recipe.evaluation.build() if recipe.evaluation else None
        default_captions = Captions() if self.pipeline else None
        self.captions: Captions | None = recipe.captions.build() if recipe.captions else default_captions
        self.cache: Cache | None = recipe.cache.build() if recipe.cache else None
        self.prior: Prior | None = recipe.prior.build() if recipe.prior else None
        self.validation: Validation | None = recipe.validation.build() if recipe.validation else None
        channels, *sides = latents or shape_in(self.config)
        self.data: ImageDataset | ImageStream = recipe.data.build()
        self.held_out: ImageDataset | None = None
        if trains and self.validation is not None:
            self.held_out = rules.opened("validation.data", self.validation.data, "held-out images are")
        self.num_frames = frames_of(self.data)
        rules.check_clips(recipe, self.num_frames)
        self.shape = (channels, *self._frames, *sides)
        self.encoder: LatentEncoder | None = recipe.encoder.build() if recipe.encoder else self._own_encoder()
        if self.pipeline is None:
            rules.check_shapes(self.config, self.transform, self.encoder, self.objective.variance)
        elif self.encoder is not None:
            rules.check_latents((channels, *sides), self.encoder, self.transform, self.objective.variance)
        self.conditioning: Conditioning = self._prompts(self.pipeline) if self.pipeline else self._classes()
        self.generator = SampleGenerator(
            self.sampling, self.schedule, self.parameterization, self.objective.variance, self.conditioning, self.shape, self.encoder,
            even_sigmas=self.pipeline is not None and self.pipeline.family.even_sigmas,
        )
        rules.check_guidance(recipe, self.sampling.guidance)
        self._check_captions()
        if self.prior is not None:
            rules.check_prior(recipe, self.streams, self.num_frames)
            self.prior.check(self.conditioning, self.pipeline is not None)
        self._features: FeatureExtractor | None = None
        if self.evaluation is not None:
            labelled = self.conditioning.conditions and self.pipeline is None
            rules.check_evaluation(self.evaluation, self.image_shape, self.num_frames, self.streams, labelled)
        skeleton = self._skeleton()
        self.num_parameters = sum(p.numel() for p in skeleton.parameters())
        self._adapt(skeleton)
        self.num_trained, self.trains = sum(p.numel() for p in trainable(skeleton).values()), describe(skeleton)
        self.objective.noise(torch.zeros(1, *self.shape), Rng(0))  # refuses noise of another kind of data
        if trains:
            batch = (self.training.micro_batch_of(num_processes()), *self.shape)
            rules.check_regularizers(self.objective, self.schedule, batch, skeleton.model, recipe.model.arguments["dtype"])

    def denoiser(self) -> DiffusersDenoiser:
        """The network, with initial weights drawn from the recipe's seed or loaded, and what the adapter adds to them."""
        with torch.random.fork_rng():
            torch.manual_seed(self.recipe.seed)
            denoiser: DiffusersDenoiser = self.pipeline.denoiser(self.trains_text) if self.pipeline else self.recipe.model.build()
            self._adapt(denoiser)
            return denoiser

    def _adapt(self, denoiser: DiffusersDenoiser) -> None:
        """Add or select what trains, and refuse where nothing does."""
        if self.adapter is not None:
            self.adapter.apply(denoiser)
        if isinstance(denoiser, TextToImageDenoiser) and denoiser.text is not None:
            denoiser.text.freeze_unread()
        if not trainable(denoiser):
            raise InputError("adapter: what it selects has no part in the conditioning: of this text encoder the last layer is not read. "
                             "Select other weights.")

    @property
    def preparation(self) -> Preparation:
        """Of the loader's micro-batches for the objective."""
        return Preparation(self.conditioning, self.encoder)

    @property
    def trains_text(self) -> bool:
        return self.adapter is not None and self.adapter.trains_text

    @property
    def caches_text(self) -> bool:
        return self.cache is not None and self.cache.text and not self.trains_text

    def stated(self, latents: tuple[int, int, int] | None) -> Stated | None:
        """The schedule and parameterization that a pretrained pipeline states."""
        if self.pipeline is not None:
            assert latents is not None
            return self.pipeline.schedule(*latents[1:])
        return stated_beside(self.recipe.model.arguments.get("path"))

    def _own_encoder(self) -> LatentEncoder | None:
        """That of the pretrained pipeline, where it has one."""
        if self.pipeline is not None:
            return self.pipeline.encoder()
        path = self.recipe.model.arguments.get("path")
        return LatentEncoder(path) if path is not None and (Path(path).expanduser() / "vae").is_dir() else None

    def _skeleton(self) -> DiffusersDenoiser:
        """The network without weights, refused if it cannot take x_t of the run's shape."""
        if self.pipeline is not None:
            return self.pipeline.skeleton(self.trains_text)
        skeleton = without_weights(self.recipe.model.name, self.config)
        check_forward(skeleton, self.shape, self.conditioning.conditions)
        return skeleton

    @property
    def streams(self) -> bool:
        return isinstance(self.data, ImageStream)

    @property
    def _frames(self) -> tuple[int, ...]:
        """(F,) of clips, () of images."""
        return () if self.num_frames is None else (self.num_frames,)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(C, H, W) of the images, or (C, F, H, W) of the clips, that are generated."""
        return self.transform.channels, *self._frames, self.transform.resolution, self.transform.resolution

    @property
    def images_in_words(self) -> str:
        return "x".join(map(str, self.image_shape))

    def images(self, dataset: ImageDataset, limit: int | None = None) -> DatasetImages:
        """A data set through the run's transform, without random crop and flip."""
        return DatasetImages(dataset, self.transform, limit=limit)

    @property
    def training_images(self) -> DatasetImages | None:
        """The training images as evaluations see them: all, or of a large set as many, evenly spread, as MOST_BYTES hold; None of a
        stream."""
        if isinstance(self.data, ImageStream):
            return None
        return self.images(self.data, max(1, MOST_BYTES // bytes_of_one(self.image_shape)))

    def features(self, folder: Path, device: torch.device) -> FeatureExtractor:
        """The recipe's feature extractor, made once; what it trains is kept in `folder`."""
        assert self.evaluation is not None
        if self._features is None:
            given = {"cache": folder, "shape": self.image_shape, "transform": self.transform.deterministic(), "device": device}
            self._features = self.evaluation.features.build(**given)
        return self._features

    def scorer(
        self, reference: Part, metrics: list[Any], num_samples: int, features_folder: Path, device: torch.device, in_loop: bool = False
    ) -> Scorer:
        """Opens the reference and the feature extractor, before anything is generated. The samples that pick a checkpoint in the loop are
        made from other noise than those of the final score."""
        assert self.evaluation is not None
        generator = self.generator.with_seed(self.sampling.seed + 1) if in_loop else self.generator
        metrics = metrics if in_loop else [*metrics, *self._memorization(reference, metrics)]
        evaluator = Evaluator(
            self.images(reference.build()), self.training_images, self.features(features_folder, device), metrics, features_folder,
            self.evaluation.seed, shows_worst=not in_loop,
        )
        return Scorer(generator, evaluator, self.image_shape, num_samples, device)

    def _memorization(self, reference: Part, metrics: list[Any]) -> list[Any]:
        """The check that final scores bring unasked, where there is something to compare with."""
        assert self.evaluation is not None
        there = any("nearest_neighbour_ratio" in metric.scores for metric in metrics)
        wanted = self.evaluation.memorization and not there and not self.streams and reference != self.recipe.data
        return [METRICS.parse("nearest_neighbour_ratio", "evaluation.metrics").build()] if wanted else []

    def _check_captions(self) -> None:
        """Refuse captions that are missing, and a cache that cannot hold what the recipe draws."""
        if self.captions is not None:
            rules.check_renderings(self.captions, self.cache)
        if self.captions is not None and not isinstance(self.data, ImageStream):
            check_captions(self.data)
        if self.captions is not None and self.held_out is not None:
            check_captions(self.held_out, "validation.data")
        if self.cache is not None:
            rules.check_cache_folder(self.cache.folder)
            has_text = self.pipeline is not None and not self.trains_text
            self.cache.check(self.data, self.transform, self.captions, self.encoder is not None, has_text)

    def _prompts(self, pipeline: TextToImageModel) -> TextConditioning:
        """Captions of the data in training, the recipe's prompts (or captions of the data) in sampling."""
        prompts = self.sampling.prompts or some_captions(self.data)
        told = pipeline.guidance_input if pipeline.family.told_guidance(pipeline.config) else None
        size = (self.transform.resolution, self.transform.resolution)
        return TextConditioning(pipeline, prompts, size, pipeline.family.told_sizes(pipeline.config), told, self.trains_text)

    def _classes(self) -> ClassConditioning:
        embeddings = num_class_embeddings_in(self.config)
        num_classes = self._num_classes(embeddings)
        return ClassConditioning(num_classes, embeddings, self.recipe.label_dropout)

    def _num_classes(self, embeddings: int | None) -> int | None:
        """Classes of the data; integer labels without names fill the model's label table."""
        if self.data.class_names is not None:
            return len(self.data.class_names)
        return embeddings - (self.recipe.label_dropout > 0) if embeddings and is_labelled(self.data) else None
