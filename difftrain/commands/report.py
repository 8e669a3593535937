"""difftrain report: rewrite the report.html of runs."""

from typing import Annotated

import typer

from difftrain.commands.app import app, run_command


@app.command()
def report(
    runs: Annotated[list[str], typer.Argument(help="Folders of runs, in any state.")],
) -> None:
    """Rewrite the report.html of runs from what their folders contain now."""

    def action() -> None:
        from pathlib import Path

        from difftrain.core.console import wing_logger
        from difftrain.core.errors import InputError
        from difftrain.report import write_report

        for run in runs:
            if not (Path(run) / "recipe.yaml").is_file():
                raise InputError(
                    f"{run!r} is not the folder of a run: it holds no recipe.yaml. Write the "
                    "output: of a recipe."
                )
        for run in runs:
            wing_logger(__name__).info(f"written: {write_report(Path(run))}")

    run_command(action)
