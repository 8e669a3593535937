"""Scores for other people's loops: of any callable that makes images, and the FID of two sets.

Under a launcher with several processes, each of them calls these functions, after an
`accelerate.Accelerator()` or `torch.distributed.init_process_group` has joined them. The work is
shared out, and all get the same result.
"""

import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import PIL.Image
import torch
from torch import Tensor

from difftrain.core.errors import InputError
from difftrain.core.files import cache_home, writable_folder
from difftrain.core.processes import is_main, num_processes, on_all, on_main
from difftrain.data import opening
from difftrain.data.datasets.image_folder import ImageFolder
from difftrain.data.items import MapDataset
from difftrain.data.transform import to_pixels
from difftrain.evaluation.distances.frechet import frechet_distance
from difftrain.evaluation.evaluator import Evaluator
from difftrain.evaluation.evidence import MAIN
from difftrain.evaluation.extraction import Extraction
from difftrain.evaluation.features.building import features_of_images
from difftrain.evaluation.features.inception import Inception
from difftrain.evaluation.protocols import ProtocolName
from difftrain.evaluation.reference import ReferenceStatistics, read_statistics
from difftrain.evaluation.results import Evaluation
from difftrain.evaluation.slots import METRICS, FeatureExtractor, Metric
from difftrain.evaluation.sources import DatasetImages
from difftrain.evaluation.sources.base import SampleBlock, Source
from difftrain.evaluation.sources.dataset_images import GREY
from difftrain.evaluation.sources.resizing import Resizing
from difftrain.evaluation.stored import CLASSIFIERS, FEATURES

Images = Tensor | Sequence[PIL.Image.Image]
Made = Callable[[list[int]], Images]
Reference = str | Path | MapDataset
BLOCK = 64  # images that are asked for together
SAMPLES = "samples"  # the folder of rows until their scores stand, within the store


def score(
    generate: Made,
    reference: Reference,
    features: str | dict[str, Any] | FeatureExtractor,
    metrics: Sequence[str | dict[str, Any] | Metric] = ("frechet_distance",),
    *,
    num_samples: int = 10_000,
    block_size: int = BLOCK,
    labels: Sequence[int] | None = None,
    captions: Sequence[str] | None = None,
    training: Reference | None = None,
    seed: int = 0,
    device: torch.device | None = None,
    resizing: Resizing | None = None,
) -> Evaluation:
    """Score images that a callable makes. Collective: every process calls it.

    Args:
        generate: Makes the images of a list of indices: a tensor [n, C, H, W] uint8, or n pictures
            of Pillow. An image must depend on its index alone, so that it is the same on any number
            of processes: seed its noise by the index.
        reference: What they are compared with: a folder of images, a data set, or a statistics file
            (.npz) that `difftrain reference` wrote or that is published.
        features: A feature extractor, by name, as a block such as {"type": "inception", "protocol":
            "clean"}, or the object.
        metrics: Metrics, by name, as blocks, or the objects.
        num_samples: How many images are made, with the indices from 0.
        block_size: How many images are asked for together.
        labels: The class of each image, for metrics that look at it.
        captions: The caption of each image, for metrics that look at it.
        training: Images that the model was trained on: a folder or a data set.
        seed: Seed of random subsets, such as those behind the floors.
        device: Where features are computed; None takes a GPU of this process, if there is one.
        resizing: Brings the images of folders and data sets to one size.

    Returns:
        The scores (`.scores["fid"]["value"]`), and the protocol that fixes them.

    Raises:
        InputError: Before the first image is made, if something that a metric needs is missing;
            or if what `generate` returns are not images.
    """
    check_joined()
    if isinstance(metrics, str):
        raise InputError(f"score: metrics is the text {metrics!r}, expected a list: [{metrics!r}].")
    device = device or own_device()
    base = place()
    real = on_all(lambda: opened(reference, "reference", resizing))
    shape = (3, 0, 0) if real is None else real.shape
    made = MadeSamples(generate, num_samples, block_size, shape, labels, captions)
    if isinstance(features, FeatureExtractor):
        extractor = features
    else:
        extractor = features_of_images(features, "features", real, device, base / CLASSIFIERS)
    compared: Source | ReferenceStatistics | None = real
    if compared is None:
        compared = on_all(lambda: read_statistics(Path(str(reference)), extractor))
    seen = None
    if training is not None:
        seen = on_all(lambda: opened(training, "training", resizing))
    # Nobody can know whether another call makes the same images, so their rows are its own.
    own = base / SAMPLES / on_main(lambda: uuid.uuid4().hex)
    chosen = [as_metric(metric) for metric in metrics]
    evaluator = Evaluator(compared, seen, extractor, chosen, own, seed, store=base / FEATURES)
    try:
        return evaluator(made, {"block_size": block_size})
    finally:
        if is_main():
            shutil.rmtree(own, ignore_errors=True)


def fid(
    a: Reference,
    b: Reference,
    *,
    weights: str | Path | None = None,
    protocol: ProtocolName = "torch_fidelity",
    device: torch.device | None = None,
    resizing: Resizing | None = None,
) -> float:
    """Compute the FID of two sets of images: the Frechet distance of the published Inception's
    features. Collective: every process calls it.

    Args:
        a: A folder of images, a data set, or a statistics file (.npz) of these features.
        b: The same.
        weights: The file of the published weights; None looks where torch.hub, pytorch-fid and
            torch-fidelity keep it.
        protocol: The package whose resize and scaling are meant, see `protocols.py`.
        device: Where features are computed; None takes a GPU of this process, if there is one.
        resizing: Brings the images of each set to one size; None: as they are.

    Returns:
        The distance.

    Raises:
        InputError: If the weights are missing, with how to get them, or if they are not the
            published ones: no other network's distance is called FID.

    Reference:
        Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash
        Equilibrium", arXiv:1706.08500.
    """
    check_joined()
    path = None if weights is None else str(weights)
    extractor = Inception(protocol, path, device=device or own_device())
    base = place() / FEATURES
    sides = []
    for name, given in (("a", a), ("b", b)):
        source = on_all(partial(opened, given, name, resizing))
        if source is None:
            sides.append(read_statistics(Path(str(given)), extractor, resizing).by_output[MAIN])
        else:
            rows = Extraction(source, extractor, [MAIN], base, "set")()
            sides.append(rows.statistics(MAIN))
    return frechet_distance(*sides)


class MadeSamples(Source):
    """Images that a callable makes.

    Args:
        generate: See `score`.
        num: How many there are.
        block_size: How many are asked for together.
        shape: (C, H, W) of one image.
        labels: Their classes, if they have any.
        captions: Their captions, if they have any.

    Raises:
        InputError: If a number is below 1, or if labels or captions are not one an image.
    """

    is_generated = True

    def __init__(
        self,
        generate: Made,
        num: int,
        block_size: int,
        shape: tuple[int, ...],
        labels: Sequence[int] | None,
        captions: Sequence[str] | None,
    ):
        for name, number in (("num_samples", num), ("block_size", block_size)):
            if number < 1:
                raise InputError(f"score: {name} is {number}, expected at least 1.")
        for name, values in (("labels", labels), ("captions", captions)):
            if values is not None and len(values) != num:
                raise InputError(
                    f"score: there are {len(values)} {name} for num_samples = {num}. Give one for "
                    "each image."
                )
        self.generate, self.num, self.block_size, self.shape = generate, num, block_size, shape
        self.labels, self.captions = labels, captions
        self.has_labels, self.has_captions = labels is not None, captions is not None

    def __len__(self) -> int:
        return self.num

    def identity(self) -> dict[str, Any]:
        """Return the count. What the callable makes is not known."""
        return {"num": self.num}

    def blocks(self, wanted: Iterable[list[int]]) -> Iterator[SampleBlock]:
        """Ask the callable for the images of each list of indices."""
        for indices in wanted:
            images = as_pixels(self.generate(indices), len(indices))
            labels, captions = None, None
            if self.labels is not None:
                labels = torch.tensor([self.labels[i] for i in indices])
            if self.captions is not None:
                captions = [self.captions[i] for i in indices]
            yield SampleBlock(images, labels, captions)


def as_pixels(images: Any, expected: int) -> Tensor:
    """Return images as a tensor [n, C, H, W] uint8.

    Args:
        images: What a callable has returned.
        expected: How many images it was asked for.

    Raises:
        InputError: If they are anything else than a tensor or pictures of one size.
    """
    found = images if isinstance(images, Tensor) else of_pictures(images)
    if found.dtype != torch.uint8 or found.ndim != 4 or len(found) != expected:
        raise InputError(
            f"score: generate returned {found.dtype} {list(found.shape)} for {expected} indices, "
            f"expected uint8 [{expected}, C, H, W]. Of x in [-1, 1] write "
            "((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)."
        )
    return found


def of_pictures(images: Any) -> Tensor:
    """Return pictures of Pillow as a tensor [n, C, H, W] uint8.

    Raises:
        InputError: If they are no pictures, or if their sizes or channels differ.
    """
    found = list(images) if isinstance(images, Iterable) else []
    if not found or not all(isinstance(image, PIL.Image.Image) for image in found):
        inside = f" of {type(found[0]).__name__}" if found else ""
        raise InputError(
            f"score: generate returned a {type(images).__name__}{inside}, expected a tensor uint8 "
            "[n, C, H, W] or pictures of Pillow. Of an array [n, H, W, C] uint8 write "
            "torch.from_numpy(array).permute(0, 3, 1, 2)."
        )
    pixels = [pixels_of(image) for image in found]
    shapes = sorted({tuple(one.shape) for one in pixels})
    if len(shapes) > 1:
        raise InputError(
            f"score: generate returned pictures of the shapes {', '.join(map(str, shapes))}, "
            "expected one (C, H, W). Resize them to one size, and convert all to RGB."
        )
    return torch.stack(pixels)


def pixels_of(image: PIL.Image.Image) -> Tensor:
    """Return the pixels of a picture, [C, H, W] uint8, opened as files of a reference are.

    Grey stays grey, and all others become RGB. What is transparent becomes white, and 16 bits are
    scaled to 8.

    Raises:
        InputError: If the range of its values is unknown.
    """
    channels: Literal[1, 3] = 1 if image.mode in GREY else 3
    return to_pixels(opening.opened(image, channels, "score: a picture from generate"))


def opened(given: Reference, name: str, resizing: Resizing | None = None) -> DatasetImages | None:
    """Open a set of images; None for a statistics file.

    Args:
        given: What the caller gives.
        name: What a message calls it.
        resizing: Brings the sizes of its images together.

    Raises:
        InputError: If it is neither, or if there is no such folder or file.
    """
    if isinstance(given, MapDataset):
        return DatasetImages(given, resizing=resizing)
    if not isinstance(given, (str, Path)):
        raise InputError(
            f"{name}: this is a {type(given).__name__}, expected a folder of images, a data set, "
            "or a statistics file (.npz)."
        )
    path = Path(given).expanduser()
    if path.suffix == ".npz" and path.is_file():
        return None
    if not path.is_dir():
        raise InputError(
            f"{name}: there is no folder {str(path)!r}. Give a folder of images, a data set, or a "
            "statistics file (.npz)."
        )
    return DatasetImages(ImageFolder(str(path)), resizing=resizing)


def as_metric(given: str | dict[str, Any] | Metric) -> Metric:
    """Return a metric that is given by name, as a block, or as the object."""
    if isinstance(given, Metric):
        return given
    metric: Metric = METRICS.parse(given, "metrics").build()
    return metric


def place() -> Path:
    """Return the folder of stored features. Collective."""
    return on_main(lambda: writable_folder(cache_home(), "DIFFTRAIN_CACHE"))


def own_device() -> torch.device:
    """Return this process's GPU, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def check_joined() -> None:
    """Refuse to score alone what a launcher started several processes for.

    Raises:
        InputError: With what to write first.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1 and num_processes() == 1:
        raise InputError(
            f"score: a launcher started {launched} processes, but they have not joined. Write "
            "accelerate.Accelerator() first."
        )
