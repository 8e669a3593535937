"""A folder of videos, cut into clips."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Literal

from difftrain.core.errors import InputError
from difftrain.core.registry import PositiveInt
from difftrain.data.datasets.folder import (
    Record,
    class_ids,
    existing_folder,
    folder_label,
    list_files,
)
from difftrain.data.datasets.video_file import VideoFile, video_file
from difftrain.data.items import DATASETS, Clip, MapDataset
from difftrain.data.left_out import LeftOut
from difftrain.data.opening import UnreadableImage

EXTENSIONS = (".avi", ".gif", ".mkv", ".mov", ".mp4", ".webm")


@DATASETS.register("video_folder")
class VideoFolder(MapDataset):
    """Clips of the videos below a folder at any depth, in the order of their paths.

    The clips of a video are its consecutive windows of num_frames x frame_step frames, of which
    every frame_step-th frame is taken. The rest at a video's end is not used. Hidden files are left
    out, links are followed. It needs PyAV: pip install difftrain[video].

    Args:
        path: The folder.
        num_frames: Frames of each clip.
        frame_step: The distance of two frames of a clip in the video.
        labels: "folders" (the first folder level is the class; ids in sorted order) or "none".
    """

    def __init__(
        self,
        path: str,
        num_frames: PositiveInt,
        frame_step: PositiveInt = 1,
        labels: Literal["folders", "none"] = "none",
    ):
        self.num_frames: int = num_frames
        self.frame_step = frame_step
        root = existing_folder(path, "video")
        listing = list_files(root, "video", EXTENSIONS)
        records, self._left_out = listing.records, listing.left_out
        self.labels: list[int] | None = None
        if labels == "folders":
            names = [folder_label(record) for record in records]
            self.labels, self.class_names = class_ids(names, records)
        self._unreadable: list[UnreadableImage] = []
        self.files = list(self._opened(root, records))
        self._refuse_if_all_are_cut()
        self._left_out += [
            LeftOut(file.path.relative_to(root).as_posix(), cut_in_words(file))
            for file in self.files
            if file.cut_short
        ]
        for file in self.files:
            self._check_length(file)
        # The number of clips up to and with each file.
        self.ends = list(accumulate(len(file) // self.window for file in self.files))

    @property
    def window(self) -> int:
        """Frames of a video that one clip stands for."""
        return self.num_frames * self.frame_step

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, i: int) -> Clip:
        place, first = self._place(i)
        frames = self.files[place].frames(first, self.num_frames, self.frame_step)
        return Clip(frames, self.labels[place] if self.labels else None, name=self.name_of(i))

    def label_counts(self) -> Counter[int] | None:
        """Count the clips by class id; None without labels."""
        if self.labels is None:
            return None
        counts = Counter[int]()
        for label, file in zip(self.labels, self.files, strict=True):
            counts[label] += len(file) // self.window
        return counts

    def not_opened(self) -> list[UnreadableImage]:
        """Return the videos that cannot be read."""
        return list(self._unreadable)

    def left_out(self) -> list[LeftOut]:
        """Return what lies below the folder and is not read, and the videos that end early."""
        return list(self._left_out)

    def name_of(self, i: int) -> str:
        """Return the file of clip i, and its first frame."""
        place, first = self._place(i)
        return f"{self.files[place].path}, frame {first}"

    def _place(self, i: int) -> tuple[int, int]:
        """Return which file clip i lies in, and its first frame there."""
        place = bisect_right(self.ends, i)
        start = self.ends[place - 1] if place else 0
        return place, (i - start) * self.window

    def _opened(self, root: Path, records: Sequence[Record]) -> Iterator[VideoFile]:
        """Yield the videos that can be read, and take note of the others.

        Raises:
            InputError: If none can be read.
        """
        labels = self.labels
        kept = []
        num = 0
        for place, record in enumerate(records):
            try:
                yield video_file(root / record.file)
            except UnreadableImage as error:
                self._unreadable.append(error)
                continue
            num += 1
            if labels is not None:
                kept.append(labels[place])
        if not num:
            raise InputError(
                f"video_folder: {self._unreadable[0]}. Repair or remove it. No video below {root} "
                "can be read."
            )
        self.labels = None if labels is None else kept

    def _refuse_if_all_are_cut(self) -> None:
        if all(file.cut_short for file in self.files):
            first = self.files[0]
            count = "the only video" if len(self.files) == 1 else "like every video here"
            raise InputError(
                f"video_folder: {first.path}, {count}, is cut short: {first.cut_short}. Copy it "
                "again from where it came from."
            )

    def _check_length(self, file: VideoFile) -> None:
        if len(file) < self.window:
            why = f" (it is cut short: {file.cut_short})" if file.cut_short else ""
            raise InputError(
                f"video_folder: {file.path} has {len(file)} frames{why}, but a clip of num_frames "
                f"{self.num_frames} and frame_step {self.frame_step} needs {self.window}. Write "
                "smaller ones, or remove the file."
            )


def cut_in_words(file: VideoFile) -> str:
    """Return what is said of a video that has lost its end."""
    return f"cut short, and used up to there: {file.cut_short}"
