"""An own network on an own data set: an MLP on 2-D points, for recipes/own/points.yaml."""

import math

import torch
from torch import Tensor, nn

from difftrain.core.registry import PositiveInt
from difftrain.data.items import DATASETS, MapDataset, TensorItem
from difftrain.models.slots import MODELS


@MODELS.register("point_mlp")
class PointMLP(nn.Module):
    """An MLP on sines and cosines of the points and of the time."""

    def __init__(self, width: PositiveInt = 128, num_frequencies: PositiveInt = 4):
        super().__init__()
        frequencies = math.pi / 2 * 2.0 ** torch.arange(num_frequencies)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.layers = nn.Sequential(
            nn.Linear(2 + 3 * 2 * num_frequencies, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, 2),
        )

    def forward(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:  # [B, 2]
        """Predict from points x_t [B, 2] at timesteps t [B]."""
        values = torch.cat([x_t, t[:, None] / 1000], dim=1)
        angles = (values[:, :, None] * self.frequencies).flatten(start_dim=1)
        return self.layers(torch.cat([x_t, angles.sin(), angles.cos()], dim=1))


@DATASETS.register("two_moons")
class TwoMoons(MapDataset):
    """Points on two interleaved half circles with Gaussian noise around them, always the same ones.

    Args:
        num: Number of points.
        noise: Standard deviation of the noise.
        seed: Seed of the points.
    """

    def __init__(self, num: PositiveInt = 2000, noise: float = 0.05, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        angle = math.pi * torch.rand(num, generator=generator)
        upper = torch.arange(num) % 2 == 0
        x = torch.where(upper, angle.cos(), 1 - angle.cos())
        y = torch.where(upper, angle.sin(), 0.5 - angle.sin())
        points = torch.stack([x - 0.5, y - 0.25], dim=1)
        self.points = points + noise * torch.randn(num, 2, generator=generator)
        self.item_shape = (2,)

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, i: int) -> TensorItem:
        return TensorItem(self.points[i], name=f"point {i}")
