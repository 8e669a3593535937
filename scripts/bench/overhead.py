"""Images/s of the trainer against a bare PyTorch loop: python scripts/bench/overhead.py [--steps 205] [--every 5] [--threads 2]

The same UNet, batch, optimizer, loss, data files and running average; the two take turns, a few steps each, in one process. The trainer's
time is the whole of its loop: data loading, keyed noise, logging, the average, one checkpoint every 200 steps. The ratio is taken pair by
pair; its median and quartiles are printed, and the totals, which hold the checkpoint.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

from difftrain.recipe.reading import parse
from difftrain.run.session import TrainingRun

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


def recipe(photos: Path, run: Path, steps: int) -> dict:
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


class Photos(Dataset):
    def __init__(self, folder: Path):
        self.files = sorted(folder.iterdir())

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> torch.Tensor:
        return torch.from_numpy(
            np.asarray(Image.open(self.files[i]).convert("RGB")).copy()
        ).permute(2, 0, 1)


class BareLoop:
    """What one would write by hand: no resume, no log, no checkpoint."""

    def __init__(self, folder: Path):
        self.model = UNet2DModel(
            **{key: tuple(v) if isinstance(v, list) else v for key, v in UNET.items()}
        ).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-4, weight_decay=0.0)
        self.average = [p.detach().clone() for p in self.model.parameters()]
        betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
        alpha_bar = torch.cumprod(1 - betas, 0)
        self.alpha, self.sigma = alpha_bar.sqrt().float(), (1 - alpha_bar).sqrt().float()
        self.batches = self.endless(DataLoader(Photos(folder), BATCH, shuffle=True, drop_last=True))

    @staticmethod
    def endless(loader: DataLoader):
        while True:
            yield from loader

    def step(self) -> None:
        x0 = next(self.batches) / 127.5 - 1
        t, eps = torch.randint(0, 1000, (BATCH,)), torch.randn_like(x0)
        x_t = self.alpha[t].view(-1, 1, 1, 1) * x0 + self.sigma[t].view(-1, 1, 1, 1) * eps
        loss = F.mse_loss(self.model(x_t, t).sample, eps)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(self.average, list(self.model.parameters()), 1e-4)


class TakeTurns:
    """A visit of the trainer: every so many of its steps the bare loop makes as many."""

    def __init__(self, bare: BareLoop, every: int):
        self.bare, self.every = bare, every
        self.trainer, self.plain = [], []
        self.left = time.perf_counter()

    def __call__(self, denoiser: nn.Module, step: int, training_seconds: float) -> None:
        started = time.perf_counter()
        self.trainer.append(started - self.left)
        for _ in range(self.every):
            self.bare.step()
        self.left = time.perf_counter()
        self.plain.append(self.left - started)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=205)
    parser.add_argument("--every", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder) / "photos"
        photos.mkdir()
        random = np.random.default_rng(0)
        for i in range(512):
            Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(
                photos / f"{i:04d}.png"
            )
        turns = TakeTurns(BareLoop(photos), given.every)
        run = TrainingRun(parse(recipe(photos, Path(folder) / "run", given.steps)))
        run.visits = lambda: [turns]
        trainer = run.trainer()
        for _ in range(3):
            turns.bare.step()  # warm up
        turns.left = time.perf_counter()
        trainer.run()
    report(turns, given)


def report(turns: TakeTurns, given: argparse.Namespace) -> None:
    trainer, plain = (
        turns.trainer[1:],
        turns.plain[1:],
    )  # the first pair holds the trainer's own warm-up
    ratios = [a / b for a, b in zip(trainer, plain, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    per_step = statistics.median(plain) / given.every
    images = BATCH * given.every
    load = f"load {os.getloadavg()[0]:.2f} on {os.cpu_count()} cores"
    print(
        f"\n{given.threads} threads, {load}, {len(ratios)} pairs of {given.every} steps of {BATCH}"
    )
    print(
        f"bare loop   {images / statistics.median(plain):7.2f} images/s, {1000 * per_step:.0f} ms a step"
    )
    print(f"trainer     {images / statistics.median(trainer):7.2f} images/s")
    print(
        f"time of the trainer over the bare loop: median {middle:.4f}, quartiles {low:.4f} to {high:.4f}; "
        f"totals {sum(trainer) / sum(plain):.4f} (with the checkpoint)"
    )


if __name__ == "__main__":
    main()
