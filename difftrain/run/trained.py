"""A trained run opened again: its model, and its network with the chosen weights."""

from collections.abc import Collection, Sequence
from pathlib import Path

import torch

from difftrain.core.errors import InputError
from difftrain.data.unreadable import SKIPPED_FILE, ReadErrors
from difftrain.models.model import DenoiserNetwork
from difftrain.recipe.reading import load
from difftrain.recipe.schema import Recipe
from difftrain.run.facts import DataFacts
from difftrain.run.folder import IMPORTS_FOLDER, RECIPE_FILE
from difftrain.run.model import BLOCKS, ModelPlan
from difftrain.run.startup import import_diffusers_alone, needs_text_or_lora
from difftrain.training import checkpoint


class TrainedRun:
    """A run folder, opened for sampling, merging, scoring or looking into.

    Args:
        folder: The run folder.
        overrides: Changes of its recipe, such as "sampling.guidance=2".
        blocks: Blocks of the recipe that are wanted in addition to those of the model.
        needs_lora: Whether LoRAs may be added to the network.

    Raises:
        InputError: If the folder is not that of a run.
    """

    def __init__(
        self,
        folder: str | Path,
        overrides: Sequence[str] = (),
        blocks: Collection[str] = (),
        needs_lora: bool = True,
    ):
        self.folder = Path(folder)
        file = self.folder / RECIPE_FILE
        if not file.is_file():
            raise InputError(
                f"{str(folder)!r} is not the folder of a run: it holds no {RECIPE_FILE}. Write the "
                "output: of a trained recipe."
            )
        facts = DataFacts.read(self.folder)
        self.recipe: Recipe = load(
            file, overrides, BLOCKS | set(blocks), imports=self.folder / IMPORTS_FOLDER
        )
        if not needs_text_or_lora(self.recipe) and not needs_lora:
            import_diffusers_alone()
        self.model = ModelPlan.of(self.recipe, facts)

    def errors(self) -> ReadErrors:
        """Return what becomes of items that cannot be read: what the run did with them.

        The block `loader` must be among the wanted ones.
        """
        return ReadErrors(self.recipe.loader.arguments["on_error"], self.folder / SKIPPED_FILE)

    def chosen_step(self, step: int | None, option: str = "--step") -> int:
        """Return the step of the wanted checkpoint.

        Args:
            step: The step that is asked for; None for that of the final weights, which is the best
                by the in-loop evaluation, or the latest.
            option: What a message calls it.

        Raises:
            InputError: If there is no such checkpoint.
        """
        checkpoints = self.folder / "checkpoints"
        steps = [checkpoint.step_of(path) for path in checkpoint.whole(checkpoints)]
        if not steps:
            raise InputError(
                f"{self.folder} holds no whole checkpoint yet. Train it first: difftrain train "
                f"{self.folder / RECIPE_FILE}."
            )
        if step is None:
            latest = checkpoint.folder_of(checkpoints, steps[-1])
            best: int | None = checkpoint.trainer_state(latest)["best_step"]
            return best or steps[-1]
        if step not in steps:
            known = ", ".join(map(str, steps))
            raise InputError(
                f"{option} {step}: {self.folder} holds the checkpoints of the steps {known}."
            )
        return step

    def chosen_steps(self, text: str | None) -> list[int]:
        """Return the steps of the wanted checkpoints, each once, ascending.

        Args:
            text: "all", or steps with commas between them; None for that of the final weights.

        Raises:
            InputError: If there is no such checkpoint.
        """
        if text is None:
            return [self.chosen_step(None)]
        if text.strip() == "all":
            last = self.chosen_step(None)  # which refuses a run without checkpoints
            whole = checkpoint.whole(self.folder / "checkpoints")
            return sorted({*map(checkpoint.step_of, whole), last})
        try:
            wanted = {int(part) for part in text.split(",")}
        except ValueError as error:
            raise InputError(
                f"--steps {text}: expected all, or steps such as 1000,2000."
            ) from error
        return [self.chosen_step(step, "--steps") for step in sorted(wanted)]

    def is_final(self, step: int, weights: str) -> bool:
        """Return whether these are the weights that the run ends with.

        Args:
            step: Step of a checkpoint.
            weights: Which of its weights: "ema" or "model".
        """
        source = checkpoint.folder_of(self.folder / "checkpoints", step)
        return step == self.chosen_step(None) and weights == checkpoint.final_weights(source)

    def denoiser(
        self, step: int, averaged: bool, device: torch.device
    ) -> tuple[DenoiserNetwork, str]:
        """Return the network in eval mode, with the weights of a checkpoint.

        Args:
            step: Step of the checkpoint.
            averaged: Whether averaged weights are wanted, if there are any.
            device: Where the network goes.

        Returns:
            The network, and which of its weights these are ("ema" or "model").

        Raises:
            InputError: If the weights do not fit the model of the recipe.
        """
        denoiser = self.model.denoiser()
        source = checkpoint.folder_of(self.folder / "checkpoints", step)
        try:
            weights = checkpoint.load_weights(denoiser, source, averaged)
        except RuntimeError as error:
            # torch names every tensor that does not fit.
            reason = " ".join(str(error).split())[:300].rstrip(".")
            raise InputError(
                f"the weights in {source} do not fit the model of the recipe: {reason}. Leave "
                "model: and adapter: out of the overrides."
            ) from error
        self.model.preparation.to(device)
        return denoiser.to(device).eval(), weights
