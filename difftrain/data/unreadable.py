"""What becomes of items that cannot be read: an error that names them, or a list of them.

Every reader of a data set asks `ReadErrors`, so `loader.on_error` means the same for all of them.
"""

import contextlib
import itertools
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import PIL.Image
import torch

from difftrain.core.console import wing_logger
from difftrain.core.errors import InputError
from difftrain.core.file_digests import RememberedDigests
from difftrain.core.files import DIGESTS, append, cache_home, records
from difftrain.core.processes import is_main, objects_from_processes, on_all, share
from difftrain.core.rng import Rng
from difftrain.data.contents import keep
from difftrain.data.endings import ends_well
from difftrain.data.images import digest_of
from difftrain.data.items import MapDataset
from difftrain.data.left_out import LeftOut
from difftrain.data.opening import OPENING, UnreadableImage
from difftrain.data.subset import Subset

logger = wing_logger(__name__)

OnError = Literal["stop", "skip"]

TRAINING = "data"  # the key of the training data in a recipe
SKIPPED_FILE = "skipped.jsonl"  # in the run folder
MOST_TOLD = 10  # items that cannot be read, in the log of a process
DECODERS = 4  # threads
AT_ONCE = 64  # items that a thread reads in turn
READABLE = bytes(15) + b"\1"  # what is remembered of a file that can be read


class Problem(NamedTuple):
    """An item that cannot be read.

    Attributes:
        item: Its index.
        name: What a message calls it.
        reason: Why it cannot be read.
        digest: Of the bytes of its file, in hexadecimal digits; empty where there are none.
    """

    item: int
    name: str
    reason: str
    digest: str

    def __str__(self) -> str:
        return f"{self.name} cannot be read: {self.reason}"


@dataclass(eq=False)
class ReadErrors:
    """Decides what becomes of items that cannot be read.

    Args:
        on_error: "stop" raises an InputError that names the item. "skip" leaves the item out, and
            lists it.
        file: The list, as JSON lines of `data` (the key of the data set), `name`, `reason`,
            `digest` of the file's bytes, and `step` where training met it; None keeps no list.
        remedy: What a user writes to leave such items out.
    """

    on_error: OnError = "stop"
    file: Path | None = None
    remedy: str = "loader: {on_error: skip}"
    _pending: list[dict[str, Any]] = field(default_factory=list)
    _num_told: int = 0

    def list_in(self, folder: Path) -> None:
        """Keep the list in a run folder from now on, with what has been met before."""
        self.file = folder / SKIPPED_FILE
        pending, self._pending = self._pending, []
        self.add(pending)

    def met(self, error: UnreadableImage, key: str) -> None:
        """Take note of an item that cannot be read.

        Args:
            error: Names the item.
            key: The key of its data set in the recipe.

        Raises:
            InputError: With "stop".
        """
        if self.on_error == "stop":
            raise InputError(self.refusal(str(error))) from error
        self.add([entry(key, error)])

    @contextlib.contextmanager
    def leaving_out(self, key: str) -> Iterator[None]:
        """Take note of an item that cannot be read within the context; see `met`."""
        try:
            yield
        except UnreadableImage as error:
            self.met(error, key)

    def left_out(self, key: str) -> list[LeftOut]:
        """Return what is listed of a data set, by its key in the recipe, and not repaired since."""
        listed = self._pending if self.file is None else records(self.file)
        # Two processes may have met one item at the same time.
        own = {
            one["name"]: one["reason"]
            for one in listed
            if one["data"] == key and not is_repaired(one)
        }
        return [LeftOut(name, f"cannot be read: {reason}") for name, reason in own.items()]

    def refusal(self, problem: str) -> str:
        """Return the message that ends the work at an item that cannot be read."""
        return f"{problem}. Repair or remove it, or write {self.remedy}."

    def add(self, found: Sequence[dict[str, Any]]) -> None:
        """Add to the list what is not there yet."""
        if self.file is None:
            self._pending += found
            return
        known: dict[tuple[str, str], set[str]] = {}
        for record in records(self.file):
            known.setdefault((record["data"], record["name"]), set()).add(record["digest"])
        for record in found:
            digests = known.setdefault((record["data"], record["name"]), set())
            # Another content under the same name is another line, where contents are known.
            is_listed = record["digest"] in digests or (digests and not record["digest"])
            if not is_listed:
                digests.add(record["digest"])
                append(self.file, record)
                self._tell(record)

    def _tell(self, record: dict[str, Any]) -> None:
        """Say what is left out; of many only the first."""
        self._num_told += 1
        if self._num_told <= MOST_TOLD:
            logger.info(
                f"{record['data']}: {record['name']} cannot be read ({record['reason']}); it is "
                "left out"
            )
        elif self._num_told == MOST_TOLD + 1:
            logger.info(f"further items that cannot be read are listed in {self.file}")

    def part(
        self, dataset: MapDataset, key: str, limit: int | None = None, reads: bool = False
    ) -> MapDataset:
        """Return the items of a data set that a reader looks at.

        Collective with "skip", and with `reads`. With "skip", items that cannot be read are left
        out and listed. Files that are known to be readable are not decoded again.

        Args:
            dataset: The data set.
            key: Its key in the recipe.
            limit: The most items that are taken, evenly spread, since a folder is sorted by class.
                An item that cannot be read is replaced by one of those behind it.
            reads: Whether all of them are read with "stop" too, so that an error comes now.

        Raises:
            InputError: On every process, if an item cannot be read (with "stop"), or none can.
        """
        size = len(dataset)
        count = size if limit is None else min(limit, size)
        starts = [n * size // count for n in range(count + 1)]
        if self.on_error == "stop" and not reads:
            return dataset if count == size else Subset(dataset, starts[:-1])
        strides = [range(a, b) for a, b in itertools.pairwise(starts)]
        chosen, problems = self._first_readable(dataset, strides)
        if problems and self.on_error == "stop":
            raise InputError(f"{key}: {self.stopped(problems, size)}")
        if is_main():
            self.add([entry(key, problem) for problem in problems])
        if not chosen:
            raise InputError(
                f"{key}: none of the {len(problems)} items that were tried can be read. The first: "
                f"{problems[0]}."
            )
        return dataset if len(chosen) == size else Subset(dataset, chosen)

    def stopped(self, problems: Sequence[Problem], size: int) -> str:
        """Return the message that ends the work at items that cannot be read.

        Args:
            problems: The items.
            size: How many were looked at.
        """
        if len(problems) == 1:
            return self.refusal(str(problems[0]))
        return (
            f"{len(problems)} of {size} items cannot be read. The first: {problems[0]}. Repair or "
            f"remove them, or write {self.remedy}."
        )

    def _first_readable(
        self, dataset: MapDataset, strides: Sequence[range]
    ) -> tuple[list[int], list[Problem]]:
        """Return the first readable item of each stride, and the unreadable ones. Collective."""
        look = Look(dataset, self._known())
        mine = list(share(strides))

        def read_share() -> tuple[list[int], list[Problem]]:
            parts = [mine[start : start + AT_ONCE] for start in range(0, len(mine), AT_ONCE)]
            with ThreadPoolExecutor(DECODERS) as pool:
                found = list(itertools.chain.from_iterable(pool.map(look.through, parts)))
            readable = [item for item in found if isinstance(item, int)]
            return readable, [item for item in found if isinstance(item, Problem)]

        own = on_all(read_share)
        keep(look.remembered)
        everything = objects_from_processes(own)
        chosen = sorted(item for readable, _ in everything for item in readable)
        return chosen, sorted(problem for _, problems in everything for problem in problems)

    def _known(self) -> dict[str, str]:
        """Return why listed items cannot be read, by the digest of their bytes."""
        listed = self._pending if self.file is None else records(self.file)
        return {one["digest"]: one["reason"] for one in listed if one.get("digest")}


def looked_through(dataset: MapDataset, seconds: float | None = None) -> tuple[list[Problem], int]:
    """Find items that cannot be read, as far as the time allows.

    The ends of all files are looked at, and what does not end as its format says is decoded. Then
    the other items are decoded, in a random order that is always the same.

    Args:
        dataset: The items.
        seconds: For how long items are decoded; None decodes all of them.

    Returns:
        The problems in the order of the items, and how many items were decoded or are known to be
        readable.
    """
    look = Look(dataset, {})
    until = None if seconds is None else time.monotonic() + seconds
    with ThreadPoolExecutor(DECODERS) as pool:
        ends = list(pool.map(look.ends_well, range(len(dataset)), chunksize=AT_ONCE))
        doubtful = [i for i, is_whole in enumerate(ends) if not is_whole]
        order = torch.randperm(len(dataset), generator=Rng(0).shared("order of a look")).tolist()
        tried = [*doubtful, *(i for i in order if ends[i])]
        found: list[Problem | None] = []
        for start in range(0, len(tried), AT_ONCE):
            is_due = start < len(doubtful) or until is None or time.monotonic() < until
            if not is_due:
                break
            found += pool.map(look.problem, tried[start : start + AT_ONCE])
    keep(look.remembered)
    return sorted(problem for problem in found if problem is not None), len(found)


class Look:
    """Looks whether items can be read.

    Args:
        dataset: The items.
        known: Why some contents cannot be read, by their digest.
    """

    def __init__(self, dataset: MapDataset, known: dict[str, str]):
        self.dataset, self.known = dataset, known
        self.remembered = RememberedDigests(cache_home() / DIGESTS)

    def through(self, strides: Sequence[range]) -> list[int | Problem]:
        """Return the first item of each stride that can be read, and the problems before it."""
        return [found for stride in strides for found in self._in_turn(stride)]

    def problem(self, i: int) -> Problem | None:
        """Return why item i cannot be read; None if it can."""
        try:
            self._read(i)
        except UnreadableImage as error:
            return Problem(i, error.name, error.reason, error.digest)
        return None

    def ends_well(self, i: int) -> bool:
        """Return whether nothing speaks against item i: a file ends as its format says."""
        if self.dataset.items_are != "images" or decodes_to_look(self.dataset):
            return True
        try:
            source = self.dataset.original(i).source
        except UnreadableImage:
            return False
        return isinstance(source, PIL.Image.Image) or ends_well(source)

    def _in_turn(self, stride: range) -> Iterator[int | Problem]:
        for i in stride:
            found = self.problem(i)
            if found is None:
                yield i
                return
            yield found

    def _read(self, i: int) -> None:
        """Read item i, unless its file is known to be readable.

        Raises:
            UnreadableImage: If it cannot be read, or if its bytes are listed.
        """
        if self.dataset.items_are != "images":
            self.dataset[i]
            return
        found = self.dataset.original(i)
        if self.known:
            digest = found.digest().hex()
            if digest in self.known:
                raise UnreadableImage(found.name, self.known[digest], digest)

        def decoded() -> bytes:
            found.decoded()
            return READABLE

        stamp = found.stamp
        if isinstance(found.source, bytes):
            stamp = found.digest().hex()
        self.remembered(None if stamp is None else f"{stamp}:{OPENING}", decoded)


def is_repaired(listed: dict[str, Any]) -> bool:
    """Return whether a listed file holds other bytes now."""
    if not (listed["digest"] and Path(listed["name"]).is_file()):
        return False
    return bool(digest_of(listed["name"]) != listed["digest"])


def decodes_to_look(dataset: MapDataset) -> bool:
    """Return whether a data set knows no quicker way to an item than to decode it."""
    return type(dataset).original is MapDataset.original


def entry(
    key: str, problem: "UnreadableImage | Problem", step: int | None = None
) -> dict[str, Any]:
    """Return the line of the list for an item that cannot be read.

    Args:
        key: The key of its data set in the recipe.
        problem: Names the item.
        step: The step in which training met it.
    """
    found = {
        "data": key,
        "name": problem.name,
        "reason": problem.reason,
        "digest": problem.digest,
    }
    return found if step is None else {**found, "step": step}
