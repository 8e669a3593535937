"""Networks of diffusers as models: from a preset or a config, or pretrained from a folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from difftrain.core.errors import InputError, nearest
from difftrain.core.registry import registered_name
from difftrain.models.autoencoder import LatentEncoder
from difftrain.models.conditioning.base import Conditioning
from difftrain.models.conditioning.classes import ClassConditioning
from difftrain.models.diffusers_classes import (
    REJECTIONS,
    Config,
    built,
    by_sides,
    defaults_of,
    diffusers_class,
    refuse_unknown,
)
from difftrain.models.files import expanded, looks_local, read_json, readable_errors
from difftrain.models.lora.files import load_lora
from difftrain.models.lora.formats import LoraFormat, TransformerLora, UNetLora
from difftrain.models.model import (
    ConditioningRequest,
    DenoiserNetwork,
    DType,
    ExportParts,
    Model,
    Stated,
    models,
    stated_by,
)
from difftrain.models.pipelines.text_encoders import TextEncoders
from difftrain.models.presets import PRESETS
from difftrain.models.slots import MODELS
from difftrain.objective.slots import Variance
from difftrain.objective.types import Cond


class DiffusersDenoiser(DenoiserNetwork):
    """A network of diffusers, called as (x_t, time, cond); it computes in its own precision.

    Args:
        model: The network of diffusers.
        blocks: Classes of its layers that FSDP wraps one by one.
        text: Text encoders that train together with the network, if any do.
    """

    def __init__(
        self, model: nn.Module, blocks: Sequence[str] = (), text: TextEncoders | None = None
    ):
        super().__init__(model, text)
        for module in model.modules():
            # The conditioning drops labels, keyed by sample; diffusers must not drop more.
            if type(module).__name__ == "LabelEmbedding":
                setattr(module, "dropout_prob", 0.0)  # noqa: B010
        self.needs_text = "cross_attention_dim" in self.config
        present = {type(module).__name__ for module in model.modules()}
        self._no_split_modules = [name for name in blocks if name in present]
        is_unet = self.folder == "unet"
        self.lora_format: LoraFormat = UNetLora() if is_unet else TransformerLora()

    @property
    def config(self) -> Config:
        """The network's config."""
        network: Any = self.model
        return dict(network.config)

    def save_model(self, folder: Path) -> None:
        """Write a folder that the diffusers class loads with from_pretrained."""
        network: Any = self.model
        network.save_pretrained(folder)

    def forward(self, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """Predict from x_t [B, C, H, W], or [B, C, F, H, W], at time [B].

        Without text among `cond`, a network that needs text attends to one zero token.
        """
        given = dict(cond)
        if self.needs_text and "encoder_hidden_states" not in given:
            width = self._text_width()
            given["encoder_hidden_states"] = x_t.new_zeros(len(x_t), 1, width, dtype=self.dtype)
        output: Tensor = self.model(x_t.to(self.dtype), time, **given).sample
        return output

    def _text_width(self) -> int:
        config = self.config
        width = config.get("encoder_hid_dim") or config["cross_attention_dim"]
        return int(width if isinstance(width, int) else width[0])


class DiffusersNetwork(Model):
    """A network of one diffusers class.

    `preset` and `config` build it, with `config` over the preset; `path` loads it. Opening one
    reads the config alone.

    Args:
        preset: The name of a known config.
        config: Arguments of the diffusers class. With `path`, a UNet takes {sample_size: ...}, to
            be trained at another size than its own.
        path: A local folder or hub id of the network, or of a pipeline that contains it.
        subfolder: The network's folder in the pipeline, if it is not the usual one.
        dtype: The precision of the weights.
        gradient_checkpointing: Whether to compute activations again in the backward pass, which
            saves memory.

    Attributes:
        config: The network's config before its weights are there, with the class's defaults.

    Raises:
        InputError: If the arguments contradict each other, or there is no such network.
    """

    class_name: ClassVar[str]
    folder: ClassVar[str] = "unet"
    blocks: ClassVar[Sequence[str]] = ("ResnetBlock2D", "BasicTransformerBlock")
    checkpoints_gradients: ClassVar[bool] = True
    takes_any_size: ClassVar[bool] = True

    def __init__(
        self,
        preset: str | None = None,
        config: dict[str, Any] | None = None,
        path: str | None = None,
        subfolder: str | None = None,
        dtype: DType = "float32",
        gradient_checkpointing: bool = False,
    ):
        self.path, self.subfolder = path, subfolder
        self.dtype = dtype
        self.gradient_checkpointing = gradient_checkpointing
        self._changes = config or {}
        if gradient_checkpointing and not self.checkpoints_gradients:
            raise InputError(
                f"model.gradient_checkpointing: {self.class_name} cannot checkpoint gradients. "
                "Leave it out."
            )
        if path is None:
            own = self._config_of(preset, config)
        else:
            self._refuse_two_sources(preset, config)
            own = {**self._load_config(path), **self._changes}
        self._own_config = own
        self.config: Config = {**defaults_of(self.class_name), **own}

    # What it takes

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of x_t, or of each frame of it.

        Raises:
            InputError: If the config states no size.
        """
        size = self.config.get("sample_size")
        if size is None:
            raise InputError(
                "model.config: sample_size is required. Write the side of x_t, such as {config: "
                "{sample_size: 32}}."
            )
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        return self.config["in_channels"], height, width

    @property
    def num_label_embeddings(self) -> int | None:
        """Rows of the label table with the null label's; None for a network without labels."""
        rows: int | None = self.config.get("num_class_embeds")
        return rows

    def input_shape(self, item: tuple[int, ...], encoder: LatentEncoder | None) -> tuple[int, ...]:
        """Return the shape of one x_t.

        Args:
            item: (C, H, W) of an image or (C, F, H, W) of a clip, in pixels.
            encoder: What turns pixels into latents, if the run has one.

        Raises:
            InputError: If the network is for another size or number of channels.
        """
        channels, height, width = self.sample_shape
        shape, factor, unit = item, 1, "pixels"
        where, other = "transform.channels", f"transform: {{channels: {channels}}}, or "
        if encoder is not None:
            shape, factor, unit = encoder.latent_shape(item), encoder.factor, "latents"
            where, other = "encoder", ""
        if (height * factor, width * factor) != item[-2:]:
            side = item[-1]
            raise InputError(
                f"transform.resolution: {side}, but the model takes {height}x{width} {unit}. Write "
                f"resolution: {height * factor}, or model: {{config: {{sample_size: "
                f"{side // factor}}}}}."
            )
        if shape[0] != channels:
            raise InputError(
                f"{where}: {shape[0]} channels, but the model takes {channels}. Write {other}"
                f"model: {{config: {{in_channels: {shape[0]}}}}}."
            )
        return shape

    def check_variance(self, variance: Variance) -> None:
        """Refuse a reverse variance that the network's output has no channels for.

        Raises:
            InputError: With the variance, or the number of channels, that would fit.
        """
        channels = self.config["in_channels"]
        wanted = channels * variance.output_channels
        given = self.config.get("out_channels") or channels
        if given == wanted:
            return
        fitting = "learned_range" if given == 2 * channels else "fixed"
        raise InputError(
            f"model: out_channels is {given}, but variance {registered_name(variance)} needs "
            f"{wanted}. Write objective: {{variance: {{type: {fitting}}}}}, or for a model without "
            f"a path model: {{config: {{out_channels: {wanted}}}}}."
        )

    # What it states

    def stated(self, shape: tuple[int, ...]) -> Stated | None:
        """Return what the scheduler beside a pretrained network in its local pipeline states."""
        if self.path is None:
            return None
        file = Path(self.path).expanduser() / "scheduler" / "scheduler_config.json"
        return stated_by(read_json(file)) if file.is_file() else None

    def encoder(self) -> LatentEncoder | None:
        """Return the autoencoder beside a pretrained network in its local pipeline."""
        if self.path is None or not (Path(self.path).expanduser() / "vae").is_dir():
            return None
        return LatentEncoder(self.path)

    def conditioning(self, request: ConditioningRequest) -> Conditioning:
        """Return class labels as conditioning.

        Integer labels without names fill the network's label table.

        Raises:
            InputError: If the classes of the data do not fit the label table.
        """
        rows = self.num_label_embeddings
        num_classes = request.num_classes
        if num_classes is None and rows and request.is_labelled:
            num_classes = rows - (request.label_dropout > 0)
        return ClassConditioning(num_classes, rows, request.label_dropout, request.item_cond)

    # Networks

    def skeleton(self, trains_text: bool = False) -> DiffusersDenoiser:
        """Return the network on the meta device, with random weights that take no memory."""
        with torch.device("meta"):
            return self._wrapped(built(self.class_name, self._own_config))

    def denoiser(self, trains_text: bool = False) -> DiffusersDenoiser:
        """Return the network with its weights: pretrained, or from torch's global generator."""
        network = self._load() if self.path else built(self.class_name, self._own_config)
        if self.dtype != "float32":
            network.to(getattr(torch, self.dtype))
        if self.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        return self._wrapped(network)

    def check_forward(
        self,
        skeleton: DenoiserNetwork,
        shape: tuple[int, ...],
        conditioning: Conditioning,
        variance: Variance,
    ) -> None:
        """Refuse a network that cannot take x_t of this shape, found out on the meta device.

        Raises:
            InputError: With what diffusers says about it.
        """
        x_t = torch.zeros(2, *shape, device="meta")
        time = torch.zeros(2, dtype=torch.long, device="meta")
        cond = {"class_labels": time} if conditioning.conditions else {}
        problem = ""
        try:
            with torch.no_grad():
                output = skeleton(x_t, time, cond)
            if output.shape[2:] != x_t.shape[2:]:
                problem = f"it returns {by_sides(output.shape[1:])}."
        except REJECTIONS as error:
            # An operation that needs values fails on the meta device, whatever the shape.
            if "meta" not in str(error):
                problem = str(error).splitlines()[0]
        if problem:
            raise InputError(
                f"model.config: {self.class_name} does not take inputs of {by_sides(shape)}: "
                f"{problem} Write a sample_size that halves evenly from block to block (a DiT: "
                "that its patch_size divides)."
            )

    # Files

    def save(
        self,
        denoiser: DenoiserNetwork,
        folder: Path,
        parts: ExportParts,
        encoders: Mapping[str, nn.Module] | None = None,
    ) -> None:
        """Write a diffusers pipeline where one fits, else the network and its parts one by one.

        diffusers has no pipeline for a class-conditional UNet2DModel, nor for a
        UNet3DConditionModel without text.
        """
        encoder = parts.encoder
        if encoder is not None:
            # A scale that the recipe sets goes along.
            encoder.vae.register_to_config(scaling_factor=encoder.scale)
        pipeline = self._pipeline(denoiser.model, parts)
        if pipeline is not None:
            pipeline.save_pretrained(folder)
            return
        network: Any = denoiser.model
        network.save_pretrained(folder / self.folder)
        parts.scheduler("").save_pretrained(folder / "scheduler")
        if encoder is not None:
            encoder.vae.save_pretrained(folder / "vae")

    def with_lora(self, denoiser: DenoiserNetwork, lora: Path) -> DenoiserNetwork:
        """Load the network again and a LoRA into it.

        Args:
            denoiser: The trained network, whose device the result is on.
            lora: The folder of the LoRA file.
        """
        fresh = self.denoiser()
        load_lora(fresh, lora)
        return fresh.to(denoiser.device).eval()

    def _pipeline(self, network: nn.Module, parts: ExportParts) -> Any:
        """The diffusers pipeline that makes the samples of such a run; None if there is none."""
        return None

    # From arguments to a config and a network

    def _refuse_two_sources(self, preset: str | None, config: Config | None) -> None:
        is_resized = config is not None and set(config) == {"sample_size"}
        may_change = config is None or (is_resized and self.takes_any_size)
        if preset is not None or not may_change:
            raise InputError(
                "model: path brings its own config. Leave preset and config out (of a UNet, config "
                "may hold sample_size alone), or leave path out."
            )

    def _config_of(self, preset: str | None, config: Config | None) -> Config:
        """The preset's config with `config` over it."""
        presets = PRESETS[self.name]
        if preset is None and config is None:
            raise InputError(f"model: write a preset ({', '.join(presets)}), a config, or a path.")
        if preset is not None and preset not in presets:
            raise InputError(f"model.preset: unknown preset {preset!r}{nearest(preset, presets)}.")
        chosen = dict(config or {})
        if preset is not None:
            chosen = {**presets[preset], **chosen}
        refuse_unknown(self.class_name, chosen)
        return chosen

    def _load_config(self, path: str) -> Config:
        """The config of a pretrained network, without its weights."""
        with readable_errors(path):
            network = diffusers_class(self.class_name)
            config = dict(network.load_config(expanded(path), subfolder=self._inner_folder(path)))
        found = config.get("_class_name", self.class_name)
        if found == self.class_name:
            return config
        known = {}
        for name, model in models().items():
            if issubclass(model, DiffusersNetwork):
                known[model.class_name] = name
        remedy = f"known classes: {', '.join(known)}"
        if found in known:
            remedy = f"write model: {{type: {known[found]}}}"
        raise InputError(
            f"model.path: {path!r} holds a {found}, not a {self.class_name}; {remedy}."
        )

    def _load(self) -> Any:
        """The pretrained network."""
        assert self.path is not None
        with readable_errors(self.path):
            return diffusers_class(self.class_name).from_pretrained(
                expanded(self.path), subfolder=self._inner_folder(self.path), **self._changes
            )

    def _inner_folder(self, path: str) -> str | None:
        """The folder in `path` that holds the network; None if `path` is the network's own."""
        folder = Path(path).expanduser()
        if looks_local(path) and not folder.is_dir():
            raise InputError(
                f"model.path: there is no folder {path!r}. "
                "Write the folder of a diffusers model or pipeline, or a hub id such as org/name."
            )
        if self.subfolder is not None:
            return self.subfolder
        if folder.is_dir() and not (folder / self.folder).is_dir():
            return None
        return self.folder

    def _wrapped(self, network: nn.Module) -> DiffusersDenoiser:
        return DiffusersDenoiser(network, self.blocks)


@MODELS.register("unet2d")
class UNet2D(DiffusersNetwork):
    """diffusers' UNet2DModel: images or latents, optionally with class labels (num_class_embeds).

    The arguments are those of `DiffusersNetwork`.

    Reference:
        Ho et al. 2020, "Denoising Diffusion Probabilistic Models", arXiv:2006.11239; Dhariwal and
        Nichol 2021, "Diffusion Models Beat GANs on Image Synthesis", arXiv:2105.05233.
    """

    name = "unet2d"
    class_name = "UNet2DModel"
    pipeline_class = "DDPMPipeline"

    def _pipeline(self, network: nn.Module, parts: ExportParts) -> Any:
        from diffusers import DDPMPipeline

        if parts.conditions or parts.encoder is not None:
            return None
        return DDPMPipeline(network, parts.scheduler(self.pipeline_class))


@MODELS.register("unet2d_condition")
class UNet2DCondition(DiffusersNetwork):
    """diffusers' UNet2DConditionModel; without text it attends to one zero token.

    Labels go through num_class_embeds. The arguments are those of `DiffusersNetwork`.

    Reference:
        Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models",
        arXiv:2112.10752.
    """

    name = "unet2d_condition"
    class_name = "UNet2DConditionModel"


@MODELS.register("unet3d_condition")
class UNet3DCondition(DiffusersNetwork):
    """diffusers' UNet3DConditionModel: clips [B, C, F, H, W] of any number of frames.

    Without text it attends to one zero token. The class takes no labels, cannot checkpoint
    gradients, and has a dropout of 0.1 in its convolutions over time, whatever the config. The
    arguments are those of `DiffusersNetwork`.

    Reference:
        Wang et al. 2023, "ModelScope Text-to-Video Technical Report", arXiv:2308.06571.
    """

    name = "unet3d_condition"
    class_name = "UNet3DConditionModel"
    items = frozenset({"clips"})
    checkpoints_gradients = False


@MODELS.register("dit")
class DiT(DiffusersNetwork):
    """diffusers' DiTTransformer2DModel: class labels through adaptive layer norms.

    A pretrained one keeps its sample_size. DiTPipeline takes 1000 as the null label: its guidance
    needs a model of 1000 classes, others run with guidance_scale=1. The arguments are those of
    `DiffusersNetwork`.

    Reference:
        Peebles and Xie 2023, "Scalable Diffusion Models with Transformers", arXiv:2212.09748.
    """

    name = "dit"
    class_name = "DiTTransformer2DModel"
    folder = "transformer"
    pipeline_class = "DiTPipeline"
    takes_any_size = False

    @property
    def num_label_embeddings(self) -> int | None:
        """Rows of the label table: the classes, and the null label."""
        return int(self.config["num_embeds_ada_norm"]) + 1

    def _pipeline(self, network: nn.Module, parts: ExportParts) -> Any:
        from diffusers import DiTPipeline

        encoder = parts.encoder
        if encoder is None or encoder.shift != 0 or parts.schedule.kind != "diffusion":
            return None
        return DiTPipeline(network, encoder.vae, parts.scheduler(self.pipeline_class))
