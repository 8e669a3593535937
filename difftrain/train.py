"""Train one recipe: `difftrain train RECIPE`, or `accelerate launch -m difftrain.train RECIPE`.

The order of a run: recipe, parts, folder, training, then the best weights are scored, exported and shown.
"""

import contextlib
import errno
import json
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from difftrain import checkpoint, runfolder
from difftrain.data.items import ImageStream
from difftrain.denoisers import DiffusersDenoiser
from difftrain.diagnose import held_out_gap, subject_of
from difftrain.diagnostics.denoising import DenoisingError
from difftrain.distributed import is_main, num_processes, on_all, on_main, once_at_the_end
from difftrain.entry import DONE, FAILED, STOPPED, WRONG_INPUT, join_processes, leave, say, tell
from difftrain.feeding import loader_of
from difftrain.plan import Plan
from difftrain.prior import PriorImages, prior_images
from difftrain.recipe import Recipe, Validation, load
from difftrain.registry import InputError, Part
from difftrain.report import write_report
from difftrain.results import checks_memorization, export, score_lines
from difftrain.rules import Launch, check_launch, check_trackers
from difftrain.runlog import write_atomically
from difftrain.trainer import NotFinite, Trainer, Visit
from difftrain.visits import (
    NEAREST_FILE,
    HeldOutLoss,
    InLoopEvaluation,
    SampleGrid,
    Scorer,
    Selection,
    generated_images,
    save_grid,
    save_worst,
)
from difftrain.weightings import weight_curve


class Run:
    """One run on this process, from its recipe to its report."""

    def __init__(self, recipe: Recipe, fresh: bool = False, accept_changes: bool = False):
        self.accelerator = make_accelerator(recipe)
        self.device = self.accelerator.device
        self.plan = on_all(lambda: self.planned(recipe))
        self.folder = Path(on_main(lambda: str(runfolder.prepare(recipe, fresh, accept_changes))))
        self.recipe = replace(recipe, output=str(self.folder))
        self.accelerator.project_configuration.logging_dir = str(self.folder)
        self.holds = False  # the folder is this run's to write to
        self.seconds: dict[str, float] = {}
        self.told_accuracy = False

    def planned(self, recipe: Recipe) -> Plan:
        plan = Plan(recipe)
        check_launch(plan.objective, Launch.of(self.accelerator))
        return plan

    def __call__(self) -> int:
        """Train what is left, then score, export and report; returns the exit code."""
        with contextlib.ExitStack() as stack:
            self.holds = on_main(lambda: stack.enter_context(runfolder.held(self.folder)) or True)
            if self.is_done():
                say(f"{self.folder} is done: {self.plan.training.steps} steps. Look at {self.folder / 'report.html'}")
                return DONE
            if is_main():
                write_atomically(self.folder / "recipe.yaml", self.recipe.to_yaml())
                write_atomically(self.folder / "weights.json", json.dumps(self.weights()) + "\n")
            self.status(None, "running")
            with self.stopping_at_once("before its first step"):
                trainer = self.trainer()
                stack.callback(self.close_trackers)
                begun = trainer.resume()
                self.plan.optimizer.restate(trainer.optimizer.param_groups)
            if begun:
                say(f"resuming {self.folder} at step {begun}")
            finished = trainer.run()
            self.seconds |= trainer.seconds
            if not finished:
                self.status(STOPPED, f"stopped by a signal at step {trainer.progress.step}, saved; run the same command again to go on")
                self.report(trainer.bare)
                return STOPPED
            step = trainer.progress.best_step or trainer.progress.step
            del trainer
            with self.stopping_at_once("after its last step"):
                self.finish(step)
            self.status(DONE, f"trained {self.plan.training.steps} steps; final weights of step {step}")
            return DONE

    def trainer(self) -> Trainer:
        recipe, plan = self.recipe, self.plan
        denoiser = plan.denoiser()
        visits = self.visits()
        prior = self.prior(denoiser) if plan.prior is not None else None  # with all prompts known, text encoders may go with the cache
        loader = loader_of(plan, self.accelerator.process_index, self.accelerator.num_processes, self.device, prior)
        if plan.encoder is not None and not (plan.cache is not None and plan.cache.latents):
            self.try_encoder()
        self.accelerator.init_trackers("tensorboard")
        return Trainer(
            self.accelerator, denoiser, plan.objective, loader, plan.preparation, plan.optimizer.build(denoiser),
            recipe.lr_schedule.build(), recipe.ema.build() if recipe.ema else None, plan.training, self.folder, recipe.to_yaml(),
            recipe.seed, visits,
        )

    def try_encoder(self) -> None:
        """Find out now whether the autoencoder makes anything of these images; where latents are cached, all have been through it."""
        data = self.plan.data
        if not isinstance(data, ImageStream) and self.plan.num_frames is None:
            on_main(lambda: self.plan.preparation.try_encoder(data, self.plan.transform, self.device))

    def prior(self, base: DiffusersDenoiser) -> PriorImages:
        """Samples of the model as it is before training."""
        assert self.plan.prior is not None
        self.plan.preparation.to(self.device)
        with self.timed("prior"):
            return prior_images(self.plan.prior, self.plan.generator, base.to(self.device).eval(), self.folder / "prior", self.device)

    def weights(self) -> dict[str, Any]:
        """The weight of a sample's error along the noise level, for the report, which cannot compute it (it imports no torch)."""
        objective = self.plan.objective
        return weight_curve(objective.weights, objective.trained_error, objective.schedule)

    def visits(self) -> list[Visit]:
        """The sample grid and the in-loop evaluation, as the recipe asks for them."""
        plan, visits = self.plan, list[Visit]()
        if plan.training.sample_every and plan.training.num_sampled:
            every, num = plan.training.sample_every, plan.training.num_sampled
            visits.append(SampleGrid(every, plan.generator, num, self.folder / "samples", self.device))
        if plan.validation is not None:
            visits.append(self.held_out_loss(plan.validation))
        loop = plan.evaluation.in_loop if plan.evaluation else None
        if loop is not None:
            scorer = self.scorer(loop.reference, loop.metrics, loop.num_samples, in_loop=True)
            select = Selection(loop.select) if loop.select else None
            weights = "ema" if self.recipe.ema else "model"
            visits.append(InLoopEvaluation(loop.every, scorer, select, weights, self.folder / "evaluations.jsonl"))
        return visits

    def held_out_loss(self, settings: Validation) -> HeldOutLoss:
        self.plan.preparation.to(self.device)
        subject = subject_of(self.plan, None, 0, "", settings.data, settings.num, self.device, with_training=False)
        measure = DenoisingError(settings.num, settings.num_timesteps)
        measure.encode(subject)
        return HeldOutLoss(settings.every, subject, measure, self.folder / "validation.jsonl")

    def scorer(self, reference: Part, metrics: list[Any], num_samples: int, in_loop: bool = False) -> Scorer:
        scorer = self.plan.scorer(reference, metrics, num_samples, self.folder / "features", self.device, in_loop)
        accuracy = getattr(scorer.evaluator.features, "accuracy", None)
        if accuracy is not None and not self.told_accuracy:
            say(f"{scorer.evaluator.features.name}: {100 * accuracy:.1f} % of unseen images classified correctly")
            self.told_accuracy = True
        return scorer

    def finish(self, step: int) -> None:
        """Score, export and show the weights of the chosen step."""
        denoiser = self.plan.denoiser()
        weights = checkpoint.load_weights(denoiser, checkpoint.folder_of(self.folder / "checkpoints", step), averaged=True)
        denoiser.to(self.device).eval()
        if self.plan.evaluation is not None:
            self.score(denoiser, step, weights)
            if checks_memorization(self.plan):
                with self.timed("held-out gap"):
                    held_out_gap(self.plan, denoiser, step, weights, self.folder, self.device)
        with self.timed("sampling"):
            num = max(1, self.plan.training.num_sampled)
            images = generated_images(self.plan.generator, denoiser, num, self.device)
        if is_main():
            save_grid(images, self.folder / "samples" / "final.png", self.plan.conditioning.num_classes)
            say(export(self.plan, denoiser, step, self.folder))
        self.report(denoiser)

    def score(self, denoiser: DiffusersDenoiser, step: int, weights: str) -> None:
        settings = self.plan.evaluation
        assert settings is not None
        with self.timed("final evaluation"):
            scorer = self.scorer(settings.reference, settings.metrics, settings.num_samples)
            say(f"scoring {settings.num_samples} samples of step {step} ({weights} weights)")
            evaluation = scorer(denoiser)
            save_worst(evaluation, self.folder / "samples" / NEAREST_FILE)
        if is_main():
            write_atomically(self.folder / "evaluation.json", json.dumps({**evaluation.to_json(step), "weights": weights}, indent=1) + "\n")
            say(score_lines(evaluation.scores))

    def report(self, denoiser: torch.nn.Module) -> None:
        if is_main():
            parameters = sum(p.numel() for p in denoiser.parameters())
            trains = self.plan.trains if self.plan.adapter is not None else None
            facts = runfolder.environment(num_processes(), str(self.device), parameters, self.seconds, trains)
            write_atomically(self.folder / "environment.json", json.dumps(facts, indent=1) + "\n")
            write_report(self.folder)

    @contextlib.contextmanager
    def stopping_at_once(self, when: str) -> Iterator[None]:
        """Within: all that was trained is saved, so a signal ends the process where it stands; the next run does the rest."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number: int, frame: Any) -> None:
            self.status(STOPPED, f"stopped by a signal {when}; run the same command again to go on")
            raise SystemExit(STOPPED)

        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def close_trackers(self) -> None:
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def is_done(self) -> bool:
        """Whether the last step is trained, and everything after it was written."""
        newest = checkpoint.latest(self.folder / "checkpoints")
        trained = newest is not None and checkpoint.step_of(newest) >= self.plan.training.steps
        status = self.folder / "status.json"
        return trained and status.exists() and json.loads(status.read_text()).get("code") == DONE

    def status(self, code: int | None, message: str) -> None:
        if is_main():
            runfolder.write_status(self.folder, code, message)

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


def make_accelerator(recipe: Recipe) -> Accelerator:
    trackers = recipe.training.arguments["trackers"]
    check_trackers(trackers)
    return Accelerator(log_with=trackers or None, project_config=ProjectConfiguration(project_dir=recipe.output, logging_dir=recipe.output))


def train(recipe: str, overrides: Sequence[str] = (), fresh: bool = False, accept_changes: bool = False) -> int:
    """Run a recipe file to its end; returns the exit code. Every way out is told in one message and in status.json."""
    run: Run | None = None
    try:
        join_processes()
        run = Run(load(recipe, overrides), fresh, accept_changes)
        return run()
    except (InputError, NotFinite) as error:
        code = WRONG_INPUT if isinstance(error, InputError) else FAILED
        ended_by = error
        once_at_the_end(lambda: end(run, code, ended_by))
        return code
    except (Exception, KeyboardInterrupt) as error:
        ended = ended_elsewhere(run)
        if ended is not None:
            return ended
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = f" writing {error.filename}" if error.filename else ""
            end(run, WRONG_INPUT, InputError(f"the disk is full ({error.strerror}{where}). Make room and run the same command again."))
            return WRONG_INPUT
        if run is not None and run.holds:
            runfolder.write_status(run.folder, FAILED, "".join(traceback.format_exception_only(error)).strip())
        raise


def end(run: Run | None, code: int, error: Exception) -> None:
    """Tell why the run ended, here and in its status.json (not in that of another run, which holds the folder)."""
    tell(error)
    if run is not None and run.holds:
        runfolder.write_status(run.folder, code, str(error))


def ended_elsewhere(run: Run | None) -> int | None:
    """The code with which another process has ended the run, and told why: this one's error is the consequence."""
    if run is None or not run.holds or num_processes() == 1:
        return None
    status = run.folder / "status.json"
    return json.loads(status.read_text()).get("code") if status.exists() else None


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of `python -m difftrain.train`, as accelerate and torchrun start it."""
    import argparse

    parser = argparse.ArgumentParser(prog="difftrain.train", description="Train a recipe; run again to resume.")
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--fresh", action="store_true", help="start over in a new folder")
    parser.add_argument("--accept-changes", action="store_true", help="resume with another recipe than the run's")
    given = parser.parse_intermixed_args(arguments)
    return leave(train(given.recipe, given.overrides, given.fresh, given.accept_changes))


if __name__ == "__main__":
    sys.exit(main())
