"""Trains the recipes FOLDER/NAME/recipe.yaml on each of two processes, one after the other.

Their exit codes go to FOLDER/codes-RANK.json.
"""

import json
import sys
from pathlib import Path

from difftrain.core.launch import leave_processes
from difftrain.core.processes import process_index
from difftrain.run import session

session.write_report = lambda folder: None

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    codes = [session.train(str(folder / name / "recipe.yaml")) for name in sys.argv[2:]]
    (folder / f"codes-{process_index()}.json").write_text(json.dumps(codes))
    sys.exit(leave_processes(max(codes)))
