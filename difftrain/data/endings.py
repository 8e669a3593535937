"""Whether a picture file ends as its format says: a quick look at files that were cut short.

Only the beginning and the end of a file are read. "No" means that decoding must tell, since a whole
file may have something behind its end.
"""

import os
import struct
from io import BytesIO
from pathlib import Path
from typing import IO

TAIL = 4096  # bytes at the end in which a marker may lie, with what programs add behind it
HEAD = 64


def ends_well(source: Path | bytes) -> bool:
    """Return whether a picture ends as its format says.

    Args:
        source: A file, or its content.

    Returns:
        False if it does not, if its format has no end that could be looked for, or if the file
        cannot be read.
    """
    if isinstance(source, bytes):
        return _ends_well(BytesIO(source), len(source))
    try:
        with source.open("rb") as file:
            return _ends_well(file, os.fstat(file.fileno()).st_size)
    except (OSError, ValueError):
        return False


def _ends_well(file: IO[bytes], size: int) -> bool:
    head = file.read(HEAD)
    file.seek(max(0, size - TAIL))
    tail = file.read(TAIL)
    if head.startswith(b"\xff\xd8\xff"):  # JPEG: end of image
        return b"\xff\xd9" in tail
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return b"IEND\xaeB`\x82" in tail
    if head.startswith((b"GIF87a", b"GIF89a")):
        return tail.rstrip(b"\0").endswith(b";")
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return size >= 8 + int(struct.unpack_from("<I", head, 4)[0])
    if head.startswith(b"BM") and len(head) >= 6:
        return size >= int(struct.unpack_from("<I", head, 2)[0]) > 0
    return False
