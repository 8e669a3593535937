"""The contract of feature extractors: uint8 images in, float32 rows out, and a protocol that says everything that fixes the numbers."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from difftrain.registry import InputError

FEATURES = "features"


class FeatureExtractor(Protocol):
    """Images uint8 [N, C, H, W] -> rows by output; row i depends on image i alone.

    widths: the width of each output; "features" is always one. Others by convention: "logits" (class scores before softmax), "spatial" (a
    flattened map). gives: what metrics can count on beside the features, known before one is built: "logits", "spatial", "classes" (the
    logits are those of the data's labels), "text" (the method below). preset: settings of
    metrics that belong to the protocol, such as {"kid_subsets": 100}; {} where there are none.
    """

    name: str
    gives: ClassVar[frozenset[str]]
    widths: Mapping[str, int]
    preset: Mapping[str, Any]

    def protocol(self) -> dict[str, Any]:
        """JSON-able: everything that fixes the numbers (weights by digest, resize, quantisation, scaling), no paths."""
        ...

    def extract(self, images: Tensor, outputs: Collection[str] = (FEATURES,)) -> dict[str, Tensor]:
        """The named outputs, each [N, width] float32 on the CPU."""
        ...


@runtime_checkable
class ReadsText(Protocol):
    """An extractor that maps text to the space of its image features."""

    def text(self, captions: Sequence[str]) -> Tensor:
        """[N, D] float32 on the CPU."""
        ...


def check_images(images: Tensor, name: str, shape: Sequence[int] | None = None) -> None:
    """Raise InputError unless images are uint8 [N, C, H, W], of this (C, H, W) where one is given, else with 1 or 3 channels."""
    fits = images.ndim == 4 and (tuple(images.shape[1:]) == tuple(shape) if shape is not None else images.shape[1] in (1, 3))
    if images.dtype != torch.uint8 or not fits:
        expected = ", ".join(map(str, shape)) if shape is not None else "1 or 3, H, W"
        raise InputError(f"features {name!r} take uint8 images [N, {expected}], got {images.dtype} {list(images.shape)}.")
