"""What diagnostics look at: tensors as well as images, with and without training data."""

import dataclasses
import json
from dataclasses import dataclass

import pytest
import torch
from helpers.subjects import COSINE, UNCONDITIONAL, gaussian_subject, gaussian_x0, subject
from helpers.support import Gaussian, assert_close

from difftrain.core.errors import InputError
from difftrain.data.items import Images
from difftrain.diagnostics.base import DIAGNOSTICS, Clean, Diagnostic
from difftrain.diagnostics.denoising_error import DenoisingError
from difftrain.diagnostics.prediction_error import PredictionError
from difftrain.models.conditioning.classes import ClassConditioning
from difftrain.objective.variance import LearnedRange

CPU = torch.device("cpu")
DATA = Gaussian(0.3, 0.7)
QUICK = {
    "denoising_error": {"num": 40, "num_timesteps": 3},
    "prediction_error": {"num": 110, "num_timesteps": 2, "images": "held_out"},
    "exposure_bias": {"num": 40, "steps": 3},
    "cumulative_error": {"num": 40, "steps": 4, "num_timesteps": 2},
    "smoothness": {"num": 3, "steps": 3},
    "inversion": {"num": 5, "steps": 3},
}
OF_IMAGES = ["smoothness", "inversion"]


def diagnostic(name):
    return DIAGNOSTICS.parse({"type": name, **QUICK[name]}, "diagnostics").build()


def points(num=120, labels=None, **more):
    """The perfect network of Gaussian points [N, 3], and such points."""
    values = gaussian_x0(DATA, num).flatten(1)[:, :3]
    clean = Clean.of_tensors(values, labels, CPU)
    network = DATA.denoiser("v_prediction", COSINE)
    return subject(network, values, kind="v_prediction", held_out=clean, **more)


def test_the_quick_ones_are_all():
    assert set(QUICK) == set(DIAGNOSTICS.constructors)
    assert [name for name in QUICK if diagnostic(name).needs_images] == OF_IMAGES


@pytest.mark.parametrize("name", [name for name in QUICK if name not in OF_IMAGES])
def test_what_needs_no_images_is_measured_of_tensors(name):
    of = points()
    diagnostic(name).check(of)
    found = diagnostic(name)(of)

    assert isinstance(found["value"], float)
    assert found["protocol"]["shape"] == [3]
    assert found["protocol"]["arguments"].items() >= QUICK[name].items()
    json.dumps(found, allow_nan=False)


def test_the_error_of_points_is_that_of_the_same_numbers_as_images():
    flat = points()
    as_images = subject(
        flat.denoiser, flat.held_out.x0(range(120)).reshape(120, 3, 1, 1), kind="v_prediction"
    )
    found = [DenoisingError(num_timesteps=4)(of)["held_out"] for of in (flat, as_images)]

    for kind in ("loss", "x0_error", "eps_error"):
        assert_close(
            found[0][kind], found[1][kind], relative=1e-5
        )  # float32 noise of another shape


@pytest.mark.parametrize("name", OF_IMAGES)
def test_what_compares_images_refuses_tensors(name):
    for refusal in (diagnostic(name).check, diagnostic(name)):
        with pytest.raises(InputError, match="compares images, but the samples are tensors"):
            refusal(points())


def test_clean_tensors_are_float32_and_know_what_they_are():
    values, labels = torch.arange(12.0).reshape(4, 3).double(), torch.arange(4)
    clean = Clean.of_tensors(values, labels, CPU)

    assert (len(clean), clean.items) == (4, "tensors")
    assert torch.equal(clean.x0([2, 0]), values[[2, 0]].float())
    assert torch.equal(clean.spread(2).x0([0, 1]), values[[0, 2]].float())
    assert (clean.spread(2).items, clean.spread(2).labels.tolist()) == ("tensors", [0, 2])
    images = Images(torch.zeros(2, 1, 3, 3, dtype=torch.uint8), None)
    assert Clean.of_images(images, None, CPU).items == "images"


def test_without_training_data_the_gap_is_left_out_and_what_needs_it_refuses():
    of = gaussian_subject(DATA, 120)
    found = DenoisingError(num=40, num_timesteps=3)(of)

    assert (
        found["held_out"]
        == DenoisingError(num=40, num_timesteps=3)(dataclasses.replace(of, training=of.held_out))[
            "held_out"
        ]
    )
    assert {"gap", "gap_standard_error", "training"}.isdisjoint(found)
    assert "num_training_images" not in found["protocol"]
    for given, reason in (
        ({}, "the training data is a stream, or it is not there"),
        ({"why_no_training": "the folder /data/cats is gone"}, "the folder /data/cats is gone"),
    ):
        with pytest.raises(
            InputError, match=f"training images, but {reason}. Write images: held_o"
        ):
            PredictionError().check(dataclasses.replace(of, **given))


def test_guidance_moves_the_output_away_from_that_without_a_label():
    """The output is its label: guided it is null + g (label - null)."""

    def network(x, time, cond):
        label = cond["class_labels"].to(x).reshape(-1, 1, 1, 1).expand_as(x)
        return torch.cat([label, label], dim=1)

    classes = ClassConditioning(3, 4, 0.1)
    labels, x = torch.tensor([0, 2]), torch.zeros(2, 1, 2, 4)
    of = subject(network, x, labels=labels, conditioning=classes)
    of = dataclasses.replace(of, variance=LearnedRange())

    assert of.output(x, 5, labels)[:, 0, 0, 0].tolist() == [0, 2]
    assert of.output(x, 5, labels, guidance=2.5)[:, 0, 0, 0].tolist() == [3 - 7.5, 3 - 2.5]


def test_a_diagnostic_of_ones_own_needs_no_more_than_its_call():
    @dataclass(frozen=True)
    class MeanNorm(Diagnostic):
        num: int = 10

        def __call__(self, subject):
            clean = subject.held_out.spread(self.num)
            value = float(clean.x0(range(len(clean))).norm())
            return {"value": value, "protocol": subject.protocol(self, clean)}

    of = gaussian_subject(DATA, 20, described={"step": 3})
    MeanNorm().check(of)
    MeanNorm().check(points(20))

    assert MeanNorm()(of)["protocol"] == {
        "step": 3,
        "shape": [1, 2, 4],
        "arguments": {},
        "num_images": 10,
    }
    assert of.conditioning is UNCONDITIONAL
