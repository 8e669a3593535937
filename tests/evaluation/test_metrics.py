"""Metrics on sets with known answers; two processes."""

import dataclasses
import json
import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from helpers.commands import refused
from helpers.runs import tiny
from helpers.several import on_processes
from torch import Tensor

from difftrain.core.errors import InputError
from difftrain.evaluation import (
    frechet_distance,
    kernel_distance,
    precision_recall,
)
from difftrain.evaluation.distances.kernel import gaussian_discrepancy, kernel_distances
from difftrain.evaluation.distances.moments import Moments, moments_of
from difftrain.evaluation.distances.neighbours import density_coverage
from difftrain.evaluation.evidence import Evidence, FeatureSet
from difftrain.evaluation.metric_scores import described_scores
from difftrain.evaluation.metrics.clip_score import ClipScore
from difftrain.evaluation.metrics.frechet import Fid, FrechetDistance, Sfid
from difftrain.evaluation.metrics.kernel import Cmmd, GaussianMmd, KernelDistance, Kid
from difftrain.evaluation.metrics.memorization import NearestNeighbourRatio
from difftrain.evaluation.metrics.neighbours import DensityCoverage, PrecisionRecall
from difftrain.evaluation.metrics.predictions import (
    ClassAgreement,
    ClassifierScore,
    InceptionScore,
)
from difftrain.evaluation.rows import RowsInMemory
from difftrain.evaluation.slots import METRICS, badness

REFUSING = dict.fromkeys(("fid", "kid", "sfid", "inception_score"), "inception") | {
    "cmmd": "clip",
    "clip_score": "clip",
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def image_set(outputs: Mapping[str, Tensor], labels: Tensor | None = None) -> FeatureSet:
    return FeatureSet({name: RowsInMemory(rows) for name, rows in outputs.items()}, labels)


def drawn(count: int, seed: int, shift: float = 0.0) -> FeatureSet:
    """Every output, from normal distributions, and labels that shift the features."""
    labels = torch.arange(count) % 4
    features = normal(count, 6, seed=seed) + shift + labels[:, None]
    nearest = torch.stack(
        [normal(count, seed=seed + 1).double().abs(), torch.arange(count).double()], dim=1
    )
    return image_set(
        {
            "features": features,
            "logits": normal(count, 4, seed=seed + 2),
            "spatial": normal(count, 5, seed=seed + 3) + shift,
            "text": features + normal(count, 6, seed=seed + 4),
            "nearest": nearest,
        },
        labels,
    )


def drawn_evidence(name: str = "pixels", **preset: int) -> Evidence:
    return Evidence(drawn(150, 10, shift=0.3), drawn(120, 20), drawn(300, 30), name, 0, preset)


EVIDENCE = drawn_evidence()
SOME = {
    "kid": {"subset_size": 40},
    "frechet_distance": {"subsets": 3, "extrapolate": True},
    "fid": {"extrapolate": True},
    "kernel_distance": {"subsets": 5, "subset_size": 30},
}


# Other tests register metrics of their own.
BUILT_IN = sorted(
    name
    for name, constructor in METRICS.constructors.items()
    if constructor.__module__.startswith("difftrain.")
)


def every_score(evidence: Evidence) -> dict:
    """The scores of every built-in metric, each under the features that it asks for."""
    scores = {}
    for name in BUILT_IN:
        metric = METRICS.parse({"type": name, **SOME.get(name, {})}, "metrics.0").build()
        found = metric(dataclasses.replace(evidence, features_name=REFUSING.get(name, "pixels")))
        assert set(found) == set(metric.scores)
        scores |= found
    return scores


def test_every_metric_gives_finite_json_scores_of_a_known_direction():
    scores = every_score(EVIDENCE)

    assert all(math.isfinite(score["value"]) for score in scores.values())
    assert json.loads(json.dumps(scores, allow_nan=False)) == scores
    assert all(score.get("features", "classifier") for score in scores.values())


BETTER = {
    "lower": [
        "frechet_distance",
        "frechet_distance_infinity",
        "fid",
        "fid_infinity",
        "sfid",
        "kernel_distance",
        "kid",
        "gaussian_mmd",
        "cmmd",
    ],
    "higher": [
        "precision",
        "recall",
        "density",
        "coverage",
        "classifier_score",
        "inception_score",
        "clip_score",
        "class_agreement",
    ],
    "near 1": ["nearest_neighbour_ratio"],
}
TITLES = {
    "frechet_distance": "Fréchet distance",
    "fid": "FID",
    "sfid": "sFID",
    "fid_infinity": "FID (extrapolated)",
    "kid": "KID",
    "cmmd": "CMMD",
    "kernel_distance": "Kernel distance",
    "precision": "Precision",
    "nearest_neighbour_ratio": "Nearest neighbour ratio",
}


def test_each_metric_says_which_way_its_scores_are_better_and_what_they_are_called():
    better, titles = {}, {}
    for name in BUILT_IN:
        metric = METRICS.parse({"type": name, **SOME.get(name, {})}, "metrics.0").build()
        better |= {score: metric.better_of(score) for score in metric.scores}
        titles |= {score: metric.title_of(score) for score in metric.scores}

    assert better == {score: way for way, scores in BETTER.items() for score in scores}
    assert {score: titles[score] for score in TITLES} == TITLES


@pytest.mark.parametrize(
    ("better", "values"),
    [("lower", [0.1, 0.5, 2]), ("higher", [2, 0.5, 0.1]), ("near 1", [1.1, 0.7, 2])],
)
def test_badness_is_smaller_for_better_values(better, values):
    turned = [badness(better, value) for value in values]

    assert turned == sorted(turned)


@pytest.mark.parametrize(("name", "only"), REFUSING.items())
def test_a_published_name_is_refused_for_other_features(name, only):
    instead = {
        "fid": "Write frechet_distance",
        "kid": "Write kernel_distance",
        "cmmd": "Write gaussian_mmd",
    }.get(name, "Write ")

    with pytest.raises(
        InputError,
        match=f"'{name}' is defined for features '{only}' alone, but the features are 'pixels'. "
        f"{instead}",
    ):
        METRICS.parse(name, "m").build()(EVIDENCE)


def test_values_are_those_of_the_functions():
    reference, generated = (
        s.outputs["features"].rows for s in (EVIDENCE.reference, EVIDENCE.generated)
    )

    assert FrechetDistance()(EVIDENCE)["frechet_distance"]["value"] == frechet_distance(
        reference, generated
    )
    assert KernelDistance(degree=2)(EVIDENCE)["kernel_distance"]["value"] == kernel_distance(
        reference, generated, 2
    )
    assert GaussianMmd(sigma=2.0, scale=3.0)(EVIDENCE)["gaussian_mmd"][
        "value"
    ] == 3 * gaussian_discrepancy(reference, generated, 2.0)
    scores = PrecisionRecall(neighbours=4)(EVIDENCE)
    assert (scores["precision"]["value"], scores["recall"]["value"]) == precision_recall(
        reference, generated, 4
    )
    scores = DensityCoverage(neighbours=4)(EVIDENCE)
    assert (scores["density"]["value"], scores["coverage"]["value"]) == density_coverage(
        reference, generated, 4
    )


def test_the_published_names_give_the_general_scores_of_their_features():
    inception, clip = (
        dataclasses.replace(EVIDENCE, features_name=name) for name in ("inception", "clip")
    )

    assert Fid()(inception)["fid"] == FrechetDistance()(inception)["frechet_distance"]
    kid = Kid(subset_size=30)(inception)["kid"]
    assert kid == KernelDistance(subsets=100, subset_size=30)(inception)["kernel_distance"]
    assert Cmmd()(clip)["cmmd"].items() <= GaussianMmd()(clip)["gaussian_mmd"].items()
    assert (
        InceptionScore()(inception)["inception_score"]
        == ClassifierScore()(inception)["classifier_score"]
    )


def test_cmmd_is_a_thousand_times_the_v_statistic_on_the_sphere():
    x, y = (s.outputs["features"].rows.double() for s in (EVIDENCE.reference, EVIDENCE.generated))
    x, y = (rows / rows.norm(dim=1, keepdim=True) for rows in (x, y))

    def mean(a: Tensor, b: Tensor) -> Tensor:
        return (-(a[:, None] - b[None]).square().sum(dim=2) / 200).exp().mean()

    found = Cmmd()(dataclasses.replace(EVIDENCE, features_name="clip"))["cmmd"]["value"]
    assert (
        abs(found - float(1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y)))) < 1e-11
    )  # 1000 times rounding


def test_the_spatial_distance_is_that_of_the_spatial_rows():
    score = Sfid()(dataclasses.replace(EVIDENCE, features_name="inception"))["sfid"]
    spatial = [s.outputs["spatial"].rows for s in (EVIDENCE.generated, EVIDENCE.reference)]

    assert score["value"] == frechet_distance(*spatial)
    assert 0 < score["floor"] < score["value"]


def test_settings_come_from_the_protocol_unless_they_are_given():
    evidence = drawn_evidence(
        "inception",
        kid_subsets=7,
        kid_subset_size=20,
        kid_degree=2,
        pr_neighbours=6,
        is_split_size=40,
    )

    kid = Kid()(evidence)["kid"]
    assert (kid["subsets"], kid["subset_size"], kid["degree"]) == (7, 20, 2)
    reference, generated = (
        s.outputs["features"].rows for s in (evidence.reference, evidence.generated)
    )
    assert kid["value"] == float(kernel_distances(reference, generated, 7, 20, 2).mean())
    assert kid["std"] == float(kernel_distances(reference, generated, 7, 20, 2).std(correction=0))
    assert KernelDistance(subsets=0, degree=3)(evidence)["kernel_distance"][
        "value"
    ] == kernel_distance(reference, generated)
    assert PrecisionRecall()(evidence)["recall"]["neighbours"] == 6
    assert PrecisionRecall(neighbours=2)(evidence)["recall"]["neighbours"] == 2
    assert InceptionScore()(evidence)["inception_score"]["splits"] == 4  # of 40, 40, 40 and 30
    assert Kid(subset_size=40)(drawn_evidence("inception"))["kid"]["subsets"] == 100


def test_a_reference_of_statistics_has_a_value_and_no_floor():
    known = moments_of(EVIDENCE.reference.outputs["features"])
    counted = dataclasses.replace(
        EVIDENCE, reference=FeatureSet({}, known={"features": known}), training=None
    )
    score = FrechetDistance()(counted)["frechet_distance"]
    whole = FrechetDistance()(EVIDENCE)["frechet_distance"]

    assert score == {key: whole[key] for key in ("value", "count", "reference_count", "features")}
    published = Moments.known(known.mean, known.cov, None)
    score = FrechetDistance()(
        dataclasses.replace(counted, reference=FeatureSet({}, known={"features": published}))
    )["frechet_distance"]
    assert score["reference_count"] is None
    assert score["value"] == pytest.approx(whole["value"], abs=1e-12)


def unit_gaussian(num_features: int) -> FeatureSet:
    eye = torch.eye(num_features, dtype=torch.float64)
    moments = Moments.known(torch.zeros(num_features), eye, 10**9)
    return FeatureSet({}, known={"features": moments})


def of_gaussian(generated: Tensor, reference: FeatureSet, **settings: object) -> dict:
    return FrechetDistance(**settings)(
        Evidence(image_set({"features": generated}), reference, None, "pixels", 0)
    )


def test_the_extrapolated_distance_is_nearer_to_the_true_one_and_its_slope_is_the_bias():
    shift = torch.tensor([1.0, 0, 0, 0, 0, 0])  # the true distance: 1
    found = [
        of_gaussian(normal(400, 6, seed=s) + shift, unit_gaussian(6), extrapolate=True)
        for s in range(40)
    ]
    value, limit = (
        np.array([scores[name]["value"] for scores in found])
        for name in ("frechet_distance", "frechet_distance_infinity")
    )
    slope = np.mean([scores["frechet_distance_infinity"]["slope"] for scores in found])

    # At N images the mean is off by D / N and the covariance's root by D (D + 1) / 4 N: 16.5 / N,
    # 0.041 here.
    assert abs(value.mean() - 1 - 16.5 / 400) < 4 * value.std() / 40**0.5
    assert abs(limit.mean() - 1) < 4 * limit.std() / 40**0.5
    assert abs(slope - 16.5) < 4
    points = found[0]["frechet_distance_infinity"]["points"]
    assert (len(points), points[0]["count"], points[-1]) == (
        15,
        40,
        {"count": 400, "value": value[0]},
    )


def test_the_fit_is_numpys():
    score = of_gaussian(normal(200, 3), unit_gaussian(3), extrapolate=True)[
        "frechet_distance_infinity"
    ]
    line = np.polyfit(
        [1 / point["count"] for point in score["points"]],
        [point["value"] for point in score["points"]],
        1,
    )

    assert (score["slope"], score["value"]) == pytest.approx(tuple(line), rel=1e-9)


def test_the_standard_error_of_disjoint_subsets_is_that_of_repetitions():
    shift = torch.tensor([1.0, 0, 0])
    found = [
        of_gaussian(normal(600, 3, seed=s) + shift, unit_gaussian(3), subsets=10, splits=1)[
            "frechet_distance"
        ]
        for s in range(60)
    ]
    spread = np.std([score["value"] for score in found], ddof=1)

    assert found[0]["subsets"]["count"] == 60
    assert found[0]["subsets"]["standard_error"] == pytest.approx(
        found[0]["subsets"]["std"] / 10**0.5
    )
    # 60 repetitions tell their spread to 1 / sqrt(120) = 9 %; four of these.
    assert np.mean([score["subsets"]["standard_error"] for score in found]) == pytest.approx(
        spread, rel=0.4
    )
    assert (
        np.mean([score["subsets"]["mean"] - score["value"] for score in found]) > 0
    )  # the bias of fewer images


def test_too_few_images_are_refused_with_the_number_that_is_needed():
    generated = dataclasses.replace(EVIDENCE, generated=drawn(20, 1))
    for metric, message in (
        (
            FrechetDistance(extrapolate=True),
            "20 generated samples are too few for 6 features. Give at least 24",
        ),
        (
            FrechetDistance(subsets=11),
            "20 generated samples are too few: this score needs at least 22",
        ),
        (FrechetDistance(subsets=1), "subsets: 1 has no spread"),
        (KernelDistance(subsets=5), "120 reference samples are too few for subsets of 1000"),
        (
            PrecisionRecall(neighbours=20),
            "20 generated samples are too few: this score needs at least 21",
        ),
        (
            ClassifierScore(splits=21),
            "20 generated samples are too few: this score needs at least 21",
        ),
    ):
        with pytest.raises(InputError, match=message):
            metric(generated)
    with pytest.raises(
        InputError, match="1 generated samples are too few: this score needs at least 2"
    ):
        FrechetDistance()(dataclasses.replace(EVIDENCE, generated=drawn(1, 1)))
    with pytest.raises(
        InputError,
        match="3 real samples are too few for the floor of a distance: it needs at least 4",
    ):
        FrechetDistance()(dataclasses.replace(EVIDENCE, reference=drawn(3, 1), training=None))


@pytest.mark.parametrize("whose", ["generated", "reference"])
@pytest.mark.parametrize(
    "metric",
    [FrechetDistance(), KernelDistance(), GaussianMmd(), PrecisionRecall(), DensityCoverage()],
)
def test_broken_features_are_counted_and_named(metric, whose):
    rows = normal(1500, 6)
    rows[[3, 1400]] = float("nan")
    evidence = dataclasses.replace(EVIDENCE, **{whose: image_set({"features": rows})})

    with pytest.raises(
        InputError, match=rf"{whose} features: 2 of 1500 rows are not finite \(samples 3, 1400\)"
    ):
        metric(evidence)


def with_generated(
    name: str = "pixels", labels: Tensor | None = None, **outputs: Tensor
) -> Evidence:
    return Evidence(image_set(outputs, labels), EVIDENCE.reference, None, name, 0)


def test_class_agreement_is_the_share_of_labels_that_were_met():
    predicted = torch.tensor([0, 1, 7, 3, 4])
    evidence = with_generated(
        "digits_classifier", torch.arange(5), logits=5 * torch.eye(8)[predicted] - 2
    )

    assert ClassAgreement()(evidence) == {
        "class_agreement": {"value": 0.8, "count": 5, "classifier": "digits_classifier"}
    }


def test_a_classifier_of_fewer_classes_judges_no_labels():
    evidence = with_generated(
        "classifier", torch.arange(5) % 3, logits=torch.eye(2)[[0, 1, 0, 1, 1]]
    )

    with pytest.raises(InputError, match=r"have the class 2, but the classifier .* classes 0 to 1"):
        ClassAgreement()(evidence)


def test_sure_and_varied_predictions_score_the_number_of_classes_and_equal_ones_score_one():
    sure = 1000 * torch.eye(5).repeat(20, 1)

    def score(logits: Tensor, **settings: object) -> dict:
        return ClassifierScore(**settings)(with_generated(logits=logits))["classifier_score"]

    assert score(sure, splits=1)["value"] == pytest.approx(5, abs=1e-12)
    assert score(sure, split_size=5, shuffle=False)["value"] == pytest.approx(5, abs=1e-12)
    assert score(sure.sort(dim=0).values[:, :1].expand(-1, 5), splits=2)["value"] == pytest.approx(
        1, abs=1e-12
    )
    assert score(1000 * torch.eye(5).repeat_interleave(20, dim=0), split_size=20, shuffle=False)[
        "value"
    ] == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(
    "settings", [{"splits": 4}, {"splits": 3}, {"split_size": 30}, {"split_size": 500}]
)
def test_the_classifier_score_is_its_definition(settings):
    logits = 3 * normal(90, 4)
    p = torch.softmax(logits.double(), dim=1).numpy()
    size = settings.get("split_size")
    parts = (
        [p[i : i + size] for i in range(0, 90, size)]
        if size
        else np.array_split(p, settings["splits"])
    )
    expected = [
        np.exp(np.mean([sum(row * np.log(row / part.mean(0))) for row in part])) for part in parts
    ]

    found = ClassifierScore(shuffle=False, **settings)(with_generated(logits=logits))[
        "classifier_score"
    ]
    assert found["value"] == pytest.approx(np.mean(expected), abs=1e-12)
    assert found["std"] == pytest.approx(np.std(expected), abs=1e-12)
    assert found["splits"] == len(parts)


def test_images_are_shuffled_before_they_are_split():
    sorted_by_class = with_generated(logits=1000 * torch.eye(5).repeat_interleave(40, dim=0))

    assert ClassifierScore(splits=5)(sorted_by_class)["classifier_score"]["value"] > 4.5
    with pytest.raises(InputError, match="splits and split_size both say how many"):
        ClassifierScore(splits=5, split_size=3)(sorted_by_class)


def test_clip_score_cuts_the_cosine_of_each_pair_at_zero():
    images = torch.tensor([[1.0, 0], [3, 0], [0, 2], [1, 1]])
    prompts = torch.tensor([[5.0, 0], [-1, 0], [1, 0], [0, 7]])
    found = ClipScore()(with_generated("clip", features=images, text=prompts))["clip_score"]

    values = np.array([100, 0, 0, 100 / 2**0.5])  # the second pair's cosine is -1
    assert found["value"] == pytest.approx(values.mean(), abs=1e-12)
    assert found["standard_error"] == pytest.approx(values.std(ddof=1) / 2, abs=1e-12)


def nearest(*distances: float) -> Tensor:
    """[distance, index] rows, the index counted from 100 down."""
    return torch.stack(
        [torch.tensor(distances, dtype=torch.float64), 100 - torch.arange(len(distances)).double()],
        dim=1,
    )


def ratio(generated: Tensor, reference: Tensor) -> dict:
    evidence = with_generated(nearest=generated)
    return NearestNeighbourRatio()(
        dataclasses.replace(evidence, reference=image_set({"nearest": reference}))
    )["nearest_neighbour_ratio"]


def test_nearest_neighbour_ratio_is_that_of_the_mean_distances():
    found = ratio(nearest(1, 2, 3), nearest(4, 8))

    assert (found["value"], found["generated"], found["reference"]) == (2 / 6, 2, 6)
    assert ratio(nearest(0, 0), nearest(1, 2))["value"] == 0


def test_the_worst_are_the_nearest_first_with_their_training_image():
    found = ratio(nearest(*(abs(i - 15.25) for i in range(30))), nearest(1))

    assert [case["index"] for case in found["worst"]] == [15, 16, 14, 17, 13, 18, 12, 19, 11, 20]
    assert found["worst"][0] == {"index": 15, "distance": 0.25, "training": 85}


def test_images_nearer_than_the_nearest_held_out_ones_are_counted():
    reference = nearest(*range(1, 202))  # the 1 % quantile: 3

    assert ratio(nearest(0, 2.9, 3, 3.1), reference)["near"] == pytest.approx(3, abs=1e-12)
    assert ratio(nearest(0, 2.9, 3.1, 50), reference)["share_near"] == 0.5


def test_a_reference_of_training_images_is_refused():
    with pytest.raises(InputError, match="every reference image is a training image too"):
        ratio(nearest(1, 2), nearest(0, 0))


def on_one_process(rank: int, folder: str) -> None:
    """What each of two processes does; its findings are left in `folder`."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    torch.set_num_threads(1)
    try:
        broken = drawn(300, 30)
        broken.outputs["features"].rows[[7, 250]] = float("nan")
        with pytest.raises(InputError) as error:
            FrechetDistance(splits=1)(dataclasses.replace(drawn_evidence(), training=broken))
        torch.save(
            {"scores": every_score(drawn_evidence()), "message": str(error.value)},
            f"{folder}/{rank}.pt",
        )
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.distributed
def test_two_processes_find_what_one_finds(tmp_path):
    on_processes(on_one_process, 2, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    alone = every_score(drawn_evidence())

    assert first == second  # bit for bit
    assert "training features: 2 of 300 rows are not finite (samples 7, 250)" in first["message"]
    for name, score in alone.items():
        merged_in_parts = "frechet" in name or "fid" in name  # sums in another order
        assert first["scores"][name]["value"] == pytest.approx(
            score["value"], rel=1e-11 if merged_in_parts else 1e-15
        )
        assert first["scores"][name].keys() == score.keys()


# Arguments that cannot work


SCORED = {
    "features": "pixels",
    "reference": {"type": "digits", "part": "held_out"},
    "num_samples": 20,
}


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (
            {"type": "kernel_distance", "subsets": 2, "subset_size": 1},
            "metric 'kernel_distance': subset_size: 1 has no pairs. Write at least 2",
        ),
        (
            {"type": "kernel_distance", "subsets": 10**8, "subset_size": 2},
            "metric 'kernel_distance': subsets: 100000000 would take days. Write at most 10000",
        ),
        (
            {"type": "kernel_distance", "degree": 100000},
            "metric 'kernel_distance': degree: 100000 overflows. Write at most 32",
        ),
        ({"type": "frechet_distance", "subsets": 1}, "subsets: 1 has no spread. Write subsets: 10"),
        ({"type": "gaussian_mmd", "sigma": 1e300}, "sigma: 1e+300 is outside 1e-06 to 1e+06"),
        ({"type": "gaussian_mmd", "sigma": 1e-200}, "sigma: 1e-200 is outside 1e-06 to 1e+06"),
        (
            {"type": "kernel_distance", "subsets": 2, "subset_size": 50},
            "needs at least 50 generated samples, and there are 20",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_arguments_that_cannot_work_are_refused_before_training(tmp_path, metric, message):
    scored = {**SCORED, "metrics": [metric]}
    in_loop = {
        "every": 1,
        "num_samples": 20,
        "reference": {"type": "digits", "part": "classifier"},
        "metrics": [metric],
    }
    both = {**SCORED, "metrics": ["precision_recall"], "in_loop": in_loop}

    assert message in refused("check", tiny(tmp_path / "final", evaluation=scored))
    assert message in refused("check", tiny(tmp_path / "in_loop", evaluation=both))


def test_one_metric_twice_is_refused_before_training(tmp_path):
    scored = {**SCORED, "metrics": ["frechet_distance", "frechet_distance"]}

    message = refused("check", tiny(tmp_path, evaluation=scored))

    assert "the score 'frechet_distance' is there already. List each metric once." in message


def test_more_parts_than_samples_are_refused_and_two_ways_to_give_them():
    with pytest.raises(InputError, match=r"splits: 30, but 20 samples are generated. Write splits"):
        ClassifierScore(splits=30).check(20, {})
    with pytest.raises(InputError, match="splits and split_size both say"):
        ClassifierScore(splits=3, split_size=5).check(20, {})
    ClassifierScore().check(20, {})


@pytest.mark.parametrize(
    ("score", "named"),
    [
        ({"value": float("nan")}, "value"),
        ({"value": 1.0, "floor": float("inf")}, "floor"),
        ({"value": 1.0, "subsets": {"std": float("nan")}}, "subsets.std"),
        ({"value": 1.0, "points": [{"value": -float("inf")}]}, "points.0.value"),
    ],
)
def test_a_number_that_is_not_finite_is_no_score(score, named):
    class Broken(ClassAgreement):
        scores = ("broken",)

    with pytest.raises(InputError, match=f"gave {named} of broken that is not finite"):
        described_scores(Broken(), {"broken": score})
    assert described_scores(Broken(), {"broken": {"value": 1.0, "floor": None}})
