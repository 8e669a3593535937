"""`TextToImageModel`: a pretrained text-to-image pipeline of diffusers as a model to fine-tune.

A family of pipelines is a subclass in a file of its own, which states everything particular to the
family. What the pipeline states (schedule, parameterization, latent scale) is read from it.
"""

import functools
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from difftrain.core.errors import InputError
from difftrain.models.autoencoder import LatentEncoder
from difftrain.models.conditioning.prompts import TextConditioning
from difftrain.models.denoisers import DiffusersDenoiser
from difftrain.models.diffusers_classes import Config, built, by_sides
from difftrain.models.files import add_metadata
from difftrain.models.lora.files import FILE
from difftrain.models.lora.formats import LoraFormat
from difftrain.models.model import (
    ConditioningRequest,
    DenoiserNetwork,
    DType,
    ExportParts,
    Model,
    Stated,
    stated_by,
)
from difftrain.models.pipelines.pretrained import KeyPrefixes, PretrainedPipeline
from difftrain.models.pipelines.text_encoders import (
    Encoders,
    Ids,
    PromptTokenizer,
    TextEncoders,
    Tower,
    token_ids,
)
from difftrain.objective.slots import Variance
from difftrain.objective.types import Cond

# How the keys of an autoencoder begin in a single file, whatever the family.
VAE_KEYS = ("first_stage_model.", "vae.")


@dataclass(eq=False)
class TextToImageModel(Model):
    """A pretrained text-to-image pipeline; opening one reads names and configs.

    A family defines `states` and `call`, and the attributes below.

    Args:
        path: A local pipeline folder, a hub id, or a single .safetensors file.
        config: For a single file, the pipeline folder (or hub id in the local cache) with its
            configs and tokenizers, and with the components that the file lacks.
        dtype: Precision of the network's weights that do not train; what trains is float32.
        text_dtype: Precision of the text encoders that do not train.
        gradient_checkpointing: Whether to compute activations again in the backward pass, which
            saves memory.

    Attributes:
        pipeline_class: The pipeline's class in diffusers.
        network_class: The network's class in diffusers.
        network_folder: The network's folder in the pipeline.
        blocks: Classes of the network's layers that FSDP wraps one by one.
        key_prefixes: How the keys of each component begin in a single file.
        lora_format: How LoRA files of the family are read and named.
        size_conditioning: Whether the network takes the sizes of the image.
        towers: The text encoders.
        network_config: The network's config.

    Raises:
        InputError: If there is no pipeline at `path`, or one of another family.
    """

    path: str
    config: str | None = None
    dtype: DType = "float32"
    text_dtype: DType = "float32"
    gradient_checkpointing: bool = False

    takes_prompts = True
    network_class: ClassVar[str]
    network_folder: ClassVar[str]
    blocks: ClassVar[Sequence[str]]
    key_prefixes: ClassVar[KeyPrefixes]
    lora_format: ClassVar[LoraFormat] = LoraFormat()
    size_conditioning: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.pipeline = PretrainedPipeline(self.path, self.config, self.key_prefixes)
        self.pipeline.expect(self.pipeline_class, self.name)
        self.network_config: Config = self.pipeline.config(self.network_folder)

    # What a family states

    @property
    @abstractmethod
    def towers(self) -> Sequence[Tower]:
        """The text encoders."""

    @abstractmethod
    def states(self, encoders: Encoders, ids: Ids) -> Cond:
        """Return the conditioning of prompts.

        Args:
            encoders: The text encoders by folder.
            ids: Token ids [B, L] by folder of the encoder.

        Returns:
            Tensors [B, ...] by name, as `call` reads them.
        """

    @abstractmethod
    def call(self, model: nn.Module, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """Return the network's prediction [B, C, H, W].

        Args:
            model: The network of diffusers.
            x_t: Noised latents [B, C, H, W].
            time: Time [B] of the noise schedule, in its own precision.
            cond: Conditioning tensors [B, ...] in the network's precision.
        """

    @property
    def patch(self) -> int:
        """Number of latents of which the sides of x_t must be multiples."""
        return 1

    @property
    def latent_channels(self) -> int:
        """Channels of x_t."""
        return int(self.network_config["in_channels"])

    @property
    def most_latents(self) -> int | None:
        """The longest side of x_t that the network takes; None without a limit."""
        return None

    @property
    def guidance_input(self) -> tuple[float, float] | None:
        """The guidance that the network takes as an input, (in training, in sampling).

        None for a network that was not distilled with guidance.
        """
        return None

    # What it takes

    @property
    def factor(self) -> int:
        """Pixels of one latent along one side."""
        return int(2 ** (len(self.pipeline.config("vae")["block_out_channels"]) - 1))

    @property
    def size_multiple(self) -> int:
        """Pixels of which an image's sides must be multiples."""
        return self.factor * self.patch

    def check_item(self, item: tuple[int, ...]) -> None:
        """Refuse images of a size or number of channels that the pipeline cannot take.

        Args:
            item: Shape (C, H, W) of an image, in pixels.

        Raises:
            InputError: With the nearest sizes that it takes.
        """
        channels, *sides = item
        expected = self.pipeline.config("vae")["in_channels"]
        if channels != expected:
            raise InputError(
                f"transform.channels: {channels}, but the pipeline's images have {expected}. Write "
                f"channels: {expected}."
            )
        for side in sides:
            self._check_side(side)

    def _check_side(self, side: int) -> None:
        multiple = self.size_multiple
        most = None if self.most_latents is None else self.most_latents * self.factor
        if side % multiple == 0 and (most is None or side <= most):
            return
        fitting = []
        for candidate in (side // multiple * multiple, (side // multiple + 1) * multiple):
            if candidate and (most is None or candidate <= most):
                fitting.append(candidate)
        limit = "" if most is None else f" up to {most}"
        remedy = " or ".join(map(str, fitting or [most or multiple]))
        raise InputError(
            f"transform.resolution: {side}, but {self.name} takes multiples of {multiple} pixels"
            f"{limit}. Write resolution: {remedy}."
        )

    def input_shape(self, item: tuple[int, ...], encoder: LatentEncoder | None) -> tuple[int, ...]:
        """Return the shape (C, H, W) of one x_t.

        Args:
            item: Shape (C, H, W) of an image, in pixels.
            encoder: What turns pixels into latents; None before it is loaded.

        Raises:
            InputError: If the image does not fit, or the encoder makes other latents.
        """
        self.check_item(item)
        _, height, width = item
        shape = (self.latent_channels, height // self.factor, width // self.factor)
        if encoder is None:
            return shape
        latents = encoder.latent_shape(item)
        if latents != shape:
            raise InputError(
                f"encoder: it makes latents of {by_sides(latents)}, but the pipeline's denoiser "
                f"takes {by_sides(shape)}. Leave encoder out, or write the path of a VAE of the "
                "same kind."
            )
        return shape

    def check_variance(self, variance: Variance) -> None:
        """Refuse a learned variance.

        Raises:
            InputError: If the variance is learned.
        """
        if variance.output_channels != 1:
            raise InputError(
                "objective.variance: the pipelines' denoisers predict no variance. Write variance: "
                "{type: fixed}."
            )

    # What it states

    def stated(self, shape: tuple[int, ...]) -> Stated:
        """Return the schedule and parameterization that the pipeline's scheduler states.

        Args:
            shape: Shape (C, H, W) of one x_t; some flow schedules shift with it.
        """
        _, height, width = shape
        tokens = height * width // self.patch**2
        return stated_by(self.pipeline.config("scheduler"), tokens)

    def encoder(self) -> LatentEncoder:
        """Return the pipeline's autoencoder."""
        return LatentEncoder(self.pipeline.path, vae=self.pipeline.load("vae"))

    def conditioning(self, request: ConditioningRequest) -> TextConditioning:
        """Return prompts as conditioning, with the other inputs of the network.

        Raises:
            InputError: If labels are to be dropped.
        """
        if request.label_dropout > 0:
            raise InputError(
                "label_dropout: the model takes prompts, not classes. Write captions: {dropout: "
                "0.1}."
            )
        assert request.size is not None
        return TextConditioning(
            self,
            request.prompts,
            request.size,
            self.size_conditioning,
            self.guidance_input,
            request.trains_text,
        )

    # Text

    @functools.cached_property
    def tokenizer(self) -> PromptTokenizer:
        """The pipeline's tokenizers."""
        names = [tower.tokenizer for tower in self.towers]
        return PromptTokenizer(self.towers, {name: self.pipeline.tokenizer(name) for name in names})

    @functools.cached_property
    def text(self) -> TextEncoders:
        """The frozen text encoders, read when they are first asked for."""
        return self.text_encoders()

    def release_text(self) -> None:
        """Free the frozen text encoders; they are read again when they are asked for again."""
        self.__dict__.pop("text", None)

    def text_encoders(self) -> TextEncoders:
        """Read the text encoders."""
        dtype = getattr(torch, self.text_dtype)
        encoders = {}
        for tower in self.towers:
            encoders[tower.encoder] = self.pipeline.load(tower.encoder, tower.class_name, dtype)
        return self.with_tokenizers(encoders)

    def with_tokenizers(self, encoders: Mapping[str, nn.Module]) -> TextEncoders:
        """Return text encoders by folder together with the pipeline's tokenizers."""
        zeroes_empty = bool(self.pipeline.index.get("force_zeros_for_empty_prompt", False))
        return TextEncoders(self.tokenizer, encoders, self.states, zeroes_empty)

    # Networks

    def skeleton(self, trains_text: bool = False) -> "TextToImageDenoiser":
        """Return the network, and the text encoders that train, on the meta device."""
        with torch.device("meta"):
            model = built(self.network_class, self.network_config)
            text = self._text_skeleton() if trains_text else None
            return TextToImageDenoiser(model, self, text)

    def _text_skeleton(self) -> TextEncoders:
        import transformers

        encoders = {}
        for tower in self.towers:
            encoder = getattr(transformers, tower.class_name)
            config = encoder.config_class.from_dict(self.pipeline.config(tower.encoder))
            encoders[tower.encoder] = encoder(config)
        return self.with_tokenizers(encoders)

    def denoiser(self, trains_text: bool = False) -> "TextToImageDenoiser":
        """Return the pretrained network, and the text encoders if they train."""
        dtype = getattr(torch, self.dtype)
        model = self.pipeline.load(self.network_folder, self.network_class, dtype)
        if self.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        return TextToImageDenoiser(model, self, self.text_encoders() if trains_text else None)

    # Files

    def save(
        self,
        denoiser: DenoiserNetwork,
        folder: Path,
        parts: ExportParts,
        encoders: Mapping[str, nn.Module] | None = None,
    ) -> None:
        """Write the whole pipeline with what was trained in place of the pretrained weights.

        Args:
            denoiser: The trained network.
            folder: An empty folder.
            parts: Facts for the headers of the trained weights' files.
            encoders: Text encoders that changed without being the denoiser's own, by folder.
        """
        trained = {**denoiser.parts(), **(encoders or {})}
        self.pipeline.assembled(replaced=trained).save_pretrained(folder)
        for name in trained:
            for file in (folder / name).glob("*.safetensors"):
                add_metadata(file, parts.about)

    def with_lora(self, denoiser: DenoiserNetwork, lora: Path) -> "TextToImageDenoiser":
        """Load the pipeline in diffusers, and a LoRA into it by `load_lora_weights`.

        Args:
            denoiser: The trained network, whose device and precision the result has.
            lora: The folder of the LoRA file.
        """
        trained = denoiser.parts()
        dtypes = {name: next(part.parameters()).dtype for name, part in trained.items()}
        pipeline = self.pipeline.assembled(only=tuple(trained), dtypes=dtypes)
        pipeline.load_lora_weights(lora, weight_name=FILE)
        fresh = {name: getattr(pipeline, name).to(denoiser.device) for name in trained}
        network = fresh.pop(self.network_folder)
        text = self.with_tokenizers(fresh) if fresh else None
        return TextToImageDenoiser(network, self, text).eval()

    @property
    def loaded_by(self) -> str:
        """What a message calls the result of `with_lora`."""
        return f"fresh {self.pipeline_class}"


class TextToImageDenoiser(DiffusersDenoiser):
    """The network of a text-to-image pipeline, called as (x_t, time, cond).

    Args:
        model: The network of diffusers.
        family: The model, which knows the network's call.
        text: The text encoders, where some of them train. They then encode the token ids among
            `cond`, with gradient.
    """

    def __init__(
        self, model: nn.Module, family: TextToImageModel, text: TextEncoders | None = None
    ):
        super().__init__(model, family.blocks, text)
        self.family = family
        self.lora_format = family.lora_format

    def forward(self, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """Predict from x_t [B, C, H, W] at time [B]."""
        given = self.in_precision(self.encoded(cond))
        return self.family.call(self.model, x_t.to(self.dtype), time, given)

    def encoded(self, cond: Cond) -> Cond:
        """Replace token ids in a conditioning by what the text encoders make of them."""
        ids = token_ids(cond)
        if not ids:
            return cond
        assert self.text is not None, "token ids, but no text encoder that trains"
        others = {name: value for name, value in cond.items() if name not in ids}
        return {**others, **self.text(ids)}
