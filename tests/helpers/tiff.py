"""TIFF files of kinds that Pillow does not write."""

import struct


def tiff(content, width, height, bits, white_is_zero=False):
    """Return a TIFF file of grey levels.

    Args:
        content: The packed levels.
        width: Of the picture.
        height: Of the picture.
        bits: Bits of each level.
        white_is_zero: Whether 0 is white.
    """
    entries = [
        *[(256, 3, width), (257, 3, height), (258, 3, bits), (259, 3, 1)],
        *[(262, 3, 0 if white_is_zero else 1), (273, 4, 8), (277, 3, 1), (278, 3, height)],
        (279, 4, len(content)),
    ]
    table = struct.pack("<H", len(entries))
    for tag, kind, value in entries:
        table += struct.pack("<HHII", tag, kind, 1, value)
    place = 8 + len(content)
    return b"II*\0" + struct.pack("<I", place) + content + table + bytes(4)
