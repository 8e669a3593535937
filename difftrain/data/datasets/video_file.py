"""Video files through PyAV: frames by their number, and clips written. PyAV is imported only here.

A file is first read through without decoding, to know when each frame is shown. A frame is then
found by a seek to the key frame before it, so only the frames between the two are decoded in vain.
"""

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, dropwhile, islice
from pathlib import Path
from typing import Any

import PIL.Image

from difftrain.core.errors import InputError
from difftrain.data.datasets.video_ends import is_cut, is_partial, rest_in_words, whole_packets
from difftrain.data.images import check_regular, digest_of
from difftrain.data.opening import UnreadableImage

FRAMES_PER_SECOND = 8  # of clips that are written: samples have no frame rate of their own


def pyav() -> Any:
    """Import the module `av`.

    Raises:
        InputError: If PyAV is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise InputError(
            "videos are read with PyAV, which is not installed. Write: pip install difftrain[video]"
        ) from error
    return av


@dataclass(frozen=True)
class VideoFile:
    """A video file with the times of its frames.

    Args:
        path: The file.
        times: When each frame is shown, ascending, in units of the stream.
        seekable: Whether frames can be found by these times.
        cut_short: What is there of a file that has lost its end, such as "24 of 60 frames"; empty
            for a whole file.
    """

    path: Path
    times: list[int]
    seekable: bool
    cut_short: str = ""

    def __len__(self) -> int:
        return len(self.times)

    def frames(self, first: int, num: int, step: int) -> list[PIL.Image.Image]:
        """Decode the frames first, first + step, ...

        Args:
            first: Number of the first frame.
            num: How many frames.
            step: The distance of two frames.

        Returns:
            The frames, upright and in RGB (RGBA where the file has transparency).

        Raises:
            UnreadableImage: If they cannot be decoded.
        """
        av = pyav()
        last = first + (num - 1) * step
        name = f"{self.path}, frames {first} to {last}"
        try:
            with av.open(str(self.path)) as container:
                wanted = islice(self._decoded(container, first), 0, last - first + 1, step)
                found = [upright(frame) for frame in wanted]
        except av.error.FFmpegError as error:
            raise UnreadableImage(name, error.strerror) from error
        if len(found) < num:
            raise UnreadableImage(name, f"only {len(found)} of {num} frames can be decoded")
        return found

    def _decoded(self, container: Any, first: int) -> Iterator[Any]:
        """Return the decoded frames from number `first` on."""
        stream = container.streams.video[0]
        if self.seekable and first > 0:
            wanted = self.times[first]

            def is_earlier(frame: Any) -> bool:
                return frame.pts is None or frame.pts < wanted

            container.seek(wanted, stream=stream)
            frames = self._all_decoded(container)
            start = next(frames, None)
            if start is not None and start.pts is not None and start.pts <= wanted:
                return dropwhile(is_earlier, chain([start], frames))
            # The key frame that was found is shown after the wanted one.
            container.seek(self.times[0], stream=stream)
        return islice(self._all_decoded(container), first, None)

    def _all_decoded(self, container: Any) -> Iterator[Any]:
        """Return the decoded frames from where the container stands."""
        return whole_frames(container) if self.cut_short else container.decode(video=0)


def whole_frames(container: Any) -> Iterator[Any]:
    """Yield the decoded frames of a file that is cut, without one that reaches beyond its end.

    The decoder would fail on its packet before it gives out the frames that it holds back.
    """
    for packet in container.demux(video=0):
        if not packet.is_corrupt:
            yield from packet.decode()


def video_file(path: Path) -> VideoFile:
    """Read the times of a video's frames.

    Where a file has lost its end, a last frame of which only a part is there does not count.

    Args:
        path: The file.

    Raises:
        UnreadableImage: If it is not a video file, or holds no video.
    """
    av = pyav()
    check_regular(path, str(path))
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise UnreadableImage(str(path), "it holds no video", digest_of(path))
            packets = [packet for packet in container.demux(video=0) if packet.size]
            cut_short = ""
            if is_cut(path) or is_partial(packets[-1:]):
                packets = whole_packets(packets, container)
                cut_short = rest_in_words(len(packets), container)
            times = [packet.pts for packet in packets if not packet.is_discard]
    except (av.error.FFmpegError, OSError) as error:
        reason = error.strerror or str(error)
        raise UnreadableImage(str(path), reason, digest_of(path)) from error
    if None in times:
        return VideoFile(path, list(range(len(times))), False, cut_short)
    return VideoFile(path, sorted(times), True, cut_short)


def upright(frame: Any) -> PIL.Image.Image:
    """Return a decoded frame as it is meant to be seen."""
    if any(component.is_alpha for component in frame.format.components):
        image = PIL.Image.fromarray(frame.to_ndarray(format="rgba"))
    else:
        image = frame.to_image()
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image


def write_clip(frames: Sequence[PIL.Image.Image], stem: Path) -> Path:
    """Write a clip: an MP4 (H.264) where PyAV is installed, else a GIF.

    Args:
        frames: The frames, of one size.
        stem: The file without its extension.

    Returns:
        The file.
    """
    if importlib.util.find_spec("av") is None:
        return write_gif(frames, stem.with_suffix(".gif"))
    av = pyav()
    file = stem.with_suffix(".mp4")
    # H.264 stores colors for 2 x 2 pixels at once: an odd side gets a black line.
    width, height = (side + side % 2 for side in frames[0].size)
    with av.open(str(file), "w") as container:
        options = {"crf": "10"}  # hardly visible losses
        stream = container.add_stream("libx264", rate=FRAMES_PER_SECOND, options=options)
        stream.width = width
        stream.height = height
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            even = frame.convert("RGB").crop((0, 0, width, height))
            container.mux(stream.encode(av.VideoFrame.from_image(even)))
        container.mux(stream.encode())
    return file


def write_gif(frames: Sequence[PIL.Image.Image], file: Path) -> Path:
    """Write a clip as an endless GIF, and return the file."""
    milliseconds = 1000 // FRAMES_PER_SECOND
    frames[0].save(file, save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)
    return file
