"""Metrics on digits and on sets that can be counted by hand; the floor against scikit-learn's stratified splits."""

import dataclasses
import json
import math

import pytest
import torch
from sklearn.model_selection import train_test_split

from difftrain.data.items import Images
from difftrain.evaluation import FeatureStatistics, frechet_distance, kernel_distance, precision_recall
from difftrain.evaluation.evidence import Evidence, GeneratedSet, RealSet, check_needs
from difftrain.evaluation.features import Pixels
from difftrain.evaluation.metrics import (
    ClassAgreement,
    FrechetDistance,
    KernelDistance,
    NearestNeighbourRatio,
    PrecisionRecall,
    disjoint_halves,
    statistics_of,
)
from difftrain.registry import METRICS, InputError


@pytest.fixture(scope="module")
def evidence(classifier, train, held_out) -> Evidence:
    """The training digits, slightly noisy, as a generated set."""
    noise = torch.randint(0, 20, train.pixels.shape, generator=torch.Generator().manual_seed(0))
    pixels = (train.pixels + noise).clamp(max=255).to(torch.uint8)[:500]
    generated = GeneratedSet(classifier(pixels), pixels, train.labels[:500], classifier.classify(pixels))
    return Evidence(generated, RealSet(held_out, classifier), RealSet(train, classifier), classifier.name, seed=0)


@pytest.mark.parametrize("name", sorted(METRICS.constructors))
def test_every_metric_gives_finite_json_scores(name, evidence):
    scores = METRICS.parse(name, "metrics.0").build()(evidence)

    assert scores
    assert all(math.isfinite(score["value"]) for score in scores.values())
    assert json.loads(json.dumps(scores)) == scores


def test_values_are_those_of_the_functions(evidence):
    reference, generated = evidence.reference.features, evidence.generated.features
    whole = [FeatureStatistics(64) for _ in range(2)]
    whole[0].update(reference)
    whole[1].update(generated)

    assert abs(FrechetDistance()(evidence)["frechet_distance"]["value"] - frechet_distance(*whole)) < 1e-9  # another order of sums
    assert KernelDistance(degree=2)(evidence)["kernel_distance"]["value"] == kernel_distance(reference, generated, 2)
    scores = PrecisionRecall(neighbours=4)(evidence)
    assert (scores["precision"]["value"], scores["recall"]["value"]) == precision_recall(reference, generated, 4)


def test_the_floor_is_that_of_stratified_splits(evidence, train, held_out):
    floors, count = FrechetDistance(splits=30).floors(evidence)
    features, labels = evidence.pool()
    assert torch.equal(labels, torch.cat([held_out.labels, train.labels]))
    expected = []
    for seed in range(30):
        a, b = train_test_split(range(len(labels)), train_size=count, test_size=count, stratify=labels, random_state=seed)
        expected.append(frechet_distance(statistics_of(features[a]), statistics_of(features[b])))
    error = (floors.var() / 30 + torch.tensor(expected).var() / 30).sqrt()

    assert count == len(evidence.reference.images)
    assert abs(floors.mean() - sum(expected) / 30) < 4 * error


def test_the_score_reports_its_floor(evidence):
    score = FrechetDistance()(evidence)["frechet_distance"]
    floors, count = FrechetDistance().floors(evidence)

    assert score["floor"] == float(floors.mean())
    assert score["floor_std"] == float(floors.std(correction=0))
    assert score["floor_count"] == count
    assert score["features"] == "digits_classifier"
    assert len(floors.unique()) == 10


def test_the_floor_depends_on_the_seed_alone(evidence):
    floor = FrechetDistance()(evidence)["frechet_distance"]["floor"]

    assert FrechetDistance()(evidence)["frechet_distance"]["floor"] == floor
    assert FrechetDistance()(dataclasses.replace(evidence, seed=1))["frechet_distance"]["floor"] != floor


def test_the_floor_without_training_images_halves_the_reference(evidence, held_out):
    unlabelled = RealSet(Images(held_out.pixels, None), evidence.reference.extractor)
    score = FrechetDistance()(dataclasses.replace(evidence, reference=unlabelled, training=None))["frechet_distance"]

    assert score["floor_count"] == len(held_out) // 2
    assert score["floor"] > 0


@pytest.mark.parametrize("count", [1, 10, 77, 150])
def test_halves_are_disjoint_of_equal_size_and_alike_in_labels(count):
    labels = torch.arange(301) % 7 % 5  # 5 classes, two of them twice as frequent
    a, b = disjoint_halves(labels, count, torch.Generator().manual_seed(count))

    assert len({*a.tolist(), *b.tolist()}) == 2 * count
    for label in range(5):
        share = int((labels == label).sum()) / 301 * count
        # One for the pair across two classes, one for rounding at each end of the class.
        assert all(abs(int((labels[half] == label).sum()) - share) <= 2 for half in (a, b))
        assert abs(int((labels[a] == label).sum()) - int((labels[b] == label).sum())) <= 1


def test_every_image_can_land_in_either_half():
    landed = torch.zeros(2, 9)
    for seed in range(300):
        for half, rows in enumerate(disjoint_halves(torch.zeros(9, dtype=torch.long), 4, torch.Generator().manual_seed(seed))):
            landed[half, rows] += 1

    # 300 draws with probability 4/9 each: 133 with standard deviation 8.6; four of these.
    assert ((landed - 300 * 4 / 9).abs() < 35).all()


def test_class_agreement_is_the_share_of_labels_that_were_met(evidence):
    labels, predicted = torch.tensor([0, 1, 2, 3, 4]), torch.tensor([0, 1, 7, 3, 4])
    generated = dataclasses.replace(evidence.generated, labels=labels, predicted=predicted)

    assert ClassAgreement()(dataclasses.replace(evidence, generated=generated)) == {
        "class_agreement": {"value": 0.8, "classifier": "digits_classifier"}
    }


def ratio(generated: torch.Tensor, reference: torch.Tensor, training: torch.Tensor) -> dict[str, float]:
    pixels = Pixels(tuple(generated.shape[1:]))
    real = [RealSet(Images(images, None), pixels) for images in (reference, training)]
    evidence = Evidence(GeneratedSet(pixels(generated), generated), real[0], real[1], "pixels", seed=0)
    return NearestNeighbourRatio()(evidence)["nearest_neighbour_ratio"]


def test_nearest_neighbour_ratio_is_zero_for_copies_and_one_for_unseen_images(train, held_out):
    assert ratio(train.pixels[:50], held_out.pixels, train.pixels)["value"] == 0
    assert ratio(held_out.pixels, held_out.pixels, train.pixels)["value"] == 1


def test_nearest_neighbour_distances_are_of_pixels_between_0_and_1():
    black, grey, white = (torch.full((1, 3, 8, 8), value, dtype=torch.uint8) for value in (0, 51, 255))
    found = ratio(generated=white, reference=grey, training=black)

    assert found == pytest.approx({"value": 5, "generated": 192**0.5, "reference": 0.2 * 192**0.5}, abs=1e-5)  # pixels in float32


def test_a_reference_of_training_images_is_refused(train):
    with pytest.raises(InputError, match="every reference image is a training image too"):
        ratio(train.pixels[:9], train.pixels[:5], train.pixels)


def test_a_metric_says_what_it_lacks_and_what_to_do():
    metrics = [FrechetDistance(), ClassAgreement(), NearestNeighbourRatio()]

    check_needs(metrics, ["reference", "labels", "classifier", "training", "pixels"])
    with pytest.raises(InputError) as error:
        check_needs(metrics, ["reference", "pixels", "classifier"])
    assert str(error.value).splitlines() == [
        "metric 'class_agreement' needs labels: generate with class labels, or leave the metric out.",
        "metric 'nearest_neighbour_ratio' needs training: give the training images, or leave the metric out.",
    ]
