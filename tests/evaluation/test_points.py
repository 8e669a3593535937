"""Evaluation of tensors: points of Gaussians, whose distances have closed forms."""

import math
from pathlib import Path

import pytest
import torch
from helpers.images import Held, all_samples, random_images
from torch import Tensor

from difftrain.core.errors import InputError
from difftrain.data.items import MapDataset, TensorItem
from difftrain.data.subset import Subset
from difftrain.evaluation.evaluator import Evaluator
from difftrain.evaluation.features.raw import Pixels, Values
from difftrain.evaluation.metrics.frechet import FrechetDistance
from difftrain.evaluation.metrics.kernel import GaussianMmd, KernelDistance
from difftrain.evaluation.metrics.memorization import NearestNeighbourRatio
from difftrain.evaluation.metrics.neighbours import DensityCoverage, PrecisionRecall
from difftrain.evaluation.slots import FEATURES
from difftrain.evaluation.sources import DatasetImages, DatasetTensors


class Points(MapDataset):
    """Points [N, ...] in memory, with labels if there are any."""

    def __init__(self, values: Tensor, labels: Tensor | None = None):
        self.values, self.labels = values, labels
        self.item_shape = tuple(values.shape[1:])

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, i: int) -> TensorItem:
        label = None if self.labels is None else int(self.labels[i])
        return TensorItem(self.values[i], label, name=f"point {i}")


def with_moments(num: int, mean: Tensor, cov: Tensor, seed: int) -> Tensor:
    """Points [num, 2] float64 with exactly this mean and covariance (ddof 1)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num, 2, generator=generator, dtype=torch.float64)
    x = x - x.mean(dim=0)
    white = x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T)).T)
    return white @ torch.linalg.cholesky(cov).T + mean


def f64(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


MEANS = f64([0.3, -1.0]), f64([1.3, 0.5])
COVS = f64([2.0, 0.6], [0.6, 0.5]), f64([1.0, -0.2], [-0.2, 0.7])
REFERENCE = with_moments(300, MEANS[0], COVS[0], seed=0)
GENERATED = with_moments(200, MEANS[1], COVS[1], seed=1).float()


def evaluator(folder: Path, *metrics, **changes) -> Evaluator:
    given = {
        "reference": DatasetTensors(Points(REFERENCE)),
        "training": None,
        "features": Values((2,)),
        "folder": folder,
        "seed": 0,
    }
    return Evaluator(metrics=metrics, **(given | changes))


def closed_form(means: tuple[Tensor, Tensor], covs: tuple[Tensor, Tensor]) -> float:
    """|m1 - m2|^2 + Tr S1 + Tr S2 - 2 Tr sqrt(S1 S2) in two dimensions.

    There Tr sqrt(A) = sqrt(Tr A + 2 sqrt(det A)).
    """
    product = covs[0] @ covs[1]
    root = math.sqrt(float(product.trace()) + 2 * math.sqrt(float(torch.linalg.det(product))))
    apart = float((means[0] - means[1]).square().sum())
    return apart + float(covs[0].trace() + covs[1].trace()) - 2 * root


def test_the_frechet_distance_of_points_is_that_of_their_gaussians(tmp_path):
    found = evaluator(tmp_path, FrechetDistance())(Held(GENERATED))

    # Features are float32: moments of about 1 are off by some 2^-24.
    score = found.scores["frechet_distance"]
    assert score["value"] == pytest.approx(closed_form(MEANS, COVS), abs=1e-6)
    assert (score["features"], score["count"], score["reference_count"]) == ("values", 200, 300)
    assert found.protocol["features"] == {"type": "values", "samples": [2]}
    assert found.num_samples == 200


def test_every_distance_works_on_points(tmp_path):
    metrics = (
        FrechetDistance(),
        KernelDistance(),
        GaussianMmd(sigma=1.0, normalised=False),
        PrecisionRecall(),
        DensityCoverage(),
    )
    far = evaluator(tmp_path, *metrics)(Held(GENERATED + 100)).scores
    equal = evaluator(tmp_path, *metrics)(Held(REFERENCE.float())).scores

    assert equal["frechet_distance"]["value"] == pytest.approx(0, abs=1e-6)
    assert equal["gaussian_mmd"]["value"] == pytest.approx(0, abs=1e-9)
    assert [equal[name]["value"] for name in ("precision", "recall", "coverage")] == [1, 1, 1]
    assert [far[name]["value"] for name in ("precision", "recall", "density", "coverage")] == [
        0
    ] * 4
    assert far["kernel_distance"]["value"] > 1e6


def test_the_floor_of_points_draws_on_training_points_too(tmp_path):
    training = DatasetTensors(Points(with_moments(500, MEANS[0], COVS[0], seed=2)))
    found = evaluator(tmp_path, FrechetDistance(), training=training)(Held(GENERATED))

    assert found.scores["frechet_distance"]["floor_count"] == 200
    assert 0 < found.scores["frechet_distance"]["floor"] < 0.1
    assert found.protocol["training"]["count"] == 256  # whole blocks of what the floor needs


def test_the_memorization_check_of_points_is_left_out_with_a_reason(tmp_path):
    training = DatasetTensors(Points(REFERENCE))
    found = evaluator(
        tmp_path, FrechetDistance(), training=training, added_metrics=[NearestNeighbourRatio()]
    )(Held(GENERATED))

    assert found.left_out == {"nearest_neighbour_ratio": "the samples are not images"}
    with pytest.raises(InputError, match=r"'nearest_neighbour_ratio' needs nearest: .*are images"):
        evaluator(tmp_path, NearestNeighbourRatio(), training=training)(Held(GENERATED))


def test_features_of_images_and_of_tensors_are_not_mixed_up(tmp_path):
    images = Held(random_images(9, 0))
    with pytest.raises(
        InputError,
        match=r"'pixels' look at images, but the generated samples are tensors. Write "
        r"features: {type: values}",
    ):
        evaluator(tmp_path, FrechetDistance(), features=Pixels((1, 8, 8)))(Held(GENERATED))
    with pytest.raises(InputError, match="'values' look at tensors, but the generated samples are"):
        evaluator(tmp_path, FrechetDistance(), features=Values((1, 8, 8)))(images)
    with pytest.raises(InputError, match="but the reference samples are images"):
        evaluator(tmp_path, FrechetDistance(), reference=images)(Held(GENERATED))
    with pytest.raises(InputError, match="'pixels' take uint8 images"):
        Pixels((2,)).extract(GENERATED)


def test_values_are_the_samples_flattened():
    samples = torch.arange(24.0).reshape(2, 3, 4).double()
    values = FEATURES.parse("values", "features").build(shape=(3, 4), device="cpu")

    assert torch.equal(values.extract(samples)["features"], samples.flatten(1).float())
    assert values.widths == {"features": 12}
    assert Values(()).widths == {"features": 1}
    assert Values(()).extract(torch.ones(5))["features"].shape == (5, 1)


@pytest.mark.parametrize("samples", [torch.zeros(2, 3), torch.zeros(2, 2, dtype=torch.uint8)])
def test_other_samples_are_refused(samples):
    with pytest.raises(InputError, match=r"'values' take floating-point tensors \[N, 2\], got"):
        Values((2,)).extract(samples)


def test_a_data_set_of_tensors_is_read_in_blocks_as_float32():
    source = DatasetTensors(Points(REFERENCE, torch.arange(300) % 4))
    block, last = source.blocks([[3, 4, 5], [299]])

    assert (len(source), source.shape, source.items_are) == (300, (2,), "tensors")
    assert torch.equal(block.samples, REFERENCE[3:6].float())
    assert block.labels.tolist() == [3, 0, 1]
    assert torch.equal(last.samples, REFERENCE[299:].float())
    assert torch.equal(all_samples(source), REFERENCE.float())
    assert DatasetTensors(Points(REFERENCE)).has_labels is False


def test_other_values_are_another_set():
    changed = REFERENCE.clone()
    changed[0, 0] += 1
    sets = [DatasetTensors(Points(values)) for values in (REFERENCE, REFERENCE.clone(), changed)]
    first, same, other = (source.identity() for source in sets)

    assert first == same
    assert first != other
    assert DatasetTensors(Subset(Points(REFERENCE), range(100))).identity() != first


def test_what_is_no_set_of_tensors_of_one_shape_is_refused(tmp_path):
    class Ragged(Points):
        def __getitem__(self, i):
            return TensorItem(torch.zeros(3 if i == 5 else 2))

    with pytest.raises(
        InputError, match=r"row 5 has the shape \[3\], but the first sample has \[2\]"
    ):
        all_samples(DatasetTensors(Ragged(REFERENCE)))
    with pytest.raises(InputError, match="the data set has no items"):
        DatasetTensors(Points(REFERENCE[:0]))
    with pytest.raises(InputError, match="evaluation: the data set yields tensors"):
        DatasetImages(Points(REFERENCE))

    class Pictures(Points):
        def __init__(self):
            super().__init__(REFERENCE)
            self.item_shape = None

    with pytest.raises(
        InputError, match="expected a data set of tensors, but its items are images"
    ):
        DatasetTensors(Pictures())
