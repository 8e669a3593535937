"""difftrain merge: fold a run's LoRA into its base model."""

from typing import Annotated

import typer

from difftrain.commands.app import (
    Loras,
    LoraScale,
    Overrides,
    Step,
    Weights,
    app,
    is_averaged,
    run_command,
)


@app.command()
def merge(
    run: Annotated[str, typer.Argument(help="The folder of a run that trained a LoRA.")],
    out: Annotated[str, typer.Option(help="A new folder for the pipeline.")],
    overrides: Overrides = None,
    lora_scale: LoraScale = None,
    lora: Loras = None,
    step: Step = None,
    weights: Weights = "ema",
) -> None:
    """Fold a run's LoRA into its base model: a pipeline for programs without LoRA."""

    def action() -> None:
        from difftrain.run.merging import merge_run
        from difftrain.run.sampling import Asked

        asked = Asked(lora_scale=lora_scale, loras=lora or ())
        merge_run(run, out, overrides or [], asked, step, is_averaged(weights))

    run_command(action)
