"""The plan: what is read from the data and the model before any weights are there, and how the best checkpoint is picked."""

import io
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from difftrain.run.plan import Plan
from helpers.commands import TINY_DIT, pictures, vae
from helpers.runs import CLIPS, UNET, UNET3D, tiny

from difftrain.core.errors import InputError
from difftrain.evaluation.sources import all_images
from difftrain.models.denoisers import DiffusersDenoiser
from difftrain.recipe.reading import load
from difftrain.run.data import loader_of
from difftrain.run.training import check_trackers
from difftrain.training.callbacks import Selection

RGB = {**UNET, "in_channels": 3, "out_channels": 3}


def plan(folder: Path, *overrides: str, **changes: Any) -> Plan:
    return Plan(load(tiny(folder, **changes), overrides))


def parquet(file: Path, num: int = 6) -> Path:
    """Images with integer labels 0, 1, 2 in turn."""
    rows = []
    for i in range(num):
        buffer = io.BytesIO()
        PIL.Image.new("RGB", (8, 8), (i, 0, 0)).save(buffer, "PNG")
        rows.append({"image": {"bytes": buffer.getvalue(), "path": None}, "label": i % 3})
    datasets.Dataset.from_list(rows).to_parquet(file)
    return file


def rows_of(file: Path, **more: Any) -> dict[str, Any]:
    return {"type": "huggingface", "path": "parquet", "data_files": str(file), **more}


def test_a_plan_builds_no_weights(tmp_path, monkeypatch):
    def refuse(self: Any, model: torch.nn.Module) -> None:
        assert all(p.is_meta for p in model.parameters()), "weights before they are asked for"
        built(self, model)

    built = DiffusersDenoiser.__init__
    monkeypatch.setattr(DiffusersDenoiser, "__init__", refuse)
    made = plan(tmp_path)

    with pytest.raises(AssertionError, match="weights before they are asked for"):
        made.denoiser()


def test_a_plan_knows_the_models_size(tmp_path):
    made = plan(tmp_path)

    assert made.num_parameters == sum(p.numel() for p in made.denoiser().parameters())
    assert made.shape == made.image_shape == (1, 8, 8)


# Classes


@pytest.mark.parametrize("streaming", [False, True], ids=["table", "stream"])
@pytest.mark.parametrize(("dropout", "classes"), [(0.0, 4), (0.1, 3)])
def test_integer_labels_fill_the_models_label_table(tmp_path, streaming, dropout, classes):
    """Their number is not stated anywhere; with label dropout the last row is the null label's."""
    data = rows_of(parquet(tmp_path / "a.parquet"), label_column="label", streaming=streaming)
    made = plan(
        tmp_path,
        data=data,
        label_dropout=dropout,
        transform={"resolution": 8, "channels": 3},
        model={"type": "unet2d", "config": {**RGB, "num_class_embeds": 4}},
    )

    assert made.conditioning.num_classes == classes
    assert made.conditioning.can_guide == (dropout > 0)


def test_a_model_without_labels_ignores_those_of_the_data(tmp_path):
    made = plan(tmp_path, "model.config.num_class_embeds=", label_dropout=0.0)

    assert made.conditioning(torch.tensor([1])) == {}
    assert made.conditioning.labels_of([0, 1]) is None


def test_the_last_row_of_a_dits_table_is_the_null_label(tmp_path):
    dit = {
        "type": "dit",
        "config": {**TINY_DIT, "sample_size": 8, "in_channels": 1, "out_channels": 1},
    }
    made = plan(tmp_path, model=dit, label_dropout=0.1)

    assert (made.conditioning.num_classes, made.conditioning.null_label) == (10, 10)
    labels = made.conditioning.null(2)["class_labels"]
    assert made.denoiser().eval()(
        torch.zeros(2, 1, 8, 8), torch.tensor([1, 2]), {"class_labels": labels}
    ).shape == (2, 1, 8, 8)


# Clips


def test_a_plan_of_clips_knows_their_shape(tmp_path):
    made = plan(tmp_path, **CLIPS)

    assert made.shape == made.image_shape == (1, 3, 12, 12)
    assert made.num_frames == 3
    assert next(loader_of(made, 0, 1).batches(0)).pixels.shape == (2, 1, 3, 12, 12)


def test_on_latents_frames_stay_and_sides_shrink(tmp_path):
    model = {
        "type": "unet3d_condition",
        "config": {**UNET3D, "in_channels": 4, "out_channels": 4, "sample_size": 6},
    }
    encoder = {"type": "vae", "path": str(vae(tmp_path / "vae"))}
    made = plan(tmp_path, **{**CLIPS, "model": model, "transform__channels": 3}, encoder=encoder)

    assert (made.shape, made.image_shape) == ((4, 3, 6, 6), (3, 3, 12, 12))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": {"type": "unet2d", "config": UNET}},
            "data: digit_clips holds clips, but the model unet2d takes images; write model: "
            "{type: unet3d_condition}, or a set of images.",
        ),
        (
            {"data": {"type": "digits"}},
            "data: digits holds images, but the model unet3d_condition takes clips; write data: "
            "{type: video_folder, ...}, or model: {type: unet2d}.",
        ),
        (
            {
                "evaluation": {
                    "features": "pixels",
                    "reference": "digits",
                    "metrics": ["frechet_distance"],
                }
            },
            "evaluation: the data are clips, and there is no metric for videos yet. Leave evaluation out, and look at the contact sheets",
        ),
        (
            {"label_dropout": 0.1},
            "label_dropout is set, but the model takes no class labels. Leave label_dropout out",
        ),
        ({"sampling__guidance": 2.0}, "sampling.guidance: 2.0"),
        (
            {"transform__resolution": 16},
            "transform.resolution: 16, but the model takes 12x12 pixels; write resolution: 12",
        ),
        ({"transform__channels": 3}, "transform.channels: 3 channels, but the model takes 1"),
        ({"data__size": 8}, "digit_clips: on a canvas of size 8"),
    ],
)
def test_what_does_not_go_with_clips_is_refused(tmp_path, changes, message):
    with pytest.raises(InputError) as error:
        plan(tmp_path, **{**CLIPS, **changes})

    assert message in str(error.value)


@pytest.mark.parametrize("place", ["reference", "in_loop"])
def test_clips_are_no_reference_for_images(tmp_path, place):
    clips = {"type": "digit_clips", "part": "held_out"}
    loop = {"every": 1, "num_samples": 4, "reference": clips, "metrics": ["frechet_distance"]}
    evaluation = {
        **EVALUATED,
        **({"reference": clips} if place == "reference" else {"in_loop": loop}),
    }

    with pytest.raises(
        InputError,
        match=r"evaluation\.(in_loop\.)?reference: these are clips, and only images can be scored",
    ):
        plan(tmp_path, evaluation=evaluation)


# References


EVALUATED = {
    "features": "pixels",
    "reference": {"type": "digits", "part": "held_out"},
    "metrics": ["frechet_distance"],
}


def test_a_stream_is_no_reference(tmp_path):
    stream = rows_of(parquet(tmp_path / "a.parquet"), streaming=True)

    with pytest.raises(
        InputError, match=r"evaluation.reference: a stream has no end.* Write streaming: false"
    ):
        plan(tmp_path, evaluation={**EVALUATED, "reference": stream})


def test_a_reference_goes_through_the_runs_transform_without_its_randomness(tmp_path):
    pictures(tmp_path / "pictures", num=3, size=(12, 8))
    model = {
        "type": "unet2d",
        "config": {key: value for key, value in RGB.items() if key != "num_class_embeds"},
    }
    data = {"type": "image_folder", "path": str(tmp_path / "pictures")}
    transform = {"resolution": 8, "channels": 3, "crop": "random", "flip": True}
    made = plan(tmp_path, data=data, model=model, transform=transform, label_dropout=0.0)

    first, again = (all_images(made.images(made.data)) for _ in range(2))
    centre = torch.from_numpy(np.array(PIL.Image.open(tmp_path / "pictures" / "000.png")))[:, 2:10]

    assert torch.equal(first, again)
    assert torch.equal(first[0], centre.permute(2, 0, 1))


def test_the_digits_classifier_is_refused_for_other_images(tmp_path):
    model = {"type": "unet2d", "config": {**RGB, "num_class_embeds": 11}}

    with pytest.raises(
        InputError, match="digits_classifier looks at images of 1x8x8, but these are 3x8x8"
    ):
        plan(
            tmp_path,
            model=model,
            transform={"resolution": 8, "channels": 3},
            evaluation={**EVALUATED, "features": "digits_classifier"},
        )


# The best checkpoint


@pytest.mark.parametrize(
    ("score", "better", "worse"),
    [
        ("frechet_distance", 1.0, 2.0),
        ("class_agreement", 0.9, 0.8),
        ("nearest_neighbour_ratio", 0.9, 1.3),
        ("nearest_neighbour_ratio", 1.1, 0.2),
    ],
)
def test_the_better_score_is_the_smaller_number(score, better, worse):
    select = Selection(score)

    assert select({score: {"value": better}}) < select({score: {"value": worse}})


def test_a_score_that_is_not_there_is_named_with_those_that_are():
    with pytest.raises(
        InputError, match="there is no score 'fid'; the metrics give frechet_distance, precision"
    ):
        Selection("fid")({"frechet_distance": {"value": 1}, "precision": {"value": 1}})


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

    assert (
        plan(tmp_path, evaluation={**EVALUATED, "in_loop": loop}).evaluation.in_loop.select
        == select
    )


def test_in_loop_samples_are_made_from_other_noise(tmp_path):
    made = plan(tmp_path, "sampling.seed=5", evaluation=EVALUATED)
    given = made.evaluation.reference, made.evaluation.metrics, 4, tmp_path, torch.device("cpu")
    final, loop = (made.scorer(*given, in_loop=in_loop) for in_loop in (False, True))

    assert (final.generator.sampling.seed, loop.generator.sampling.seed) == (5, 6)
    assert made.generator.sampling.seed == 5


# Trackers


def test_a_tracker_without_its_package_is_refused(monkeypatch):
    from accelerate import tracking

    monkeypatch.setattr(tracking, "get_available_trackers", lambda: [])

    with pytest.raises(
        InputError,
        match=r"the package of 'wandb' is not installed. Install it, or leave the tracker out",
    ):
        check_trackers(["wandb"])
    check_trackers([])
    check_trackers(["all"])


def test_a_runs_own_recipe_is_its_plan_again(tmp_path):
    """Also with an evaluation that has no in_loop, and every optional block written out as null."""
    file = tiny(tmp_path, evaluation=EVALUATED)
    recipe = load(file)
    (tmp_path / "resolved.yaml").write_text(recipe.to_yaml())

    assert Plan(load(tmp_path / "resolved.yaml")).recipe.dump() == recipe.dump()
    assert json.dumps(recipe.dump())  # plain data
