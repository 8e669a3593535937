"""What trains: LoRA or DoRA layers of peft, weights by name, or all weights; the rest is frozen.

An adapter acts on a denoiser's network and, where text encoders train, on those. What trains is at
least float32, whatever the precision of the frozen rest.
"""

import fnmatch
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from difftrain.core.errors import InputError
from difftrain.core.registry import Positive, PositiveInt, UnitInterval
from difftrain.models.layers import (
    PRESETS,
    TEXT_PRESETS,
    counted,
    end_of,
    largest_rank,
    layers_in,
    select,
)
from difftrain.models.model import DenoiserNetwork
from difftrain.models.slots import ADAPTERS

NAME = "default"  # peft's name of the adapter that trains, which diffusers' tools expect
HALF = (torch.bfloat16, torch.float16)


class Adapter(ABC):
    """Selects or adds the weights that train.

    Attributes:
        makes_lora: Whether the result is a LoRA file beside the base model, and not a model of its
            own.
    """

    makes_lora: ClassVar[bool] = False

    @property
    def trains_text(self) -> bool:
        """Whether text encoders train."""
        return False

    @abstractmethod
    def check(self, denoiser: DenoiserNetwork) -> None:
        """Refuse a denoiser that the adapter does not fit.

        Args:
            denoiser: The network, with or without weights.

        Raises:
            InputError: If a setting does not fit the network.
        """

    @abstractmethod
    def apply(self, denoiser: DenoiserNetwork) -> None:
        """Freeze all weights, then select or add those that train.

        New weights come from torch's global generator.

        Raises:
            InputError: If a setting does not fit the network.
        """


@ADAPTERS.register("lora")
@dataclass(frozen=True)
class LoRA(Adapter):
    """W x + (alpha / rank) B A x, with A [rank, in] and B [out, rank], B = 0 at first.

    Of text encoders only CLIPs get layers: diffusers loads no LoRA into a T5.

    Args:
        rank: Rank of the change of each weight.
        alpha: Scale of the change, relative to the rank; None for `rank`.
        targets: attention, attention_mlp, all_linear or all_linear_conv (without the convolutions
            from and to the few channels of x_t); or a list of layer names (ends of names) and
            patterns (with * ? [).
        dropout: Probability with which an input of A is dropped in training.
        text_encoders: Whether the CLIP text encoders get layers too.
        text_targets: attention, attention_mlp or all_linear; or a list, as for `targets`.
        rank_stabilized: Whether the scale is alpha / sqrt(rank), arXiv:2312.03732.

    Reference:
        Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685.
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
            raise InputError(
                "adapter.text_targets: has no effect without text_encoders: true. Add that, or "
                "leave text_targets out."
            )

    @property
    def trains_text(self) -> bool:
        """Whether text encoders train."""
        return self.text_encoders

    def check(self, denoiser: DenoiserNetwork) -> None:
        """Refuse targets that match nothing, and a rank above that of a layer.

        Raises:
            InputError: If a setting does not fit the network.
        """
        for name, model in self._models(denoiser).items():
            layers = layers_in(model)
            for target in self._targets(name, model):
                largest = largest_rank(layers[target])
                if largest < self.rank:
                    key = "text_targets" if name.startswith("text") else "targets"
                    raise InputError(
                        f"adapter.rank: {self.rank} is above {largest}, the largest rank of layer "
                        f"{target} of the {name}. Write at most {largest}, or leave that layer out "
                        f"of {key}."
                    )

    def apply(self, denoiser: DenoiserNetwork) -> None:
        """Freeze all weights and add LoRA layers, from torch's global generator.

        Raises:
            InputError: If a setting does not fit the network.
        """
        self.check(denoiser)
        denoiser.requires_grad_(False)
        for name, model in self._models(denoiser).items():
            self._inject(model, self._targets(name, model))

    def _models(self, denoiser: DenoiserNetwork) -> dict[str, nn.Module]:
        models = {denoiser.folder: denoiser.model}
        if self.text_encoders:
            for name, encoder in text_encoders(denoiser).items():
                if type(encoder).__name__.startswith("CLIP"):
                    models[name] = encoder
        return models

    def _targets(self, name: str, model: nn.Module) -> list[str]:
        if name.startswith("text"):
            return select(model, self.text_targets, TEXT_PRESETS, "adapter.text_targets")
        return select(model, self.targets, PRESETS, "adapter.targets")

    def _inject(self, model: nn.Module, targets: list[str]) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        # peft takes a name for the end of a name: proj_out for a.b.proj_out too.
        ends = tuple(f".{name}" for name in targets)
        others = [name for name in layers_in(model) if name not in targets and name.endswith(ends)]
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha or self.rank,
            lora_dropout=self.dropout,
            use_rslora=self.rank_stabilized,
            use_dora=self.decomposes,
            target_modules=targets,
            exclude_modules=others or None,
        )
        inject_adapter_in_model(config, model, NAME)
        mark_adapted(model, True)
        for layer in lora_layers(model).values():
            raise_precision(layer)


@ADAPTERS.register("dora")
@dataclass(frozen=True)
class DoRA(LoRA):
    """m (W + (alpha / rank) B A) / ||W + (alpha / rank) B A||, with the norm per output.

    m starts at ||W||. The norm is a constant for the gradient. The arguments are those of LoRA.

    Reference:
        Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv:2402.09353.
    """

    decomposes: ClassVar[bool] = True


@ADAPTERS.register("named")
@dataclass(frozen=True)
class Named(Adapter):
    """Trains the weights whose names match one of the patterns, such as "*.attn2.to_k.weight".

    In a half-precision model the layers that own such weights compute in float32.

    Args:
        patterns: Patterns of names (with * ? [). Those of a text encoder's weights begin with its
            folder: "text_encoder.*.fc1.weight".
        text_encoders: Whether patterns may name weights of text encoders.
    """

    patterns: list[str]
    text_encoders: bool = False

    @property
    def trains_text(self) -> bool:
        """Whether text encoders train."""
        return self.text_encoders

    def check(self, denoiser: DenoiserNetwork) -> None:
        """Refuse patterns that match nothing.

        Raises:
            InputError: If a setting does not fit the network.
        """
        names = list(self._weights(denoiser))
        example = f'Write patterns such as "*.{end_of(names[0])}"'
        if not self.patterns:
            raise InputError(
                f"adapter.patterns: an empty list trains nothing. {example}, or adapter: full."
            )
        for pattern in self.patterns:
            if fnmatch.filter(names, pattern):
                continue
            of_text = "Those of text encoders need text_encoders: true."
            hint = "" if self.text_encoders else f" {of_text}"
            raise InputError(
                f"adapter.patterns: {pattern!r} matches none of the {len(names)} weights. Their "
                f"names end in {counted(end_of(name) for name in names)}. {example}.{hint}"
            )

    def apply(self, denoiser: DenoiserNetwork) -> None:
        """Freeze all weights but those that match.

        Raises:
            InputError: If a setting does not fit the network.
        """
        self.check(denoiser)
        denoiser.requires_grad_(False)
        denoiser.rest_dtype = denoiser.dtype
        for shown, (root, name) in self._weights(denoiser).items():
            if any(fnmatch.fnmatchcase(shown, pattern) for pattern in self.patterns):
                owner, _, _ = name.rpartition(".")
                compute_in_float32(root.get_submodule(owner), shown)
                root.get_parameter(name).requires_grad_(True)

    def _weights(self, denoiser: DenoiserNetwork) -> dict[str, tuple[nn.Module, str]]:
        """The model and the name in it, by the name that a pattern sees."""
        roots = {"": denoiser.model}
        if self.text_encoders:
            for name, encoder in text_encoders(denoiser).items():
                roots[f"{name}."] = encoder
        weights = {}
        for prefix, root in roots.items():
            for name, _ in root.named_parameters():
                weights[prefix + name] = (root, name)
        return weights


@ADAPTERS.register("full")
@dataclass(frozen=True)
class Full(Adapter):
    """Trains every weight of the network.

    Args:
        text_encoders: Whether every weight of the text encoders trains too.
    """

    text_encoders: bool = False

    @property
    def trains_text(self) -> bool:
        """Whether text encoders train."""
        return self.text_encoders

    def check(self, denoiser: DenoiserNetwork) -> None:
        """Refuse to train text encoders that are not there.

        Raises:
            InputError: If the model has no text encoders to train.
        """
        self._models(denoiser)

    def apply(self, denoiser: DenoiserNetwork) -> None:
        """Let every weight train, in float32 at least.

        Raises:
            InputError: If the model has no text encoders to train.
        """
        denoiser.requires_grad_(False)
        for model in self._models(denoiser):
            model.requires_grad_(True)
            if any(p.dtype in HALF for p in model.parameters()):
                model.to(torch.float32)

    def _models(self, denoiser: DenoiserNetwork) -> list[nn.Module]:
        encoders = text_encoders(denoiser).values() if self.text_encoders else []
        return [denoiser.model, *encoders]


def adapt(denoiser: DenoiserNetwork, adapter: Adapter | None) -> None:
    """Select or add what trains in a denoiser; without an adapter all of it trains.

    Args:
        denoiser: The network, with or without weights.
        adapter: The recipe's adapter.

    Raises:
        InputError: If a setting does not fit the network, or nothing would train.
    """
    if adapter is not None:
        adapter.apply(denoiser)
    if denoiser.text is not None:
        denoiser.text.freeze_unread()
    if trainable(denoiser):
        return
    if denoiser.text is None:
        raise InputError(
            f"model: no parameter of this {type(denoiser.model).__name__} requires a gradient, so "
            "nothing would train. Leave some of them unfrozen."
        )
    raise InputError(
        "adapter: the selected weights never receive a gradient, because the last layer of this "
        "text encoder is unused. Select other weights."
    )


# What an adapter finds in a denoiser


def text_encoders(denoiser: DenoiserNetwork) -> dict[str, nn.Module]:
    """Return the text encoders of a denoiser by folder.

    Raises:
        InputError: If it has none.
    """
    if denoiser.text is None:
        raise InputError(
            f"adapter.text_encoders: this {type(denoiser.model).__name__} comes without text "
            "encoders to train. Leave it out."
        )
    return denoiser.text.by_folder()


# Precision


def compute_in_float32(layer: nn.Module, name: str) -> None:
    """Make a half-precision layer compute in float32, with inputs and outputs as before.

    Args:
        layer: The layer; one in full precision stays unchanged.
        name: The name of a weight of it, for messages.

    Raises:
        InputError: If the weight is owned by a block of layers, which cannot change as one.
    """
    dtype = next(layer.parameters()).dtype
    if dtype not in HALF:
        return
    if any(layer.children()):
        raise InputError(
            f"adapter.patterns: {name} belongs to a block of layers and not to a single layer, so "
            f"it cannot train in a model of {str(dtype).removeprefix('torch.')}. Leave model.dtype "
            "out, or that weight."
        )
    layer.to(torch.float32)
    layer.register_forward_pre_hook(lambda _, inputs: tuple(in_float32(x) for x in inputs))
    layer.register_forward_hook(lambda _, inputs, output: output.to(dtype))


def in_float32(x: Any) -> Any:
    """Return a half-precision tensor in float32, anything else unchanged."""
    return x.float() if isinstance(x, Tensor) and x.dtype in HALF else x


def raise_precision(layer: Any) -> None:
    """Convert a new LoRA layer to float32; peft gives it the precision of the layer it wraps.

    DoRA's norms are computed again, without the rounding of half precision.
    """
    trained = [p for p in layer.parameters() if p.requires_grad and p.dtype in HALF]
    for parameter in trained:
        parameter.data = parameter.data.float()
    if trained and NAME in layer.lora_magnitude_vector:
        layer.lora_magnitude_vector[NAME].update_layer(
            base_layer=layer.get_base_layer(),
            lora_A=layer.lora_A[NAME].weight,
            lora_B=layer.lora_B[NAME].weight,
            scaling=layer.scaling[NAME],
        )


# What an adapter leaves behind


def lora_layers(model: nn.Module, adapter: str = NAME) -> dict[str, Any]:
    """Return peft's layers that hold an adapter, by the name of the layer that each wraps.

    Args:
        model: A network, a text encoder, or a denoiser.
        adapter: The adapter's name in peft.
    """
    # There is no such layer before peft is imported, and to import it takes seconds.
    peft: Any = sys.modules.get("peft.tuners.lora")
    if peft is None:
        return {}
    found: dict[str, Any] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, peft.LoraLayer) and adapter in layer.lora_A:
            found[name] = layer
    return found


def mark_adapted(model: Any, is_adapted: bool) -> None:
    """Note on a model that it has adapters, as diffusers' and transformers' own methods do."""
    model._hf_peft_config_loaded = is_adapted


def base_weights(denoiser: nn.Module) -> dict[str, Tensor]:
    """Return the weights of the base model, by their names without an adapter."""
    weights = {}
    for name, value in denoiser.state_dict().items():
        if ".lora_" not in name:
            weights[name.replace(".base_layer.", ".")] = value
    return weights


def trainable(denoiser: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that train, by name."""
    return {name: value for name, value in denoiser.named_parameters() if value.requires_grad}


def describe(denoiser: nn.Module) -> str:
    """Return a line such as "LoRA of rank 8 on 32 layers: 1,234 of 56,789 parameters train"."""
    trained = trainable(denoiser)
    num_trained = sum(p.numel() for p in trained.values())
    total = sum(p.numel() for p in denoiser.parameters())
    count = f"{num_trained:,} of {total:,} parameters train"
    layers = []
    for layer in lora_layers(denoiser).values():
        if layer.lora_A[NAME].weight.requires_grad:
            layers.append(layer)
    if not layers:
        return f"{len(trained)} weights: {count}"
    kind = "DoRA" if NAME in layers[0].lora_magnitude_vector else "LoRA"
    return f"{kind} of rank {layers[0].r[NAME]} on {len(layers)} layers: {count}"
