"""A metric that fails is recorded, on all processes alike, and the others go on."""

from datetime import timedelta
from pathlib import Path

import pytest
import torch
from helpers.images import Held, random_images
from helpers.several import on_processes
from torch.distributed import barrier

from difftrain.core.errors import InputError
from difftrain.core.processes import process_index
from difftrain.evaluation.agreement import AgreedError, Failure, dealt_values, summed, together
from difftrain.evaluation.evaluator import Evaluator
from difftrain.evaluation.features.raw import Pixels
from difftrain.evaluation.metrics.frechet import FrechetDistance
from difftrain.evaluation.metrics.kernel import KernelDistance
from difftrain.evaluation.metrics.memorization import NearestNeighbourRatio
from difftrain.evaluation.metrics.predictions import ClassAgreement
from difftrain.evaluation.results import Evaluation
from difftrain.evaluation.slots import Metric

GENERATED, REFERENCE, TRAINING = (random_images(24, seed) for seed in (1, 2, 3))
PATIENCE = timedelta(minutes=5)  # ends a hang, and nothing else


class Own(Metric):
    """A metric of a test; what it does is `work`."""

    scores = ("own",)
    better = "lower"

    def work(self) -> float:
        return 1.0

    def fewest(self, width, preset):
        return 1

    def __call__(self, evidence):
        return {self.scores[0]: {"value": self.work()}}


class WrongInput(Own):
    scores = ("one", "two")

    def work(self):
        raise InputError("this cannot be compared. Give other images.")


class Bug(Own):
    def work(self):
        raise KeyError("weights")


def evaluated(folder, *metrics, generated=None, **changes) -> Evaluation:
    given = {
        "reference": Held(REFERENCE),
        "training": Held(TRAINING),
        "features": Pixels((1, 8, 8)),
        "seed": 0,
        "folder": Path(folder),
    }
    return Evaluator(metrics=metrics, **(given | changes))(generated or Held(GENERATED))


def test_a_metric_that_fails_is_recorded_and_the_others_go_on(tmp_path, caplog):
    alone = evaluated(tmp_path / "alone", FrechetDistance(), KernelDistance())
    found = evaluated(tmp_path, FrechetDistance(), WrongInput(), Bug(), KernelDistance())

    assert found.scores == alone.scores
    assert found.failures == {
        "one": Failure("this cannot be compared. Give other images.", is_input=True),
        "two": Failure("this cannot be compared. Give other images.", is_input=True),
        "own": Failure("KeyError: 'weights'", is_input=False),
    }
    assert found.to_json(3)["failed"] == {name: f.reason for name, f in found.failures.items()}
    assert "left_out" not in found.to_json(3)
    assert "failed" not in alone.to_json(3)
    # A bug's traceback is logged; what a user can correct is left to whoever shows the result.
    assert [record.getMessage() for record in caplog.records] == ["metric 'Bug' failed"]
    assert "KeyError" in caplog.text


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (
            {"other": {"value": 1.0}},
            r"returned the scores \['other'\], but its `scores` are \['own'\]",
        ),
        ({"own": {"count": 1}}, "returned own without a `value`"),
    ],
)
def test_scores_that_are_not_what_the_metric_says_are_a_failure(tmp_path, found, message):
    class Other(Own):
        def __call__(self, evidence):
            return found

    (failure,) = evaluated(tmp_path, Other()).failures.values()

    assert failure.is_input
    with pytest.raises(InputError, match=message):
        raise InputError(failure.reason)


def test_every_score_says_which_way_it_is_better_and_what_it_is_called(tmp_path):
    class Named(Own):
        scores = ("own", "other_one")
        better = "higher"
        titles = {"own": "OWN"}  # noqa: RUF012

        def __call__(self, evidence):
            return {name: {"value": 0.5, "extra": 3} for name in self.scores}

    assert evaluated(tmp_path, Named()).scores == {
        "own": {"value": 0.5, "extra": 3, "better": "higher", "title": "OWN"},
        "other_one": {"value": 0.5, "extra": 3, "better": "higher", "title": "Other one"},
    }


def test_an_added_metric_that_can_be_computed_is_a_score_like_others(tmp_path):
    asked = evaluated(tmp_path / "asked", FrechetDistance(), NearestNeighbourRatio())
    found = evaluated(tmp_path, FrechetDistance(), added_metrics=[NearestNeighbourRatio()])

    assert found.scores == asked.scores
    assert (found.failures, found.left_out) == ({}, {})
    assert [part["type"] for part in found.protocol["metrics"]] == ["frechet_distance"]
    assert [part["type"] for part in found.protocol["added"]] == ["nearest_neighbour_ratio"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"training": None}, "there are no training images"),
        (
            {"training": None, "why_no_training": "the training data is a stream"},
            "the training data is a stream",
        ),
        ({"reference": Held(TRAINING[:9])}, "every reference image is a training image"),
        ({"reference": Held(REFERENCE[:1])}, "needs at least 2 reference samples, and there are 1"),
    ],
)
def test_an_added_metric_that_lacks_something_says_why(tmp_path, changes, reason):
    found = evaluated(tmp_path, Own(), added_metrics=[NearestNeighbourRatio()], **changes)

    assert set(found.scores) == {"own"}
    assert found.failures == {}
    assert reason in found.left_out["nearest_neighbour_ratio"]
    assert found.to_json(3)["left_out"] == found.left_out
    assert found.protocol["metrics"] == ["Own"]


def test_labels_and_features_that_an_added_metric_lacks_are_named(tmp_path):
    found = evaluated(tmp_path, Own(), added_metrics=[ClassAgreement()])

    assert found.left_out == {"class_agreement": "the generated samples have no labels"}


def test_an_added_metric_never_fails(tmp_path):
    class Unsure(Bug):
        scores = ("unsure",)

        def fewest(self, width, preset):
            raise ZeroDivisionError

    found = evaluated(tmp_path, FrechetDistance(), added_metrics=[WrongInput(), Bug(), Unsure()])

    assert set(found.scores) == {"frechet_distance"}
    assert found.failures == {}
    assert found.left_out == {
        "one": "this cannot be compared. Give other images.",
        "two": "this cannot be compared. Give other images.",
        "own": "KeyError: 'weights'",
        "unsure": "ZeroDivisionError",
    }


def test_an_added_metric_that_was_asked_for_too_is_computed_once(tmp_path):
    found = evaluated(tmp_path, Own(), added_metrics=[Bug()])

    assert found.scores["own"]["value"] == 1.0
    assert (found.failures, found.left_out) == ({}, {})


def test_samples_that_cannot_be_made_end_the_evaluation(tmp_path):
    class Broken(Held):
        def blocks(self, wanted):
            raise RuntimeError("out of memory")
            yield

    with pytest.raises(RuntimeError, match="out of memory"):
        evaluated(tmp_path, Own(), generated=Broken(GENERATED))


def fails_on(rank: int) -> None:
    if process_index() == rank:
        raise RuntimeError(f"met by process {rank}")


class AtFirst(Own):
    """Fails before its collective, in which the other process waits."""

    def work(self):
        fails_on(1)
        return float(dealt_values(range(4), float).sum())


class InBetween(Own):
    """Fails between two collectives."""

    def work(self):
        dealt_values(range(4), float)
        fails_on(0)
        return float(summed(lambda: torch.ones(())))


class OnItsShare(Own):
    """Fails in the work that is shared out."""

    def work(self):
        def value(item):
            if item == 3:
                raise InputError("item 3 is wrong.")
            return item

        return float(dealt_values(range(4), value).sum())


class AtLast(Own):
    """Fails behind its last collective, when the other process has its scores."""

    def work(self):
        value = float(dealt_values(range(4), float).sum())
        fails_on(1)
        return value


FAILING = {
    AtFirst: Failure("RuntimeError: met by process 1", is_input=False),
    InBetween: Failure("RuntimeError: met by process 0", is_input=False),
    OnItsShare: Failure("item 3 is wrong.", is_input=True),
    AtLast: Failure("RuntimeError: met by process 1", is_input=False),
}


def named(metric: type[Own]) -> Own:
    """The metric with a score of its own name."""
    return type(metric.__name__, (metric,), {"scores": (metric.__name__,)})()


class Together(Held):
    """Samples that every process must ask for, as sharded weights need it."""

    every_process_takes_part = True

    def blocks(self, wanted):
        for block in super().blocks(wanted):
            barrier()
            yield block


class BrokenForOne(Pixels):
    def extract(self, samples, outputs=("features",)):
        fails_on(1)
        return super().extract(samples, outputs)


def on_one_process(rank: int, folder: str) -> None:
    """What each of two processes does; its findings are left in `folder`."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2, timeout=PATIENCE
    )
    torch.set_num_threads(1)
    try:
        metrics = [*map(named, FAILING), FrechetDistance(), KernelDistance()]
        found = {"metrics": evaluated(f"{folder}/metrics", *metrics)}
        for name, generated in (("alone", Held(GENERATED)), ("together", Together(GENERATED))):
            broken = {"features": BrokenForOne((1, 8, 8)), "reference": Held(REFERENCE)}
            with pytest.raises(AgreedError) as error:
                evaluated(f"{folder}/{name}", Own(), generated=generated, **broken)
            found[name] = (str(error.value), error.value.rank)
        with pytest.raises(AgreedError) as error:
            together(lambda: fails_on(1))
        found["cause"] = type(error.value.__cause__).__name__
        torch.save(found, f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.distributed
def test_two_processes_agree_on_every_failure(tmp_path):
    on_processes(on_one_process, 2, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{i}.pt", weights_only=False) for i in range(2))
    alone = evaluated(tmp_path / "alone", FrechetDistance(), KernelDistance())

    assert first["metrics"] == second["metrics"]
    expected = {metric.__name__: failure for metric, failure in FAILING.items()}
    assert first["metrics"].failures == expected
    assert set(first["metrics"].scores) == set(alone.scores)
    for name in ("alone", "together"):
        assert first[name] == second[name] == ("RuntimeError: met by process 1", 1)
    assert (first["cause"], second["cause"]) == ("NoneType", "RuntimeError")
