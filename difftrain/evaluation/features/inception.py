"""The Inception of 2015-12-05, whose Frechet distance is the FID, as published protocols use it."""

from collections.abc import Collection, Mapping
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from difftrain.core.registry import GIVEN, PositiveInt
from difftrain.evaluation.evidence import MAIN
from difftrain.evaluation.features.base import check_images
from difftrain.evaluation.features.inception_network import (
    WIDTHS,
    InceptionNetwork,
    stylegan_names,
)
from difftrain.evaluation.features.inception_weights import read_weights
from difftrain.evaluation.features.resize import resize
from difftrain.evaluation.protocols import PRESETS, ProtocolName
from difftrain.evaluation.slots import FEATURES, FeatureExtractor

SIZE = 299
CPU = torch.device("cpu")


@FEATURES.register("inception")
class Inception(FeatureExtractor):
    """Features, logits and spatial features of the Inception of 2015-12-05, as a package has them.

    Args:
        protocol: The package whose scores are meant; see `protocols.py`.
        path: The file of the weights; None looks where torch.hub, pytorch-fid and torch-fidelity
            keep it.
        sha256: The first 8 or more digits of the hash of a file that is used although it is not
            the published one.
        batch_size: Images that go through the network together.
        device: Where it computes.

    Raises:
        InputError: If the file is missing, damaged or another one.

    Reference:
        Szegedy et al. 2015, "Rethinking the Inception Architecture for Computer Vision",
        arXiv:1512.00567.
    """

    name = "inception"
    takes_any_size = True
    gives: ClassVar[frozenset[str]] = frozenset({"logits", "spatial"})

    def __init__(
        self,
        protocol: ProtocolName = "torch_fidelity",
        path: str | None = None,
        sha256: str | None = None,
        batch_size: PositiveInt = 64,
        device: Annotated[torch.device, GIVEN] = CPU,
    ):
        self.chosen = PRESETS[protocol]
        self.preset: Mapping[str, Any] = self.chosen.metric_settings()
        self.batch_size, self.device = batch_size, device
        network = InceptionNetwork()
        self.weights = read_weights(network, stylegan_names(), path, sha256, self.chosen.weights)
        self.network = network.eval().requires_grad_(False).to(device)
        if device.type == "cpu":
            # Convolutions and pools of a CPU are a quarter faster with the channels last.
            layout: dict[str, Any] = {"memory_format": torch.channels_last}  # not in to's types
            self.network.to(**layout)

    @property
    def widths(self) -> Mapping[str, int]:
        """The widths of features, logits and spatial features."""
        return WIDTHS

    def protocol(self) -> dict[str, Any]:
        """Return what fixes the numbers."""
        return {
            "type": self.name,
            "network": "Inception 2015-12-05",
            "weights": self.weights,
            "size": SIZE,
            **self.chosen.protocol(),
        }

    @torch.no_grad()
    def extract(self, samples: Tensor, outputs: Collection[str] = (MAIN,)) -> dict[str, Tensor]:
        """Return outputs of images [N, 1 or 3, H, W] uint8; the device holds a batch at a time."""
        check_images(samples, self.name)
        self.check_outputs(outputs)
        rows = {output: torch.empty(len(samples), WIDTHS[output]) for output in outputs}
        benchmark = torch.backends.cudnn.benchmark
        for start in range(0, len(samples), self.batch_size):
            batch = samples[start : start + self.batch_size].to(self.device)
            # Without this a GPU rounds in convolutions to 10 bits of mantissa (TF32).
            with torch.backends.cudnn.flags(enabled=True, benchmark=benchmark, allow_tf32=False):
                found = self.network(self.prepared(batch), outputs)
            for output, values in found.items():
                rows[output][start : start + len(batch)] = values
        return rows

    def prepared(self, images: Tensor) -> Tensor:
        """Return what the network sees [N, 3, 299, 299] of images [N, 1 or 3, H, W] uint8."""
        x = resize(images, self.chosen.resize, (SIZE, SIZE))
        if self.chosen.clip:
            x = x.clamp(0, 255)
        x = (x - 128) / 128 if self.chosen.scaling == "(x - 128) / 128" else 2 * (x / 255) - 1
        return x.expand(-1, 3, -1, -1)
