"""Run by each of two processes under torchrun: several runs one after the other, whose exit codes go to FOLDER/codes-RANK.json.

Starting processes takes ten times as long as what they then do.
"""

import json
import os
import resource
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import difftrain.train as command
from difftrain.distributed import num_processes, process_index
from difftrain.entry import on_all, on_main
from difftrain.registry import InputError

command.write_report = lambda folder: None
FOLDER = Path(sys.argv[1])
codes: dict[str, object] = {}


def train(name, *overrides, does=None, recipe="recipe"):
    if does is not None:
        os.environ["OWN_METHOD"] = does
    codes[name] = command.train(str(FOLDER / f"{recipe}.yaml"), [f"output={FOLDER}/{name}", *overrides])
    os.environ.pop("OWN_METHOD", None)


def outcome(action):
    try:
        return action()
    except InputError as error:
        return f"refused: {error}"


def only_the_second():
    if process_index() == 1:
        raise InputError("the second has no such folder")
    return "found"


if __name__ == "__main__":
    train("no_such_file", recipe="no_such_recipe")
    train("sgd", "optimizer={name: sgd, lr: 0.05}")
    train("gradient", "optimizer={name: sgd, lr: 1.0}", "training.steps=1", "training.clip_norm=null")
    train("stopped", "optimizer={name: sgd, lr: 0.05}", does="terminate_the_second:4")
    train("nan", does="nan_on_the_second:2")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    train("full", "training.checkpoint_every=2", "training.log_every=3", does="fill:3")
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    codes["resumed"] = command.train(str(FOLDER / "interrupted/recipe.yaml"))
    codes["on_all"] = outcome(lambda: on_all(only_the_second))
    codes["on_main"] = outcome(lambda: on_main(lambda: f"by {process_index()}"))
    codes["processes"] = num_processes()
    rank = process_index()
    train("unreadable", recipe="unreadable")  # last: the process that met the image leaves, and the other one loses its partner
    (FOLDER / f"codes-{rank}.json").write_text(json.dumps(codes))
    sys.exit(command.leave(codes["unreadable"]))
