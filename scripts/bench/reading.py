"""What it costs to read a picture as it is meant to be seen, beside a plain decoder.

python scripts/bench/reading.py [--rounds 9] [--pictures 40]

The plain decoder is what this package did before it looked at colour profiles, file kinds and
transparent colours: open, turn, put white behind, resize, crop. Both read the same files, in turn,
picture by picture. The median ratio of the times is printed for each kind of file; no ratio should
be above 1.05. Pictures under a Display P3 profile have their colours converted too.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from torch import Tensor

from difftrain.data.images import open_image
from difftrain.data.transform import Transform, covering_size, to_pixels

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from helpers.profiles import DISPLAY_P3, SRGB, rgb_profile

KINDS = {
    "JPEG 32": ("JPEG", 32, None),
    "PNG 32": ("PNG", 32, None),
    "JPEG 256": ("JPEG", 256, None),
    "PNG 256": ("PNG", 256, None),
    "WebP 512": ("WEBP", 512, None),
    "JPEG 1500": ("JPEG", 1500, None),
    "JPEG 3000": ("JPEG", 3000, None),
    "JPEG 1500, sRGB profile": ("JPEG", 1500, rgb_profile(SRGB, None)),
    "JPEG 1500, Display P3": ("JPEG", 1500, rgb_profile(DISPLAY_P3, None)),
    "PNG 1500, Display P3": ("PNG", 1500, rgb_profile(DISPLAY_P3, None)),
    "JPEG 3000, Display P3": ("JPEG", 3000, rgb_profile(DISPLAY_P3, None)),
    "JPEG 256, Display P3": ("JPEG", 256, rgb_profile(DISPLAY_P3, None)),
}
MOST_SIDE = 256  # of the crop


def main() -> None:
    """Print a line for each kind of file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--pictures", type=int, default=40)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for name, (kind, side, icc) in KINDS.items():
        with tempfile.TemporaryDirectory() as folder:
            files = written(Path(folder), kind, side, icc, given.pictures)
            transform = Transform(min(side, MOST_SIDE))
            ratios = []
            for _ in range(given.rounds):
                for file in files:
                    plain = seconds(plainly, file, transform)
                    ours = seconds(as_seen, file, transform)
                    ratios.append(ours / plain)
            low, middle, high = statistics.quantiles(ratios, n=4)
            print(f"{name:26}{middle:6.3f}   quartiles {low:.3f} to {high:.3f}", flush=True)


def written(folder: Path, kind: str, side: int, icc: bytes | None, num: int) -> list[Path]:
    """Write photographs of a kind: smooth colours with some noise."""
    random = np.random.default_rng(0)
    options = {} if icc is None else {"icc_profile": icc}
    files = []
    for i in range(max(4, num * 256 // max(side, 256))):
        coarse = random.integers(0, 256, (9, 9, 3), dtype=np.uint8)
        smooth = PIL.Image.fromarray(coarse).resize((side, side), PIL.Image.Resampling.BICUBIC)
        noise = random.integers(-8, 9, (side, side, 3))
        pixels = np.clip(np.asarray(smooth) + noise, 0, 255).astype(np.uint8)
        file = folder / f"{i:03d}.{kind.lower()}"
        PIL.Image.fromarray(pixels).save(file, kind, **options)
        files.append(file)
    return files


def as_seen(file: Path, transform: Transform) -> Tensor:
    """Read a picture as a data set does."""
    return transform(open_image(file, str(file)))


def plainly(file: Path, transform: Transform) -> Tensor:
    """Read a picture without a look at its profile."""
    with PIL.Image.open(file) as image:
        image.load()
    turned = image.copy()
    PIL.ImageOps.exif_transpose(turned, in_place=True)
    if turned.has_transparency_data:
        clear = turned.convert("RGBA")
        turned = PIL.Image.alpha_composite(PIL.Image.new("RGBA", clear.size, "white"), clear)
    if turned.mode != "RGB":
        turned = turned.convert("RGB")
    side = transform.resolution
    height, width = covering_size((turned.height, turned.width), (side, side))
    if (height, width) != (turned.height, turned.width):
        turned = turned.resize((width, height), PIL.Image.Resampling.BICUBIC)
    left, top = (width - side) // 2, (height - side) // 2
    return to_pixels(turned.crop((left, top, left + side, top + side)))


def seconds(read: Callable[[Path, Transform], object], file: Path, transform: Transform) -> float:
    """Return how long a way of reading takes."""
    started = time.perf_counter()
    read(file, transform)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
