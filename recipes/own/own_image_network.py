"""An own image network in one file, which recipes/own/digits.yaml trains."""

import torch
from torch import Tensor, nn

from difftrain.core.registry import PositiveInt
from difftrain.models.slots import MODELS


@MODELS.register("small_image_network")
class SmallImageNetwork(nn.Module):
    """Residual convolutions at one resolution; time and class shift the channels of every block.

    Args:
        channels: Channels of the images.
        width: Channels of the blocks.
        num_blocks: Number of blocks.
        num_classes: Classes of the data. The null label of guidance is one more.
    """

    def __init__(
        self,
        channels: PositiveInt = 1,
        width: PositiveInt = 48,
        num_blocks: PositiveInt = 4,
        num_classes: PositiveInt = 10,
    ):
        super().__init__()
        self.width = width
        self.enter = nn.Conv2d(channels, width, 3, padding=1)
        self.labels = nn.Embedding(num_classes + 1, width)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for _ in range(num_blocks))
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.SiLU(),
                nn.Conv2d(width, width, 3, padding=1),
                nn.SiLU(),
                nn.Conv2d(width, width, 3, padding=1),
            )
            for _ in range(num_blocks)
        )
        self.shifts = nn.ModuleList(nn.Linear(width, width) for _ in range(num_blocks))
        self.leave = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """Predict from images x_t [B, C, H, W] at timesteps t [B]; labels are in cond."""
        frequencies = 10.0 ** torch.linspace(0, -4, self.width // 2, device=x_t.device)
        angles = t[:, None].to(x_t) * frequencies.to(x_t)
        state = self.time(torch.cat([angles.sin(), angles.cos()], dim=1))
        if "class_labels" in cond:
            state = state + self.labels(cond["class_labels"])
        h = self.enter(x_t)
        for norm, shift, block in zip(self.norms, self.shifts, self.blocks, strict=True):
            # Behind the norm, which would take out what it shifts a whole group of channels by.
            h = h + block(norm(h) + shift(state)[:, :, None, None])
        return self.leave(h)
