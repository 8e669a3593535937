"""Any optimizer by name or import path, and which parameters its weight decay touches."""

import importlib
import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from difftrain.registry import InputError, NonNegative, nearest

OWN = {"params", "lr", "weight_decay"}  # arguments with a key of their own


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
        accepted, takes_any = accepted_by(self.name)
        unknown = [key for key in self.options if key in OWN or (key not in accepted and not takes_any)]
        if unknown:
            raise InputError(f"optimizer.options.{unknown[0]}: {self.name} has no such option{nearest(unknown[0], accepted - OWN)}.")
        if self.weight_decay and "weight_decay" not in accepted and not takes_any:
            raise InputError(f"optimizer.weight_decay: {self.name} has none; leave it out.")

    def build(self, module: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of the module's trained parameters; group["initial_lr"] is the rate that a schedule scales."""
        trained = [p for p in module.parameters() if p.requires_grad]
        decayed = [p for p in trained if p.ndim >= 2 or self.decay_norms_and_biases]
        others = [p for p in trained if p.ndim < 2 and not self.decay_norms_and_biases]
        groups: list[dict[str, Any]] = [{"params": decayed}] + ([{"params": others, "weight_decay": 0.0}] if others else [])
        try:
            optimizer = optimizer_class(self.name)(groups, lr=self.lr, **self._arguments())
        except (TypeError, ValueError) as error:
            raise InputError(f"optimizer: {self.name} refuses its arguments: {error}. Correct optimizer.options.") from error
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        return optimizer

    def restate(self, groups: list[dict[str, Any]]) -> None:
        """Write this recipe's arguments into groups that a checkpoint has overwritten with those of its own."""
        for i, group in enumerate(groups):
            group.update({key: value for key, value in self._arguments().items() if key in group}, initial_lr=self.lr)
            if i == 1:  # norms and biases without decay
                group["weight_decay"] = 0.0

    def _arguments(self) -> dict[str, Any]:
        accepted, takes_any = accepted_by(self.name)
        passes_decay = "weight_decay" in accepted or (takes_any and self.weight_decay > 0)
        listed = {key: tuple(value) if isinstance(value, list) else value for key, value in self.options.items()}  # betas
        return {**listed, **({"weight_decay": self.weight_decay} if passes_decay else {})}


def accepted_by(name: str) -> tuple[set[str], bool]:
    """The arguments of an optimizer's class, and whether it takes any others too."""
    found = inspect.signature(optimizer_class(name)).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in found.values())
    return {key for key, p in found.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}, takes_any


def optimizer_class(name: str) -> Any:
    """The class behind a name, or an error that says which names there are."""
    if "." in name:
        module, _, attribute = name.rpartition(".")
        try:
            found = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise InputError(f"optimizer.name: cannot import {name!r} ({error}); "
                             "install its package or write a name of torch.optim.") from None
        if not callable(found):
            raise InputError(f"optimizer.name: {name!r} is no class; write the import path of an optimizer's class.")
        return found
    without = ("Optimizer", "LBFGS")  # the base class, and the one that evaluates the loss itself
    known = {key.lower(): value for key, value in vars(torch.optim).items() if inspect.isclass(value) and key not in without}
    if name.lower() not in known:
        raise InputError(f"optimizer.name: unknown optimizer {name!r}{nearest(name.lower(), known)}; or write an import path.")
    return known[name.lower()]
