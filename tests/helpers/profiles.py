"""Colour profiles of a matrix and a gamma, written from the ICC specification."""

import struct

import numpy as np

D50 = (0.9642, 1.0, 0.8249)
# XYZ of the primaries under D50, columns R, G, B
DISPLAY_P3 = np.array(
    [[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]]
)
ADOBE_RGB = np.array(
    [[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]]
)
SRGB = np.array(
    [[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]]
)


def fixed(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))


def tag_xyz(values) -> bytes:
    return b"XYZ \0\0\0\0" + b"".join(fixed(value) for value in values)


def tag_gamma(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"


def tag_srgb_curve() -> bytes:
    """A parametric curve of type 3: that of sRGB."""
    values = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
    return b"para\0\0\0\0" + struct.pack(">HH", 3, 0) + b"".join(fixed(value) for value in values)


def tag_text(text: str) -> bytes:
    content = text.encode() + b"\0"
    return b"desc\0\0\0\0" + struct.pack(">I", len(content)) + content + bytes(4 + 4 + 2 + 1 + 67)


def profile(space: bytes, tags: dict[bytes, bytes]) -> bytes:
    """Return the bytes of an ICC profile, version 2, of a display."""
    place, table, data = 128 + 4 + 12 * len(tags), b"", b""
    for name, content in tags.items():
        padded = content + bytes(-len(content) % 4)
        table += name + struct.pack(">II", place + len(data), len(content))
        data += padded
    size = place + len(data)
    header = struct.pack(">I4sI4s4s4s", size, b"none", 0x02400000, b"mntr", space, b"XYZ ")
    header += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(4 + 4 + 4 + 4 + 8 + 4)
    header += b"".join(fixed(value) for value in D50)
    return header + bytes(128 - len(header)) + struct.pack(">I", len(tags)) + table + data


def rgb_profile(primaries: np.ndarray, gamma: float | None) -> bytes:
    """Return a profile of RGB; gamma None is the curve of sRGB."""
    curve = tag_srgb_curve() if gamma is None else tag_gamma(gamma)
    tags = {b"desc": tag_text("a test"), b"cprt": tag_text("none"), b"wtpt": tag_xyz(D50)}
    for n, name in enumerate((b"r", b"g", b"b")):
        tags[name + b"XYZ"] = tag_xyz(primaries[:, n])
        tags[name + b"TRC"] = curve
    return profile(b"RGB ", tags)


def grey_profile(gamma: float) -> bytes:
    """Return a profile of grey pictures."""
    tags = {b"desc": tag_text("a test"), b"cprt": tag_text("none"), b"wtpt": tag_xyz(D50)}
    return profile(b"GRAY", {**tags, b"kTRC": tag_gamma(gamma)})


def srgb_of(levels: np.ndarray, primaries: np.ndarray, gamma: float | None) -> np.ndarray:
    """Convert levels [..., 3] of a profile to those of sRGB by the closed form, as float."""
    x = levels / 255
    linear = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    if gamma is not None:
        linear = x ** (round(gamma * 256) / 256)
    linear = np.clip(linear @ primaries.T @ np.linalg.inv(SRGB).T, 0, 1)
    return 255 * encoded(linear)


def encoded(linear: np.ndarray) -> np.ndarray:
    """Return linear light in the curve of sRGB."""
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
