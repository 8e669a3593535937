"""The classifier's training: the same for a seed, with random numbers of its own, at any size."""

import pytest
import torch

from difftrain.core.errors import InputError
from difftrain.data.items import Images
from difftrain.evaluation.features import classifier_network as classifier
from difftrain.evaluation.features.classifier_network import (
    NUM_FEATURES,
    ClassifierNetwork,
    augmented,
    batch_rows,
    train_classifier,
)


def stripes(num: int, shape: tuple[int, int, int], seed: int = 0) -> Images:
    """Noisy images [num, C, H, W] of two classes: bright in the upper or in the lower half."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num) % 2
    lower = torch.arange(shape[1]) * 2 >= shape[1]
    bright = (lower[None] == labels[:, None].bool())[:, None, :, None].expand(num, *shape)
    noise = torch.randint(0, 100, (num, *shape), generator=generator)
    return Images((bright * 155 + noise).to(torch.uint8), labels)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 17)])
def test_it_learns_at_any_size(shape):
    network = train_classifier(
        stripes(40, shape), 2, seed=0, steps=30
    )  # enough for the running means of the normalisation
    unseen = stripes(20, shape, seed=1)

    images = unseen.pixels.float() / 127.5 - 1

    assert network.features(images).shape == (20, NUM_FEATURES)
    assert (network(images).argmax(1) == unseen.labels).all()
    assert not network.training


@pytest.mark.parametrize("side", [8, 15, 28, 32, 64, 100])
def test_images_of_any_side_become_as_many_features(side):
    assert ClassifierNetwork((3, side, 2 * side), 5).eval().features(
        torch.zeros(1, 3, side, 2 * side)
    ).shape == (1, NUM_FEATURES)


def test_a_seed_fixes_the_weights_and_leaves_the_global_generator_alone():
    images = stripes(20, (1, 8, 8))
    before = torch.get_rng_state()
    first, again, other = (
        train_classifier(images, 2, seed, steps=3).state_dict() for seed in (5, 5, 6)
    )

    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_the_number_of_threads_changes_no_weight():
    images, threads = stripes(64, (1, 16, 16)), torch.get_num_threads()
    trained = []
    for number in (1, 2):
        torch.set_num_threads(number)
        trained.append(train_classifier(images, 2, seed=0, steps=3).state_dict())
        assert torch.get_num_threads() == number
    torch.set_num_threads(threads)

    assert all(torch.equal(trained[0][key], trained[1][key]) for key in trained[0])


def test_augmentation_shifts_by_one_pixel_and_repeats_edges(monkeypatch):
    monkeypatch.setitem(classifier.SETTINGS, "noise", 0.0)
    images = torch.arange(2 * 9.0 * 10).reshape(1, 2, 9, 10).expand(200, -1, -1, -1)
    allowed = {
        (down, right): images[0][:, (torch.arange(9) + down).clamp(0, 8)][
            :, :, (torch.arange(10) + right).clamp(0, 9)
        ]
        for down in (-1, 0, 1)
        for right in (-1, 0, 1)
    }

    found = [
        next(shift for shift, image in allowed.items() if torch.equal(image, moved))
        for moved in augmented(images)
    ]

    assert set(found) == set(allowed)


def test_every_image_is_seen_equally_often():
    seen = torch.cat(batch_rows(30, steps=15)).bincount()

    assert all(len(rows) == 64 for rows in batch_rows(30, steps=15))
    assert seen.tolist() == [32] * 30  # 15 * 64 = 32 * 30


def test_what_cannot_be_learned_is_refused():
    with pytest.raises(InputError, match="have no labels"):
        train_classifier(Images(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), None), 2, seed=0)
    with pytest.raises(InputError, match="labels run from 0 to 1, but 1 classes"):
        train_classifier(stripes(4, (1, 8, 8)), 1, seed=0)
    with pytest.raises(InputError, match="expected at least 8 x 8"):
        ClassifierNetwork((1, 7, 20), 10)
    with pytest.raises(InputError, match="there are no images"):
        train_classifier(stripes(0, (1, 8, 8)), 2, seed=0)
