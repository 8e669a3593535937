"""What scores a run: its references, its samples, and what picks the best checkpoint."""

import numpy as np
import PIL.Image
import pytest
import torch
from helpers.commands import pictures
from helpers.images import all_samples
from helpers.plans import SCORED, parquet, plans, rows_of
from helpers.runs import UNET

from difftrain.core.errors import InputError
from difftrain.evaluation.agreement import Failure
from difftrain.evaluation.results import Evaluation
from difftrain.training.scores import InLoopEvaluation

RGB = {**UNET, "in_channels": 3, "out_channels": 3}
CPU = torch.device("cpu")


# References


@pytest.mark.parametrize("place", ["reference", "in_loop"])
def test_clips_are_no_reference_for_images(tmp_path, place):
    clips = {"type": "digit_clips", "part": "held_out"}
    loop = {"every": 1, "num_samples": 4, "reference": clips, "metrics": ["frechet_distance"]}
    change = {"reference": clips} if place == "reference" else {"in_loop": loop}

    with pytest.raises(InputError, match=r"evaluation\.(in_loop\.)?reference: these are clips"):
        plans(tmp_path, evaluation={**SCORED, **change})


def test_a_stream_is_no_reference(tmp_path):
    stream = rows_of(parquet(tmp_path / "a.parquet"), streaming=True)

    with pytest.raises(
        InputError, match=r"evaluation.reference: a stream has no end.* Write streaming: false"
    ):
        plans(tmp_path, evaluation={**SCORED, "reference": stream})


def test_a_reference_goes_through_the_runs_transform_without_its_randomness(tmp_path):
    pictures(tmp_path / "pictures", num=3, size=(12, 8))
    config = {key: value for key, value in RGB.items() if key != "num_class_embeds"}
    data = {"type": "image_folder", "path": str(tmp_path / "pictures")}
    made = plans(
        tmp_path,
        data=data,
        model={"type": "unet2d", "config": config},
        transform={"resolution": 8, "channels": 3, "crop": "random", "flip": True},
        label_dropout=0.0,
        evaluation={**SCORED, "reference": data},
    )

    first, again = (all_samples(made.scoring.source(made.data.data)) for _ in range(2))
    image = np.array(PIL.Image.open(tmp_path / "pictures" / "000.png"))
    centre = torch.from_numpy(image)[:, 2:10]

    assert torch.equal(first, again)
    assert torch.equal(first[0], centre.permute(2, 0, 1))


def test_the_digits_classifier_is_refused_for_other_images(tmp_path):
    model = {"type": "unet2d", "config": {**RGB, "num_class_embeds": 11}}
    transform = {"resolution": 8, "channels": 3}
    evaluation = {**SCORED, "features": "digits_classifier"}

    with pytest.raises(
        InputError, match="digits_classifier looks at images of 1x8x8, but these are 3x8x8"
    ):
        plans(tmp_path, model=model, transform=transform, evaluation=evaluation)


def test_features_of_tensors_are_refused_for_images(tmp_path):
    with pytest.raises(InputError, match=r"'values' look at tensors, but the generated samples"):
        plans(tmp_path, evaluation={**SCORED, "features": "values"})


def folder_of_classes(folder, *names):
    for n, name in enumerate(names):
        pictures(folder / name, num=2 + n, size=(8, 8))
    return {"type": "image_folder", "path": str(folder), "labels": "folders"}


def test_a_classifier_needs_labels(tmp_path):
    data = {**folder_of_classes(tmp_path / "a", "a", "b"), "labels": "none"}
    features = {"type": "classifier", "data": data}

    with pytest.raises(InputError, match=r"classifier learns classes, but its data has no labels"):
        plans(tmp_path, evaluation={**SCORED, "features": features})


@pytest.mark.parametrize("place", ["final", "in_loop"])
def test_class_agreement_is_refused_where_the_classifier_has_other_classes(tmp_path, place):
    features = {"type": "classifier", "data": folder_of_classes(tmp_path / "a", "1", "2", "3")}
    metrics = ["class_agreement"]
    loop = {"every": 1, "num_samples": 4, "reference": SCORED["reference"], "metrics": metrics}
    change = {"metrics": metrics} if place == "final" else {"in_loop": loop}

    # As other features than those of the labels, they are fine.
    plans(tmp_path, evaluation={**SCORED, "features": features})
    with pytest.raises(InputError, match=r"knows the classes 1, 2, 3, but the model has 0, 1, 2"):
        plans(tmp_path, evaluation={**SCORED, "features": features, **change})


# The best checkpoint


def selecting(score: str, evaluation: Evaluation, folder) -> float | None:
    """Return what an in-loop evaluation of this result picks checkpoints by."""
    callback = InLoopEvaluation(1, lambda denoiser: evaluation, score, "ema", folder / "file")
    return callback(torch.nn.Identity(), 1, 1.0)


def found(better: str = "lower", failures: dict | None = None, **values: float) -> Evaluation:
    """Return the result of an evaluation with scores of these values."""
    scores = {name: {"value": value, "better": better} for name, value in values.items()}
    protocol = {"features": {}, "reference": {}, "num_samples": 1, "metrics": []}
    return Evaluation(scores, protocol, {"count": 1}, failures=failures or {})


@pytest.mark.parametrize(
    ("direction", "better", "worse"),
    [("lower", 1.0, 2.0), ("higher", 0.9, 0.8), ("near 1", 0.9, 1.3), ("near 1", 1.1, 0.2)],
)
def test_the_better_score_is_the_smaller_number(tmp_path, direction, better, worse):
    one, other = (found(direction, score=value) for value in (better, worse))

    assert selecting("score", one, tmp_path) < selecting("score", other, tmp_path)


def test_a_score_that_is_not_there_is_named_with_those_that_are(tmp_path):
    scores = found(frechet_distance=1.0, precision=1.0)

    with pytest.raises(
        InputError, match=r"there is no score 'fid'\. The metrics give frechet_distance, precision"
    ):
        selecting("fid", scores, tmp_path)


def test_a_selected_score_that_failed_ends_the_run_with_the_reason(tmp_path):
    failed = found(failures={"mine": Failure("ValueError: no", is_input=False)}, other=1.0)

    with pytest.raises(InputError, match="select: mine failed: ValueError: no"):
        selecting("mine", failed, tmp_path)
    assert selecting("other", failed, tmp_path) == 1.0


@pytest.mark.parametrize(
    ("metrics", "select"),
    [(["precision_recall"], "recall"), (["frechet_distance"], "frechet_distance")],
)
def test_a_score_that_a_metric_gives_may_be_selected(tmp_path, metrics, select):
    loop = {
        "every": 1,
        "num_samples": 4,
        "reference": {"type": "digits", "part": "classifier"},
        "metrics": metrics,
        "select": select,
    }
    made = plans(tmp_path, evaluation={**SCORED, "in_loop": loop})

    assert made.scoring.settings.in_loop.select == select


def test_in_loop_samples_start_from_other_noise(tmp_path):
    loop = {
        "every": 1,
        "num_samples": 4,
        "reference": {"type": "digits", "part": "classifier"},
        "metrics": ["frechet_distance"],
    }
    made = plans(tmp_path, "sampling.seed=5", evaluation={**SCORED, "in_loop": loop})

    final = made.scoring.final_scorer(tmp_path, CPU)
    in_loop = made.scoring.in_loop_scorer(tmp_path, CPU)

    assert (final.generator.sampling.seed, in_loop.generator.sampling.seed) == (5, 6)
    assert made.model.generator.sampling.seed == 5
