"""From a recipe to built parts, with the rules between blocks, each one sentence and one remedy.

Everything that can be refused is refused here, before the model's weights are there and before the run folder is made: the
data and the references are opened, shapes and classes are compared with the model's config, one batch of timesteps is
drawn, and the model without weights takes one input.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from difftrain.conditioning import ClassConditioning
from difftrain.data.huggingface import HuggingFaceStream
from difftrain.data.items import ImageDataset, Images, ImageStream, UnreadableImage, frames_of, load_images, refuse_clips
from difftrain.data.loader import Loader
from difftrain.data.transform import Transform
from difftrain.denoisers import (
    OF_CLIPS,
    DiffusersDenoiser,
    check_forward,
    num_class_embeddings_in,
    planned_config,
    pretrained_scheduler,
    shape_in,
    without_weights,
)
from difftrain.distributed import num_processes
from difftrain.evaluation.evidence import Need, check_needs
from difftrain.evaluation.features import FeatureExtractor
from difftrain.evaluation.scores import badness
from difftrain.latents import LatentEncoder
from difftrain.objective import Objective
from difftrain.parameterization import Parameterization
from difftrain.recipe import EvaluationSettings, Recipe
from difftrain.registry import InputError, Part, dump, nearest
from difftrain.rng import Rng
from difftrain.rules import check_regularizers
from difftrain.sampling import SampleGenerator, Sampling
from difftrain.schedule import NoiseSchedule
from difftrain.trainer import Training
from difftrain.visits import Scorer

MOST_BYTES = 2**30  # of training images held in memory for an evaluation


class Plan:
    """The parts of one run, built from its recipe; the network comes last, by `denoiser()`."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.training: Training = recipe.training.build()
        self.training.micro_batch_of(num_processes())
        check_trackers(self.training.trackers)
        self.transform: Transform = recipe.transform.build()
        self.sampling: Sampling = recipe.sampling.build()
        self.optimizer = recipe.optimizer.build()
        self.optimizer.build(torch.nn.Linear(1, 1))  # refuses options out of bounds, which only the class knows
        self.schedule, self.parameterization = schedule_and_parameterization(recipe)
        self.objective: Objective = recipe.objective.build(schedule=self.schedule, parameterization=self.parameterization)
        self.objective.timesteps(self.schedule.num_timesteps, Rng(0))
        self.evaluation: EvaluationSettings | None = recipe.evaluation.build() if recipe.evaluation else None
        self.config = planned_config(recipe.model)
        channels, *sides = shape_in(self.config)
        self.data: ImageDataset | ImageStream = recipe.data.build()
        self.num_frames = frames_of(self.data)
        self._check_frames()
        self.shape = (channels, *self._frames, *sides)
        self.encoder: LatentEncoder | None = recipe.encoder.build() if recipe.encoder else None
        self.conditioning = self._conditioning()
        self.generator = SampleGenerator(
            self.sampling, self.schedule, self.parameterization, self.objective.variance, self.conditioning, self.shape, self.encoder
        )
        self._features: FeatureExtractor | None = None
        self._check_guidance()
        self._check_shapes()
        self._check_evaluation()
        skeleton = without_weights(recipe.model.name, self.config)
        check_forward(skeleton, self.shape, self.conditioning.conditions)
        self.objective.noise(torch.zeros(1, *self.shape), Rng(0))  # refuses noise of another kind of data
        batch = (self.training.micro_batch_of(num_processes()), *self.shape)
        check_regularizers(self.objective, self.schedule, batch, skeleton.model, recipe.model.arguments["dtype"])
        self.num_parameters = sum(p.numel() for p in skeleton.parameters())

    def denoiser(self) -> DiffusersDenoiser:
        """The network, with initial weights drawn from the recipe's seed or loaded."""
        with torch.random.fork_rng():
            torch.manual_seed(self.recipe.seed)
            return self.recipe.model.build()

    def loader(self, process_index: int, num_processes: int) -> Loader:
        loading = self.recipe.loader.build()
        return Loader(
            self.data, self.transform, seed=self.recipe.seed, batch_size=self.training.batch_size,
            micro_batch_size=self.training.micro_batch_of(num_processes), process_index=process_index, num_processes=num_processes,
            num_workers=loading.num_workers, on_error=loading.on_error,
        )

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

    def images(self, dataset: Any) -> Images:
        """A reference data set through the run's transform, without random crop and flip."""
        return load_images(dataset, self.transform.deterministic())

    @cached_property
    def training_images(self) -> Images:
        """The training images as evaluations see them: all, or of a large set as many, evenly spread, as MOST_BYTES hold."""
        assert not isinstance(self.data, ImageStream)
        return load_images(self.data, self.transform.deterministic(), limit=max(1, MOST_BYTES // math.prod(self.image_shape)))

    def features(self, folder: Path) -> FeatureExtractor:
        """The recipe's feature extractor, made once; what it trains is kept in `folder`."""
        assert self.evaluation is not None
        if self._features is None:
            given = {"cache": folder, "shape": self.image_shape, "transform": self.transform.deterministic()}
            self._features = self.evaluation.features.build(**given)
        return self._features

    def scorer(
        self, reference: Part, metrics: list[Any], num_samples: int, features_folder: Path, device: torch.device, in_loop: bool = False
    ) -> Scorer:
        """Opens the reference and the feature extractor, before anything is generated. The samples that pick a checkpoint in the loop are
        made from other noise than those of the final score."""
        assert self.evaluation is not None
        generator = self.generator.with_seed(self.sampling.seed + 1) if in_loop else self.generator
        training = None if self.streams else (lambda: self.training_images)
        return Scorer(
            generator, self.features(features_folder), metrics, self.images(reference.build()), training, num_samples,
            self.evaluation.seed, device,
        )

    def _conditioning(self) -> ClassConditioning:
        embeddings = num_class_embeddings_in(self.config)
        num_classes = self._num_classes(embeddings)
        return ClassConditioning(num_classes, embeddings, self.recipe.label_dropout)

    def _num_classes(self, embeddings: int | None) -> int | None:
        """Classes of the data; integer labels without names fill the model's label table."""
        if self.data.class_names is not None:
            return len(self.data.class_names)
        return embeddings - (self.recipe.label_dropout > 0) if embeddings and is_labelled(self.data) else None

    def _check_guidance(self) -> None:
        """A null label that was never trained: a model of one's own must have dropped labels. A pretrained one may have."""
        if self.sampling.guidance != 1.0 and self.recipe.label_dropout == 0 and self.recipe.model.arguments["path"] is None:
            raise InputError(f"sampling.guidance: {self.sampling.guidance}, but label_dropout is 0, so the null label is never trained. "
                             "Write label_dropout: 0.1, or guidance: 1.")

    def _check_frames(self) -> None:
        name, takes_clips = self.recipe.model.name, self.recipe.model.name in OF_CLIPS
        if self.num_frames is not None and not takes_clips:
            raise InputError(f"data: {self.recipe.data.name} holds clips, but the model {name} takes images; "
                             f"write model: {{type: {OF_CLIPS[0]}}}, or a set of images.")
        if self.num_frames is None and takes_clips:
            raise InputError(f"data: {self.recipe.data.name} holds images, but the model {name} takes clips; "
                             "write data: {type: video_folder, ...}, or model: {type: unet2d}.")

    def _check_shapes(self) -> None:
        channels, height, width = shape_in(self.config)
        if self.encoder is not None and self.encoder.pixel_channels != self.transform.channels:
            raise InputError(f"transform.channels: {self.transform.channels}, but the encoder takes {self.encoder.pixel_channels}; "
                             f"write transform: {{channels: {self.encoder.pixel_channels}}}.")
        factor = self.encoder.factor if self.encoder else 1
        side, seen = self.transform.resolution, self.encoder.channels if self.encoder else self.transform.channels
        if (height * factor, width * factor) != (side, side):
            unit = "latents" if self.encoder else "pixels"
            raise InputError(f"transform.resolution: {side}, but the model takes {height}x{width} {unit}; "
                             f"write resolution: {height * factor}, or model: {{config: {{sample_size: {side // factor}}}}}.")
        if seen != channels:
            where, other = ("encoder", "") if self.encoder else ("transform.channels", f"transform: {{channels: {channels}}}, or ")
            raise InputError(f"{where}: {seen} channels, but the model takes {channels}; "
                             f"write {other}model: {{config: {{in_channels: {seen}}}}}.")
        wanted, given = channels * self.objective.variance.output_channels, self.config.get("out_channels") or channels
        if given != wanted:
            other = "learned_range" if given == 2 * channels else "fixed"
            raise InputError(f"model: out_channels is {given}, but variance {dump(self.objective.variance)['type']} needs {wanted}; "
                             f"write model: {{config: {{out_channels: {wanted}}}}}, or objective: {{variance: {{type: {other}}}}}.")

    def _check_evaluation(self) -> None:
        settings = self.evaluation
        if settings is None:
            return
        if self.num_frames is not None:
            raise InputError("evaluation: the data are clips, and there is no metric for videos yet. Leave evaluation out, and look at the "
                             "contact sheets that training: {sample_every: ...} writes.")
        given: set[Need] = {"reference", "pixels"}
        given |= {"training"} if not self.streams else set()
        given |= {"labels"} if self.conditioning.conditions else set()
        given |= {"classifier"} if settings.features.name.endswith("classifier") else set()
        check_needs(settings.metrics, given)
        if settings.features.name == "digits_classifier" and self.image_shape != (1, 8, 8):
            raise InputError(f"evaluation.features: digits_classifier looks at images of 1x8x8, but these are {self.images_in_words}. "
                             "Write features: {type: classifier, data: ...} with labelled images of your own, or {type: pixels}.")
        for own in settings.features.arguments.values():
            if isinstance(own, Part):
                own.build()
        self._open("evaluation.reference", settings.reference)
        loop = settings.in_loop
        if loop is None:
            return
        check_needs(loop.metrics, given)
        self._open("evaluation.in_loop.reference", loop.reference)
        if loop.select is not None:
            check_select(loop.select, loop.metrics)
        if loop.select is not None and loop.reference == settings.reference:
            raise InputError("evaluation.in_loop.reference: the best checkpoint would be picked on the images of the final score. "
                             "Give in_loop another reference (for digits: {type: digits, part: classifier}), or leave select out.")

    def _open(self, key: str, reference: Part) -> None:
        """Refuse a reference that is not there, one of clips, and one that can only be read as a stream."""
        opened = reference.build()
        refuse_clips(opened, key)
        if isinstance(opened, ImageStream):
            raise InputError(f"{key}: a stream has no end, and a reference is read as a whole. Write streaming: false.")


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


def check_trackers(names: list[str]) -> None:
    """Refuse trackers that accelerate does not know, and those whose package is missing: it would leave them out without a word."""
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import LoggerType

    known, installed = [str(name) for name in LoggerType if name != "all"], [str(name) for name in get_available_trackers()]
    for name in set(names) - {"all"}:
        if name not in known:
            raise InputError(f"training.trackers: unknown tracker {name!r}{nearest(name, known)}.")
        if name not in installed:
            raise InputError(f"training.trackers: the package of {name!r} is not installed. Install it, or leave the tracker out.")


def check_select(select: str, metrics: list[Any]) -> None:
    """Refuse a score that none of the metrics gives."""
    known = [score for metric in metrics for score in metric.scores]
    if select not in known:
        raise InputError(f"evaluation.in_loop.select: no metric of in_loop gives {select!r}{nearest(select, known)}.")


def schedule_and_parameterization(recipe: Recipe) -> tuple[NoiseSchedule, Parameterization]:
    """What the recipe states, or what the pretrained pipeline states; both is an error, neither too."""
    config = pretrained_scheduler(recipe.model.arguments.get("path"))
    if config is None:
        if recipe.schedule is None or recipe.parameterization is None:
            missing = "schedule" if recipe.schedule is None else "parameterization"
            example = "{type: linear}" if missing == "schedule" else "epsilon"
            raise InputError(f"{missing}: required, since the model brings none; write {missing}: {example}.")
        return recipe.schedule.build(), recipe.parameterization
    schedule = NoiseSchedule.from_diffusers(config)
    parameterization: Parameterization = "flow_prediction" if schedule.kind == "flow" else config.get("prediction_type", "epsilon")
    if recipe.schedule is not None:
        raise InputError("schedule: the pretrained pipeline states its own; leave the key out, "
                         "or give the path of the model's own folder, without scheduler/.")
    if recipe.parameterization not in (None, parameterization):
        raise InputError(f"parameterization: {recipe.parameterization}, but the pretrained pipeline states {parameterization}; "
                         "leave the key out.")
    return schedule, parameterization


@dataclass(frozen=True)
class Selection:
    """The score by which the best checkpoint is chosen, as a value of which smaller is better."""

    name: str

    def __call__(self, scores: dict[str, dict[str, Any]]) -> float:
        if self.name not in scores:
            raise InputError(f"evaluation.in_loop.select: there is no score {self.name!r}; the metrics give {', '.join(scores)}.")
        return badness(self.name, float(scores[self.name]["value"]))
