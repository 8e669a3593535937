"""Runs on a device that is not the CPU, alone and as one of two: what GPUs would answer.

By default the device is the pretend one (`helpers.device`), whose process group serves it alone, as
NCCL serves GPUs. `pytest -m gpu` runs the same tests on CUDA, two of them with two GPUs.
"""

import json
import os

import pytest
import torch
import yaml
from diffusers import UNet2DModel
from helpers.device import reason_to_skip
from helpers.fine_tuning import recipe
from helpers.places import PROGRAMS
from helpers.runs import (
    largest_difference,
    launched,
    lines,
    output_of,
    saved,
    tiny,
    trained,
)
from helpers.several import run_program
from torch.nn.attention import SDPBackend, sdpa_kernel

from difftrain.core.rng import Rng
from difftrain.objective.objective import Objective
from difftrain.objective.schedule import NoiseSchedule
from difftrain.objective.slots import (
    ERRORS,
    NOISES,
    PERTURBATIONS,
    REGULARIZERS,
    TIMESTEPS,
    VARIANCES,
    WEIGHTINGS,
)
from difftrain.objective.types import Batch

NUM_GPUS = torch.cuda.device_count()
PRETEND = pytest.param(
    "pretend",
    marks=[pytest.mark.device, pytest.mark.skipif(bool(reason_to_skip()), reason=reason_to_skip())],
)
CUDA = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(NUM_GPUS < 1, reason="needs a GPU")]
)
TWO_GPUS = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(NUM_GPUS < 2, reason="needs two GPUs")]
)
SCORED = {
    "features": "pixels",
    "reference": {"type": "digits", "part": "held_out"},
    "metrics": ["frechet_distance", "kernel_distance"],
    "num_samples": 20,
    "in_loop": {
        "every": 2,
        "num_samples": 20,
        "reference": {"type": "digits", "part": "classifier"},
        "metrics": ["frechet_distance"],
    },
}
# Ten images are three blocks of four: one of two processes has none in the last round.
HELD_OUT = {
    "data": {"type": "digits", "part": "held_out"},
    "num": 10,
    "num_timesteps": 2,
    "every": 2,
}
OF_DIGITS = ["train", "resume", "sample", "evaluate", "evaluate folders", "diagnose"]
WORK = (
    [f"digits: {step}" for step in OF_DIGITS]
    + ["sharded: train", "sharded: resume"]
    + ["lora: train", "lora: sample"]
)


def digits(folder):
    """Write a recipe in float64 with everything that looks at the network in training."""
    training = {
        "steps": 4,
        "batch_size": 8,
        "log_every": 1,
        "sample_every": 2,
        "num_sampled": 4,
    }
    return tiny(
        folder,
        model__dtype="float64",
        training=training,
        ema={"type": "decay", "decay": 0.9},
        validation=HELD_OUT,
        evaluation=SCORED,
    )


def put(file, folder, name):
    """Move a recipe to FOLDER/NAME.yaml, with its run in FOLDER/NAME."""
    blocks = yaml.safe_load(file.read_text())
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({**blocks, "output": str(folder / name)}))


def recipes(folder, base):
    """Write the recipes that on_device.py runs."""
    for name in ("digits", "sharded"):
        put(digits(folder / "made"), folder, name)
    prior = {"num": 3, "prompts": ["a photo of a dog"]}
    cached = {"folder": str(folder / "cache")}
    file = recipe(folder / "made", "stable_diffusion", base, cache=cached, prior=prior)
    put(file, folder, "lora")
    file = tiny(
        folder / "made",
        imports=["helpers.own_misplaced"],
        objective__regularizers=[{"type": "own_misplaced"}],
    )
    put(file, folder, "misplaced")


def on_device(device, *command, num=1):
    """Run a program where the GPUs are seen, or where none is."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") if device == "cuda" else ""
    run_program(*command, num=num, ACCELERATE_USE_CPU="false", CUDA_VISIBLE_DEVICES=visible)


@pytest.fixture(scope="module")
def done(tmp_path_factory, pipelines):
    """(device, processes) -> the folder of all runs there, and how each step ended by rank."""
    made = {}

    def work(device, processes):
        if (device, processes) not in made:
            folder = tmp_path_factory.mktemp(f"{device}-{processes}")
            recipes(folder, pipelines("stable_diffusion"))
            command = [PROGRAMS / "on_device.py", device, folder]
            if processes == 1:
                (folder / "sharded.yaml").unlink()
                on_device(device, *command)
            else:
                on_device(device, *command, "sharded", num=processes)
            ends = [json.loads((folder / f"ended-{i}.json").read_text()) for i in range(processes)]
            made[device, processes] = folder, ends
        return made[device, processes]

    return work


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    """The run of the digits on the CPU, in this process."""
    folder = tmp_path_factory.mktemp("cpu")
    trained(digits(folder))
    return folder / "run"


def assert_ended_well(ends, steps):
    for rank, ended in enumerate(ends):
        for step in steps:
            assert ended[step] == 0, f"process {rank}: {step}: {ended[step]}"


def numbers(file, key):
    """Return a number of each record that has it; a resume adds a record of what changed."""
    return [line[key] for line in lines(file) if key in line]


def assert_equal_runs(run, other):
    """Compare weights, their average, the logs and the scores in training."""
    one, two = saved(run, 4), saved(other, 4)
    for name in ("model", "ema"):
        assert largest_difference(one[name], two[name]) <= 1e-11
    for name, key in (("log", "loss"), ("validation", "value")):
        found, expected = (numbers(folder / f"{name}.jsonl", key) for folder in (run, other))
        assert found == pytest.approx(expected, rel=1e-9)
    scores = [
        [
            line["scores"]["frechet_distance"]["value"]
            for line in lines(folder / "evaluations.jsonl")
        ]
        for folder in (run, other)
    ]
    assert len(scores[0]) == 2
    assert scores[0] == pytest.approx(scores[1], rel=1e-9)


@pytest.mark.parametrize("device", [PRETEND, CUDA])
def test_all_of_a_run_works_on_one(done, device):
    _, ends = done(device, 1)

    assert_ended_well(ends, [step for step in WORK if not step.startswith("sharded")])


@pytest.mark.parametrize("device", [PRETEND, CUDA])
def test_one_trains_and_scores_what_the_cpu_does(done, on_cpu, device):
    assert_equal_runs(done(device, 1)[0] / "digits", on_cpu)


@pytest.mark.distributed
@pytest.mark.parametrize("device", [PRETEND, TWO_GPUS])
def test_all_of_a_run_works_on_two(done, device):
    """Training, scores, samples and diagnostics, a cache and samples of a prior."""
    assert_ended_well(done(device, 2)[1], WORK)


@pytest.mark.distributed
@pytest.mark.parametrize("device", [PRETEND, TWO_GPUS])
@pytest.mark.parametrize("name", ["digits", "sharded"])
def test_two_train_and_score_what_the_cpu_does(done, on_cpu, device, name):
    assert_equal_runs(done(device, 2)[0] / name, on_cpu)


@pytest.mark.distributed
@pytest.mark.parametrize("device", [PRETEND, TWO_GPUS])
def test_final_scores_of_two_are_those_of_one(done, device):
    found = [
        json.loads((done(device, processes)[0] / "digits/evaluation.json").read_text())["scores"]
        for processes in (1, 2)
    ]

    assert found[0].keys() == found[1].keys()
    assert {"frechet_distance", "kernel_distance", "nearest_neighbour_ratio"} <= set(found[0])
    for name, score in found[0].items():
        assert score["value"] == pytest.approx(found[1][name]["value"], rel=1e-9)


@pytest.mark.parametrize("device", [PRETEND, CUDA])
def test_a_tensor_on_the_cpu_is_an_error(done, device):
    (ended,) = done(device, 1)[1]

    assert "Expected all tensors to be on the same device" in ended["misplaced: train"]


@pytest.mark.distributed
@pytest.mark.parametrize("device", [PRETEND, TWO_GPUS])
def test_a_tensor_on_the_cpu_is_an_error_in_a_collective(done, device):
    for ended in done(device, 2)[1]:
        assert "No backend type associated with device type cpu" in ended["misplaced: collective"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Device -> what parts_on_device.py found there."""
    found = {}

    def of(device):
        if device not in found:
            file = tmp_path_factory.mktemp("parts") / "parts.json"
            on_device(device, PROGRAMS / "parts_on_device.py", device, file)
            found[device] = json.loads(file.read_text())
        return found[device]

    return of


@pytest.mark.parametrize("device", [PRETEND, CUDA])
@pytest.mark.parametrize(
    "registry", [WEIGHTINGS, NOISES, PERTURBATIONS, ERRORS, VARIANCES, TIMESTEPS, REGULARIZERS]
)
def test_every_part_gives_the_loss_and_the_gradient_of_the_cpu(parts, device, registry):
    """Registering a part adds it. CUDA sums in another order."""
    found = parts(device)
    key = "regularizers" if registry is REGULARIZERS else registry.slot
    own = {
        name: constructor
        for name, constructor in registry.constructors.items()
        if constructor.__module__.startswith("difftrain.")  # other tests may have added more
    }
    differences = {name: found[f"{key} {name}"] for name in own}

    assert differences
    assert max(differences.values()) <= 1e-9, differences


@pytest.mark.parametrize("device", [PRETEND, CUDA])
def test_images_have_the_cpus_neighbours_and_size(parts, device):
    assert parts(device)["neighbours"] == 0
    assert parts(device)["resize"] < 1e-4  # sums in another order


@pytest.mark.device
@pytest.mark.skipif(bool(reason_to_skip()), reason=reason_to_skip())
def test_what_waits_for_the_device_and_what_is_float64_is_seen(parts):
    watch = parts("pretend")["watch"]

    here = "parts_on_device.py"
    assert watch["waits"] == [[here, "copy to the device"], [here, "_local_scalar_dense"]]
    assert watch["float64"] == ["_to_copy"]
    assert "makes float64 on the device" in watch["refused"]


# On real GPUs alone


@pytest.mark.gpu
@pytest.mark.skipif(NUM_GPUS < 1, reason="needs a GPU")
@pytest.mark.parametrize(
    "settings",
    [
        {"ACCELERATE_MIXED_PRECISION": "bf16"},
        {"ACCELERATE_MIXED_PRECISION": "fp16"},
        {"ACCELERATE_DYNAMO_BACKEND": "inductor"},
    ],
    ids=["bf16", "fp16", "compiled"],
)
def test_mixed_precision_and_compiled_networks_train(tmp_path, settings):
    file = tiny(tmp_path)
    command = ["-m", "difftrain.train", str(file)]
    process = launched(
        command,
        ACCELERATE_USE_CPU="false",
        CUDA_VISIBLE_DEVICES=os.environ.get("CUDA_VISIBLE_DEVICES"),
        **settings,
    )
    _, err = output_of(process)

    assert process.returncode == 0, err
    assert all(line["loss"] < 10 for line in lines(tmp_path / "run/log.jsonl"))


def attending_loss(device: str, dtype: torch.dtype, kernel: SDPBackend) -> tuple[float, float]:
    """The loss of a network with attention under one kernel, and the norm of its gradient."""
    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=32,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    network.to(device, dtype)
    x0 = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1)).to(device)
    objective = Objective(NoiseSchedule.linear(100), "epsilon")

    def denoiser(x_t, t, cond):
        return network(x_t.to(dtype), t).sample.float()

    with sdpa_kernel([kernel]):
        loss = objective.to(device)(denoiser, Batch(x0), Rng(0, 0, range(4))).total
        loss.backward()
    gradients = [p.grad.float().norm() for p in network.parameters() if p.grad is not None]
    return float(loss.detach()), float(torch.stack(gradients).norm())


@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        ("cpu", torch.float32),
        pytest.param("cuda", torch.bfloat16, marks=CUDA.marks),
        pytest.param("cuda", torch.float16, marks=CUDA.marks),
    ],
    ids=str,
)
def test_flash_attention_gives_the_loss_of_the_plain_kernel(device, dtype):
    plain = attending_loss(device, dtype, SDPBackend.MATH)
    flash = attending_loss(device, dtype, SDPBackend.FLASH_ATTENTION)

    assert flash == pytest.approx(plain, rel=1e-5 if dtype == torch.float32 else 0.03)
