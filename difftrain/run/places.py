"""Where features of data sets and trained classifiers are kept, for every run that needs them."""

from dataclasses import dataclass
from pathlib import Path

from difftrain.core.console import wing_logger
from difftrain.core.errors import InputError
from difftrain.core.files import cache_home, writable_folder
from difftrain.core.processes import on_main
from difftrain.evaluation.stored import CLASSIFIERS, FEATURES

logger = wing_logger(__name__)


@dataclass(frozen=True)
class Store:
    """A folder that holds what evaluations find out about data sets.

    Args:
        root: The folder.
    """

    root: Path

    @property
    def features(self) -> Path:
        """The folder of feature rows."""
        return self.root / FEATURES

    @property
    def classifiers(self) -> Path:
        """The folder of classifiers that were trained for their features."""
        return self.root / CLASSIFIERS


def open_store(own: str | None, run: Path | None) -> Store:
    """Find a store that can be written to. Collective.

    Args:
        own: The folder that the recipe names in evaluation.store; None takes the default:
            DIFFTRAIN_CACHE, else ~/.cache/difftrain.
        run: The run folder, which serves where the default cannot be written to.

    Raises:
        InputError: If no folder can be written to.
    """

    def find() -> Store:
        if own is not None:
            return Store(writable_folder(Path(own).expanduser(), "evaluation.store"))
        try:
            return Store(writable_folder(cache_home(), "DIFFTRAIN_CACHE"))
        except InputError as error:
            if run is None:
                raise
            logger.info(
                f"{error} Until then features are kept in the run folder, where other runs do not "
                "find them."
            )
            return Store(run)

    return on_main(find)
