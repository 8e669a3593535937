"""Compares FID and KID of difftrain with those of pytorch-fid and torch-fidelity.

python scripts/compare_fid_tools.py ENVIRONMENT [--num 500] [--keep FOLDER]

ENVIRONMENT is a virtual environment that holds both tools and no difftrain:

    python -m venv ENVIRONMENT
    ENVIRONMENT/bin/pip install torch==2.13.0 torchvision==0.28.0 pytorch-fid==0.3.0 \
        torch-fidelity==0.4.0 scipy==1.17.1

It draws two folders of plain 8-bit RGB PNG files of mixed sizes, and random Inception weights of
the published layout by the formula of scripts/golden_inception.py. Each tool's own command scores
the folders at batch size 1 on the CPU: pytorch-fid the FID, torch-fidelity the FID and the KID of
one subset of all pictures, difftrain both under the preset of either tool. The relative differences
are printed. The exit code is 1 if one of them is above 1e-4.
"""

import argparse
import hashlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch

from difftrain.evaluation.features.inception_network import InceptionNetwork

LIMIT = 1e-4  # of a relative difference
SIDES = (24, 400)  # pixels of the shortest and the longest side
HERE = Path(__file__).parent
CHECKPOINT = "pt_inception-2015-12-05-6726825d.pth"  # where pytorch-fid's torch.hub looks


def main() -> int:
    """Make pictures and weights, run the three tools, and print what differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("environment", type=Path, help="the environment of the two tools")
    parser.add_argument("--num", type=int, default=500, help="pictures in each folder")
    parser.add_argument("--keep", type=Path, help="where pictures and weights stay")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        place = given.keep or Path(temporary)
        place.mkdir(parents=True, exist_ok=True)
        for number, name in enumerate(("first", "second")):
            draw_pictures(place / name, given.num, seed=number)
        weights = draw_weights(place)
        theirs = run_tools(given.environment / "bin", place, weights, given.num)
        ours = {
            preset: run_difftrain(place, weights, preset, given.num)
            for preset in ("pytorch_fid", "torch_fidelity")
        }
    return print_differences(theirs, ours)


def draw_pictures(folder: Path, num: int, seed: int) -> None:
    """Write PNG files of coarse colours with noise, of mixed sizes."""
    folder.mkdir(exist_ok=True)
    random = np.random.default_rng(seed)
    for i in range(num):
        width, height = (int(side) for side in random.integers(*SIDES, 2, endpoint=True))
        cells = int(random.integers(2, 9 + 8 * seed))
        coarse = random.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
        smooth = PIL.Image.fromarray(coarse).resize((width, height), PIL.Image.Resampling.BICUBIC)
        noisy = np.asarray(smooth) + random.normal(0, 8 + 8 * seed, (height, width, 3))
        picture = PIL.Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
        picture.save(folder / f"{i:06d}.png", compress_level=1)


def draw_weights(place: Path) -> Path:
    """Write random weights of the published layout where torch.hub finds them below `place`."""
    formula = runpy.run_path(str(HERE / "golden_inception.py"))
    shapes = {}
    for name, value in InceptionNetwork().state_dict().items():
        if not name.endswith("num_batches_tracked"):
            shapes[name] = list(value.shape)
    file = place / "hub" / "checkpoints" / CHECKPOINT
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(formula["weights"](shapes), file)
    return file


def run_tools(programs: Path, place: Path, weights: Path, num: int) -> dict[str, dict[str, float]]:
    """Return the scores of pytorch-fid and torch-fidelity by their presets' names."""
    folders = [str(place / "first"), str(place / "second")]
    one_by_one = ["--batch-size", "1"]
    printed = run(
        [programs / "pytorch-fid", *folders, *one_by_one, "--num-workers", "0", "--device", "cpu"],
        TORCH_HOME=str(place),
    )
    pytorch_fid = {"fid": float(printed.split("FID:")[1])}
    command = [programs / "fidelity", "--input1", folders[0], "--input2", folders[1], *one_by_one]
    command += ["--cpu", "--json", "--silent", "--no-cache", "--fid", "--kid", "--kid-subsets", "1"]
    command += ["--kid-subset-size", num, "--feature-extractor-weights-path", weights]
    printed = run(command)
    found = json.loads(printed[printed.index("{") :])
    torch_fidelity = {
        "fid": found["frechet_inception_distance"],
        "kid": found["kernel_inception_distance_mean"],
    }
    return {"pytorch_fid": pytorch_fid, "torch_fidelity": torch_fidelity}


def run_difftrain(place: Path, weights: Path, preset: str, num: int) -> dict[str, float]:
    """Return the scores of difftrain under a preset."""
    sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
    features = {"type": "inception", "protocol": preset, "path": str(weights), "sha256": sha256}
    kid = {"type": "kid", "subsets": 1, "subset_size": num, "degree": 3}
    out = place / f"{preset}.json"
    command = [sys.executable, "-m", "difftrain.evaluate", "--json", out]
    command += ["--generated", place / "first", "--reference", place / "second"]
    command += ["--features", json.dumps({**features, "batch_size": 1})]
    command += ["--metrics", json.dumps(["fid", kid])]
    run(command, DIFFTRAIN_CACHE=str(place / "cache"))
    scores = json.loads(out.read_text())["scores"]
    return {name: scores[name]["value"] for name in ("fid", "kid")}


def run(command: Sequence[Any], **environment: str) -> str:
    """Run a program and return what it prints; what it says stays visible if it fails."""
    words = [str(word) for word in command]
    done = subprocess.run(
        words, capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def print_differences(
    theirs: dict[str, dict[str, float]], ours: dict[str, dict[str, float]]
) -> int:
    """Print both numbers of each score, and return whether one is too far from the other."""
    largest = 0.0
    for preset, scores in theirs.items():
        for name, expected in scores.items():
            own = ours[preset][name]
            difference = abs(own - expected) / abs(expected)
            largest = max(largest, difference)
            print(
                f"{preset:15s} {name}  theirs {expected:.10g}  ours {own:.10g}  "
                f"relative difference {difference:.1e}"
            )
    return int(largest > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
