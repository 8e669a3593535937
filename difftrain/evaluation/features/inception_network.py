"""The Inception of 2015-12-05 as a network, with the names that its published weights have."""

from collections.abc import Collection, Iterator
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = {"features": 2048, "logits": 1008, "spatial": 7 * 17 * 17}
KernelSize = int | tuple[int, int]


class Branch(NamedTuple):
    """One of a block's parallel ways: a pool, if it has one, then convolutions.

    Args:
        name: The name of its convolutions.
        steps: (channels, kernel) of each convolution in a row.
        stride: The stride of the pool, or of the last convolution.
        pool: The kind of pool.
        fork: Channels of two last convolutions side by side, (1, 3) and (3, 1); 0: none.
    """

    name: str
    steps: tuple[tuple[int, KernelSize], ...] = ()
    stride: int = 1
    pool: Literal["", "avg", "max"] = ""
    fork: int = 0

    def convolutions(self) -> list[tuple[str, int, tuple[int, int]]]:
        """Return (name, channels, kernel) in order, a fork's two last, by torchvision's names."""
        is_numbered = len(self.steps) > 1 or self.fork
        made = []
        for i, (width, kernel) in enumerate(self.steps, 1):
            name = f"{self.name}_{i}" if is_numbered else self.name
            made.append((name, width, kernel_pair(kernel)))
        if self.fork:
            last = f"{self.name}_{len(self.steps) + 1}"
            made += [(f"{last}a", self.fork, (1, 3)), (f"{last}b", self.fork, (3, 1))]
        return made


def kernel_pair(kernel: KernelSize) -> tuple[int, int]:
    """Return (height, width) of a kernel."""
    return kernel if isinstance(kernel, tuple) else (kernel, kernel)


def block_35(pool: int) -> tuple[Branch, ...]:
    """Return the branches of a block on a 35 x 35 map, with `pool` channels behind its pool."""
    return (
        Branch("branch1x1", ((64, 1),)),
        Branch("branch5x5", ((48, 1), (64, 5))),
        Branch("branch3x3dbl", ((64, 1), (96, 3), (96, 3))),
        Branch("branch_pool", ((pool, 1),), pool="avg"),
    )


def block_17(c: int) -> tuple[Branch, ...]:
    """Return the branches of a block on a 17 x 17 map, with `c` channels within."""
    return (
        Branch("branch1x1", ((192, 1),)),
        Branch("branch7x7", ((c, 1), (c, (1, 7)), (192, (7, 1)))),
        Branch("branch7x7dbl", ((c, 1), (c, (7, 1)), (c, (1, 7)), (c, (7, 1)), (192, (1, 7)))),
        Branch("branch_pool", ((192, 1),), pool="avg"),
    )


def block_8(pool: Literal["avg", "max"]) -> tuple[Branch, ...]:
    """Return the branches of a block on an 8 x 8 map."""
    return (
        Branch("branch1x1", ((320, 1),)),
        Branch("branch3x3", ((384, 1),), fork=384),
        Branch("branch3x3dbl", ((448, 1), (384, 3)), fork=384),
        Branch("branch_pool", ((192, 1),), pool=pool),
    )


# name: channels, kernel, stride, padding; a max pool follows the third and the fifth.
STEM = {
    "Conv2d_1a_3x3": (32, 3, 2, 0),
    "Conv2d_2a_3x3": (32, 3, 1, 0),
    "Conv2d_2b_3x3": (64, 3, 1, 1),
    "Conv2d_3b_1x1": (80, 1, 1, 0),
    "Conv2d_4a_3x3": (192, 3, 1, 0),
}
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
    # The published graph pools by maximum here, unlike the paper; scores depend on it.
    "Mixed_7c": block_8("max"),
}


class Convolution(nn.Module):
    """relu(batch norm(convolution)).

    Args:
        c_in: Channels of the input.
        c_out: Channels of the output.
        kernel: The kernel.
        stride: The stride.
        padding: The padding.
    """

    def __init__(
        self, c_in: int, c_out: int, kernel: KernelSize, stride: int = 1, padding: Any = 0
    ):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """Return [N, c_out, H', W'] of x [N, c_in, H, W]."""
        return F.relu(self.bn(self.conv(x)), inplace=True)


class MixedBlock(nn.Module):
    """The channels of all branches of a block, one after the other.

    Args:
        c_in: Channels of the input.
        branches: The branches.

    Attributes:
        c_out: Channels of the output.
    """

    def __init__(self, c_in: int, branches: tuple[Branch, ...]):
        super().__init__()
        self.branches, self.c_out = branches, 0
        for branch in branches:
            width = c_in
            in_a_row = len(branch.steps)
            for i, (name, c_out, kernel) in enumerate(branch.convolutions()):
                is_strided = branch.stride > 1 and i == in_a_row - 1
                stride = branch.stride if is_strided else 1
                padding = 0 if is_strided else (kernel[0] // 2, kernel[1] // 2)
                self.add_module(name, Convolution(width, c_out, kernel, stride, padding))
                if i < in_a_row:  # a fork's second convolution reads what its first reads
                    width = c_out
            self.c_out += 2 * branch.fork or width

    def forward(self, x: Tensor) -> Tensor:
        """Return [N, c_out, H', W'] of x [N, c_in, H, W]."""
        ways: list[Tensor] = []
        for branch in self.branches:
            ways += self._ways(x, branch)
        return torch.cat(ways, dim=1)

    def _ways(self, x: Tensor, branch: Branch) -> Iterator[Tensor]:
        """Yield the output of a branch, or both outputs of a fork."""
        x = pooled(x, branch)
        names = [name for name, _, _ in branch.convolutions()]
        for name in names[: len(branch.steps)]:
            x = self.get_submodule(name)(x)
        if not branch.fork:
            yield x
        for name in names[len(branch.steps) :]:
            yield self.get_submodule(name)(x)


def pooled(x: Tensor, branch: Branch) -> Tensor:
    """Return x [N, C, H, W] after the pool of a branch; x itself if it has none."""
    if branch.pool == "avg":
        # TensorFlow's mean leaves the padding out.
        return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
    if branch.pool == "max":
        return F.max_pool2d(x, 3, stride=branch.stride, padding=0 if branch.stride > 1 else 1)
    return x


class InceptionNetwork(nn.Module):
    """The Inception as TensorFlow's graph of 2015-12-05 has it: 1008 classes, 299 x 299 pixels.

    Reference:
        Szegedy et al. 2015, "Rethinking the Inception Architecture for Computer Vision",
        arXiv:1512.00567.
    """

    def __init__(self) -> None:
        super().__init__()
        width = 3
        for name, (c_out, kernel, stride, padding) in STEM.items():
            self.add_module(name, Convolution(width, c_out, kernel, stride, padding))
            width = c_out
        for name, branches in MIXED.items():
            block = MixedBlock(width, branches)
            self.add_module(name, block)
            width = block.c_out
        self.fc = nn.Linear(width, WIDTHS["logits"])

    def forward(self, x: Tensor, outputs: Collection[str] = ("features",)) -> dict[str, Tensor]:
        """Compute outputs of scaled images.

        Args:
            x: [N, 3, 299, 299].
            outputs: "features": the last block's mean over its 8 x 8 positions ("pool_3"), 2048.
                "logits": of these, without the bias, 1008. "spatial": 7 channels at 17 x 17
                positions in TensorFlow's order (row, column, channel), 2023: ADM's
                "mixed_6/conv:0"[..., :7].

        Returns:
            The named outputs, each [N, width].
        """
        found = {}
        for name in STEM:
            x = self.get_submodule(name)(x)
            if name in POOLED:
                x = F.max_pool2d(x, 3, stride=2)
        for name in MIXED:
            x = self.get_submodule(name)(x)
            # "mixed_6" counts from "mixed" = Mixed_5b. Its "conv" is the 1 x 1 branch after batch
            # norm and ReLU: the first channels.
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
    """Return StyleGAN's names of convolutions by ours.

    They are TensorFlow's scopes: "tower" stands for every branch but one of a single convolution.
    """
    found = {}
    for number, name in enumerate(STEM):
        found[name] = numbered("layers.conv", number)
    for number, (block, branches) in enumerate(MIXED.items()):
        scope = numbered("layers.mixed", number)
        separator = "_" if any(branch.fork for branch in branches) else "."
        num_towers = 0
        for branch in branches:
            prefix = ""
            if len(branch.steps) != 1 or branch.fork or branch.pool:
                prefix = numbered("tower", num_towers) + separator
                num_towers += 1
            for i, (name, _, _) in enumerate(branch.convolutions()):
                position = i - len(branch.steps)
                if position < 0:
                    last = numbered("conv", i)
                else:
                    last = f"mixed{separator}" + numbered("conv", position)
                found[f"{block}.{name}"] = f"{scope}.{prefix}{last}"
    return found


def numbered(name: str, number: int) -> str:
    """Return a name as TensorFlow numbers it: "conv", "conv_1", "conv_2"."""
    return f"{name}_{number}" if number else name
