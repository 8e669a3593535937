"""The samples themselves as features: pixels of images, values of tensors."""

import math
from collections.abc import Collection, Mapping
from typing import Annotated, Any

import torch
from torch import Tensor

from difftrain.core.errors import InputError
from difftrain.core.registry import GIVEN
from difftrain.evaluation.evidence import MAIN
from difftrain.evaluation.features.base import check_images
from difftrain.evaluation.slots import FEATURES, FeatureExtractor

CPU = torch.device("cpu")


@FEATURES.register("pixels")
class Pixels(FeatureExtractor):
    """f(x) = x / 255, flattened: D = C H W.

    Args:
        shape: (C, H, W) of the images.
        device: Where images are compared with training images.
    """

    name = "pixels"

    def __init__(
        self,
        shape: Annotated[tuple[int, int, int], GIVEN],
        device: Annotated[torch.device, GIVEN] = CPU,
    ):
        self.shape, self.device = tuple(shape), device

    @property
    def widths(self) -> Mapping[str, int]:
        """The width of the features."""
        return {MAIN: math.prod(self.shape)}

    def protocol(self) -> dict[str, Any]:
        """Return what fixes the numbers."""
        images = list(self.shape)
        return {"type": self.name, "images": images, "resize": None, "input": "uint8 / 255"}

    def extract(self, samples: Tensor, outputs: Collection[str] = (MAIN,)) -> dict[str, Tensor]:
        """Return the pixels of images [N, C, H, W] uint8."""
        check_images(samples, self.name, self.shape)
        self.check_outputs(outputs)
        return {MAIN: samples.flatten(1).float().cpu() / 255}


@FEATURES.register("values")
class Values(FeatureExtractor):
    """f(x) = x, flattened: the values of a data set of tensors.

    Args:
        shape: Shape of one sample.
    """

    name = "values"
    takes = "tensors"

    def __init__(self, shape: Annotated[tuple[int, ...], GIVEN]):
        self.shape = tuple(shape)

    @property
    def widths(self) -> Mapping[str, int]:
        """The width of the features."""
        return {MAIN: math.prod(self.shape)}

    def protocol(self) -> dict[str, Any]:
        """Return what fixes the numbers."""
        return {"type": self.name, "samples": list(self.shape)}

    def extract(self, samples: Tensor, outputs: Collection[str] = (MAIN,)) -> dict[str, Tensor]:
        """Return the values of tensors [N, ...] in floating point.

        Raises:
            InputError: If they have another shape or type.
        """
        if not samples.is_floating_point() or tuple(samples.shape[1:]) != self.shape:
            expected = ", ".join(map(str, ("N", *self.shape)))
            raise InputError(
                f"features 'values' take floating-point tensors [{expected}], got {samples.dtype} "
                f"{list(samples.shape)}. For images write features: {{type: pixels}}."
            )
        self.check_outputs(outputs)
        return {MAIN: samples.reshape(len(samples), -1).float().cpu()}
