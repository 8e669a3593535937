"""difftrain diagnose: look into a trained run."""

from typing import Annotated

import typer

from difftrain.commands.app import (
    LoraScale,
    Overrides,
    Run,
    Step,
    Weights,
    app,
    is_averaged,
    run_command,
)


@app.command()
def diagnose(
    run: Run,
    overrides: Overrides = None,
    which: Annotated[
        list[str] | None,
        typer.Option(
            help="Names with commas between them, or a block such as '{type: smoothness}'. "
            "By default: all."
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Held-out images: a folder or a data block. By default: the reference."),
    ] = None,
    step: Step = None,
    weights: Weights = "ema",
    lora_scale: LoraScale = None,
) -> None:
    """Measure errors by noise level, exposure bias, smoothness and inversion of a trained run.

    The results go into the run's diagnostics.json and its report.
    """

    def action() -> None:
        from difftrain.run.diagnosis import diagnose_run

        averaged = is_averaged(weights)
        diagnose_run(run, which or [], overrides or [], step, averaged, data, lora_scale)

    run_command(action)
