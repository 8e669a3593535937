"""difftrain train: train a recipe, export it, report and score it."""

from typing import Annotated

import typer

from difftrain.commands.app import Overrides, app, run_command


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A YAML file, such as recipes/digits.yaml.")],
    overrides: Overrides = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over in a new folder.")] = False,
    accept_changes: Annotated[
        bool, typer.Option("--accept-changes", help="Resume with a recipe that trains differently.")
    ] = False,
) -> None:
    """Train a recipe, then export, report and score it. Run the same command again to resume.

    On several processes: accelerate launch -m difftrain.train RECIPE [KEY=VALUE]...
    """

    def action() -> int:
        from difftrain.run.session import train as run

        return run(recipe, overrides or [], fresh, accept_changes)

    run_command(action)
