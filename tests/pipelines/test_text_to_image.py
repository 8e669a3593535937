"""The families of text-to-image pipelines: their conditioning and their denoiser's call against diffusers' own pipelines."""

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from difftrain.pipelines.families import packed, unpacked
from difftrain.pipelines.text_conditioning import TextConditioning
from difftrain.pipelines.text_to_image import TextToImageModel
from difftrain.registry import DENOISERS, InputError
from difftrain.rng import Rng
from difftrain.sampling import DDIM, FlowEuler, SampleGenerator, Sampling
from difftrain.variance import FixedVariance

FAMILIES = [
    ("stable_diffusion", {}), ("stable_diffusion", {"prediction_type": "v_prediction"}), ("stable_diffusion_xl", {}),
    ("stable_diffusion_3", {}), ("stable_diffusion_3", {"t5": False}), ("flux", {}), ("flux", {"guidance": False}),
]  # fmt: skip
PROMPTS = ["a photo of a cat", "", "two dogs, on a very long beach " * 30]


def opened(folder: Any, family: str, **more: Any) -> TextToImageModel:
    return DENOISERS.parse({"type": family, "path": str(folder), **more}, "model").build()


def own_states(pipeline: Any, family: str, prompts: list[str]) -> dict[str, Tensor]:
    """What diffusers' pipeline makes of prompts, under our names."""
    with torch.no_grad():
        if family == "stable_diffusion":
            return {"encoder_hidden_states": pipeline.encode_prompt(prompts, "cpu", 1, False)[0]}
        if family == "stable_diffusion_xl":
            words, _, pooled, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
            return {"encoder_hidden_states": words, "text_embeds": pooled}
        if family == "stable_diffusion_3":
            words, _, pooled, _ = pipeline.encode_prompt(prompts, prompts, prompts, do_classifier_free_guidance=False)
            return {"encoder_hidden_states": words, "pooled_projections": pooled}
        words, pooled, _ = pipeline.encode_prompt(prompts, prompts)
        return {"encoder_hidden_states": words, "pooled_projections": pooled}


@pytest.mark.parametrize(("family", "options"), FAMILIES)
def test_prompts_are_encoded_as_diffusers_pipeline_does(pipelines, family, options):
    folder = pipelines(family, **options)
    absent = {"text_encoder_3": None, "tokenizer_3": None} if options.get("t5") is False else {}
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, **absent)
    expected = own_states(pipeline, family, PROMPTS)

    found = opened(folder, family).text.encode(PROMPTS)

    assert found.keys() == expected.keys()
    for name, value in expected.items():
        rows = [0, 2] if family == "stable_diffusion_xl" else [0, 1, 2]  # there no prompt is all zeros
        assert torch.equal(found[name][rows], value[rows]), name
    if family == "stable_diffusion_xl":
        assert pipeline.config.force_zeros_for_empty_prompt
        assert all((value[1] == 0).all() for value in found.values())


@pytest.mark.parametrize(("family", "options"), FAMILIES)
def test_tokens_that_do_not_fit_are_counted(pipelines, family, options):
    tokenize = opened(pipelines(family, **options), family).tokenize

    for encoder, lengths in tokenize.lengths(PROMPTS).items():
        assert [length > tokenize.limits[encoder] for length in lengths] == [False, False, True], encoder


def generator(model: TextToImageModel, side: int, family: str) -> SampleGenerator:
    shape = model.latent_shape(side)
    schedule, parameterization = model.schedule(*shape[1:])
    told = model.guidance_input if model.family.told_guidance(model.config) else None
    conditioning = TextConditioning(model, ["a cat"], (side, side), model.family.told_sizes(model.config), told)
    sampler = FlowEuler(2) if schedule.kind == "flow" else DDIM(2, spacing="leading")
    guidance = 1.0 if family == "flux" else 3.0
    return SampleGenerator(
        Sampling(sampler, guidance), schedule, parameterization, FixedVariance(), conditioning, shape, model.encoder(),
        model.family.even_sigmas,
    )


@pytest.mark.parametrize(("family", "options"), FAMILIES)
def test_a_sample_is_the_pipelines_own(pipelines, family, options):
    """Two steps of diffusers' pipeline from the generator's latents: packing, sizes, both guidances, time, spacing."""
    folder = pipelines(family, **options)
    absent = {"text_encoder_3": None, "tokenizer_3": None} if options.get("t5") is False else {}
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, **absent)
    pipeline.set_progress_bar_config(disable=True)
    if family.startswith("stable_diffusion") and family != "stable_diffusion_3":
        changed = {"steps_offset": 0, "set_alpha_to_one": True, "clip_sample": False, "timestep_spacing": "leading"}
        pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, **changed)
    model = opened(folder, family)
    side = 16
    channels, height, width = model.latent_shape(side)
    x = Rng(0, 0, [0]).normal((channels, height, width), "initial")
    latents = packed(x) if family == "flux" else x
    guidance = {"guidance_scale": 3.5 if family == "flux" else 3.0}
    expected = pipeline(
        prompt="a cat", height=side, width=side, num_inference_steps=2, latents=latents.clone(), output_type="latent", **guidance
    ).images
    expected = unpacked(expected, height, width) if family == "flux" else expected

    found = generator(model, side, family)._reverse(model.denoiser(), [0], torch.device("cpu"), torch.tensor([0]))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("family", "options"), FAMILIES)
def test_the_schedule_is_the_pipelines(pipelines, family, options):
    folder = pipelines(family, **options)
    model = opened(folder, family)
    schedule, parameterization = model.schedule(8, 8)
    scheduler_config = model.pipeline.config("scheduler")
    scheduler = getattr(diffusers, scheduler_config["_class_name"]).from_config(scheduler_config)

    if family in ("stable_diffusion", "stable_diffusion_xl"):
        assert parameterization == options.get("prediction_type", "epsilon")
        torch.testing.assert_close(schedule.alpha**2, scheduler.alphas_cumprod.double(), rtol=1e-4, atol=1e-6)
        return
    assert parameterization == "flow_prediction"
    if schedule.log_shift is not None:
        scheduler.set_timesteps(sigmas=torch.linspace(1, 1e-3, 1000).tolist(), mu=schedule.log_shift)
    ours = schedule.sigma.flip(0).float()
    torch.testing.assert_close(ours, scheduler.sigmas[:1000], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["stable_diffusion", "flux"])
def test_a_resolution_that_does_not_divide_is_refused(pipelines, family):
    with pytest.raises(InputError, match=r"resolution: 17, but .* takes multiples of \d+ pixels.*; write resolution: 16 or"):
        opened(pipelines(family), family).latent_shape(17)


def test_packing_is_undone():
    x = torch.randn(2, 3, 4, 6)

    assert packed(x).shape == (2, 6, 12)
    assert torch.equal(unpacked(packed(x), 4, 6), x)
