"""Class labels as conditioning, with the label dropout that classifier-free guidance needs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from difftrain.core.digests import digest
from difftrain.core.errors import InputError
from difftrain.core.rng import Rng
from difftrain.data.batch import MicroBatch
from difftrain.data.classes import wrong_id
from difftrain.models.conditioning.base import Conditioning
from difftrain.objective.types import Cond


@dataclass(frozen=True)
class ClassConditioning(Conditioning):
    """Class labels; a dropped label becomes the null label, the last row of the label table.

    Args:
        num_classes: Classes of the data; None without labels.
        num_embeddings: Rows of the network's label table; None for a network without labels.
        dropout: Probability with which a label is dropped in training.
        item_cond: Other conditioning tensors of one item of the data, without the batch's
            dimension, where items bring some. Generated samples get it; training takes each item's
            own.

    Raises:
        InputError: If the classes of the data do not fit the label table.

    Reference:
        Ho and Salimans 2022, "Classifier-Free Diffusion Guidance", arXiv:2207.12598.
    """

    num_classes: int | None
    num_embeddings: int | None
    dropout: float = 0.0
    item_cond: Cond | None = None

    def __post_init__(self) -> None:
        if self.num_embeddings is None:
            if self.dropout > 0:
                raise InputError(
                    "label_dropout is set, but the model takes no class labels. Leave "
                    "label_dropout out, or take a model with num_class_embeds "
                    "(classes + 1 for the dropped label)."
                )
            return
        if self.num_classes is None:
            raise InputError(
                f"the model takes class labels ({self.num_embeddings} of them), but the data has "
                "none. Give the data labels (labels: folders, label_column: ...), or leave "
                "num_class_embeds out of the model."
            )
        drops = self.dropout > 0
        needed = self.num_classes + drops
        if needed > self.num_embeddings:
            one_more = ", one more for the dropped label" if drops else ""
            raise InputError(
                f"the data has {self.num_classes} classes{one_more}, but the model embeds "
                f"{self.num_embeddings}. Write model: {{config: {{num_class_embeds: {needed}}}}}; "
                f"for a dit num_embeds_ada_norm: {self.num_classes}."
            )

    @property
    def conditions(self) -> bool:
        """Whether the network takes labels."""
        return self.num_embeddings is not None

    @property
    def can_guide(self) -> bool:
        """Whether the label table has a row for the null label."""
        if self.num_embeddings is None or self.num_classes is None:
            return False
        return self.num_embeddings > self.num_classes

    @property
    def null_label(self) -> int:
        """The label that says nothing: the last row of the label table."""
        return (self.num_embeddings or 1) - 1

    def of(self, micro: MicroBatch, rng: Rng) -> Cond:
        """Return the conditioning of a training batch: the items' own tensors, and their labels.

        Raises:
            InputError: If a label is not a class id.
        """
        if micro.labels is not None and self.conditions and self.num_classes is not None:
            for place, label in enumerate(micro.labels.tolist()):
                if not 0 <= label < self.num_classes:
                    name = micro.names[place] if micro.names else ""
                    where = f"{name}: " if name else ""
                    raise InputError(f"{where}{wrong_id(label, self.num_classes)}")
        return {**(micro.cond or {}), **self._classes(micro.labels, rng)}

    def __call__(self, labels: Tensor | None, rng: Rng | None = None) -> Cond:
        """Return the conditioning of labels [B].

        Args:
            labels: Class ids [B]; None for a network without conditioning.
            rng: The samples' draws. With them, labels drop with probability `dropout`.

        Returns:
            {"class_labels": [B]}, {} for a network without labels; and `item_cond`.
        """
        cond = self._classes(labels, rng)
        return cond if labels is None else {**self._repeated(len(labels)), **cond}

    def null(self, num: int) -> Cond:
        """Return the conditioning of `num` samples with the null label; {} without one."""
        if not self.can_guide:
            return {}
        return {**self._repeated(num), "class_labels": torch.full((num,), self.null_label)}

    def labels_of(self, indices: Sequence[int]) -> Tensor | None:
        """Return the labels [B] of generated samples.

        Classes cycle with the index, so that the first n samples are balanced for any n.
        """
        if self.conditions:
            return torch.tensor([i % (self.num_classes or 1) for i in indices])
        if self.item_cond:
            return torch.zeros(len(indices), dtype=torch.long)
        return None

    def described(self) -> dict[str, Any]:
        """Return a digest of the conditioning tensors that every sample gets, if there are any."""
        if not self.item_cond:
            return {}
        named: list[str | Tensor] = []
        for name, value in sorted(self.item_cond.items()):
            named += [name, value]
        return {"item_cond": digest(*named)}

    def _classes(self, labels: Tensor | None, rng: Rng | None) -> Cond:
        if not self.conditions:
            return {}
        assert labels is not None
        if rng is not None and self.dropout > 0:
            dropped = rng.uniform("label_dropout") < self.dropout
            labels = torch.where(dropped.to(labels.device), self.null_label, labels)
        return {"class_labels": labels}

    def _repeated(self, num: int) -> Cond:
        """`item_cond` for `num` samples."""
        own = self.item_cond or {}
        return {name: value.expand(num, *value.shape) for name, value in own.items()}
