"""Start-up of `difftrain sample` against a bare diffusers script.

python scripts/bench/startup.py RUN [--pairs 9]

RUN is the folder of a finished run on a `unet2d` model, such as runs/digits. Both programs start in
a new Python process, load the run's network and generate one image with the same sampler and steps.
They take turns. The ratio is taken pair by pair; its median and quartiles are printed.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

# What a user would write by hand: no recipe, no run folder, no check of the input.
BARE = """
import sys
from pathlib import Path

import diffusers
import torch
from diffusers import UNet2DModel
from PIL import Image

pipeline, sampler, steps, guidance, out = sys.argv[1:]
unet = UNet2DModel.from_pretrained(pipeline, subfolder="unet").eval()
scheduler = getattr(diffusers, sampler).from_pretrained(pipeline, subfolder="scheduler")
scheduler.set_timesteps(int(steps))
config = unet.config
x = torch.randn(1, config.in_channels, config.sample_size, config.sample_size)
x = x * scheduler.init_noise_sigma
labels, guidance, rows = None, float(guidance), 1
if config.num_class_embeds is not None:
    labels = torch.tensor([0])
    if guidance != 1:
        labels, rows = torch.tensor([0, config.num_class_embeds - 1]), 2
with torch.no_grad():
    for t in scheduler.timesteps:
        x_in = scheduler.scale_model_input(x, t).expand(rows, -1, -1, -1)
        output = unet(x_in, t, labels).sample
        if rows == 2:
            cond, null = output.chunk(2)
            output = null + guidance * (cond - null)
        x = scheduler.step(output, t, x).prev_sample
pixels = ((x[0] + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
Image.fromarray(pixels.squeeze()).save(Path(out) / "bare.png")
"""


def bare_command(run: Path, out: Path) -> list[str]:
    """Return the command of the bare script, with the run's sampler, steps and guidance."""
    sampling = yaml.safe_load((run / "recipe.yaml").read_text())["sampling"]
    config = yaml.safe_load((run / "pipeline/scheduler/scheduler_config.json").read_text())
    steps, guidance = sampling["sampler"]["steps"], sampling["guidance"]
    arguments = [run / "pipeline", config["_class_name"], steps, guidance, out]
    return [sys.executable, "-c", BARE, *map(str, arguments)]


def sample_command(run: Path, out: Path) -> list[str]:
    """Return the command of the library, with the console script beside this interpreter."""
    script = Path(sys.executable).with_name("difftrain")
    out = out / "samples"
    return [str(script), "sample", str(run), "--num", "1", "--out", str(out), "--overwrite"]


def seconds(command: list[str]) -> float:
    """Run a command and return its wall time."""
    started = time.perf_counter()
    result = subprocess.run(command, capture_output=True, text=True)
    took = time.perf_counter() - started
    if result.returncode != 0:
        sys.exit(f"{command[0]} failed:\n{result.stdout}{result.stderr}")
    return took


def main() -> None:
    """Measure the pairs and print the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--pairs", type=int, default=9)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bare, sample = (
            bare_command(given.run, Path(folder)),
            sample_command(given.run, Path(folder)),
        )
        # The first pair brings the files into the page cache and is not counted.
        seconds(bare)
        seconds(sample)
        times = [(seconds(bare), seconds(sample)) for _ in range(given.pairs)]
    report(times)


def report(times: list[tuple[float, float]]) -> None:
    """Print medians and the quartiles of the ratios.

    Args:
        times: Seconds of (bare script, difftrain sample) of each pair.
    """
    low, middle, high = statistics.quantiles([own / bare for bare, own in times], n=4)
    print(f"load {os.getloadavg()[0]:.2f} on {os.cpu_count()} cores, {len(times)} pairs, medians")
    print(f"bare diffusers script   {statistics.median(bare for bare, _ in times):6.2f} s")
    print(f"difftrain sample        {statistics.median(own for _, own in times):6.2f} s")
    print(f"ratio                   {middle:6.3f}, quartiles {low:.3f} to {high:.3f}")


if __name__ == "__main__":
    main()
