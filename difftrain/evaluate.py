"""Scores: of a trained run, or of a folder of images against a folder or a statistics file.

`difftrain evaluate RUN`, or `accelerate launch -m difftrain.evaluate RUN`; `difftrain evaluate --generated DIR --reference DIR
--features NAME`; and `difftrain reference DATA --features NAME --out STATS.npz` makes the statistics.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from difftrain.data.items import ImageDataset, Images, ImageStream, UnreadableImage, label_tensor, refuse_clips
from difftrain.data.transform import Transform, to_pixels
from difftrain.distributed import is_main
from difftrain.entry import DONE, guarded, join_processes, leave, say
from difftrain.evaluation.evaluator import Evaluation, Generated
from difftrain.evaluation.evaluator import evaluate as score_images
from difftrain.evaluation.evidence import Need, check_needs
from difftrain.evaluation.metrics import statistics_of
from difftrain.evaluation.statistics import FeatureStatistics, frechet_distance
from difftrain.recipe import read_yaml, register_everything
from difftrain.registry import DATASETS, FEATURES, METRICS, InputError
from difftrain.report import write_report
from difftrain.runlog import write_atomically
from difftrain.sample import GRID_FILE, made
from difftrain.sampling import blocks
from difftrain.train import score_lines
from difftrain.weights import TrainedRun


def evaluate_run(
    run: str, overrides: Sequence[str] = (), step: int | None = None, averaged: bool = True, json_file: str | None = None
) -> int:
    """Score a trained run as its recipe's evaluation block says, and write its evaluation.json."""
    device = join_processes()
    place_for(json_file)
    trained = TrainedRun(run, list(overrides))
    plan, settings = trained.plan, trained.plan.evaluation
    if settings is None:
        raise InputError(f"the recipe of {run} has no evaluation: block. Add one, or sample the run and compare folders "
                         "with --generated, --reference and --features.")
    chosen = trained.chosen_step(step)
    scorer = plan.scorer(settings.reference, settings.metrics, settings.num_samples, trained.folder / "features", device)
    denoiser, weights = trained.denoiser(chosen, averaged, device)
    say(f"scoring {settings.num_samples} samples of step {chosen} ({weights} weights)")
    found = {**scorer(denoiser).to_json(chosen), "weights": weights}
    if is_main():
        write_atomically(trained.folder / "evaluation.json", json.dumps(found, indent=1) + "\n")
        write_report(trained.folder)
    return tell_scores(found, json_file)


def evaluate_folders(generated: str, reference: str, features: str, metrics: Sequence[str], json_file: str | None = None) -> int:
    """Score a folder of images (at any depth) against another, or against statistics made by `difftrain reference`."""
    register_everything()
    place_for(json_file)
    parts = [METRICS.parse(name.strip(), "--metrics").build() for name in metrics]
    images = read_images(open_data(generated, "--generated"))
    extractor = open_features(features, images)
    if reference.endswith(".npz"):
        found = against_statistics(images, reference, extractor, metrics)
    else:
        given: set[Need] = {"reference", "pixels"}
        check_needs(parts, given)
        real = read_images(open_data(reference, "--reference"))
        block = [Generated(list(own), images.pixels[own], None) for own in blocks(len(images), 256)]
        found = score_images(
            block, num_samples=len(images), reference=real, training=None, features=extractor, metrics=parts, seed=0,
            sampling={"generated": generated},
        )
    return tell_scores(found.to_json(None), json_file)


def against_statistics(images: Images, file: str, extractor: Any, metrics: Sequence[str]) -> Evaluation:
    """Only the Frechet distance compares with statistics; those of other features are refused."""
    if [name.strip() for name in metrics] != ["frechet_distance"]:
        raise InputError(f"--metrics {','.join(metrics)}: statistics hold a mean and a covariance, which give frechet_distance alone. "
                         "Write --metrics frechet_distance, or a folder of images as --reference.")
    if not Path(file).is_file():
        raise InputError(f"--reference {file}: there is no such file. Make it with difftrain reference.")
    statistics = FeatureStatistics.load(file)
    stored, own = statistics.protocol.get("features"), extractor.protocol()
    if stored is not None and stored != own:
        raise InputError(f"--reference {file} was made with other features:\n  {stored}\nthan these:\n  {own}\n"
                         "Make it again with difftrain reference, or write the --features that it was made with.")
    value = frechet_distance(statistics_of(extractor(images.pixels)), statistics)
    score = {"value": value, "features": extractor.name}
    protocol = {"features": own, "reference": statistics.protocol, "num_samples": len(images)}
    return Evaluation({"frechet_distance": score}, protocol, len(images))


def make_reference(data: str, features: str, out: str) -> int:
    """Feature statistics of a data set as STATS.npz: mu, sigma, num_samples and the protocol."""
    register_everything()
    if not out.endswith(".npz"):
        raise InputError(f"--out {out}: expected a file name that ends in .npz.")
    place_for(out, "--out")
    images = read_images(open_data(data, "DATA"))
    extractor = open_features(features, images)
    statistics_of(extractor(images.pixels)).save(Path(out), {"features": extractor.protocol(), "data": data})
    say(f"{out}: {extractor.name} features of {len(images)} images")
    return DONE


def open_data(text: str, option: str) -> ImageDataset:
    """A folder of images, or a data block such as '{type: digits, part: held_out}'."""
    block = read_yaml(text, option) if text.lstrip().startswith("{") else {"type": "image_folder", "path": text}
    dataset = DATASETS.parse(block, option).build()
    refuse_clips(dataset, option)
    if isinstance(dataset, ImageStream):
        raise InputError(f"{option}: a stream has no end, and here all images are read. Write streaming: false.")
    return dataset


def open_features(text: str, images: Images) -> Any:
    """The feature extractor that --features names, for images of this shape."""
    channels, height, width = images.pixels.shape[1:]
    own = Transform(min(height, width), channels=1 if channels == 1 else 3, resize="none")
    part = FEATURES.parse(read_yaml(text, "--features"), "--features")
    return part.build(shape=(channels, height, width), transform=own)


def place_for(file: str | None, option: str = "--json") -> None:
    """Make the folder of a file that is to be written, before any work is done for it."""
    if file is not None:
        made(Path(file).expanduser().parent, option)


def read_images(dataset: ImageDataset) -> Images:
    """All images as they are, [N, C, H, W] uint8; they must be of one size and mode. The grid that `sample` writes is left out."""
    try:
        items = [item for item in (dataset[i] for i in range(len(dataset))) if Path(item.name).name != GRID_FILE]
    except UnreadableImage as error:
        raise InputError(f"{error}. Repair or remove it.") from error
    if not items:
        raise InputError(f"no images but a {GRID_FILE}. Write the folder that holds the images.")
    first = items[0]
    for item in items:
        if (item.image.size, item.image.mode) != (first.image.size, first.image.mode):
            raise InputError(f"{item.name} is {item.image.size[0]}x{item.image.size[1]} {item.image.mode}, but {first.name} is "
                             f"{first.image.size[0]}x{first.image.size[1]} {first.image.mode}: expected images of one size and mode.")
    colour = "L" if first.image.mode in ("1", "L") else "RGB"
    return Images(torch.stack([to_pixels(item.image.convert(colour)) for item in items]), label_tensor([item.label for item in items]))


def tell_scores(found: dict[str, Any], json_file: str | None) -> int:
    say(score_lines(found["scores"]))
    if json_file is not None and is_main():
        write_atomically(Path(json_file).expanduser(), json.dumps(found, indent=1) + "\n")
    return DONE


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of `python -m difftrain.evaluate`, as accelerate and torchrun start it."""
    import argparse

    parser = argparse.ArgumentParser(prog="difftrain.evaluate", description="Score a trained run on all processes.")
    parser.add_argument("run")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--step", type=int)
    parser.add_argument("--weights", choices=["ema", "model"], default="ema")
    parser.add_argument("--json")
    given = parser.parse_intermixed_args(arguments)
    return leave(guarded(lambda: evaluate_run(given.run, given.overrides, given.step, given.weights == "ema", given.json)))


if __name__ == "__main__":
    sys.exit(main())
