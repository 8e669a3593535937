"""difftrain compare: several recipes over several seeds, side by side."""

from typing import Annotated

import typer

from difftrain.commands.app import app, run_command


@app.command()
def compare(
    recipes: Annotated[list[str], typer.Argument(help="Recipe files.")],
    out: Annotated[str, typer.Option(help="Folder for the runs, results.json and report.html.")],
    seeds: Annotated[str, typer.Option(help="Seeds with commas between them.")] = "0",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A change of every recipe."),
    ] = None,
) -> None:
    """Train and score several recipes over several seeds, side by side."""

    def action() -> int:
        from difftrain.run.comparing import compare as run

        return run(recipes, seeds_of(seeds), out, set_ or [])

    run_command(action)


def seeds_of(text: str) -> list[int]:
    """Return the seeds that --seeds lists.

    Raises:
        InputError: If one of them is not a whole number.
    """
    from difftrain.core.errors import InputError

    try:
        return [int(seed) for seed in text.split(",")]
    except ValueError:
        raise InputError(
            f"--seeds {text}: expected whole numbers with commas, such as 0,1,2."
        ) from None
