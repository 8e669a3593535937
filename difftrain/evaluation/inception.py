"""The Inception of 2015-12-05, whose Frechet distance is the FID, and the features of it that published protocols use.

The network takes the weights that pytorch-fid and torch-fidelity publish, name by name, and those of StyleGAN's TorchScript file.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from difftrain.evaluation.extractor import check_images
from difftrain.evaluation.inception_weights import read_weights
from difftrain.evaluation.presets import PRESETS, Protocol
from difftrain.evaluation.resize import resize
from difftrain.registry import FEATURES, GIVEN, InputError, PositiveInt

SIZE = 299
WIDTHS = {"features": 2048, "logits": 1008, "spatial": 7 * 17 * 17}


class Branch(NamedTuple):
    """One of a block's parallel ways: an optional pool, then convolutions (channels, kernel), the last with the stride.

    fork: channels of two last convolutions side by side, (1, 3) and (3, 1); 0: none.
    """

    name: str
    steps: tuple[tuple[int, Any], ...] = ()
    stride: int = 1
    pool: Literal["", "avg", "max"] = ""
    fork: int = 0

    def convolutions(self) -> list[tuple[str, int, tuple[int, int]]]:
        """(name, channels, kernel) in order, a fork's two last; the names of torchvision."""
        numbered = len(self.steps) > 1 or self.fork
        made = [(f"{self.name}_{i}" if numbered else self.name, width, pair(kernel)) for i, (width, kernel) in enumerate(self.steps, 1)]
        last = f"{self.name}_{len(self.steps) + 1}"
        return made + ([(f"{last}a", self.fork, (1, 3)), (f"{last}b", self.fork, (3, 1))] if self.fork else [])


def pair(kernel: Any) -> tuple[int, int]:
    return kernel if isinstance(kernel, tuple) else (kernel, kernel)


def block_35(pool: int) -> tuple[Branch, ...]:
    return (
        Branch("branch1x1", ((64, 1),)),
        Branch("branch5x5", ((48, 1), (64, 5))),
        Branch("branch3x3dbl", ((64, 1), (96, 3), (96, 3))),
        Branch("branch_pool", ((pool, 1),), pool="avg"),
    )


def block_17(c: int) -> tuple[Branch, ...]:
    return (
        Branch("branch1x1", ((192, 1),)),
        Branch("branch7x7", ((c, 1), (c, (1, 7)), (192, (7, 1)))),
        Branch("branch7x7dbl", ((c, 1), (c, (7, 1)), (c, (1, 7)), (c, (7, 1)), (192, (1, 7)))),
        Branch("branch_pool", ((192, 1),), pool="avg"),
    )


def block_8(pool: Literal["avg", "max"]) -> tuple[Branch, ...]:
    return (
        Branch("branch1x1", ((320, 1),)),
        Branch("branch3x3", ((384, 1),), fork=384),
        Branch("branch3x3dbl", ((448, 1), (384, 3)), fork=384),
        Branch("branch_pool", ((192, 1),), pool=pool),
    )


# name: channels, kernel, stride, padding; a max pool follows the third and the fifth.
STEM = {
    "Conv2d_1a_3x3": (32, 3, 2, 0), "Conv2d_2a_3x3": (32, 3, 1, 0), "Conv2d_2b_3x3": (64, 3, 1, 1),
    "Conv2d_3b_1x1": (80, 1, 1, 0), "Conv2d_4a_3x3": (192, 3, 1, 0),
}  # fmt: skip
POOLED = ("Conv2d_2b_3x3", "Conv2d_4a_3x3")

MIXED = {
    "Mixed_5b": block_35(32),
    "Mixed_5c": block_35(64),
    "Mixed_5d": block_35(64),
    "Mixed_6a": (
        Branch("branch3x3", ((384, 3),), stride=2),
        Branch("branch3x3dbl", ((64, 1), (96, 3), (96, 3)), stride=2),
        Branch("pool", stride=2, pool="max"),
    ),
    "Mixed_6b": block_17(128),
    "Mixed_6c": block_17(160),
    "Mixed_6d": block_17(160),
    "Mixed_6e": block_17(192),
    "Mixed_7a": (
        Branch("branch3x3", ((192, 1), (320, 3)), stride=2),
        Branch("branch7x7x3", ((192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3)), stride=2),
        Branch("pool", stride=2, pool="max"),
    ),
    "Mixed_7b": block_8("avg"),
    "Mixed_7c": block_8("max"),  # the published graph pools by maximum here, unlike the paper; scores depend on it
}


class Convolution(nn.Module):
    """relu(batch norm(convolution))."""

    def __init__(self, c_in: int, c_out: int, kernel: Any, stride: int = 1, padding: Any = 0):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Mixed(nn.Module):
    """The channels of all branches, one after the other."""

    def __init__(self, c_in: int, branches: tuple[Branch, ...]):
        super().__init__()
        self.branches, self.c_out = branches, 0
        for branch in branches:
            width, convolutions = c_in, branch.convolutions()
            in_a_row = len(branch.steps)
            for i, (name, c_out, kernel) in enumerate(convolutions):
                strided = branch.stride > 1 and i == in_a_row - 1
                padding = 0 if strided else (kernel[0] // 2, kernel[1] // 2)
                self.add_module(name, Convolution(width, c_out, kernel, branch.stride if strided else 1, padding))
                width = c_out if i < in_a_row else width  # a fork's second convolution reads what its first reads
            self.c_out += 2 * branch.fork or width

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([way for branch in self.branches for way in self.ways(x, branch)], dim=1)

    def ways(self, x: Tensor, branch: Branch) -> Iterator[Tensor]:
        x = pooled(x, branch)
        names = [name for name, _, _ in branch.convolutions()]
        for name in names[: len(branch.steps)]:
            x = self.get_submodule(name)(x)
        if not branch.fork:
            yield x
        for name in names[len(branch.steps) :]:
            yield self.get_submodule(name)(x)


def pooled(x: Tensor, branch: Branch) -> Tensor:
    if branch.pool == "avg":
        return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)  # TensorFlow's mean leaves the padding out
    if branch.pool == "max":
        return F.max_pool2d(x, 3, stride=branch.stride, padding=0 if branch.stride > 1 else 1)
    return x


class InceptionNetwork(nn.Module):
    """Szegedy et al. 2015, arXiv:1512.00567, as TensorFlow's graph of 2015-12-05 has it: 1008 classes, 299 x 299 pixels."""

    def __init__(self) -> None:
        super().__init__()
        width = 3
        for name, (c_out, kernel, stride, padding) in STEM.items():
            self.add_module(name, Convolution(width, c_out, kernel, stride, padding))
            width = c_out
        for name, branches in MIXED.items():
            block = Mixed(width, branches)
            self.add_module(name, block)
            width = block.c_out
        self.fc = nn.Linear(width, WIDTHS["logits"])

    def forward(self, x: Tensor, outputs: Collection[str] = ("features",)) -> dict[str, Tensor]:
        """Scaled images [N, 3, 299, 299] -> the named outputs, each [N, width].

        features: the last block's mean over its 8 x 8 positions ("pool_3"), 2048. logits: of these, without the bias, 1008.
        spatial: 7 channels at 17 x 17 positions in TensorFlow's order (row, column, channel), 2023: ADM's "mixed_6/conv:0"[..., :7].
        """
        found = {}
        for name in STEM:
            x = self.get_submodule(name)(x)
            if name in POOLED:
                x = F.max_pool2d(x, 3, stride=2)
        for name in MIXED:
            x = self.get_submodule(name)(x)
            # "mixed_6" counts from "mixed" = Mixed_5b. Its "conv" is the 1 x 1 branch after batch norm and ReLU: the first channels.
            if name == "Mixed_6d" and "spatial" in outputs:
                found["spatial"] = x[:, :7].permute(0, 2, 3, 1).flatten(1)
                if set(outputs) == {"spatial"}:
                    return found
        features = x.mean(dim=(2, 3))
        if "features" in outputs:
            found["features"] = features
        if "logits" in outputs:
            found["logits"] = F.linear(features, self.fc.weight)
        return found


def stylegan_names() -> dict[str, str]:
    """StyleGAN's names of convolutions by ours: TensorFlow's scopes, "tower" for every branch but one of a single convolution."""
    found = {name: "layers.conv" + (f"_{i}" if i else "") for i, name in enumerate(STEM)}
    for number, (block, branches) in enumerate(MIXED.items()):
        scope = "layers.mixed" + (f"_{number}" if number else "")
        dot = "_" if any(branch.fork for branch in branches) else "."
        towers = 0
        for branch in branches:
            single = len(branch.steps) == 1 and not branch.fork and not branch.pool
            tower = "" if single else "tower" + (f"_{towers}" if towers else "") + dot
            towers += not single
            for i, (name, _, _) in enumerate(branch.convolutions()):
                forked, position = ("mixed" + dot, i - len(branch.steps)) if i >= len(branch.steps) else ("", i)
                found[f"{block}.{name}"] = f"{scope}.{tower}{forked}conv" + (f"_{position}" if position else "")
    return found


@FEATURES.register("inception")
class Inception:
    """Features, logits and spatial features of the Inception of 2015-12-05 under a published protocol (presets.py).

    path: the weights; None: looked for where torch.hub, pytorch-fid and torch-fidelity keep them. sha256: its first 8 or more digits allow
    a file of another hash than the published one.
    """

    name = "inception"
    gives: ClassVar[frozenset[str]] = frozenset({"logits", "spatial"})
    widths: Mapping[str, int] = WIDTHS

    def __init__(
        self,
        protocol: Protocol = "torch_fidelity",
        path: str | None = None,
        sha256: str | None = None,
        batch_size: PositiveInt = 64,
        device: Annotated[torch.device, GIVEN] = torch.device("cpu"),  # noqa: B008
    ):
        self.chosen = PRESETS[protocol]
        self.preset: Mapping[str, Any] = self.chosen.metric_settings()
        self.batch_size, self.device = batch_size, device
        network = InceptionNetwork()
        self.weights = read_weights(network, stylegan_names(), path, sha256, self.chosen.weights)
        self.network = network.eval().requires_grad_(False).to(device)

    def protocol(self) -> dict[str, Any]:
        return {"type": self.name, "network": "Inception 2015-12-05", "weights": self.weights, "size": SIZE, **self.chosen.protocol()}

    @torch.no_grad()
    def extract(self, images: Tensor, outputs: Collection[str] = ("features",)) -> dict[str, Tensor]:
        """uint8 [N, 1 or 3, H, W] -> the named outputs, each [N, width] float32 on the CPU; memory on the device is that of one batch."""
        check_images(images, self.name)
        if unknown := [output for output in outputs if output not in self.widths]:
            raise InputError(f"features 'inception' have no output {unknown[0]!r}; known: {', '.join(self.widths)}.")
        rows = {output: torch.empty(len(images), self.widths[output]) for output in outputs}
        for start in range(0, len(images), self.batch_size):
            batch = images[start : start + self.batch_size].to(self.device)
            # Convolutions on a GPU round to 10 bits of mantissa (TF32) unless told not to.
            with torch.backends.cudnn.flags(enabled=True, benchmark=torch.backends.cudnn.benchmark, allow_tf32=False):
                found = self.network(self.prepared(batch), outputs)
            for output, values in found.items():
                rows[output][start : start + len(batch)] = values
        return rows

    def prepared(self, images: Tensor) -> Tensor:
        """What the network sees, [N, 3, 299, 299]."""
        x = resize(images, self.chosen.resize, (SIZE, SIZE))
        if self.chosen.clip:
            x = x.clamp(0, 255)
        x = (x - 128) / 128 if self.chosen.scaling == "(x - 128) / 128" else 2 * (x / 255) - 1
        return x.expand(-1, 3, -1, -1)
