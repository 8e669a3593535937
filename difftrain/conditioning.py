"""What a network is conditioned on, as samplers and the trainer ask for it: class labels here, prompts in `text_conditioning.py`.

Class labels drop out, which classifier-free guidance needs. Ho and Salimans 2022, "Classifier-Free Diffusion Guidance",
arXiv:2207.12598: a dropped label becomes the null label, which is the last row of the model's label table.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from difftrain.batch import Cond
from difftrain.data.loader import MicroBatch
from difftrain.registry import InputError
from difftrain.rng import Rng


class Conditioning(Protocol):
    """labels: class ids, or the numbers of prompts. num_classes: of labels that are classes."""

    @property
    def num_classes(self) -> int | None: ...

    @property
    def conditions(self) -> bool: ...

    @property
    def can_guide(self) -> bool:
        """Whether there is a conditioning that says nothing."""
        ...

    def of(self, micro: MicroBatch, rng: Rng) -> Cond:
        """Conditioning tensors [B, ...] of a training batch."""
        ...

    def __call__(self, labels: Tensor | None, rng: Rng | None = None) -> Cond:
        """Conditioning tensors [B, ...] of labels [B]."""
        ...

    def null(self, num: int) -> Cond:
        """The conditioning of `num` samples that says nothing."""
        ...

    def labels_of(self, indices: Sequence[int]) -> Tensor | None:
        """The labels [B] asked of generated samples."""
        ...

    def ids_of(self, prompts: Sequence[str]) -> Tensor:
        """Labels [B] of prompts; InputError where prompts mean nothing."""
        ...

    def captions_of(self, labels: Tensor) -> list[str] | None:
        """The prompts that labels stand for, if they do."""
        ...

    def to(self, device: torch.device) -> "Conditioning":
        """Where it computes, from now on."""
        ...


@dataclass(frozen=True)
class ClassConditioning:
    """num_classes: of the data; None: nothing is conditioned on. num_embeddings: of the model's label table."""

    num_classes: int | None
    num_embeddings: int | None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.num_embeddings is None:
            if self.dropout > 0:
                raise InputError("label_dropout is set, but the model takes no class labels. "
                                 "Leave label_dropout out, or take a model with num_class_embeds (classes + 1 for the dropped label).")
            return
        if self.num_classes is None:
            raise InputError(f"the model takes class labels ({self.num_embeddings} of them), but the data has none. "
                             "Give the data labels (labels: folders, label_column: ...), or leave num_class_embeds out of the model.")
        needed = self.num_classes + (self.dropout > 0)
        if needed > self.num_embeddings:
            dropped = ", one more for the dropped label" if self.dropout > 0 else ""
            raise InputError(f"the data has {self.num_classes} classes{dropped}, but the model embeds {self.num_embeddings}. "
                             f"Write model: {{config: {{num_class_embeds: {needed}}}}}; for a dit num_embeds_ada_norm: {self.num_classes}.")

    @property
    def conditions(self) -> bool:
        return self.num_embeddings is not None

    @property
    def can_guide(self) -> bool:
        """Whether there is a null label."""
        return self.num_embeddings is not None and self.num_classes is not None and self.num_embeddings > self.num_classes

    @property
    def null_label(self) -> int:
        return (self.num_embeddings or 1) - 1

    def of(self, micro: MicroBatch, rng: Rng) -> Cond:
        """Of a training batch; a label that is no class raises InputError."""
        if micro.labels is not None and self.conditions and self.num_classes is not None:
            wrong = [label for label in micro.labels.tolist() if not 0 <= label < self.num_classes]
            if wrong:
                raise InputError(f"the data holds the class id {wrong[0]}, but the model has {self.num_classes} classes, ids 0 to "
                                 f"{self.num_classes - 1}. Correct the labels, or give the model more num_class_embeds.")
        return self(micro.labels, rng)

    def __call__(self, labels: Tensor | None, rng: Rng | None = None) -> Cond:
        """Conditioning tensors for labels [B]; with an rng, labels drop with probability `dropout`, keyed by sample."""
        if not self.conditions:
            return {}
        assert labels is not None
        if rng is not None and self.dropout > 0:
            dropped = rng.uniform("label_dropout") < self.dropout
            labels = torch.where(dropped.to(labels.device), self.null_label, labels)
        return {"class_labels": labels}

    def null(self, num: int) -> Cond:
        """The conditioning of `num` samples without a label."""
        return {"class_labels": torch.full((num,), self.null_label)} if self.can_guide else {}

    def labels_of(self, indices: Sequence[int]) -> Tensor | None:
        """The labels [B] asked of generated samples: classes in turn, so that any prefix is balanced."""
        return torch.tensor([i % (self.num_classes or 1) for i in indices]) if self.conditions else None

    def ids_of(self, prompts: Sequence[str]) -> Tensor:
        raise InputError("a prompt is given, but the model takes none. Write a label, or leave the prompt out.")

    def captions_of(self, labels: Tensor) -> list[str] | None:
        return None

    def to(self, device: torch.device) -> "ClassConditioning":
        return self
