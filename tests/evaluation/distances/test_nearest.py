"""The nearest training image, against every distance taken by hand."""

import pytest
import torch
import torch.nn.functional as F

from difftrain.core.errors import InputError
from difftrain.evaluation.distances import nearest as memorization
from difftrain.evaluation.distances.nearest import NearestTraining


def images(num: int, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randint(
        0, 256, (num, *shape), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )


def by_hand(generated: torch.Tensor, training: torch.Tensor) -> torch.Tensor:
    return torch.cdist(
        generated.flatten(1).double() / 255,
        training.flatten(1).double() / 255,
        compute_mode="donot_use_mm_for_euclid_dist",
    )


@pytest.mark.parametrize(("chunk", "pixels"), [(7, 1024), (1000, 1024), (1000, 50)])
def test_distance_and_index_are_those_of_all_pairs(monkeypatch, chunk, pixels):
    monkeypatch.setattr(memorization, "CHUNK", chunk)
    monkeypatch.setattr(memorization, "PIXELS", pixels)
    training, generated = images(50, (3, 9, 7), 0), images(20, (3, 9, 7), 1)

    found = NearestTraining([training])(generated)

    expected = by_hand(generated, training).min(dim=1)
    torch.testing.assert_close(found[:, 0], expected.values, rtol=1e-12, atol=0)
    assert found[:, 1].long().tolist() == expected.indices.tolist()


def test_a_copy_is_at_distance_zero_and_a_changed_pixel_is_not():
    training = images(3000, (3, 32, 32), 2)
    copies = training[[17, 2999, 0]].clone()
    copies[2, 0, 0, 0] ^= 1

    found = NearestTraining([training])(copies)

    assert found[:, 1].tolist() == [17, 2999, 0]
    torch.testing.assert_close(
        found[:, 0], torch.tensor([0, 0, 1 / 255]).double(), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("chunk", [3, 1000])
def test_the_first_of_equal_images_is_named(monkeypatch, chunk):
    monkeypatch.setattr(memorization, "CHUNK", chunk)
    training = images(20, (1, 5, 5), 4)
    training[[9, 11, 12, 13, 17]] = training[8].clone()

    assert NearestTraining([training])(training)[:, 1].tolist() == [
        *range(9),
        *(8, 10, 8, 8, 8, 14, 15, 16, 8, 18, 19),
    ]


def test_the_largest_differences_are_exact():
    black = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    black[1, 0, 0, 0] = 1
    white = torch.full((1, 3, 64, 64), 255, dtype=torch.uint8)

    found = NearestTraining([black])(white)

    # 12287 pixels at 255 and one at 254
    assert found.tolist() == [[(12287 * 255**2 + 254**2) ** 0.5 / 255, 1]]


def test_large_images_are_compared_averaged_down():
    training, generated = images(6, (1, 128, 192), 3), images(4, (1, 128, 192), 4)
    small = [F.avg_pool2d(x.float(), (2, 3)).round() for x in (generated, training)]

    torch.testing.assert_close(
        NearestTraining([training])(generated)[:, 0],
        by_hand(*small).min(dim=1).values,
        rtol=1e-12,
        atol=0,
    )


def test_training_images_may_come_in_blocks():
    training, generated = images(50, (1, 70, 70), 5), images(9, (1, 70, 70), 6)
    blocks = torch.split(training, 7)

    assert torch.equal(
        NearestTraining(iter(blocks))(generated), NearestTraining([training])(generated)
    )


def test_other_shapes_and_no_images_are_refused():
    with pytest.raises(
        InputError, match=r"images \[1, 8, 8\] cannot be compared with training images \[1, 9, 9\]"
    ):
        NearestTraining([images(3, (1, 9, 9), 0)])(images(2, (1, 8, 8), 0))
    with pytest.raises(InputError, match="no training images"):
        NearestTraining([images(0, (1, 9, 9), 0)])
