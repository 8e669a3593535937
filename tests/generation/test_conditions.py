"""What generated samples are asked to show: exact shares of classes, captions each once."""

from collections import Counter
from fractions import Fraction

import pytest
import torch

from difftrain.data.captions import Captions
from difftrain.data.datasets.digits import Digits
from difftrain.data.items import load_images
from difftrain.data.transform import Transform
from difftrain.evaluation import FeatureStatistics, frechet_distance
from difftrain.generation.conditions import (
    class_conditions,
    largest_remainder,
    prompt_conditions,
)
from difftrain.models.conditioning.classes import ClassConditioning

CLASSES = ClassConditioning(10, 11)


def counted(classes: torch.Tensor) -> dict[int, int]:
    return dict(Counter(classes.tolist()))


def test_the_largest_fractions_get_what_is_left():
    """Ten seats for six parties: the quotas are 4.7, 1.6, 1.59, 1.2, 0.6 and 0.31."""
    votes = {0: 47_000, 1: 16_000, 2: 15_900, 3: 12_000, 4: 6_000, 5: 3_100}

    assert largest_remainder(votes, 10) == {0: 5, 1: 2, 2: 1, 3: 1, 4: 1, 5: 0}


def test_of_equal_fractions_the_smaller_class_ids_come_first():
    assert largest_remainder({2: 1, 0: 1, 1: 1}, 5) == {0: 2, 1: 2, 2: 1}


@pytest.mark.parametrize("num", [1, 7, 100, 10_007])
def test_every_class_gets_its_quota_rounded_up_or_down(num):
    torch.manual_seed(num)
    counts = dict(enumerate(torch.randint(0, 2**40, (17,)).tolist()))
    total = sum(counts.values())

    sizes = largest_remainder(counts, num)

    assert sum(sizes.values()) == num
    for label, size in sizes.items():
        assert abs(size - Fraction(num * counts[label], total)) < 1


def test_ninety_to_ten_stays_ninety_to_ten_in_a_random_order():
    made = class_conditions("reference", {3: 900, 7: 100}, 10, 50, seed=0)
    again = class_conditions("reference", {3: 900, 7: 100}, 10, 50, seed=0)
    other = class_conditions("reference", {3: 900, 7: 100}, 10, 50, seed=1)

    assert counted(made.classes) == counted(other.classes) == {3: 45, 7: 5}
    assert made.classes.tolist() == again.classes.tolist() != other.classes.tolist()
    assert made.classes.tolist() != sorted(made.classes.tolist())
    assert made.compared() == {"choice": "reference", "counts": [0, 0, 0, 45, 0, 0, 0, 5, 0, 0]}
    assert made.compared() == other.compared()
    assert made.described() != other.described()


def test_a_sample_has_one_class_in_blocks_of_any_size():
    made = class_conditions("training", {0: 2, 1: 5}, 2, 30, seed=4)
    whole = made.labels(range(30), CLASSES)

    by_fours = [made.labels(range(i, min(i + 4, 30)), CLASSES) for i in range(0, 30, 4)]

    assert torch.equal(torch.cat(by_fours), whole)
    assert made.labels([17], CLASSES).item() == whole[17]


@pytest.mark.parametrize("num", [10, 25, 2000])
def test_a_balanced_set_differs_from_classes_in_turn_in_its_order_alone(num):
    in_turn = class_conditions("in_turn", {}, 10, num, seed=0)
    uniform = class_conditions("uniform", dict.fromkeys(range(10), 1), 10, num, seed=0)
    reference = class_conditions("reference", dict.fromkeys(range(10), 45), 10, num, seed=0)

    assert in_turn.classes.tolist() == CLASSES.labels_of(range(num)).tolist()
    assert counted(uniform.classes) == counted(reference.classes) == counted(in_turn.classes)


def test_a_perfect_model_is_told_from_a_bad_one_only_in_the_shares_of_the_reference():
    """Real digits in the place of samples, as a perfect model makes them: 0 to 1 is 90 to 10."""
    transform = Transform(8, channels=1, resize="none")
    images = load_images(Digits("all", classes=[0, 1]), transform)
    zeros, ones = (images.pixels[images.labels == label] for label in (0, 1))
    reference = torch.cat([zeros[:90], ones[:10]])
    stock = {0: zeros[90:], 1: ones[10:]}

    def distance(classes: torch.Tensor) -> float:
        drawn = [stock[label][n % len(stock[label])] for n, label in enumerate(classes.tolist())]
        return frechet_distance(statistics(reference), statistics(torch.stack(drawn)))

    def statistics(pixels: torch.Tensor) -> FeatureStatistics:
        found = FeatureStatistics(64)
        found.update(pixels.flatten(1).double() / 255)
        return found

    shares = distance(class_conditions("reference", {0: 90, 1: 10}, 2, 88, seed=0).classes)
    in_turn = distance(class_conditions("in_turn", {}, 2, 88, seed=0).classes)

    assert shares < 0.7 * in_turn


def test_captions_come_each_once_and_then_in_turn():
    captions = [f"photo {i}" for i in range(5)]
    made = prompt_conditions("reference", captions, 13, seed=0)
    shown = made.prompts_of(range(13))

    assert sorted(shown[:5]) == captions != shown[:5]
    assert shown[5:10] == shown[:5]
    assert shown[10:] == shown[:3]
    assert prompt_conditions("reference", captions, 13, 1).prompts_of(range(13)) != shown


def test_fewer_samples_than_captions_take_a_random_part_of_them():
    captions = [f"photo {i}" for i in range(1000)]
    shown = prompt_conditions("reference", captions, 100, seed=0).prompts_of(range(100))

    assert len(set(shown)) == 100
    places = torch.tensor([int(text.split()[1]) for text in shown]).double()
    # Of a random part the mean place has the standard deviation 1000 / sqrt(12 * 100) = 29.
    assert abs(places.mean() - 499.5) < 4 * 29


def test_prompts_in_turn_keep_the_order_in_which_they_are_written():
    made = prompt_conditions("in_turn", ["b", "a"], 3, seed=0)

    assert made.prompts_of(range(3)) == ["b", "a", "b"]


def test_other_captions_are_other_protocols_and_another_rendering_is_not():
    captions = ["a", "b"]
    made = prompt_conditions("reference", captions, 2, 0)
    rendered = prompt_conditions("reference", captions, 2, 0, Captions(templates=["an {}"]))
    turned = prompt_conditions("reference", ["b", "a"], 2, 0)
    others = prompt_conditions("reference", ["a", "c"], 2, 0)

    assert made.compared() == rendered.compared() == turned.compared() != others.compared()
    assert made.described() != rendered.described()
    prompts = rendered.described()["prompts"]
    assert sorted(prompts["first"]) == ["an a", "an b"]
    assert prompts["rendering"] == {"templates": ["an {}"], "variant": 0}
