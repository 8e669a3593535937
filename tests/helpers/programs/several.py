"""Trains several runs on each of two processes under torchrun, one after the other.

Their exit codes go to FOLDER/codes-RANK.json. To start the processes takes ten times as long as
what they then do.
"""

import json
import os
import resource
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from difftrain.core.errors import InputError
from difftrain.core.launch import leave_processes
from difftrain.core.processes import (
    mean_over_processes,
    num_processes,
    on_all,
    on_main,
    process_index,
)
from difftrain.core.rng import Rng
from difftrain.objective.regularizers import ErrorPropagation
from difftrain.objective.schedule import NoiseSchedule
from difftrain.objective.types import Batch
from difftrain.run import session
from helpers import own_metric
from helpers.support import gradients, images, term_alone

session.write_report = lambda folder: None
FOLDER = Path(sys.argv[1])
codes: dict[str, object] = {}


def train(name, *overrides, does=None, recipe="recipe"):
    if does is not None:
        os.environ["OWN_METHOD"] = does
    codes[name] = session.train(
        str(FOLDER / f"{recipe}.yaml"), [f"output={FOLDER}/{name}", *overrides]
    )
    os.environ.pop("OWN_METHOD", None)


def outcome(action):
    try:
        return action()
    except InputError as error:
        return f"refused: {error}"


def discrepancy(gather, step):
    """Return value, mean gradient and measures of error propagation of one layer.

    Each process has five samples of its own, and both have the same layer.
    """
    torch.manual_seed(0)
    layer, rows = (
        torch.nn.Conv2d(2, 2, 1).double(),
        range(5 * process_index(), 5 * process_index() + 5),
    )
    objective = term_alone(ErrorPropagation(gather=gather), "v_prediction", NoiseSchedule.linear())
    losses = objective(
        lambda x, t, cond: layer(x), Batch(images(10)[rows]), Rng(0, step, rows, batch_size=10)
    )
    return (
        losses.total.item(),
        mean_over_processes(gradients(losses, layer)).tolist(),
        {k: v.item() for k, v in losses.measures.items()},
    )


def fails_on_the_second():
    if process_index() == 1:
        raise ValueError("the second cannot count")
    return 0.5


def only_the_second():
    if process_index() == 1:
        raise InputError("the second has no such folder")
    return "found"


if __name__ == "__main__":
    train("no_such_file", recipe="no_such_recipe")
    train("sgd", "optimizer={name: sgd, lr: 0.05}")
    train(
        "gradient", "optimizer={name: sgd, lr: 1.0}", "training.steps=1", "training.clip_norm=null"
    )
    train("stopped", "optimizer={name: sgd, lr: 0.05}", does="terminate_the_second:4")
    train("nan", does="nan_on_the_second:2")
    train("regularized", recipe="regularized")
    train(
        "regularized_sgd",
        "optimizer={name: sgd, lr: 0.02}",
        "model.dtype=float32",
        recipe="regularized",
    )
    codes["gathered"] = [discrepancy(True, step) for step in range(3)]
    codes["local"] = [discrepancy(False, step) for step in range(3)]
    dropping, torch.nn.Dropout.forward = (
        torch.nn.Dropout.forward,
        lambda self, x: x,
    )  # this model's own, keyed by micro-batch
    train("clips", recipe="clips")
    torch.nn.Dropout.forward = dropping
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    train("full", "training.checkpoint_every=2", "training.log_every=3", does="fill:3")
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    own_metric.action = fails_on_the_second
    train("failing", recipe="failing")
    first = codes["failing"]
    own_metric.action = lambda: 0.5
    train("failing", recipe="failing")
    codes["failing"] = [first, codes["failing"]]
    codes["resumed"] = session.train(str(FOLDER / "interrupted/recipe.yaml"))
    codes["on_all"] = outcome(lambda: on_all(only_the_second))
    codes["on_main"] = outcome(lambda: on_main(lambda: f"by {process_index()}"))
    codes["processes"] = num_processes()
    rank = process_index()
    train(
        "unreadable", recipe="unreadable"
    )  # last: the process that met the image leaves, and the other one loses its partner
    (FOLDER / f"codes-{rank}.json").write_text(json.dumps(codes))
    sys.exit(leave_processes(codes["unreadable"]))
