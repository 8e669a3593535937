"""What scores cost: python scripts/bench/evaluate.py [frechet] [extraction] [streaming] [memory] [--features 2048] [--rounds 5]

frechet: our Frechet distance against the one with scipy.linalg.sqrtm, in turns in one process with equal threads, on covariances of full
rank, of full rank with a wide spectrum, and of fewer samples than features; each round's ratio, medians and quartiles, and how far the two
numbers are apart. extraction: the Inception over a folder of PNG files, decoded, resized, looked at and written down, against its forward
on prepared tensors, in turns; a speed of 1 is the forward's. streaming: the most memory of a whole evaluation of two folders with a small
extractor, for more and more images, each in a process of its own. memory: the most that the kernel distance and precision and recall hold
beside the features, in the same way, with the features in a file.
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
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from torch import Tensor

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
from difftrain.evaluation.rows import RowsInFile
from difftrain.evaluation.sources import DatasetImages

SCORES: dict[str, Callable] = {
    "kernel_distance": kernel_distance,
    "precision_recall": precision_recall,
}


def drawn(num_samples: int, num_features: int, decades: float, seed: int) -> FeatureStatistics:
    """Statistics of normal features whose standard deviations fall over so many decades, in random directions that two seeds share."""
    generator = torch.Generator().manual_seed(seed)
    turn = (
        torch.randn(num_features, num_features, generator=torch.Generator().manual_seed(99))
        / num_features**0.5
    )
    statistics = FeatureStatistics(num_features)
    for start in range(0, num_samples, 1024):
        rows = torch.randn(min(1024, num_samples - start), num_features, generator=generator)
        statistics.update((rows * torch.logspace(0, -decades, num_features)) @ turn + 0.01 * seed)
    return statistics


def by_sqrtm(a: FeatureStatistics, b: FeatureStatistics) -> float:
    import scipy.linalg

    root = scipy.linalg.sqrtm((a.cov @ b.cov).numpy())
    return float((a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace()) - 2 * float(
        np.trace(root).real
    )


def timed(action: Callable[[], float]) -> tuple[float, float]:
    start = time.perf_counter()
    value = action()
    return time.perf_counter() - start, value


def bench_frechet(num_features: int, rounds: int) -> None:
    cases = {
        "full rank": (2 * num_features, 2 * num_features, 0.5),
        "full rank, wide spectrum": (4 * num_features, 4 * num_features, 3.0),
        "one of half rank": (num_features // 2, 2 * num_features, 0.5),
        "both of half rank": (num_features // 2, num_features // 2, 0.5),
    }
    print(
        f"Frechet distance, {num_features} features, {torch.get_num_threads()} thread(s), {rounds} rounds"
    )
    for name, (first, second, decades) in cases.items():
        a, b = drawn(first, num_features, decades, 0), drawn(second, num_features, decades, 1)
        ours, theirs, apart = [], [], 0.0
        frechet_distance(a, b)  # the first call sets up the library
        for _ in range(rounds):
            seconds, value = timed(lambda a=a, b=b: frechet_distance(a, b))
            ours.append(seconds)
            seconds, other = timed(lambda a=a, b=b: by_sqrtm(a, b))
            theirs.append(seconds)
            apart = max(apart, abs(value - other) / abs(other))
        show(name, ours, theirs, apart)


def show(name: str, ours: list[float], theirs: list[float], apart: float) -> None:
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    print(
        f"  {name:26s} sqrtm / ours {middle:5.1f} ({low:.1f} to {high:.1f})   ours {statistics.median(ours):.2f} s   "
        f"sqrtm {statistics.median(theirs):.2f} s   relative difference {apart:.0e}", flush=True,
    )  # fmt: skip


def bench_extraction(rounds: int, num: int = 64) -> None:
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        weights = Path(folder) / "weights.pth"
        torch.save(InceptionNetwork().state_dict(), weights)
        inception = Inception(
            path=str(weights),
            sha256=hashlib.sha256(weights.read_bytes()).hexdigest(),
            batch_size=32,
        )
        pictures(Path(folder) / "images", num, side=256)
        prepared = torch.randn(num, 3, 299, 299)
        ratios = []
        for number in range(rounds + 1):
            source = DatasetImages(ImageFolder(str(Path(folder) / "images")))
            source.block_size = 32
            extraction = Extraction(source, inception, ["features"], Path(folder) / str(number), "")
            actions = [
                lambda: forward(inception.network, prepared),
                lambda extraction=extraction: len(extraction()),
            ]
            with contextlib.redirect_stdout(io.StringIO()):
                took = {
                    place: timed(actions[place])[0] for place in ((0, 1) if number % 2 else (1, 0))
                }
            if number:  # the first round warms up
                ratios.append(took[0] / took[1])
                alone = took[0]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(
            f"Extraction of {num} PNG files of 256 x 256, Inception, {torch.get_num_threads()} thread(s): {middle:.3f} of the forward's "
            f"speed ({low:.3f} to {high:.3f}), forward {alone / num * 1000:.0f} ms an image"
        )


@torch.no_grad()
def forward(network: torch.nn.Module, images: Tensor) -> float:
    return float(sum(network(part)["features"].sum() for part in images.split(32)))


def pictures(folder: Path, num: int, side: int) -> None:
    folder.mkdir()
    noise = np.random.default_rng(0)
    for i in range(num):
        rows = noise.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        PIL.Image.fromarray(rows).resize((side, side)).save(
            folder / f"{i:06d}.png", compress_level=1
        )


def bench_streaming(counts: tuple[int, ...] = (2_500, 10_000, 40_000)) -> None:
    print("Memory of an evaluation of two folders of 32 x 32 PNG files, 64 features")
    for count in counts:
        command = [sys.executable, __file__, "--measure", "streaming", "--count", str(count)]
        print(
            f"  {count:6d} images  {subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1].strip()}"
        )


class Small:
    """A small convolutional network with drawn weights, as an extractor."""

    name, gives = "small", frozenset[str]()

    def __init__(self) -> None:
        torch.manual_seed(0)
        stages = [
            torch.nn.Conv2d(3, 16, 3, 2, 1),
            torch.nn.ReLU(),
            torch.nn.Conv2d(16, 64, 3, 2, 1),
            torch.nn.ReLU(),
        ]
        self.network = torch.nn.Sequential(
            *stages, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
        )
        self.widths, self.preset = {"features": 64}, dict[str, object]()

    def protocol(self) -> dict[str, str]:
        return {"type": self.name}

    @torch.no_grad()
    def extract(self, images: Tensor, outputs: object = ()) -> dict[str, Tensor]:
        return {"features": self.network(images.float() / 127.5 - 1)}


def measure_streaming(count: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        pictures(Path(folder) / "images", count, side=32)
        generated, reference = (
            DatasetImages(ImageFolder(str(Path(folder) / "images"))) for _ in range(2)
        )
        evaluator = Evaluator(
            reference, None, Small(), [FrechetDistance(splits=2)], Path(folder) / "rows", 0
        )
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        seconds, _ = timed(lambda: evaluator(generated).num_samples)
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(
            f"{most / 1024:5.0f} MiB at most, {(most - before) / 1024:4.0f} MiB more than before it, {2 * count / seconds:.0f} images/s"
        )


def bench_memory(num_features: int) -> None:
    print(f"Memory beside the features, {num_features} features, in a file")
    for score in SCORES:
        for count in (2_000, 4_000, 8_000):
            command = [
                sys.executable,
                __file__,
                "--measure",
                score,
                "--count",
                str(count),
                "--features",
                str(num_features),
            ]
            print(
                f"  {score:18s} {count:6d} images  {subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()}"
            )


def measure(score: str, count: int, num_features: int) -> None:
    """The growth of this process's largest memory over one call. Run in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        rows = [written(Path(folder) / str(seed), count, num_features, seed) for seed in range(2)]
        SCORES[score](torch.randn(100, num_features), torch.randn(100, num_features))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        seconds, _ = timed(lambda: SCORES[score](*rows))
        print(
            f"{(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024:5.0f} MiB  {seconds:6.1f} s"
        )


def written(path: Path, count: int, num_features: int, seed: int) -> RowsInFile:
    generator = torch.Generator().manual_seed(seed)
    with path.open("wb") as file:
        for start in range(0, count, 500):
            part: Tensor = torch.randn(min(500, count - start), num_features, generator=generator)
            part.numpy().tofile(file)
    return RowsInFile(path, num_features)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "parts",
        nargs="*",
        choices=["frechet", "extraction", "streaming", "memory", []],
        help="which parts (default: all)",
    )
    parser.add_argument("--features", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--measure", choices=[*sorted(SCORES), "streaming"], help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = str(
        arguments.threads
    )  # scipy reads them when it is loaded
    if arguments.measure == "streaming":
        measure_streaming(arguments.count)
        return
    if arguments.measure:
        measure(arguments.measure, arguments.count, arguments.features)
        return
    if not arguments.parts or "frechet" in arguments.parts:
        bench_frechet(arguments.features, arguments.rounds)
    if not arguments.parts or "extraction" in arguments.parts:
        bench_extraction(arguments.rounds)
    if not arguments.parts or "streaming" in arguments.parts:
        bench_streaming()
    if not arguments.parts or "memory" in arguments.parts:
        bench_memory(min(arguments.features, 256))


if __name__ == "__main__":
    main()
