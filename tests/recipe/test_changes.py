"""What of a recipe touches training, and how changes are shown."""

from pathlib import Path
from typing import Any

import pytest
from helpers.runs import tiny

from difftrain.core.registry import Section, parameters, slot_of, touches_training
from difftrain.recipe.changes import (
    ABSENT,
    changed_keys,
    differences,
    flattened,
    pruned,
    training_part,
)
from difftrain.recipe.reading import load
from difftrain.recipe.schema import Recipe
from difftrain.training.callbacks import CALLBACKS, Callback

SCORES = "{features: pixels, reference: digits, metrics: [frechet_distance]}"
BESIDE = {
    "output": "output=elsewhere",
    "sampling": "sampling.sampler.steps=3",
    "validation": "validation={data: digits, every: 2}",
    "evaluation": f"evaluation={SCORES}",
    "callbacks": "callbacks=[onlooker]",
    "imports": "imports=[helpers.own_callback]",
    "license": "license=CC0-1.0",
    "training.log_every": "training.log_every=7",
    "training.checkpoint_every": "training.checkpoint_every=7",
    "training.keep_checkpoints": "training.keep_checkpoints=7",
    "training.sample_every": "training.sample_every=7",
    "training.num_sampled": "training.num_sampled=7",
    "training.trackers": "training.trackers=[tensorboard]",
    "loader.num_workers": "loader.num_workers=1",
}  # by key: an override that changes it


class Onlooker(Callback):
    """A callback that does nothing."""

    every = 1

    def __call__(self, denoiser: Any, step: int, training_seconds: float) -> None: ...


@pytest.fixture(autouse=True)
def onlooker():
    CALLBACKS.register("onlooker")(Onlooker)
    yield
    del CALLBACKS.constructors["onlooker"]


def marked(section: Section, above: str = "") -> list[str]:
    """Return the dotted keys of a section that do not touch training, in its inner sections too."""
    found = []
    for name, parameter in parameters(section.constructors[""]).items():
        inner = slot_of(parameter)
        if not touches_training(parameter):
            found.append(above + name)
        elif isinstance(inner, Section):
            found += marked(inner, f"{above}{name}.")
    return found


def training_parts(file: Path, *overrides: str) -> list[dict[str, Any]]:
    """Return what touches training, without the last override and with it."""
    return [training_part(load(file, given)) for given in (overrides[:-1], overrides)]


def test_the_list_of_this_test_is_complete():
    assert sorted(marked(Section(Recipe))) == sorted(BESIDE)


@pytest.mark.parametrize("key", BESIDE)
def test_a_key_beside_training_may_change(tmp_path, key):
    file = tiny(tmp_path)
    before, after = training_parts(file, BESIDE[key])

    assert before == after
    assert any(
        changed == key or changed.startswith(f"{key}.")
        for changed in changed_keys(load(file).dump(), load(file, [BESIDE[key]]).dump())
    )


@pytest.mark.parametrize(
    "override",
    [
        "seed=3",
        "label_dropout=0.1",
        "training.steps=7",
        "training.batch_size=4",
        "training.clip_norm=2",
        "loader.on_error=skip",
        "optimizer.lr=0.5",
        "optimizer.options={eps: 1e-6}",
        "data.part=all",
        "transform.flip=true",
        "objective.weighting=p2",
        "ema=decay",
        "model.config.dropout=0.1",
        "prior={num: 3}",
        "schedule.num_timesteps=40",
    ],
)
def test_every_other_key_touches_training(tmp_path, override):
    before, after = training_parts(tiny(tmp_path), override)

    assert before != after


def test_sampling_touches_training_where_prior_samples_are_trained_on(tmp_path):
    before, after = training_parts(tiny(tmp_path), "prior={num: 3}", BESIDE["sampling"])

    assert before != after
    assert changed_keys(before, after) == {"sampling.sampler.steps": [2, 3]}


def test_the_number_of_workers_touches_the_training_on_a_stream(tmp_path):
    stream = "data={type: huggingface, path: somewhere, streaming: true}"
    still = "data={type: huggingface, path: somewhere}"

    before, after = training_parts(tiny(tmp_path), stream, BESIDE["loader.num_workers"])
    assert changed_keys(before, after) == {"loader.num_workers": [0, 1]}

    before, after = training_parts(tiny(tmp_path), still, BESIDE["loader.num_workers"])
    assert before == after


def test_a_key_that_an_earlier_version_did_not_write_is_left_out(tmp_path):
    data = load(tiny(tmp_path)).dump()
    del data["captions"], data["training"]["clip_norm"]

    found = pruned(data, Section(Recipe))

    assert "captions" not in found
    assert "clip_norm" not in found["training"]


def test_changed_keys_are_dotted_and_show_both_values():
    old = {"a": {"b": 1, "c": [1, 2]}, "d": None, "e": {}, "gone": 3}
    new = {"a": {"b": 2, "c": [1, 2]}, "d": {"type": "x", "y": 1}, "e": {}}

    assert changed_keys(old, new) == {
        "a.b": [1, 2],
        "d": [None, ABSENT],
        "gone": [3, ABSENT],
        "d.type": [ABSENT, "x"],
        "d.y": [ABSENT, 1],
    }
    assert changed_keys(old, old) == {}


def test_nested_mappings_become_dotted_keys():
    assert flattened({"a": {"b": {"c": 1}}, "d": []}) == {"a.b.c": 1, "d": []}


def test_the_difference_of_two_recipes_shows_the_changed_lines_alone(tmp_path):
    old, new = (load(tiny(tmp_path), [f"optimizer.lr={lr}"]).dump() for lr in (1e-3, 1e-4))

    lines = [line for line in differences(old, new).splitlines() if line[:1] in "+-"]

    headings, changed = lines[:2], lines[2:]
    assert [heading[:3] for heading in headings] == ["---", "+++"]
    assert changed == ["-  lr: 0.001", "+  lr: 0.0001"]
    assert differences(old, old) == ""
