"""The model of a run: what is known of it before any weights are there, and what it refuses."""

from typing import Any

import pytest
import torch
from helpers.plans import SCORED, parquet, plans, rows_of
from helpers.runs import CLIPS, UNET, UNET3D, tiny
from helpers.tiny_networks import TINY_DIT, vae

from difftrain.core.errors import InputError
from difftrain.models.model import DenoiserNetwork
from difftrain.recipe.reading import load
from difftrain.run.facts import DataFacts
from difftrain.run.model import BLOCKS, ModelPlan
from difftrain.run.session import Plans
from difftrain.run.training import Launch

RGB = {**UNET, "in_channels": 3, "out_channels": 3}


def test_no_weights_are_made_before_they_are_asked_for(tmp_path, monkeypatch):
    def on_meta(self: Any, model: torch.nn.Module, *more: Any) -> None:
        assert all(p.is_meta for p in model.parameters()), "weights before they are asked for"
        init(self, model, *more)

    init = DenoiserNetwork.__init__
    monkeypatch.setattr(DenoiserNetwork, "__init__", on_meta)
    model = plans(tmp_path).model

    with pytest.raises(AssertionError, match="weights before they are asked for"):
        model.denoiser()


def test_the_size_of_the_model_is_known(tmp_path):
    model = plans(tmp_path).model

    assert model.num_parameters == sum(p.numel() for p in model.denoiser().parameters())
    assert model.shape == model.item == (1, 8, 8)


def test_a_model_needs_the_recipe_and_the_facts_alone(tmp_path):
    """Data, optimizer, trackers and evaluation may be things that are not there any more."""
    made = plans(tmp_path, evaluation=SCORED)
    data = made.recipe.dump()
    data["data"] = {"type": "image_folder", "path": "gone"}
    data["optimizer"]["name"] = "no_such_package.Optimizer"
    data["training"]["trackers"] = ["no_such_tracker"]
    data["evaluation"] = {"features": {"type": "no_such_features"}}
    file = tiny(tmp_path / "later", **data)

    model = ModelPlan.of(load(file, blocks=BLOCKS), made.facts)

    assert model.shape == made.model.shape
    assert model.conditioning.num_classes == made.model.conditioning.num_classes
    for name, value in made.model.denoiser().state_dict().items():
        assert torch.equal(model.denoiser().state_dict()[name], value)


def test_facts_come_back_from_a_folder(tmp_path):
    facts = DataFacts("clips", ["a", "b"], True, True, 3, None, ["a dog"])
    of_tensors = DataFacts("tensors", item_shape=(2,))

    for known in (facts, of_tensors):
        known.write(tmp_path)
        assert DataFacts.read(tmp_path) == known


# Classes


@pytest.mark.parametrize("streaming", [False, True], ids=["table", "stream"])
@pytest.mark.parametrize(("dropout", "classes"), [(0.0, 4), (0.1, 3)])
def test_integer_labels_fill_the_models_label_table(tmp_path, streaming, dropout, classes):
    """Nothing states their number; with label dropout the last row is that of the null label."""
    data = rows_of(parquet(tmp_path / "a.parquet"), label_column="label", streaming=streaming)
    model = plans(
        tmp_path,
        data=data,
        label_dropout=dropout,
        transform={"resolution": 8, "channels": 3},
        model={"type": "unet2d", "config": {**RGB, "num_class_embeds": 4}},
    ).model

    assert model.conditioning.num_classes == classes
    assert model.conditioning.can_guide == (dropout > 0)


def test_a_model_without_labels_ignores_those_of_the_data(tmp_path):
    model = plans(tmp_path, "model.config.num_class_embeds=", label_dropout=0.0).model

    assert model.conditioning(torch.tensor([1])) == {}
    assert model.conditioning.labels_of([0, 1]) is None


def test_the_last_row_of_a_dits_table_is_the_null_label(tmp_path):
    config = {**TINY_DIT, "sample_size": 8, "in_channels": 1, "out_channels": 1}
    model = plans(tmp_path, model={"type": "dit", "config": config}, label_dropout=0.1).model

    assert (model.conditioning.num_classes, model.conditioning.null_label) == (10, 10)
    labels = model.conditioning.null(2)["class_labels"]
    output = model.denoiser().eval()(
        torch.zeros(2, 1, 8, 8), torch.tensor([1, 2]), {"class_labels": labels}
    )
    assert output.shape == (2, 1, 8, 8)


# Clips


def test_the_shape_of_clips_is_known(tmp_path):
    made = plans(tmp_path, **CLIPS)

    assert made.model.shape == made.model.item == (1, 3, 12, 12)
    assert made.facts.num_frames == 3
    assert next(made.data.loader(0, 1).batches(0)).pixels.shape == (2, 1, 3, 12, 12)


def test_on_latents_frames_stay_and_sides_shrink(tmp_path):
    config = {**UNET3D, "in_channels": 4, "out_channels": 4, "sample_size": 6}
    encoder = {"type": "vae", "path": str(vae(tmp_path / "vae"))}
    changes = {"model": {"type": "unet3d_condition", "config": config}, "transform__channels": 3}
    model = plans(tmp_path, **{**CLIPS, **changes}, encoder=encoder).model

    assert (model.shape, model.item) == ((4, 3, 6, 6), (3, 3, 12, 12))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": {"type": "unet2d", "config": UNET}},
            "data: digit_clips holds clips, but the model unet2d takes images",
        ),
        (
            {"data": {"type": "digits"}},
            "data: digits holds images, but the model unet3d_condition takes clips",
        ),
        (
            {"evaluation": SCORED},
            "evaluation: the data are clips, and there is no metric for videos yet. Leave "
            "evaluation out, and look at the contact sheets",
        ),
        (
            {"label_dropout": 0.1},
            "label_dropout is set, but the model takes no class labels. Leave label_dropout out",
        ),
        ({"sampling__guidance": 2.0}, "sampling.guidance: 2.0"),
        (
            {"transform__resolution": 16},
            "transform.resolution: 16, but the model takes 12x12 pixels. Write resolution: 12",
        ),
        ({"transform__channels": 3}, "transform.channels: 3 channels, but the model takes 1"),
        ({"data__size": 8}, "digit_clips: on a canvas of size 8"),
    ],
)
def test_what_does_not_go_with_clips_is_refused(tmp_path, changes, message):
    with pytest.raises(InputError) as error:
        plans(tmp_path, **{**CLIPS, **changes})

    assert message in str(error.value)


def test_a_transform_belongs_to_images_alone(tmp_path):
    with pytest.raises(InputError, match="transform: required, but not given: the data set yields"):
        plans(tmp_path, "transform=null")


def test_the_recipe_of_a_run_gives_the_same_plans_again(tmp_path):
    """With an evaluation that has no in_loop, and every optional block written out as null."""
    recipe = plans(tmp_path, evaluation=SCORED).recipe
    (tmp_path / "resolved.yaml").write_text(recipe.to_yaml())

    again = Plans(load(tmp_path / "resolved.yaml"), Launch())

    assert again.recipe.dump() == recipe.dump()
