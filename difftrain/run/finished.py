"""finished.json: which step of a run was exported and scored, and with which settings."""

import json
from pathlib import Path
from typing import Any

from difftrain.core.files import write_json
from difftrain.core.processes import is_main
from difftrain.core.registry import dump
from difftrain.recipe.schema import Recipe

FILE = "finished.json"


class Finished:
    """What a run did after its last step.

    With each step it records the settings, other than those of training, on which the exported
    files or the scores depend. If these settings change, files or scores are made again.

    Args:
        folder: The run's folder.
        recipe: The recipe as it is now.
    """

    def __init__(self, folder: Path, recipe: Recipe):
        self.file = folder / FILE
        self.recipe = recipe
        self.found = self.read()

    def read(self) -> dict[str, Any]:
        """Read the file. A missing or damaged one says that nothing was done."""
        try:
            found = json.loads(self.file.read_text()) if self.file.is_file() else {}
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def export_settings(self, step: int) -> dict[str, Any]:
        """Return the settings, other than those of training, of files and final grid."""
        return {
            "step": step,
            "sampling": dump(self.recipe.sampling),
            "license": self.recipe.license,
            "num_sampled": self.recipe.training.build().num_sampled,
        }

    def score_settings(self, step: int) -> dict[str, Any]:
        """Return the settings, other than those of training, on which scores depend."""
        evaluation = dump(self.recipe.evaluation)
        if evaluation is not None:  # where features are kept decides no score
            evaluation = {key: value for key, value in evaluation.items() if key != "store"}
        return {"step": step, "sampling": dump(self.recipe.sampling), "evaluation": evaluation}

    def is_exported(self, step: int) -> bool:
        """Return whether this step was exported with these settings."""
        return bool(self.found.get("exported") == self.export_settings(step))

    def is_complete(self) -> bool:
        """Return whether a step was exported and scored with these settings."""
        step = self.found.get("exported", {}).get("step", 0)
        is_scored = self.found.get("scored") == self.score_settings(step)
        return self.is_exported(step) and is_scored

    def mark_exported(self, step: int) -> None:
        """Note that a step was exported. Its scores are to be made again."""
        self.write({"exported": self.export_settings(step)})

    def mark_scored(self, step: int) -> None:
        """Note that the exported step was scored."""
        self.write(self.found | {"scored": self.score_settings(step)})

    def write(self, found: dict[str, Any]) -> None:
        """Write the file, on the main process alone."""
        self.found = found
        if is_main():
            write_json(self.file, found)
