"""Class labels: dropout to the null label, keyed by sample; items' own tensors; refusals."""

import math

import pytest
import torch

from difftrain.core.errors import InputError
from difftrain.core.rng import Rng
from difftrain.models.conditioning.classes import ClassConditioning

TEN = ClassConditioning(10, 11, dropout=0.3)


def labels(num):
    return torch.arange(num) % 10


def test_labels_drop_at_the_stated_rate_to_the_null_label():
    num = 20_000
    found = TEN(labels(num), Rng(0, 3, range(num)))["class_labels"]
    dropped = found == 10

    assert torch.equal(found[~dropped], labels(num)[~dropped])
    error = math.sqrt(0.3 * 0.7 / num)
    assert abs(dropped.double().mean().item() - 0.3) < 4 * error


def test_each_class_drops_at_the_same_rate():
    num = 20_000
    dropped = TEN(labels(num), Rng(0, 3, range(num)))["class_labels"] == 10

    shares = torch.stack([dropped[labels(num) == c].double().mean() for c in range(10)])
    assert ((shares - 0.3).abs() < 4.5 * math.sqrt(0.3 * 0.7 / (num / 10))).all()


def test_what_drops_depends_on_the_sample_alone_so_that_any_split_drops_the_same():
    whole = TEN(labels(16), Rng(5, 2, range(16)))["class_labels"]
    parts = [
        TEN(labels(16)[part], Rng(5, 2, part, 16))["class_labels"]
        for part in ([0, 1, 2, 3, 4], [5], list(range(6, 16)))
    ]

    assert torch.equal(torch.cat(parts), whole)
    assert (whole == 10).any()


def test_other_steps_and_seeds_drop_others():
    drops = {
        tuple((TEN(labels(64), Rng(seed, step, range(64)))["class_labels"] == 10).tolist())
        for seed in (0, 1)
        for step in (0, 1)
    }

    assert len(drops) == 4


@pytest.mark.parametrize(
    ("conditioning", "rng"), [(TEN, None), (ClassConditioning(10, 11), Rng(0, 0, range(50)))]
)
def test_nothing_drops_without_an_rng_or_without_dropout(conditioning, rng):
    assert torch.equal(conditioning(labels(50), rng)["class_labels"], labels(50))


def test_a_dropout_of_one_drops_all():
    assert (
        ClassConditioning(10, 11, 1.0)(labels(50), Rng(0, 0, range(50)))["class_labels"] == 10
    ).all()


def test_the_null_conditioning_is_the_last_row_of_a_table_with_more_rows_than_classes():
    table = ClassConditioning(10, 1001)

    assert (table.can_guide, table.null_label) == (True, 1000)
    assert table.null(3)["class_labels"].tolist() == [1000] * 3


def test_a_table_without_a_spare_row_has_no_null_label():
    table = ClassConditioning(10, 10)

    assert (table.conditions, table.can_guide, table.null(3)) == (True, False, {})


def test_a_model_without_labels_is_given_none_of_the_data():
    plain = ClassConditioning(10, None)

    assert (
        plain(labels(4), Rng(0, 0, range(4))),
        plain.null(4),
        plain.labels_of([0, 1]),
        plain.can_guide,
    ) == ({}, {}, None, False)


def test_generated_samples_ask_for_the_classes_in_turn():
    assert ClassConditioning(3, 4).labels_of([0, 1, 2, 3, 7]).tolist() == [0, 1, 2, 0, 1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            (10, None, 0.1),
            "label_dropout is set, but the model takes no class labels.*Leave label_dropout out, "
            "or take.*num_class_embeds",
        ),
        (
            (None, 11),
            r"the model takes class labels \(11 of them\), but the data has none.*labels: folders.*"
            "leave num_class_embeds out",
        ),
        (
            (10, 9),
            r"the data has 10 classes, but the model embeds 9\. Write model: \{config: "
            r"\{num_class_embeds: 10\}\}",
        ),
        (
            (10, 10, 0.1),
            "10 classes, one more for the dropped label, but the model embeds 10.*"
            "num_class_embeds: 11",
        ),
    ],
)
def test_labels_that_do_not_fit_the_model_are_refused_with_a_remedy(arguments, said):
    with pytest.raises(InputError, match=said):
        ClassConditioning(*arguments)


def test_items_own_tensors_go_with_the_null_label_too():
    """Guidance takes both conditions side by side, so they have the same tensors."""
    made = ClassConditioning(3, 4, item_cond={"shift": torch.tensor([0.5, 1.0])})

    assert made.null(2)["shift"].tolist() == [[0.5, 1.0]] * 2
    assert made.null(2).keys() == made(torch.tensor([0, 1])).keys()


def test_prompts_mean_nothing_to_a_model_of_classes():
    assert TEN.captions_of(labels(2)) is None
    with pytest.raises(InputError, match="the model takes no prompts"):
        TEN.ids_of(["a cat"])
