"""Training without a recipe: an own network on 2-D points, behind a plain torch data set."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from difftrain.objective.objective import Objective
from difftrain.objective.schedule import NoiseSchedule
from difftrain.objective.types import Cond
from difftrain.objective.weightings import P2
from difftrain.training.settings import Training
from difftrain.training.trainer import Trainer

SCHEDULE = NoiseSchedule.cosine(50)
TRAINING = {"steps": 6, "batch_size": 16, "micro_batch_size": 4, "log_every": 2}


class PointMLP(nn.Module):
    """An MLP on points [B, 2], their time, and their class where they have one."""

    def __init__(self, num_classes: int = 0, width: int = 16):
        super().__init__()
        self.labels = nn.Embedding(num_classes, 2) if num_classes else None
        self.seen: list[Cond] = []
        self.layers = nn.Sequential(nn.Linear(6, width), nn.SiLU(), nn.Linear(width, 2))

    def forward(self, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """Predict from x_t [B, 2] at time [B]."""
        self.seen.append(cond)
        angle = time[:, None].to(x_t) * math.pi / 50
        label = torch.zeros_like(x_t)
        if self.labels is not None:
            label = self.labels(cond["class_labels"])
        if "shift" in cond:
            label = label + cond["shift"]
        return self.layers(torch.cat([x_t, angle.sin(), angle.cos(), label], dim=1))


class Points(torch.utils.data.Dataset):
    """Points on a circle, as items of the kind that is asked for.

    Args:
        kind: "tensor", "tuple", "pair" (with a label) or "mapping" (with a label and a shift).
        num: Number of points.
    """

    def __init__(self, kind: str = "tensor", num: int = 40):
        angle = torch.linspace(0, 2 * math.pi, num + 1, dtype=torch.float64)[:-1]
        self.points = torch.stack([angle.cos(), angle.sin()], dim=1)
        self.kind = kind

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, i: int) -> Any:
        x0, label = self.points[i], torch.tensor(i % 3)
        items = {
            "tensor": x0,
            "tuple": (x0,),
            "pair": (x0, label),
            "mapping": {"x0": x0, "label": label, "shift": 0.1 * x0},
        }
        return items[self.kind]


def point_trainer(folder: Path, kind: str = "tensor", **changes: Any) -> Trainer:
    """Return a trainer of a float64 network on points, with P2 weighting.

    Args:
        folder: Its folder.
        kind: Of the data set's items.
        changes: Keys of `Training`; others are arguments of the trainer.
    """
    # A network from a fixed seed
    with torch.random.fork_rng():
        torch.manual_seed(0)
        denoiser = PointMLP(3 if kind in ("pair", "mapping") else 0).double()
    # The trainer
    settings, arguments = dict(TRAINING), {}
    for name, value in changes.items():
        (settings if name in Training.__dataclass_fields__ else arguments)[name] = value
    return Trainer(
        denoiser,
        Objective(SCHEDULE, "epsilon", P2()),
        Points(kind),
        torch.optim.AdamW(denoiser.parameters(), lr=1e-2, eps=1e-3),
        Training(**settings),
        folder,
        **arguments,
    )
