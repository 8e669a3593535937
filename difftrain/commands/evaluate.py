"""difftrain evaluate and difftrain reference: scores, and statistics to compare with."""

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from difftrain.commands.app import (
    LoraScale,
    Overrides,
    Step,
    Weights,
    app,
    is_averaged,
    run_command,
)

if TYPE_CHECKING:
    from difftrain.evaluation.sources.resizing import Resizing

Resize = Annotated[
    int | None,
    typer.Option(help="Resize the shorter side of each picture of a folder, in pixels (bicubic)."),
]
Crop = Annotated[bool, typer.Option("--crop", help="With --resize: take the square in the middle.")]
OnError = Annotated[
    str,
    typer.Option(help="A picture of a folder that cannot be read: stop, or skip it and say so."),
]


def resizing_of(resize: int | None, crop: bool) -> "Resizing | None":
    """Return how pictures of folders are resized.

    Raises:
        InputError: For a crop without a size, and for a size below 1.
    """
    from difftrain.core.errors import InputError
    from difftrain.evaluation.sources.resizing import Resizing

    if resize is None:
        if crop:
            raise InputError("--crop: it needs a size. Write --resize 256 --crop.")
        return None
    if resize < 1:
        raise InputError(f"--resize {resize}: expected a number of pixels, such as 256.")
    return Resizing(resize, crop)


def checked_on_error(on_error: str) -> Literal["stop", "skip"]:
    """Return what --on-error says.

    Raises:
        InputError: For other words than stop and skip.
    """
    from difftrain.core.errors import InputError

    if on_error == "stop":
        return "stop"
    if on_error == "skip":
        return "skip"
    raise InputError(f"--on-error {on_error}: expected stop or skip.")


@app.command()
def evaluate(
    run: Annotated[
        str | None, typer.Argument(help="The folder of a run, scored as its recipe says.")
    ] = None,
    overrides: Overrides = None,
    generated: Annotated[
        str | None, typer.Option(help="A folder of images to score, in place of a run.")
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="With --generated: a folder of images, or STATS.npz.")
    ] = None,
    features: Annotated[
        str | None, typer.Option(help="With --generated: a feature extractor, such as inception.")
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            help="With --generated: metrics by name with commas between them, or as blocks: "
            "'[{type: kernel_distance, subsets: 10}, frechet_distance]'. By default: "
            "frechet_distance."
        ),
    ] = None,
    training: Annotated[
        str | None,
        typer.Option(help="With --generated: training images, for nearest_neighbour_ratio."),
    ] = None,
    resize: Resize = None,
    crop: Crop = False,
    on_error: OnError = "stop",
    step: Step = None,
    steps: Annotated[
        str | None,
        typer.Option(help="Score several checkpoints: all, or steps such as 1000,2000."),
    ] = None,
    weights: Weights = "ema",
    lora_scale: LoraScale = None,
    json: Annotated[str | None, typer.Option(help="Write the scores to this file too.")] = None,
) -> None:
    """Score a run, or a folder of images against a folder or a statistics file.

    On several processes: accelerate launch -m difftrain.evaluate RUN
    """

    def action() -> int:
        from difftrain.core.errors import InputError
        from difftrain.run.evaluating import evaluate_folders, evaluate_run, read_metrics

        of_folders = {
            "--reference": reference,
            "--features": features,
            "--metrics": metrics,
            "--training": training,
            "--resize": resize,
            "--crop": crop or None,
            "--on-error": None if on_error == "stop" else on_error,
        }
        if run is not None and generated is None:
            for option, value in of_folders.items():
                if value is not None:
                    remedy = f"Write an override such as evaluation.{option[2:]}=..."
                    if option in ("--training", "--resize", "--crop"):
                        remedy = "Leave it out"
                    if option == "--on-error":
                        remedy = "Write loader.on_error=skip"
                    raise InputError(
                        f"evaluate: {option} has no effect on a run, which is scored as its recipe "
                        f"says. {remedy}, or score folders with --generated."
                    )
            if step is not None and steps is not None:
                raise InputError("evaluate: write --step or --steps, not both.")
            chosen = steps if step is None else str(step)
            averaged = is_averaged(weights)
            return evaluate_run(run, overrides or [], chosen, averaged, json, lora_scale)
        if run is None and generated and reference and features:
            of_runs = {"--step": step, "--steps": steps, "--lora-scale": lora_scale}
            of_runs["--weights"] = None if weights == "ema" else weights
            for option, given in of_runs.items():
                if given is not None:
                    raise InputError(
                        f"evaluate: {option} {given} has no effect on folders, whose samples are "
                        "made already. Leave it out, or write the folder of a run."
                    )
            blocks = read_metrics(metrics or "frechet_distance")
            reading = resizing_of(resize, crop), checked_on_error(on_error)
            return evaluate_folders(
                generated, reference, features, blocks, json, training, *reading
            )
        raise InputError(
            "evaluate: expected the folder of a run, or --generated DIR --reference DIR|STATS.npz "
            "--features NAME."
        )

    run_command(action)


@app.command()
def reference(
    data: Annotated[
        str,
        typer.Argument(
            help="A folder of images, or a data block: '{type: digits, part: held_out}'."
        ),
    ],
    features: Annotated[str, typer.Option(help="A feature extractor, such as inception.")],
    out: Annotated[str, typer.Option(help="The statistics file, STATS.npz.")],
    resize: Resize = None,
    crop: Crop = False,
    on_error: OnError = "stop",
) -> None:
    """Write feature statistics of a data set, as a reference for evaluate."""

    def action() -> None:
        from difftrain.run.evaluating import make_reference

        make_reference(data, features, out, resizing_of(resize, crop), checked_on_error(on_error))

    run_command(action)
