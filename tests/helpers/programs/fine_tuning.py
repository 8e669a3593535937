"""Run by each of two processes under torchrun: the recipes FOLDER/NAME/recipe.yaml one after the other; their exit codes go to
FOLDER/codes-RANK.json."""

import json
import sys
from pathlib import Path

import difftrain.commands.train as command
from difftrain.core.processes import process_index

command.write_report = lambda folder: None

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    codes = [command.train(str(folder / name / "recipe.yaml")) for name in sys.argv[2:]]
    (folder / f"codes-{process_index()}.json").write_text(json.dumps(codes))
    sys.exit(command.leave(max(codes)))
