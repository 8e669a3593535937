"""Whether a video file holds as many bytes as it says. A copy that broke off holds fewer.

Each format consists of parts that state their size; a part that reaches beyond the end of the file
has been cut. Only the first bytes of a part are read, except of GIFs, whose parts are small.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

RIFF, EBML, GIF = b"RIFF", b"\x1a\x45\xdf\xa3", (b"GIF87a", b"GIF89a")
BOXES = frozenset(  # of MP4 and MOV, at the top
    b"ftyp styp moov moof mdat free skip wide pnot uuid meta sidx ssix mfra emsg prft pdin".split()
)
IMAGE, EXTENSION, TRAILER = 0x2C, 0x21, 0x3B  # blocks of a GIF


def is_cut(path: Path) -> bool:
    """Return whether parts of a video file are missing at its end.

    A file of another format, and one that states no sizes (as streams do), counts as whole.

    Args:
        path: The file.
    """
    with path.open("rb") as file:
        head = file.read(12)
        file.seek(0)
        ends = ends_of(head)
        return ends is not None and ends(file, os.fstat(file.fileno()).st_size)


def ends_of(head: bytes) -> Callable[[IO[bytes], int], bool] | None:
    """Return what finds out whether a file is cut, by its first 12 bytes; None: nothing does."""
    if head.startswith(GIF):
        return is_cut_gif
    if head.startswith(RIFF):
        return is_cut_riff
    if head.startswith(EBML):
        return is_cut_matroska
    if head[4:8] in BOXES:
        return is_cut_mp4
    return None


def is_cut_mp4(file: IO[bytes], size: int) -> bool:
    """Return whether the last box of an MP4 or MOV file reaches beyond its end."""
    place = 0
    while place + 8 <= size:
        file.seek(place)
        length, kind = int.from_bytes(file.read(4), "big"), file.read(4)
        if length == 1:  # the size follows in 8 bytes
            length = int.from_bytes(file.read(8), "big")
        # 0: up to the end of the file. What is no box is something behind the video.
        if length < 8 or kind not in BOXES:
            return False
        place += length
    return place > size


def is_cut_riff(file: IO[bytes], size: int) -> bool:
    """Return whether the last RIFF chunk of an AVI file reaches beyond its end."""
    place = 0
    while place + 8 <= size:
        file.seek(place)
        if file.read(4) != RIFF:  # something behind the video
            return False
        length = int.from_bytes(file.read(4), "little")
        place += 8 + length + length % 2
    return place > size + 1  # some writers leave out the byte that makes a size even


def is_cut_matroska(file: IO[bytes], size: int) -> bool:
    """Return whether the segment of a Matroska or WebM file reaches beyond its end."""
    file.seek(4)
    header = element_size(file)
    if header is None:
        return False
    file.seek(header + 4, os.SEEK_CUR)  # behind the header, and behind the segment's mark
    segment = element_size(file)
    return segment is not None and file.tell() + segment > size


def element_size(file: IO[bytes]) -> int | None:
    """Read the size of a Matroska element; None where it is unknown, as in a live stream.

    The number of leading zero bits says how many bytes it has.
    """
    first = file.read(1)
    if not first or not first[0]:
        return None
    num_more = 8 - first[0].bit_length()
    bits = 7 * (num_more + 1)
    value = int.from_bytes(first + file.read(num_more), "big") & ((1 << bits) - 1)
    return None if value == (1 << bits) - 1 else value


def is_cut_gif(file: IO[bytes], size: int) -> bool:
    """Return whether a GIF ends before its trailer."""
    content = file.read()
    place = 13 + palette_size(content[10:11])
    while place < size:
        kind = content[place]
        if kind == TRAILER:
            return False
        if kind == EXTENSION:
            place += 2
        elif kind == IMAGE:
            place += 11 + palette_size(content[place + 9 : place + 10])
        else:
            return True
        # Sub-blocks, up to one of length 0
        while place < size and content[place]:
            place += 1 + content[place]
        place += 1
    return True


def palette_size(flags: bytes) -> int:
    """Return the bytes of the palette that flags of a GIF announce."""
    if not flags or not flags[0] & 0x80:
        return 0
    return 3 << ((flags[0] & 7) + 1)


def is_partial(last: Sequence[Any]) -> bool:
    """Return whether the last packet, if there is one, reaches beyond the end of its file."""
    return any(packet.is_corrupt for packet in last)


def whole_packets(packets: list[Any], container: Any) -> list[Any]:
    """Return the packets of a file that is cut, without a last one that may be partial."""
    is_gif = container.format.name == "gif"  # whose packets do not say whether they are whole
    return packets[:-1] if is_gif or is_partial(packets[-1:]) else packets


def rest_in_words(num: int, container: Any) -> str:
    """Describe what is there of a file that is cut; empty if no frame is missing.

    Args:
        num: The number of whole frames.
        container: The file.
    """
    stream = container.streams.video[0]
    if container.format.name == "gif":  # it states no number: that of the stream is counted
        return f"{num} frames, and no end"
    if stream.frames:
        return "" if num >= stream.frames else f"{num} of {stream.frames} frames"
    seconds = stated_seconds(stream.metadata.get("DURATION", ""))
    if seconds is None and container.duration is not None:
        seconds = container.duration / 1e6
    if seconds is None or stream.average_rate is None:
        return f"{num} frames, and no end"
    expected = round(seconds * stream.average_rate)
    return "" if num >= expected else f"{num} of about {expected} frames"


def stated_seconds(duration: str) -> float | None:
    """Return the seconds of a duration such as 00:01:02.5; None if it is no such text."""
    try:
        hours, minutes, seconds = map(float, duration.split(":"))
    except ValueError:
        return None
    return 3600 * hours + 60 * minutes + seconds
