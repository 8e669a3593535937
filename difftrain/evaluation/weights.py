"""A trained classifier's way to all processes: cached or trained by the main process, then handed to the others."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from difftrain.data.items import Images
from difftrain.distributed import is_main, sum_over_processes
from difftrain.evaluation.classifier import SETTINGS, ClassifierNetwork, train_classifier
from difftrain.registry import InputError
from difftrain.storage import digest, write_beside


def shared_classifier(images: Images, num_classes: int, seed: int, steps: int, cache: Path | None, name: str) -> ClassifierNetwork:
    """The classifier of these images, with the same weights on every process; called on all of them.

    cache: a folder where the main process keeps weights under a name that tells images, seed, steps and settings apart; None: no file.
    """
    if is_main():
        network = trained_or_cached(images, num_classes, seed, steps, cache, name)
    else:
        network = ClassifierNetwork(images.pixels.shape[1:], num_classes).eval().requires_grad_(False)
    state = network.state_dict()
    network.load_state_dict({key: sum_over_processes(value if is_main() else torch.zeros_like(value)) for key, value in state.items()})
    return network


def trained_or_cached(images: Images, num_classes: int, seed: int, steps: int, cache: Path | None, name: str) -> ClassifierNetwork:
    if cache is None:
        return train_classifier(images, num_classes, seed, steps)
    mark = digest(images.pixels, images.labels, f"{num_classes} classes, seed {seed}, {steps} steps, {SETTINGS}")
    path = Path(cache) / f"{name}-{mark}.safetensors"
    if path.exists():
        return loaded(path, images.pixels.shape[1:], num_classes)
    network = train_classifier(images, num_classes, seed, steps)
    with write_beside(path) as beside:
        save_file(network.state_dict(), beside)
    return network


def loaded(path: Path, shape: Sequence[int], num_classes: int) -> ClassifierNetwork:
    network = ClassifierNetwork(shape, num_classes)
    try:
        network.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        raise InputError(f"{path}: not the weights of this classifier ({error}). Delete the file; it is made again.") from error
    return network.eval().requires_grad_(False)
