"""A run's pipeline folder in stock diffusers: it loads, runs, and gives our sampler's images."""

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, DDPMPipeline, DiTPipeline, DiTTransformer2DModel, UNet2DModel
from helpers.commands import command, pictures
from helpers.runs import UNET, tiny
from helpers.tiny_networks import TINY_DIT, vae

from difftrain.core.rng import Rng
from difftrain.data.transform import to_uint8
from difftrain.run.export import other_steps
from difftrain.run.trained import TrainedRun
from difftrain.training import checkpoint

CPU = torch.device("cpu")
DRIVEN = {
    "ddpm": "DDPM",
    "ddim": "DDIM",
    "dpm_solver++": "DPMSolverMultistep",
    "unipc": "DDIM",
    "euler": "DDIM",
}


def unlabelled(**changes: Any) -> dict[str, Any]:
    return {
        "type": "unet2d",
        "config": {
            **{key: value for key, value in UNET.items() if key != "num_class_embeds"},
            **changes,
        },
    }


def run_of(folder: Path, *overrides: str, **changes: Any) -> Path:
    """Train for two steps; returns the run folder."""
    command(
        "train", tiny(folder, training__steps=2, training__num_sampled=1, **changes), *overrides
    )
    return folder / "run"


def initial(model: Any, num: int) -> torch.Tensor:
    """Return the noise from which samples 0 to num - 1 start."""
    seed = model.generator.sampling.seed
    return Rng(seed, 0, range(num)).normal(model.shape, "initial")


def loop(model: Any, scheduler: Any, x: torch.Tensor, steps: int) -> torch.Tensor:
    """Run the loop of diffusers' pipelines with loaded parts alone, from our first noise."""
    scheduler.set_timesteps(steps)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t).sample, t, x).prev_sample
    return x


def ours(run: Path, num: int = 2) -> torch.Tensor:
    """Return images 0 to num - 1 as uint8, from the run's own latest weights."""
    trained = TrainedRun(run)
    denoiser, _ = trained.denoiser(trained.chosen_step(None), True, CPU)
    return trained.model.generator(denoiser, list(range(num)), CPU)


def agree(one: torch.Tensor, other: torch.Tensor) -> None:
    """Assert that images are equal but for the last bit of a few pixels.

    The same sums in float32 are taken in a different order of calls.
    """
    assert (one.int() - other.int()).abs().max() <= 1


@pytest.mark.parametrize(
    "average", [None, {"type": "decay", "decay": 0.5, "warmup": False}], ids=["model", "ema"]
)
def test_an_unconditional_unet_is_a_ddpm_pipeline_that_draws_our_images(tmp_path, average):
    run = run_of(tmp_path, model=unlabelled(), label_dropout=0.0, ema=average)
    pipe = DDPMPipeline.from_pretrained(run / "pipeline")
    trained = TrainedRun(run)

    agree(to_uint8(loop(pipe.unet, pipe.scheduler, initial(trained.model, 2), 2)), ours(run))
    assert len(pipe(batch_size=2, num_inference_steps=2, output_type="np").images) == 2


@pytest.mark.parametrize("sampler", DRIVEN)
def test_a_ddpm_pipeline_has_a_sampler_that_it_can_drive(tmp_path, sampler):
    """Euler and UniPC are exported as DDIM.

    The pipeline does not scale the first noise, as Euler needs, and passes UniPC a generator.
    """
    run = run_of(
        tmp_path,
        f"sampling.sampler={{type: {sampler}, steps: 3}}",
        model=unlabelled(),
        label_dropout=0.0,
    )

    pipe = DDPMPipeline.from_pretrained(run / "pipeline")

    assert type(pipe.scheduler).__name__ == f"{DRIVEN[sampler]}Scheduler"
    images = pipe(batch_size=2, num_inference_steps=3, output_type="np").images
    assert images.shape == (2, 8, 8, 1)
    assert images.std() > 0.01


def test_a_flow_unet_is_a_pipeline_that_draws_our_images(tmp_path):
    flow = [
        "schedule={type: flow, shift: 2}",
        "parameterization=flow_prediction",
        "sampling.sampler={type: flow_euler, steps: 3}",
    ]
    run = run_of(tmp_path, *flow, model=unlabelled(), label_dropout=0.0)
    pipe = DDPMPipeline.from_pretrained(run / "pipeline")

    assert isinstance(pipe.scheduler, diffusers.FlowMatchEulerDiscreteScheduler)
    agree(
        to_uint8(loop(pipe.unet, pipe.scheduler, initial(TrainedRun(run).model, 2), 3)), ours(run)
    )
    assert pipe(num_inference_steps=3, output_type="np").images.shape == (1, 8, 8, 1)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_a_learned_variance_goes_along_with_the_sampler_that_uses_it(tmp_path, sampler):
    run = run_of(
        tmp_path,
        "objective.variance=learned_range",
        f"sampling.sampler={{type: {sampler}, steps: 3}}",
        model=unlabelled(out_channels=2),
        label_dropout=0.0,
    )
    pipe = DDPMPipeline.from_pretrained(run / "pipeline")

    assert pipe.scheduler.config.variance_type == "learned_range"
    assert pipe(num_inference_steps=3, output_type="np").images.shape == (1, 8, 8, 1)


def test_a_class_conditional_unet_and_its_scheduler_load_by_themselves_and_draw_our_images(
    tmp_path,
):
    run = run_of(tmp_path)
    model = UNet2DModel.from_pretrained(run / "pipeline" / "unet")
    scheduler = diffusers.DDIMScheduler.from_pretrained(run / "pipeline" / "scheduler")

    def labelled(x: torch.Tensor, t: torch.Tensor) -> Any:
        return model(x, t, class_labels=torch.arange(len(x)))

    agree(to_uint8(loop(labelled, scheduler, initial(TrainedRun(run).model, 4), 2)), ours(run, 4))


# Latents


@pytest.fixture
def latent(tmp_path):
    """Return changes of the tiny recipe for a DiT of two classes on latents."""
    pictures(tmp_path / "pictures", classes=2)
    encoder = vae(tmp_path / "vae")
    return {
        "model": {"type": "dit", "config": {**TINY_DIT, "num_embeds_ada_norm": 1000}},
        "encoder": {"type": "vae", "path": str(encoder)},
        "data": {"type": "image_folder", "path": str(tmp_path / "pictures"), "labels": "folders"},
        "transform": {"resolution": 8, "channels": 3},
        "training__batch_size": 4,
    }


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("variance", ["fixed", "learned_range"])
def test_a_dit_is_a_pipeline_that_runs(tmp_path, latent, variance, guidance):
    latent["model"]["config"]["out_channels"] = 8 if variance == "learned_range" else 4
    run = run_of(
        tmp_path,
        f"objective.variance={variance}",
        "sampling.sampler={type: ddpm, steps: 3}",
        **latent,
    )

    pipe = DiTPipeline.from_pretrained(run / "pipeline")

    images = pipe(
        class_labels=[0, 1], num_inference_steps=3, guidance_scale=guidance, output_type="np"
    ).images
    assert images.shape == (2, 8, 8, 3)


@pytest.mark.parametrize("scale", [None, 0.7])
def test_a_dit_pipeline_decodes_what_our_sampler_decodes(tmp_path, latent, scale):
    """From our first noise, with the scale that the recipe may set, and labels 0 and 1."""
    latent["encoder"]["scale"] = scale
    run = run_of(tmp_path, **latent)
    pipe = DiTPipeline.from_pretrained(run / "pipeline")

    def labelled(x: torch.Tensor, t: torch.Tensor) -> Any:
        return pipe.transformer(x, timestep=t.expand(len(x)), class_labels=torch.arange(len(x)))

    latents = loop(labelled, pipe.scheduler, initial(TrainedRun(run).model, 2), 2)
    with torch.no_grad():
        theirs = to_uint8(pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample)

    agree(theirs, ours(run))


def test_a_dit_on_a_flow_schedule_is_saved_in_parts(tmp_path, latent):
    """DiTPipeline asks the scheduler to scale its input, which flow schedulers cannot."""
    flow = [
        "schedule={type: flow}",
        "parameterization=flow_prediction",
        "sampling.sampler={type: flow_euler, steps: 2}",
    ]
    folder = run_of(tmp_path, *flow, **latent) / "pipeline"

    assert sorted(path.name for path in folder.iterdir()) == ["scheduler", "transformer", "vae"]
    assert (
        DiTTransformer2DModel.from_pretrained(folder / "transformer").config.num_embeds_ada_norm
        == 1000
    )
    assert AutoencoderKL.from_pretrained(folder / "vae").config.latent_channels == 4


def test_a_unet_on_latents_is_saved_in_parts_and_samples(tmp_path, latent):
    latent["model"] = {
        "type": "unet2d",
        "config": {
            **UNET,
            "sample_size": 4,
            "in_channels": 4,
            "out_channels": 4,
            "num_class_embeds": 3,
        },
    }
    run = run_of(tmp_path, **latent)

    command("sample", run, "--num", "3", "--out", tmp_path / "samples")

    assert sorted(path.name for path in (run / "pipeline").iterdir()) == [
        "scheduler",
        "unet",
        "vae",
    ]
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [
        "000000.png",
        "000001.png",
        "000002.png",
        "grid.png",
        "metadata.jsonl",
        "samples.json",
    ]


def test_the_exported_weights_are_those_of_the_best_checkpoint(tmp_path):
    run = run_of(tmp_path, ema={"type": "decay", "decay": 0.9})
    denoiser = TrainedRun(run).model.denoiser()
    checkpoint.load_weights(denoiser, checkpoint.folder_of(run / "checkpoints", 2), averaged=True)
    exported = UNet2DModel.from_pretrained(run / "pipeline" / "unet").state_dict()

    assert all(
        torch.equal(exported[name], value) for name, value in denoiser.model.state_dict().items()
    )


def test_a_pipeline_is_trained_further_under_what_it_states(tmp_path):
    """Our own export serves as a pretrained model.

    Its schedule and parameterization are read, and training starts from its weights.
    """
    run = run_of(
        tmp_path,
        "parameterization=v_prediction",
        "schedule.type=cosine",
        model=unlabelled(),
        label_dropout=0.0,
    )
    file = tiny(
        tmp_path / "again",
        model={"type": "unet2d", "path": str(run / "pipeline")},
        label_dropout=0.0,
        training__steps=1,
    )

    command("train", file, "schedule=", "parameterization=")

    trained = TrainedRun(tmp_path / "again" / "run").model
    assert trained.parameterization == "v_prediction"
    assert torch.equal(trained.schedule.alpha, TrainedRun(run).model.schedule.alpha)
    log = [
        json.loads(line)
        for line in (tmp_path / "again" / "run" / "log.jsonl").read_text().splitlines()
    ]
    assert log[0]["step"] == 1


@pytest.mark.parametrize(
    ("steps", "spacing", "said"),
    [
        (50, "trailing", False),
        (300, "trailing", True),
        (50, "linspace", True),
        (300, "leading", False),
    ],
)
def test_it_is_said_where_diffusers_draws_other_samples(steps, spacing, said):
    """Its DDIM steps to t - T // N, which is not the next timestep of its list everywhere."""
    config = {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": 1000,
        "timestep_spacing": spacing,
    }

    found = other_steps(config, steps)

    assert len(found) == said
    assert all("draws other samples than difftrain. Call it with" in line for line in found)


def test_other_schedulers_step_along_their_list():
    assert other_steps({"_class_name": "DDPMScheduler", "num_train_timesteps": 1000}, 300) == []


def test_a_run_says_that_its_pipeline_steps_otherwise(tmp_path):
    """50 timesteps in 20 steps."""
    said = command("train", tiny(tmp_path, sampling__sampler={"type": "ddim", "steps": 20})).out

    assert "diffusers' DDIMScheduler steps by 2 timesteps at 20 steps" in said
