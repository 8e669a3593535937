"""Diffusers models from presets, configs and folders: what they are built to, what they take, and what is read from beside them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from commands import TINY_DIT
from runs import UNET, UNET3D, tiny

from difftrain.denoisers import (
    CLASSES,
    OF_CLIPS,
    PRESETS,
    check_forward,
    num_class_embeddings_in,
    planned_config,
    shape_in,
    without_weights,
)
from difftrain.plan import Plan
from difftrain.recipe import load, register_everything
from difftrain.registry import DENOISERS, InputError
from difftrain.sampling import DDIM, diffusers_scheduler
from difftrain.schedule import NoiseSchedule
from difftrain.stated import schedule_and_parameterization, stated_beside

register_everything()

UNLABELLED = {key: value for key, value in UNET.items() if key != "num_class_embeds"}
CONDITION: dict[str, Any] = {
    "sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "cross_attention_dim": 8, "attention_head_dim": 4,
}
TINY = {"unet2d": UNLABELLED, "unet2d_condition": CONDITION, "unet3d_condition": UNET3D, "dit": TINY_DIT}
ALL_PRESETS = [(kind, name) for kind, presets in PRESETS.items() for name in presets]


def part(kind: str, **arguments: Any) -> Any:
    return DENOISERS.parse({"type": kind, **arguments}, "model")


def counted(kind: str, preset: str) -> int:
    return sum(p.numel() for p in without_weights(kind, planned_config(part(kind, preset=preset))).parameters())


def x_shape(kind: str, config: dict[str, Any], num_frames: int = 3) -> tuple[int, ...]:
    channels, *sides = shape_in(config)
    return (channels, num_frames, *sides) if kind in OF_CLIPS else (channels, *sides)


def inputs(kind: str, config: dict[str, Any], num: int = 2) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    labels = {"class_labels": torch.arange(num)} if num_class_embeddings_in(config) else {}
    return torch.randn(num, *x_shape(kind, config), generator=torch.Generator().manual_seed(0)), torch.tensor([3, 40])[:num], labels


# Presets


@pytest.mark.parametrize(
    ("kind", "preset", "millions"),
    [
        ("unet2d", "digits", 0.65), ("unet2d", "cifar10", 35.7), ("unet2d", "p2_256", 93.6), ("unet2d_condition", "sd15", 859.5),
        ("unet3d_condition", "digit_clips", 1.11), ("unet3d_condition", "modelscope", 1411),
    ],
)
def test_a_preset_has_the_parameters_of_its_paper(kind, preset, millions):
    """Ho et al. state 35.7 M; P2's 128 channels with one block and attention at 16 are 93.56 M in its authors' network."""
    assert counted(kind, preset) == pytest.approx(millions * 1e6, rel=0.005)


@pytest.mark.parametrize(
    ("preset", "millions", "layers", "width"), [("s2", 33, 12, 384), ("b2", 130, 12, 768), ("l2", 458, 24, 1024), ("xl2", 675, 28, 1152)]
)
def test_a_dit_has_its_papers_parameters_but_for_diffusers_copies_of_the_embedding(preset, millions, layers, width):
    """diffusers embeds label (1001 rows) and time (256 features, two linear layers) anew in every block; the paper does once."""
    embedding = 1001 * width + 256 * width + width + width * width + width

    assert counted("dit", preset) - (layers - 1) * embedding == pytest.approx(millions * 1e6, rel=0.015)


def test_every_preset_takes_its_own_input():
    for kind, preset in ALL_PRESETS:
        config = planned_config(part(kind, preset=preset))
        check_forward(without_weights(kind, config), x_shape(kind, config), bool(num_class_embeddings_in(config)))


def test_config_goes_over_the_preset():
    config = planned_config(part("unet2d", preset="cifar10", config={"sample_size": 64, "num_class_embeds": 11}))

    assert (config["sample_size"], config["num_class_embeds"], config["block_out_channels"]) == (64, 11, (128, 256, 256, 256))


# Built models


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_a_model_gives_what_its_config_says_in_its_dtype(kind, dtype):
    denoiser = part(kind, config=TINY[kind], dtype=dtype).build().eval()
    x, time, labels = inputs(kind, denoiser.config)

    output = denoiser(x, time, labels)

    assert output.shape == x.shape
    assert output.dtype == denoiser.dtype == getattr(torch, dtype)


@pytest.mark.parametrize("kind", TINY)
def test_the_planned_config_is_that_of_the_built_model(kind):
    """Lists become tuples, and the class adds what it computes."""
    planned = planned_config(part(kind, config=TINY[kind]))
    built = part(kind, config=TINY[kind]).build().config

    plain = {key: tuple(value) if isinstance(value, list) else value for key, value in planned.items()}
    assert plain == {key: tuple(value) if isinstance(value, list) else value for key, value in built.items() if key in plain}


@pytest.mark.parametrize("kind", [kind for kind in TINY if kind not in OF_CLIPS])
def test_gradient_checkpointing_changes_no_gradient(kind):
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        denoiser = part(kind, config=TINY[kind], dtype="float64", gradient_checkpointing=checkpointing).build()
        x, time, labels = inputs(kind, denoiser.config)
        denoiser(x, time, labels).square().sum().backward()
        found.append({name: p.grad for name, p in denoiser.named_parameters() if p.grad is not None})
        assert denoiser.model.is_gradient_checkpointing == checkpointing

    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_dit_drops_no_label_by_itself():
    """diffusers' own dropout draws from the global generator in training mode; ours is keyed and outside."""
    denoiser = part("dit", config={**TINY_DIT, "dropout": 0.0}).build().train()
    x, time, labels = inputs("dit", denoiser.config)

    first, second = (denoiser(x, time, labels) for _ in range(2))
    dropping = part("dit", config={**TINY_DIT, "dropout": 0.0}).build()

    assert torch.equal(first, second)
    embeddings = [module for module in dropping.modules() if type(module).__name__ == "LabelEmbedding"]
    assert embeddings
    assert all(module.dropout_prob == 0 for module in embeddings)
    assert all(len(module.embedding_table.weight) == num_class_embeddings_in(dropping.config) for module in embeddings)


def test_a_conditional_unet_runs_without_text_and_with_labels():
    denoiser = part("unet2d_condition", config={**CONDITION, "num_class_embeds": 3}).build().eval()
    x, time, labels = inputs("unet2d_condition", denoiser.config)

    assert denoiser(x, time, labels).shape == x.shape


@pytest.mark.parametrize(
    ("kind", "changes", "width"),
    [
        ("unet2d_condition", {}, 8), ("unet2d_condition", {"encoder_hid_dim": 6, "encoder_hid_dim_type": "text_proj"}, 6),
        ("unet3d_condition", {"cross_attention_dim": 5}, 5),
    ],
)
def test_the_missing_text_is_one_zero_token_of_the_models_width(kind, changes, width):
    denoiser = part(kind, config={**TINY[kind], **changes}).build().eval()
    x, time, _ = inputs(kind, denoiser.config)

    assert torch.equal(denoiser(x, time, {}), denoiser(x, time, {"encoder_hidden_states": torch.zeros(2, 1, width)}))


# Clips


@pytest.mark.parametrize("num_frames", [1, 2, 7])
@pytest.mark.parametrize("side", [12, 9])
def test_a_model_of_clips_takes_any_number_of_frames_and_any_side(num_frames, side):
    denoiser = part("unet3d_condition", config={**UNET3D, "sample_size": side}).build().eval()
    check_forward(without_weights("unet3d_condition", denoiser.config), (1, num_frames, side, side), labelled=False)

    assert denoiser(torch.zeros(2, 1, num_frames, side, side), torch.tensor([1, 2]), {}).shape == (2, 1, num_frames, side, side)


def test_each_clip_of_a_batch_is_denoised_by_itself_and_each_frame_with_its_neighbours():
    """Weights are drawn for the convolutions over time, which diffusers starts at zero."""
    denoiser = part("unet3d_condition", config=UNET3D, dtype="float64").build().eval()
    for p in denoiser.parameters():
        torch.nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(0))
    x, time, _ = inputs("unet3d_condition", denoiser.config)
    changed = x.double().clone()
    changed[1, :, 0] += 1

    first, second = denoiser(x.double(), time, {}), denoiser(changed, time, {})
    difference = (first - second).abs().amax((1, 3, 4))

    assert difference[0].max() == 0
    assert (difference[1] > 1e-6).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_class_embeds": 11}, "model.config.num_class_embeds: UNet3DConditionModel has no such argument"),
        ({"attention_head_dim": [4, 4]}, "model.config: UNet3DConditionModel refuses it: "),
        ({"norm_num_groups": 3}, "model.config: UNet3DConditionModel refuses it: "),
    ],
)
def test_what_a_model_of_clips_does_not_take_is_one_error(change, message):
    with pytest.raises(InputError) as error:
        without_weights("unet3d_condition", planned_config(part("unet3d_condition", config={**UNET3D, **change})))

    assert message in str(error.value)


def test_a_model_of_clips_has_no_gradient_checkpointing():
    with pytest.raises(InputError, match=r"model.gradient_checkpointing: unknown key"):
        part("unet3d_condition", config=UNET3D, gradient_checkpointing=True)


def test_the_initial_weights_belong_to_the_recipes_seed(tmp_path):
    plan, other = Plan(load(tiny(tmp_path))), Plan(load(tiny(tmp_path), ["seed=1"]))
    state = torch.random.get_rng_state()

    first, second, third = plan.denoiser(), plan.denoiser(), other.denoiser()

    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), third.parameters(), strict=True))


# Folders


def saved(kind: str, folder: Path) -> Path:
    denoiser = part(kind, config=TINY[kind]).build()
    denoiser.save_model(folder)
    return folder


@pytest.mark.parametrize("kind", TINY)
def test_a_saved_model_loads_from_its_own_folder_and_from_a_pipelines(kind, tmp_path):
    own = saved(kind, tmp_path / "pipeline" / CLASSES[kind][1])
    weights = part(kind, path=str(own)).build().state_dict()

    for arguments in ({"path": str(tmp_path / "pipeline")}, {"path": str(tmp_path / "pipeline"), "subfolder": CLASSES[kind][1]}):
        again = part(kind, **arguments).build().state_dict()
        assert all(torch.equal(again[name], weights[name]) for name in weights)
        assert shape_in(planned_config(part(kind, **arguments))) == shape_in(planned_config(part(kind, path=str(own))))


@pytest.mark.parametrize("kind", [kind for kind in TINY if kind != "dit"])
def test_a_pretrained_unet_can_be_trained_at_another_size(kind, tmp_path):
    path = str(saved(kind, tmp_path / "model"))
    resized = part(kind, path=path, config={"sample_size": 6})

    assert shape_in(planned_config(resized)) == (1, 6, 6)
    assert planned_config(resized)["block_out_channels"] == [8, 16]
    assert shape_in(resized.build().config) == (1, 6, 6)
    assert all(torch.equal(a, b) for a, b in zip(resized.build().parameters(), part(kind, path=path).build().parameters(), strict=True))


@pytest.mark.parametrize(("kind", "config"), [("dit", {"sample_size": 8}), ("unet2d", {"sample_size": 6, "dropout": 0.1}), ("unet2d", {})])
def test_nothing_else_of_a_pretrained_model_can_be_changed(kind, config, tmp_path):
    path = str(saved(kind, tmp_path / "model"))

    with pytest.raises(InputError, match=r"path brings its own config; leave preset and config out \(of a UNet, config may hold"):
        planned_config(part(kind, path=path, config=config))


def test_a_folder_below_the_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    saved("unet2d", tmp_path / "model")

    assert planned_config(part("unet2d", path="~/model"))["sample_size"] == 8
    assert part("unet2d", path="~/model").build().config["sample_size"] == 8


def pipeline(folder: Path, schedule: NoiseSchedule, kind: str) -> Path:
    saved("unet2d", folder / "unet")
    diffusers_scheduler(DDIM(), schedule, kind, clip=True).save_pretrained(folder / "scheduler")
    return folder


def finetuning(folder: Path, **arguments: str) -> Path:
    """A recipe that trains the pipeline in folder/pipeline, and states neither schedule nor parameterization."""
    file = tiny(folder, model={"type": "unet2d", **arguments}, label_dropout=0.0)
    data = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump({key: value for key, value in data.items() if key not in ("schedule", "parameterization")}))
    return file


def test_a_pipeline_states_schedule_and_parameterization(tmp_path):
    pipeline(tmp_path / "pipeline", NoiseSchedule.cosine(200, zero_terminal_snr=True), "v_prediction")

    recipe = load(finetuning(tmp_path, path=str(tmp_path / "pipeline")))
    schedule, parameterization = schedule_and_parameterization(recipe, stated_beside(recipe.model.arguments["path"]))

    assert parameterization == "v_prediction"
    assert schedule.num_timesteps == 200
    assert torch.equal(schedule.alpha, NoiseSchedule.cosine(200, zero_terminal_snr=True).alpha)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("schedule=linear", "schedule: the pretrained pipeline states its own; leave the key out"),
        ("parameterization=epsilon", "parameterization: epsilon, but the pretrained pipeline states v_prediction; leave the key out."),
    ],
)
def test_what_a_pipeline_states_must_not_be_stated_otherwise(tmp_path, override, message):
    pipeline(tmp_path / "pipeline", NoiseSchedule.cosine(200), "v_prediction")

    with pytest.raises(InputError) as error:
        Plan(load(finetuning(tmp_path, path=str(tmp_path / "pipeline")), [override]))

    assert message in str(error.value)


def test_the_models_own_folder_states_no_schedule(tmp_path):
    pipeline(tmp_path / "pipeline", NoiseSchedule.cosine(200), "v_prediction")
    file = finetuning(tmp_path, path=str(tmp_path / "pipeline" / "unet"))

    with pytest.raises(InputError, match=r"schedule: required, since the model brings none; write schedule: {type: linear}"):
        Plan(load(file))
    assert Plan(load(file, ["schedule=linear", "parameterization=sample"])).parameterization == "sample"


def test_a_broken_weights_file_is_an_error_with_the_path(tmp_path):
    saved("unet2d", tmp_path / "model")
    next((tmp_path / "model").glob("*.safetensors")).unlink()

    with pytest.raises(InputError, match=r"model.path: nothing can be loaded from '.*model'"):
        part("unet2d", path=str(tmp_path / "model")).build()


# What is refused


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("unet2d", {}, "model: write a preset (digits, cifar10, p2_256), a config, or a path."),
        ("unet2d", {"preset": "cifar"}, "model.preset: unknown preset 'cifar' (did you mean 'cifar10'?)"),
        ("unet2d", {"config": {"samplesize": 8}}, "model.config.samplesize: UNet2DModel has no such argument (did you mean 'sample_size'?"),
        ("dit", {"path": "no/such/folder"}, "model.path: there is no folder 'no/such/folder'"),
        ("dit", {"path": "./nowhere", "preset": "xl2"}, "model: path brings its own config; leave preset and config out"),
    ],
)
def test_a_model_that_cannot_be_is_refused_before_it_is_built(kind, arguments, message):
    for action in (planned_config, lambda given: given.build()):
        with pytest.raises(InputError) as error:
            action(part(kind, **arguments))
        assert message in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {"norm_num_groups": 3}, {"down_block_types": ["NoBlock", "DownBlock2D"]}, {"block_out_channels": [8, 16, 16]},
        {"attention_head_dim": 0}, {"out_channels": -1}, {"layers_per_block": "two"},
    ],
)
def test_a_config_that_the_class_refuses_is_one_error(change):
    with pytest.raises(InputError, match=r"model.config: UNet2DModel refuses it: "):
        without_weights("unet2d", planned_config(part("unet2d", config={**UNLABELLED, **change})))


def test_a_side_that_does_not_halve_is_refused_before_training():
    config = planned_config(part("unet2d", config={**UNLABELLED, "sample_size": 9}))

    with pytest.raises(InputError, match="UNet2DModel does not take inputs of 1x9x9"):
        check_forward(without_weights("unet2d", config), shape_in(config), labelled=False)


def test_a_folder_of_another_model_class_is_named(tmp_path):
    saved("dit", tmp_path / "model")

    with pytest.raises(InputError, match=r"holds a DiTTransformer2DModel, not a UNet2DModel; write model: {type: dit}"):
        planned_config(part("unet2d", path=str(tmp_path / "model")))


def test_a_config_without_a_size_is_refused():
    with pytest.raises(InputError, match="sample_size is required"):
        shape_in(planned_config(part("unet2d", config={})))


def test_a_saved_config_is_the_planned_one(tmp_path):
    saved("unet2d", tmp_path / "model")
    stored = json.loads((tmp_path / "model" / "config.json").read_text())

    planned = planned_config(part("unet2d", path=str(tmp_path / "model")))

    assert {key: planned[key] for key in stored} == stored
