"""TorchScript files. torch calls them deprecated, but published networks come as such files."""

import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch


def is_torchscript(file: Path) -> bool:
    """Return whether a file is a TorchScript archive."""
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any("/code/" in name for name in archive.namelist())


def load_torchscript(file: Path, device: torch.device) -> Any:
    """Load a TorchScript file, without torch's warning that the format is deprecated.

    Args:
        file: The file.
        device: Where its tensors go.

    Raises:
        RuntimeError: If it cannot be read.
    """
    load: Any = torch.jit.load
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.*", category=DeprecationWarning)
        return load(file, map_location=device)
