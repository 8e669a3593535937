"""Pretrained text-to-image pipelines as models to fine-tune: Stable Diffusion 1.x, 2.x, XL and 3, and FLUX.1.

What the pipeline states is read from it: noise schedule (with the shift of the resolution), parameterization, latent scale and shift,
whether its denoiser is told sizes or a guidance. Weights are read when they are asked for.
"""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from difftrain.batch import Cond
from difftrain.denoisers import DiffusersDenoiser, DType, from_config
from difftrain.latents import LatentEncoder
from difftrain.parameterization import Parameterization
from difftrain.pipelines.families import Family, Flux, StableDiffusion, StableDiffusion3, StableDiffusionXL
from difftrain.pipelines.pretrained import PretrainedPipeline
from difftrain.pipelines.text import PromptTokenizer, TextEncoders, token_ids
from difftrain.registry import DENOISERS, InputError, NonNegative, PositiveInt
from difftrain.schedule import NoiseSchedule

TEXT_TO_IMAGE = tuple(family.name for family in (StableDiffusion, StableDiffusionXL, StableDiffusion3, Flux))


class TextToImageDenoiser(DiffusersDenoiser):
    """A family's denoiser as (x_t [B, C, H, W], time [B], cond) -> output [B, C, H, W].

    text: the text encoders, where some of them train; token ids among `cond` are then encoded here, with gradient.
    """

    def __init__(self, model: nn.Module, family: Family, text: TextEncoders | None = None):
        super().__init__(model)
        self.family, self.text = family, text

    def forward(self, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
        given = {name: value.to(self.dtype) if value.is_floating_point() else value for name, value in self.encoded(cond).items()}
        return self.family.call(self.model, x_t.to(self.dtype), time, given)

    def encoded(self, cond: Cond) -> Cond:
        """The conditioning with token ids replaced by what the text encoders make of them."""
        ids = token_ids(cond)
        if not ids:
            return cond
        assert self.text is not None, "token ids, but no text encoder that trains"
        return {**{name: value for name, value in cond.items() if name not in ids}, **self.text(ids)}


class TextToImageModel:
    """A pretrained pipeline of one family, opened; its parts are loaded one by one.

    guidance_input: (in training, in sampling), for denoisers that were distilled with guidance.
    """

    def __init__(
        self, pipeline: PretrainedPipeline, family: Family, dtype: DType, text_dtype: DType, gradient_checkpointing: bool,
        guidance_input: tuple[float, float] = (1.0, 3.5),
    ):
        self.pipeline, self.family = pipeline, family
        self.dtype, self.text_dtype = getattr(torch, dtype), getattr(torch, text_dtype)
        self.gradient_checkpointing, self.guidance_input = gradient_checkpointing, guidance_input
        self.config = pipeline.config(family.denoiser_folder)

    @property
    def factor(self) -> int:
        """Pixels for each latent, along one side."""
        return 2 ** (len(self.pipeline.config("vae")["block_out_channels"]) - 1)

    @property
    def unit(self) -> int:
        """Pixels of which an image's sides are multiples."""
        return self.factor * self.patch

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """(C, H, W) of a square image's latents. A resolution that the model cannot take raises InputError."""
        factor, unit, most = self.factor, self.unit, self._most_latents()
        if resolution % unit or (most is not None and resolution // factor > most):
            fitting = [side * unit for side in (resolution // unit, resolution // unit + 1) if side]
            fitting = [side for side in fitting if most is None or side // factor <= most] or [most * factor if most else unit]
            raise InputError(f"transform.resolution: {resolution}, but {self.family.name} takes multiples of {unit} pixels"
                             f"{'' if most is None else f' up to {most * factor}'}; write resolution: {' or '.join(map(str, fitting))}.")
        return self.family.latent_channels(self.config), resolution // factor, resolution // factor

    def _most_latents(self) -> int | None:
        """The longest side that the model's table of positions holds, where it has one."""
        most = self.config.get("pos_embed_max_size")
        return None if most is None else most * self.patch

    def schedule(self, height: int, width: int) -> tuple[NoiseSchedule, Parameterization]:
        """What the pipeline states, at latents of this size (flow schedules may shift with it)."""
        config = self.pipeline.config("scheduler")
        schedule = NoiseSchedule.from_diffusers(config, sequence_length=height * width // self.patch**2)
        return schedule, "flow_prediction" if schedule.kind == "flow" else config.get("prediction_type", "epsilon")

    @property
    def patch(self) -> int:
        """Latents of a side are multiples of it."""
        return int(self.config.get("patch_size") or 1) if self.family.name == "stable_diffusion_3" else self.family.patch

    def encoder(self) -> LatentEncoder:
        return LatentEncoder(self.pipeline.path, vae=self.pipeline.load("vae"))

    @functools.cached_property
    def text(self) -> TextEncoders:
        """The frozen text encoders, loaded when they are first asked for."""
        return self.text_encoders()

    def release_text(self) -> None:
        """Let the frozen text encoders go; they are read again if they are asked for again."""
        self.__dict__.pop("text", None)

    def text_encoders(self) -> TextEncoders:
        """Text encoders of one's own, read anew."""
        encoders = {t.encoder: self.pipeline.load(t.encoder, t.class_name, dtype=self.text_dtype) for t in self.family.towers}
        return self.assembled_text(encoders)

    def assembled_text(self, encoders: Mapping[str, nn.Module]) -> TextEncoders:
        zeroes_empty = bool(self.pipeline.index.get("force_zeros_for_empty_prompt", False))
        return TextEncoders(self.tokenize, encoders, self.family.states, zeroes_empty)

    @functools.cached_property
    def tokenize(self) -> PromptTokenizer:
        towers = self.family.towers
        return PromptTokenizer(towers, {tower.tokenizer: self.pipeline.tokenizer(tower.tokenizer) for tower in towers})

    def skeleton(self, with_text: bool = False) -> TextToImageDenoiser:
        """The denoiser (and the text encoders) on the meta device, which has shapes and no memory."""
        import transformers

        with torch.device("meta"):
            plain = {key: value for key, value in self.config.items() if not key.startswith("_")}
            model, text = from_config(self.family.denoiser_class, plain), None
            if with_text:
                classes = {tower.encoder: getattr(transformers, tower.class_name) for tower in self.family.towers}
                encoders = {name: c(c.config_class.from_dict(self.pipeline.config(name))) for name, c in classes.items()}
                text = self.assembled_text(encoders)
            return TextToImageDenoiser(model, self.family, text)

    def denoiser(self, with_text: bool = False) -> TextToImageDenoiser:
        """The pretrained denoiser; with_text: together with the text encoders, which train too."""
        model: Any = self.pipeline.load(self.family.denoiser_folder, self.family.denoiser_class, dtype=self.dtype)
        if self.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        return TextToImageDenoiser(model, self.family, self.text_encoders() if with_text else None)


@DENOISERS.register("stable_diffusion")
def stable_diffusion(
    path: str, config: str | None = None, dtype: DType = "float32", text_dtype: DType = "float32", gradient_checkpointing: bool = False
) -> TextToImageModel:
    """Stable Diffusion 1.x and 2.x: a pipeline's UNet2DConditionModel under the prompts of a CLIP text encoder.

    Rombach et al. 2022, arXiv:2112.10752. path: a local pipeline folder, a hub id, or a single .safetensors file, whose configs are then
    in the folder (or hub id) `config`. dtype: of the weights that do not train; what trains is float32.
    """
    pipeline = opened(StableDiffusion, path, config)
    return TextToImageModel(pipeline, StableDiffusion(), dtype, text_dtype, gradient_checkpointing)


@DENOISERS.register("stable_diffusion_xl")
def stable_diffusion_xl(
    path: str, config: str | None = None, dtype: DType = "float32", text_dtype: DType = "float32", gradient_checkpointing: bool = False
) -> TextToImageModel:
    """Stable Diffusion XL: two CLIP text encoders; the denoiser is told each image's size and crop.

    Podell et al. 2023, arXiv:2307.01952. Arguments as for stable_diffusion.
    """
    pipeline = opened(StableDiffusionXL, path, config)
    return TextToImageModel(pipeline, StableDiffusionXL(), dtype, text_dtype, gradient_checkpointing)


@DENOISERS.register("stable_diffusion_3")
def stable_diffusion_3(
    path: str, config: str | None = None, dtype: DType = "float32", text_dtype: DType = "float32", gradient_checkpointing: bool = False,
    max_tokens: PositiveInt = 256,
) -> TextToImageModel:
    """Stable Diffusion 3: a flow-matching transformer under two CLIP text encoders and, where the pipeline has it, a T5.

    Esser et al. 2024, arXiv:2403.03206. max_tokens: what the T5 reads of a prompt. Other arguments as for stable_diffusion.
    """
    pipeline = opened(StableDiffusion3, path, config)
    width = pipeline.config(StableDiffusion3.denoiser_folder)["joint_attention_dim"]
    family = StableDiffusion3(width, max_tokens, has_t5=pipeline.has("text_encoder_3"))
    return TextToImageModel(pipeline, family, dtype, text_dtype, gradient_checkpointing)


@DENOISERS.register("flux")
def flux(
    path: str, config: str | None = None, dtype: DType = "float32", text_dtype: DType = "float32", gradient_checkpointing: bool = False,
    max_tokens: PositiveInt = 512, guidance_in_training: NonNegative = 1.0, guidance_in_sampling: NonNegative = 3.5,
) -> TextToImageModel:
    """FLUX.1: a flow-matching transformer on packed latents, under a CLIP and a T5 text encoder.

    Black Forest Labs 2024; the flow of Esser et al. 2024, arXiv:2403.03206. guidance_in_*: what a guidance-distilled denoiser is told
    (others are told nothing); classifier-free guidance is sampling.guidance, as everywhere. Other arguments as for stable_diffusion_3.
    """
    told = (guidance_in_training, guidance_in_sampling)
    return TextToImageModel(opened(Flux, path, config), Flux(max_tokens), dtype, text_dtype, gradient_checkpointing, told)


def opened(family: type[Family], path: str, config: str | None) -> PretrainedPipeline:
    """The pipeline at `path`, refused if it is of another family."""
    pipeline = PretrainedPipeline(path, config)
    pipeline.expect([family.pipeline_class], family.name)
    return pipeline
