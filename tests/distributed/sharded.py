"""Run by each of two processes under torchrun, FSDP 2 on: straight to the end, and in two parts. FOLDER/codes-RANK.json."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from torch.distributed.tensor import DTensor  # noqa: E402

import difftrain.train as command  # noqa: E402
from difftrain.distributed import process_index  # noqa: E402
from difftrain.trainer import Trainer  # noqa: E402

command.write_report = lambda folder: None
FOLDER = Path(sys.argv[1])
sharded = []


class Looking(Trainer):
    """Counts the parameters that are sharded."""

    def run(self):
        sharded.append(sum(isinstance(p, DTensor) for p in self.bare.parameters()))
        return super().run()


command.Trainer = Looking

if __name__ == "__main__":
    recipe = str(FOLDER / "recipe.yaml")
    codes = [command.train(recipe, [f"output={FOLDER}/{name}", f"training.steps={steps}"]) for name, steps in
             (("straight", 6), ("parts", 3), ("parts", 6))]
    (FOLDER / f"codes-{process_index()}.json").write_text(json.dumps({"codes": codes, "sharded": sharded}))
    command.leave(0)
