"""The entry point: every command is added to the application, which then runs."""

import sys
from typing import NoReturn

# Importing a command's file adds the command to the application.
from difftrain.commands import (  # noqa: F401
    check,
    compare,
    diagnose,
    evaluate,
    merge,
    methods,
    report,
    sample,
    store,
    train,
)
from difftrain.commands.app import app, take_process, with_flags_first


def main(command: str | None = None) -> NoReturn:
    """Run the application on the process's arguments.

    Args:
        command: The command, where the entry point names it already, as `-m difftrain.train` does.
    """
    take_process()
    arguments = sys.argv[1:] if command is None else [command, *sys.argv[1:]]
    app(with_flags_first(arguments), prog_name="difftrain")
    raise AssertionError("the application ends the process")
