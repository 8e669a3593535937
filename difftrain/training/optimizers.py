"""Any optimizer by name or import path, and which parameters its weight decay changes."""

import importlib
import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from difftrain.core.errors import InputError, nearest
from difftrain.core.registry import NonNegative

OWN = {"params", "lr", "weight_decay"}  # arguments that are not options, or have keys of their own
UNFIT = ("Optimizer", "LBFGS")  # the base class, and the one that evaluates the loss itself


@dataclass(frozen=True)
class Optimizer:
    """An optimizer's class and arguments.

    Args:
        name: A class of torch.optim in any case (adamw, sgd, adam ...), or an import path
            (bitsandbytes.optim.AdamW8bit).
        lr: The learning rate, which a schedule scales.
        weight_decay: The weight decay. 0 is passed too, unless the class does not know it.
        decay_norms_and_biases: Whether parameters with fewer than two dimensions decay as well.
        options: Further arguments of the class, such as betas or momentum.

    Raises:
        InputError: If there is no such class, or if it does not take one of the arguments.
    """

    name: str = "adamw"
    lr: NonNegative = 1e-4
    weight_decay: NonNegative = 0.0
    decay_norms_and_biases: bool = True
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        accepted, takes_any = accepted_by(self.name)
        for key in self.options:
            is_accepted = key in accepted or takes_any
            if key in OWN or not is_accepted:
                raise InputError(
                    f"optimizer.options.{key}: {self.name} has no such option"
                    f"{nearest(key, accepted - OWN)}."
                )
        if self.weight_decay and "weight_decay" not in accepted and not takes_any:
            raise InputError(f"optimizer.weight_decay: {self.name} has none. Leave it out.")

    def build(self, module: nn.Module) -> torch.optim.Optimizer:
        """Build the optimizer of a module's trained parameters.

        Args:
            module: The module.

        Returns:
            The optimizer. `group["initial_lr"]` of each group is the rate that a schedule scales.

        Raises:
            InputError: If the class does not take the values of its arguments.
        """
        # Groups with and without decay
        decayed: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for p in module.parameters():
            if p.requires_grad:
                decays = p.ndim >= 2 or self.decay_norms_and_biases
                (decayed if decays else others).append(p)
        groups: list[dict[str, Any]] = [{"params": decayed}]
        if others:
            groups.append({"params": others, "weight_decay": 0.0})
        # The optimizer
        try:
            optimizer = optimizer_class(self.name)(groups, lr=self.lr, **self._arguments())
        except (TypeError, ValueError) as error:
            raise InputError(
                f"optimizer: {self.name} does not take its arguments: {error}. Correct "
                "optimizer.options."
            ) from error
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        return optimizer  # type: ignore[no-any-return]

    def restate(self, groups: list[dict[str, Any]]) -> None:
        """Set these arguments again in groups that a checkpoint has overwritten with its own.

        Args:
            groups: The parameter groups of an optimizer that `build` returned.
        """
        arguments = self._arguments()
        for i, group in enumerate(groups):
            group.update({key: value for key, value in arguments.items() if key in group})
            group["initial_lr"] = self.lr
            if i == 1:  # norms and biases without decay
                group["weight_decay"] = 0.0

    def _arguments(self) -> dict[str, Any]:
        """Return the arguments of the class apart from parameters and learning rate."""
        arguments: dict[str, Any] = {}
        for key, value in self.options.items():
            # YAML has no tuples, and torch wants betas as one.
            arguments[key] = tuple(value) if isinstance(value, list) else value
        accepted, takes_any = accepted_by(self.name)
        if "weight_decay" in accepted or (takes_any and self.weight_decay > 0):
            arguments["weight_decay"] = self.weight_decay
        return arguments


def accepted_by(name: str) -> tuple[set[str], bool]:
    """Return which arguments an optimizer's class takes.

    Args:
        name: A name of torch.optim, or an import path.

    Returns:
        The names of the arguments, and whether the class takes any others too.
    """
    known, takes_any = set(), False
    for key, parameter in inspect.signature(optimizer_class(name)).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            takes_any = True
        elif parameter.kind is not parameter.VAR_POSITIONAL:
            known.add(key)
    return known, takes_any


def optimizer_class(name: str) -> Any:
    """Return the class that a name stands for.

    Args:
        name: A name of torch.optim in any case, or an import path.

    Raises:
        InputError: If there is none. The message lists the known names.
    """
    if "." in name:
        return imported_class(name)
    known = {}
    for key, value in vars(torch.optim).items():
        if inspect.isclass(value) and key not in UNFIT:
            known[key.lower()] = value
    if name.lower() not in known:
        raise InputError(
            f"optimizer.name: unknown optimizer {name!r}{nearest(name.lower(), known)}. Write one "
            "of them, or an import path."
        )
    return known[name.lower()]


def imported_class(path: str) -> Any:
    """Return the class at an import path, such as "bitsandbytes.optim.AdamW8bit".

    Raises:
        InputError: If it cannot be imported, or if it is not a class.
    """
    module, _, attribute = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"optimizer.name: cannot import {path!r} ({error}). Install its package, or write a "
            "name of torch.optim."
        ) from None
    if not callable(found):
        raise InputError(
            f"optimizer.name: {path!r} is not a class. Write the import path of an optimizer's "
            "class."
        )
    return found
