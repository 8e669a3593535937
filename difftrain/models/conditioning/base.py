"""The base class of what a network is conditioned on."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from difftrain.core.errors import InputError
from difftrain.core.rng import Rng
from difftrain.data.batch import MicroBatch
from difftrain.objective.types import Cond


class Conditioning(ABC):
    """What a network is conditioned on, in training and in sampling.

    Labels are class ids, or the numbers of prompts.

    Attributes:
        num_classes: Number of classes; None where labels are not classes.
    """

    num_classes: int | None

    @property
    @abstractmethod
    def conditions(self) -> bool:
        """Whether the network is conditioned on classes or prompts."""

    @property
    def can_guide(self) -> bool:
        """Whether there is a null condition, which classifier-free guidance needs."""
        return False

    @abstractmethod
    def of(self, micro: MicroBatch, rng: Rng) -> Cond:
        """Return the conditioning of a training batch.

        Args:
            micro: The samples.
            rng: The samples' draws, by which conditions are dropped.

        Returns:
            Tensors [B, ...] by the network's argument names.
        """

    @abstractmethod
    def __call__(self, labels: Tensor | None, rng: Rng | None = None) -> Cond:
        """Return the conditioning of labels.

        Args:
            labels: Labels [B]; None for a network that takes none.
            rng: The samples' draws, if labels are to be dropped as in training.

        Returns:
            Tensors [B, ...] by the network's argument names.
        """

    def null(self, num: int) -> Cond:
        """Return the null condition of `num` samples; {} where there is none."""
        return {}

    def labels_of(self, indices: Sequence[int]) -> Tensor | None:
        """Return the labels [B] of generated samples by their indices; None without labels."""
        return None

    def ids_of(self, prompts: Sequence[str]) -> Tensor:
        """Return the numbers [B] of prompts.

        Raises:
            InputError: If the network takes no prompts.
        """
        raise InputError(
            "prompts: the model takes no prompts. Write a class label, or leave the prompts out."
        )

    def captions_of(self, labels: Tensor) -> list[str] | None:
        """Return the prompts of labels [B]; None where labels are not prompts."""
        return None

    def described(self) -> dict[str, Any]:
        """Return plain data that decides samples beside their labels and the weights."""
        return {}

    def to(self, device: torch.device) -> "Conditioning":
        """Move what computes conditioning to a device."""
        return self

    def remember(self) -> None:
        """Compute now what sampling needs, so that text encoders can be freed."""

    def release(self) -> None:
        """Free text encoders that were read again after `remember`."""
