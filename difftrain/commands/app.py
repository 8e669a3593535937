"""The application: its global options, the options commands share, and how a command ends."""

import logging
from collections.abc import Callable
from typing import Annotated, NoReturn

import typer

from difftrain import __version__

app = typer.Typer(
    name="difftrain",
    help="Train and evaluate diffusion models. A training method is one formula in its own slot.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Changes of the recipe: training.steps=200"),
]
Run = Annotated[str, typer.Argument(help="The folder of a run.")]
Step = Annotated[
    int | None,
    typer.Option(help="Use the checkpoint of this step, not the best or the latest one."),
]
Weights = Annotated[
    str,
    typer.Option(help="ema: the running average, if the run has one. model: the trained weights."),
]
LoraScale = Annotated[
    float | None, typer.Option(help="Scale of the run's own LoRA. 0 is the base model.")
]
Loras = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        metavar="FILE[:SCALE]",
        help="Add a LoRA: a file, or the folder of a run. Repeat the option to add several.",
    ),
]
GLOBAL_FLAGS = ("--quiet", "--verbose")  # accepted anywhere on the command line


def show_version(wanted: bool) -> None:
    """Print the version and leave."""
    if wanted:
        print(f"difftrain {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=show_version, is_eager=True, help="Print the version."),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print warnings and errors only.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Print debug messages, with the name of the wing.")
    ] = False,
) -> None:
    """Train and evaluate diffusion models. A training method is one formula in its own slot."""
    level = logging.INFO
    if quiet:
        level = logging.WARNING
    if verbose:
        level = logging.DEBUG
    logging.getLogger("difftrain").setLevel(level)


_owns_process = False  # whether the entry point started the application


def take_process() -> None:
    """Say that the application is all that the process does, so that a command may end it."""
    global _owns_process
    _owns_process = True


def run_command(action: Callable[[], int | None]) -> NoReturn:
    """Run a command's work and end it with its exit code.

    An `InputError` becomes one message on standard error and code 2.

    Args:
        action: The work. It returns an exit code, or None for a success.
    """
    from difftrain.core.console import show_messages, tell_error
    from difftrain.core.errors import ExitCode, InputError
    from difftrain.core.launch import leave_processes, own_process
    from difftrain.core.processes import once_at_the_end

    if _owns_process:
        own_process()
    level = logging.getLogger("difftrain").level or logging.INFO
    show_messages(level, names=level <= logging.DEBUG)
    try:
        code = action() or ExitCode.DONE
    except InputError as error:
        message = error
        once_at_the_end(lambda: tell_error(message))
        code = ExitCode.WRONG_INPUT
    raise typer.Exit(leave_processes(int(code)))


def is_averaged(weights: str) -> bool:
    """Return whether --weights asks for averaged weights.

    Raises:
        InputError: For other words than ema and model.
    """
    from difftrain.core.errors import InputError

    if weights not in ("ema", "model"):
        raise InputError(f"--weights {weights}: expected ema or model.")
    return weights == "ema"


def with_flags_first(arguments: list[str]) -> list[str]:
    """Move the global flags to the front, where the application looks for them."""
    flags = [argument for argument in arguments if argument in GLOBAL_FLAGS]
    others = [argument for argument in arguments if argument not in GLOBAL_FLAGS]
    return [*flags, *others]
