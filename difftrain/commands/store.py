"""difftrain store: what evaluations keep of data sets, and how to make room."""

from typing import Annotated

import typer

from difftrain.commands.app import app, run_command

Folder = Annotated[
    str | None,
    typer.Option(
        help="The store, where a recipe names one in evaluation.store. By default: "
        "DIFFTRAIN_CACHE, else ~/.cache/difftrain."
    ),
]

store = typer.Typer(
    help="List the features of data sets that evaluations keep, or remove some.",
    rich_markup_mode=None,
)
app.add_typer(store, name="store")


@store.callback(invoke_without_command=True)
def listing(context: typer.Context, folder: Folder = None) -> None:
    """List the features of data sets that evaluations keep, or remove some.

    Nothing is removed unless you ask for it; what is removed is made again when it is needed.
    """
    if context.invoked_subcommand is not None:
        return

    def action() -> None:
        from difftrain.run.stored import as_table, open_folder

        print(as_table(open_folder(folder)))

    run_command(action)


@store.command()
def prune(
    older: Annotated[
        str | None,
        typer.Option(help="Remove what was not used for this long: 30d, 12h or 90m."),
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option(help="Remove the longest unused until this much is left: 20GB or 500MB."),
    ] = None,
    folder: Folder = None,
) -> None:
    """Remove features of data sets, trained classifiers and digests of files."""

    def action() -> None:
        from difftrain.run.stored import prune_store

        prune_store(older, keep, folder)

    run_command(action)
