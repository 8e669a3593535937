"""A folder of pictures as people have them: is what is read and left out the same everywhere?

python scripts/faults/folders.py [--files 2000] [--keep FOLDER]

It fills a folder: pictures of every ending that is read, in three colour spaces, with EXIF turns,
transparency and 16 bits; formats that are not read; links in circles and to nothing; hidden files;
empty, cut and half files; named pipes; odd names. Then `check --all`, `train` (over more than one
epoch), `reference` and `evaluate` read it with on_error: skip. Each prints a table of what is read,
what is left out and why. The tables must be equal. It prints the table, and exits with 1 if one
differs or a command fails.
"""

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import yaml

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from helpers.profiles import ADOBE_RGB, DISPLAY_P3, rgb_profile  # noqa: E402

READ = (".png", ".PNG", ".jpg", ".JPEG", ".webp", ".bmp", ".tif", ".gif", ".avif", ".ppm")
NOT_READ = (".heic", ".HEIC", ".jxl", ".tga", ".jp2", ".svg", ".mp4", ".zip", ".part", "")
QUIET = (".txt", ".json", ".csv", ".md", ".xml")
PROFILES = (None, rgb_profile(DISPLAY_P3, None), rgb_profile(ADOBE_RGB, 2.19921875))
MODES = ("RGB", "L", "RGBA", "P", "1", "I;16", "CMYK", "LA")
NAMES = ("photo {}", " {}", "{}.copy", "ü{}", "x\n{}", "IMG_{}", "{}'s", "{} (1)", "%s{}", "-{}")
SIDE = 20


def main() -> None:
    """Make the folder, read it in four ways, and compare what they say."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--keep", type=Path, help="Make everything here, and leave it there.")
    given = parser.parse_args()
    with contextlib.ExitStack() as stack:
        place = given.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        photos = place / "photos"
        filled(photos, given.files)
        tables = read_everywhere(place, photos, given.files)
    print(tables["check"])
    wrong = [name for name, table in tables.items() if table != tables["check"]]
    for name in wrong:
        print(f"\n{name} says something else:\n{tables[name]}")
    print(f"\n{len(wrong)} of {len(tables)} tables differ")
    sys.exit(1 if wrong else 0)


# The folder


def filled(photos: Path, num: int) -> None:
    """Fill a folder with `num` entries of all kinds, in turn."""
    random = np.random.default_rng(0)
    kinds: list[Callable[[Path, int], None]] = [
        *[good(random)] * 12,
        not_read,
        quiet,
        hidden,
        broken(random, 0.5),
        broken(random, 0.9),
        empty,
        text_in_a_picture,
        link,
    ]
    for i in range(num):
        folder = photos / f"album {i % 7}" / ("deep" if i % 3 else ".")
        folder.mkdir(parents=True, exist_ok=True)
        kinds[i % len(kinds)](folder, i)
    # A few of each of these are enough
    os.symlink(photos, photos / "all of it")
    os.symlink("..", photos / "album 1" / "up")
    os.symlink("album 2", photos / "album two")
    for name in ("pipe.png", "pipe.jpg"):
        os.mkfifo(photos / name)
    (photos / "a folder.png").mkdir()
    PIL.Image.new("F", (SIDE, SIDE)).save(photos / "heights.tif")
    PIL.Image.new("L", (9000, 2)).save(photos / "strip.png")


def good(random: np.random.Generator) -> Callable[[Path, int], None]:
    """Return what writes a picture that can be read."""

    def write(folder: Path, i: int) -> None:
        ending, mode = READ[i % len(READ)], MODES[(i // 3) % len(MODES)]
        file = folder / (NAMES[i % len(NAMES)].format(i) + ending)
        sides = (SIDE + i % 9, SIDE + i % 5, 4)
        pixels = random.integers(0, 256, sides, dtype=np.uint8)
        image = PIL.Image.fromarray(pixels, "RGBA").convert("RGB")
        if mode == "I;16":
            image = PIL.Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
        elif mode in ("RGBA", "LA"):
            image = PIL.Image.fromarray(pixels, "RGBA").convert(mode)
        elif mode != "RGB":
            image = image.convert(mode)
        exif = PIL.Image.Exif()
        exif[0x0112] = 1 + i % 8
        options = {"exif": exif.tobytes()}
        if PROFILES[i % 3] is not None and mode == "RGB":
            options["icc_profile"] = PROFILES[i % 3]
        try:
            image.save(file, **options)
        except (OSError, ValueError, KeyError, SystemError):  # a format without this mode
            image.convert("RGB").save(file)

    return write


def not_read(folder: Path, i: int) -> None:
    (folder / f"photo {i}{NOT_READ[(i // 20) % len(NOT_READ)]}").write_bytes(b"something")


def quiet(folder: Path, i: int) -> None:
    (folder / f"notes {i}{QUIET[(i // 20) % len(QUIET)]}").write_bytes(b"something")


def hidden(folder: Path, i: int) -> None:
    (folder / (f"._{i}.jpg" if i % 40 < 20 else ".DS_Store")).write_bytes(b"something")


def broken(random: np.random.Generator, share: float) -> Callable[[Path, int], None]:
    """Return what writes a picture that was cut."""

    def write(folder: Path, i: int) -> None:
        file = folder / f"cut {i}{('.jpg', '.png', '.webp', '.gif', '.bmp')[(i // 20) % 5]}"
        pixels = random.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(file)
        content = file.read_bytes()
        file.write_bytes(content[: int(len(content) * share)])

    return write


def empty(folder: Path, i: int) -> None:
    (folder / f"empty {i}.png").touch()


def text_in_a_picture(folder: Path, i: int) -> None:
    (folder / f"page {i}.jpg").write_text("<html>not found</html>")


def link(folder: Path, i: int) -> None:
    target = f"nothing {i}.png"
    if i % 40 < 20:
        target = f"linked {i}.png"
        PIL.Image.new("RGB", (SIDE, SIDE), (i % 256, 9, 9)).save(folder / f"linked {i}.png")
    os.symlink(target, folder / f"link {i}.png")


# The commands


def read_everywhere(place: Path, photos: Path, num: int) -> dict[str, str]:
    """Return the table of each command."""
    batch = 64
    recipe = {
        "output": str(place / "run"),
        "model": {"type": "unet2d", "config": network()},
        "schedule": {"type": "linear", "num_timesteps": 20},
        "parameterization": "epsilon",
        "data": {"type": "image_folder", "path": str(photos)},
        "transform": {"resolution": 16},
        "training": {"steps": -(-2 * num // batch), "batch_size": batch, "num_sampled": 2},
        "optimizer": {"lr": 1e-3},
        "sampling": {"sampler": {"type": "ddim", "steps": 2}},
        "loader": {"on_error": "skip"},
    }
    file = place / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    stats = str(place / "stats.npz")
    alike = ["--features", "pixels", "--resize", "16", "--crop", "--on-error", "skip"]
    commands = {
        "check": ["check", str(file), "--all"],
        "train": ["train", str(file)],
        "reference": ["reference", str(photos), *alike, "--out", stats],
        "evaluate": ["evaluate", "--generated", str(photos), "--reference", stats, *alike],
    }
    return {name: table_of(done(arguments)) for name, arguments in commands.items()}


def network() -> dict[str, object]:
    """Return the configuration of a network that trains in a second."""
    return {
        "sample_size": 16,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": [8],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "down_block_types": ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"],
    }


def done(arguments: list[str]) -> str:
    """Run a command, and return what it printed."""
    command = [sys.executable, "-m", "difftrain", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if ended.returncode:
        print(json.dumps(arguments), ended.returncode, ended.stderr[-2000:])
        sys.exit(1)
    return ended.stdout


def table_of(output: str) -> str:
    """Return the last table of what is read and left out, without the names of data sets."""
    lines = [re.sub(r"^(read +|[\w.-]+: | {11})", "", line) for line in output.splitlines()]
    first = max(i for i, line in enumerate(lines) if " items are read, " in line)
    table = [lines[first]]
    for line in lines[first + 1 :]:
        if not re.match(r" *[\d,]+  \S", line):
            break
        table.append(line)
    return "\n".join(table)


if __name__ == "__main__":
    main()
