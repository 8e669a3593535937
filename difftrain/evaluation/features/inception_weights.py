"""The file with the Inception's weights: where it lies, whether it is the published one.

Two ports of the graph of 2015-12-05 are in use: a state dict ("torch": pytorch-fid,
torch-fidelity) and StyleGAN's TorchScript file. Nothing is fetched: an error says how to get a
missing file.
"""

import hashlib
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from difftrain.core.errors import InputError
from difftrain.evaluation.features.torchscript import is_torchscript, load_torchscript
from difftrain.models.files import first_line

PUBLISHED = "6726825d"  # how the SHA-256 of the state dict begins, by the files' own names
TORCH_FILES = ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth")
STYLEGAN_FILE = "inception-2015-12-05.pt"
URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/" + TORCH_FILES[1]
STYLEGAN_URL = (
    "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/" + STYLEGAN_FILE
)
COUNTER = "num_batches_tracked"  # of training; older files lack it
SHOWN = 3  # tensors that a message names


def read_weights(
    network: nn.Module,
    stylegan: Mapping[str, str],
    path: str | None,
    sha256: str | None,
    layout: str,
) -> dict[str, Any]:
    """Read the weights into the network.

    Args:
        network: The Inception.
        stylegan: The convolutions' names in StyleGAN's file by those in the network.
        path: The file; None looks where torch.hub keeps files.
        sha256: The first 8 or more digits of the hash of a file that is wanted although it is not
            the published one.
        layout: The layout that is preferred if path is None: "torch" or "stylegan".

    Returns:
        What a protocol records: {"sha256": the file's hash, "layout": which one it has,
        "published": whether this is the published hash}.

    Raises:
        InputError: If the file is missing, damaged or another one.
    """
    file = find_weights(path, layout)
    whole = digest_of_file(file)
    is_script = is_torchscript(file)
    check_digest(file, whole, sha256, is_script)
    state = tensors_of(file, is_script)
    layout = "torch"
    if any(name.startswith("layers.") for name in state):
        state, layout = translated(state, stylegan), "stylegan"
    fill_network(network, state, file)
    return {"sha256": whole, "layout": layout, "published": whole.startswith(PUBLISHED)}


def find_weights(path: str | None, layout: str) -> Path:
    """Find the file of the weights.

    Args:
        path: Where it should be; None looks where torch.hub keeps files.
        layout: The layout that is preferred.

    Raises:
        InputError: With how to get it, if it is missing.
    """
    if path is not None:
        file = Path(path).expanduser()
        if file.is_file():
            return file
        raise InputError(f"features 'inception': no file {file}. {how_to_get(file.parent)}")
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    names = (*TORCH_FILES, STYLEGAN_FILE) if layout == "torch" else (STYLEGAN_FILE, *TORCH_FILES)
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise InputError(
        f"features 'inception': no weights in {folder} (looked for {', '.join(names)}). "
        f"{how_to_get(folder)}"
    )


def how_to_get(folder: Path) -> str:
    """Return sentences that say how to get the published file into a folder."""
    return (
        f"On a machine with network: curl -L --create-dirs -o {folder / TORCH_FILES[1]} {URL} (91 "
        f"MB, sha256 {PUBLISHED}...; or StyleGAN's {STYLEGAN_URL}). Copy the file here, or name "
        "it: features: {type: inception, path: FILE}."
    )


def digest_of_file(file: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_digest(file: Path, whole: str, wanted: str | None, is_script: bool) -> None:
    """Check that a file is the published one, or the one that is wanted.

    Args:
        file: The file.
        whole: Its hash.
        wanted: How its hash should begin; None asks for the published one.
        is_script: Whether it is the TorchScript file, for which no hash is published: what was
            read is recorded.

    Raises:
        InputError: If it is not.
    """
    if wanted is not None:
        if len(wanted) < 8 or not whole.startswith(wanted.lower()):
            raise InputError(
                f"features 'inception': {file} has sha256 {whole}, but the recipe says sha256: "
                f"{wanted!r} (at least 8 digits). Give that file, or the hash of this one."
            )
        return
    if not is_script and not whole.startswith(PUBLISHED):
        raise InputError(
            f"features 'inception': {file} has sha256 {whole}, not the published {PUBLISHED}...: "
            f"it is damaged or another file. {how_to_get(file.parent)} To use this file all the "
            f"same, add sha256: {whole}."
        )


def tensors_of(file: Path, is_script: bool) -> dict[str, Tensor]:
    """Read the tensors of a file by name.

    Args:
        file: The file.
        is_script: Whether it is a TorchScript file rather than a state dict.

    Raises:
        InputError: If it is damaged, or holds anything but tensors.
    """
    cpu = torch.device("cpu")
    state: Any
    try:
        if is_script:
            state = load_torchscript(file, cpu).state_dict()
        else:
            state = torch.load(file, cpu, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError) as error:
        raise InputError(
            f"features 'inception': {file} cannot be read as weights ({first_line(error)}). "
            f"{how_to_get(file.parent)}"
        ) from error
    is_mapping = isinstance(state, Mapping)
    if not is_mapping or not all(isinstance(value, Tensor) for value in state.values()):
        kind = type(state).__name__
        raise InputError(
            f"features 'inception': {file} holds a {kind}, not a state dict of tensors. "
            f"{how_to_get(file.parent)}"
        )
    return dict(state)


def translated(state: Mapping[str, Tensor], stylegan_names: Mapping[str, str]) -> dict[str, Tensor]:
    """Give StyleGAN's tensors our names; its batch norm has no scale.

    Args:
        state: The tensors of its file.
        stylegan_names: Its names of convolutions by ours.
    """
    parts = {
        "weight": "conv.weight",
        "beta": "bn.bias",
        "mean": "bn.running_mean",
        "var": "bn.running_var",
    }
    names = {"output.weight": "fc.weight", "output.bias": "fc.bias"}
    for ours, theirs in stylegan_names.items():
        for part, own in parts.items():
            names[f"{theirs}.{part}"] = f"{ours}.{own}"
    made = {names.get(name, name): value for name, value in state.items()}
    for ours in stylegan_names:
        if f"{ours}.bn.bias" in made:
            made[f"{ours}.bn.weight"] = torch.ones_like(made[f"{ours}.bn.bias"])
    return made


def fill_network(network: nn.Module, state: Mapping[str, Tensor], file: Path) -> None:
    """Put tensors into the network.

    Args:
        network: The Inception.
        state: Its tensors by name.
        file: Their file, for messages.

    Raises:
        InputError: If they are not those of the network.
    """
    own = network.state_dict()
    needed = {name: value for name, value in own.items() if not name.endswith(COUNTER)}
    given = {name: value for name, value in state.items() if not name.endswith(COUNTER)}
    wrong = sorted(needed.keys() ^ given.keys())
    for name in needed.keys() & given.keys():
        if needed[name].shape != given[name].shape:
            wrong.append(name)
    if wrong:
        named = []
        for name in wrong[:SHOWN]:
            named.append(f"{name} {list(given[name].shape) if name in given else 'missing'}")
        raise InputError(
            f"features 'inception': {file} does not hold the Inception of 2015-12-05: {len(wrong)} "
            f"of its tensors do not fit ({', '.join(named)}). torchvision's own Inception is "
            f"another network. {how_to_get(file.parent)}"
        )
    network.load_state_dict({name: value.float() for name, value in given.items()}, strict=False)
