"""Captions as they are shown: dropped, in templates, with shuffled tags."""

from collections import Counter
from itertools import permutations

import pytest

from difftrain.core.errors import InputError
from difftrain.core.rng import Rng
from difftrain.data.captions import Captions, described


def shown(captions, num, caption="a, b, c"):
    return [captions(caption, Rng(0, samples=[k])) for k in range(num)]


def test_without_settings_a_caption_stays_as_it_is():
    assert set(shown(Captions(), 50, "  an odd,caption ,")) == {"  an odd,caption ,"}
    assert not Captions().is_random


def test_captions_are_dropped_as_often_as_stated():
    found = Counter(shown(Captions(dropout=0.25), 2000))

    assert abs(found[""] - 500) < 78  # 4 standard deviations
    assert found["a, b, c"] == 2000 - found[""]
    assert set(shown(Captions(dropout=1.0), 20)) == {""}


def test_each_template_comes_equally_often():
    found = Counter(shown(Captions(templates=["{}", "a photo of {}", "{} in oil"]), 1800, "a cat"))

    assert found.keys() == {"a cat", "a photo of a cat", "a cat in oil"}
    assert all(abs(count - 600) < 80 for count in found.values())  # 4 standard deviations


def test_a_caption_with_braces_is_put_into_a_template_unread():
    assert Captions(templates=["a photo of {}"])("{x} and {}", Rng(0)) == "a photo of {x} and {}"


def test_tags_take_every_order_equally_often_behind_those_that_are_kept():
    found = Counter(shown(Captions(shuffle_tags=True, keep_tags=1), 1200, "first,a ,  b,c,,"))

    expected = {"first, " + ", ".join(order) for order in permutations("abc")}
    assert found.keys() == expected
    assert all(abs(count - 200) < 52 for count in found.values())  # 4 standard deviations


def test_a_different_separator_splits_and_joins_tags():
    found = set(shown(Captions(shuffle_tags=True, separator="|"), 50, "a, b|c"))

    assert found == {"a, b| c", "c| a, b"}


def test_what_a_sample_is_shown_belongs_to_it():
    captions = Captions(dropout=0.5, templates=["{}", "a {}"], shuffle_tags=True)

    assert shown(captions, 30) == shown(captions, 30)
    assert shown(captions, 30) != [captions("a, b, c", Rng(1, samples=[k])) for k in range(30)]


def test_dropping_does_not_change_the_other_draws():
    plain, dropping = Captions(shuffle_tags=True), Captions(shuffle_tags=True, dropout=0.5)

    assert all(
        text in ("", other)
        for text, other in zip(shown(dropping, 50), shown(plain, 50), strict=True)
    )


def test_a_variant_is_a_function_of_caption_number_and_seed():
    captions = Captions(shuffle_tags=True, variants=6, dropout=1.0)
    found = [captions.variant("a, b, c, d", v) for v in range(6)]

    assert found == [captions.variant("a, b, c, d", v) for v in range(6)]
    assert len(set(found)) > 1
    assert "" not in found
    assert found != [captions.variant("a, b, c, d", v, seed=1) for v in range(6)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"templates": ["a photo"]},
            r"captions.templates: 'a photo' holds \{\} 0 times, expected once.*as in \"a photo "
            r"of \{\}\"",
        ),
        ({"templates": ["{} and {}"]}, r"holds \{\} 2 times"),
        ({"templates": []}, r"captions.templates: the list is empty"),
        (
            {"separator": "", "shuffle_tags": True},
            r"captions.separator: expected what stands between tags",
        ),
        ({"keep_tags": 2}, r"keep_tags and separator have no effect without shuffle_tags: true"),
        ({"separator": "|"}, r"keep_tags and separator have no effect without shuffle_tags: true"),
        ({"variants": 3}, r"captions.variants: 3 has no effect: with one template"),
        ({"dropout": 1.5}, r"captions.dropout: expected less than or equal to 1"),
    ],
)
def test_settings_without_sense_are_errors(settings, message):
    with pytest.raises(InputError, match=message):
        Captions(**settings)


def test_an_image_without_a_caption_is_named():
    assert described("a cat", "cat.png") == "a cat"
    with pytest.raises(InputError, match=r"^cat.png has no caption.*captions: sidecar or metadata"):
        described(None, "cat.png")
    with pytest.raises(InputError, match=r"^the caption of cat.png is empty\. Write one.*dropout"):
        described(" \n", "cat.png")


@pytest.mark.parametrize(
    ("separator", "caption", "expected"),
    [
        (". ", "a. b. c.", {"a. b. c.", "a. c. b."}),
        (".", "a. b. c.", {"a. b. c.", "a. c. b."}),
        (". ", "a. b. c", {"a. b. c", "a. c. b"}),
        (", ", "a, b, c", {"a, b, c", "a, c, b"}),
        (",", "a,b, c", {"a, b, c", "a, c, b"}),
        (" | ", "a | b | c", {"a | b | c", "a | c | b"}),
        ("\n", "a\nb\nc\n", {"a\nb\nc", "a\nc\nb"}),
        (" ", "a b  c", {"a b c", "a c b"}),
        (". ", "a. b. c...", {"a. b. c...", "a. c. b..."}),
        (".", "alone.", {"alone."}),
    ],
)
def test_tags_are_joined_as_they_were_separated(separator, caption, expected):
    captions = Captions(shuffle_tags=True, separator=separator, keep_tags=1)

    assert set(shown(captions, 60, caption)) == expected


@pytest.mark.parametrize(
    "caption", ["\u200b", "\ufeff \u2060", "\u00ad", "\u3000\u00a0", "\t\x00", "\u2800", "\u3164"]
)
def test_a_caption_that_shows_nothing_is_empty(caption):
    with pytest.raises(InputError, match=r"the caption of a.png is empty"):
        described(caption, "a.png")


def test_a_caption_with_an_invisible_character_is_not_empty():
    assert described("a\u200b", "a.png") == "a\u200b"
