"""What each sample of a generated set is asked to show: its class, or its prompt.

A set is planned as a whole, as a function of a seed. So a sample has one class or prompt, on any
number of processes and in blocks of any size.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from difftrain.core.digests import digest
from difftrain.core.rng import key
from difftrain.data.captions import Captions
from difftrain.models.conditioning.base import Conditioning

MOST_LISTED = 16  # prompts that a protocol spells out
Choice = Literal["reference", "training", "uniform", "in_turn"]


class Conditions(ABC):
    """The class or prompt of each sample of a generated set.

    Attributes:
        choice: Where they come from.
    """

    choice: Choice

    @abstractmethod
    def labels(self, indices: Sequence[int], conditioning: Conditioning) -> Tensor:
        """Return what the network is given for these samples: class ids, or numbers of prompts [B].

        Args:
            indices: Indices of samples.
            conditioning: What the network is conditioned on.
        """

    @abstractmethod
    def compared(self) -> dict[str, Any]:
        """Return plain data that two sets must share if their scores are compared."""

    @abstractmethod
    def described(self) -> dict[str, Any]:
        """Return plain data that decides the samples beside `compared`."""

    @property
    @abstractmethod
    def in_words(self) -> str:
        """What the samples are asked to show, for messages."""


@dataclass(frozen=True, eq=False)
class ClassConditions(Conditions):
    """A class for each sample.

    Args:
        choice: Where the shares of the classes come from.
        classes: Class ids [N] of the samples.
        num_classes: Classes of the model.
    """

    choice: Choice
    classes: Tensor
    num_classes: int

    def labels(self, indices: Sequence[int], conditioning: Conditioning) -> Tensor:
        """Return the class ids [B] of these samples."""
        return self.classes[list(indices)]

    def compared(self) -> dict[str, Any]:
        """Return the choice, and how many samples each class has, by class id."""
        counts = torch.bincount(self.classes, minlength=self.num_classes)
        return {"choice": self.choice, "counts": counts.tolist()}

    def described(self) -> dict[str, Any]:
        """Return a digest of the classes in the order of the samples."""
        return {"classes": {"digest": digest(self.classes)}}

    @property
    def in_words(self) -> str:
        """Which classes the samples are asked to show."""
        return {
            "reference": "classes in the shares of the reference",
            "training": "classes in the shares of the training data",
            "uniform": "each class equally often",
            "in_turn": "the classes in turn",
        }[self.choice]


@dataclass(frozen=True, eq=False)
class PromptConditions(Conditions):
    """A prompt for each sample.

    Args:
        choice: Where the prompts come from.
        captions: The captions, or prompts, as they are written.
        prompts: Those that are used, by their place among the captions, as the network reads them.
        order: Place [N] of each sample's caption.
        rendering: How captions become prompts.
    """

    choice: Choice
    captions: Sequence[str]
    prompts: Mapping[int, str]
    order: Tensor
    rendering: Mapping[str, Any] = field(default_factory=dict)

    def labels(self, indices: Sequence[int], conditioning: Conditioning) -> Tensor:
        """Return the numbers [B] of the prompts of these samples."""
        return conditioning.ids_of(self.prompts_of(indices))

    def prompts_of(self, indices: Sequence[int]) -> list[str]:
        """Return the prompts of these samples."""
        return [self.prompts[place] for place in self.order[list(indices)].tolist()]

    def compared(self) -> dict[str, Any]:
        """Return the choice, the number of captions, and a digest of them in any order.

        How a model's recipe renders them is not part of it.
        """
        listed = digest(json.dumps(sorted(self.captions)))
        return {"choice": self.choice, "num_captions": len(self.captions), "digest": listed}

    def described(self) -> dict[str, Any]:
        """Return the first prompts, a digest of all in order, and how captions are rendered."""
        prompts = self.prompts_of(range(len(self.order)))
        different = list(dict.fromkeys(prompts))
        found: dict[str, Any] = {
            "num_different": len(different),
            "first": different[:MOST_LISTED],
            "digest": digest(json.dumps(prompts)),
        }
        if self.rendering:
            found["rendering"] = dict(self.rendering)
        return {"prompts": found}

    @property
    def in_words(self) -> str:
        """Which prompts the samples are asked to show."""
        if self.choice == "in_turn":
            return f"the prompts of grids in turn, of which there are {len(self.captions):,}"
        source = "reference" if self.choice == "reference" else "training data"
        used = min(len(self.captions), len(self.order))
        return f"{used:,} of {len(self.captions):,} captions of the {source}"


def class_conditions(
    choice: Choice, counts: Mapping[int, int], num_classes: int, num: int, seed: int
) -> ClassConditions:
    """Give each class its share of the samples, exactly, in a random order.

    Args:
        choice: Where the counts come from. "in_turn" keeps the order 0, 1, 2, ... and needs none.
        counts: How often each class counts, by class id.
        num_classes: Classes of the model.
        num: Number of samples.
        seed: Seed of the order.
    """
    if choice == "in_turn":
        return ClassConditions(choice, torch.arange(num) % num_classes, num_classes)
    sizes = largest_remainder(counts, num)
    ids = torch.tensor(sorted(sizes), dtype=torch.long)
    repeats = torch.tensor([sizes[label] for label in sorted(sizes)])
    classes = torch.repeat_interleave(ids, repeats)[shuffled(num, seed)]
    return ClassConditions(choice, classes, num_classes)


def prompt_conditions(
    choice: Choice,
    captions: Sequence[str],
    num: int,
    seed: int,
    shown: Captions | None = None,
) -> PromptConditions:
    """Give each sample a caption: all of them once in a random order, then the same order again.

    Fewer samples than captions take a random part of them.

    Args:
        choice: Where the captions come from. "in_turn" keeps the order in which they are written.
        captions: The captions, or prompts, as they are written; at least one.
        num: Number of samples.
        seed: Seed of the order.
        shown: How captions become prompts; None: they are prompts already.
    """
    order = torch.arange(num) % len(captions)
    if choice != "in_turn":
        order = shuffled(len(captions), seed)[order]
    used = {place: captions[place] for place in sorted(set(order.tolist()))}
    if shown is None:
        return PromptConditions(choice, captions, used, order)
    prompts = {place: shown.in_samples(caption) for place, caption in used.items()}
    return PromptConditions(choice, captions, prompts, order, shown.described())


def largest_remainder(counts: Mapping[int, int], num: int) -> dict[int, int]:
    """Divide `num` samples among classes in exact proportion to their counts.

    Each class gets its quota num * count / total, rounded down. What is left goes one by one to the
    classes with the largest fractions; of equal ones, to the smaller class id.

    Args:
        counts: How often each class counts, by class id; at least one is positive.
        num: Number of samples.

    Reference:
        The method of Hamilton, or of largest remainders, as in Balinski and Young 2001, "Fair
        Representation".
    """
    total = sum(counts.values())
    sizes = {label: num * count // total for label, count in counts.items()}
    left = num - sum(sizes.values())
    by_fraction = sorted(counts, key=lambda label: (-(num * counts[label] % total), label))
    for label in by_fraction[:left]:
        sizes[label] += 1
    return sizes


def shuffled(num: int, seed: int) -> Tensor:
    """Return 0 to num - 1 in a random order [num] that is a function of the seed."""
    generator = torch.Generator().manual_seed(key(seed, 0, num, "conditions of samples"))
    return torch.randperm(num, generator=generator)
