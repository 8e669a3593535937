"""`Model`: what a recipe's `model:` block stands for, whatever kind of network is behind it.

A network from a config, a network from a folder, a pretrained pipeline and a network of the user's
own answer the same questions here, so no caller asks which one it holds. Opening a model reads
names and configs; weights are read, or randomly initialized, when a network is asked for.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from difftrain.core.errors import InputError
from difftrain.data.items import ItemKind
from difftrain.models.autoencoder import LatentEncoder
from difftrain.models.conditioning.base import Conditioning
from difftrain.models.lora.formats import LoraFormat
from difftrain.models.pipelines.text_encoders import PromptTokenizer, TextEncoders
from difftrain.models.slots import MODELS
from difftrain.objective.parameterization import Parameterization
from difftrain.objective.schedule import NoiseSchedule
from difftrain.objective.slots import Variance
from difftrain.objective.types import Cond

DType = Literal["float32", "float64", "bfloat16"]
Stated = tuple[NoiseSchedule, Parameterization]


def stated_by(scheduler: Mapping[str, Any], sequence_length: int | None = None) -> Stated:
    """Return the noise schedule and parameterization that a diffusers scheduler states.

    Args:
        scheduler: The scheduler's config.
        sequence_length: Tokens of an image, for flow schedules that shift with the resolution.
    """
    schedule = NoiseSchedule.from_diffusers(scheduler, sequence_length)
    if schedule.kind == "flow":
        return schedule, "flow_prediction"
    return schedule, scheduler.get("prediction_type", "epsilon")


class DenoiserNetwork(nn.Module, ABC):
    """A network called as (x_t [B, ...], time [B], cond) -> output [B, ...].

    The output has the shape of x_t, or twice its channels where a variance is learned.

    Args:
        model: The network itself, as other programs know it: a diffusers model, or the user's
            module.
        text: Text encoders that train together with the network, if any do.

    Attributes:
        rest_dtype: The precision of most layers, where an adapter made some of them float32.
        lora_format: How LoRA files of the network are read and named.
    """

    lora_format: LoraFormat = LoraFormat()

    def __init__(self, model: nn.Module, text: TextEncoders | None = None):
        super().__init__()
        self.model = model
        self.text: TextEncoders | None = text
        self.rest_dtype: torch.dtype | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the network's input."""
        return self.rest_dtype or next(self.model.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where the network's weights are."""
        return next(self.model.parameters()).device

    @property
    def folder(self) -> str:
        """The network's folder in a pipeline, which is the prefix of its keys in a LoRA file."""
        return "transformer" if "Transformer" in type(self.model).__name__ else "unet"

    def parts(self) -> dict[str, nn.Module]:
        """Return the network and the text encoders that train with it, by folder in a pipeline."""
        own = {self.folder: self.model}
        return own if self.text is None else {**own, **self.text.by_folder()}

    def in_precision(self, cond: Cond) -> Cond:
        """Return conditioning with its floating-point tensors in the network's precision."""
        given = dict(cond)
        for name, value in cond.items():
            if value.is_floating_point():
                given[name] = value.to(self.dtype)
        return given

    def encoded(self, cond: Cond) -> Cond:
        """Replace token ids in a conditioning by what text encoders that train make of them."""
        return cond

    @abstractmethod
    def forward(self, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """Predict from x_t [B, ...] at time [B]."""


@dataclass(frozen=True)
class ConditioningRequest:
    """What a run says about conditioning, when it asks a model for its `Conditioning`.

    Args:
        is_labelled: Whether the data has labels.
        num_classes: Classes of the data, where they are known.
        label_dropout: The probability with which a label is dropped in training.
        item_cond: The conditioning tensors that one item of the data brings itself, without the
            batch's dimension.
        prompts: Prompts of generated samples, for models that take prompts.
        size: (height, width) in pixels of generated images; None where samples are not images.
        trains_text: Whether text encoders train.
    """

    is_labelled: bool = False
    num_classes: int | None = None
    label_dropout: float = 0.0
    item_cond: Cond | None = None
    prompts: Sequence[str] = ()
    size: tuple[int, int] | None = None
    trains_text: bool = False


@dataclass(frozen=True)
class ExportParts:
    """What a saved pipeline holds apart from the network.

    Args:
        encoder: The autoencoder of a latent model.
        schedule: The noise schedule.
        conditions: Whether the network is conditioned on anything.
        scheduler: Gives the diffusers scheduler that fits a pipeline class ("" for none).
        about: Facts for the headers of the weights' files.
        recipe: The run's recipe, as YAML.
    """

    encoder: LatentEncoder | None
    schedule: NoiseSchedule
    conditions: bool
    scheduler: Callable[[str], Any]
    about: Mapping[str, str]
    recipe: str


class Model(ABC):
    """A network that can be trained, before its weights are there.

    Attributes:
        name: Its registered name, which is the recipe's `model: type`.
        items: The kinds of items that it can be trained on.
        takes_prompts: Whether it is conditioned on prompts rather than on classes.
        spaces_sigmas_evenly: Whether a flow sampler starts from evenly spaced noise levels, as its
            diffusers pipeline does, rather than from its scheduler's own.
        pipeline_class: The diffusers pipeline that it is a part of, where one class alone fits.
        path: Where its pretrained weights are; None for a randomly initialized network.
        dtype: The precision of its weights, by torch's name.
    """

    name: str
    items: ClassVar[frozenset[ItemKind]] = frozenset({"images"})
    takes_prompts: ClassVar[bool] = False
    spaces_sigmas_evenly: ClassVar[bool] = False
    pipeline_class: ClassVar[str] = ""
    path: str | None
    dtype: str

    # What it takes

    @property
    def size_multiple(self) -> int | None:
        """Pixels of which an image's sides must be multiples; None for a model of one size."""
        return None

    def check_kind(self, kind: ItemKind, data: str) -> None:
        """Refuse data of a kind that the model does not take.

        Args:
            kind: What the items are.
            data: The registered name of the data set, for messages.

        Raises:
            InputError: If the model is for items of another kind.
        """
        if kind in self.items:
            return
        fitting = [name for name, model in models().items() if kind in model.items]
        instead = "a registered network of your own"
        if fitting:
            instead = f"model: {{type: {fitting[0]}}}"
        takes = " or ".join(sorted(self.items))
        raise InputError(
            f"data: {data} holds {kind}, but the model {self.name} takes {takes}. Write {instead}, "
            f"or a data set of {takes}."
        )

    def check_item(self, item: tuple[int, ...]) -> None:
        """Refuse items that the model cannot take, at no cost.

        Args:
            item: Shape of one item: (C, H, W) or (C, F, H, W) in pixels, or that of a tensor.

        Raises:
            InputError: If no encoder could make the item fit.
        """

    @abstractmethod
    def input_shape(self, item: tuple[int, ...], encoder: LatentEncoder | None) -> tuple[int, ...]:
        """Return the shape of one x_t.

        Args:
            item: Shape of one item, as for `check_item`.
            encoder: What turns pixels into latents, if the run has one.

        Raises:
            InputError: If the network does not take what the encoder makes of such an item.
        """

    def check_variance(self, variance: Variance) -> None:
        """Refuse a reverse variance that the network's output has no channels for.

        Raises:
            InputError: If the network does not predict that variance.
        """

    def check_guidance(self, guidance: float, label_dropout: float) -> None:
        """Refuse guidance by a null label that is never trained; a pretrained one may be trained.

        Args:
            guidance: The strength of classifier-free guidance; 1 for none.
            label_dropout: The probability with which a label is dropped in training.

        Raises:
            InputError: If guidance is on, and neither this run nor an earlier one drops labels.
        """
        if guidance != 1.0 and label_dropout == 0 and self.path is None:
            raise InputError(
                f"sampling.guidance: {guidance}, but label_dropout is 0, so the null label is "
                "never trained. Write label_dropout: 0.1, or guidance: 1."
            )

    def check_lora(self) -> None:
        """Refuse a LoRA on random weights, which nobody who has the LoRA file could have.

        Raises:
            InputError: If the network is randomly initialized.
        """
        if self.path is None:
            raise InputError(
                "adapter: a LoRA file needs the model that it was trained on, but this model is "
                "randomly initialized. Leave adapter out, or write model: {path: ...}."
            )

    # What it states

    def stated(self, shape: tuple[int, ...]) -> Stated | None:
        """Return the noise schedule and parameterization that pretrained weights were made for.

        Args:
            shape: Shape of one x_t; some flow schedules shift with it.

        Returns:
            Both, or None where the model states neither.
        """
        return None

    def encoder(self) -> LatentEncoder | None:
        """Return the autoencoder that comes with the model, if one does."""
        return None

    @abstractmethod
    def conditioning(self, request: ConditioningRequest) -> Conditioning:
        """Return what the network is conditioned on.

        Raises:
            InputError: If data and network do not fit each other.
        """

    # Text, for models that take prompts

    @property
    def tokenizer(self) -> PromptTokenizer | None:
        """The tokenizers of a model that takes prompts."""
        return None

    @property
    def text(self) -> TextEncoders | None:
        """The frozen text encoders, read when they are first asked for."""
        return None

    def release_text(self) -> None:
        """Free the frozen text encoders; they are read again when they are asked for again."""

    # Networks

    @abstractmethod
    def skeleton(self, trains_text: bool = False) -> DenoiserNetwork:
        """Return the network on the meta device: it has shapes and takes no memory.

        Args:
            trains_text: Whether its text encoders belong to it, because they train.
        """

    @abstractmethod
    def denoiser(self, trains_text: bool = False) -> DenoiserNetwork:
        """Return the network with its weights.

        They are pretrained, or randomly initialized by torch's global generator.

        Args:
            trains_text: Whether its text encoders belong to it, because they train.
        """

    def check_forward(
        self,
        skeleton: DenoiserNetwork,
        shape: tuple[int, ...],
        conditioning: Conditioning,
        variance: Variance,
    ) -> None:
        """Refuse a network that cannot take x_t of this shape, found out without weights.

        Args:
            skeleton: What `skeleton` returns, without an adapter.
            shape: Shape of one x_t.
            conditioning: What the network is conditioned on.
            variance: The reverse variance, which says how many channels the output has.

        Raises:
            InputError: With what the network itself says about it.
        """

    # Files

    @abstractmethod
    def save(
        self,
        denoiser: DenoiserNetwork,
        folder: Path,
        parts: ExportParts,
        encoders: Mapping[str, nn.Module] | None = None,
    ) -> None:
        """Write what other programs load: a diffusers pipeline, or as much of one as there is.

        Args:
            denoiser: The trained network.
            folder: An empty folder.
            parts: What belongs into the folder apart from the network.
            encoders: Text encoders that changed without being the denoiser's own, by folder.
        """

    def with_lora(self, denoiser: DenoiserNetwork, lora: Path) -> DenoiserNetwork:
        """Load the base model again and a LoRA into it, the way that other programs do.

        Args:
            denoiser: The trained network, whose device and precision the result has.
            lora: The folder of the LoRA file.

        Raises:
            InputError: If the model has no pretrained base.
        """
        raise InputError(f"model {self.name!r} has no pretrained base to load a LoRA into.")

    @property
    def loaded_by(self) -> str:
        """What a message calls the result of `with_lora`, such as "fresh FluxPipeline"."""
        return "freshly loaded model"


def models() -> dict[str, type[Model]]:
    """Return the registered classes of models by name; networks of the user's own are left out."""
    found = {}
    for name, constructor in MODELS.constructors.items():
        if isinstance(constructor, type) and issubclass(constructor, Model):
            found[name] = constructor
    return found
