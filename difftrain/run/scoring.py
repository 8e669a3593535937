"""Builds what scores a run: features, reference, metrics, and the training images behind floors."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from difftrain.core.console import wing_logger
from difftrain.core.errors import InputError
from difftrain.core.processes import on_all
from difftrain.core.registry import Part, dump
from difftrain.data.items import Dataset, MapDataset
from difftrain.data.unreadable import TRAINING, ReadErrors
from difftrain.evaluation.distances.nearest import bytes_of_one
from difftrain.evaluation.evaluator import MEMORIZATION, Evaluator
from difftrain.evaluation.evidence import Need
from difftrain.evaluation.requirements import (
    check_counts,
    check_directions,
    check_items,
    check_listed_once,
    check_needs,
)
from difftrain.evaluation.slots import FEATURES, METRICS, FeatureExtractor, Metric
from difftrain.evaluation.sources import DatasetImages, DatasetTensors
from difftrain.generation.conditions import Conditions, PromptConditions
from difftrain.recipe.schema import EvaluationSettings, Recipe
from difftrain.run.conditions import ConditionsPlan
from difftrain.run.model import ModelPlan
from difftrain.run.places import Store, open_store
from difftrain.run.same_sets import SameSets
from difftrain.run.scoring_checks import (
    check_classes,
    check_item_shape,
    check_select,
    check_unseen,
    checked_features,
)
from difftrain.training.scores import Scorer

MOST_BYTES = 2**30  # of training images that are held in memory, reduced, for an evaluation
FINAL, IN_LOOP = "evaluation.reference", "evaluation.in_loop.reference"  # keys of the recipe
logger = wing_logger(__name__)


@dataclass
class ScoringPlan:
    """How a run is scored.

    Attributes:
        recipe: The run's recipe.
        model: The run's model.
        settings: The recipe's evaluation block.
        training: The training images; None of a stream, or where they are not there any more.
        errors: What becomes of items that cannot be read.
        missing: Why the training images are not there, if they are not.
        compares_with_itself: Whether the reference holds the training images.
    """

    recipe: Recipe
    model: ModelPlan
    settings: EvaluationSettings
    training: MapDataset | None
    errors: ReadErrors
    missing: str = ""
    compares_with_itself: bool = False
    _features: FeatureExtractor | None = field(default=None, repr=False)
    _store: Store | None = field(default=None, repr=False)
    _conditions: dict[str, Conditions | None] = field(default_factory=dict, repr=False)
    _opened: dict[str, MapDataset] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        model: ModelPlan,
        data: Dataset | None,
        errors: ReadErrors,
        missing: str = "",
    ) -> "ScoringPlan":
        """Open the references, and check that every metric can be computed.

        Args:
            recipe: A recipe with an evaluation block.
            model: The run's model.
            data: The training data; None where it is not there any more.
            errors: What becomes of items that cannot be read.
            missing: Why it is not there.

        Raises:
            InputError: With what to write instead.
        """
        assert recipe.evaluation is not None
        settings: EvaluationSettings = recipe.evaluation.build()
        training = data if isinstance(data, MapDataset) else None
        plan = cls(recipe, model, settings, training, errors, missing)
        plan.check()
        return plan

    def check(self) -> None:
        """Refuse metrics that cannot be computed, before anything is generated."""
        settings, facts = self.settings, self.model.facts
        if facts.items == "clips":
            raise InputError(
                "evaluation: the data are clips, and there is no metric for videos yet. Leave "
                "evaluation out, and look at the contact sheets that training: {sample_every: ...} "
                "writes."
            )
        features: Any = FEATURES.constructors[settings.features.name]
        check_items(settings.features.name, features.takes, "generated", facts.items)
        check_item_shape(settings.features, self.model.item)
        width, preset = checked_features(settings.features, self.model.item)
        given = self.available()
        # The final scores
        check_listed_once(settings.metrics)
        check_directions(settings.metrics)
        check_needs(settings.metrics, given, settings.features.name)
        count = len(self.opened(FINAL, settings.reference))
        counts = {"generated": settings.num_samples, "reference": count}
        check_counts(settings.metrics, counts, width, preset)
        self.conditions(FINAL)
        # The scores in the loop
        self._check_sets()
        loop = settings.in_loop
        if loop is None:
            return
        check_listed_once(loop.metrics)
        check_directions(loop.metrics)
        check_needs(loop.metrics, given, settings.features.name)
        count = len(self.opened(IN_LOOP, loop.reference))
        counts = {"generated": loop.num_samples, "reference": count}
        check_counts(loop.metrics, counts, width, preset)
        self.conditions(IN_LOOP)
        if loop.select is not None:
            check_select(loop.select, loop.metrics)

    def read_references(self) -> None:
        """Read all items of the references, so that no unreadable one is met later. Collective.

        What is left out of them is left out of all scores.

        Raises:
            InputError: On every process, if an item cannot be read, or if those that can are too
                few.
        """
        blocks = {FINAL: self.settings.reference}
        if self.settings.in_loop is not None:
            blocks[IN_LOOP] = self.settings.in_loop.reference
        num_left_out = 0
        for key, block in blocks.items():
            whole = self.opened(key, block)
            self._opened[key] = self.errors.part(whole, key, reads=True)
            num_left_out += len(whole) - len(self._opened[key])
        if num_left_out:
            logger.info(f"references: {num_left_out} items that cannot be read are left out")
            self._conditions.clear()
            on_all(self.check)

    def _check_sets(self) -> None:
        """Refuse sets that are one under two names, where a score would mean little.

        Raises:
            InputError: With what to write instead.
        """
        settings, same = self.settings, SameSets()
        reference = self.opened(FINAL, settings.reference)
        constructor: Any = FEATURES.constructors[settings.features.name]
        learned_from = constructor.learned_from(settings.features.arguments)
        # The training images as reference: the field's habit, but a copy of them scores best.
        self.compares_with_itself = self.training is not None and same(self.training, reference)
        asked = any(MEMORIZATION in metric.scores for metric in settings.metrics)
        if asked and self.compares_with_itself:
            raise InputError(
                f"evaluation.metrics: {MEMORIZATION} compares with held-out images, but reference "
                "holds the training images. Give held-out images as reference, or leave the metric "
                "out."
            )
        # A classifier that knows images by heart
        if learned_from is not None:
            check_classes(settings, learned_from, self.model.facts.class_names)
            check_unseen(settings.features.name, same, learned_from, reference, self.training)
        # The best checkpoint, picked on the images of the final score
        loop = settings.in_loop
        if loop is None or loop.select is None:
            return
        if same(reference, self.opened(IN_LOOP, loop.reference)):
            raise InputError(
                "evaluation.in_loop.reference: the best checkpoint would be picked on the images "
                "of the final score. Give in_loop another reference (for digits: {type: digits, "
                "part: classifier}), or leave select out."
            )

    def available(self) -> set[Need]:
        """Return what metrics can count on."""
        facts, takes_prompts = self.model.facts, self.model.model.takes_prompts
        given: set[Need] = {"reference images"}
        if self.training is not None:
            given.add("training")
            if facts.items == "images":
                given.add("nearest")
        if self.model.conditioning.conditions and not takes_prompts:
            given.add("labels")
        constructor: Any = FEATURES.constructors[self.settings.features.name]
        return given | set(constructor.gives)

    def opened(self, key: str, block: Part) -> MapDataset:
        """Open a reference, once.

        Raises:
            InputError: If it is not of the kind of the samples, or a stream.
        """
        if key not in self._opened:
            self._opened[key] = self._newly_opened(key, block)
        return self._opened[key]

    def _newly_opened(self, key: str, block: Part) -> MapDataset:
        found: Dataset = block.build()
        expected = self.model.facts.items
        if found.items_are != expected:
            raise InputError(
                f"{key}: these are {found.items_are}, but the samples are {expected}. Write a data "
                f"set of {expected}."
            )
        if not isinstance(found, MapDataset):
            raise InputError(
                f"{key}: a stream has no end, and a reference is read as a whole. Write streaming: "
                "false."
            )
        return found

    def conditions(self, key: str) -> Conditions | None:
        """Return what the samples are asked to show, which is found out once.

        Args:
            key: Key of the reference in the recipe: that of the final scores, or in the loop.

        Raises:
            InputError: If `evaluation.labels` cannot be followed.
        """
        if key not in self._conditions:
            settings = self.settings
            block = settings if key == FINAL else settings.in_loop
            assert block is not None
            plan = ConditionsPlan(
                self.model,
                settings.labels,
                key,
                self.opened(key, block.reference),
                self.training,
                self.missing,
                settings.seed,
                self.errors,
            )
            self._conditions[key] = plan.of(block.num_samples)
        return self._conditions[key]

    def source(self, data: MapDataset) -> DatasetImages | DatasetTensors:
        """Return a data set as evaluations see it: without random crop and flip."""
        if self.model.transform is None:
            return DatasetTensors(data)
        return DatasetImages(data, self.model.transform)

    def store(self, run: Path) -> Store:
        """Return where features of data sets are kept, found once. Collective the first time.

        Args:
            run: The run folder, which serves where no other folder can be written to.
        """
        if self._store is None:
            self._store = open_store(self.settings.store, run)
        return self._store

    def features(self, folder: Path, device: torch.device) -> FeatureExtractor:
        """Return the feature extractor, built once.

        Args:
            folder: Where what it trains is kept.
            device: Where it computes.
        """
        if self._features is None:
            transform = self.model.transform
            given = {
                "cache": folder,
                "shape": self.model.item,
                "transform": None if transform is None else transform.deterministic(),
                "device": device,
                "errors": self.errors,
            }
            self._features = self.settings.features.build(**given)
        assert self._features is not None
        return self._features

    def final_scorer(
        self, run: Path, device: torch.device, lora_scale: float | None = None
    ) -> Scorer:
        """Return the scorer of the final scores.

        Args:
            run: The run folder.
            device: Where the network is.
            lora_scale: Scale of the run's LoRA; None: as it was trained.
        """
        settings = self.settings
        return self._scorer(
            run,
            device,
            settings.reference,
            settings.metrics,
            settings.num_samples,
            added_metrics=self.added_metrics(),
            key=FINAL,
            lora_scale=lora_scale,
        )

    def in_loop_scorer(self, run: Path, device: torch.device) -> Scorer:
        """Return the scorer of the scores in the loop, whose samples start from other noise."""
        loop = self.settings.in_loop
        assert loop is not None
        conditions = self.conditions(IN_LOOP)
        if isinstance(conditions, PromptConditions):
            # Known now, their states are kept before text encoders are freed.
            conditions.labels(range(loop.num_samples), self.model.conditioning)
        return self._scorer(
            run,
            device,
            loop.reference,
            loop.metrics,
            loop.num_samples,
            added_metrics=[],
            key=IN_LOOP,
        )

    def added_metrics(self) -> list[Metric]:
        """Return the memorization check, unless the recipe has it already."""
        settings = self.settings
        invited = any(MEMORIZATION in metric.scores for metric in settings.metrics)
        if not settings.memorization or invited or self.compares_with_itself:
            return []
        return [METRICS.parse(MEMORIZATION, "evaluation.metrics").build()]

    def checks_memorization(self) -> bool:
        """Return whether the held-out loss can be compared with the loss on training images."""
        settings = self.settings
        if not settings.memorization or self.training is None:
            return False
        if self.compares_with_itself or self.model.facts.items != "images":
            return False
        if not self.model.conditioning.conditions:
            return True
        reference = self.opened(FINAL, settings.reference)
        if self.model.model.takes_prompts:
            return reference.is_captioned()
        return reference.is_labelled()

    def _scorer(
        self,
        run: Path,
        device: torch.device,
        reference: Part,
        metrics: Sequence[Metric],
        num_samples: int,
        added_metrics: Sequence[Metric],
        key: str,
        lora_scale: float | None = None,
    ) -> Scorer:
        generator = self.model.generator
        if key == IN_LOOP:
            generator = generator.with_seed(generator.sampling.seed + 1)
        store = self.store(run)
        if lora_scale is None and self.model.makes_lora:
            lora_scale = 1.0
        training = None
        if self.training is not None:
            limit = most_images(self.model.item)
            training = self.source(self.errors.part(self.training, TRAINING, limit))
        evaluator = Evaluator(
            self.source(self.opened(key, reference)),
            training,
            self.features(store.classifiers, device),
            metrics,
            Store(run).features,
            self.settings.seed,
            shows_worst=key == FINAL,
            added_metrics=added_metrics,
            why_no_training=self.missing or "there are no training images",
            store=store.features,
        )
        conditions = self.conditions(key)
        if conditions is not None:
            logger.info(f"{num_samples:,} samples to score show {conditions.in_words}")
        return Scorer(
            generator,
            evaluator,
            self.model.item,
            num_samples,
            device,
            conditions,
            lora_scale,
            {"model": dump(self.recipe.model), "encoder": dump(self.recipe.encoder)},
        )


def most_images(item: tuple[int, ...]) -> int | None:
    """Return how many training images are held in memory, reduced; None for tensors: all."""
    return max(1, MOST_BYTES // bytes_of_one(item)) if len(item) == 3 else None
