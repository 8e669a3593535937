"""difftrain check: preflight of a recipe."""

from typing import Annotated

import typer

from difftrain.commands.app import Overrides, app, run_command


@app.command()
def check(
    recipe: Annotated[str, typer.Argument(help="A YAML file.")],
    overrides: Overrides = None,
    everything: Annotated[
        bool,
        typer.Option(
            "--all", help="Decode every picture of the data sets, and not only for a minute each."
        ),
    ] = False,
) -> None:
    """Preflight of a recipe: schema, data, files to fetch, disk, memory. Trains nothing.

    The ends of all picture files are looked at, and a random part is decoded.
    """

    def action() -> None:
        from difftrain.core.console import showable
        from difftrain.run.checking import check as preflight

        print(showable(preflight(recipe, overrides or [], everything)))

    run_command(action)
