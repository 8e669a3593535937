"""Networks of diffusers as models: what they are built to, what they take and state, and export."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from helpers.tiny_networks import CONDITION, TINY_DIT, UNET, UNET3D, UNLABELLED, vae

from difftrain.core.errors import InputError
from difftrain.models.autoencoder import LatentEncoder
from difftrain.models.conditioning.classes import ClassConditioning
from difftrain.models.denoisers import DiffusersNetwork
from difftrain.models.model import ConditioningRequest, ExportParts, models
from difftrain.models.presets import PRESETS
from difftrain.models.slots import MODELS
from difftrain.objective.schedule import NoiseSchedule
from difftrain.objective.variance import FixedVariance, LearnedRange

TINY = {
    "unet2d": UNLABELLED,
    "unet2d_condition": CONDITION,
    "unet3d_condition": UNET3D,
    "dit": TINY_DIT,
}
OF_CLIPS = ("unet3d_condition",)
ALL_PRESETS = [(kind, name) for kind, presets in PRESETS.items() for name in presets]
FIXED = FixedVariance()
CPU = torch.device("cpu")


def opened(kind: str, **arguments: Any) -> DiffusersNetwork:
    return MODELS.parse({"type": kind, **arguments}, "model").build()


def counted(kind: str, preset: str) -> int:
    return sum(p.numel() for p in opened(kind, preset=preset).skeleton().parameters())


def x_shape(model: DiffusersNetwork, num_frames: int = 3) -> tuple[int, ...]:
    channels, *sides = model.sample_shape
    frames = (num_frames,) if model.name in OF_CLIPS else ()
    return (channels, *frames, *sides)


def classes_of(model: DiffusersNetwork) -> ClassConditioning:
    rows = model.num_label_embeddings
    return ClassConditioning(rows, rows)


def check(model: DiffusersNetwork, shape: tuple[int, ...] | None = None) -> None:
    model.check_forward(model.skeleton(), shape or x_shape(model), classes_of(model), FIXED)


def inputs(
    model: DiffusersNetwork, num: int = 2
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    labels = {"class_labels": torch.arange(num)} if model.num_label_embeddings else {}
    x = torch.randn(num, *x_shape(model), generator=torch.Generator().manual_seed(0))
    return x, torch.tensor([3, 40])[:num], labels


def plain(config: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}


def equal_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


# Presets


@pytest.mark.parametrize(
    ("kind", "preset", "millions"),
    [
        ("unet2d", "digits", 0.65),
        ("unet2d", "cifar10", 35.7),
        ("unet2d", "p2_256", 93.6),
        ("unet2d_condition", "sd15", 859.5),
        ("unet3d_condition", "digit_clips", 1.11),
        ("unet3d_condition", "modelscope", 1411),
    ],
)
def test_a_preset_has_the_parameters_of_its_paper(kind, preset, millions):
    """Ho et al. state 35.7 M; P2's network has 93.56 M in its authors' code."""
    assert counted(kind, preset) == pytest.approx(millions * 1e6, rel=0.005)


@pytest.mark.parametrize(
    ("preset", "millions", "layers", "width"),
    [("s2", 33, 12, 384), ("b2", 130, 12, 768), ("l2", 458, 24, 1024), ("xl2", 675, 28, 1152)],
)
def test_a_dit_has_its_papers_parameters_but_for_diffusers_copies_of_the_embedding(
    preset, millions, layers, width
):
    """diffusers embeds label (1001 rows) and time (256 features) in every block, the paper once."""
    embedding = 1001 * width + 256 * width + width + width * width + width
    ours = counted("dit", preset) - (layers - 1) * embedding

    assert ours == pytest.approx(millions * 1e6, rel=0.015)


@pytest.mark.parametrize(("kind", "preset"), ALL_PRESETS)
def test_every_preset_takes_its_own_input(kind, preset):
    check(opened(kind, preset=preset))


def test_config_goes_over_the_preset():
    changes = {"sample_size": 64, "num_class_embeds": 11}
    config = opened("unet2d", preset="cifar10", config=changes).config

    assert (config["sample_size"], config["num_class_embeds"]) == (64, 11)
    assert config["block_out_channels"] == (128, 256, 256, 256)


# Built networks


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_a_network_gives_what_its_config_says_in_its_dtype(kind, dtype):
    model = opened(kind, config=TINY[kind], dtype=dtype)
    denoiser = model.denoiser().eval()
    x, time, labels = inputs(model)

    output = denoiser(x, time, labels)

    assert output.shape == x.shape
    assert output.dtype == denoiser.dtype == getattr(torch, dtype)
    assert denoiser.device == CPU


@pytest.mark.parametrize("kind", TINY)
def test_the_planned_config_is_that_of_the_built_network(kind):
    """Lists become tuples, and the class adds what it computes."""
    model = opened(kind, config=TINY[kind])
    planned, built = plain(model.config), plain(model.denoiser().config)

    assert planned == {key: value for key, value in built.items() if key in planned}


@pytest.mark.parametrize("kind", TINY)
def test_a_skeleton_has_the_weights_shapes_and_no_memory(kind):
    model = opened(kind, config=TINY[kind])
    skeleton, denoiser = model.skeleton(), model.denoiser()

    shapes = {name: value.shape for name, value in denoiser.state_dict().items()}
    assert {name: value.shape for name, value in skeleton.state_dict().items()} == shapes
    assert all(value.is_meta for value in skeleton.parameters())


@pytest.mark.parametrize("kind", [kind for kind in TINY if kind not in OF_CLIPS])
def test_gradient_checkpointing_changes_no_gradient(kind):
    found = []
    for checkpoints in (False, True):
        torch.manual_seed(0)
        model = opened(kind, config=TINY[kind], dtype="float64", gradient_checkpointing=checkpoints)
        denoiser = model.denoiser()
        denoiser(*inputs(model)).square().sum().backward()
        gradients = {name: p.grad for name, p in denoiser.named_parameters()}
        found.append({name: value for name, value in gradients.items() if value is not None})
        assert denoiser.model.is_gradient_checkpointing == checkpoints

    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_dit_drops_no_label_by_itself():
    """diffusers' own dropout draws from the global generator; ours is keyed and outside."""
    model = opened("dit", config={**TINY_DIT, "dropout": 0.0})
    denoiser = model.denoiser().train()

    first, second = (denoiser(*inputs(model)) for _ in range(2))

    assert torch.equal(first, second)
    embeddings = [m for m in denoiser.modules() if type(m).__name__ == "LabelEmbedding"]
    assert embeddings
    assert all(module.dropout_prob == 0 for module in embeddings)
    rows = {len(module.embedding_table.weight) for module in embeddings}
    assert rows == {model.num_label_embeddings}


def test_a_conditional_unet_runs_without_text_and_with_labels():
    model = opened("unet2d_condition", config={**CONDITION, "num_class_embeds": 3})
    x, time, labels = inputs(model)

    assert labels
    assert model.denoiser().eval()(x, time, labels).shape == x.shape


@pytest.mark.parametrize(
    ("kind", "changes", "width"),
    [
        ("unet2d_condition", {}, 8),
        ("unet2d_condition", {"encoder_hid_dim": 6, "encoder_hid_dim_type": "text_proj"}, 6),
        ("unet3d_condition", {"cross_attention_dim": 5}, 5),
    ],
)
def test_the_missing_text_is_one_zero_token_of_the_networks_width(kind, changes, width):
    model = opened(kind, config={**TINY[kind], **changes})
    denoiser = model.denoiser().eval()
    x, time, _ = inputs(model)
    zero = {"encoder_hidden_states": torch.zeros(2, 1, width)}

    assert torch.equal(denoiser(x, time, {}), denoiser(x, time, zero))


@pytest.mark.parametrize("kind", TINY)
def test_fsdp_wraps_the_layers_that_are_there(kind):
    denoiser = opened(kind, config=TINY[kind]).skeleton()
    present = {type(module).__name__ for module in denoiser.modules()}

    assert denoiser._no_split_modules
    assert set(denoiser._no_split_modules) <= present


# Clips


@pytest.mark.parametrize("num_frames", [1, 2, 7])
@pytest.mark.parametrize("side", [12, 9])
def test_a_network_of_clips_takes_any_number_of_frames_and_any_side(num_frames, side):
    model = opened("unet3d_condition", config={**UNET3D, "sample_size": side})
    shape = (1, num_frames, side, side)
    check(model, shape)

    output = model.denoiser().eval()(torch.zeros(2, *shape), torch.tensor([1, 2]), {})
    assert output.shape == (2, *shape)
    assert model.input_shape(shape, None) == shape


def test_each_clip_of_a_batch_is_denoised_by_itself_and_each_frame_with_its_neighbours():
    """The convolutions over time get random weights, because diffusers starts them at zero."""
    model = opened("unet3d_condition", config=UNET3D, dtype="float64")
    denoiser = model.denoiser().eval()
    for p in denoiser.parameters():
        torch.nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(0))
    x, time, _ = inputs(model)
    changed = x.double().clone()
    changed[1, :, 0] += 1

    first, second = denoiser(x.double(), time, {}), denoiser(changed, time, {})
    difference = (first - second).abs().amax((1, 3, 4))

    assert difference[0].max() == 0
    assert (difference[1] > 1e-6).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"num_class_embeds": 11},
            "model.config.num_class_embeds: UNet3DConditionModel has no such argument",
        ),
        ({"attention_head_dim": [4, 4]}, "model.config: UNet3DConditionModel rejects it: "),
        ({"norm_num_groups": 3}, "model.config: UNet3DConditionModel rejects it: "),
    ],
)
def test_what_a_network_of_clips_does_not_take_is_one_error(change, message):
    with pytest.raises(InputError) as error:
        opened("unet3d_condition", config={**UNET3D, **change}).skeleton()

    assert message in str(error.value)


def test_a_network_of_clips_has_no_gradient_checkpointing():
    with pytest.raises(
        InputError,
        match=r"gradient_checkpointing: UNet3DConditionModel cannot checkpoint gradients. Leave it",
    ):
        opened("unet3d_condition", config=UNET3D, gradient_checkpointing=True)


def test_data_of_another_kind_is_refused_with_a_model_that_takes_it():
    images, clips = opened("unet2d", config=UNET), opened("unet3d_condition", config=UNET3D)

    images.check_kind("images", "digits")
    clips.check_kind("clips", "digit_clips")
    for model, kind, message in (
        (
            images,
            "clips",
            "data: some holds clips, but the model unet2d takes images. Write model: "
            "{type: unet3d_condition}, or a data set of images.",
        ),
        (
            clips,
            "images",
            "data: some holds images, but the model unet3d_condition takes clips. "
            "Write model: {type: unet2d}, or a data set of clips.",
        ),
        (
            images,
            "tensors",
            "data: some holds tensors, but the model unet2d takes images. Write a "
            "registered network of your own, or a data set of images.",
        ),
    ):
        with pytest.raises(InputError) as error:
            model.check_kind(kind, "some")
        assert str(error.value) == message


# Shapes, channels and classes


@pytest.fixture
def encoder(tmp_path) -> LatentEncoder:
    """Two pixels for each latent, three channels to four."""
    return LatentEncoder(str(vae(tmp_path / "vae")))


def test_the_input_is_the_item_or_its_latents(encoder):
    assert opened("unet2d", config=UNET).input_shape((1, 8, 8), None) == (1, 8, 8)
    assert opened("dit", config=TINY_DIT).input_shape((3, 8, 8), encoder) == (4, 4, 4)
    clips = {**UNET3D, "in_channels": 4, "out_channels": 4, "sample_size": 6}
    shape = opened("unet3d_condition", config=clips).input_shape((3, 5, 12, 12), encoder)
    assert shape == (4, 5, 6, 6)


@pytest.mark.parametrize(
    ("kind", "config", "item", "latent", "message"),
    [
        (
            "unet2d",
            UNET,
            (1, 4, 4),
            False,
            "transform.resolution: 4, but the model takes 8x8 pixels. Write resolution: 8, or "
            "model: {config: {sample_size: 4}}.",
        ),
        (
            "unet2d",
            UNET,
            (3, 8, 8),
            False,
            "transform.channels: 3 channels, but the model takes 1. Write transform: {channels: "
            "1}, or model: {config: {in_channels: 3}}.",
        ),
        (
            "dit",
            TINY_DIT,
            (3, 16, 16),
            True,
            "transform.resolution: 16, but the model takes 4x4 latents. Write resolution: 8, or "
            "model: {config: {sample_size: 8}}.",
        ),
        (
            "dit",
            TINY_DIT,
            (1, 8, 8),
            True,
            "transform.channels: 1, but the encoder takes 3. Write transform: {channels: 3}.",
        ),
        (
            "dit",
            {**TINY_DIT, "in_channels": 3},
            (3, 8, 8),
            True,
            "encoder: 4 channels, but the model takes 3. Write model: {config: {in_channels: 4}}.",
        ),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_items_that_do_not_fit_are_refused_with_both_remedies(
    encoder, kind, config, item, latent, message
):
    with pytest.raises(InputError) as error:
        opened(kind, config=config).input_shape(item, encoder if latent else None)

    assert str(error.value) == message


def test_the_variance_and_the_output_channels_belong_together():
    one, two = (opened("unet2d", config={**UNET, "out_channels": n}) for n in (1, 2))

    one.check_variance(FIXED)
    two.check_variance(LearnedRange())
    with pytest.raises(InputError) as error:
        two.check_variance(FIXED)
    assert str(error.value) == (
        "model: out_channels is 2, but variance fixed needs 1. Write objective: {variance: {type: "
        "learned_range}}, or for a model without a path model: {config: {out_channels: 1}}."
    )
    with pytest.raises(InputError, match=r"is 1, but variance learned_range needs 2.*type: fixed"):
        one.check_variance(LearnedRange())


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (ConditioningRequest(True, 10, 0.1), ClassConditioning(10, 11, 0.1)),
        (ConditioningRequest(True, None, 0.1), ClassConditioning(10, 11, 0.1)),
        (ConditioningRequest(True, None, 0.0), ClassConditioning(11, 11, 0.0)),
    ],
)
def test_labels_without_names_fill_the_label_table(request_, expected):
    assert opened("unet2d", config=UNET).conditioning(request_) == expected


def test_classes_that_do_not_fit_the_label_table_are_refused():
    labelled, plain_unet = opened("unet2d", config=UNET), opened("unet2d", config=UNLABELLED)

    assert not plain_unet.conditioning(ConditioningRequest(True, 10)).conditions
    with pytest.raises(InputError, match="the data has none"):
        labelled.conditioning(ConditioningRequest(False))
    with pytest.raises(InputError, match="label_dropout is set, but the model takes no class"):
        plain_unet.conditioning(ConditioningRequest(True, 10, 0.1))
    dit = opened("dit", config=TINY_DIT).conditioning(ConditioningRequest(True, 10, 0.5))
    assert (dit.num_classes, dit.null_label) == (10, 10)


def test_guidance_needs_a_null_label_that_is_trained(tmp_path):
    fresh = opened("unet2d", config=UNET)
    pretrained = opened("unet2d", path=str(saved("unet2d", tmp_path / "model")))

    fresh.check_guidance(1.0, 0.0)
    fresh.check_guidance(2.0, 0.1)
    pretrained.check_guidance(2.0, 0.0)
    with pytest.raises(InputError) as error:
        fresh.check_guidance(2.0, 0.0)
    assert str(error.value) == (
        "sampling.guidance: 2.0, but label_dropout is 0, so the null label is never trained. Write "
        "label_dropout: 0.1, or guidance: 1."
    )


def test_a_lora_needs_a_pretrained_network(tmp_path):
    opened("unet2d", path=str(saved("unet2d", tmp_path / "model"))).check_lora()

    with pytest.raises(InputError) as error:
        opened("unet2d", config=UNET).check_lora()
    assert str(error.value) == (
        "adapter: a LoRA file needs the model that it was trained on, but this model is randomly "
        "initialized. Leave adapter out, or write model: {path: ...}."
    )


# Folders


def saved(kind: str, folder: Path) -> Path:
    opened(kind, config=TINY[kind]).denoiser().save_model(folder)
    return folder


@pytest.mark.parametrize("kind", TINY)
def test_a_saved_network_loads_from_its_own_folder_and_from_a_pipelines(kind, tmp_path):
    folder = opened(kind, config=TINY[kind]).folder
    own = opened(kind, path=str(saved(kind, tmp_path / "pipeline" / folder)))
    weights = own.denoiser()

    for arguments in (
        {"path": str(tmp_path / "pipeline")},
        {"path": str(tmp_path / "pipeline"), "subfolder": folder},
    ):
        model = opened(kind, **arguments)
        assert equal_weights(model.denoiser(), weights)
        assert model.sample_shape == own.sample_shape


@pytest.mark.parametrize("kind", [kind for kind in TINY if kind != "dit"])
def test_a_pretrained_unet_can_be_trained_at_another_size(kind, tmp_path):
    path = str(saved(kind, tmp_path / "model"))
    resized = opened(kind, path=path, config={"sample_size": 6})

    assert resized.sample_shape == (1, 6, 6)
    assert resized.config["block_out_channels"] == [8, 16]
    assert resized.denoiser().config["sample_size"] == 6
    assert equal_weights(resized.denoiser(), opened(kind, path=path).denoiser())


@pytest.mark.parametrize(
    ("kind", "config"),
    [("dit", {"sample_size": 8}), ("unet2d", {"sample_size": 6, "dropout": 0.1}), ("unet2d", {})],
)
def test_nothing_else_of_a_pretrained_network_can_be_changed(kind, config, tmp_path):
    path = str(saved(kind, tmp_path / "model"))

    with pytest.raises(
        InputError,
        match=r"path brings its own config. Leave preset and config out \(of a UNet, config may",
    ):
        opened(kind, path=path, config=config)


def test_a_folder_below_the_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    saved("unet2d", tmp_path / "model")
    model = opened("unet2d", path="~/model")

    assert model.config["sample_size"] == model.denoiser().config["sample_size"] == 8


def test_a_saved_config_is_the_planned_one(tmp_path):
    saved("unet2d", tmp_path / "model")
    stored = json.loads((tmp_path / "model" / "config.json").read_text())

    planned = opened("unet2d", path=str(tmp_path / "model")).config

    assert {key: planned[key] for key in stored} == stored


def test_the_scheduler_beside_a_network_states_schedule_and_parameterization(tmp_path):
    saved("unet2d", tmp_path / "unet")
    schedule = NoiseSchedule.cosine(200, zero_terminal_snr=True)
    scheduler = diffusers.DDIMScheduler(**schedule.config, prediction_type="v_prediction")
    scheduler.save_pretrained(tmp_path / "scheduler")

    stated = opened("unet2d", path=str(tmp_path)).stated((1, 8, 8))

    assert stated is not None
    assert stated[1] == "v_prediction"
    assert stated[0].num_timesteps == 200
    assert torch.equal(stated[0].alpha, schedule.alpha)
    assert opened("unet2d", path=str(tmp_path / "unet")).stated((1, 8, 8)) is None
    assert opened("unet2d", config=UNET).stated((1, 8, 8)) is None


def test_a_scheduler_that_is_no_json_is_named(tmp_path):
    saved("unet2d", tmp_path / "unet")
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text("{")

    with pytest.raises(InputError, match=r"scheduler_config.json' is not JSON"):
        opened("unet2d", path=str(tmp_path)).stated((1, 8, 8))


def test_the_vae_beside_a_network_is_its_encoder(tmp_path):
    saved("dit", tmp_path / "transformer")
    assert opened("dit", path=str(tmp_path)).encoder() is None

    vae(tmp_path / "vae")

    encoder = opened("dit", path=str(tmp_path)).encoder()
    assert encoder is not None
    assert encoder.channels == 4
    assert opened("dit", config=TINY_DIT).encoder() is None


# What is refused


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("unet2d", {}, "model: write a preset (digits, cifar10, p2_256), a config, or a path."),
        (
            "unet2d",
            {"preset": "cifar"},
            "model.preset: unknown preset 'cifar' (did you mean 'cifar10'?)",
        ),
        (
            "unet2d",
            {"config": {"samplesize": 8}},
            "model.config.samplesize: UNet2DModel has no such argument (did you mean 'sample_size'",
        ),
        ("dit", {"path": "no/such/folder"}, "model.path: there is no folder 'no/such/folder'"),
        (
            "dit",
            {"path": "./nowhere", "preset": "xl2"},
            "model: path brings its own config. Leave preset and config out",
        ),
    ],
)
def test_a_network_that_cannot_be_is_refused_when_it_is_opened(kind, arguments, message):
    with pytest.raises(InputError) as error:
        opened(kind, **arguments)

    assert message in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {"norm_num_groups": 3},
        {"down_block_types": ["NoBlock", "DownBlock2D"]},
        {"block_out_channels": [8, 16, 16]},
        {"attention_head_dim": 0},
        {"out_channels": -1},
        {"layers_per_block": "two"},
    ],
)
def test_a_config_that_the_class_rejects_is_one_error(change):
    with pytest.raises(InputError, match=r"model.config: UNet2DModel rejects it: "):
        opened("unet2d", config={**UNLABELLED, **change}).skeleton()


def test_a_side_that_does_not_halve_is_refused_before_training():
    with pytest.raises(InputError, match="UNet2DModel does not take inputs of 1x9x9"):
        check(opened("unet2d", config={**UNLABELLED, "sample_size": 9}))


def test_a_folder_of_another_class_is_named(tmp_path):
    saved("dit", tmp_path / "model")

    with pytest.raises(
        InputError,
        match=r"holds a DiTTransformer2DModel, not a UNet2DModel; write model: {type: dit}",
    ):
        opened("unet2d", path=str(tmp_path / "model"))


def test_a_config_without_a_size_is_refused():
    with pytest.raises(InputError, match="sample_size is required"):
        opened("unet2d", config={}).input_shape((3, 8, 8), None)


def test_a_broken_weights_file_is_an_error_with_the_path(tmp_path):
    saved("unet2d", tmp_path / "model")
    next((tmp_path / "model").glob("*.safetensors")).unlink()

    with pytest.raises(InputError, match=r"model.path: nothing can be loaded from '.*model'"):
        opened("unet2d", path=str(tmp_path / "model")).denoiser()


# Export


def parts(conditions: bool, encoder: LatentEncoder | None = None, **more: Any) -> ExportParts:
    given = {"schedule": NoiseSchedule.linear(), "about": {}, "recipe": ""}
    return ExportParts(
        encoder=encoder,
        conditions=conditions,
        scheduler=lambda name: diffusers.DDIMScheduler(steps_offset=1 if name else 0),
        **{**given, **more},
    )


def test_an_unconditional_unet_is_a_ddpm_pipeline(tmp_path):
    model = opened("unet2d", config=UNLABELLED)
    denoiser = model.denoiser()

    model.save(denoiser, tmp_path, parts(conditions=False))

    pipe = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    assert equal_weights(pipe.unet, denoiser.model)
    assert pipe.scheduler.config.steps_offset == 1  # the scheduler that fits the pipeline


def test_a_conditional_unet_is_saved_in_parts(tmp_path, encoder):
    model = opened("unet2d", config=UNET)
    denoiser = model.denoiser()
    encoder.scale = 0.7

    model.save(denoiser, tmp_path / "pixels", parts(conditions=True))
    model.save(denoiser, tmp_path / "latents", parts(conditions=False, encoder=encoder))

    def names(folder: str) -> list[str]:
        return sorted(path.name for path in (tmp_path / folder).iterdir())

    assert names("pixels") == ["scheduler", "unet"]
    assert names("latents") == ["scheduler", "unet", "vae"]
    loaded = diffusers.UNet2DModel.from_pretrained(tmp_path / "pixels" / "unet")
    assert equal_weights(loaded, denoiser.model)
    scheduler = diffusers.DDIMScheduler.from_pretrained(tmp_path / "pixels" / "scheduler")
    assert scheduler.config.steps_offset == 0  # the run's own
    own = diffusers.AutoencoderKL.from_pretrained(tmp_path / "latents" / "vae")
    assert own.config.scaling_factor == 0.7


@pytest.mark.parametrize("kind", ["diffusion", "flow"])
def test_a_dit_on_latents_is_a_pipeline_where_diffusers_can_drive_its_scheduler(
    tmp_path, encoder, kind
):
    model = opened("dit", config=TINY_DIT)
    denoiser = model.denoiser()
    schedule = NoiseSchedule.linear() if kind == "diffusion" else NoiseSchedule.flow(100)

    model.save(denoiser, tmp_path / "out", parts(True, encoder, schedule=schedule))

    found = sorted(path.name for path in (tmp_path / "out").iterdir())
    in_parts = ["scheduler", "transformer", "vae"]
    assert found == (["model_index.json", *in_parts] if kind == "diffusion" else in_parts)
    loaded = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "out" / "transformer")
    assert equal_weights(loaded, denoiser.model)


# Imports


def test_a_unet_is_built_and_called_without_importing_what_it_does_not_need():
    """What diffusers itself imports is not ours to decide; it is imported first here."""
    program = f"""
import sys, torch
import difftrain.models.denoisers
heavy = ("transformers", "peft", "datasets", "diffusers")
assert not [name for name in heavy if name in sys.modules], "on import"
from diffusers import UNet2DModel
for name in [name for name in sys.modules if name.partition(".")[0] in heavy[:3]]:
    del sys.modules[name]
from difftrain.models.adapters import adapt, describe
from difftrain.models.slots import MODELS
model = MODELS.parse({{"type": "unet2d", "config": {UNLABELLED!r}}}, "model").build()
for network in (model.skeleton(), model.denoiser()):
    adapt(network, None)
    describe(network)
network(torch.zeros(1, 1, 8, 8), torch.zeros(1).long(), {{}})
assert not [name for name in heavy[:3] if name in sys.modules], "on use"
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_models_name_is_the_registered_one():
    assert {name: model.name for name, model in models().items()} == {n: n for n in models()}
