"""The floor of a distance: its counts, its draws, and the ratio of a perfect generator to it."""

import dataclasses
import re
import statistics

import numpy as np
import pytest
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor

from difftrain.core.errors import InputError
from difftrain.evaluation.distances.frechet import frechet_distance
from difftrain.evaluation.evidence import Evidence, FeatureSet
from difftrain.evaluation.metrics import kernel
from difftrain.evaluation.metrics.floor import ratio_to_floor, real_floor
from difftrain.evaluation.metrics.frechet import FrechetDistance
from difftrain.evaluation.metrics.kernel import GaussianMmd, KernelDistance
from difftrain.evaluation.metrics.real_samples import disjoint_sets, floor_counts
from difftrain.evaluation.results import Evaluation
from difftrain.evaluation.rows import RowsInMemory
from difftrain.evaluation.slots import Metric
from difftrain.run.final_scores import score_lines

GAUSSIAN_MMD = GaussianMmd(sigma=2.0, normalised=False, splits=4)


def gaussian_set(count: int, width: int, seed: int, shift: float = 0.0) -> FeatureSet:
    """Samples of a normal distribution whose mean depends on the label."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    rows = torch.randn(count, width, generator=generator) + shift + labels[:, None]
    return FeatureSet({"features": RowsInMemory(rows)}, labels)


def compared(
    generated: int,
    reference: int,
    training: int,
    width: int = 6,
    seed: int = 0,
    shift: float = 0.0,
) -> Evidence:
    """Sets of these sizes; without a shift the generator is perfect."""
    known = gaussian_set(training, width, 3 * seed + 2) if training else None
    return Evidence(
        gaussian_set(generated, width, 3 * seed, shift),
        gaussian_set(reference, width, 3 * seed + 1),
        known,
        "pixels",
        seed,
    )


def score_of(metric: Metric, evidence: Evidence) -> dict:
    return metric(evidence)[metric.scores[0]]


def counts_of(score: dict) -> tuple[int, int]:
    return score["floor_count"], score["floor_reference_count"]


def rows_of(found: FeatureSet) -> Tensor:
    return found.outputs["features"].whole()


# The ratio


@pytest.mark.parametrize(
    ("metric", "counts", "width", "basis"),
    [
        (FrechetDistance(splits=4), (60, 60, 60), 8, "same counts"),
        (FrechetDistance(splits=4), (90, 24, 100), 12, "same counts"),
        (FrechetDistance(splits=4), (20, 90, 40), 16, "same counts"),
        (FrechetDistance(splits=4), (96, 96, 0), 12, "extrapolated"),
        (FrechetDistance(splits=4), (600, 60, 60), 12, "extrapolated"),
        (FrechetDistance(splits=4), (40, 400, 0), 16, "extrapolated"),
        (GAUSSIAN_MMD, (60, 30, 90), 8, "same counts"),
        (GAUSSIAN_MMD, (200, 40, 20), 8, "extrapolated"),
        (GAUSSIAN_MMD, (40, 40, 0), 32, "extrapolated"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Metric) else str(value),
)
def test_the_ratio_of_a_perfect_generator_is_one_on_average(metric, counts, width, basis):
    scores = [score_of(metric, compared(*counts, width, seed)) for seed in range(24)]
    ratios = [score["floor_ratio"] for score in scores]
    error = statistics.stdev(ratios) / 24**0.5

    assert {score["floor_basis"] for score in scores} == {basis}
    # Extrapolation of the Frechet distance may be off by 6 %
    assert statistics.fmean(ratios) == pytest.approx(1, abs=4 * error + 0.06)
    assert error < 0.06  # or the test would tell nothing


def test_a_perfect_score_of_150_pictures_has_no_ratio_to_75_against_75():
    score = score_of(FrechetDistance(), compared(150, 150, 0, width=64))

    assert counts_of(score) == (75, 75)
    assert score["floor"] > 1.5 * score["value"]
    assert score["floor_basis"] == "fewer samples"
    assert "floor_ratio" not in score


def test_the_same_score_has_a_ratio_where_there_are_enough_real_pictures():
    score = score_of(FrechetDistance(), compared(150, 150, 150, width=64))

    assert counts_of(score) == (150, 150)
    assert score["floor_ratio"] == score["value"] / score["floor"]
    assert score["floor_ratio"] == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize(("reference", "basis"), [(63, "fewer samples"), (64, "extrapolated")])
def test_the_frechet_floor_extrapolates_from_twice_the_features(reference, basis):
    score = score_of(FrechetDistance(), compared(100, reference, 0, width=16))

    assert (score["floor_basis"], "floor_ratio" in score) == (basis, basis == "extrapolated")


def test_an_extrapolated_floor_is_in_proportion_to_the_inverse_counts():
    evidence = compared(400, 50, 50)
    measured = real_floor(evidence, 3, frechet_distance, 51)
    extrapolated = real_floor(evidence, 3, frechet_distance, 50)

    assert counts_of(measured) == counts_of(extrapolated) == (50, 50)
    for key in ("floor", "floor_std"):
        expected = measured[key] * (1 / 400 + 1 / 50) / (1 / 50 + 1 / 50)
        assert extrapolated[key] == pytest.approx(expected, rel=1e-12)


def without_labels(evidence: Evidence) -> Evidence:
    """The same sets, of which the reference has no labels, so that none count for the floor."""
    unlabelled = dataclasses.replace(evidence.reference, labels=None)
    return dataclasses.replace(evidence, reference=unlabelled)


@pytest.mark.parametrize(
    ("metric", "has_ratio"), [(KernelDistance(), False), (GAUSSIAN_MMD, True)], ids=str
)
def test_an_unbiased_distance_has_no_ratio_whatever_its_floor(monkeypatch, metric, has_ratio):
    floor = {"floor": 1.0, "floor_std": 0.1, "floor_basis": "same counts"}
    monkeypatch.setattr(kernel, "real_floor", lambda *_, **__: floor)

    assert ("floor_ratio" in score_of(metric, compared(20, 20, 40))) == has_ratio


@pytest.mark.parametrize("labelled", [True, False])
def test_the_extrapolated_floor_of_a_kernel_distance_is_that_of_the_scores_counts(labelled):
    found = {}
    for training in (0, 120):  # 30 against 30, and 120 against 60
        scores = []
        for seed in range(20):
            evidence = compared(120, 60, training, seed=seed)
            if not labelled:
                evidence = without_labels(evidence)
            scores.append(score_of(KernelDistance(), evidence))
        found[training] = scores
    extrapolated, whole = found[0], found[120]

    assert {score["floor_basis"] for score in extrapolated} == {"extrapolated"}
    assert {score["floor_basis"] for score in whole} == {"same counts"}
    for key in ("floor", "floor_std"):
        a, b = ([score[key] for score in scores] for scores in (extrapolated, whole))
        error = ((statistics.variance(a) + statistics.variance(b)) / 20) ** 0.5
        assert abs(statistics.fmean(a) - statistics.fmean(b)) < 4 * error


@pytest.mark.parametrize("floor", [-0.1, 0.0, 0.1, 0.2, 0.21])
def test_no_ratio_to_a_floor_near_0(floor):
    score = {"value": 1.0, "floor": floor, "floor_std": 0.1, "floor_basis": "same counts"}

    assert ("floor_ratio" in ratio_to_floor(score)) == (floor > 0.2)
    assert ratio_to_floor(score | {"floor": 1.0, "floor_std": 0.0}) == {}  # a single draw
    assert ratio_to_floor({"value": 1.0}) == {}


# What is printed


def line_of(evidence: Evidence, metric: Metric) -> str:
    evaluation = Evaluation(metric(evidence), {}, {})
    (line,) = score_lines(evaluation)
    return line


@pytest.mark.parametrize(
    ("counts", "metric", "after"),
    [
        ((40, 40, 40), FrechetDistance(), r", ratio \d\.\d\d"),
        ((40, 40, 0), FrechetDistance(), r" \(extrapolated from 20 against 20\), ratio \d\.\d\d"),
        ((20, 20, 0), FrechetDistance(), r" \(10 against 10\)"),
        ((20, 40, 30), KernelDistance(), ""),
        ((20, 40, 0), KernelDistance(), r" \(extrapolated from 20 against 20\)"),
    ],
    ids=str,
)
def test_the_line_of_a_score_says_what_its_floor_was_measured_with(counts, metric, after):
    number = r"-?[\d.e-]+"
    expected = rf"  {metric.scores[0]} +{number}   real against real {number} ± {number}{after}"

    found = line_of(compared(*counts, shift=0.1), metric)
    assert re.fullmatch(expected, found), found


# The counts


@pytest.mark.parametrize(
    ("scored", "num_real", "most", "expected"),
    [
        ((150, 150), 300, None, (150, 150)),
        ((150, 150), 150, None, (75, 75)),
        ((150, 150), 299, None, (149, 150)),
        ((2000, 450), 1348, None, (898, 450)),
        ((450, 2000), 1348, None, (450, 898)),
        ((100, 900), 150, None, (75, 75)),
        ((40, 120), 420, None, (40, 120)),
        ((9000, 700), 20000, 5000, (5000, 700)),
        ((1, 20), 30, None, (2, 20)),
        ((9, 9), 4, None, (2, 2)),
    ],
)
def test_the_floor_has_the_scores_counts_or_as_many_samples_as_there_are(
    scored, num_real, most, expected
):
    assert floor_counts(scored, num_real, most) == expected


@pytest.mark.parametrize("scored", [(30, 30), (90, 20), (20, 90), (50, 60)])
@pytest.mark.parametrize("num_real", [40, 77, 109, 110])
def test_no_other_counts_come_nearer_to_the_inverse_counts_of_the_score(scored, num_real):
    allowed = [
        1 / a + 1 / b
        for a in range(2, scored[0] + 1)
        for b in range(2, scored[1] + 1)
        if a + b <= num_real
    ]
    a, b = floor_counts(scored, num_real)

    assert 1 / a + 1 / b == pytest.approx(min(allowed), rel=1e-12)


def test_too_few_real_samples_for_a_floor_are_refused():
    message = "3 real samples are too few for the floor of a distance: it needs at least 4"
    with pytest.raises(InputError, match=message):
        FrechetDistance()(compared(20, 3, 0))


# The draws


def test_the_floor_is_that_of_stratified_splits():
    evidence = compared(150, 120, 300)
    floors = []
    for seed in range(30):
        of_seed = dataclasses.replace(evidence, seed=seed)
        floors.append(real_floor(of_seed, 1, frechet_distance, 2)["floor"])
    features = torch.cat([rows_of(evidence.reference), rows_of(evidence.training)])
    labels = torch.cat([evidence.reference.labels, evidence.training.labels])
    expected = []
    for seed in range(30):
        a, b = train_test_split(
            range(len(labels)), train_size=150, test_size=120, stratify=labels, random_state=seed
        )
        expected.append(frechet_distance(features[a], features[b]))
    error = (np.var(floors, ddof=1) / 30 + np.var(expected, ddof=1) / 30) ** 0.5

    assert abs(np.mean(floors) - np.mean(expected)) < 4 * error


@pytest.mark.parametrize("metric", [FrechetDistance(), KernelDistance(), GAUSSIAN_MMD])
def test_every_distance_reports_its_floor(metric):
    far = compared(150, 120, 300, shift=1.0)
    score = score_of(metric, far)

    assert counts_of(score) == (150, 120)
    assert score["floor"] < score["value"]
    assert score["floor_std"] > 0
    assert score_of(metric, far) == score
    assert score_of(metric, dataclasses.replace(far, seed=1))["floor"] != score["floor"]


def test_the_floor_without_labels_is_known_too():
    score = score_of(FrechetDistance(), without_labels(compared(150, 120, 0)))

    assert counts_of(score) == (60, 60)
    assert score["floor"] > 0


@pytest.mark.parametrize("counts", [(1, 1), (10, 10), (77, 30), (30, 77), (150, 151), (2, 299)])
def test_the_sets_are_disjoint_and_alike_in_labels(counts):
    labels = torch.arange(301) % 7 % 5  # 5 classes, two of them twice as frequent
    found = disjoint_sets(labels, counts, torch.Generator().manual_seed(sum(counts)))

    assert [len(rows) for rows in found] == list(counts)
    assert len({*found[0].tolist(), *found[1].tolist()}) == sum(counts)
    for label in range(5):
        share = int((labels == label).sum()) / 301
        for rows, count in zip(found, counts, strict=True):
            # Rounding at each end of the class, of all rows and of those of a set
            assert abs(int((labels[rows] == label).sum()) - share * count) <= 2


@pytest.mark.parametrize("counts", [(4, 4), (2, 5)])
def test_every_sample_can_land_in_either_set(counts):
    landed = torch.zeros(2, 9)
    for seed in range(300):
        generator = torch.Generator().manual_seed(seed)
        found = disjoint_sets(torch.zeros(9, dtype=torch.long), counts, generator)
        for place, rows in enumerate(found):
            landed[place, rows] += 1

    # 300 draws of probability p each: the standard deviation is at most 8.7; four of these
    expected = 300 * torch.tensor(counts)[:, None] / 9
    assert ((landed - expected).abs() < 35).all()
