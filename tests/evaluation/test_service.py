"""Scores for loops of one's own: the same as by the distances alone, and on two processes."""

import json
import runpy

import numpy as np
import PIL.Image
import pytest
import torch
from helpers.images import all_samples, random_images, written
from helpers.places import ROOT
from helpers.several import run_program
from helpers.support import golden

from difftrain.core.errors import InputError
from difftrain.data.datasets.digits import Digits
from difftrain.data.datasets.image_folder import ImageFolder
from difftrain.data.transform import Transform
from difftrain.evaluation import Resizing, fid, frechet_distance, kernel_distance, score
from difftrain.evaluation.features import inception_weights
from difftrain.evaluation.features.inception import Inception
from difftrain.evaluation.features.inception_weights import digest_of_file
from difftrain.evaluation.metrics.kernel import KernelDistance
from difftrain.evaluation.service import as_pixels
from difftrain.evaluation.sources import DatasetImages
from difftrain.generation.pictures import to_pil

SHAPE = (3, 8, 8)
MADE, REAL = random_images(90, 1, SHAPE), random_images(70, 2, SHAPE)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return written(REAL, tmp_path_factory.mktemp("service") / "reference")


def by_index(indices):
    return MADE[indices]


def pixels(images):
    return images.flatten(1).double() / 255


def test_a_callable_is_scored_as_its_images_are(reference):
    metrics = ["frechet_distance", {"type": "kernel_distance", "degree": 2}]
    found = score(by_index, reference, "pixels", metrics, num_samples=90, block_size=32)

    expected = frechet_distance(pixels(REAL), pixels(MADE))
    assert found.scores["frechet_distance"]["value"] == pytest.approx(expected, rel=1e-5)
    expected = kernel_distance(pixels(REAL), pixels(MADE), degree=2)
    assert found.scores["kernel_distance"]["value"] == pytest.approx(expected, rel=1e-4)
    assert found.protocol["num_samples"] == 90


def test_pictures_and_tensors_are_the_same_images(reference):
    def pictures(indices):
        arrays = [MADE[i].permute(1, 2, 0).numpy() for i in indices]
        return [PIL.Image.fromarray(array) for array in arrays]

    metrics = [KernelDistance(degree=1)]
    given = {"metrics": metrics, "num_samples": 40, "features": "pixels", "reference": reference}
    assert score(pictures, **given).scores == score(by_index, **given).scores


def test_pictures_are_opened_as_the_files_of_a_reference(tmp_path):
    # Transparent black and half-transparent red, and a grey picture of 16 bits
    clear = PIL.Image.fromarray(np.tile(np.uint8([[[0, 0, 0, 0], [255, 0, 0, 128]]]), (4, 2, 1)))
    deep = PIL.Image.fromarray(np.full((4, 4), 257 * 100, np.uint16))
    for name, picture in (("clear", clear), ("deep", deep)):
        (tmp_path / name).mkdir()
        picture.save(tmp_path / name / "a.png")
        source = DatasetImages(ImageFolder(str(tmp_path / name)))
        assert torch.equal(as_pixels([picture], 1), all_samples(source).expand(-1, 3, -1, -1))


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (np.zeros((2, 8, 8, 3), np.uint8), r"a ndarray of ndarray.*torch.from_numpy"),
        (None, "returned a NoneType, expected"),
        ([], "returned a list, expected"),
        (
            [PIL.Image.new("RGB", (8, 8)), PIL.Image.new("L", (8, 9))],
            r"shapes \(1, 9, 8\), \(3, 8, 8\), expected one",
        ),
    ],
)
def test_what_is_no_images_is_named(returned, message):
    with pytest.raises(InputError, match=message):
        as_pixels(returned, 2)


def test_a_metric_or_a_reference_of_another_type_is_named(reference):
    with pytest.raises(InputError, match=r"expected a list: \['frechet_distance'\]"):
        score(by_index, reference, "pixels", "frechet_distance", num_samples=40)
    with pytest.raises(InputError, match="reference: this is a Tensor, expected a folder"):
        score(by_index, REAL, "pixels", num_samples=40)


def test_two_calls_do_not_share_the_rows_of_their_images(reference):
    def other(indices):
        return MADE.flip(0)[indices] // 2

    given = {"reference": reference, "features": "pixels", "num_samples": 40}
    first, second = score(by_index, **given), score(other, **given)
    assert first.generated["digest"] != second.generated["digest"]
    assert first.scores != second.scores


def test_labels_and_captions_belong_to_the_images():
    digits = Digits("held_out")
    images = torch.stack([torch.from_numpy(np.array(digits[i].image))[None] for i in range(60)])
    labels = [digits[i].label for i in range(60)]
    found = score(
        lambda indices: images[indices],
        Digits("train"),
        "digits_classifier",
        ["class_agreement"],
        num_samples=60,
        labels=labels,
    )

    assert found.scores["class_agreement"]["value"] > 0.9
    with pytest.raises(InputError, match="there are 59 labels for num_samples = 60"):
        score(by_index, Digits("train"), "pixels", num_samples=60, labels=labels[1:])


def test_nothing_is_left_of_a_call_that_failed(reference, tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFTRAIN_CACHE", str(tmp_path))

    def failing(indices):
        if 64 in indices:
            raise RuntimeError("out of memory")
        return MADE[indices]

    with pytest.raises(RuntimeError, match="out of memory"):
        score(failing, reference, "pixels", num_samples=90)
    assert list((tmp_path / "samples").iterdir()) == []
    assert len(list((tmp_path / "features").iterdir())) == 1  # of the reference


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda indices: MADE[indices].float(), r"returned torch.float32 \[40, 3, 8, 8\]"),
        (lambda indices: MADE[indices][1:], r"returned torch.uint8 \[39, 3, 8, 8\] for 40"),
        (lambda indices: MADE[indices][0], r"returned torch.uint8 \[3, 8, 8\]"),
    ],
)
def test_what_is_no_image_is_refused(reference, made, message):
    with pytest.raises(InputError, match=message):
        score(made, reference, "pixels", num_samples=40)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": ["precision"]}, "precision"),
        ({"reference": "/no/such/folder"}, "reference: there is no folder"),
        ({"num_samples": 0}, "num_samples is 0, expected at least 1"),
        ({"metrics": ["class_agreement"]}, "needs labels"),
        ({"features": "nonsense"}, "nonsense"),
    ],
)
def test_what_is_missing_is_said_before_an_image_is_made(reference, changes, message):
    def never(indices):
        raise AssertionError("an image was made")

    given = {"reference": reference, "features": "pixels", "num_samples": 40}
    with pytest.raises(InputError, match=message):
        score(never, **(given | changes))


def test_processes_that_have_not_joined_are_refused(reference, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")

    with pytest.raises(InputError, match=r"started 2 processes.* accelerate.Accelerator\(\) first"):
        score(by_index, reference, "pixels", num_samples=40)


# FID


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of the published layout, with weights drawn by a formula."""
    formula = runpy.run_path(str(ROOT / "scripts" / "golden_inception.py"))
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(formula["weights"](golden("inception")["names"]), path)
    return path


def test_fid_is_the_distance_of_the_published_networks_features(
    tmp_path, weights, monkeypatch, reference
):
    digest = digest_of_file(weights)
    few = written(MADE[:6], tmp_path / "few")
    with pytest.raises(InputError, match=r"not the published 6726825d.*curl -L"):
        fid(few, reference, weights=weights)
    monkeypatch.setattr(inception_weights, "PUBLISHED", digest[:8])

    extractor = Inception(path=str(weights))
    rows = [extractor.extract(images)["features"] for images in (MADE[:6], REAL[:5])]
    others = written(REAL[:5], tmp_path / "others")
    found = fid(few, others, weights=weights)
    assert found == pytest.approx(frechet_distance(*rows), rel=1e-4)


def test_fid_without_weights_says_how_to_get_them(reference, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    with pytest.raises(InputError, match=r"no weights in .*curl -L"):
        fid(reference, reference)


# The script of the recipes


def test_a_plain_script_scores_a_pipeline_on_one_and_on_two_processes(tmp_path, reference):
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    DDIMPipeline(network, DDIMScheduler()).save_pretrained(tmp_path / "pipeline")
    options = ["--num", "20", "--steps", "2", "--features", "pixels"]
    options += ["--metrics", "frechet_distance,kernel_distance"]
    found = []
    for num in (1, 2):
        file = tmp_path / f"{num}.json"
        program = ROOT / "recipes" / "score_pipeline.py"
        given = [tmp_path / "pipeline", reference, *options, "--json", file]
        run_program(program, *given, num=num, ACCELERATE_USE_CPU="true")
        found.append(json.loads(file.read_text()))

    assert found[0]["generated"] == found[1]["generated"]
    for name, one in found[0]["scores"].items():
        assert found[1]["scores"][name]["value"] == pytest.approx(one["value"], rel=1e-9)


def test_pictures_of_several_sizes_are_resized_as_a_transform_does_it(tmp_path):
    for i in range(12):
        noise = random_images(1, i, (3, 16 + i % 3, 14))[0]
        to_pil(noise).save(tmp_path / f"{i:02d}.png")
    with pytest.raises(InputError, match=r"resizing=Resizing\(SIDE, crop=True\)"):
        score(by_index, tmp_path, "pixels", num_samples=20)

    found = score(by_index, tmp_path, "pixels", num_samples=20, resizing=Resizing(8, crop=True))

    files = sorted(tmp_path.iterdir())
    resized = torch.stack([Transform(8)(PIL.Image.open(file)) for file in files])
    expected = frechet_distance(pixels(resized), pixels(MADE[:20]))
    assert found.scores["frechet_distance"]["value"] == pytest.approx(expected, rel=1e-5)
    assert found.protocol["reference"]["resized"]["side"] == 8
