"""Clips of the 8 x 8 digits in motion: videos for a laptop, that need neither network nor files nor PyAV."""

import math
from typing import Literal

import numpy as np
import PIL.Image

from difftrain.data.digits import Digits
from difftrain.data.items import Clip
from difftrain.registry import DATASETS, InputError, PositiveInt
from difftrain.rng import Rng

DIGIT = 8  # the side of a digit
SPEEDS = (0.25, 1.0)  # pixels a frame


@DATASETS.register("digit_clips")
class DigitClips:
    """Each digit of a part of the digits as one clip: it crosses a black canvas of `size` x `size` in a straight line and bounces off its
    edges.

    Place, direction and speed are keyed by the digit, so a clip is the same in every part, run and process; places lie between
    pixels, so that the motion is smooth. Grey; classes "0" to "9".
    """

    def __init__(
        self, part: Literal["train", "classifier", "held_out", "all"] = "train", num_frames: PositiveInt = 8, size: PositiveInt = 16
    ):
        if size <= DIGIT:
            raise InputError(f"digit_clips: on a canvas of size {size} a digit of {DIGIT}x{DIGIT} cannot move. Write size: 16.")
        self.digits, self.num_frames, self.size = Digits(part), num_frames, size
        self.class_names: list[str] | None = self.digits.class_names

    def __len__(self) -> int:
        return len(self.digits)

    def __getitem__(self, i: int) -> Clip:
        row = int(self.digits.rows[i])
        canvases = [canvas(self.digits.images[i], top, left, self.size) for top, left in path(row, self.num_frames, self.size - DIGIT)]
        return Clip([PIL.Image.fromarray(pixels) for pixels in canvases], int(self.digits.labels[i]), name=f"clip of digit {row}")


def path(row: int, num_frames: int, room: int) -> list[tuple[float, float]]:
    """(top, left) of the digit in each frame, within 0 and `room`."""
    draws = Rng(0, samples=[row]).uniform("digit clips", (4,))[0].tolist()
    top, left, angle, speed = draws[0] * room, draws[1] * room, 2 * math.pi * draws[2], SPEEDS[0] + draws[3] * (SPEEDS[1] - SPEEDS[0])
    down, right = speed * math.sin(angle), speed * math.cos(angle)
    return [(bounced(top + k * down, room), bounced(left + k * right, room)) for k in range(num_frames)]


def bounced(place: float, room: int) -> float:
    """`place` thrown back into [0, room] by walls at both ends."""
    return room - abs(room - place % (2 * room))


def canvas(digit: np.ndarray, top: float, left: float, size: int) -> np.ndarray:
    """The digit on black, [size, size] uint8, its corner at a place between pixels: each of its pixels is shared out to four by area."""
    light = np.zeros((size + 1, size + 1))  # one more than is seen, for the share 0 of a digit that touches the far wall
    row, column = int(top), int(left)
    for down, share_down in enumerate((1 - top % 1, top % 1)):
        for right, share_right in enumerate((1 - left % 1, left % 1)):
            light[row + down :, column + right :][:DIGIT, :DIGIT] += share_down * share_right * digit
    return np.rint(light[:size, :size]).astype(np.uint8)
