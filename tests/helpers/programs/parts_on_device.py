"""Computes loss and gradient of every part on a device and on the CPU.

python parts_on_device.py DEVICE FILE writes {part: the largest difference, relative to the largest
value}, under "neighbours" and "resize" what differs of these, and under "watch" what
`helpers.device.Watch` sees of a few operators.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import nn

from difftrain.core.rng import Rng
from difftrain.evaluation.distances import nearest
from difftrain.evaluation.features.resize import resize
from difftrain.objective.objective import Objective
from difftrain.objective.schedule import NoiseSchedule, expand_like
from difftrain.objective.slots import (
    ERRORS,
    NOISES,
    PERTURBATIONS,
    REGULARIZERS,
    TIMESTEPS,
    VARIANCES,
    WEIGHTINGS,
)
from difftrain.objective.types import Batch
from helpers import device as pretend

KEYS = {
    "weighting": WEIGHTINGS,
    "noise": NOISES,
    "perturbation": PERTURBATIONS,
    "error": ERRORS,
    "variance": VARIANCES,
    "timesteps": TIMESTEPS,
    "regularizers": REGULARIZERS,
}
CLIP = (2, 4, 3, 3)


class Net(nn.Module):
    """Mixes the channels and looks at time and neighbours; smooth."""

    def __init__(self, channels: int):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(channels, CLIP[0], generator=generator, dtype=torch.float64)
        self.weight = nn.Parameter(weight)

    def forward(self, x, t, cond):
        mixed = torch.einsum("dc,bc...->bd...", self.weight, x + 0.3 * x.roll(1, 2))
        time = expand_like(t.to(x.dtype) / 1000, mixed)
        return torch.tanh(mixed + time)


def loss_and_gradient(key: str, name: str, place: torch.device) -> torch.Tensor:
    """Return all numbers of one step with a part, on the CPU."""
    part = KEYS[key].parse(name, key).build()
    parts = {key: [part] if key == "regularizers" else part}
    objective = Objective(NoiseSchedule.linear(), "v_prediction", **parts).to(place)
    net = Net(CLIP[0] * objective.variance.output_channels).to(place)
    generator = torch.Generator().manual_seed(1)
    x0 = 2 * torch.rand(6, *CLIP, generator=generator, dtype=torch.float64) - 1
    numbers = []
    for step in range(2):  # the second one has the state of the first
        with objective.context():
            losses = objective(net, Batch(x0.to(place)), Rng(3, step, range(6)))
        net.zero_grad()
        losses.total.backward()
        assert losses.total.device.type == place.type
        numbers += [losses.total.detach().cpu().reshape(1), net.weight.grad.cpu().flatten()]
    return torch.cat(numbers)


def difference(key: str, name: str, place: torch.device) -> float:
    """Return how far a part is off, relative to the largest number."""
    expected = loss_and_gradient(key, name, torch.device("cpu"))
    found = loss_and_gradient(key, name, place)
    return float((found - expected).abs().max() / expected.abs().max())


def unequal_neighbours(place: torch.device) -> int:
    """Return how many nearest training images differ from the CPU's, where many are equal.

    Some stay on the CPU until they are compared. No float64 may be made on the device.
    """
    generator = torch.Generator().manual_seed(2)
    training = torch.randint(0, 256, (90, 3, 20, 70), generator=generator, dtype=torch.uint8)
    training[40:60] = training[3].clone()
    images = training.clone()
    images[::2] ^= 5
    expected = nearest.NearestTraining([training])(images)
    nearest.CHUNK, nearest.MOST_HELD = 16, 0
    with pretend.watched(forbids_float64=True):
        found = nearest.NearestTraining([training], place)(images)
    return int((found != expected).any(dim=1).sum())


def resize_difference(place: torch.device) -> float:
    """Return by how many grey levels Pillow's bicubic resize differs from the CPU's."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (2, 3, 90, 400), generator=generator, dtype=torch.uint8)
    expected = resize(images, "pil_bicubic")
    with pretend.watched(forbids_float64=True):
        found = resize(images.to(place), "pil_bicubic")
    assert found.device.type == place.type
    return float((found.cpu() - expected).abs().max())


def watched(place: torch.device) -> dict[str, object]:
    """Return what is seen of a copy, a number that is read, and float64 on the device."""
    with pretend.watched(package="/programs/") as watch:
        x = torch.ones(3).to(place)
        float(x.sum())
        x.double()
    try:
        with pretend.watched(forbids_float64=True):
            x.double()
        refused = ""
    except TypeError as error:
        refused = str(error)
    return {
        "waits": [[where.partition(":")[0], why] for where, why in watch.waits],
        "float64": [operator for _, operator in watch.float64],
        "refused": refused,
    }


if __name__ == "__main__":
    place = pretend.register() if sys.argv[1] == "pretend" else torch.device(sys.argv[1])
    found: dict[str, object] = {}
    for key, registry in KEYS.items():
        for name in registry.constructors:
            found[f"{key} {name}"] = difference(key, name, place)
    found["resize"] = resize_difference(place)
    found["neighbours"] = unequal_neighbours(place)
    if sys.argv[1] == "pretend":
        found["watch"] = watched(place)
    Path(sys.argv[2]).write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)
