"""The file with the Inception's weights: where it may lie, whether it is the published one, and its tensors under our names.

Two ports of the graph of 2015-12-05 are in use: a state dict ("torch": pytorch-fid, torch-fidelity) and StyleGAN's TorchScript file.
Nothing is fetched: a missing file is an error that says how to get it.
"""

import hashlib
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from difftrain.registry import InputError

PUBLISHED = "6726825d"  # how the SHA-256 of the state dict begins, by the files' own names
TORCH_FILES = ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth")
STYLEGAN_FILE = "inception-2015-12-05.pt"
URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/" + TORCH_FILES[1]
STYLEGAN_URL = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/" + STYLEGAN_FILE


def read_weights(network: nn.Module, stylegan: Mapping[str, str], path: str | None, sha256: str | None, layout: str) -> dict[str, Any]:
    """Fill the network; returns what the protocol records: the file's sha256, its layout, and whether this is the published hash.

    stylegan: its file's names of convolutions by the network's. layout: the preferred one when path is None. sha256: the first 8 or
    more digits of a file that is wanted although it is not the published one. Raises InputError for a missing, damaged or other file.
    """
    file = found_file(path, layout)
    whole = digest_of_file(file)
    script = is_torchscript(file)
    check_digest(file, whole, sha256, script)
    state = tensors_of(file, script)
    if any(name.startswith("layers.") for name in state):
        state = translated(state, stylegan)
        layout = "stylegan"
    else:
        layout = "torch"
    fill(network, state, file)
    return {"sha256": whole, "layout": layout, "published": whole.startswith(PUBLISHED)}


def found_file(path: str | None, layout: str) -> Path:
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
    raise InputError(f"features 'inception': no weights in {folder} (looked for {', '.join(names)}). {how_to_get(folder)}")


def how_to_get(folder: Path) -> str:
    return (
        f"On a machine with network: curl -L --create-dirs -o {folder / TORCH_FILES[1]} {URL} (91 MB, sha256 {PUBLISHED}...; or StyleGAN's "
        f"{STYLEGAN_URL}). Copy the file here, or name it: features: {{type: inception, path: FILE}}."
    )


def digest_of_file(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def is_torchscript(file: Path) -> bool:
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any("/code/" in name for name in archive.namelist())


def check_digest(file: Path, whole: str, wanted: str | None, script: bool) -> None:
    if wanted is not None:
        short = wanted.lower()
        if len(short) < 8 or not whole.startswith(short):
            raise InputError(
                f"features 'inception': {file} has sha256 {whole}, but the recipe says sha256: {wanted!r} (at least 8 digits). "
                "Give that file, or the hash of this one."
            )
    elif not script and not whole.startswith(PUBLISHED):  # no hash is published for the TorchScript file: what was read is recorded
        raise InputError(
            f"features 'inception': {file} has sha256 {whole}, not the published {PUBLISHED}...: it is damaged or another file. "
            f"{how_to_get(file.parent)} To use this file all the same, add sha256: {whole}."
        )


def tensors_of(file: Path, script: bool) -> dict[str, Tensor]:
    try:
        state: Any = torch.jit.load(file, "cpu").state_dict() if script else torch.load(file, "cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError) as error:
        why = str(error).strip().split("\n")[0][:200]
        raise InputError(f"features 'inception': {file} cannot be read as weights ({why}). {how_to_get(file.parent)}") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        kind = type(state).__name__
        raise InputError(f"features 'inception': {file} holds a {kind}, not a state dict of tensors. {how_to_get(file.parent)}")
    return dict(state)


def translated(state: Mapping[str, Tensor], stylegan_names: Mapping[str, str]) -> dict[str, Tensor]:
    """StyleGAN's tensors under our names; its batch norm has no scale."""
    parts = {"weight": "conv.weight", "beta": "bn.bias", "mean": "bn.running_mean", "var": "bn.running_var"}
    ours = {f"{theirs}.{part}": f"{name}.{own}" for name, theirs in stylegan_names.items() for part, own in parts.items()}
    ours |= {"output.weight": "fc.weight", "output.bias": "fc.bias"}
    made = {ours.get(name, name): value for name, value in state.items()}
    scales = {f"{name}.bn.weight": torch.ones_like(made[f"{name}.bn.bias"]) for name in stylegan_names if f"{name}.bn.bias" in made}
    return made | scales


def fill(network: nn.Module, state: Mapping[str, Tensor], file: Path) -> None:
    counters = "num_batches_tracked"  # of training; older files lack them
    needed = {name: value for name, value in network.state_dict().items() if not name.endswith(counters)}
    given = {name: value for name, value in state.items() if not name.endswith(counters)}
    wrong = sorted(name for name in needed.keys() ^ given.keys())
    wrong += [name for name in needed.keys() & given.keys() if needed[name].shape != given[name].shape]
    if wrong:
        what = ", ".join(f"{name} {list(given[name].shape) if name in given else 'missing'}" for name in wrong[:3])
        raise InputError(
            f"features 'inception': {file} does not hold the Inception of 2015-12-05: {len(wrong)} of its tensors do not fit ({what}). "
            f"torchvision's own Inception is another network. {how_to_get(file.parent)}"
        )
    network.load_state_dict({name: value.float() for name, value in given.items()}, strict=False)
