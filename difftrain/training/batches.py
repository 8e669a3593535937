"""From the loader's micro-batches to the objective's batches: latents, and conditioning tensors."""

import contextlib
from collections.abc import Mapping, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from difftrain.core.errors import InputError
from difftrain.core.rng import Rng
from difftrain.data.batch import MicroBatch
from difftrain.data.items import MapDataset, TensorItem
from difftrain.data.opening import UnreadableImage
from difftrain.data.transform import Transform, to_unit_range
from difftrain.models.autoencoder import LatentEncoder
from difftrain.models.conditioning.base import Conditioning
from difftrain.objective.types import Batch

TRIED = 8  # images that are encoded before training, to find out whether the autoencoder works


class TorchItems(MapDataset):
    """Any map-style data set of tensors, as torch's DataLoader takes it.

    Args:
        dataset: Its items are x0, (x0,), (x0, label), or a mapping with "x0", perhaps "label", and
            further conditioning tensors by the network's argument names.

    Raises:
        InputError: If the data set is empty, or its items are something else.
    """

    def __init__(self, dataset: Any):
        self.dataset = dataset
        if len(dataset) == 0:
            raise InputError("data: the data set is empty.")
        self.item_shape = tuple(self[0].values.shape)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> TensorItem:
        fields = self._fields(self.dataset[i], i)
        x0, label = fields.pop("x0"), fields.pop("label", None)
        cond = {name: torch.as_tensor(value) for name, value in fields.items()}
        class_id = None if label is None else int(label)
        return TensorItem(x0, class_id, cond or None, self.name_of(i))

    def name_of(self, i: int) -> str:
        """Return what a message calls item i."""
        return f"item {i}"

    def _fields(self, found: Any, i: int) -> dict[str, Any]:
        """Return an item as {"x0": ..., "label": ..., further conditioning tensors}."""
        if isinstance(found, Tensor):
            return {"x0": found}
        if isinstance(found, (tuple, list)) and len(found) in (1, 2):
            return dict(zip(("x0", "label"), found, strict=False))
        if isinstance(found, Mapping) and "x0" in found:
            return dict(found)
        what = f"a {type(found).__name__}"
        if isinstance(found, Sized):
            what = f"{what} of length {len(found)}"
        if isinstance(found, Mapping):
            what = f"{what} with the keys {', '.join(map(str, found))}"
        raise InputError(
            f"data: {self.name_of(i)} of {type(self.dataset).__name__} is {what}. Expected a "
            'tensor x0, (x0,), (x0, label), or a mapping with "x0" and perhaps "label".'
        )


@dataclass
class Preparation:
    """Turns micro-batches into batches.

    Args:
        conditioning: What the network is conditioned on; None passes labels on as "class_labels",
            and the items' own conditioning tensors as they are.
        encoder: Turns pixels into latents; None where the network works on the items themselves.
            Moments that come from a cache are not encoded again; latents are sampled from them.
    """

    conditioning: Conditioning | None = None
    encoder: LatentEncoder | None = None

    def to(self, device: torch.device) -> "Preparation":
        """Move the encoders to a device; returns itself."""
        if self.conditioning is not None:
            self.conditioning.to(device)
        if self.encoder is not None:
            self.encoder.to(device)
        return self

    def try_encoder(self, data: MapDataset, transform: Transform, device: torch.device) -> None:
        """Encode a few images, evenly spread, before a step is trained.

        Raises:
            InputError: If their latents are not finite.
        """
        assert self.encoder is not None
        self.encoder.to(device)
        for i in dict.fromkeys(k * len(data) // TRIED for k in range(TRIED)):
            with contextlib.suppress(UnreadableImage):  # the loader says what becomes of it
                item = data[i]
                placed = item.place(transform, Rng(0, samples=[i]))
                self.encoder.moments(to_unit_range(placed.pixels[None].to(device)), [item.name])

    def __call__(
        self, micro: MicroBatch, rng: Rng, device: torch.device, dtype: torch.dtype
    ) -> Batch:
        """Return the batch of a micro-batch.

        Args:
            micro: The micro-batch.
            rng: The draws of its samples.
            device: Where the batch is wanted.
            dtype: The precision of x0.
        """
        x0 = self._clean(micro, rng, device)
        cond = self._conditions(micro, rng)
        on_device = {name: value.to(device, non_blocking=True) for name, value in cond.items()}
        return Batch(x0.to(dtype), on_device, micro.weights)

    def _clean(self, micro: MicroBatch, rng: Rng, device: torch.device) -> Tensor:
        """Return x0 [B, ...] on the device."""
        if micro.values is not None:
            return micro.values.to(device, non_blocking=True)
        if micro.moments is not None:
            assert self.encoder is not None
            return self.encoder.latents(micro.moments.to(device, non_blocking=True), rng)
        assert micro.pixels is not None
        pixels = to_unit_range(micro.pixels.to(device, non_blocking=True))
        return pixels if self.encoder is None else self.encoder.encode(pixels, rng, micro.names)

    def _conditions(self, micro: MicroBatch, rng: Rng) -> Mapping[str, Tensor]:
        if self.conditioning is not None:
            return self.conditioning.of(micro, rng)
        cond = dict(micro.cond or {})
        if micro.labels is not None:
            cond["class_labels"] = micro.labels
        return cond
