"""Moving digits: where they are, against the centre of their light; and what stays the same."""

import numpy as np
import pytest

from difftrain.core.errors import InputError
from difftrain.data.datasets.digit_clips import SPEEDS, DigitClips, bounced, canvas, path
from difftrain.data.datasets.digits import Digits
from difftrain.data.items import DATASETS

ROWS = range(0, 1797, 90)


def array(clip):
    return np.stack([np.asarray(frame) for frame in clip.frames])


def centre(pixels):
    """(y, x) of the light."""
    y, x = np.mgrid[: pixels.shape[0], : pixels.shape[1]]
    return np.array([(y * pixels).sum(), (x * pixels).sum()]) / pixels.sum()


def test_a_clip_has_the_digits_label_and_its_frames_the_canvass_size():
    clips = DATASETS.parse(
        {"type": "digit_clips", "part": "held_out", "num_frames": 5, "size": 20}, "data"
    ).build()

    assert len(clips) == len(Digits("held_out"))
    assert array(clips[7]).shape == (5, 20, 20)
    assert clips[7].label == Digits("held_out")[7].label
    assert clips.class_names == list("0123456789")
    assert clips.num_frames == 5


def test_a_clip_belongs_to_its_digit_whatever_the_part():
    train, everything = DigitClips("train"), DigitClips("all")
    row = int(train.digits.rows[3])

    assert train[3].name == everything[row].name == f"clip of digit {row}"
    assert np.array_equal(array(train[3]), array(everything[row]))
    assert not np.array_equal(array(train[3]), array(train[4]))


def test_a_longer_clip_begins_with_the_shorter_one():
    assert np.array_equal(
        array(DigitClips(num_frames=9)[0])[:4], array(DigitClips(num_frames=4)[0])
    )


@pytest.mark.parametrize("row", ROWS)
def test_the_light_moves_as_the_path_says_and_none_is_lost(row):
    """Rounding changes a pixel by half a grey level at most.

    Of some 60 lit pixels with thousands of grey levels, this moves the center by < 0.05 pixels.
    """
    frames = array(DigitClips("all", num_frames=20)[row]).astype(float)
    digit = Digits("all").images[row].astype(float)

    centres = np.array([centre(frame) for frame in frames])

    assert np.abs(centres - centre(digit) - np.array(path(row, 20, 8))).max() < 0.05
    assert np.abs(frames.sum((1, 2)) - digit.sum()).max() < 0.01 * digit.sum()


@pytest.mark.parametrize("row", ROWS)
def test_the_motion_is_straight_and_even_but_for_bounces(row):
    places = np.array(path(row, 40, 10_000))  # a room so large that most never meet a wall

    steps = np.diff(places, axis=0)
    speed = np.hypot(*steps.T)

    assert np.allclose(speed, speed[0])
    assert SPEEDS[0] <= speed[0] <= SPEEDS[1]


def test_directions_and_speeds_are_all_over_the_place():
    steps = np.array([np.subtract(*path(row, 2, 10_000)) for row in range(400)])
    angles = np.arctan2(*steps.T)

    assert (
        np.abs(np.histogram(angles, bins=4, range=(-np.pi, np.pi))[0] - 100).max() < 36
    )  # 4 standard deviations
    assert np.hypot(*steps.T).mean() == pytest.approx(
        np.mean(SPEEDS), abs=4 * np.ptp(SPEEDS) / np.sqrt(12 * 400)
    )


@pytest.mark.parametrize("velocity", [0.75, -1.3])
def test_a_bounce_is_what_a_ball_between_walls_does(velocity):
    room, place, now = 3, 1.25, velocity
    for k in range(1, 30):
        place += now
        if not 0 <= place <= room:
            wall = 0 if place < 0 else room
            place, now = 2 * wall - place, -now
        assert bounced(1.25 + k * velocity, room) == pytest.approx(place, abs=1e-9)


def test_between_pixels_the_digit_is_the_mean_of_its_neighbours():
    digit = Digits("all").images[0]
    corners = [canvas(digit, y, x, 12).astype(float) for y in (1, 2) for x in (3, 4)]

    assert np.array_equal(canvas(digit, 1, 3, 12)[1:9, 3:11], digit)
    assert np.abs(canvas(digit, 1.5, 3.5, 12) - np.mean(corners, axis=0)).max() <= 0.5


@pytest.mark.parametrize("far", [0.0, 4.0])
def test_a_digit_at_the_wall_is_whole(far):
    digit = Digits("all").images[0]

    assert canvas(digit, far, far, 12).sum() == digit.sum()


def test_a_canvas_without_room_to_move_is_an_error():
    with pytest.raises(
        InputError,
        match=r"digit_clips: on a canvas of size 8 a digit of 8x8 cannot move. Write size: 16.",
    ):
        DigitClips(size=8)
