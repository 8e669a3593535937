"""Does on a device all that a run does there: python on_device.py DEVICE FOLDER [NAME ...]

DEVICE is "pretend" (see helpers.device) or "cuda". FOLDER holds recipes that
tests/distributed/test_device.py writes. How each step of the work ended goes to
FOLDER/ended-RANK.json: an exit code, or a traceback. The names are those of the recipes whose
weights are sharded (FSDP 2).
"""

import json
import os
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.distributed as dist

from difftrain.core.launch import join_processes, leave_processes
from difftrain.core.processes import num_processes, process_index
from difftrain.run import session
from difftrain.run.diagnosis import diagnose_run
from difftrain.run.evaluating import evaluate_folders, evaluate_run
from difftrain.run.sampling import Asked, sample_run
from helpers import device
from helpers import runs as runs  # settings of tiny runs
from helpers.sharding import shards

session.write_report = lambda folder: None
KIND, FOLDER, SHARDED = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
QUICK = [
    "{type: denoising_error, num: 6, num_timesteps: 2}",
    "{type: prediction_error, num: 105, num_timesteps: 1}",
    "{type: exposure_bias, num: 6, steps: 3}",
    "{type: cumulative_error, num: 6, steps: 3, num_timesteps: 2}",
    "{type: smoothness, num: 2, steps: 2}",
    "{type: inversion, num: 4, steps: 2}",
]


def train(name, *overrides):
    """Train FOLDER/NAME.yaml, sharded if its name is among those."""
    with shards(name in SHARDED):
        return session.train(str(FOLDER / f"{name}.yaml"), list(overrides))


def digits():
    """The way of a run of the digits: train, resume, and every command that looks at it."""
    run, samples = str(FOLDER / "digits"), str(FOLDER / "digits-samples")
    metrics = ["frechet_distance"]
    yield "train", lambda: train("digits", "training.steps=2")
    yield "resume", lambda: train("digits")
    yield "sample", lambda: sample_run(run, 5, samples)
    yield "evaluate", lambda: evaluate_run(run, ["evaluation.num_samples=12"])
    yield "evaluate folders", lambda: evaluate_folders(samples, samples, "pixels", metrics)
    yield "diagnose", lambda: diagnose_run(run, QUICK)


def sharded():
    """Training of sharded weights, with everything that looks at them on the way."""
    yield "train", lambda: train("sharded", "training.steps=2")
    yield "resume", lambda: train("sharded")


def lora():
    """The way of a LoRA: with samples of a prior, a cache, and prompts."""
    run, samples = str(FOLDER / "lora"), str(FOLDER / "lora-samples")
    asked = Asked(prompts=["a photo of a cat"])
    yield "train", lambda: train("lora")
    yield "sample", lambda: sample_run(run, 3, samples, asked=asked)


def misplaced():
    """What a tensor on the CPU leads to, in a step and in a collective."""
    yield "train", lambda: train("misplaced")
    if num_processes() > 1:
        yield "collective", lambda: dist.all_reduce(torch.ones(1))


def outcome(action):
    """Return an action's exit code, or its traceback."""
    try:
        return action() or 0
    except Exception:
        return traceback.format_exc()


if __name__ == "__main__":
    if KIND == "pretend":
        device.accelerate_uses_it()
    join_processes()
    ended = {}
    for way in (digits, sharded, lora, misplaced):
        if (FOLDER / f"{way.__name__}.yaml").exists():
            for step, action in way():
                ended[f"{way.__name__}: {step}"] = outcome(action)
    (FOLDER / f"ended-{process_index()}.json").write_text(json.dumps(ended))
    leave_processes(0)
    sys.stdout.flush()
    if KIND == "pretend":
        os._exit(0)  # gloo's threads below the pretend group may outlive the interpreter
