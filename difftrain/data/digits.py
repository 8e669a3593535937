"""The 1,797 handwritten digits of 8 x 8 pixels that scikit-learn brings along: data that needs no network.

Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository (1998). They are split
once and for all, so that a classifier that judges samples, and the images they are compared to, were not trained on.
"""

import gzip
import importlib.util
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import PIL.Image

from difftrain.data.items import Item
from difftrain.registry import DATASETS, InputError
from difftrain.rng import key

Digit = Literal[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
PARTS = {"train": 0.5, "classifier": 0.25, "held_out": 0.25}  # fractions of each class


@DATASETS.register("digits")
class Digits:
    """Grey images of 8 x 8, classes "0" to "9". train: for the diffusion model; classifier: for the network whose features
    judge it; held_out: what samples are compared to. The parts are disjoint and cover the set; each has every class in
    the same proportion. classes: only these digits, their ids stay."""

    def __init__(self, part: Literal["train", "classifier", "held_out", "all"] = "train", classes: list[Digit] | None = None):
        images, labels = read()
        self.rows = np.arange(len(labels)) if part == "all" else rows_of(part, labels)
        if classes is not None:
            if not classes or len(set(classes)) < len(classes):
                raise InputError(f"digits: classes {classes}: expected some digits, each once, such as [7, 8, 9].")
            self.rows = self.rows[np.isin(labels[self.rows], classes)]
        self.images, self.labels = images[self.rows], labels[self.rows]
        self.class_names: list[str] | None = [str(digit) for digit in get_args(Digit)]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Item:
        return Item(PIL.Image.fromarray(self.images[i]), int(self.labels[i]), name=f"digit {self.rows[i]}")


def read() -> tuple[np.ndarray, np.ndarray]:
    """Images [1797, 8, 8] uint8 (0..16 in the file, stretched to 0..255) and labels [1797]."""
    package = importlib.util.find_spec("sklearn")  # found, not imported: that would take longer than all the rest
    assert package is not None
    assert package.origin is not None
    with gzip.open(Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz") as file:
        table = np.loadtxt(file, delimiter=",")
    images = np.round(table[:, :-1] * 255 / 16).astype(np.uint8)
    return images.reshape(-1, 8, 8), table[:, -1].astype(int)


def rows_of(part: str, labels: np.ndarray) -> np.ndarray:
    """Ascending rows [n] of one part. Within a class, rows are dealt in the order of their hash."""
    rows: list[int] = []
    start = sum(list(PARTS.values())[: list(PARTS).index(part)])
    for digit in np.unique(labels):
        dealt = sorted(np.flatnonzero(labels == digit).tolist(), key=lambda row: key(0, 0, row, "split of the digits"))
        rows += dealt[round(start * len(dealt)) : round((start + PARTS[part]) * len(dealt))]
    return np.sort(rows)
