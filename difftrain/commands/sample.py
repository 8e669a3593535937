"""difftrain sample: generate samples of a trained run."""

from typing import Annotated

import typer

from difftrain.commands.app import (
    Loras,
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
def sample(
    run: Run,
    num: Annotated[
        int,
        typer.Option("--num", "--num-samples", help="Number of samples."),
    ],
    out: Annotated[str, typer.Option(help="Folder for the samples and a picture of them.")],
    overrides: Overrides = None,
    label: Annotated[
        int | None, typer.Option(help="One class for all samples. By default: classes in turn.")
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="Prompt. Repeat the option to cycle through several."),
    ] = None,
    lora_scale: LoraScale = None,
    lora: Loras = None,
    step: Step = None,
    weights: Weights = "ema",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the samples that the folder holds.")
    ] = False,
) -> None:
    """Generate samples of a trained run: PNGs, clips as MP4 or GIF, points as samples.npy.

    Overrides such as sampling.guidance=2 or sampling.seed=1 change how samples are generated. Under
    torchrun, write --num-samples: torchrun reads --num as its own option.
    """

    def action() -> None:
        from difftrain.run.sampling import Asked, sample_run

        asked = Asked(label, prompt or (), lora_scale, lora or ())
        averaged = is_averaged(weights)
        sample_run(run, num, out, overrides or [], asked, step, averaged, overwrite)

    run_command(action)
