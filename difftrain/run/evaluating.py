"""Scores of a trained run, or of a folder of images against a folder or a statistics file."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from difftrain.core.console import tell_error, wing_logger
from difftrain.core.errors import ExitCode, InputError
from difftrain.core.files import writable_folder, write_json
from difftrain.core.launch import join_processes
from difftrain.core.processes import is_main, on_all, once_at_the_end
from difftrain.data.items import DATASETS, Dataset, MapDataset, refuse_other_than_images
from difftrain.data.left_out import account
from difftrain.data.unreadable import OnError, ReadErrors
from difftrain.evaluation.evaluator import Evaluator
from difftrain.evaluation.evidence import MAIN
from difftrain.evaluation.extraction import Extraction
from difftrain.evaluation.features.building import features_of_images
from difftrain.evaluation.reference import ReferenceStatistics, read_statistics, save_statistics
from difftrain.evaluation.results import Evaluation
from difftrain.evaluation.slots import METRICS, FeatureExtractor
from difftrain.evaluation.sources import DatasetImages
from difftrain.evaluation.sources.resizing import Resizing
from difftrain.recipe.yaml_text import read_yaml
from difftrain.report import write_report
from difftrain.run.final_scores import SCORES_FILE, keep_scores, outcome, score_lines
from difftrain.run.lora_scale import check_lora_scale, set_lora_scale
from difftrain.run.places import Store, open_store
from difftrain.run.sample_folder import SampleFolder
from difftrain.run.scoring import ScoringPlan
from difftrain.run.trained import TrainedRun

logger = wing_logger(__name__)


def evaluate_run(
    run: str,
    overrides: Sequence[str] = (),
    steps: str | None = None,
    averaged: bool = True,
    json_file: str | None = None,
    lora_scale: float | None = None,
) -> int:
    """Score a trained run as its recipe's evaluation block says.

    Every result is appended to scores.jsonl. That of the final weights (the averaged ones, if there
    are any) is evaluation.json too, and the headline of the report.

    Args:
        run: The run folder.
        overrides: Changes of the run's recipe, such as "evaluation.num_samples=1000".
        steps: Steps of the checkpoints: "all", or numbers with commas between them; None for that
            of the final weights.
        averaged: Whether averaged weights are wanted, if there are any.
        json_file: A further file for the scores; of several steps, for a list of them.
        lora_scale: Scale of the run's LoRA; None leaves it as it was trained.

    Returns:
        The exit code: 2 or 1 where a score failed.

    Raises:
        InputError: If the run cannot be scored.
    """
    device = join_processes()
    make_place_for(json_file)
    trained = TrainedRun(run, overrides, blocks=("evaluation", "data", "loader"))
    check_lora_scale(lora_scale, trained.model)
    if trained.recipe.evaluation is None:
        raise InputError(
            f"the recipe of {run} has no evaluation: block. Add one, or sample the run and compare "
            "folders with --generated, --reference and --features."
        )
    data, missing = training_data(trained)
    scoring = on_all(lambda: plan_of(trained, data, missing))
    scoring.read_references()
    chosen = trained.chosen_steps(steps)
    as_trained = lora_scale in (None, 1.0)
    scorer = scoring.final_scorer(trained.folder, device, lora_scale)
    num = scoring.settings.num_samples
    several = steps is not None and not steps.strip().isdigit()
    code = int(ExitCode.DONE)
    found, are_final = [], []
    for step in chosen:
        denoiser, weights = trained.denoiser(step, averaged, device)
        set_lora_scale(denoiser, lora_scale)
        logger.info(f"scoring {num} samples of step {step} ({weights} weights)")
        evaluation = scorer(denoiser)
        is_final = as_trained and trained.is_final(step, weights)
        are_final.append(is_final)
        found.append(keep_scores(evaluation, trained.folder, step, weights, is_final))
        code = max(code, show_scores(evaluation))
    if is_main():
        write_report(trained.folder)
        if json_file is not None:
            write_json(Path(json_file).expanduser(), found if several else found[0])
    if not all(are_final):
        final = trained.chosen_step(None)
        logger.info(
            f"written to {trained.folder / SCORES_FILE}; evaluation.json holds the scores of the "
            f"final weights alone (step {final})"
        )
    return code


def plan_of(trained: TrainedRun, data: Dataset | None, missing: str) -> ScoringPlan:
    """Return how a run is scored; see `ScoringPlan.of`."""
    return ScoringPlan.of(trained.recipe, trained.model, data, trained.errors(), missing)


def training_data(trained: TrainedRun) -> tuple[Dataset | None, str]:
    """Return a run's training data, or why it cannot be opened."""
    try:
        data: Dataset = trained.recipe.data.build()
    except InputError as error:
        logger.info(f"the training data cannot be opened, so nothing is compared with it: {error}")
        return None, str(error)
    return data, ""


def evaluate_folders(
    generated: str,
    reference: str,
    features: str,
    metrics: Sequence[Any],
    json_file: str | None = None,
    training: str | None = None,
    resizing: Resizing | None = None,
    on_error: OnError = "stop",
) -> int:
    """Score a folder of images against another, or against statistics that `reference` made.

    Args:
        generated: A folder of images at any depth, or a data block as YAML.
        reference: The same, or a statistics file.
        features: A feature extractor, by name or as a block.
        metrics: Metrics, by name or as blocks.
        json_file: A file for the scores.
        training: Images that a model was trained on, for the memorization check.
        resizing: Brings the sizes of the images together.
        on_error: Whether images that cannot be read end the work ("stop") or are left out ("skip").

    Returns:
        The exit code: 2 or 1 where a score failed.
    """
    device = join_processes()
    make_place_for(json_file)
    parts = [METRICS.parse(metric, "--metrics").build() for metric in metrics]
    reading = Reading(resizing, on_error)
    images = reading.images(generated, "--generated")
    store = open_store(None, None)
    extractor = open_features(features, images, store, device, reading.errors)
    real: DatasetImages | ReferenceStatistics
    if reference.endswith(".npz"):
        real = on_all(lambda: open_statistics(reference, extractor, resizing, images.shape))
    else:
        real = reading.images(reference, "--reference")
    if isinstance(real, ReferenceStatistics) and "assumed" in real.protocol:
        assumed = real.protocol["assumed"]
        logger.info(f"{reference} does not say how it was made; assumed: {assumed}")
    seen = None
    if training is not None:
        seen = reading.images(training, "--training")
    evaluation = Evaluator(real, seen, extractor, parts, store.features, seed=0)(
        images, {"generated": generated}
    )
    if json_file is not None and is_main():
        write_json(Path(json_file).expanduser(), evaluation.to_json(None))
    return show_scores(evaluation)


def read_metrics(text: str) -> list[Any]:
    """Read the metrics of a command line: names with commas between them, a block, or a list.

    Raises:
        InputError: If the text is not YAML.
    """
    if not text.lstrip().startswith(("{", "[")):
        return [name.strip() for name in text.split(",")]
    found = read_yaml(text, "--metrics")
    return found if isinstance(found, list) else [found]


def make_reference(
    data: str,
    features: str,
    out: str,
    resizing: Resizing | None = None,
    on_error: OnError = "stop",
) -> None:
    """Write feature statistics of a data set: mu, sigma, num_samples and the protocol.

    Args:
        data: A folder of images, or a data block as YAML.
        features: A feature extractor, by name or as a block.
        out: The file, which ends in .npz.
        resizing: Brings the sizes of the images together.
        on_error: Whether images that cannot be read end the work ("stop") or are left out ("skip").

    Raises:
        InputError: If the file cannot be written there, or images or features cannot be opened.
    """
    device = join_processes()
    if not out.endswith(".npz"):
        raise InputError(f"--out {out}: expected a file name that ends in .npz.")
    make_place_for(out, "--out")
    reading = Reading(resizing, on_error)
    images = reading.images(data, "DATA")
    store = open_store(None, None)
    extractor = open_features(features, images, store, device, reading.errors)
    outputs = [output for output in (MAIN, "spatial") if output in extractor.widths]
    extraction = Extraction(images, extractor, outputs, store.features, "reference")
    found = extraction()
    statistics = {output: found.statistics(output) for output in outputs}
    if is_main():
        protocol = {"features": extractor.protocol(), "data": data, **extraction.content()}
        save_statistics(Path(out).expanduser(), statistics, protocol)
    logger.info(f"{out}: {extractor.name} features of {len(images)} images")


def open_statistics(
    reference: str,
    extractor: FeatureExtractor,
    resizing: Resizing | None,
    shape: tuple[int, ...],
) -> ReferenceStatistics:
    """Open a statistics file (.npz).

    Args:
        reference: The file.
        extractor: What the generated images go through.
        resizing: How their sizes are brought together before.
        shape: (C, H, W) of the first of them.

    Raises:
        InputError: If it does not exist, or if the statistics are those of other features.
    """
    file = Path(reference).expanduser()
    if not file.is_file():
        raise InputError(
            f"--reference {reference}: there is no such file. Make it with difftrain reference."
        )
    return read_statistics(file, extractor, resizing, shape)


@dataclass(frozen=True)
class Reading:
    """How the folders of a command line are read.

    Args:
        resizing: Brings the sizes of the images together.
        on_error: Whether images that cannot be read end the work ("stop") or are left out ("skip").
    """

    resizing: Resizing | None
    on_error: OnError

    @cached_property
    def errors(self) -> ReadErrors:
        """What becomes of images that cannot be read."""
        return ReadErrors(self.on_error, remedy="--on-error skip")

    def images(self, text: str, option: str) -> DatasetImages:
        """Open images as they are. Collective.

        Args:
            text: A folder, or a data block as YAML.
            option: What a message calls it.

        Raises:
            InputError: If the folder does not hold images, or not all samples that it should.
        """
        dataset = on_all(lambda: open_data(text, option))
        readable = self.errors.part(dataset, option)
        left_out = [*dataset.left_out(), *self.errors.left_out(option)]
        if left_out:
            for line in account(len(readable), left_out).splitlines():
                logger.info(f"{option}: {line}")
        return on_all(lambda: DatasetImages(readable, resizing=self.resizing))


def is_block(text: str) -> bool:
    """Return whether a command line gives a data block rather than a folder."""
    return text.lstrip().startswith("{")


def open_data(text: str, option: str) -> MapDataset:
    """Open a folder of images, or a data block such as '{type: digits, part: held_out}'."""
    if is_block(text):
        block: Any = read_yaml(text, option)
    else:
        samples = SampleFolder(Path(text).expanduser(), option)
        samples.check_complete()
        block = samples.block()
    dataset = DATASETS.parse(block, option).build()
    refuse_other_than_images(dataset, option)
    if not isinstance(dataset, MapDataset):
        raise InputError(
            f"{option}: a stream has no end, and here all images are read. Write streaming: false."
        )
    return dataset


def open_features(
    text: str,
    images: DatasetImages,
    store: Store,
    device: torch.device,
    errors: ReadErrors,
) -> FeatureExtractor:
    """Build the feature extractor that --features names, for images of this shape."""
    block = read_yaml(text, "--features")
    return features_of_images(block, "--features", images, device, store.classifiers, errors)


def make_place_for(file: str | None, option: str = "--json") -> None:
    """Make the folder of a file before any work is done for it.

    Raises:
        InputError: If it cannot be written to, or if the file is a folder.
    """
    if file is None:
        return
    path = Path(file).expanduser()
    if path.is_dir():
        raise InputError(f"{option} {file}: this is a folder. Write the name of a file in it.")
    writable_folder(path.parent, option)


def show_scores(evaluation: Evaluation) -> int:
    """Show scores.

    Returns:
        The exit code: 2 or 1 where a score failed.
    """
    for line in score_lines(evaluation):
        logger.info(line)
    code, failed = outcome(evaluation)
    if code != ExitCode.DONE:
        once_at_the_end(lambda: tell_error(InputError(failed)))
    return code
