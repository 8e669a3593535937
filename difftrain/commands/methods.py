"""difftrain methods: every registered part."""

from typing import Annotated

import typer

from difftrain.commands.app import app, run_command


@app.command()
def methods(
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    imports: Annotated[
        list[str] | None,
        typer.Option("--import", help="A module of your own whose parts are listed too."),
    ] = None,
) -> None:
    """List every registered part: slot, name, arguments with defaults, formula, source."""

    def action() -> None:
        from json import dumps

        from difftrain.recipe.catalogue import as_text
        from difftrain.recipe.catalogue import methods as listed

        found = listed(imports or [])
        print(dumps(found, indent=1) if json else as_text(found))

    run_command(action)
