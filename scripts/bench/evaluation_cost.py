"""What an evaluation costs beside the work that it cannot do without.

python scripts/bench/evaluation_cost.py [free] [fidelity] [--num N] [--side N] [--rounds 5]
    [--threads 2] [--environment ENVIRONMENT]

Without a part both run. Contestants take turns, round by round. The ratio is taken within a round;
its median and quartiles are printed.

free: The evaluation of N pictures (default 5000) with features that cost nothing, against decoding
alone: the same source's pass over the files, and a plain loop of Pillow in one thread. The
reference is known by its statistics. The pictures are those of ../shared/data/cifar10-10k if it is
there, else drawn; with --side they are drawn. CPU seconds are printed too: on a busy machine or a
slow disk they tell more.

fidelity: The FID of two folders of N pictures (default 300) by `difftrain evaluate`, against
torch-fidelity's whole command, each in a new process. ENVIRONMENT is the virtual environment of
scripts/compare_fid_tools.py; without it this part is skipped.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from difftrain.data.datasets.image_folder import ImageFolder
from difftrain.evaluation.distances.moments import Moments
from difftrain.evaluation.evaluator import Evaluator
from difftrain.evaluation.features.inception_network import InceptionNetwork
from difftrain.evaluation.metrics.frechet import FrechetDistance
from difftrain.evaluation.reference import ReferenceStatistics
from difftrain.evaluation.slots import FeatureExtractor
from difftrain.evaluation.sources import DatasetImages

PHOTOGRAPHS = Path(__file__).parents[3] / "shared/data/cifar10-10k/train.parquet"
NUM_FEATURES = 6
SIDE = 64  # of drawn pictures


def main() -> None:
    """Run the chosen parts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # argparse compares the empty list of a call without parts with the choices too.
    parts = ["free", "fidelity", []]
    parser.add_argument("parts", nargs="*", choices=parts, metavar="PART", help="free or fidelity")
    parser.add_argument("--num", type=int, help="pictures in a folder")
    parser.add_argument("--side", type=int, help="draw pictures of this many pixels a side")
    parser.add_argument("--rounds", type=int, default=5, help="number of counted rounds")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--environment", type=Path, help="where torch-fidelity is installed")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if not given.parts or "free" in given.parts:
        bench_free(given.num or 5000, given.side, given.rounds)
    if not given.parts or "fidelity" in given.parts:
        if given.environment is None:
            print("fidelity: skipped, since no --environment with torch-fidelity is given")
            return
        bench_fidelity(
            given.environment, given.num or 300, given.side or SIDE, given.rounds, given.threads
        )


class Spent(NamedTuple):
    """Seconds by the clock, and of all CPU cores, of this process and those that it waited for."""

    wall: float
    cpu: float


def spent_by(action: Callable[[], Any]) -> Spent:
    """Measure a call."""
    before, started = cpu_seconds(), time.perf_counter()
    action()
    return Spent(time.perf_counter() - started, cpu_seconds() - before)


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and of its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def compare(contestants: Mapping[str, Callable[[], Any]], rounds: int) -> None:
    """Let contestants take turns, and print the first one's time over that of each other one."""
    found: dict[str, list[Spent]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        order = list(contestants)
        if number % 2:
            order.reverse()
        for name in order:
            seconds = spent_by(contestants[name])
            if number > 0:  # the first round warms up
                found[name].append(seconds)
    names = list(contestants)
    for name in names:
        wall = statistics.median(one.wall for one in found[name])
        cpu = statistics.median(one.cpu for one in found[name])
        print(f"  {name:28s} {wall:6.2f} s by the clock, {cpu:6.2f} s of CPU")
    first = found[names[0]]
    for name in names[1:]:
        pairs = list(zip(first, found[name], strict=True))
        wall_ratio = spread([own.wall / other.wall for own, other in pairs])
        cpu_ratio = spread([own.cpu / other.cpu for own, other in pairs])
        print(f"  {names[0]} / {name}: {wall_ratio} by the clock, {cpu_ratio} of CPU", flush=True)


def spread(values: Sequence[float]) -> str:
    """Return median and quartiles in words."""
    low = middle = high = values[0]
    if len(values) > 1:
        low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


# A free extractor


class FreeFeatures(FeatureExtractor):
    """The first pixels of the first row."""

    name = "free"

    @property
    def widths(self) -> Mapping[str, int]:
        """The width of the features."""
        return {"features": NUM_FEATURES}

    def protocol(self) -> dict[str, Any]:
        """Return the name."""
        return {"type": self.name}

    def extract(
        self, samples: Tensor, outputs: Collection[str] = ("features",)
    ) -> dict[str, Tensor]:
        """Return the features of images [N, 3, H, W] uint8."""
        return {"features": samples[:, :, 0, : NUM_FEATURES // 3].flatten(1).float()}


def bench_free(num: int, side: int | None, rounds: int) -> None:
    """Compare an evaluation with free features with decoding alone."""
    with tempfile.TemporaryDirectory() as place:
        images, rows = Path(place) / "images", Path(place) / "rows"
        what = "" if side else write_photographs(images, num)
        if not what:
            write_drawings(images, num, side or SIDE, seed=0)
            what = f"drawn PNG files of {side or SIDE} x {side or SIDE}"
        mean, cov = torch.zeros(NUM_FEATURES), torch.eye(NUM_FEATURES)
        known = Moments.known(mean.double(), cov.double(), None)
        reference = ReferenceStatistics({"features": known}, {})

        def evaluate() -> None:
            shutil.rmtree(rows, ignore_errors=True)
            metrics = [FrechetDistance()]
            evaluator = Evaluator(reference, None, FreeFeatures(), metrics, rows, seed=0)
            with (
                contextlib.redirect_stdout(io.StringIO()),
                contextlib.redirect_stderr(io.StringIO()),
            ):
                evaluator(opened(images))

        def read_blocks() -> None:
            source = opened(images)
            for _ in source.blocks(source.consecutive()):
                pass

        print(f"Evaluation of {num} {what} with free features, {rounds} rounds")
        contestants = {
            "evaluation": evaluate,
            "the source's own pass": read_blocks,
            "a plain loop of Pillow": lambda: decode_files(images),
        }
        compare(contestants, rounds)


def opened(folder: Path) -> DatasetImages:
    """Open a folder of pictures, with its look at all headers."""
    return DatasetImages(ImageFolder(str(folder)))


def decode_files(folder: Path) -> None:
    """Decode all files of a folder, one after the other."""
    for file in sorted(folder.iterdir()):
        with PIL.Image.open(file) as image:
            np.asarray(image.convert("RGB"))


def write_photographs(folder: Path, num: int) -> str:
    """Write files of CIFAR-10, and return what they are; empty where they are not to be had."""
    if not PHOTOGRAPHS.is_file():
        return ""
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(PHOTOGRAPHS, columns=["image"])
    folder.mkdir()
    for i, image in enumerate(table["image"].to_pylist()[:num]):
        suffix = Path(image["path"] or "image.png").suffix
        (folder / f"{i:06d}{suffix}").write_bytes(image["bytes"])
    return "files of CIFAR-10"


def write_drawings(folder: Path, num: int, side: int, seed: int) -> None:
    """Write PNG files of smooth noise."""
    folder.mkdir()
    random = np.random.default_rng(seed)
    for i in range(num):
        coarse = random.integers(0, 256, (4 + 4 * seed, 4 + 4 * seed, 3), dtype=np.uint8)
        image = PIL.Image.fromarray(coarse).resize((side, side))
        image.save(folder / f"{i:06d}.png", compress_level=1)


# torch-fidelity's whole command


def bench_fidelity(environment: Path, num: int, side: int, rounds: int, threads: int) -> None:
    """Compare two commands that compute the FID of two folders."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        first, second = folder / "first", folder / "second"
        write_drawings(first, num, side, seed=0)
        write_drawings(second, num, side, seed=1)
        weights = folder / "weights.pth"
        torch.manual_seed(0)
        torch.save(InceptionNetwork().state_dict(), weights)
        sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
        features = json.dumps({"type": "inception", "path": str(weights), "sha256": sha256})
        own = [sys.executable, "-m", "difftrain.evaluate", "--generated", first]
        own += ["--reference", second, "--features", features, "--metrics", "fid"]
        other = [environment / "bin" / "fidelity", "--input1", first, "--input2", second, "--fid"]
        other += ["--cpu", "--no-cache", "--silent", "--feature-extractor-weights-path", weights]
        cache = folder / "cache"
        settings = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "DIFFTRAIN_CACHE": str(cache),
        }

        def running(command: list[Any]) -> Callable[[], Any]:
            words = [str(word) for word in command]

            def run() -> None:
                shutil.rmtree(cache, ignore_errors=True)  # no features of an earlier round
                subprocess.run(words, check=True, capture_output=True, env=settings)

            return run

        print(f"FID of two folders of {num} PNG files of {side} x {side}, {threads} thread(s)")
        contestants = {"difftrain": running(own), "torch-fidelity": running(other)}
        compare(contestants, rounds)


if __name__ == "__main__":
    main()
