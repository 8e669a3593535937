"""What `difftrain store` shows and removes."""

import re
import time
from pathlib import Path

from difftrain.core.console import wing_logger
from difftrain.core.errors import InputError
from difftrain.core.files import cache_home
from difftrain.evaluation.stored import Stored, contents, unwanted

logger = wing_logger(__name__)

SECONDS = {"m": 60.0, "h": 3600.0, "d": 86400.0}
BYTES = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def open_folder(folder: str | None) -> Path:
    """Return the folder of a store.

    Raises:
        InputError: If a folder is named that is not there.
    """
    if folder is None:
        return cache_home()
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise InputError(
            f"--folder {folder}: there is no such folder. Write what a recipe names in "
            "evaluation.store, or leave --folder out."
        )
    return path


def as_table(root: Path) -> str:
    """Return what a store holds, in lines."""
    found = contents(root)
    if not found:
        return f"{root} holds nothing yet."
    lines = [f"{'last used':<12}{'size':>10}  {'samples':>9}  what"]
    lines += [as_line(stored) for stored in found]
    total = sum(stored.num_bytes for stored in found)
    return "\n".join([*lines, f"{in_words(total)} in {root}"])


def as_line(stored: Stored) -> str:
    """Return one line of the table."""
    day = time.strftime("%Y-%m-%d", time.localtime(stored.used))
    count = "" if stored.count is None else f"{stored.count:,}"
    of = f" of {stored.made_with}" if stored.made_with else ""
    size = in_words(stored.num_bytes)
    return f"{day:<12}{size:>10}  {count:>9}  {stored.what}{of}  {stored.path.name}"


def prune_store(older: str | None, keep: str | None, folder: str | None) -> None:
    """Remove what was not used for long, or the longest unused until a size is reached.

    Args:
        older: A time such as "30d"; None leaves this rule out.
        keep: A size such as "20GB"; None leaves this rule out.
        folder: The store; None takes the default.

    Raises:
        InputError: If no rule is given, or one that cannot be read.
    """
    if older is None and keep is None:
        raise InputError(
            "store prune: nothing says what may go. Write --older 30d, --keep 20GB, or both."
        )
    before = None
    if older is not None:
        before = time.time() - amount(older, SECONDS, "--older", "30d, 12h or 90m")
    limit = None
    if keep is not None:
        limit = int(amount(keep, BYTES, "--keep", "20GB or 500MB"))
    root = open_folder(folder)
    chosen = unwanted(contents(root), before, limit)
    for stored in chosen:
        logger.info(f"removed: {as_line(stored)}")
        stored.remove()
    total = sum(stored.num_bytes for stored in chosen)
    logger.info(f"{len(chosen)} removed, {in_words(total)} freed in {root}")


def amount(text: str, units: dict[str, float] | dict[str, int], option: str, such_as: str) -> float:
    """Read a number with a unit.

    Args:
        text: The text, such as "20GB".
        units: What each unit counts.
        option: What a message calls it.
        such_as: Examples for a message.

    Raises:
        InputError: If it is anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    known = {unit.lower(): factor for unit, factor in units.items()}
    if match is None or match[2].lower() not in known:
        raise InputError(f"{option} {text}: expected a number with a unit, such as {such_as}.")
    return float(match[1]) * known[match[2].lower()]


def in_words(num_bytes: int) -> str:
    """Return a size with the unit in which it reads best."""
    for unit, factor in reversed(BYTES.items()):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.1f} {unit}"
    return f"{num_bytes} bytes"
