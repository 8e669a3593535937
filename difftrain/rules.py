"""Rules between the blocks of a recipe, and the way it is launched: each one sentence and one remedy."""

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend
from torch import nn

from difftrain.batch import Variance
from difftrain.cache import Cache
from difftrain.captions import Captions
from difftrain.data.items import ImageDataset, ImageStream, refuse_clips
from difftrain.data.transform import Transform
from difftrain.denoisers import OF_CLIPS, shape_in
from difftrain.evaluation.evidence import Need, check_counts, check_needs
from difftrain.latents import LatentEncoder
from difftrain.objective import Objective
from difftrain.pipelines.files import looks_local
from difftrain.recipe import EvaluationSettings, Recipe
from difftrain.registry import FEATURES, InputError, Part, dump, nearest
from difftrain.schedule import NoiseSchedule


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


def check_guidance(recipe: Recipe, guidance: float) -> None:
    """A null label that was never trained: a model of one's own must have dropped labels. A pretrained one may have."""
    if guidance != 1.0 and recipe.label_dropout == 0 and recipe.model.arguments.get("path") is None:
        raise InputError(f"sampling.guidance: {guidance}, but label_dropout is 0, so the null label is never trained. "
                         "Write label_dropout: 0.1, or guidance: 1.")


def check_adapter(recipe: Recipe, makes_lora: bool) -> None:
    """Refuse a LoRA on drawn weights, which nobody who has the LoRA could have."""
    if makes_lora and recipe.model.arguments.get("path") is None:
        raise InputError("adapter: a LoRA is kept beside the model that it was trained on, but this one starts from nothing. Leave adapter "
                         "out, or write model: {path: ...}.")


def check_text(recipe: Recipe, takes_text: bool, transform: Transform) -> None:
    """Refuse settings of prompts without a model that takes them, and those of classes with one."""
    if not takes_text:
        for key, value in {"captions": recipe.captions, "sampling.prompts": recipe.sampling.arguments["prompts"]}.items():
            if value is not None:
                raise InputError(f"{key}: the model {recipe.model.name} takes no prompts, so this has no effect. Leave it out, or write "
                                 "model: {type: stable_diffusion, path: ...}.")
        return
    if recipe.label_dropout > 0:
        raise InputError("label_dropout: the model takes prompts, not classes. Write captions: {dropout: 0.1}.")
    if recipe.sampling.arguments["prompts"] == []:
        raise InputError("sampling.prompts: the list is empty. Write some prompts, or leave the key out: captions of the data are taken.")
    if transform.channels != 3:
        raise InputError(f"transform.channels: {transform.channels}, but the pipeline's images have 3; write channels: 3.")


def check_buckets(recipe: Recipe, unit: int | None) -> None:
    """Refuse buckets for a model of one size, and sides that it cannot take. unit: pixels of which its sides are multiples, None: fixed."""
    if recipe.buckets is None:
        return
    if unit is None:
        raise InputError(f"buckets: the model {recipe.model.name} takes images of one size. Leave buckets out, or write a text-to-image "
                         "model.")
    step = recipe.buckets.arguments["step"]
    if step % unit:
        raise InputError(f"buckets.step: {step}, but {recipe.model.name} takes multiples of {unit} pixels; write step: "
                         f"{-(-step // unit) * unit}.")


def check_renderings(captions: Captions, cache: Cache | None) -> None:
    """Refuse renderings to cache where there is no cache; one that there is knows more."""
    if captions.variants > 1 and cache is None:
        raise InputError(f"captions.variants: {captions.variants} has no effect without cached text: every sample is rendered anew. Leave "
                         "it out, or write cache: {folder: ...}.")


def check_cache_folder(folder: str) -> None:
    """Refuse a file where the cache is to be."""
    path = Path(folder).expanduser().absolute()
    there = next(place for place in (path, *path.parents) if place.exists())
    if not there.is_dir():
        raise InputError(f"cache.folder: {folder!r} cannot be a folder, as {there} is a file. Write another folder, such as a new one.")


def check_prior(recipe: Recipe, streams: bool, num_frames: int | None) -> None:
    """Refuse samples of a base model where there is none, and data that they cannot be set beside."""
    if recipe.model.arguments.get("path") is None:
        raise InputError("prior: samples of the base model keep what it knows, but this model starts from nothing. Leave prior out, or "
                         "write model: {path: ...}.")
    if streams or num_frames is not None:
        raise InputError(f"prior: samples are set beside a table of images, and these are {'a stream' if streams else 'clips'}. Leave "
                         "prior out.")


def check_latents(shape: tuple[int, ...], encoder: LatentEncoder, transform: Transform, variance: Variance) -> None:
    """Refuses an encoder whose latents are not those of the pipeline's denoiser, and a variance that it does not predict."""
    made = (encoder.channels, transform.resolution // encoder.factor, transform.resolution // encoder.factor)
    if made != tuple(shape):
        raise InputError(f"encoder: it makes latents of {'x'.join(map(str, made))}, but the pipeline's denoiser takes "
                         f"{'x'.join(map(str, shape))}. Leave encoder out, or write the path of a VAE of the same kind.")
    if variance.output_channels != 1:
        raise InputError("objective.variance: the pipelines' denoisers predict no variance. Write variance: {type: fixed}.")


def check_clips(recipe: Recipe, num_frames: int | None) -> None:
    """Refuses clips for a model of images, and the reverse. num_frames: of the data's clips, None for images."""
    name, takes_clips = recipe.model.name, recipe.model.name in OF_CLIPS
    if num_frames is not None and not takes_clips:
        raise InputError(f"data: {recipe.data.name} holds clips, but the model {name} takes images; "
                         f"write model: {{type: {OF_CLIPS[0]}}}, or a set of images.")
    if num_frames is None and takes_clips:
        raise InputError(f"data: {recipe.data.name} holds images, but the model {name} takes clips; "
                         "write data: {type: video_folder, ...}, or model: {type: unet2d}.")


def check_shapes(config: dict[str, Any], transform: Transform, encoder: LatentEncoder | None, variance: Variance) -> None:
    """Refuses a model that does not take what the transform, and the encoder if there is one, make."""
    channels, height, width = shape_in(config)
    if encoder is not None and encoder.pixel_channels != transform.channels:
        raise InputError(f"transform.channels: {transform.channels}, but the encoder takes {encoder.pixel_channels}; "
                         f"write transform: {{channels: {encoder.pixel_channels}}}.")
    factor = encoder.factor if encoder else 1
    side, seen = transform.resolution, encoder.channels if encoder else transform.channels
    if (height * factor, width * factor) != (side, side):
        unit = "latents" if encoder else "pixels"
        raise InputError(f"transform.resolution: {side}, but the model takes {height}x{width} {unit}; "
                         f"write resolution: {height * factor}, or model: {{config: {{sample_size: {side // factor}}}}}.")
    if seen != channels:
        where, other = ("encoder", "") if encoder else ("transform.channels", f"transform: {{channels: {channels}}}, or ")
        raise InputError(f"{where}: {seen} channels, but the model takes {channels}; "
                         f"write {other}model: {{config: {{in_channels: {seen}}}}}.")
    wanted, given = channels * variance.output_channels, config.get("out_channels") or channels
    if given != wanted:
        other = "learned_range" if given == 2 * channels else "fixed"
        raise InputError(f"model: out_channels is {given}, but variance {dump(variance)['type']} needs {wanted}; "
                         f"write objective: {{variance: {{type: {other}}}}}, or for a model without a path model: {{config: "
                         f"{{out_channels: {wanted}}}}}.")


def check_evaluation(
    settings: EvaluationSettings, image_shape: tuple[int, ...], num_frames: int | None, streams: bool, labelled: bool
) -> None:
    """Refuses metrics whose evidence is not there, and opens the references, so that they are not missed after the training."""
    if num_frames is not None:
        raise InputError("evaluation: the data are clips, and there is no metric for videos yet. Leave evaluation out, and look at the "
                         "contact sheets that training: {sample_every: ...} writes.")
    given: set[Need] = {"reference images"}
    given |= {"training", "nearest"} if not streams else set()
    given |= {"labels"} if labelled else set()
    given |= getattr(FEATURES.constructors[settings.features.name], "gives", frozenset())
    check_needs(settings.metrics, given, settings.features.name)
    if settings.features.name == "digits_classifier" and image_shape != (1, 8, 8):
        these = "x".join(map(str, image_shape))
        raise InputError(f"evaluation.features: digits_classifier looks at images of 1x8x8, but these are {these}. "
                         "Write features: {type: classifier, data: ...} with labelled images of your own, or {type: pixels}.")
    width, preset = checked_features(settings.features, image_shape)
    count = check_reference("evaluation.reference", settings.reference)
    check_counts(settings.metrics, {"generated": settings.num_samples, "reference": count}, width, preset)
    loop = settings.in_loop
    if loop is None:
        return
    check_needs(loop.metrics, given, settings.features.name)
    count = check_reference("evaluation.in_loop.reference", loop.reference)
    check_counts(loop.metrics, {"generated": loop.num_samples, "reference": count}, width, preset)
    if loop.select is not None:
        check_select(loop.select, loop.metrics)
    if loop.select is not None and loop.reference == settings.reference:
        raise InputError("evaluation.in_loop.reference: the best checkpoint would be picked on the images of the final score. "
                         "Give in_loop another reference (for digits: {type: digits, part: classifier}), or leave select out.")


def checked_features(features: Part, image_shape: tuple[int, ...]) -> tuple[int, Mapping[str, Any]]:
    """Opens what the extractor is made of: its weights, unless they would be fetched, or the data that it will be trained on. Returns its
    width and its preset, as far as they are known by now."""
    if getattr(FEATURES.constructors[features.name], "trains_here", False):
        for own in features.arguments.values():
            if isinstance(own, Part):
                own.build()
    elif looks_local(str(features.arguments.get("model", "."))):
        extractor = features.build(shape=image_shape)
        return extractor.widths["features"], extractor.preset
    return 1, {}


def check_reference(key: str, reference: Part) -> int:
    """Refuses what `opened` refuses. Returns its number of images."""
    return len(opened(key, reference, "a reference is"))


def opened(key: str, data: Part, they_are: str) -> ImageDataset:
    """Images that are read as a whole. Refuses those that are not there, clips, and what can only be read as a stream."""
    found: ImageDataset | ImageStream = data.build()
    refuse_clips(found, key)
    if isinstance(found, ImageStream):
        raise InputError(f"{key}: a stream has no end, and {they_are} read as a whole. Write streaming: false.")
    return found


def check_select(select: str, metrics: list[Any]) -> None:
    """Refuse a score that none of the metrics gives."""
    known = [score for metric in metrics for score in metric.scores]
    if select not in known:
        raise InputError(f"evaluation.in_loop.select: no metric of in_loop gives {select!r}{nearest(select, known)}.")


@dataclass(frozen=True)
class Launch:
    """What `accelerate launch` decided and a regularizer may not stand."""

    sharded: bool = False
    compiled: bool = False
    precision: str = "no"

    @staticmethod
    def of(accelerator: Accelerator) -> "Launch":
        compiled = accelerator.state.dynamo_plugin.backend != DynamoBackend.NO
        return Launch(accelerator.distributed_type == DistributedType.FSDP, compiled, accelerator.mixed_precision)


def in_use(objective: Objective) -> Iterator[tuple[str, Any]]:
    """(name, regularizer) of those whose weight is not 0."""
    return ((name, r) for name, r in objective.regularizers.items() if cast(Any, r).weight > 0)


def check_regularizers(objective: Objective, schedule: NoiseSchedule, shape: tuple[int, ...], model: nn.Module, dtype: str) -> None:
    """shape: of a micro-batch x0 [B, ...]. model: the diffusers model, with or without weights, and the dtype they will have."""
    for name, regularizer in in_use(objective):
        if hasattr(regularizer, "check"):
            regularizer.check(schedule, shape)
        if getattr(regularizer, "needs_full_precision", False) and dtype not in ("float32", "float64"):
            raise InputError(f"regularizer {name} takes differences of outputs, which in {dtype} are no more than rounding. Write model: "
                             "{dtype: float32} (accelerate's mixed precision may stay on: these passes leave it).")
        if regularizer.needs_double_backward:
            other = attention_without_math(model)
            if other is not None:
                raise InputError(f"regularizer {name} goes back through the network twice, which needs PyTorch's own attention (its math "
                                 f"kernel), but the model's attention is {other}. Write method: finite_difference where the regularizer "
                                 "has one, or give the model diffusers' default attention processor.")


def check_launch(objective: Objective, launch: Launch) -> None:
    """Refuses what the regularizers do not stand of the launch."""
    for name, regularizer in in_use(objective):
        if regularizer.needs_double_backward:
            reason = "FSDP does not support" if launch.sharded else "a compiled network does not support" if launch.compiled else None
            if reason is not None:
                other = "without FSDP" if launch.sharded else "without dynamo_backend"
                raise InputError(f"regularizer {name} goes back through the network twice, which {reason}. Write method: "
                                 f"finite_difference where the regularizer has one, or launch {other}.")
            if launch.precision == "fp16":
                raise InputError(f"regularizer {name} has a gradient within the loss, which fp16 does not scale: it vanishes. "
                                 "Launch with mixed_precision bf16 or no.")
        if getattr(regularizer, "needs_full_precision", False) and launch.sharded and launch.precision != "no":
            raise InputError(f"regularizer {name} takes differences of outputs, which in {launch.precision} are no more than rounding, and "
                             "under FSDP no pass leaves mixed precision. Launch with mixed_precision no, or without FSDP.")


def attention_without_math(model: nn.Module) -> str | None:
    """The first attention processor that does not call torch's scaled_dot_product_attention, if there is one."""
    for module in model.modules():
        processor = getattr(module, "processor", None)
        if processor is None or not callable(processor):
            continue
        try:
            source = inspect.getsource(type(processor))
        except (OSError, TypeError):  # it cannot be looked at
            return type(processor).__name__
        dispatched = "dispatch_attention_fn" in source
        if dispatched and str(getattr(getattr(processor, "_attention_backend", None), "value", "native")) not in ("native", "_native_math"):
            return f"{type(processor).__name__} with the backend {processor._attention_backend.value}"
        if not dispatched and "scaled_dot_product_attention" not in source:
            return type(processor).__name__
    return None
