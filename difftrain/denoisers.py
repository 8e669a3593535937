"""diffusers models behind (x_t, t, cond): built from a preset or a config, or loaded from a folder or the hub."""

import inspect
import json
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from difftrain.batch import Cond
from difftrain.pipelines.files import expanded, looks_local, readable_errors
from difftrain.presets import PRESETS
from difftrain.registry import DENOISERS, InputError, Part, nearest

DType = Literal["float32", "float64", "bfloat16"]

CLASSES = {
    "unet2d": ("UNet2DModel", "unet"),
    "unet2d_condition": ("UNet2DConditionModel", "unet"),
    "unet3d_condition": ("UNet3DConditionModel", "unet"),
    "dit": ("DiTTransformer2DModel", "transformer"),
}  # diffusers' class, and its usual folder in a pipeline
UNITS = ("ResnetBlock2D", "BasicTransformerBlock", "JointTransformerBlock", "FluxTransformerBlock", "FluxSingleTransformerBlock")  # FSDP's
OF_CLIPS = ("unet3d_condition",)  # those that take [B, C, F, H, W]
REFUSALS = (ValueError, TypeError, RuntimeError, LookupError, ArithmeticError, AttributeError)  # what a config without sense raises there


class DiffusersDenoiser(nn.Module):
    """A diffusers model as (x_t [B, C, H, W], time [B], cond) -> output [B, C or 2C, H, W] in the model's dtype; F after C for clips."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.rest_dtype: torch.dtype | None = None  # that of most layers, where an adapter made some of them float32
        for module in model.modules():
            if type(module).__name__ == "LabelEmbedding":
                setattr(module, "dropout_prob", 0.0)  # noqa: B010  # labels are dropped once, by the conditioning, keyed by sample
        self.needs_text = "cross_attention_dim" in self.config
        present = {type(module).__name__ for module in model.modules()}
        self._no_split_modules = [name for name in UNITS if name in present]

    @property
    def config(self) -> dict[str, Any]:
        return dict(self.model.config)  # type: ignore[arg-type]

    @property
    def dtype(self) -> torch.dtype:
        """What the model is fed."""
        return self.rest_dtype or next(self.model.parameters()).dtype

    def save_model(self, folder: Path) -> None:
        """A folder that the diffusers class loads with from_pretrained."""
        cast(Any, self.model).save_pretrained(folder)

    def forward(self, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
        given = dict(cond)
        if self.needs_text and "encoder_hidden_states" not in given:  # without text: one empty token
            given["encoder_hidden_states"] = x_t.new_zeros(len(x_t), 1, self._text_width(), dtype=self.dtype)
        return self.model(x_t.to(self.dtype), time, **given).sample

    def _text_width(self) -> int:
        width = self.config.get("encoder_hid_dim") or self.config["cross_attention_dim"]
        return width if isinstance(width, int) else width[0]


@DENOISERS.register("unet2d")
def unet2d(
    preset: str | None = None, config: dict[str, Any] | None = None, path: str | None = None, subfolder: str | None = None,
    dtype: DType = "float32", gradient_checkpointing: bool = False,
) -> DiffusersDenoiser:
    """diffusers' UNet2DModel: pixels or latents, optionally with class labels (num_class_embeds).

    Ho et al. 2020, arXiv:2006.11239; Dhariwal and Nichol 2021, arXiv:2105.05233. preset and config build it (config over
    preset); path is a local folder or hub id (of the model, or of a pipeline with a unet folder), and config may then hold a
    sample_size, to train it at another size than its own.
    """
    return make("unet2d", preset, config, path, subfolder, dtype, gradient_checkpointing)


@DENOISERS.register("unet2d_condition")
def unet2d_condition(
    preset: str | None = None, config: dict[str, Any] | None = None, path: str | None = None, subfolder: str | None = None,
    dtype: DType = "float32", gradient_checkpointing: bool = False,
) -> DiffusersDenoiser:
    """diffusers' UNet2DConditionModel; without text it attends to one zero token, labels go through num_class_embeds.

    Rombach et al. 2022, arXiv:2112.10752. preset, config and path as for unet2d.
    """
    return make("unet2d_condition", preset, config, path, subfolder, dtype, gradient_checkpointing)


@DENOISERS.register("unet3d_condition")
def unet3d_condition(
    preset: str | None = None, config: dict[str, Any] | None = None, path: str | None = None, subfolder: str | None = None,
    dtype: DType = "float32",
) -> DiffusersDenoiser:
    """diffusers' UNet3DConditionModel: clips [B, C, F, H, W] of any number of frames; without text it attends to one zero token.

    Wang et al. 2023, "ModelScope Text-to-Video Technical Report", arXiv:2308.06571. preset, config and path as for unet2d. The
    class takes no labels, cannot checkpoint gradients, and drops 0.1 in its convolutions over time, whatever the config.
    """
    return make("unet3d_condition", preset, config, path, subfolder, dtype, gradient_checkpointing=False)


@DENOISERS.register("dit")
def dit(
    preset: str | None = None, config: dict[str, Any] | None = None, path: str | None = None, subfolder: str | None = None,
    dtype: DType = "float32", gradient_checkpointing: bool = False,
) -> DiffusersDenoiser:
    """diffusers' DiTTransformer2DModel: class labels through adaptive layer norms.

    Peebles and Xie 2023, "Scalable Diffusion Models with Transformers", arXiv:2212.09748. preset, config and path as for
    unet2d (of a pipeline: its transformer folder; a path keeps its sample_size).
    """
    return make("dit", preset, config, path, subfolder, dtype, gradient_checkpointing)


def make(
    kind: str, preset: str | None, config: dict[str, Any] | None, path: str | None, subfolder: str | None, dtype: DType,
    gradient_checkpointing: bool,
) -> DiffusersDenoiser:
    class_name, usual_subfolder = CLASSES[kind]
    refuse_two_sources(kind, preset, config, path)
    if path is not None:
        model = load(class_name, path, subfolder or usual_subfolder, subfolder is not None, config or {})
    else:
        model = from_config(class_name, model_config(kind, preset, config))
    if dtype != "float32":
        model.to(getattr(torch, dtype))
    if gradient_checkpointing:
        model.enable_gradient_checkpointing()
    return DiffusersDenoiser(model)


def refuse_two_sources(kind: str, preset: str | None, config: dict[str, Any] | None, path: str | None) -> None:
    is_resized_unet = kind != "dit" and config is not None and set(config) == {"sample_size"}  # convolutions take any size
    if path is not None and (preset is not None or not (config is None or is_resized_unet)):
        raise InputError("model: path brings its own config; leave preset and config out (of a UNet, config may hold sample_size alone), "
                         "or leave path out.")


def model_config(kind: str, preset: str | None, config: dict[str, Any] | None) -> dict[str, Any]:
    """The preset's config with `config` laid over it."""
    presets = PRESETS[kind]
    if preset is None and config is None:
        raise InputError(f"model: write a preset ({', '.join(presets)}), a config, or a path.")
    if preset is not None and preset not in presets:
        raise InputError(f"model.preset: unknown preset {preset!r}{nearest(preset, presets)}.")
    return {**(presets[preset] if preset else {}), **(config or {})}


def refuse_unknown(class_name: str, config: dict[str, Any]) -> None:
    import diffusers

    known = set(inspect.signature(getattr(diffusers, class_name).__init__).parameters) - {"self"}
    unknown = [key for key in config if key not in known]
    if unknown:
        raise InputError(f"model.config.{unknown[0]}: {class_name} has no such argument{nearest(unknown[0], known)}.")


def from_config(class_name: str, config: dict[str, Any]) -> Any:
    """A model with new weights, drawn from torch's global generator."""
    import diffusers

    refuse_unknown(class_name, config)
    plain = {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}
    try:
        return getattr(diffusers, class_name)(**plain)
    except REFUSALS as error:
        raise InputError(f"model.config: {class_name} refuses it: {error}") from error


def load(class_name: str, path: str, subfolder: str, subfolder_given: bool, config: dict[str, Any]) -> Any:
    """A pretrained model from a model folder, a pipeline folder, or the hub; `config` goes over its own."""
    import diffusers

    with readable_errors(path):
        inner = inner_folder(path, subfolder, subfolder_given)
        return getattr(diffusers, class_name).from_pretrained(expanded(path), subfolder=inner, **config)


def load_config(class_name: str, path: str, subfolder: str, subfolder_given: bool) -> dict[str, Any]:
    """The config of a pretrained model, without its weights."""
    import diffusers

    with readable_errors(path):
        inner = inner_folder(path, subfolder, subfolder_given)
        config = dict(getattr(diffusers, class_name).load_config(expanded(path), subfolder=inner))
    if config.get("_class_name", class_name) != class_name:
        types = [kind for kind, (name, _) in CLASSES.items() if name == config["_class_name"]]
        remedy = f"write model: {{type: {types[0]}}}" if types else f"known classes: {', '.join(name for name, _ in CLASSES.values())}"
        raise InputError(f"model.path: {path!r} holds a {config['_class_name']}, not a {class_name}; {remedy}.")
    return config


def inner_folder(path: str, subfolder: str, given: bool) -> str | None:
    """The folder within `path` that holds the model: none for a model's own folder."""
    folder = Path(path).expanduser()
    if looks_local(path) and not folder.is_dir():
        raise InputError(f"model.path: there is no folder {path!r}. "
                         "Write the folder of a diffusers model or pipeline, or a hub id such as org/name.")
    return subfolder if given or not folder.is_dir() or (folder / subfolder).is_dir() else None


def pretrained_scheduler(path: str | None) -> dict[str, Any] | None:
    """The scheduler config that lies beside a pretrained model in its pipeline folder, if there is one (local folders)."""
    if path is None:
        return None
    file = Path(path).expanduser() / "scheduler" / "scheduler_config.json"
    return json.loads(file.read_text()) if file.is_file() else None


def planned_config(part: Part) -> dict[str, Any]:
    """The model's config before any weight is there: the class's defaults under the preset's and the recipe's, or a local folder's."""
    import diffusers

    if part.name not in CLASSES:
        raise InputError(f"model.type: {part.name!r} is none of the diffusers models that can be trained; known: {', '.join(CLASSES)}.")
    class_name, usual_subfolder = CLASSES[part.name]
    arguments = part.arguments
    refuse_two_sources(part.name, arguments["preset"], arguments["config"], arguments["path"])
    if arguments["path"] is None:
        config = model_config(part.name, arguments["preset"], arguments["config"])
        refuse_unknown(class_name, config)
    else:
        own = load_config(class_name, arguments["path"], arguments["subfolder"] or usual_subfolder, arguments["subfolder"] is not None)
        config = {**own, **(arguments["config"] or {})}
    signature = inspect.signature(getattr(diffusers, class_name).__init__)
    return {**{name: p.default for name, p in signature.parameters.items() if name != "self"}, **config}


def without_weights(kind: str, config: dict[str, Any]) -> DiffusersDenoiser:
    """The model of a planned config on the meta device, which has shapes and no memory."""
    class_name = CLASSES[kind][0]
    with torch.device("meta"):
        return DiffusersDenoiser(from_config(class_name, {key: value for key, value in config.items() if not key.startswith("_")}))


def check_forward(denoiser: DiffusersDenoiser, shape: tuple[int, ...], labelled: bool) -> None:
    """Refuse a model that cannot take x_t of this shape; `denoiser` comes from `without_weights`."""
    x_t = torch.zeros(2, *shape, device="meta")
    labels = torch.zeros(2, dtype=torch.long, device="meta")
    name, problem = type(denoiser.model).__name__, ""
    try:
        with torch.no_grad():
            output = denoiser(x_t, labels, {"class_labels": labels} if labelled else {})
        if output.shape[2:] != x_t.shape[2:]:
            problem = f"it returns {'x'.join(map(str, output.shape[1:]))}."
    except REFUSALS as error:
        if "meta" not in str(error):  # else an operation that needs values: says nothing about shapes
            problem = str(error).splitlines()[0]
    if problem:
        raise InputError(f"model.config: {name} does not take inputs of {'x'.join(map(str, shape))}: {problem} "
                         "Write a sample_size that halves evenly from block to block (a DiT: that its patch_size divides).")


def shape_in(config: dict[str, Any]) -> tuple[int, int, int]:
    """(C, H, W) of x_t, or of each frame of it."""
    size = config.get("sample_size")
    if size is None:
        raise InputError("model.config: sample_size is required; write the side of x_t, such as {config: {sample_size: 32}}.")
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return config["in_channels"], height, width


def num_class_embeddings_in(config: dict[str, Any]) -> int | None:
    """Rows of the label table, the null label's included; None for a model that takes no labels."""
    if "num_embeds_ada_norm" in config and "patch_size" in config:
        return config["num_embeds_ada_norm"] + 1
    return config.get("num_class_embeds")
