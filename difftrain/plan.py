"""From a recipe to built parts, with the rules between blocks, each one sentence and one remedy.

Everything that can be refused is refused here, before weights are loaded: the data is opened, shapes and classes are
compared with the model's config, and one batch of timesteps is drawn.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from difftrain.conditioning import ClassConditioning
from difftrain.data.items import ImageDataset, Images, ImageStream, load_images
from difftrain.data.loader import Loader
from difftrain.data.transform import Transform
from difftrain.denoisers import DiffusersDenoiser, num_class_embeddings_in, planned_config, pretrained_scheduler, shape_in
from difftrain.evaluation.evidence import Need, check_needs
from difftrain.evaluation.features import FeatureExtractor
from difftrain.evaluation.scores import badness
from difftrain.latents import LatentEncoder
from difftrain.objective import Objective
from difftrain.parameterization import Parameterization
from difftrain.recipe import EvaluationSettings, Recipe
from difftrain.registry import InputError, Part, dump
from difftrain.rng import Rng
from difftrain.sampling import SampleGenerator, Sampling
from difftrain.schedule import NoiseSchedule
from difftrain.trainer import Training
from difftrain.visits import Scorer


class Plan:
    """The parts of one run, built from its recipe; the network comes last, by `denoiser()`."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.training: Training = recipe.training.build()
        self.transform: Transform = recipe.transform.build()
        self.sampling: Sampling = recipe.sampling.build()
        self.optimizer = recipe.optimizer.build()
        self.schedule, self.parameterization = schedule_and_parameterization(recipe)
        self.objective: Objective = recipe.objective.build(schedule=self.schedule, parameterization=self.parameterization)
        self.objective.timesteps(self.schedule.num_timesteps, Rng(0))
        self.evaluation: EvaluationSettings | None = recipe.evaluation.build() if recipe.evaluation else None
        self.data: ImageDataset | ImageStream = recipe.data.build()
        self.encoder: LatentEncoder | None = recipe.encoder.build() if recipe.encoder else None
        self.config = planned_config(recipe.model)
        self.shape = shape_in(self.config)
        self.conditioning = self._conditioning()
        self.generator = SampleGenerator(
            self.sampling, self.schedule, self.parameterization, self.objective.variance, self.conditioning, self.shape, self.encoder
        )
        self._features: FeatureExtractor | None = None
        self._check_shapes()
        self._check_evaluation()

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
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images that are generated and scored."""
        return self.transform.channels, self.transform.resolution, self.transform.resolution

    def images(self, dataset: Any) -> Images:
        """A reference data set through the run's transform, without random crop and flip."""
        return load_images(dataset, self.transform.deterministic())

    @cached_property
    def training_images(self) -> Images:
        return self.images(self.data)

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
        labelled = not isinstance(self.data, ImageStream) and self.data[0].label is not None
        return embeddings - (self.recipe.label_dropout > 0) if labelled and embeddings else None

    def _check_shapes(self) -> None:
        channels, height, width = self.shape
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
        given: set[Need] = {"reference", "pixels"}
        given |= {"training"} if not self.streams else set()
        given |= {"labels"} if self.conditioning.conditions else set()
        given |= {"classifier"} if settings.features.name.endswith("classifier") else set()
        check_needs(settings.metrics, given)
        loop = settings.in_loop
        if loop is None:
            return
        check_needs(loop.metrics, given)
        if loop.select is not None and loop.reference == settings.reference:
            raise InputError("evaluation.in_loop.reference: the best checkpoint would be picked on the images of the final score. "
                             "Give in_loop another reference (for digits: {type: digits, part: classifier}), or leave select out.")


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
