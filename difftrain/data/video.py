"""A folder of videos, cut into clips."""

from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import Literal

from difftrain.data.folder import class_ids, existing_folder, folder_label, list_files
from difftrain.data.items import Clip, UnreadableImage
from difftrain.data.video_file import VideoFile, video_file
from difftrain.registry import DATASETS, InputError, PositiveInt

EXTENSIONS = (".avi", ".gif", ".mkv", ".mov", ".mp4", ".webm")


@DATASETS.register("video_folder")
class VideoFolder:
    """Clips of the videos below `path` at any depth, hidden ones left out, links followed, in the order of their paths.

    The clips of a video are its consecutive windows of num_frames x frame_step frames, every frame_step-th of which is taken;
    what is left over at its end is not used. labels: "folders" (the first folder level is the class; ids in sorted order).
    Needs PyAV: pip install difftrain[video].
    """

    def __init__(self, path: str, num_frames: PositiveInt, frame_step: PositiveInt = 1, labels: Literal["folders", "none"] = "none"):
        self.num_frames, self.frame_step = num_frames, frame_step
        root = existing_folder(path, "video")
        records = list_files(root, "video", EXTENSIONS)
        self.labels: list[int] | None = None
        self.class_names: list[str] | None = None
        if labels == "folders":
            self.labels, self.class_names = class_ids([folder_label(record) for record in records], records)
        self.files = [opened(root / record.file) for record in records]
        for file in self.files:
            self._check_length(file)
        self.ends = list(accumulate(len(file) // self.window for file in self.files))  # number of clips up to and with each file

    @property
    def window(self) -> int:
        """Frames of a file that one clip stands for."""
        return self.num_frames * self.frame_step

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, i: int) -> Clip:
        place = bisect_right(self.ends, i)
        file = self.files[place]
        first = (i - (self.ends[place - 1] if place else 0)) * self.window
        frames = file.frames(first, self.num_frames, self.frame_step)
        return Clip(frames, self.labels[place] if self.labels else None, name=f"{file.path}, frame {first}")

    def _check_length(self, file: VideoFile) -> None:
        if len(file) < self.window:
            raise InputError(f"video_folder: {file.path} has {len(file)} frames, but a clip of num_frames {self.num_frames} and frame_step "
                             f"{self.frame_step} needs {self.window}. Write smaller ones, or remove the file.")


def opened(path: Path) -> VideoFile:
    try:
        return video_file(path)
    except UnreadableImage as error:
        raise InputError(f"video_folder: {error}. Repair or remove it.") from error
