"""Teaches new digits to a small model with a LoRA, and classifies samples of both.

python scripts/digits_lora.py [--runs runs] [--num 1000] [--strict]

The base model has seen the digits 0 to 6, and the LoRA is trained on 7, 8 and 9. The script trains
recipes/digits_lora_base.yaml and recipes/digits_lora.yaml, unless they are trained already. This
takes four minutes. It generates `num` samples at LoRA scale 0, 0.5 and 1. For each digit it prints
the share of samples that the digits classifier recognizes as the digit asked for. Samples at scale
0 are compared bit for bit with those of the base model.

With --strict the exit code is 1 if the share of a new digit is below 85 %, if that of an old digit
is below 80 %, or if scale 0 differs from the base.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

from difftrain.data.transform import Transform
from difftrain.evaluation.slots import FEATURES, FeatureExtractor
from difftrain.generation.generator import blocks
from difftrain.models.lora.files import set_scales
from difftrain.run.session import train
from difftrain.run.trained import TrainedRun

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
KNOWN, NEW = (0, 1, 2, 3, 4, 5, 6), (7, 8, 9)
SCALES = (0.0, 0.5, 1.0)
CPU = torch.device("cpu")


def train_recipe(name: str, runs: Path, *overrides: str) -> Path:
    """Train recipes/`name`.yaml, unless it is trained already, and return the run folder."""
    folder = runs / name
    code = train(str(RECIPES / f"{name}.yaml"), [f"output={folder}", *overrides])
    if code:
        sys.exit(code)
    return folder


def load_classifier(runs: Path) -> FeatureExtractor:
    """Return the digits classifier, which is trained at the first call."""
    block = FEATURES.parse("digits_classifier", "features")
    classifier: FeatureExtractor = block.build(
        cache=runs / "features",
        shape=(1, 8, 8),
        transform=Transform(8, 1, "none"),
        device=CPU,
    )
    return classifier


@torch.no_grad()
def generate_samples(folder: Path, num: int, scale: float | None) -> tuple[Tensor, Tensor]:
    """Return samples of a run, with the classes in turn.

    Args:
        folder: The run folder.
        num: Number of samples.
        scale: Scale of the run's LoRA; None for a run without one.

    Returns:
        Images [num, 1, 8, 8] uint8, and the digits asked for [num].
    """
    run = TrainedRun(folder)
    denoiser, _ = run.denoiser(run.chosen_step(None), True, CPU)
    if scale is not None:
        set_scales(denoiser, {"default": scale})
    generator = run.model.generator
    images: list[Tensor] = []
    for indices in blocks(num, generator.sampling.block_size):
        images.append(generator(denoiser, indices, CPU))
    return torch.cat(images), torch.arange(num) % 10


def agreement(images: Tensor, labels: Tensor, classifier: FeatureExtractor) -> list[float]:
    """Return for each digit the share of images that are classified as asked for."""
    classes = classifier.extract(images, ("logits",))["logits"].argmax(1)
    shares: list[float] = []
    for digit in range(10):
        is_right = classes[labels == digit] == digit
        shares.append(float(is_right.double().mean()))
    return shares


def mean_share(shares: list[float], digits: tuple[int, ...]) -> float:
    """Return the mean share of some digits."""
    return sum(shares[digit] for digit in digits) / len(digits)


def print_table(rows: dict[str, list[float]]) -> None:
    """Print the shares in percent."""
    digits = "".join(f"{digit:>6}" for digit in range(10))
    print(f"{'as asked for, %':<18}{digits}{'0-6':>8}{'7-9':>6}")
    for name, shares in rows.items():
        percentages = "".join(f"{100 * share:6.0f}" for share in shares)
        known, new = mean_share(shares, KNOWN), mean_share(shares, NEW)
        print(f"{name:<18}{percentages}{100 * known:8.1f}{100 * new:6.1f}")


def main() -> int:
    """Train what is missing, print the table, and return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs")
    parser.add_argument("--num", type=int, default=1000, help="number of samples at each scale")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a check fails")
    given = parser.parse_args()
    # Training
    base = train_recipe("digits_lora_base", given.runs)
    lora = train_recipe("digits_lora", given.runs, f"model.path={base / 'pipeline'}")
    classifier = load_classifier(given.runs)
    # Samples
    without_lora, labels = generate_samples(base, given.num, None)
    rows = {"base": agreement(without_lora, labels, classifier)}
    is_same = False
    for scale in SCALES:
        images, _ = generate_samples(lora, given.num, scale)
        if scale == 0:
            is_same = torch.equal(images, without_lora)
        rows[f"LoRA at {scale:g}"] = agreement(images, labels, classifier)
    # Results
    print_table(rows)
    print(f"scale 0 {'equals the base, bit for bit' if is_same else 'DIFFERS from the base'}")
    final = rows["LoRA at 1"]
    lowest_new = min(final[digit] for digit in NEW)
    lowest_known = min(final[digit] for digit in KNOWN)
    is_good = is_same and lowest_new >= 0.85 and lowest_known >= 0.8
    return 1 if given.strict and not is_good else 0


if __name__ == "__main__":
    sys.exit(main())
