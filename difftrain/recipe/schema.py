"""What a recipe may say. The keys of each block are the arguments of a constructor.

Each key says whether it touches training: one that does not (`BESIDE_TRAINING`) may change when a
run resumes.
"""

from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal

from difftrain.core.registry import (
    ALL_DEFAULTS,
    BESIDE_TRAINING,
    NonNegativeInt,
    Part,
    PositiveInt,
    Section,
    UnitInterval,
    dump,
)
from difftrain.data.buckets import Buckets
from difftrain.data.cache.building import Cache
from difftrain.data.captions import Captions
from difftrain.data.items import DATASETS
from difftrain.data.transform import Transform
from difftrain.evaluation.slots import FEATURES, METRICS
from difftrain.generation.conditions import Choice
from difftrain.generation.generator import Sampling
from difftrain.models.slots import ADAPTERS, ENCODERS, MODELS
from difftrain.objective.objective import Objective
from difftrain.objective.parameterization import Parameterization
from difftrain.objective.schedule import SCHEDULES
from difftrain.recipe.yaml_text import write_yaml
from difftrain.training.callbacks import CALLBACKS
from difftrain.training.ema import EMAS
from difftrain.training.lr import LEARNING_RATES
from difftrain.training.optimizers import Optimizer
from difftrain.training.prior import Prior
from difftrain.training.settings import Training


@dataclass(frozen=True)
class Loading:
    """How the data loader reads.

    Args:
        num_workers: Processes that read ahead; 0 reads in the training process.
        on_error: "stop" ends the run at an unreadable image. "skip" takes the next readable image
            in its place, and records the unreadable one in skipped.jsonl.
    """

    num_workers: Annotated[NonNegativeInt, BESIDE_TRAINING] = 0
    on_error: Literal["stop", "skip"] = "stop"


@dataclass(frozen=True)
class InLoop:
    """Evaluation during training.

    Args:
        every: Steps between two evaluations.
        num_samples: Generated samples.
        reference: Real images to compare with. With `select` they must not be those of the final
            scores.
        metrics: The scores.
        select: The score that picks the best checkpoint; None picks none.
    """

    every: PositiveInt
    num_samples: PositiveInt
    reference: Annotated[Part, DATASETS]
    metrics: Annotated[list[Any], METRICS]
    select: str | None = None


@dataclass(frozen=True)
class EvaluationSettings:
    """The final scores.

    Args:
        features: Turns images into feature vectors.
        reference: Real images to compare with.
        metrics: The scores.
        num_samples: Generated samples.
        in_loop: Evaluation during training.
        labels: What the samples are asked to show. "reference": each class has its share of the
            reference, exactly; a model that takes prompts gets the captions of the reference, each
            once, and then in turn, as training sees them. "training": the same of the training
            data. "uniform": each class as often as any other. "in_turn": the classes by the index
            of the sample, or `sampling.prompts`. None: reference where it has labels or captions,
            else training, else in_turn. The protocol says which.
        seed: Seed of the order of the labels, of the metrics' random subsets, and of the splits of
            the real samples that give each score's floor.
        memorization: Whether to look for the nearest training images too, unless the reference is
            the training set. If that is not possible, evaluation.json says why.
        store: A folder for features of data sets, which several runs and machines can share; None
            takes DIFFTRAIN_CACHE, else ~/.cache/difftrain.
    """

    features: Annotated[Part, FEATURES]
    reference: Annotated[Part, DATASETS]
    metrics: Annotated[list[Any], METRICS]
    num_samples: PositiveInt = 10_000
    in_loop: Annotated[Any | None, Section(InLoop)] = None
    labels: Choice | None = None
    seed: NonNegativeInt = 0
    memorization: bool = True
    store: str | None = None


@dataclass(frozen=True)
class Validation:
    """The denoising loss on held-out images, by noise level, always with the same noise.

    Args:
        data: The held-out images.
        every: Steps between two measurements.
        num: Number of images.
        num_timesteps: Number of noise levels.
    """

    data: Annotated[Part, DATASETS]
    every: PositiveInt
    num: PositiveInt = 64
    num_timesteps: PositiveInt = 10


@dataclass(frozen=True)
class Recipe:
    """One run.

    Args:
        output: The run folder.
        model: The network.
        data: What it is trained on.
        training: How long, and in what batches.
        sampling: How samples are generated.
        transform: How an image becomes pixels; left out for data sets of tensors.
        seed: Seed of all random draws.
        imports: Modules of your own whose registered parts the recipe names.
        schedule: The noise schedule; left out when a pretrained model states it.
        parameterization: What the network outputs; left out when a pretrained model states it.
        objective: The loss.
        adapter: What trains of the network; None trains all of it.
        label_dropout: The probability with which a class label is dropped in training.
        captions: How captions are shown to the network.
        cache: Latents and states of captions that are encoded once.
        buckets: Sizes for images of several aspect ratios.
        encoder: Turns pixels into latents; a pretrained pipeline brings its own.
        loader: How the data loader reads.
        optimizer: The optimizer.
        lr_schedule: Factor on the learning rate as a function of the step.
        ema: The running average of the weights; None keeps none.
        prior: Samples of the base model that are trained on too.
        validation: The loss on held-out images.
        evaluation: The scores.
        callbacks: What else happens at regular steps.
        license: The license of the result, which is written into its files.
    """

    output: Annotated[str, BESIDE_TRAINING]
    model: Annotated[Part, MODELS]
    data: Annotated[Part, DATASETS]
    training: Annotated[Part, Section(Training)]
    sampling: Annotated[Part, Section(Sampling), BESIDE_TRAINING]
    transform: Annotated[Part | None, Section(Transform)] = None
    seed: NonNegativeInt = 0
    imports: Annotated[list[str], BESIDE_TRAINING] = field(default_factory=list)
    schedule: Annotated[Part | None, SCHEDULES] = None
    parameterization: Parameterization | None = None
    objective: Annotated[Part, Section(Objective)] = ALL_DEFAULTS
    adapter: Annotated[Part | None, ADAPTERS] = None
    label_dropout: UnitInterval = 0.0
    captions: Annotated[Part | None, Section(Captions)] = None
    cache: Annotated[Part | None, Section(Cache)] = None
    buckets: Annotated[Part | None, Section(Buckets)] = None
    encoder: Annotated[Part | None, ENCODERS] = None
    loader: Annotated[Part, Section(Loading)] = ALL_DEFAULTS
    optimizer: Annotated[Part, Section(Optimizer)] = ALL_DEFAULTS
    lr_schedule: Annotated[Part, LEARNING_RATES] = "constant"  # type: ignore[assignment]
    ema: Annotated[Part | None, EMAS] = None
    prior: Annotated[Part | None, Section(Prior)] = None
    validation: Annotated[Part | None, Section(Validation), BESIDE_TRAINING] = None
    evaluation: Annotated[Part | None, Section(EvaluationSettings), BESIDE_TRAINING] = None
    callbacks: Annotated[list[Part], CALLBACKS, BESIDE_TRAINING] = field(default_factory=list)
    license: Annotated[str | None, BESIDE_TRAINING] = None

    def dump(self) -> dict[str, Any]:
        """Return plain data with every default written out; it loads to this recipe again."""
        return {f.name: dump(getattr(self, f.name)) for f in fields(self)}

    def to_yaml(self) -> str:
        """Return `dump()` as YAML."""
        return write_yaml(self.dump())
