"""The trained classifier: what it knows, independent rows, what its protocol fixes."""

import dataclasses
import json

import pytest
import torch

from difftrain.core.digests import digest
from difftrain.core.errors import InputError
from difftrain.data.datasets.digits import Digits
from difftrain.data.items import Images, load_images
from difftrain.data.transform import Transform
from difftrain.evaluation.features import classifier as features
from difftrain.evaluation.features.classifier import Classifier, DigitsClassifier
from difftrain.evaluation.features.classifier_network import (
    shared_classifier,
    train_classifier,
)
from difftrain.evaluation.features.raw import Pixels
from difftrain.evaluation.slots import FEATURES


def few(num: int = 30) -> Images:
    generator = torch.Generator().manual_seed(0)
    return Images(
        torch.randint(0, 256, (num, 1, 8, 8), generator=generator, dtype=torch.uint8),
        torch.arange(num) % 2,
    )


def features_of(extractor, pixels: torch.Tensor) -> torch.Tensor:
    return extractor.extract(pixels)["features"]


def classes(extractor, pixels: torch.Tensor) -> torch.Tensor:
    return extractor.extract(pixels, ("logits",))["logits"].argmax(dim=1)


def test_the_digits_classifier_knows_unseen_digits(classifier, train, held_out):
    assert classifier.accuracy >= 0.975
    assert (
        float((classes(classifier, held_out.pixels) == held_out.labels).double().mean())
        == classifier.accuracy
    )
    assert float((classes(classifier, train.pixels) == train.labels).double().mean()) >= 0.97


def test_a_row_depends_on_its_image_alone(classifier, held_out):
    together = features_of(classifier, held_out.pixels)
    apart = torch.cat(
        [
            features_of(classifier, images)
            for images in held_out.pixels.split([1, 300, len(held_out) - 301])
        ]
    )

    assert together.dtype == torch.float32
    assert together.shape == (len(held_out), classifier.widths["features"])
    torch.testing.assert_close(
        apart, together, rtol=0, atol=1e-5
    )  # float32 convolutions of other batch sizes, features of about 1


def test_both_outputs_come_from_one_pass_and_only_those_asked_for(classifier, held_out):
    both = classifier.extract(held_out.pixels, ("features", "logits"))

    assert torch.equal(classifier.network.head(both["features"]), both["logits"])
    assert {name: rows.shape[1] for name, rows in both.items()} == classifier.widths
    assert set(classifier.extract(held_out.pixels[:2], ("logits",))) == {"logits"}


def test_pixels_are_flattened_to_the_unit_interval():
    images = (
        torch.tensor([0, 51, 255, 102], dtype=torch.uint8).reshape(1, 1, 2, 2).repeat(1, 3, 1, 1)
    )
    pixels = FEATURES.parse("pixels", "features").build(shape=(3, 2, 2), cache=None)

    torch.testing.assert_close(
        features_of(pixels, images), torch.tensor([[0, 0.2, 1, 0.4] * 3]), rtol=0, atol=1e-7
    )
    assert pixels.widths == {"features": 12}
    assert pixels.gives == frozenset()


@pytest.mark.parametrize(
    "images", [torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 9, 8, dtype=torch.uint8)]
)
def test_other_images_are_refused(classifier, images):
    for extractor in (classifier, Pixels((1, 8, 8))):
        with pytest.raises(InputError, match=r"take uint8 images \[N, 1, 8, 8\]"):
            extractor.extract(images)


def test_the_protocol_is_json_and_changes_with_the_seed(classifier, monkeypatch):
    monkeypatch.setattr(features, "STEPS", 2)
    other, again = DigitsClassifier(seed=1).protocol(), DigitsClassifier(seed=1).protocol()

    assert json.loads(json.dumps(classifier.protocol())) == classifier.protocol()
    assert again == other
    assert other["weights"] != classifier.protocol()["weights"]
    assert other["training"] == classifier.protocol()["training"]


def test_cached_weights_are_used_again(tmp_path, monkeypatch):
    first = shared_classifier(few(), 2, seed=3, steps=2, cache=tmp_path, name="test")
    monkeypatch.setattr(
        "difftrain.evaluation.features.classifier_network.train_classifier",
        lambda *_: pytest.fail("trained although there is a cache"),
    )
    second = shared_classifier(few(), 2, seed=3, steps=2, cache=tmp_path, name="test")

    assert digest(*second.state_dict().values()) == digest(*first.state_dict().values())
    assert not second.training
    assert len(list(tmp_path.iterdir())) == 1


def test_the_cache_tells_images_seeds_and_steps_apart(tmp_path):
    for images, seed, steps in [(few(30), 0, 1), (few(29), 0, 1), (few(30), 1, 1), (few(30), 0, 2)]:
        found = shared_classifier(images, 2, seed, steps, tmp_path, "test")
        assert digest(*found.state_dict().values()) == digest(
            *train_classifier(images, 2, seed, steps).state_dict().values()
        )
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("damage", ["other bytes", "one bit"])
def test_a_damaged_classifier_is_trained_again_and_said(tmp_path, damage, caplog):
    caplog.set_level("INFO")
    given = {"seed": 0, "steps": 1, "cache": tmp_path, "name": "test"}
    first = shared_classifier(few(), 2, **given).state_dict()
    path = next(tmp_path.iterdir())
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(b"damaged" if damage == "other bytes" else content)

    again = shared_classifier(few(), 2, **given).state_dict()
    assert all(torch.equal(again[name], value) for name, value in first.items())
    assert f"{path} does not hold what was written" in caplog.text


def test_an_interrupted_save_leaves_no_file(tmp_path, monkeypatch):
    def interrupted(state, path, metadata):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("difftrain.evaluation.features.classifier_network.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        shared_classifier(few(), 2, seed=0, steps=1, cache=tmp_path, name="test")
    assert list(tmp_path.iterdir()) == []


def test_a_classifier_of_ones_own_images_keeps_a_fifth_for_its_accuracy():
    block = {
        "type": "classifier",
        "data": {"type": "digits", "part": "classifier"},
        "seed": 0,
        "steps": 60,
    }
    found = FEATURES.parse(block, "features").build(
        transform=Transform(8, channels=1, resize="none"), cache=None
    )

    assert found.protocol()["training"]["data"] == {
        "type": "digits",
        "part": "classifier",
        "classes": None,
    }
    assert abs(found.protocol()["training"]["count"] - 0.8 * len(Digits("classifier"))) < 1
    assert found.accuracy > 0.8  # 60 steps; chance is 0.1


def test_four_fifths_and_a_fifth_have_every_class_and_share_no_image():
    images = load_images(Digits("classifier"), Transform(8, channels=1, resize="none"))
    training, unseen = features.four_fifths(images, "classifier")

    assert len(training) + len(unseen) == len(images)
    assert all(
        abs(int((unseen.labels == c).sum()) - int((images.labels == c).sum()) / 5) < 1
        for c in range(10)
    )
    assert {bytes(x.numpy()) for x in training.pixels}.isdisjoint(
        bytes(x.numpy()) for x in unseen.pixels
    )


def test_unlabelled_images_train_no_classifier():
    class Unlabelled(Digits):
        def __getitem__(self, i):
            return dataclasses.replace(super().__getitem__(i), label=None)

    with pytest.raises(
        InputError, match="'classifier' train a classifier and need labelled images"
    ):
        Classifier(data=Unlabelled(), transform=Transform(8, channels=1, resize="none"))
