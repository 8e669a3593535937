"""Trains with FSDP 2 on each of two processes: straight to the end, and in two parts.

The exit codes go to FOLDER/codes-RANK.json.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from torch.distributed.tensor import DTensor

from difftrain.core.launch import leave_processes
from difftrain.core.processes import process_index
from difftrain.run import session
from difftrain.training.trainer import Trainer
from helpers.sharding import sharding_accelerator

session.write_report = lambda folder: None
FOLDER = Path(sys.argv[1])
sharded = []


class Looking(Trainer):
    """Counts the parameters that are sharded."""

    def run(self):
        sharded.append(sum(isinstance(p, DTensor) for p in self.bare.parameters()))
        return super().run()


session.make_accelerator = sharding_accelerator
session.Trainer = Looking

if __name__ == "__main__":
    recipe = str(FOLDER / "recipe.yaml")
    codes = [
        session.train(recipe, [f"output={FOLDER}/{name}", f"training.steps={steps}"])
        for name, steps in (("straight", 6), ("parts", 3), ("parts", 6))
    ]
    codes.append(session.train(str(FOLDER / "regularized.yaml"), [f"output={FOLDER}/regularized"]))
    (FOLDER / f"codes-{process_index()}.json").write_text(
        json.dumps({"codes": codes, "sharded": sharded})
    )
    leave_processes(0)
