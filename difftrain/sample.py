"""Samples of a trained run: `difftrain sample RUN --num N --out DIR`, or `accelerate launch -m difftrain.sample ...`.

Sample i is keyed by its index: the same picture or clip on any number of processes, and more samples later continue the set.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from difftrain.data.video_file import write_clip
from difftrain.distributed import is_main, sum_over_processes
from difftrain.entry import DONE, guarded, join_processes, leave, say
from difftrain.registry import InputError
from difftrain.sampling import blocks, to_pil
from difftrain.visits import save_grid
from difftrain.weights import TrainedRun

GRID = 100  # images shown in the grid; of clips, frames
GRID_FILE = "grid.png"


def sample(
    run: str, num: int, out: str, overrides: Sequence[str] = (), label: int | None = None, step: int | None = None, averaged: bool = True
) -> int:
    """Write num PNGs (clips: MP4, without PyAV GIF) and a grid. overrides: of the run's recipe, such as sampling.seed=1."""
    if num < 1:
        raise InputError(f"--num {num}: expected at least 1.")
    device = join_processes()
    trained = TrainedRun(run, list(overrides))
    generator, conditioning = trained.plan.generator, trained.plan.conditioning
    classes = conditioning.num_classes if conditioning.conditions else None
    if label is not None and not (classes and 0 <= label < classes):
        known = f"0 to {classes - 1}" if classes else "none: the model takes no labels"
        raise InputError(f"--label {label}: the run's classes are {known}.")
    chosen = trained.chosen_step(step)
    folder = made(Path(out).expanduser(), "--out")
    denoiser, weights = trained.denoiser(chosen, averaged, device)
    say(f"{num} samples of step {chosen} ({weights} weights)")
    most = max(1, GRID // (trained.plan.num_frames or 1))
    shown = torch.zeros(min(num, most), *trained.plan.image_shape, dtype=torch.uint8)
    for indices in blocks(num, generator.sampling.block_size):
        labels = torch.full((len(indices),), label) if label is not None else None
        for i, image in zip(indices, generator(denoiser, indices, device, labels), strict=True):
            save(image, folder / f"{i:06d}")
            if i < len(shown):
                shown[i] = image
    shown = sum_over_processes(shown)
    if is_main():
        save_grid(shown, folder / GRID_FILE, None if label is not None else conditioning.num_classes)
    say(f"written to {folder}; {folder / GRID_FILE} shows the first {len(shown)}")
    return DONE


def save(sample: Tensor, stem: Path) -> None:
    """An image [C, H, W] as `stem`.png, or a clip [C, F, H, W] as a video file."""
    if sample.ndim == 4:
        write_clip([to_pil(frame) for frame in sample.transpose(0, 1)], stem)
    else:
        to_pil(sample).save(stem.with_suffix(".png"))


def made(folder: Path, option: str) -> Path:
    """The folder, made if need be; found out before any work is done for it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{option}: the folder {str(folder)!r} cannot be written to ({error.strerror}). Write another one.") from error
    return folder


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of `python -m difftrain.sample`, as accelerate and torchrun start it."""
    import argparse

    parser = argparse.ArgumentParser(prog="difftrain.sample", description="Generate samples of a trained run.")
    parser.add_argument("run")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--num", "--num-samples", type=int, required=True, help="under torchrun write --num-samples")
    parser.add_argument("--out", required=True)
    parser.add_argument("--label", type=int)
    parser.add_argument("--step", type=int)
    parser.add_argument("--weights", choices=["ema", "model"], default="ema")
    given = parser.parse_intermixed_args(arguments)
    return leave(guarded(lambda: sample(given.run, given.num, given.out, given.overrides, given.label, given.step, given.weights == "ema")))


if __name__ == "__main__":
    sys.exit(main())
