"""Clips of the 8 x 8 digits in motion: videos that need neither network nor files nor PyAV."""

import math
from collections import Counter
from typing import Literal

import numpy as np
import PIL.Image

from difftrain.core.errors import InputError
from difftrain.core.registry import PositiveInt
from difftrain.core.rng import Rng
from difftrain.data.datasets.digits import Digits
from difftrain.data.items import DATASETS, Clip, MapDataset

DIGIT = 8  # the side of a digit
SPEEDS = (0.25, 1.0)  # pixels a frame


@DATASETS.register("digit_clips")
class DigitClips(MapDataset):
    """Moving digits: grey clips in which a digit crosses a black canvas and bounces off its edges.

    Place, direction and speed belong to the digit, so a clip is the same in every part, run and
    process. The motion is straight and smooth, as places lie between pixels. The classes are "0" to
    "9".

    Args:
        part: The part of `digits` of which each digit is one clip.
        num_frames: Frames of each clip.
        size: Side of the canvas, in pixels; more than 8.
    """

    def __init__(
        self,
        part: Literal["train", "classifier", "held_out", "all"] = "train",
        num_frames: PositiveInt = 8,
        size: PositiveInt = 16,
    ):
        if size <= DIGIT:
            raise InputError(
                f"digit_clips: on a canvas of size {size} a digit of {DIGIT}x{DIGIT} cannot move. "
                "Write size: 16."
            )
        self.digits = Digits(part)
        self.num_frames = num_frames
        self.side = size
        self.class_names = self.digits.class_names

    def __len__(self) -> int:
        return len(self.digits)

    def __getitem__(self, i: int) -> Clip:
        assert self.num_frames is not None
        corners = path(int(self.digits.rows[i]), self.num_frames, self.side - DIGIT)
        canvases = [canvas(self.digits.images[i], top, left, self.side) for top, left in corners]
        frames = [PIL.Image.fromarray(pixels) for pixels in canvases]
        return Clip(frames, int(self.digits.labels[i]), name=self.name_of(i))

    def label_counts(self) -> Counter[int]:
        """Count the clips by class id."""
        return self.digits.label_counts()

    def name_of(self, i: int) -> str:
        """Return "clip of digit 17" for row 17 of the whole set of digits."""
        return f"clip of {self.digits.name_of(i)}"


def path(row: int, num_frames: int, room: int) -> list[tuple[float, float]]:
    """Return (top, left) of the digit in each frame.

    Args:
        row: The digit's row, of which the path is a function.
        num_frames: How many frames.
        room: The largest top and left, in pixels.
    """
    draws = Rng(0, samples=[row]).uniform("digit clips", (4,))[0].tolist()
    top, left = draws[0] * room, draws[1] * room
    angle = 2 * math.pi * draws[2]
    speed = SPEEDS[0] + draws[3] * (SPEEDS[1] - SPEEDS[0])
    down, right = speed * math.sin(angle), speed * math.cos(angle)
    return [
        (bounced(top + k * down, room), bounced(left + k * right, room)) for k in range(num_frames)
    ]


def bounced(place: float, room: int) -> float:
    """Return a place on a line, reflected into [0, room] by walls at both ends."""
    return room - abs(room - place % (2 * room))


def canvas(digit: np.ndarray, top: float, left: float, size: int) -> np.ndarray:
    """Paint a digit on black at a place between pixels.

    Each pixel of the digit is shared out, by area, to the four pixels that it covers.

    Args:
        digit: [8, 8] uint8.
        top: The digit's upper edge, 0 to size - 8.
        left: The digit's left edge, 0 to size - 8.
        size: Side of the canvas.

    Returns:
        The canvas [size, size] uint8.
    """
    # One pixel more than is seen, for the share 0 of a digit that touches the far wall.
    light = np.zeros((size + 1, size + 1))
    row, column = int(top), int(left)
    for down, share_down in enumerate((1 - top % 1, top % 1)):
        for right, share_right in enumerate((1 - left % 1, left % 1)):
            covered = light[row + down :, column + right :][:DIGIT, :DIGIT]
            covered += share_down * share_right * digit
    return np.rint(light[:size, :size]).astype(np.uint8)
