"""The command line in this process, and what its runs need on a disk.

A process of its own costs ten seconds for torch and diffusers.
"""

import logging
from pathlib import Path

import numpy as np
import PIL.Image
from typer.testing import CliRunner

from difftrain.commands.app import with_flags_first
from difftrain.commands.entry import app
from difftrain.core.console import CurrentStdout

# Codec, pixel format and options with which PyAV writes files of an extension without any loss.
LOSSLESS: dict[str, tuple[str, str, dict[str, str]]] = {
    ".mp4": ("libx264rgb", "rgb24", {"qp": "0", "g": "10"}),
    ".mov": ("qtrle", "rgb24", {"g": "10"}),
    ".mkv": ("libx264rgb", "rgb24", {"qp": "0", "g": "10"}),
    ".avi": ("ffv1", "bgr0", {}),
    ".webm": ("libvpx-vp9", "gbrp", {"lossless": "1", "g": "10"}),
}


class Outcome:
    """How a command ended, and what it printed.

    The library's logger is afterwards as it was, so that tests may look at its records.

    Args:
        arguments: The command line behind `difftrain`.
    """

    def __init__(self, *arguments: str | Path):
        given = with_flags_first([str(argument) for argument in arguments])
        logger = logging.getLogger("difftrain")
        before = logger.level, logger.propagate
        try:
            result = CliRunner().invoke(app, given)
        finally:
            shown = [handler for handler in logger.handlers if isinstance(handler, CurrentStdout)]
            for handler in shown:
                logger.removeHandler(handler)
            logger.setLevel(before[0])
            logger.propagate = before[1]
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        self.code, self.out, self.error = result.exit_code, result.stdout, result.stderr


def command(*arguments: str | Path, code: int = 0) -> Outcome:
    """Run `difftrain ARGUMENTS`, which must end with this code; a traceback is an exception."""
    outcome = Outcome(*arguments)
    assert outcome.code == code, outcome.error or outcome.out
    return outcome


def refused(*arguments: str | Path) -> str:
    """Return the one message on standard error of a command that ends with code 2."""
    message = command(*arguments, code=2).error
    first_lines = [line for line in message.splitlines() if line.startswith("error: ")]
    assert first_lines == message.splitlines()[:1], message
    assert "Traceback" not in message
    return message


def pictures(folder: Path, num: int = 12, size: tuple[int, int] = (8, 8), classes: int = 0) -> Path:
    """Write RGB images of noise into a folder.

    Args:
        folder: The folder.
        num: Number of images.
        size: (width, height) of each.
        classes: Number of subfolders that take the images in turn; 0 uses none.
    """
    random = np.random.default_rng(0)
    for i in range(num):
        place = folder / f"class{i % classes}" if classes else folder
        place.mkdir(parents=True, exist_ok=True)
        noise = random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        PIL.Image.fromarray(noise).save(place / f"{i:03d}.png")
    return folder


def video(file: Path, frames: np.ndarray, rotation: int = 0, **more: str) -> Path:
    """Write a lossless video, with a key frame every ten frames where its codec has others.

    Args:
        file: The file, whose extension names the format.
        frames: [F, H, W, 3] uint8.
        rotation: Degrees by which players turn it.
        more: Further options of the codec.
    """
    import av

    codec, pixel_format, options = LOSSLESS[file.suffix.lower()]
    file.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(file), "w") as container:
        stream = container.add_stream(codec, rate=25, options={**options, **more})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixel_format
        if rotation:
            stream.set_display_rotation(rotation)
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return file


def noise_frames(num: int, size: tuple[int, int] = (16, 16)) -> np.ndarray:
    """Return frames of noise [num, height, width, 3] uint8, no two of them equal.

    Args:
        num: Number of frames.
        size: (width, height).
    """
    return np.random.default_rng(0).integers(0, 256, (num, size[1], size[0], 3), dtype=np.uint8)
