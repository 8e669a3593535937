"""What a command says while it works: messages through `logging`, and progress.

Each wing logs under its own name (difftrain.data, difftrain.training ...). A program that uses the
library sees what its own logging settings let through; the commands show it on the terminal.
"""

import logging
import sys
import time
from typing import Any, TextIO

from difftrain.core.processes import is_main

INTERVAL = 10.0  # seconds between lines of progress where there is no terminal


def wing_logger(module: str) -> logging.Logger:
    """Get the logger of the wing that a module belongs to.

    Args:
        module: The module's `__name__`, such as "difftrain.data.loader".
    """
    return logging.getLogger(".".join(module.split(".")[:2]))


class CurrentStdout(logging.StreamHandler[TextIO]):
    """Writes to what `sys.stdout` is at the time of the message."""

    def __init__(self) -> None:
        super().__init__(sys.stdout)

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record to the current standard output."""
        self.stream = sys.stdout
        super().emit(record)

    def format(self, record: logging.LogRecord) -> str:
        """Return the text of a record, as the standard output can show it."""
        return showable(super().format(record))


def showable(text: str) -> str:
    """Return a text with escapes for what the standard output cannot show, such as odd names."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


class OnlyOnMain(logging.Filter):
    """Lets information through on the main process alone, and warnings on all."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether this process shows the record."""
        return record.levelno >= logging.WARNING or is_main()


def show_messages(level: int = logging.INFO, names: bool = False) -> None:
    """Show the library's messages on standard output.

    Information comes from the main process alone, warnings come from every process.

    Args:
        level: The lowest level that is shown.
        names: Whether each line begins with the name of its logger.
    """
    logger = logging.getLogger("difftrain")
    for known in [one for one in logger.handlers if isinstance(one, CurrentStdout)]:
        logger.removeHandler(known)
    handler = CurrentStdout()
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s" if names else "%(message)s"))
    handler.addFilter(OnlyOnMain())
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False


def tell_error(error: Exception) -> None:
    """Print an error on standard error."""
    print(f"error: {error}", file=sys.stderr, flush=True)


def hush_libraries() -> None:
    """Turn off the progress bars and hints of diffusers and transformers; their errors stay.

    A library that is not imported yet is not imported for this.
    """
    for library in ("diffusers", "transformers"):
        settings: Any = sys.modules.get(f"{library}.utils.logging")
        if settings is not None:
            settings.disable_progress_bar()
            settings.set_verbosity_error()


class ProgressBar:
    """Shows how far a long piece of work is: a bar on a terminal, elsewhere a line every ten
    seconds.

    Args:
        total: Units of work altogether.
        done: Units that were done before.
        shown: Whether this process shows anything.
        unit: What one unit is called.
        what: What the work is called, if it needs a name.
    """

    def __init__(self, total: int, done: int, shown: bool, unit: str, what: str = ""):
        from tqdm import tqdm

        self.logger = logging.getLogger("difftrain.core")
        shown = shown and self.logger.isEnabledFor(logging.INFO)
        self.total, self.shown, self.unit, self.what = total, shown, unit, what
        self.bar = tqdm(
            total=total,
            initial=done,
            disable=None if shown else True,
            unit=unit,
            desc=what or None,
            dynamic_ncols=True,
        )
        self.started = self.last_line = time.monotonic()
        self.first = done

    def show(self, done: int, text: str = "", at_end: bool = True) -> None:
        """Show the state of the work.

        Args:
            done: Units that are done by now.
            text: What else to say, such as a loss.
            at_end: Whether the last unit gets a line, however soon it comes.
        """
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(done - self.bar.n)
        if not (self.shown and self.bar.disable):
            return
        now = time.monotonic()
        is_last = at_end and done == self.total
        if now - self.last_line > INTERVAL or is_last:
            self.last_line = now
            seconds_left = (now - self.started) / max(1, done - self.first) * (self.total - done)
            name = f"{self.what}: " if self.what else ""
            parts = [f"{name}{self.unit} {done}/{self.total}", text, f"{seconds_left:.0f} s left"]
            self.logger.info("  ".join(part for part in parts if part))

    def close(self) -> None:
        """Remove the bar from the terminal."""
        self.bar.close()
