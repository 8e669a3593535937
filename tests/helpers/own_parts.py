"""Own parts in one module: a data set, a sampler, features, a metric and a callback."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, ClassVar

import numpy as np
import PIL.Image
import torch
from torch import Tensor, nn

from difftrain.core.files import append
from difftrain.core.registry import GIVEN, NonNegativeInt, PositiveInt
from difftrain.data.items import DATASETS, Item, MapDataset
from difftrain.evaluation.evidence import MAIN, Evidence
from difftrain.evaluation.slots import FEATURES, METRICS, Better, FeatureExtractor, Metric, Scores
from difftrain.generation.samplers import SAMPLERS, Sampler
from difftrain.training.callbacks import CALLBACKS, Callback


@DATASETS.register("own_stripes")
class OwnStripes(MapDataset):
    """Stripes in three widths on noise, which are the classes.

    Args:
        num: Number of images.
        seed: Seed of the noise.
    """

    def __init__(self, num: PositiveInt = 12, seed: NonNegativeInt = 0):
        self.num, self.seed = num, seed
        self.class_names = ["one", "two", "four"]

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, i: int) -> Item:
        label = i % 3
        stripes = (np.arange(8) // 2**label % 2) * 150
        noise = np.random.default_rng([self.seed, i]).integers(0, 100, (8, 8))
        image = PIL.Image.fromarray((noise + stripes).astype(np.uint8))
        return Item(image, label, None, f"stripes {i}")

    def is_labelled(self) -> bool:
        """Return that every image has a class."""
        return True


class StraightScheduler:
    """Steps along (x0, eps) from one noise level to the next, without anything of diffusers."""

    def __init__(self, alpha: Tensor, sigma: Tensor):
        self.alpha, self.sigma = alpha, sigma

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        """Spread the steps evenly."""
        times = torch.linspace(len(self.alpha) - 1, 0, num_inference_steps).round().long()
        self.timesteps, self.step_index = times.to(device), 0

    def step(self, output: Tensor, t: Tensor, x: Tensor) -> SimpleNamespace:
        """Return x at the next noise level, from the noise that the network predicts."""
        self.step_index += 1
        x0 = (x - self.sigma[t] * output) / self.alpha[t]
        if self.step_index == len(self.timesteps):
            return SimpleNamespace(prev_sample=x0)
        after = self.timesteps[self.step_index]
        return SimpleNamespace(prev_sample=self.alpha[after] * x0 + self.sigma[after] * output)


@SAMPLERS.register("own_straight")
@dataclass
class OwnStraight(Sampler):
    """Straight steps between noise levels along x0_hat and eps_hat, as DDIM makes them.

    Args:
        steps: Number of steps.
    """

    steps: PositiveInt = 3
    class_name: ClassVar[str] = "StraightScheduler"

    def build(
        self, schedule: Any, parameterization: str, clip: bool, learned_variance: bool = False
    ) -> StraightScheduler:
        """Return a scheduler of our own."""
        assert parameterization == "epsilon"
        return StraightScheduler(schedule.alpha.float(), schedule.sigma.float())


@FEATURES.register("own_rows_and_columns")
class OwnRowsAndColumns(FeatureExtractor):
    """Means of the rows and of the columns of grey images.

    Args:
        scale: Factor on all of them.
    """

    name = "own_rows_and_columns"

    def __init__(self, scale: float = 1.0):
        self.scale = scale

    @property
    def widths(self) -> Mapping[str, int]:
        """Eight rows and eight columns."""
        return {MAIN: 16}

    def protocol(self) -> dict[str, Any]:
        """Return what fixes the numbers."""
        return {"type": self.name, "scale": self.scale}

    def extract(self, samples: Tensor, outputs: Collection[str] = (MAIN,)) -> dict[str, Tensor]:
        """Return the features of uint8 images [N, 1, 8, 8]."""
        grey = samples.float()[:, 0] * self.scale / 255
        return {MAIN: torch.cat([grey.mean(1), grey.mean(2)], dim=1)}


@METRICS.register("own_spread")
@dataclass(frozen=True)
class OwnSpread(Metric):
    """The ratio of the total variances of generated and reference features."""

    scores: ClassVar[tuple[str, ...]] = ("own_spread",)
    better: ClassVar[Better] = "near 1"
    titles: ClassVar[Mapping[str, str]] = {"own_spread": "Spread of the features"}

    def __call__(self, evidence: Evidence) -> Scores:
        """Return the ratio."""
        generated = evidence.generated.statistics().cov.trace()
        reference = evidence.reference.statistics().cov.trace()
        return {"own_spread": {"value": float(generated / reference)}}


@CALLBACKS.register("own_norm")
class OwnNorm(Callback):
    """Appends the norm of the weights to norms.jsonl in the run folder, and picks the smallest.

    Args:
        every: Steps between two lines.
    """

    def __init__(self, every: PositiveInt, folder: Annotated[Path, GIVEN]):
        self.every, self.folder = every, folder

    def __call__(self, denoiser: nn.Module, step: int, training_seconds: float) -> float:
        """Append one line, and return the norm."""
        norm = float(sum(p.detach().square().sum() for p in denoiser.parameters()) ** 0.5)
        append(self.folder / "norms.jsonl", {"step": step, "norm": norm})
        return norm
