"""What a LoRA adds to a base that has never seen three of the digits: a classifier reads samples of the base and of the LoRA.

    python scripts/digits_lora.py [--runs runs] [--num 1000] [--strict]

Trains recipes/digits_lora_base.yaml and recipes/digits_lora.yaml where they are not trained yet (four minutes), draws `num` samples at
LoRA scale 0, 0.5 and 1, and prints for each digit the share that the digits classifier reads as what was asked for. Scale 0 is compared
bit for bit with the base run. --strict: exit code 1 where one of the new digits comes below 85 %, one of the known ones below 80 %, or
scale 0 differs.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

from difftrain.data.transform import Transform
from difftrain.evaluation.slots import FEATURES
from difftrain.generation.generator import blocks
from difftrain.models.lora.files import set_scales
from difftrain.run.session import train
from difftrain.run.trained import TrainedRun

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
NEW, KNOWN = (7, 8, 9), (0, 1, 2, 3, 4, 5, 6)


def trained(name: str, runs: Path, *overrides: str) -> Path:
    """The folder of the run, trained if it is not."""
    folder = runs / name
    code = train(str(RECIPES / f"{name}.yaml"), [f"output={folder}", *overrides])
    if code:
        sys.exit(code)
    return folder


@torch.no_grad()
def samples(folder: Path, num: int, scale: float | None) -> tuple[Tensor, Tensor]:
    """Images [num, 1, 8, 8] uint8 and the labels [num] asked for, classes in turn."""
    run = TrainedRun(folder)
    denoiser, _ = run.denoiser(run.chosen_step(None), True, torch.device("cpu"))
    if scale is not None:
        set_scales(denoiser, {"default": scale})
    generator = run.model.generator
    images = [
        generator(denoiser, indices, torch.device("cpu"))
        for indices in blocks(num, generator.sampling.block_size)
    ]
    return torch.cat(images), torch.arange(num) % 10


def agreement(images: Tensor, labels: Tensor, classifier: object) -> list[float]:
    """By digit, the share that the classifier reads as what was asked for."""
    read = classifier.extract(images, ("logits",))["logits"].argmax(1)  # type: ignore[attr-defined]
    return [float((read[labels == digit] == digit).double().mean()) for digit in range(10)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--num", type=int, default=1000)
    parser.add_argument("--strict", action="store_true")
    given = parser.parse_args()
    base = trained("digits_lora_base", given.runs)
    lora = trained("digits_lora", given.runs, f"model.path={base / 'pipeline'}")
    shape = (1, 8, 8)
    classifier = FEATURES.parse("digits_classifier", "features").build(
        cache=given.runs / "features",
        shape=shape,
        transform=Transform(8, 1, "none"),
        device=torch.device("cpu"),
    )
    without, labels = samples(base, given.num, None)
    rows = {"base": agreement(without, labels, classifier)}
    same = False
    for scale in (0.0, 0.5, 1.0):
        images, _ = samples(lora, given.num, scale)
        same = same or (scale == 0 and torch.equal(images, without))
        rows[f"LoRA at {scale:g}"] = agreement(images, labels, classifier)
    print(
        f"{'read as asked, %':<18}"
        + "".join(f"{digit:>6}" for digit in range(10))
        + f"{'0-6':>8}{'7-9':>6}"
    )
    for name, shares in rows.items():
        known, new = (sum(shares[d] for d in digits) / len(digits) for digits in (KNOWN, NEW))
        print(
            f"{name:<18}"
            + "".join(f"{100 * share:6.0f}" for share in shares)
            + f"{100 * known:8.1f}{100 * new:6.1f}"
        )
    print(f"scale 0 {'is the base, bit for bit' if same else 'DIFFERS from the base'}")
    final = rows["LoRA at 1"]
    good = same and min(final[d] for d in NEW) >= 0.85 and min(final[d] for d in KNOWN) >= 0.8
    return 1 if given.strict and not good else 0


if __name__ == "__main__":
    sys.exit(main())
