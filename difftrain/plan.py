"""From a recipe to built parts.

Everything that can be refused is refused here, by the rules of `rules.py` and by the parts themselves, before the model's weights
are there and before the run folder is made: the data and the references are opened, shapes and classes are compared with the
model's config, one batch of timesteps is drawn, and the model without weights takes one input.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from difftrain import rules
from difftrain.adapters import Adapter, describe, trainable
from difftrain.cache import Cache, CachedDataset, build_cache
from difftrain.captions import Captions
from difftrain.conditioning import ClassConditioning, Conditioning
from difftrain.data.buckets import BucketPlan
from difftrain.data.huggingface import HuggingFaceStream
from difftrain.data.items import ImageDataset, ImageStream, UnreadableImage, frames_of
from difftrain.data.loader import Loader
from difftrain.data.originals import check_captions, original
from difftrain.data.transform import Transform
from difftrain.denoisers import (
    DiffusersDenoiser,
    check_forward,
    num_class_embeddings_in,
    planned_config,
    pretrained_scheduler,
    shape_in,
    without_weights,
)
from difftrain.distributed import num_processes
from difftrain.entry import say
from difftrain.evaluation.evaluator import Evaluator
from difftrain.evaluation.extractor import FeatureExtractor
from difftrain.evaluation.memorization import bytes_of_one
from difftrain.evaluation.scores import badness
from difftrain.evaluation.sources import DatasetImages
from difftrain.latents import LatentEncoder
from difftrain.objective import Objective
from difftrain.parameterization import Parameterization
from difftrain.pipelines.text_conditioning import TextConditioning
from difftrain.pipelines.text_to_image import TEXT_TO_IMAGE, TextToImageDenoiser, TextToImageModel
from difftrain.pipelines.truncation import tell_truncated
from difftrain.preparation import Preparation
from difftrain.prior import Prior, PriorImages, WithPrior
from difftrain.recipe import EvaluationSettings, Recipe, Validation
from difftrain.registry import METRICS, InputError, Part
from difftrain.rng import Rng
from difftrain.sampling import SampleGenerator, Sampling
from difftrain.schedule import NoiseSchedule
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

    def stated(self, latents: tuple[int, int, int] | None) -> "Stated | None":
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

    def loader(
        self, process_index: int, num_processes: int, device: torch.device = torch.device("cpu"), prior: PriorImages | None = None  # noqa: B008
    ) -> Loader:
        """The micro-batches of one process. Collective: sizes are read for the buckets, and what the cache lacks is encoded on `device`."""
        loading, buckets, data = self.recipe.loader.build(), None, self.data
        if prior is not None and self.prior is not None and not isinstance(data, ImageStream):
            data = WithPrior(data, prior, self.prior.weight)
        if self.recipe.buckets is not None:
            buckets = self.recipe.buckets.build().plan(data, self.transform, self.recipe.seed, self.training.batch_size)
            say(buckets.table())
        if self.pipeline is not None and self.captions is not None and not self.caches_text and not isinstance(self.data, ImageStream):
            tell_truncated(self.data, self.captions, self.pipeline.tokenize)
        return Loader(
            data if self.cache is None else self._cached(data, self.cache, buckets, device), self.transform, seed=self.recipe.seed,
            batch_size=self.training.batch_size, micro_batch_size=self.training.micro_batch_of(num_processes), process_index=process_index,
            num_processes=num_processes, captions=self.captions, buckets=buckets, num_workers=loading.num_workers,
            on_error=loading.on_error,
        )

    def _cached(self, data: Any, cache: Cache, buckets: BucketPlan | None, device: torch.device) -> CachedDataset:
        """The data with latents and states of captions from the cache. Text encoders go again, when nothing is left for them to do."""
        text = self.pipeline.text if self.pipeline and self.caches_text else None
        if self.trains_text and cache.text:
            say("cache: text encoders train, so what they make of captions is not cached")
        on_error = self.recipe.loader.arguments["on_error"]
        made = build_cache(data, self.transform, self.encoder, text, self.captions, cache, buckets, device, on_error)
        if text is not None and isinstance(self.conditioning, TextConditioning) and self.pipeline is not None:
            self.conditioning.to(device).remember()
            self.pipeline.release_text()
        return made

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
        if self.captions is not None and not isinstance(self.data, ImageStream):
            check_captions(self.data)
        if self.cache is not None:
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


def is_captioned(data: ImageDataset | ImageStream) -> bool:
    """Whether the first image of a table has a caption."""
    return not isinstance(data, ImageStream) and original(data, 0).caption() is not None


def is_labelled(data: ImageDataset | ImageStream) -> bool:
    """Whether the items have labels; of a table the first readable item says so."""
    if isinstance(data, ImageStream):
        return isinstance(data, HuggingFaceStream) and data.columns.label is not None
    problem: UnreadableImage | None = None
    for i in range(len(data)):
        try:
            return data[i].label is not None
        except UnreadableImage as error:
            problem = problem or error
    raise InputError(f"data: none of the {len(data)} images can be read. The first: {problem}.")


def some_captions(data: ImageDataset | ImageStream, num: int = 64) -> list[str]:
    """At most `num` captions of the data, evenly spread."""
    if isinstance(data, ImageStream):
        raise InputError("sampling.prompts: required with a stream, whose captions are not known before. Write some, such as "
                         "prompts: [a photo of a cat].")
    found = [data[n * len(data) // min(num, len(data))] for n in range(min(num, len(data)))]
    without = next((item.name for item in found if not item.caption), None)
    if without is not None:
        raise InputError(f"data: {without} has no caption, and the model is trained on captioned images. Write captions: sidecar or "
                         "metadata (image_folder), or caption_column: ... (huggingface).")
    return list(dict.fromkeys(item.caption for item in found))


Stated = tuple[NoiseSchedule, Parameterization]


def stated_beside(path: str | None) -> Stated | None:
    """What the scheduler that lies beside a pretrained model states."""
    config = pretrained_scheduler(path)
    if config is None:
        return None
    schedule = NoiseSchedule.from_diffusers(config)
    return schedule, "flow_prediction" if schedule.kind == "flow" else config.get("prediction_type", "epsilon")


def schedule_and_parameterization(recipe: Recipe, stated: Stated | None) -> Stated:
    """What the recipe states, or what the pretrained pipeline states; both is an error, neither too."""
    if stated is None:
        if recipe.schedule is None or recipe.parameterization is None:
            missing = "schedule" if recipe.schedule is None else "parameterization"
            example = "{type: linear}" if missing == "schedule" else "epsilon"
            raise InputError(f"{missing}: required, since the model brings none; write {missing}: {example}.")
        return recipe.schedule.build(), recipe.parameterization
    if recipe.schedule is not None:
        raise InputError("schedule: the pretrained pipeline states its own; leave the key out, "
                         "or give the path of the model's own folder, without scheduler/.")
    if recipe.parameterization not in (None, stated[1]):
        raise InputError(f"parameterization: {recipe.parameterization}, but the pretrained pipeline states {stated[1]}; "
                         "leave the key out.")
    return stated


@dataclass(frozen=True)
class Selection:
    """The score by which the best checkpoint is chosen, as a value of which smaller is better."""

    name: str

    def __call__(self, scores: dict[str, dict[str, Any]]) -> float:
        if self.name not in scores:
            raise InputError(f"evaluation.in_loop.select: there is no score {self.name!r}; the metrics give {', '.join(scores)}.")
        return badness(self.name, float(scores[self.name]["value"]))
