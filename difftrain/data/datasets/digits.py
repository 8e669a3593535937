"""The 1,797 handwritten digits of 8 x 8 pixels, which come with the package and need no network.

They are split once and for all: the classifier that judges samples, and the images that samples are
compared to, have no part in the training data. digits.LICENSE.txt states source and licences.
"""

import gzip
from collections import Counter
from importlib import resources
from typing import Literal, get_args

import numpy as np
import PIL.Image

from difftrain.core.errors import InputError
from difftrain.core.rng import key
from difftrain.data.items import DATASETS, Item, MapDataset

Digit = Literal[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
PARTS = {"train": 0.5, "classifier": 0.25, "held_out": 0.25}  # fractions of each class


@DATASETS.register("digits")
class Digits(MapDataset):
    """Handwritten digits: grey images of 8 x 8 pixels, with the classes "0" to "9".

    The parts are disjoint and cover the set; each has every class in the same proportion.

    Args:
        part: "train" is for the diffusion model, "classifier" for the network whose features judge
            it, "held_out" is what samples are compared to.
        classes: Only these digits; their class ids stay the same.

    Reference:
        Alpaydin and Kaynak 1998, "Optical Recognition of Handwritten Digits", UCI Machine Learning
        Repository.
    """

    def __init__(
        self,
        part: Literal["train", "classifier", "held_out", "all"] = "train",
        classes: list[Digit] | None = None,
    ):
        images, labels = read()
        self.rows = np.arange(len(labels)) if part == "all" else rows_of(part, labels)
        if classes is not None:
            if not classes or len(set(classes)) < len(classes):
                raise InputError(
                    f"digits: classes {classes}: expected some digits, each once, such as "
                    "[7, 8, 9]."
                )
            self.rows = self.rows[np.isin(labels[self.rows], classes)]
        self.images, self.labels = images[self.rows], labels[self.rows]
        self.class_names = [str(digit) for digit in get_args(Digit)]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Item:
        image = PIL.Image.fromarray(self.images[i])
        return Item(image, int(self.labels[i]), name=self.name_of(i))

    def label_counts(self) -> Counter[int]:
        """Count the digits by class id."""
        return Counter(self.labels.tolist())

    def name_of(self, i: int) -> str:
        """Return "digit 17" for row 17 of the whole set."""
        return f"digit {self.rows[i]}"


def read() -> tuple[np.ndarray, np.ndarray]:
    """Read the whole set.

    Returns:
        Images [1797, 8, 8] uint8, stretched from 0..16 in the file to 0..255, and labels [1797].
    """
    file = resources.files("difftrain.data.datasets") / "digits.csv.gz"
    with file.open("rb") as stored, gzip.open(stored) as lines:
        table = np.loadtxt(lines, delimiter=",")
    images = np.round(table[:, :-1] * 255 / 16).astype(np.uint8)
    return images.reshape(-1, 8, 8), table[:, -1].astype(int)


def rows_of(part: str, labels: np.ndarray) -> np.ndarray:
    """Return the rows of one part, ascending.

    Each part takes a range of the rows of every class, in the order of their hash.

    Args:
        part: A key of `PARTS`.
        labels: The labels [1797] of the whole set.
    """
    rows: list[int] = []
    start = sum(list(PARTS.values())[: list(PARTS).index(part)])
    for digit in np.unique(labels):
        of_class = np.flatnonzero(labels == digit).tolist()
        shuffled = sorted(of_class, key=lambda row: key(0, 0, row, "split of the digits"))
        first = round(start * len(shuffled))
        end = round((start + PARTS[part]) * len(shuffled))
        rows += shuffled[first:end]
    return np.sort(rows)
