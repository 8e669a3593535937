"""Images per second of the trainer against a bare PyTorch loop.

python scripts/bench/overhead.py [--steps 205] [--every 5] [--threads 2]

Both train the same UNet with the same batch size, optimizer, loss, data files and running average.
They take turns in one process, a few steps each. The trainer's time is the time of its whole loop:
data loading, keyed noise, logging, the average, and a checkpoint every 200 steps. The ratio is
taken pair by pair. Its median and quartiles are printed, and the ratio of the totals, which include
the checkpoint. There must be at least three turns: --steps at least three times --every.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from difftrain.recipe.reading import parse
from difftrain.run.session import TrainingRun
from difftrain.training.callbacks import Callback

BATCH = 32
UNET = {
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [32, 64, 64],
    "layers_per_block": 1,
    "norm_num_groups": 16,
    "attention_head_dim": 32,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}


def make_recipe(photos: Path, run: Path, steps: int) -> dict[str, Any]:
    """Return the trainer's recipe."""
    return {
        "output": str(run),
        "model": {"type": "unet2d", "config": UNET},
        "schedule": "linear",
        "parameterization": "epsilon",
        "data": {"type": "image_folder", "path": str(photos)},
        "transform": {"resolution": 32, "channels": 3, "resize": "none"},
        "training": {"steps": steps, "batch_size": BATCH, "log_every": 10, "checkpoint_every": 200},
        "optimizer": {"name": "adamw", "lr": 2e-4},
        "ema": {"type": "decay"},
        "sampling": {"sampler": {"type": "ddim", "steps": 2}},
    }


def write_photos(folder: Path, num: int) -> None:
    """Write PNG files of noise."""
    folder.mkdir()
    noise = np.random.default_rng(0)
    for i in range(num):
        pixels = noise.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:04d}.png")


class Photos(Dataset[Tensor]):
    """The images of a folder as tensors [3, H, W] uint8."""

    def __init__(self, folder: Path):
        self.files = sorted(folder.iterdir())

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> Tensor:
        image = Image.open(self.files[i]).convert("RGB")
        pixels = torch.from_numpy(np.asarray(image).copy())
        return pixels.permute(2, 0, 1)


class BareLoop:
    """What one would write by hand: no resume, no log, no checkpoint."""

    def __init__(self, folder: Path):
        self.model = UNet2DModel(**UNET).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-4, weight_decay=0.0)
        self.average = [p.detach().clone() for p in self.model.parameters()]
        betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
        alphas_cumprod = torch.cumprod(1 - betas, 0)
        self.alpha = alphas_cumprod.sqrt().float()
        self.sigma = (1 - alphas_cumprod).sqrt().float()
        loader = DataLoader(Photos(folder), BATCH, shuffle=True, drop_last=True)
        self.batches = self.repeat(loader)

    @staticmethod
    def repeat(loader: DataLoader[Tensor]) -> Iterator[Tensor]:
        """Yield the batches of one epoch after another, without end."""
        while True:
            yield from loader

    def step(self) -> None:
        """Make one update."""
        x0 = next(self.batches) / 127.5 - 1
        t = torch.randint(0, 1000, (BATCH,))
        eps = torch.randn_like(x0)
        alpha = self.alpha[t].view(-1, 1, 1, 1)
        sigma = self.sigma[t].view(-1, 1, 1, 1)
        x_t = alpha * x0 + sigma * eps
        loss = F.mse_loss(self.model(x_t, t).sample, eps)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(self.average, list(self.model.parameters()), 1e-4)


class TakeTurns(Callback):
    """Runs as many steps of the bare loop as the trainer has made since the last call.

    Attributes:
        trainer: Seconds of each of the trainer's turns.
        plain: Seconds of each of the bare loop's turns.
        left: When the trainer's turn began.
    """

    def __init__(self, bare: BareLoop, every: int):
        self.bare = bare
        self.every = every
        self.trainer: list[float] = []
        self.plain: list[float] = []
        self.left = time.perf_counter()

    def __call__(self, denoiser: nn.Module, step: int, training_seconds: float) -> None:
        """Run the bare loop's turn."""
        started = time.perf_counter()
        self.trainer.append(started - self.left)
        for _ in range(self.every):
            self.bare.step()
        self.left = time.perf_counter()
        self.plain.append(self.left - started)


def main() -> None:
    """Let the two loops take turns and print the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=205, help="steps of the trainer")
    parser.add_argument("--every", type=int, default=5, help="steps in one turn")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_photos(folder / "photos", 512)
        turns = TakeTurns(BareLoop(folder / "photos"), given.every)
        run = TrainingRun(parse(make_recipe(folder / "photos", folder / "run", given.steps)))
        trainer = run.trainer()
        # The turns are the only callback: no sample grids.
        trainer.callbacks = [turns]
        for _ in range(3):
            turns.bare.step()  # warms up
        turns.left = time.perf_counter()
        trainer.run()
    report(turns, given)


def report(turns: TakeTurns, given: argparse.Namespace) -> None:
    """Print medians and the quartiles of the ratios."""
    # The trainer warms up in the first pair, which is not counted.
    trainer = turns.trainer[1:]
    plain = turns.plain[1:]
    ratios = [own / bare for own, bare in zip(trainer, plain, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    images = BATCH * given.every
    plain_speed = images / statistics.median(plain)
    trainer_speed = images / statistics.median(trainer)
    milliseconds = 1000 * statistics.median(plain) / given.every
    load = f"load {os.getloadavg()[0]:.2f} on {os.cpu_count()} cores"
    pairs = f"{len(ratios)} pairs of {given.every} steps of {BATCH}"
    print(f"\n{given.threads} threads, {load}, {pairs}")
    print(f"bare loop   {plain_speed:7.2f} images/s, {milliseconds:.0f} ms a step")
    print(f"trainer     {trainer_speed:7.2f} images/s")
    print(
        f"time of the trainer over the bare loop: median {middle:.4f}, quartiles {low:.4f} to "
        f"{high:.4f}; totals {sum(trainer) / sum(plain):.4f} (with the checkpoint)"
    )


if __name__ == "__main__":
    main()
