"""Any optimizer by name or import path, and which parameters its weight decay touches."""

import importlib
import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from difftrain.registry import InputError, NonNegative, nearest


@dataclass(frozen=True)
class Optimizer:
    """name: a class of torch.optim in any case (adamw, sgd, adam ...) or an import path (bitsandbytes.optim.AdamW8bit).

    weight_decay is passed when it is not 0 or the class has its own default; decay_norms_and_biases: false leaves out
    parameters with fewer than two dimensions. options: further arguments of the class, such as betas or momentum.
    """

    name: str = "adamw"
    lr: NonNegative = 1e-4
    weight_decay: NonNegative = 0.0
    decay_norms_and_biases: bool = True
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        accepted = inspect.signature(optimizer_class(self.name)).parameters
        unknown = [key for key in self.options if key not in accepted or key in ("params", "lr", "weight_decay")]
        if unknown:
            known = set(accepted) - {"params", "lr", "weight_decay"}
            raise InputError(f"optimizer.options.{unknown[0]}: {self.name} has no such option{nearest(unknown[0], known)}.")
        if self.weight_decay and "weight_decay" not in accepted:
            raise InputError(f"optimizer.weight_decay: {self.name} has none; leave it out.")

    def build(self, module: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of the module's trained parameters; group["initial_lr"] is the rate that a schedule scales."""
        trained = [p for p in module.parameters() if p.requires_grad]
        decayed = [p for p in trained if p.ndim >= 2 or self.decay_norms_and_biases]
        others = [p for p in trained if p.ndim < 2 and not self.decay_norms_and_biases]
        groups: list[dict[str, Any]] = [{"params": decayed}] + ([{"params": others, "weight_decay": 0.0}] if others else [])
        constructor = optimizer_class(self.name)
        options = dict(self.options)
        if "weight_decay" in inspect.signature(constructor).parameters:
            options["weight_decay"] = self.weight_decay
        if "betas" in options:
            options["betas"] = tuple(options["betas"])
        optimizer = constructor(groups, lr=self.lr, **options)
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        return optimizer


def optimizer_class(name: str) -> Any:
    """The class behind a name, or an error that says which names there are."""
    if "." in name:
        module, _, attribute = name.rpartition(".")
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise InputError(f"optimizer.name: cannot import {name!r} ({error}); "
                             "install its package or write a name of torch.optim.") from None
    known = {key.lower(): value for key, value in vars(torch.optim).items() if inspect.isclass(value) and key != "Optimizer"}
    if name.lower() not in known:
        raise InputError(f"optimizer.name: unknown optimizer {name!r}{nearest(name.lower(), known)}; or write an import path.")
    return known[name.lower()]
