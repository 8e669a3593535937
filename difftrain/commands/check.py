"""difftrain check: preflight of a recipe."""

from typing import Annotated

import typer

from difftrain.commands.app import Overrides, app, run_command


@app.command()
def check(
    recipe: Annotated[str, typer.Argument(help="A YAML file.")], overrides: Overrides = None
) -> None:
    """Preflight of a recipe: schema, data, files to fetch, disk, memory. Trains nothing."""

    def action() -> None:
        from difftrain.run.checking import check as preflight

        print(preflight(recipe, overrides or []))

    run_command(action)
