"""Video files through PyAV, which is imported where it is needed and only there: frames by their number, and clips written.

A file is read through once, undecoded, to know when each frame is shown; after that a frame is found by seeking to the key frame
before it, and what lies between the two is all that is decoded for nothing.
"""

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, dropwhile, islice
from pathlib import Path
from typing import Any

import PIL.Image

from difftrain.data.items import UnreadableImage
from difftrain.registry import InputError

FRAMES_PER_SECOND = 8  # of clips that are written: samples have no frame rate of their own


def pyav() -> Any:
    """The module `av`."""
    try:
        import av
    except ImportError as error:
        raise InputError("videos are read with PyAV, which is not installed. Write: pip install difftrain[video]") from error
    return av


@dataclass(frozen=True)
class VideoFile:
    """times: when each frame is shown, ascending, in units of the stream. seekable: frames can be found by these times."""

    path: Path
    times: list[int]
    seekable: bool

    def __len__(self) -> int:
        return len(self.times)

    def frames(self, first: int, num: int, step: int) -> list[PIL.Image.Image]:
        """The frames first, first + step, ..., `num` of them, upright and in RGB (RGBA where the file has transparency).

        UnreadableImage where they cannot be decoded.
        """
        av, name = pyav(), f"{self.path}, frames {first} to {first + (num - 1) * step}"
        try:
            with av.open(str(self.path)) as container:
                found = [upright(frame) for frame in islice(self._decoded(container, first), 0, (num - 1) * step + 1, step)]
        except av.error.FFmpegError as error:
            raise UnreadableImage(name, error.strerror) from error
        if len(found) < num:
            raise UnreadableImage(name, f"only {len(found)} of {num} frames can be decoded")
        return found

    def _decoded(self, container: Any, first: int) -> Iterator[Any]:
        """The decoded frames from number `first` on."""
        if self.seekable and first > 0:
            wanted = self.times[first]
            container.seek(wanted, stream=container.streams.video[0])
            frames = container.decode(video=0)
            start = next(frames, None)
            if start is not None and start.pts is not None and start.pts <= wanted:
                return dropwhile(lambda frame: frame.pts is None or frame.pts < wanted, chain([start], frames))
            container.seek(self.times[0], stream=container.streams.video[0])  # the key frame that was found is shown after it
        return islice(container.decode(video=0), first, None)


def video_file(path: Path) -> VideoFile:
    """The file with the times of its frames. UnreadableImage where it is none, or holds no video."""
    av = pyav()
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise UnreadableImage(str(path), "it holds no video")
            shown = [packet for packet in container.demux(video=0) if packet.size and not packet.is_discard]
            timed = all(packet.pts is not None for packet in shown)
            times = sorted(packet.pts for packet in shown) if timed else list(range(len(shown)))
            return VideoFile(path, times, seekable=timed)
    except av.error.FFmpegError as error:
        raise UnreadableImage(str(path), error.strerror) from error


def upright(frame: Any) -> PIL.Image.Image:
    """A decoded frame as it is meant to be seen."""
    transparent = any(component.is_alpha for component in frame.format.components)
    image = PIL.Image.fromarray(frame.to_ndarray(format="rgba")) if transparent else frame.to_image()
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image


def write_clip(frames: Sequence[PIL.Image.Image], stem: Path) -> Path:
    """`stem`.mp4 (H.264) where PyAV is installed, else `stem`.gif; returns the file."""
    if importlib.util.find_spec("av") is None:
        file = stem.with_suffix(".gif")
        frames[0].save(file, save_all=True, append_images=frames[1:], duration=1000 // FRAMES_PER_SECOND, loop=0)
        return file
    av, file = pyav(), stem.with_suffix(".mp4")
    width, height = (side + side % 2 for side in frames[0].size)  # its colours are stored for 2x2 pixels: an odd side gets a black line
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=FRAMES_PER_SECOND, options={"crf": "10"})  # hardly visible losses
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame.convert("RGB").crop((0, 0, width, height)))))
        container.mux(stream.encode())
    return file
