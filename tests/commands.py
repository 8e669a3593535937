"""The command line in this process (importing torch and diffusers anew costs ten seconds), and what its runs need on disk."""

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from typer.testing import CliRunner

from difftrain.cli import app

TINY_VAE: dict[str, Any] = {
    "in_channels": 3, "out_channels": 3, "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [8, 8], "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 4, "sample_size": 8,
}  # two pixels for each latent
TINY_DIT: dict[str, Any] = {
    "sample_size": 4, "in_channels": 4, "out_channels": 4, "patch_size": 2, "num_layers": 1, "num_attention_heads": 2,
    "attention_head_dim": 4, "num_embeds_ada_norm": 10, "norm_num_groups": 4,
}


class Outcome:
    """How a command ended, and what it printed."""

    def __init__(self, *arguments: str | Path):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        self.code, self.out, self.error = result.exit_code, result.stdout, result.stderr


def command(*arguments: str | Path, code: int = 0) -> Outcome:
    """`difftrain ARGUMENTS`, which must end with this code; a traceback is an exception here."""
    outcome = Outcome(*arguments)
    assert outcome.code == code, outcome.error or outcome.out
    return outcome


def refused(*arguments: str | Path) -> str:
    """The one message on stderr of a command that ends with code 2."""
    message = command(*arguments, code=2).error
    assert [line for line in message.splitlines() if line.startswith("error: ")] == message.splitlines()[:1], message
    assert "Traceback" not in message
    return message


def pictures(folder: Path, num: int = 12, size: tuple[int, int] = (8, 8), classes: int = 0) -> Path:
    """A folder of RGB images of noise, in `classes` subfolders if that is not 0."""
    random = np.random.default_rng(0)
    for i in range(num):
        place = folder / f"class{i % classes}" if classes else folder
        place.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(place / f"{i:03d}.png")
    return folder


def vae(folder: Path) -> Path:
    """A small autoencoder with drawn weights, as diffusers saves it."""
    from diffusers import AutoencoderKL

    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoencoderKL(**TINY_VAE).save_pretrained(folder)
    return folder


LOSSLESS: dict[str, tuple[str, str, dict[str, str]]] = {
    ".mp4": ("libx264rgb", "rgb24", {"qp": "0", "g": "10"}), ".mov": ("qtrle", "rgb24", {"g": "10"}),
    ".mkv": ("libx264rgb", "rgb24", {"qp": "0", "g": "10"}), ".avi": ("ffv1", "bgr0", {}),
    ".webm": ("libvpx-vp9", "gbrp", {"lossless": "1", "g": "10"}),
}  # codec, pixel format and options with which PyAV writes files of an extension so that they give back every pixel


def video(file: Path, frames: np.ndarray, rotation: int = 0, **more: str) -> Path:
    """A lossless video of frames [F, H, W, 3] uint8, with a key frame every ten frames where its codec has others. more: its options."""
    import av

    codec, pixel_format, options = LOSSLESS[file.suffix.lower()]
    file.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(file), "w") as container:
        stream = container.add_stream(codec, rate=25, options={**options, **more})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pixel_format
        if rotation:
            stream.set_display_rotation(rotation)
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return file


def noise_frames(num: int, size: tuple[int, int] = (16, 16)) -> np.ndarray:
    """[num, height, width, 3] uint8, every frame another."""
    return np.random.default_rng(0).integers(0, 256, (num, size[1], size[0], 3), dtype=np.uint8)
