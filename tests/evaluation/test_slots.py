"""The slots of evaluation: a part of one's own is one file, and imports stay cheap."""

import json
import subprocess
import sys
from dataclasses import dataclass

import pytest
from helpers.commands import refused
from helpers.images import Held, random_images
from helpers.runs import tiny

from difftrain.core.errors import InputError
from difftrain.core.registry import import_with_submodules
from difftrain.evaluation import metrics as home
from difftrain.evaluation.evaluator import Evaluator
from difftrain.evaluation.features.raw import Pixels
from difftrain.evaluation.requirements import check_directions
from difftrain.evaluation.slots import METRICS, Metric, badness

OWN = '''
"""How bright generated samples are."""

from dataclasses import dataclass

from difftrain.core.registry import Positive
from difftrain.evaluation.slots import METRICS, Metric


@METRICS.register("brightness")
@dataclass(frozen=True)
class Brightness(Metric):
    """scale * mean x of the generated samples."""

    scale: Positive = 1.0
    scores = ("brightness",)
    better = "higher"

    def __call__(self, evidence):
        rows = evidence.generated.outputs["features"].whole()
        return {"brightness": {"value": self.scale * float(rows.mean())}}
'''


@pytest.fixture
def own_metric(tmp_path, monkeypatch):
    """A metric in a file beside the library's own ones."""
    (tmp_path / "brightness_of_a_test.py").write_text(OWN)
    monkeypatch.setattr(home, "__path__", [*home.__path__, str(tmp_path)])
    (place,) = METRICS.homes
    import_with_submodules(place)  # as the first look-up does
    yield
    sys.modules.pop(f"{place}.brightness_of_a_test")
    METRICS.constructors.pop("brightness")


@pytest.mark.usefixtures("own_metric")
def test_a_metric_is_one_file_and_picks_the_best_checkpoint(tmp_path):
    metric = METRICS.parse({"type": "brightness", "scale": 2.0}, "metrics.0").build()
    images = random_images(10, 0)
    given = {"reference": Held(images), "training": None, "features": Pixels((1, 8, 8))}
    evaluator = Evaluator(metrics=[metric], folder=tmp_path, seed=0, **given)
    checkpoints = {step: Held(images // divisor) for step, divisor in ((1, 4), (2, 1), (3, 2))}
    scores = {step: evaluator(source).scores["brightness"] for step, source in checkpoints.items()}

    assert scores[2]["value"] == pytest.approx(2 * float(images.float().mean()) / 255, rel=1e-6)
    assert {(score["better"], score["title"]) for score in scores.values()} == {
        ("higher", "Brightness")
    }
    bad = {step: badness(score["better"], score["value"]) for step, score in scores.items()}
    assert min(bad, key=bad.get) == 2


@pytest.mark.usefixtures("own_metric")
def test_its_arguments_are_checked_like_those_of_any_part():
    with pytest.raises(InputError, match=r"metrics.0.scale: expected greater than 0"):
        METRICS.parse({"type": "brightness", "scale": 0.0}, "metrics.0")


CODE = """
import importlib, json, sys
for name in {modules!r}:
    importlib.import_module(name)
print(json.dumps([name for name in {packages!r} if name in sys.modules]))
"""


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        (["difftrain.evaluation"], ["torch", "torchmetrics", "scipy", "diffusers", "transformers"]),
        (
            [
                "difftrain.evaluation.slots",
                "difftrain.evaluation.evaluator",
                "difftrain.evaluation.reference",
                "difftrain.evaluation.metrics.frechet",
                "difftrain.evaluation.features.transformers",
                "difftrain.diagnostics.prediction_error",
                "difftrain.diagnostics.inversion",
            ],
            ["torchmetrics", "scipy", "transformers"],
        ),
    ],
)
def test_only_what_is_used_is_imported(modules, absent):
    code = CODE.format(modules=modules, packages=absent)
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )

    assert json.loads(process.stdout) == []


def test_public_names_are_importable_from_the_package():
    import difftrain.evaluation

    for name in difftrain.evaluation.__all__:
        assert callable(getattr(difftrain.evaluation, name))
        assert name in dir(difftrain.evaluation)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = difftrain.evaluation.nothing


class Unsaid(Metric):
    """A metric that does not say which values are better."""

    scores = ("unsaid",)

    def __call__(self, evidence):
        return {"unsaid": {"value": 1.0}}


class BetterByScore(Unsaid):
    def better_of(self, score):
        return "higher"


def test_a_metric_that_does_not_say_which_values_are_better_is_refused():
    """A checkpoint would be picked by a guess."""
    with pytest.raises(InputError, match=r"'Unsaid' does not say which values are better\."):
        check_directions([Unsaid()])

    check_directions(
        [BetterByScore(), *(METRICS.parse(name, "m").build() for name in METRICS.constructors)]
    )


def test_a_recipe_with_such_a_metric_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(METRICS, "_constructors", dict(METRICS.constructors))
    METRICS.register("unsaid")(dataclass(frozen=True)(type("Unsaid", (Unsaid,), {})))
    scored = {
        "features": "pixels",
        "reference": {"type": "digits", "part": "held_out"},
        "metrics": ["unsaid"],
        "num_samples": 20,
    }

    assert "does not say which values are better" in refused(
        "check", tiny(tmp_path, evaluation=scored)
    )
