"""What trains: LoRA or DoRA layers through peft, weights by name, or all of them; everything else is frozen.

An adapter acts on a denoiser's `.model` and, where text encoders train, on those in its `.text.encoders`. What trains is float32
at least, whatever precision the frozen rest is kept in.
"""

import fnmatch
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from difftrain.denoisers import DiffusersDenoiser
from difftrain.registry import ADAPTERS, InputError, Positive, PositiveInt, UnitInterval
from difftrain.targets import PRESETS, TEXT_PRESETS, counted, end_of, largest_rank, layers_in, select

NAME = "default"  # peft's name of the adapter that trains, and the one that diffusers' tools expect
HALF = (torch.bfloat16, torch.float16)


class Adapter(Protocol):
    makes_lora: ClassVar[bool]  # the result is a LoRA file beside the base model, not a model of its own

    @property
    def trains_text(self) -> bool: ...

    def check(self, denoiser: DiffusersDenoiser) -> None:
        """InputError where it does not fit the denoiser, whose weights may be on the meta device."""

    def apply(self, denoiser: DiffusersDenoiser) -> None:
        """Freeze everything, then add or select what trains. New weights come from torch's global generator, seeded by the caller."""


@ADAPTERS.register("lora")
@dataclass(frozen=True)
class LoRA:
    """W x + (alpha / rank) B A x, with A [rank, in] and B [out, rank], B = 0 at first.

    Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685. alpha: None means rank.
    targets: attention, attention_mlp, all_linear or all_linear_conv (without the convolutions from and to the few channels of
    x_t), or a list of layer names (ends of names) and patterns (with * ? [). text_encoders: the CLIP encoders too, by text_targets
    (no convolutions there); T5 stays frozen, since diffusers loads no LoRA into it. rank_stabilized: the scale is
    alpha / sqrt(rank), arXiv:2312.03732.
    """

    rank: PositiveInt = 4
    alpha: Positive | None = None
    targets: str | list[str] = "attention"
    dropout: UnitInterval = 0.0
    text_encoders: bool = False
    text_targets: str | list[str] = "attention"
    rank_stabilized: bool = False
    makes_lora: ClassVar[bool] = True
    decomposes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.text_targets != "attention" and not self.text_encoders:
            raise InputError("adapter.text_targets: has no effect without text_encoders: true; add that, or leave text_targets out.")

    @property
    def trains_text(self) -> bool:
        return self.text_encoders

    def check(self, denoiser: DiffusersDenoiser) -> None:
        for name, model in self._models(denoiser).items():
            layers, key = layers_in(model), "text_targets" if name.startswith("text") else "targets"
            for target in self._targets(name, model):
                if (largest := largest_rank(layers[target])) < self.rank:
                    raise InputError(f"adapter.rank: {self.rank} is above what layer {target} of the {name} holds; "
                                     f"write at most {largest}, or leave that layer out of {key}.")

    def apply(self, denoiser: DiffusersDenoiser) -> None:
        self.check(denoiser)
        denoiser.requires_grad_(False)
        for name, model in self._models(denoiser).items():
            self._inject(model, self._targets(name, model))

    def _models(self, denoiser: DiffusersDenoiser) -> dict[str, nn.Module]:
        encoders = text_encoders(denoiser) if self.text_encoders else {}
        return {folder_of(denoiser): denoiser.model, **{k: v for k, v in encoders.items() if type(v).__name__.startswith("CLIP")}}

    def _targets(self, name: str, model: nn.Module) -> list[str]:
        if name.startswith("text"):
            return select(model, self.text_targets, TEXT_PRESETS, "adapter.text_targets")
        return select(model, self.targets, PRESETS, "adapter.targets")

    def _inject(self, model: Any, targets: list[str]) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        ends = tuple(f".{name}" for name in targets)  # peft takes a name for the end of a name: proj_out for a.b.proj_out too
        others = [name for name in layers_in(model) if name not in targets and name.endswith(ends)]
        config = LoraConfig(
            r=self.rank, lora_alpha=self.alpha or self.rank, lora_dropout=self.dropout, use_rslora=self.rank_stabilized,
            use_dora=self.decomposes, target_modules=targets, exclude_modules=others or None,
        )
        inject_adapter_in_model(config, model, NAME)
        model._hf_peft_config_loaded = True  # what diffusers' and transformers' own add_adapter notes
        for layer in lora_layers(model).values():
            raise_precision(layer)


@ADAPTERS.register("dora")
@dataclass(frozen=True)
class DoRA(LoRA):
    """m (W + (alpha / rank) B A) / ||W + (alpha / rank) B A||, the norm per output, taken as constant in the gradient.

    Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv:2402.09353. m starts at ||W||; the arguments are LoRA's.
    """

    decomposes: ClassVar[bool] = True


@ADAPTERS.register("named")
@dataclass(frozen=True)
class Named:
    """Trains the weights whose names match one of the patterns, such as "*.attn2.to_k.weight", where they are.

    text_encoders: a pattern may name their weights too, behind the encoder's name ("text_encoder.*.fc1.weight"). In a half-precision
    model the layers that own such weights compute in float32.
    """

    patterns: list[str]
    text_encoders: bool = False
    makes_lora: ClassVar[bool] = False

    @property
    def trains_text(self) -> bool:
        return self.text_encoders

    def check(self, denoiser: DiffusersDenoiser) -> None:
        names = list(self._weights(denoiser))
        if not self.patterns:
            raise InputError(f"adapter.patterns: an empty list trains nothing. Write patterns such as \"*.{end_of(names[0])}\", or "
                             "adapter: full.")
        for pattern in self.patterns:
            if not fnmatch.filter(names, pattern):
                hint = " Those of text encoders need text_encoders: true." if not self.text_encoders else ""
                raise InputError(f"adapter.patterns: {pattern!r} matches none of the {len(names)} weights. Their names end in "
                                 f"{counted(end_of(name) for name in names)}. Write patterns such as \"*.{end_of(names[0])}\".{hint}")

    def apply(self, denoiser: DiffusersDenoiser) -> None:
        self.check(denoiser)
        denoiser.requires_grad_(False)
        denoiser.rest_dtype = denoiser.dtype
        for shown, (root, name) in self._weights(denoiser).items():
            if any(fnmatch.fnmatchcase(shown, pattern) for pattern in self.patterns):
                owner, _, _ = name.rpartition(".")
                compute_in_float32(root.get_submodule(owner), shown)
                root.get_parameter(name).requires_grad_(True)

    def _weights(self, denoiser: DiffusersDenoiser) -> dict[str, tuple[nn.Module, str]]:
        """By the name that a pattern sees: the model and the name in it."""
        encoders = text_encoders(denoiser) if self.text_encoders else {}
        roots = {"": denoiser.model, **{f"{name}.": encoder for name, encoder in encoders.items()}}
        return {prefix + name: (root, name) for prefix, root in roots.items() for name, _ in root.named_parameters()}


@ADAPTERS.register("full")
@dataclass(frozen=True)
class Full:
    """Trains every weight of the denoiser; text_encoders: and every weight of its text encoders."""

    text_encoders: bool = False
    makes_lora: ClassVar[bool] = False

    @property
    def trains_text(self) -> bool:
        return self.text_encoders

    def check(self, denoiser: DiffusersDenoiser) -> None:
        if self.text_encoders:
            text_encoders(denoiser)

    def apply(self, denoiser: DiffusersDenoiser) -> None:
        denoiser.requires_grad_(False)
        for model in [denoiser.model, *(text_encoders(denoiser).values() if self.text_encoders else [])]:
            model.requires_grad_(True)
            if any(p.dtype in HALF for p in model.parameters()):
                model.to(torch.float32)


# What an adapter finds in a denoiser


def folder_of(denoiser: DiffusersDenoiser) -> str:
    """The denoiser's place in a pipeline, which is also the prefix of its keys in a LoRA file: unet or transformer."""
    return "transformer" if "Transformer" in type(denoiser.model).__name__ else "unet"


def text_encoders(denoiser: DiffusersDenoiser) -> dict[str, nn.Module]:
    text = getattr(denoiser, "text", None)
    if text is None:
        raise InputError(f"adapter.text_encoders: this {type(denoiser.model).__name__} comes without text encoders to train; leave it out.")
    return dict(text.encoders.items())


# Precision


def compute_in_float32(layer: nn.Module, name: str) -> None:
    """A half-precision layer with float32 weights, which takes and returns what it did before."""
    dtype = next(layer.parameters()).dtype
    if dtype not in HALF:
        return
    if any(layer.children()):
        raise InputError(f"adapter.patterns: {name} belongs to no layer of its own, and cannot train in a model of "
                         f"{str(dtype).removeprefix('torch.')}; leave model.dtype out, or that weight.")
    layer.to(torch.float32)
    layer.register_forward_pre_hook(lambda _, inputs: tuple(lift(x) for x in inputs))
    layer.register_forward_hook(lambda _, inputs, output: output.to(dtype))


def lift(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) and x.dtype in HALF else x


def lora_layers(model: nn.Module, adapter: str = NAME) -> dict[str, Any]:
    """peft's layers that hold the adapter, by the name of the layer they wrap."""
    from peft.tuners.lora import LoraLayer

    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer) and adapter in layer.lora_A}


def raise_precision(layer: Any) -> None:
    """float32 for a new LoRA layer, which peft makes in the precision of the layer it wraps; DoRA's norms are taken anew."""
    trained = [p for p in layer.parameters() if p.requires_grad and p.dtype in HALF]
    for parameter in trained:
        parameter.data = parameter.data.float()
    if trained and NAME in layer.lora_magnitude_vector:
        layer.lora_magnitude_vector[NAME].update_layer(
            base_layer=layer.get_base_layer(), lora_A=layer.lora_A[NAME].weight, lora_B=layer.lora_B[NAME].weight,
            scaling=layer.scaling[NAME],
        )


# What came of it


def base_weights(denoiser: nn.Module) -> dict[str, Tensor]:
    """The weights as they were named before an adapter came between them."""
    return {name.replace(".base_layer.", "."): value for name, value in denoiser.state_dict().items() if ".lora_" not in name}


def trainable(denoiser: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in denoiser.named_parameters() if parameter.requires_grad}


def describe(denoiser: nn.Module) -> str:
    """One line such as "LoRA of rank 8 on 32 layers: 123,456 of 3,000,000 parameters train"."""
    trained, total = trainable(denoiser), sum(p.numel() for p in denoiser.parameters())
    layers = [layer for layer in lora_layers(denoiser).values() if layer.lora_A[NAME].weight.requires_grad]
    count = f"{sum(p.numel() for p in trained.values()):,} of {total:,} parameters train"
    if not layers:
        return f"{len(trained)} weights: {count}"
    kind = "DoRA" if NAME in layers[0].lora_magnitude_vector else "LoRA"
    return f"{kind} of rank {layers[0].r[NAME]} on {len(layers)} layers: {count}"
