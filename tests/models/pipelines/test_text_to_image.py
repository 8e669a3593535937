"""Text-to-image models: conditioning, call, schedule and export against diffusers' pipelines."""

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from helpers.lora_subjects import trained
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from difftrain.core.errors import InputError
from difftrain.core.rng import Rng
from difftrain.data.batch import MicroBatch
from difftrain.models.adapters import LoRA, Named, adapt
from difftrain.models.files import add_metadata
from difftrain.models.lora.files import save_lora
from difftrain.models.model import ConditioningRequest, ExportParts
from difftrain.models.pipelines.flux import packed, unpacked
from difftrain.models.pipelines.text_to_image import TextToImageModel
from difftrain.models.slots import MODELS
from difftrain.objective.objective import Objective
from difftrain.objective.schedule import NoiseSchedule
from difftrain.objective.types import Batch
from difftrain.objective.variance import FixedVariance, LearnedRange

FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("stable_diffusion", {}),
    ("stable_diffusion", {"prediction_type": "v_prediction"}),
    ("stable_diffusion_xl", {}),
    ("stable_diffusion_3", {}),
    ("stable_diffusion_3", {"t5": False}),
    ("flux", {}),
    ("flux", {"guidance": False}),
]
EACH_ONCE = ["stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3", "flux"]
PROMPTS = ["a photo of a cat", "", "two dogs, on a very long beach " * 30]
SIDE = 16


def opened(folder: Any, family: str, **more: Any) -> TextToImageModel:
    return MODELS.parse({"type": family, "path": str(folder), **more}, "model").build()


def request(**more: Any) -> ConditioningRequest:
    return ConditioningRequest(**{"prompts": ["a cat"], "size": (SIDE, SIDE), **more})


def loaded(folder: Path, **absent: Any) -> Any:
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, **absent)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def own_states(pipeline: Any, family: str, prompts: list[str]) -> dict[str, Tensor]:
    """Return what diffusers' pipeline makes of prompts, under our names."""
    alone = {"do_classifier_free_guidance": False}
    with torch.no_grad():
        if family == "stable_diffusion":
            return {"encoder_hidden_states": pipeline.encode_prompt(prompts, "cpu", 1, False)[0]}
        if family == "stable_diffusion_xl":
            words, _, pooled, _ = pipeline.encode_prompt(prompts, **alone)
            return {"encoder_hidden_states": words, "text_embeds": pooled}
        if family == "stable_diffusion_3":
            words, _, pooled, _ = pipeline.encode_prompt(prompts, prompts, prompts, **alone)
            return {"encoder_hidden_states": words, "pooled_projections": pooled}
        words, pooled, _ = pipeline.encode_prompt(prompts, prompts)
        return {"encoder_hidden_states": words, "pooled_projections": pooled}


def absent(options: dict[str, Any]) -> dict[str, None]:
    return {"text_encoder_3": None, "tokenizer_3": None} if options.get("t5") is False else {}


@pytest.mark.parametrize(("family", "options"), FAMILIES)
def test_prompts_are_encoded_as_diffusers_pipeline_does(pipelines, family, options):
    folder = pipelines(family, **options)
    pipeline = loaded(folder, **absent(options))
    expected = own_states(pipeline, family, PROMPTS)

    found = opened(folder, family).text.encode(PROMPTS)

    is_zeroed = family == "stable_diffusion_xl"  # there the empty prompt is all zeros
    rows = [0, 2] if is_zeroed else [0, 1, 2]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name][rows], value[rows]), name
    if is_zeroed:
        assert pipeline.config.force_zeros_for_empty_prompt
        assert all((value[1] == 0).all() for value in found.values())


@pytest.mark.parametrize(("family", "options"), FAMILIES)
def test_tokens_that_do_not_fit_are_counted(pipelines, family, options):
    tokenizer = opened(pipelines(family, **options), family).tokenizer

    for encoder, lengths in tokenizer.lengths(PROMPTS).items():
        is_longer = [length > tokenizer.limits[encoder] for length in lengths]
        assert is_longer == [False, False, True], encoder


def guided(denoiser: Any, x: Tensor, time: Tensor, both: list[Any], guidance: float) -> Tensor:
    """Return uncond + guidance (cond - uncond), with both in one batch as diffusers has them."""
    cond = {name: torch.cat([both[1][name], value]) for name, value in both[0].items()}
    without, with_prompt = denoiser(torch.cat([x, x]), torch.cat([time, time]), cond).chunk(2)
    return without + guidance * (with_prompt - without)


@torch.no_grad()
def sampled(model: TextToImageModel, scheduler: Any, x: Tensor, guidance: float) -> Tensor:
    """Return two steps of a diffusers scheduler through the model's denoiser, from x."""
    conditioning = model.conditioning(request())
    both = [conditioning(torch.tensor([0])), conditioning.null(1)]
    denoiser = model.denoiser().eval()
    stated = model.stated(tuple(x.shape[1:]))[0]
    arguments: dict[str, Any] = {"num_inference_steps": 2}
    if model.spaces_sigmas_evenly:
        arguments["sigmas"] = [1.0, 0.5]
    if stated.log_shift is not None:
        arguments["mu"] = stated.log_shift
    scheduler.set_timesteps(**arguments)
    for t in scheduler.timesteps:
        time = t.expand(1)
        if guidance == 1.0:
            output = denoiser(x, time, both[0])
        else:
            output = guided(denoiser, x, time, both, guidance)
        x = scheduler.step(output, t, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize(("family", "options"), FAMILIES)
def test_a_sample_is_the_pipelines_own(pipelines, family, options):
    """Two steps of diffusers' pipeline: packing, sizes, both guidances, time, spacing."""
    folder = pipelines(family, **options)
    pipeline = loaded(folder, **absent(options))
    if family in ("stable_diffusion", "stable_diffusion_xl"):
        config = pipeline.scheduler.config
        pipeline.scheduler = diffusers.DDIMScheduler.from_config(config, clip_sample=False)
    model, is_flux = opened(folder, family), family == "flux"
    shape = model.input_shape((3, SIDE, SIDE), None)
    x = Rng(0, 0, [0]).normal(shape, "initial")
    expected = pipeline(
        prompt="a cat",
        height=SIDE,
        width=SIDE,
        num_inference_steps=2,
        latents=packed(x) if is_flux else x.clone(),
        output_type="latent",
        guidance_scale=3.5 if is_flux else 3.0,
    ).images
    if is_flux:
        expected = unpacked(expected, *shape[1:])
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)

    found = sampled(model, scheduler, x, 1.0 if is_flux else 3.0)

    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("family", "options"), FAMILIES)
def test_the_schedule_is_the_pipelines(pipelines, family, options):
    folder = pipelines(family, **options)
    model = opened(folder, family)
    schedule, parameterization = model.stated((4, 8, 8))
    config = model.pipeline.config("scheduler")
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)

    if family in ("stable_diffusion", "stable_diffusion_xl"):
        assert parameterization == options.get("prediction_type", "epsilon")
        theirs = scheduler.alphas_cumprod.double()
        torch.testing.assert_close(schedule.alpha**2, theirs, rtol=1e-4, atol=1e-6)
        return
    assert parameterization == "flow_prediction"
    if schedule.log_shift is not None:
        sigmas = torch.linspace(1, 1e-3, 1000).tolist()
        scheduler.set_timesteps(sigmas=sigmas, mu=schedule.log_shift)
    ours = schedule.sigma.flip(0).float()
    torch.testing.assert_close(ours, scheduler.sigmas[:1000], rtol=1e-4, atol=1e-5)


# What it takes


@pytest.mark.parametrize("family", ["stable_diffusion", "flux"])
def test_a_resolution_that_does_not_divide_is_refused(pipelines, family):
    model = opened(pipelines(family), family)

    with pytest.raises(
        InputError,
        match=r"resolution: 17, but .* takes multiples of \d+ pixels.*. Write resolution: 16 or",
    ):
        model.check_item((3, 17, 17))
    assert model.size_multiple == (2 if family == "stable_diffusion" else 4)


def test_a_resolution_beyond_the_table_of_positions_is_refused(pipelines):
    """Sixteen patches of two latents of two pixels."""
    model = opened(pipelines("stable_diffusion_3"), "stable_diffusion_3")

    model.check_item((3, 64, 64))
    with pytest.raises(
        InputError, match=r"68, but stable_diffusion_3 takes multiples of 4 pixels up to 64. Write"
    ):
        model.check_item((3, 68, 68))


def test_images_of_other_channels_are_refused(pipelines):
    with pytest.raises(InputError) as error:
        opened(pipelines("stable_diffusion"), "stable_diffusion").check_item((1, 16, 16))

    assert str(error.value) == (
        "transform.channels: 1, but the pipeline's images have 3. Write channels: 3."
    )


def test_an_encoder_of_another_kind_is_refused(pipelines):
    model = opened(pipelines("stable_diffusion"), "stable_diffusion")

    assert model.input_shape((3, 16, 16), model.encoder()) == (4, 8, 8)
    with pytest.raises(InputError) as error:
        model.input_shape((3, 16, 16), opened(pipelines("flux"), "flux").encoder())
    assert str(error.value) == (
        "encoder: it makes latents of 16x8x8, but the pipeline's denoiser takes 4x8x8. Leave "
        "encoder out, or write the path of a VAE of the same kind."
    )


def test_a_learned_variance_and_label_dropout_are_refused(pipelines):
    model = opened(pipelines("stable_diffusion"), "stable_diffusion")

    model.check_variance(FixedVariance())
    with pytest.raises(InputError, match=r"the pipelines' denoisers predict no variance\. Write"):
        model.check_variance(LearnedRange())
    with pytest.raises(InputError, match=r"label_dropout: .* Write captions: \{dropout: 0.1\}"):
        model.conditioning(request(label_dropout=0.1))


@pytest.mark.parametrize("guidance", [True, False])
def test_guidance_is_an_input_where_the_network_was_distilled(pipelines, guidance):
    folder = pipelines("flux", guidance=guidance)
    model = opened(folder, "flux", guidance_in_training=2.0)
    found = model.conditioning(request())(torch.tensor([0]))

    assert model.guidance_input == ((2.0, 3.5) if guidance else None)
    assert ("guidance" in found) == guidance


def test_packing_is_undone():
    x = torch.randn(2, 3, 4, 6)

    assert packed(x).shape == (2, 6, 12)
    assert torch.equal(unpacked(packed(x), 4, 6), x)


# Networks


@pytest.mark.parametrize("trains_text", [False, True])
@pytest.mark.parametrize("family", EACH_ONCE)
def test_a_skeleton_has_the_weights_shapes_and_no_memory(pipelines, family, trains_text):
    model = opened(pipelines(family), family)
    skeleton, denoiser = model.skeleton(trains_text), model.denoiser(trains_text)

    shapes = {name: value.shape for name, value in denoiser.state_dict().items()}
    assert {name: value.shape for name, value in skeleton.state_dict().items()} == shapes
    assert all(value.is_meta for value in skeleton.parameters())
    assert any(name.startswith("text.") for name in shapes) == trains_text


@pytest.mark.parametrize("family", EACH_ONCE)
def test_fsdp_wraps_the_familys_blocks(pipelines, family):
    model = opened(pipelines(family), family)

    assert model.skeleton()._no_split_modules == list(model.blocks)


def test_weights_come_in_the_precision_asked_for(pipelines):
    model = opened(pipelines("flux"), "flux", dtype="bfloat16", text_dtype="float64", max_tokens=20)

    assert model.denoiser().dtype == torch.bfloat16
    assert {p.dtype for p in model.text.parameters()} == {torch.float64}
    assert model.tokenizer.limits["text_encoder_2"] == 20


def test_text_encoders_are_freed_and_read_again(pipelines, monkeypatch):
    model = opened(pipelines("stable_diffusion"), "stable_diffusion")
    before = model.text
    assert model.text is before

    model.release_text()
    model.release_text()

    assert model.text is not before
    assert model.text.identity() == before.identity()


def test_the_identity_of_text_encoders_is_that_of_weights_tokens_and_empty_prompts(pipelines):
    one, other = (
        opened(pipelines("stable_diffusion", seed=seed), "stable_diffusion").text.identity()
        for seed in (0, 1)
    )
    short = opened(pipelines("stable_diffusion", max_length=20), "stable_diffusion")

    assert one.keys() == {"text encoder", "tokenizer", "empty prompt"}
    assert one["empty prompt"] == "False"
    assert one["tokenizer"] == other["tokenizer"]
    assert one["text encoder"] != other["text encoder"]
    assert short.text.identity()["tokenizer"] != one["tokenizer"]


def test_weights_that_the_conditioning_does_not_read_cannot_train_alone(pipelines):
    """The last layer of the first text encoder of SDXL."""
    model = opened(pipelines("stable_diffusion_xl"), "stable_diffusion_xl")
    unread = Named(["text_encoder.*final_layer_norm.weight"], text_encoders=True)

    with pytest.raises(InputError) as error:
        adapt(model.skeleton(trains_text=True), unread)
    assert str(error.value) == (
        "adapter: the selected weights never receive a gradient, because the last layer of this "
        "text encoder is unused. Select other weights."
    )


# Files


def parts(**about: str) -> ExportParts:
    return ExportParts(None, NoiseSchedule.linear(), True, lambda name: None, about, "")


@pytest.mark.parametrize("family", EACH_ONCE)
def test_a_saved_model_is_the_whole_pipeline_with_the_trained_weights(pipelines, tmp_path, family):
    model = opened(pipelines(family), family)
    denoiser = model.denoiser()
    for parameter in denoiser.parameters():
        parameter.data += 1

    model.save(denoiser, tmp_path, parts(step="2"))

    pipeline, base = loaded(tmp_path), loaded(pipelines(family))
    folder = model.network_folder
    assert torch.equal(
        next(getattr(pipeline, folder).parameters()), next(denoiser.model.parameters())
    )
    assert torch.equal(next(pipeline.vae.parameters()), next(base.vae.parameters()))
    (file,) = (tmp_path / folder).glob("*.safetensors")
    with safe_open(file, "pt") as weights:
        assert (weights.metadata()["step"], weights.metadata()["format"]) == ("2", "pt")


def test_facts_in_a_header_leave_the_tensors_as_they_are(tmp_path):
    file = tmp_path / "some.safetensors"
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(5)}
    save_file(tensors, file, {"format": "pt", "step": "1"})

    add_metadata(file, {"step": "20", "note": "ä" * 99})

    assert all(torch.equal(value, tensors[name]) for name, value in load_file(file).items())
    with safe_open(file, "pt") as opened_file:
        assert opened_file.metadata() == {"format": "pt", "step": "20", "note": "ä" * 99}
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("family", EACH_ONCE)
def test_a_lora_comes_back_in_diffusers_pipeline(pipelines, tmp_path, family, text):
    model = opened(pipelines(family), family)
    denoiser = trained(model.denoiser(text), LoRA(rank=2, alpha=5.0, text_encoders=text))
    save_lora(denoiser, tmp_path, {})
    shape = model.input_shape((3, SIDE, SIDE), None)
    cond = model.conditioning(request(trains_text=text))(torch.tensor([0]))
    x, time = Rng(0).normal(shape, "x"), torch.tensor([500])

    fresh = model.with_lora(denoiser, tmp_path)

    with torch.no_grad():
        ours, theirs = denoiser(x, time, cond), fresh(x, time, cond)
        base = model.denoiser(text).eval()(x, time, cond)
    assert model.loaded_by == f"fresh {model.pipeline_class}"
    assert (ours - theirs).abs().max() < 1e-5 * ours.abs().max()
    assert (ours - base).abs().max() > 1e-2 * ours.abs().max()


# A family of one file


class Captioned:
    """One training batch of two captioned images, as x0 and conditioning."""

    def __init__(self, model: TextToImageModel):
        pixels = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
        encoder, rng = model.encoder(), Rng(0, 0, range(2))
        micro = MicroBatch(0, [0, 1], None, None, ["a cat", ""], [])
        cond = model.conditioning(request()).of(micro, rng)
        self.batch, self.rng = Batch(encoder.encode(2 * pixels - 1, rng), cond), rng


@pytest.fixture(scope="module")
def pixart(tmp_path_factory):
    """The folder of a tiny PixArt-Sigma, whose family is registered meanwhile."""
    from helpers import example_family

    MODELS.constructors["pixart_sigma"] = example_family.PixArtSigma
    yield example_family.save_pixart(tmp_path_factory.mktemp("pixart") / "base")
    del MODELS.constructors["pixart_sigma"]


def test_a_family_is_one_file(pixart, tmp_path):
    """PixArt-Sigma, as a person would add it: the class is all that the library has of it.

    Its samples are those of diffusers' pipeline, and it trains under a LoRA.
    """
    model = opened(pixart, "pixart_sigma")
    pipeline = loaded(pixart)

    # Sampling.
    shape = model.input_shape((3, SIDE, SIDE), model.encoder())
    x = Rng(0, 0, [0]).normal(shape, "initial")
    expected = pipeline(
        prompt="a cat",
        height=SIDE,
        width=SIDE,
        num_inference_steps=2,
        latents=x.clone(),
        output_type="latent",
        guidance_scale=3.0,
        use_resolution_binning=False,
    ).images
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    torch.testing.assert_close(sampled(model, scheduler, x, 3.0), expected, rtol=1e-5, atol=1e-5)

    # Training: a step moves the LoRA and lowers the loss of its batch.
    schedule, parameterization = model.stated(shape)
    objective, data = Objective(schedule, parameterization), Captioned(model)
    denoiser = model.denoiser()
    adapt(denoiser, LoRA(rank=2))
    optimizer = torch.optim.Adam([p for p in denoiser.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(5):
        loss = objective(denoiser, data.batch, data.rng).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]

    # Files: the LoRA, and the whole pipeline.
    save_lora(denoiser, tmp_path, {})
    fresh, (x0, cond) = model.with_lora(denoiser, tmp_path), (data.batch.x0, data.batch.cond)
    with torch.no_grad():
        ours, theirs = (one.eval()(x0, torch.tensor([3, 500]), cond) for one in (denoiser, fresh))
    torch.testing.assert_close(theirs, ours)
    model.save(model.denoiser(), tmp_path / "out", parts())
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["_class_name"] == "PixArtSigmaPipeline"


def test_a_pipeline_of_another_family_names_the_type_that_fits(pixart, pipelines):
    with pytest.raises(InputError, match=r"Write model: \{type: pixart_sigma\}"):
        opened(pixart, "flux")
    with pytest.raises(InputError, match=r"Write model: \{type: flux\}"):
        opened(pipelines("flux"), "pixart_sigma")
