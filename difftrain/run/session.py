"""One run from its recipe to its report: train, export, sample, report, score, report again.

Export comes before the scores, so that a score that fails leaves a finished training with its
files. The same command then tries just the scores.
"""

import contextlib
import errno
import json
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from difftrain.core.console import tell_error, wing_logger
from difftrain.core.errors import ExitCode, InputError
from difftrain.core.files import append, write_json, write_text
from difftrain.core.launch import join_processes
from difftrain.core.processes import (
    barrier,
    is_main,
    num_processes,
    on_all,
    on_main,
    once_at_the_end,
)
from difftrain.data.items import MapDataset
from difftrain.data.unreadable import ReadErrors
from difftrain.diagnostics.denoising_error import DenoisingError
from difftrain.evaluation.agreement import AgreedError
from difftrain.generation.generator import generate
from difftrain.generation.pictures import save_grid
from difftrain.models.model import DenoiserNetwork
from difftrain.models.own import open_model
from difftrain.objective.weightings import weight_curve
from difftrain.recipe.reading import load
from difftrain.recipe.schema import Recipe
from difftrain.report import write_report
from difftrain.run import folder as run_folder
from difftrain.run.data import DataPlan
from difftrain.run.diagnosis import HeldOut, held_out_gap, subject_of
from difftrain.run.export import export
from difftrain.run.facts import DataFacts
from difftrain.run.final_scores import failed_evaluation, keep_scores, outcome, score_lines
from difftrain.run.finished import Finished
from difftrain.run.model import ModelPlan
from difftrain.run.scoring import ScoringPlan
from difftrain.run.training import Launch, TrainingPlan, make_accelerator
from difftrain.training import checkpoint
from difftrain.training.callbacks import Callback, SampleGrid
from difftrain.training.lr import remarks
from difftrain.training.prior import PriorImages, prior_images
from difftrain.training.scores import HeldOutLoss, InLoopEvaluation, Scorer
from difftrain.training.signals import handling
from difftrain.training.trainer import NotFinite, Trainer

logger = wing_logger(__name__)


class Plans:
    """Everything that a training run builds from its recipe, before the network's weights.

    Args:
        recipe: The recipe.
        launch: What the launcher decided.

    Raises:
        InputError: With every refusal that needs no weights.
    """

    def __init__(self, recipe: Recipe, launch: Launch):
        self.recipe = recipe
        # Cheap checks of the launch come before data is opened.
        recipe.training.build().micro_batch_of(launch.num_processes)
        self.errors = ReadErrors(recipe.loader.arguments["on_error"])
        data = recipe.data.build()
        takes_prompts = open_model(recipe.model).takes_prompts
        has_prompts = recipe.sampling.arguments["prompts"] is not None
        self.facts = DataFacts.of(data, takes_prompts and not has_prompts, self.errors)
        self.model = ModelPlan.of(recipe, self.facts)
        self.data = DataPlan.of(recipe, self.model, data, self.errors)
        self.scoring: ScoringPlan | None = None
        if recipe.evaluation is not None:
            self.scoring = ScoringPlan.of(recipe, self.model, data, self.errors)
        self.training = TrainingPlan.of(recipe, self.model, launch)


class TrainingRun:
    """One run on this process.

    Args:
        recipe: The recipe.
        fresh: Whether to start over, in a new folder.
        accept_changes: Whether a recipe that differs in what trains is accepted on a resume.
    """

    def __init__(self, recipe: Recipe, fresh: bool = False, accept_changes: bool = False):
        self.accelerator = make_accelerator(recipe)
        self.device = self.accelerator.device
        launch = Launch.of(self.accelerator)
        self.plans = on_all(lambda: Plans(recipe, launch))
        found = on_main(lambda: run_folder.prepare(recipe, fresh, accept_changes))
        self.folder, self.changes = found.folder, found.changes
        self.recipe = replace(recipe, output=str(self.folder))
        self.accelerator.project_configuration.logging_dir = str(self.folder)
        self.holds = False  # whether the folder is this run's to write to
        self.seconds: dict[str, float] = {}
        self.said_accuracy = False

    def __call__(self) -> int:
        """Train what is left, then export, report and score.

        Returns:
            The exit code.
        """
        with contextlib.ExitStack() as stack:
            self.holds = on_main(lambda: stack.enter_context(run_folder.held(self.folder)) or True)
            if self.is_done():
                report = self.folder / "report.html"
                steps = self.plans.training.settings.steps
                logger.info(f"{self.folder} is done: {steps} steps. Look at {report}")
                return ExitCode.DONE
            self.write_beginning()
            self.status(None, "running")
            self.read_references()
            step = self.train(stack)
            if step is None:
                return ExitCode.STOPPED
            with self.stopping_at_once("after its last step"):
                return self.finish(step)

    def write_beginning(self) -> None:
        """Write what a run folder holds from its first second on.

        The recipe of a run that resumes is replaced later, when the checkpoint has taken it.
        """
        if not is_main():
            return
        self.plans.facts.write(self.folder)
        run_folder.keep_imports(self.recipe, self.folder)
        if not (self.folder / run_folder.RECIPE_FILE).exists():
            write_text(self.folder / run_folder.RECIPE_FILE, self.recipe.to_yaml())
        write_text(self.folder / "weights.json", json.dumps(self.weights()) + "\n")

    def read_references(self) -> None:
        """Read what the run is scored with, before an hour is spent on training. Collective."""
        self.plans.errors.list_in(self.folder)
        with self.stopping_at_once("before its first step"), self.timed("reading"):
            if self.plans.scoring is not None:
                self.plans.scoring.read_references()

    def train(self, stack: contextlib.ExitStack) -> int | None:
        """Train to the last step, from the latest checkpoint.

        Returns:
            The step of the final weights; None if a signal stopped the run.
        """
        newest = checkpoint.latest(self.folder / "checkpoints")
        settings = self.plans.training.settings
        changes_search = any(key.startswith("evaluation.in_loop") for key in self.changes)
        if newest is not None and checkpoint.step_of(newest) >= settings.steps:
            self.record_changes(checkpoint.step_of(newest))
            best: int | None = checkpoint.trainer_state(newest)["best_step"]
            return checkpoint.step_of(newest) if changes_search else best or settings.steps
        with self.stopping_at_once("before its first step"):
            trainer = self.trainer()
            stack.callback(self.close_trackers)
            begun = trainer.resume(forget_best=changes_search)
            self.plans.training.optimizer.restate(trainer.optimizer.param_groups)
        if begun:
            logger.info(f"resuming {self.folder} at step {begun}")
        self.record_changes(begun)
        known = self.plans.data.account()
        finished = trainer.run()
        self.seconds |= trainer.seconds
        barrier()  # every process has listed what it could not read
        if self.plans.data.account() != known:
            for line in self.plans.data.account():
                logger.info(f"data: {line}")
        if not finished:
            step = trainer.progress.step
            self.status(
                ExitCode.STOPPED,
                f"stopped by a signal at step {step}, saved; run the same command again to go on",
            )
            self.report()
            return None
        return trainer.progress.best_step or trainer.progress.step

    def record_changes(self, step: int) -> None:
        """Append to the log what a resume changes in the recipe, and replace the recipe."""
        if not is_main():
            return
        if self.changes and step:
            append(self.folder / "log.jsonl", {"step": step, "changed": self.changes})
        write_text(self.folder / run_folder.RECIPE_FILE, self.recipe.to_yaml())

    # Training

    def trainer(self) -> Trainer:
        """Build the trainer, with the network's weights. Collective."""
        recipe, plans = self.recipe, self.plans
        denoiser = plans.model.denoiser()
        callbacks = self.callbacks()
        # With all prompts known, text encoders may be freed once the cache is filled.
        prior = None if plans.data.prior is None else self.prior(denoiser)
        loader = plans.data.loader(
            self.accelerator.process_index, self.accelerator.num_processes, self.device, prior
        )
        caches_latents = plans.data.cache is not None and plans.data.cache.latents
        if plans.model.encoder is not None and not caches_latents:
            self.try_encoder()
        schedule = recipe.lr_schedule.build()
        for line in remarks(schedule, plans.training.settings.steps):
            logger.info(f"lr_schedule: {line}")
        self.accelerator.init_trackers("tensorboard")
        return Trainer(
            denoiser,
            plans.training.objective,
            loader,
            plans.training.optimizer.build(denoiser),
            plans.training.settings,
            self.folder,
            seed=recipe.seed,
            accelerator=self.accelerator,
            learning_rate=schedule,
            ema=None if recipe.ema is None else recipe.ema.build(),
            callbacks=callbacks,
            prepare=plans.model.preparation,
            recipe=recipe.to_yaml(),
        )

    def try_encoder(self) -> None:
        """Find out now whether the autoencoder's latents of these images are finite."""
        data, transform = self.plans.data.data, self.plans.model.transform
        if isinstance(data, MapDataset) and data.items_are == "images" and transform is not None:
            preparation = self.plans.model.preparation
            on_main(lambda: preparation.try_encoder(data, transform, self.device))

    def prior(self, base: DenoiserNetwork) -> PriorImages:
        """Return samples of the model before training. Collective."""
        plans = self.plans
        assert plans.data.prior is not None
        plans.model.preparation.to(self.device)
        network = base.to(self.device).eval()
        with self.timed("prior"):
            return prior_images(
                plans.data.prior, plans.model.generator, network, self.folder / "prior", self.device
            )

    def weights(self) -> dict[str, Any]:
        """Return the weight of a sample's error along the noise level, for the report.

        The report cannot compute it, since it imports no torch.
        """
        objective = self.plans.training.objective
        return weight_curve(objective.weights, objective.trained_error, objective.schedule)

    def callbacks(self) -> list[Callback]:
        """Build what happens during training: grids, losses, scores, own callbacks."""
        plans, callbacks = self.plans, list[Callback]()
        settings, generator = plans.training.settings, plans.model.generator
        if settings.sample_every and settings.num_sampled:
            callbacks.append(
                SampleGrid(
                    settings.sample_every,
                    generator,
                    settings.num_sampled,
                    self.folder / "samples",
                    self.device,
                )
            )
        if plans.data.validation is not None:
            callbacks.append(self.held_out_loss())
        loop = None if plans.scoring is None else plans.scoring.settings.in_loop
        if plans.scoring is not None and loop is not None:
            scorer = plans.scoring.in_loop_scorer(self.folder, self.device)
            self.say_accuracy(scorer)
            weights = "model" if self.recipe.ema is None else "ema"
            file = self.folder / "evaluations.jsonl"
            callbacks.append(InLoopEvaluation(loop.every, scorer, loop.select, weights, file))
        given = {"folder": self.folder, "generator": generator, "device": self.device}
        callbacks += [part.build(**given) for part in self.recipe.callbacks]
        return callbacks

    def held_out_loss(self) -> HeldOutLoss:
        """Build the callback that measures the loss on held-out data."""
        plans, settings = self.plans, self.plans.data.validation
        assert settings is not None
        plans.model.preparation.to(self.device)
        subject = subject_of(
            plans.model,
            None,
            0,
            "",
            HeldOut("validation.data", settings.data),
            settings.num,
            self.device,
            plans.errors,
            training=None,
        )
        measure = DenoisingError(settings.num, settings.num_timesteps)
        measure.encode(subject)
        return HeldOutLoss(settings.every, subject, measure, self.folder / "validation.jsonl")

    def say_accuracy(self, scorer: Scorer) -> None:
        """Say once how well a classifier that was trained here classifies unseen images."""
        features = scorer.evaluator.features
        accuracy = features.protocol().get("accuracy")
        if accuracy is not None and not self.said_accuracy:
            share = 100 * accuracy
            logger.info(f"{features.name}: {share:.1f} % of unseen images classified correctly")
            self.said_accuracy = True

    # After training

    def finish(self, step: int) -> int:
        """Export, sample and report the weights of a step, then score them and report again.

        Returns:
            The exit code: 2 or 1 where a score failed.
        """
        finished = Finished(self.folder, self.recipe)
        denoiser = self.plans.model.denoiser()
        source = checkpoint.folder_of(self.folder / "checkpoints", step)
        weights = checkpoint.load_weights(denoiser, source, averaged=True)
        denoiser.to(self.device).eval()
        self.plans.model.preparation.to(self.device)
        if not finished.is_exported(step):
            self.export(denoiser, step)
            finished.mark_exported(step)
            self.report(denoiser)
        code, message = self.score(denoiser, step, weights)
        if code == ExitCode.DONE:
            finished.mark_scored(step)
            steps = self.plans.training.settings.steps
            message = f"trained {steps} steps; final weights of step {step}"
        self.status(code, message)
        self.report(denoiser)
        if code != ExitCode.DONE:
            once_at_the_end(lambda: tell_error(InputError(message)))
        return code

    def export(self, denoiser: DenoiserNetwork, step: int) -> None:
        """Write what other programs load, and the grid of the final weights. Collective."""
        with self.timed("export"):
            if is_main():
                for message in export(self.plans.model, denoiser, step, self.folder):
                    logger.info(message)
        with self.timed("sampling"):
            num = max(1, self.plans.training.settings.num_sampled)
            samples = generate(self.plans.model.generator, denoiser, num, self.device)
        if is_main():
            num_classes = self.plans.model.conditioning.num_classes
            save_grid(samples, self.folder / "samples" / "final.png", num_classes)

    def score(self, denoiser: DenoiserNetwork, step: int, weights: str) -> tuple[int, str]:
        """Score the final weights, and write evaluation.json. Collective.

        Returns:
            The exit code, and a message about what failed.
        """
        scoring = self.plans.scoring
        if scoring is None:
            return ExitCode.DONE, ""
        settings = scoring.settings
        with self.timed("final evaluation"):
            try:
                scorer = scoring.final_scorer(self.folder, self.device)
                self.say_accuracy(scorer)
                logger.info(
                    f"scoring {settings.num_samples} samples of step {step} ({weights} weights)"
                )
                evaluation = scorer(denoiser)
            except (InputError, AgreedError) as error:
                evaluation = failed_evaluation(settings, error)
            keep_scores(evaluation, self.folder, step, weights, is_final=True)
        for line in score_lines(evaluation):
            logger.info(line)
        self.measure_gap(denoiser, step, weights)
        code, failed = outcome(evaluation)
        if code != ExitCode.DONE:
            failed = (
                f"training and export are done, but {failed.rstrip('.')}. Run the same command "
                "again to compute the scores alone; evaluation: may be changed for that."
            )
        return code, failed

    def measure_gap(self, denoiser: nn.Module, step: int, weights: str) -> None:
        """Measure the loss on held-out against training images. Collective."""
        scoring = self.plans.scoring
        if scoring is None or scoring.training is None:
            return
        try:
            if not on_all(scoring.checks_memorization):
                return
            with self.timed("held-out gap"):
                held_out_gap(
                    self.plans.model,
                    denoiser,
                    step,
                    weights,
                    self.folder,
                    self.device,
                    scoring.settings.reference,
                    scoring.training,
                    self.plans.errors,
                )
        except InputError as error:  # a measurement that nobody asked for ends no run
            logger.info(f"held-out gap: left out, since {error}")

    def report(self, denoiser: nn.Module | None = None) -> None:
        """Write report.html from what the folder holds by now."""
        if not is_main():
            return
        model = self.plans.model
        trains = None if model.adapter is None else model.trains
        parameters = model.num_parameters
        if denoiser is not None:
            parameters = sum(p.numel() for p in denoiser.parameters())
        facts = run_folder.environment(
            num_processes(), str(self.device), parameters, self.seconds, trains
        )
        write_json(self.folder / "environment.json", facts)
        write_report(self.folder)

    # The run folder

    def is_done(self) -> bool:
        """Return whether the last step is trained, exported and scored with these settings."""
        newest = checkpoint.latest(self.folder / "checkpoints")
        steps = self.plans.training.settings.steps
        if newest is None or checkpoint.step_of(newest) < steps:
            return False
        status = self.folder / "status.json"
        if not status.exists() or json.loads(status.read_text()).get("code") != ExitCode.DONE:
            return False
        return Finished(self.folder, self.recipe).is_complete()

    def status(self, code: int | None, message: str) -> None:
        """Write how the run stands into status.json."""
        if is_main():
            run_folder.write_status(self.folder, code, message)

    def close_trackers(self) -> None:
        """Close accelerate's trackers."""
        for tracker in self.accelerator.trackers:
            tracker.finish()

    @contextlib.contextmanager
    def stopping_at_once(self, when: str) -> Iterator[None]:
        """Let a signal within the context end the process at once: what was trained is saved.

        Args:
            when: What the status says about the time, such as "before its first step".
        """

        def stop(number: int, frame: Any) -> None:
            self.status(
                ExitCode.STOPPED,
                f"stopped by a signal {when}; run the same command again to go on",
            )
            raise SystemExit(ExitCode.STOPPED)

        with handling(stop):
            yield

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the seconds within the context to those of a kind of work."""
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


def train(
    recipe: str, overrides: Sequence[str] = (), fresh: bool = False, accept_changes: bool = False
) -> int:
    """Run a recipe file to its end, and write into its status.json how it ended.

    Args:
        recipe: The recipe file.
        overrides: Dotted changes, such as "training.steps=200".
        fresh: Whether to start over, in a new folder.
        accept_changes: Whether a recipe that differs in what trains is accepted on a resume.

    Returns:
        The exit code.
    """
    run: TrainingRun | None = None
    try:
        join_processes()
        run = TrainingRun(load(recipe, overrides), fresh, accept_changes)
        return run()
    except (InputError, NotFinite) as error:
        is_input = isinstance(error, InputError)
        code = ExitCode.WRONG_INPUT if is_input else ExitCode.FAILED
        ended_by = error
        once_at_the_end(lambda: end(run, code, ended_by))
        return code
    except (Exception, KeyboardInterrupt) as error:
        ended = ended_elsewhere(run)
        if ended is not None:
            return ended
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = f" writing {error.filename}" if error.filename else ""
            full = InputError(
                f"the disk is full ({error.strerror}{where}). Make room and run the "
                "same command again."
            )
            end(run, ExitCode.WRONG_INPUT, full)
            return ExitCode.WRONG_INPUT
        if run is not None and run.holds:
            message = "".join(traceback.format_exception_only(error)).strip()
            run_folder.write_status(run.folder, ExitCode.FAILED, message)
        raise


def end(run: TrainingRun | None, code: int, error: Exception) -> None:
    """Say why the run ended, on standard error and in its status.json.

    The status of another run, which holds the folder, is left alone.
    """
    tell_error(error)
    if run is not None and run.holds:
        run_folder.write_status(run.folder, code, str(error))


def ended_elsewhere(run: TrainingRun | None) -> int | None:
    """Return the code with which another process has ended the run, if one has.

    This process's error is then the consequence.
    """
    if run is None or not run.holds or num_processes() == 1:
        return None
    status = run.folder / "status.json"
    if not status.exists():
        return None
    code: int | None = json.loads(status.read_text()).get("code")
    return code
