"""Time and memory of the scores.

python scripts/bench/evaluate.py [PART ...] [--features 2048] [--rounds 5] [--threads 1]

Without PART all four parts run:

frechet: The library's Frechet distance against the one with scipy.linalg.sqrtm. They take turns in
one process with the same number of threads. There are four cases: full rank, full rank with a wide
spectrum, and fewer samples than features on one side or on both. The ratio is taken round by round.
Its median and quartiles are printed, and the largest relative difference of the two numbers.

extraction: The Inception over a folder of PNG files against its forward on prepared tensors. The
first one decodes, resizes, computes and writes rows. They take turns. A speed of 1 is the speed of
the forward.

streaming: The largest memory of a whole evaluation of two folders with a small extractor, for a
growing number of images. Each number runs in its own process.

memory: The memory that the kernel distance and precision and recall take beside the features, which
lie in a file. Each measurement runs in its own process.
"""

import argparse
import contextlib
import hashlib
import io
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor, nn

from difftrain.data.datasets.image_folder import ImageFolder
from difftrain.evaluation import (
    FeatureStatistics,
    frechet_distance,
    kernel_distance,
    precision_recall,
)
from difftrain.evaluation.evaluator import Evaluator
from difftrain.evaluation.extraction import Extraction
from difftrain.evaluation.features.inception import Inception, InceptionNetwork
from difftrain.evaluation.metrics.frechet import FrechetDistance
from difftrain.evaluation.rows import RowsInBlocks
from difftrain.evaluation.slots import FeatureExtractor
from difftrain.evaluation.sources import DatasetImages

SCORES: dict[str, Callable[..., Any]] = {
    "kernel_distance": kernel_distance,
    "precision_recall": precision_recall,
}


def main() -> None:
    """Run the chosen parts, or one measurement in this process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "parts",
        nargs="*",
        # argparse compares the empty list of a call without parts with the choices too.
        choices=["frechet", "extraction", "streaming", "memory", []],
        metavar="PART",
        help="frechet, extraction, streaming or memory (default: all of them)",
    )
    parser.add_argument("--features", type=int, default=2048, help="number of features")
    parser.add_argument("--rounds", type=int, default=5, help="number of counted rounds")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch and scipy")
    parser.add_argument("--measure", choices=[*sorted(SCORES), "streaming"], help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    # scipy reads these when it is imported.
    os.environ["OMP_NUM_THREADS"] = str(given.threads)
    os.environ["OPENBLAS_NUM_THREADS"] = str(given.threads)
    if given.measure == "streaming":
        measure_streaming(given.count)
        return
    if given.measure:
        measure_score(given.measure, given.count, given.features)
        return
    if not given.parts or "frechet" in given.parts:
        bench_frechet(given.features, given.rounds)
    if not given.parts or "extraction" in given.parts:
        bench_extraction(given.rounds)
    if not given.parts or "streaming" in given.parts:
        bench_streaming()
    if not given.parts or "memory" in given.parts:
        bench_memory(min(given.features, 256))


def time_call(action: Callable[[], Any]) -> tuple[float, Any]:
    """Return (seconds, result) of a call."""
    started = time.perf_counter()
    value = action()
    return time.perf_counter() - started, value


def peak_memory() -> int:
    """Return the largest memory of this process so far, in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def run_measurement(arguments: list[str]) -> str:
    """Run this script in a new process and return what it prints."""
    command = [sys.executable, __file__, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


# Frechet distance


def bench_frechet(num_features: int, rounds: int) -> None:
    """Compare the Frechet distance with the one by sqrtm, on four kinds of covariances."""
    n = num_features
    # Samples of the first set, samples of the second set, decades of the spectrum
    cases = {
        "full rank": (2 * n, 2 * n, 0.5),
        "full rank, wide spectrum": (4 * n, 4 * n, 3.0),
        "one of half rank": (n // 2, 2 * n, 0.5),
        "both of half rank": (n // 2, n // 2, 0.5),
    }
    threads = torch.get_num_threads()
    print(f"Frechet distance, {num_features} features, {threads} thread(s), {rounds} rounds")
    for name, (num_first, num_second, decades) in cases.items():
        first = draw_statistics(num_first, num_features, decades, seed=0)
        second = draw_statistics(num_second, num_features, decades, seed=1)
        compare_distances(name, first, second, rounds)


def compare_distances(
    name: str, first: FeatureStatistics, second: FeatureStatistics, rounds: int
) -> None:
    """Let both distances take turns, and print their times and their relative difference."""
    ours: list[float] = []
    theirs: list[float] = []
    largest_difference = 0.0
    frechet_distance(first, second)  # the first call sets up the library
    for _ in range(rounds):
        seconds, value = time_call(lambda: frechet_distance(first, second))
        ours.append(seconds)
        seconds, expected = time_call(lambda: distance_by_sqrtm(first, second))
        theirs.append(seconds)
        difference = abs(value - expected) / abs(expected)
        largest_difference = max(largest_difference, difference)
    ratios = [sqrtm / own for own, sqrtm in zip(ours, theirs, strict=True)]
    low = middle = high = ratios[0]
    if len(ratios) > 1:
        low, middle, high = statistics.quantiles(ratios, n=4)
    print(
        f"  {name:26s} sqrtm / ours {middle:5.1f} ({low:.1f} to {high:.1f})   "
        f"ours {statistics.median(ours):.2f} s   sqrtm {statistics.median(theirs):.2f} s   "
        f"relative difference {largest_difference:.0e}",
        flush=True,
    )


def draw_statistics(
    num_samples: int, num_features: int, decades: float, seed: int
) -> FeatureStatistics:
    """Return statistics of normal features with a given spectrum.

    Args:
        num_samples: Number of samples.
        num_features: Number of features.
        decades: Standard deviations fall over so many powers of ten. Their directions are random
            and the same for all seeds.
        seed: Seed of the samples. The mean depends on it too.
    """
    generator = torch.Generator().manual_seed(seed)
    of_directions = torch.Generator().manual_seed(99)
    directions = torch.randn(num_features, num_features, generator=of_directions)
    directions = directions / num_features**0.5
    scales = torch.logspace(0, -decades, num_features)
    found = FeatureStatistics(num_features)
    for start in range(0, num_samples, 1024):
        rows = torch.randn(min(1024, num_samples - start), num_features, generator=generator)
        found.update((rows * scales) @ directions + 0.01 * seed)
    return found


def distance_by_sqrtm(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """Return the Frechet distance with scipy's square root of a matrix."""
    import scipy.linalg

    root = scipy.linalg.sqrtm((first.cov @ second.cov).numpy())
    means = (first.mean - second.mean).square().sum()
    without_root = float(means + first.cov.trace() + second.cov.trace())
    return without_root - 2 * float(np.trace(root).real)


# Extraction


def bench_extraction(rounds: int, num: int = 64) -> None:
    """Compare the extraction of features from PNG files with the forward of the network."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        inception = random_inception(folder / "weights.pth")
        write_pictures(folder / "images", num, side=256)
        prepared = torch.randn(num, 3, 299, 299)
        ratios: list[float] = []
        for number in range(rounds + 1):
            extraction = make_extraction(folder / "images", inception, folder / str(number))
            forward, whole = time_extraction(extraction, inception, prepared, number % 2 == 1)
            if number > 0:  # the first round warms up
                ratios.append(forward / whole)
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(
            f"Extraction of {num} PNG files of 256 x 256, Inception, {torch.get_num_threads()} "
            f"thread(s): {middle:.3f} of the forward's speed ({low:.3f} to {high:.3f}), "
            f"forward {forward / num * 1000:.0f} ms an image"
        )


def random_inception(file: Path) -> Inception:
    """Return an Inception with random weights, which are written to `file`."""
    torch.manual_seed(0)
    torch.save(InceptionNetwork().state_dict(), file)
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    return Inception(path=str(file), sha256=sha256, batch_size=32)


def make_extraction(images: Path, inception: Inception, folder: Path) -> Extraction:
    """Return the extraction of the features of a folder of images, in blocks of 32."""
    source = DatasetImages(ImageFolder(str(images)))
    source.block_size = 32
    return Extraction(source, inception, ["features"], folder, "")


def time_extraction(
    extraction: Extraction, inception: Inception, prepared: Tensor, forward_first: bool
) -> tuple[float, float]:
    """Return the seconds of (the forward, the whole extraction), in the given order."""
    with contextlib.redirect_stdout(io.StringIO()):
        if forward_first:
            forward, _ = time_call(lambda: compute_features(inception.network, prepared))
            whole, _ = time_call(lambda: len(extraction()))
        else:
            whole, _ = time_call(lambda: len(extraction()))
            forward, _ = time_call(lambda: compute_features(inception.network, prepared))
    return forward, whole


@torch.no_grad()
def compute_features(network: nn.Module, images: Tensor) -> float:
    """Run the network in batches of 32, and return the sum of all features."""
    return float(sum(network(part)["features"].sum() for part in images.split(32)))


def write_pictures(folder: Path, num: int, side: int) -> None:
    """Write PNG files of smooth noise."""
    folder.mkdir()
    noise = np.random.default_rng(0)
    for i in range(num):
        coarse = noise.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        image = PIL.Image.fromarray(coarse).resize((side, side))
        image.save(folder / f"{i:06d}.png", compress_level=1)


# Memory of a whole evaluation


class SmallConvolutions(FeatureExtractor):
    """A small convolutional network with random weights, as an extractor."""

    name = "small"

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.network = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(16, 64, 3, 2, 1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )

    @property
    def widths(self) -> Mapping[str, int]:
        """The width of the features."""
        return {"features": 64}

    def protocol(self) -> dict[str, Any]:
        """Return the name."""
        return {"type": self.name}

    @torch.no_grad()
    def extract(
        self, samples: Tensor, outputs: Collection[str] = ("features",)
    ) -> dict[str, Tensor]:
        """Return the features of images [N, 3, H, W] uint8."""
        return {"features": self.network(samples.float() / 127.5 - 1)}


def bench_streaming(counts: tuple[int, ...] = (2_500, 10_000, 40_000)) -> None:
    """Print the memory of an evaluation for several numbers of images."""
    print("Memory of an evaluation of two folders of 32 x 32 PNG files, 64 features")
    for count in counts:
        printed = run_measurement(["--measure", "streaming", "--count", str(count)])
        print(f"  {count:6d} images  {printed.splitlines()[-1].strip()}")


def measure_streaming(count: int) -> None:
    """Evaluate two folders in this process, and print its largest memory."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_pictures(folder / "images", count, side=32)
        generated = DatasetImages(ImageFolder(str(folder / "images")))
        reference = DatasetImages(ImageFolder(str(folder / "images")))
        metrics = [FrechetDistance(splits=2)]
        evaluator = Evaluator(
            reference, None, SmallConvolutions(), metrics, folder / "rows", seed=0
        )
        before = peak_memory()
        seconds, _ = time_call(lambda: evaluator(generated).num_samples)
        most = peak_memory()
        print(
            f"{most / 1024:5.0f} MiB at most, {(most - before) / 1024:4.0f} MiB more than before "
            f"it, {2 * count / seconds:.0f} images/s"
        )


# Memory of single scores


def bench_memory(num_features: int) -> None:
    """Print the memory of each score for several numbers of images."""
    print(f"Memory beside the features, {num_features} features, in a file")
    for score in SCORES:
        for count in (2_000, 4_000, 8_000):
            sizes = ["--count", str(count), "--features", str(num_features)]
            printed = run_measurement(["--measure", score, *sizes])
            print(f"  {score:18s} {count:6d} images  {printed.strip()}")


def measure_score(score: str, count: int, num_features: int) -> None:
    """Print by how much one call raises the largest memory of this process."""
    compute = SCORES[score]
    with tempfile.TemporaryDirectory() as place:
        first = write_rows(Path(place) / "0", count, num_features, seed=0)
        second = write_rows(Path(place) / "1", count, num_features, seed=1)
        # A small call loads what the score needs.
        compute(torch.randn(100, num_features), torch.randn(100, num_features))
        before = peak_memory()
        seconds, _ = time_call(lambda: compute(first, second))
        print(f"{(peak_memory() - before) / 1024:5.0f} MiB  {seconds:6.1f} s")


def write_rows(file: Path, count: int, num_features: int, seed: int) -> RowsInBlocks:
    """Write normal features to a file, and map its blocks."""
    generator = torch.Generator().manual_seed(seed)
    with file.open("wb") as stream:
        for start in range(0, count, 500):
            part: Tensor = torch.randn(min(500, count - start), num_features, generator=generator)
            part.numpy().tofile(stream)
    mapped = np.memmap(file, "float32", "r", shape=(count, num_features))
    blocks = [mapped[start : start + 500] for start in range(0, count, 500)]
    return RowsInBlocks(blocks, num_features, 500)


if __name__ == "__main__":
    main()
