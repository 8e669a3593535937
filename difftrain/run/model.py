"""Builds the model of a run: what sampling, merging and exporting need, and training too.

It needs the recipe and the facts of the data, but no data, no reference and no optimizer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from difftrain.core.errors import InputError
from difftrain.core.registry import Part
from difftrain.data.captions import Captions
from difftrain.data.transform import Transform
from difftrain.generation.generator import SampleGenerator, Sampling
from difftrain.models.adapters import Adapter, adapt, describe, trainable
from difftrain.models.autoencoder import LatentEncoder
from difftrain.models.conditioning.base import Conditioning
from difftrain.models.model import ConditioningRequest, DenoiserNetwork, Model, Stated
from difftrain.models.own import open_model
from difftrain.objective.parameterization import Parameterization
from difftrain.objective.schedule import NoiseSchedule
from difftrain.objective.slots import VARIANCES, Variance
from difftrain.recipe.schema import Recipe
from difftrain.run.facts import DataFacts
from difftrain.training.batches import Preparation

# The blocks of a recipe that a ModelPlan reads.
BLOCKS = frozenset(
    {
        "output",
        "model",
        "adapter",
        "encoder",
        "schedule",
        "parameterization",
        "sampling",
        "transform",
        "label_dropout",
        "captions",
        "seed",
        "imports",
        "license",
    }
)


@dataclass(frozen=True)
class ModelPlan:
    """A run's model with everything that belongs to it; the network comes last, by `denoiser()`.

    Attributes:
        recipe: The run's recipe, of which the blocks in `BLOCKS` are checked.
        facts: What is known of the data.
        model: The model.
        adapter: What trains of it; None: all of it.
        transform: How an image becomes pixels; None for tensors.
        item: Shape of one item: (C, H, W), (C, F, H, W), or that of a tensor.
        shape: Shape of one x_t.
        schedule: The noise schedule.
        parameterization: What the network outputs.
        variance: The reverse variance.
        encoder: The autoencoder of a latent model.
        conditioning: What the network is conditioned on.
        generator: Generates samples.
        captions: How captions are shown; None without a model that takes prompts.
        prompts: Prompts of grids and of samples that nobody asks otherwise.
        skeleton: The network without weights, with its adapter.
        num_parameters: Parameters of the network.
        num_trained: Parameters that train.
        trains: What trains, in one line.
    """

    recipe: Recipe
    facts: DataFacts
    model: Model
    adapter: Adapter | None
    transform: Transform | None
    item: tuple[int, ...]
    shape: tuple[int, ...]
    schedule: NoiseSchedule
    parameterization: Parameterization
    variance: Variance
    encoder: LatentEncoder | None
    conditioning: Conditioning
    generator: SampleGenerator
    captions: Captions | None
    prompts: Sequence[str]
    skeleton: DenoiserNetwork
    num_parameters: int
    num_trained: int
    trains: str

    @classmethod
    def of(cls, recipe: Recipe, facts: DataFacts) -> "ModelPlan":
        """Build the model of a recipe, without its weights.

        Args:
            recipe: The recipe.
            facts: What is known of the data.

        Raises:
            InputError: If blocks of the recipe do not fit each other, with what to write instead.
        """
        model = open_model(recipe.model)
        adapter: Adapter | None = None if recipe.adapter is None else recipe.adapter.build()
        transform: Transform | None = None if recipe.transform is None else recipe.transform.build()
        sampling: Sampling = recipe.sampling.build()
        trains_text = adapter is not None and adapter.trains_text
        # What items look like, and whether the model takes them
        check_items(recipe, model, facts)
        check_text(recipe, model)
        if adapter is not None and adapter.makes_lora:
            model.check_lora()
        item = item_shape(facts, transform)
        model.check_item(item)
        encoder: LatentEncoder | None = (
            model.encoder() if recipe.encoder is None else recipe.encoder.build()
        )
        shape = model.input_shape(item, encoder)
        variance = variance_of(recipe)
        model.check_variance(variance)
        captions = captions_of(recipe, model)
        prompts = prompts_of(sampling, facts, captions)
        # Noise levels, conditioning, sampling
        schedule, parameterization = schedule_and_parameterization(recipe, model.stated(shape))
        request = ConditioningRequest(
            is_labelled=facts.is_labelled,
            num_classes=None if facts.class_names is None else len(facts.class_names),
            label_dropout=recipe.label_dropout,
            prompts=prompts,
            size=None if transform is None else (transform.resolution, transform.resolution),
            trains_text=trains_text,
            item_cond=facts.item_cond,
        )
        conditioning = model.conditioning(request)
        generator = SampleGenerator(
            sampling,
            schedule,
            parameterization,
            variance,
            conditioning,
            shape,
            encoder,
            spaces_sigmas_evenly=model.spaces_sigmas_evenly,
            items=facts.items,
        )
        model.check_guidance(sampling.guidance, recipe.label_dropout)
        # The network without weights
        skeleton = model.skeleton(trains_text)
        model.check_forward(skeleton, shape, conditioning, variance)
        num_parameters = sum(p.numel() for p in skeleton.parameters())
        adapt(skeleton, adapter)
        trained = trainable(skeleton)
        return cls(
            recipe=recipe,
            facts=facts,
            model=model,
            adapter=adapter,
            transform=transform,
            item=item,
            shape=shape,
            schedule=schedule,
            parameterization=parameterization,
            variance=variance,
            encoder=encoder,
            conditioning=conditioning,
            generator=generator,
            captions=captions,
            prompts=prompts,
            skeleton=skeleton,
            num_parameters=num_parameters,
            num_trained=sum(p.numel() for p in trained.values()),
            trains=describe(skeleton),
        )

    def denoiser(self) -> DenoiserNetwork:
        """Return the network, with its adapter.

        Weights that are not pretrained are drawn from the recipe's seed.
        """
        with torch.random.fork_rng():
            torch.manual_seed(self.recipe.seed)
            denoiser = self.model.denoiser(self.trains_text)
            adapt(denoiser, self.adapter)
            return denoiser

    @property
    def preparation(self) -> Preparation:
        """What turns the loader's micro-batches into batches."""
        return Preparation(self.conditioning, self.encoder)

    @property
    def trains_text(self) -> bool:
        """Whether text encoders train."""
        return self.adapter is not None and self.adapter.trains_text

    @property
    def makes_lora(self) -> bool:
        """Whether the result is a LoRA beside its base model."""
        return self.adapter is not None and self.adapter.makes_lora

    @property
    def item_in_words(self) -> str:
        """The shape of one item, such as "3x32x32"."""
        return "x".join(map(str, self.item))


def variance_of(recipe: Recipe) -> Variance:
    """Return the reverse variance, also of a recipe whose objective was not checked."""
    objective: Any = recipe.objective
    arguments: Mapping[str, Any] = (
        objective.arguments if isinstance(objective, Part) else objective or {}
    )
    given: Any = arguments.get("variance", "fixed")
    if not isinstance(given, (str, dict, Part)):  # the objective's default
        return cast(Variance, given)
    return cast(Variance, VARIANCES.parse(given, "objective.variance").build())


def captions_of(recipe: Recipe, model: Model) -> Captions | None:
    """Return how captions are shown; None for a model that takes no prompts."""
    if not model.takes_prompts:
        return None
    captions: Captions = Captions() if recipe.captions is None else recipe.captions.build()
    return captions


def prompts_of(sampling: Sampling, facts: DataFacts, captions: Captions | None) -> Sequence[str]:
    """Return the prompts of grids: the recipe's, or captions of the data as training sees them."""
    if captions is None:
        return ()
    return sampling.prompts or [captions.in_samples(caption) for caption in facts.prompts]


def item_shape(facts: DataFacts, transform: Transform | None) -> tuple[int, ...]:
    """Return the shape of one item as the loader gives it."""
    if facts.item_shape is not None:
        return facts.item_shape
    assert transform is not None
    side = transform.resolution
    if facts.num_frames is None:
        return (transform.channels, side, side)
    return (transform.channels, facts.num_frames, side, side)


def schedule_and_parameterization(recipe: Recipe, stated: Stated | None) -> Stated:
    """Return what the recipe states, or what pretrained weights were made for.

    Raises:
        InputError: If neither states one of them, if the recipe gives a schedule although the model
            states its own, or if their parameterizations differ.
    """
    if stated is None:
        if recipe.schedule is None:
            raise InputError(
                "schedule: required, because the model does not state one. Write schedule: "
                "{type: linear}."
            )
        if recipe.parameterization is None:
            raise InputError(
                "parameterization: required, because the model does not state one. Write "
                "parameterization: epsilon."
            )
        return recipe.schedule.build(), recipe.parameterization
    if recipe.schedule is not None:
        raise InputError(
            "schedule: the pretrained pipeline states its own. Leave the key out. For a network "
            "of diffusers, model.path may also be the network's own folder, such as PIPELINE/unet."
        )
    if recipe.parameterization not in (None, stated[1]):
        raise InputError(
            f"parameterization: {recipe.parameterization}, but the pretrained pipeline states "
            f"{stated[1]}. Leave the key out."
        )
    return stated


# Rules between blocks


def check_items(recipe: Recipe, model: Model, facts: DataFacts) -> None:
    """Refuse items of a kind that the model does not take, and a transform without images."""
    model.check_kind(facts.items, data_name(recipe))
    if facts.items == "tensors" and recipe.transform is not None:
        raise InputError(
            "transform: the data set yields tensors, which no transform touches. Leave it out."
        )
    if facts.items != "tensors" and recipe.transform is None:
        raise InputError(
            f"transform: required, but not given: the data set yields {facts.items}. Write "
            "transform: {resolution: 32}."
        )


def check_text(recipe: Recipe, model: Model) -> None:
    """Refuse settings of prompts that have no effect, and an empty list of prompts."""
    prompts = sampling_prompts(recipe)
    if not model.takes_prompts:
        without_effect = {"captions": recipe.captions, "sampling.prompts": prompts}
        for key, value in without_effect.items():
            if value is not None:
                raise InputError(
                    f"{key}: the model {model.name} takes no prompts, so this has no effect. Leave "
                    "it out, or write model: {type: stable_diffusion, path: ...}."
                )
        return
    if prompts == []:
        raise InputError(
            "sampling.prompts: the list is empty. Write some prompts, or leave the key out to use "
            "captions of the data."
        )


def data_name(recipe: Recipe) -> str:
    """Return the registered name of the recipe's data set, also where the block was not checked."""
    data: Any = recipe.data
    return data.name if isinstance(data, Part) else str(data.get("type", data))


def sampling_prompts(recipe: Recipe) -> list[str] | None:
    """Return the prompts that the recipe names for samples."""
    prompts: list[str] | None = recipe.sampling.arguments["prompts"]
    return prompts
