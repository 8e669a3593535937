"""`evaluation.labels`: where the classes and prompts of scored samples come from."""

import json
from collections import Counter

import pytest
import torch
from helpers.commands import command, pictures, refused
from helpers.fine_tuning import photos, recipe
from helpers.plans import SCORED, parquet, plans, rows_of
from helpers.runs import UNET, tiny

from difftrain.core.errors import InputError
from difftrain.data.datasets.digits import Digits
from difftrain.data.unreadable import ReadErrors
from difftrain.evaluation.results import comparable_pair
from difftrain.recipe.reading import load
from difftrain.run.diagnosis import HeldOut, subject_of
from difftrain.run.scoring import FINAL, IN_LOOP
from difftrain.run.session import Plans
from difftrain.run.training import Launch

pytestmark = pytest.mark.usefixtures("without_report")

CPU = torch.device("cpu")
UNLABELLED = {"type": "image_folder"}


def conditions(folder, num=40, key=FINAL, data=None, **evaluation):
    """What samples of the tiny recipe's final scores are asked to show."""
    changes = {} if data is None else {"data": data}
    settings = {**SCORED, "num_samples": num, **evaluation}
    return plans(folder, evaluation=settings, **changes).scoring.conditions(key)


def counted(found) -> dict[int, int]:
    return dict(Counter(found.classes.tolist()))


def grey_pictures(folder, classes=0):
    return {"type": "image_folder", "path": str(pictures(folder, 12, classes=classes))}


# Classes


def test_classes_have_the_shares_of_the_reference(tmp_path):
    reference = {"type": "digits", "part": "held_out", "classes": [2, 5]}
    expected = Digits("held_out", classes=[2, 5]).label_counts()

    found = conditions(tmp_path, num=sum(expected.values()), reference=reference)

    assert found.choice == "reference"
    assert counted(found) == dict(expected)


def test_scores_in_the_loop_take_their_own_reference(tmp_path):
    loop = {
        "every": 1,
        "num_samples": 6,
        "reference": {"type": "digits", "part": "classifier", "classes": [7]},
        "metrics": ["frechet_distance"],
    }

    found = conditions(tmp_path, key=IN_LOOP, in_loop=loop)

    assert counted(found) == {7: 6}


def test_without_labels_in_the_reference_the_training_data_decides(tmp_path):
    data = {"type": "digits", "classes": [4]}

    found = conditions(tmp_path, data=data, reference=grey_pictures(tmp_path / "pictures"))

    assert (found.choice, counted(found)) == ("training", {4: 40})
    assert found.compared()["counts"] == [0, 0, 0, 0, 40, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [("training", {4: 40}), ("uniform", dict.fromkeys(range(10), 4)), ("reference", {6: 40})],
)
def test_a_choice_is_followed(tmp_path, labels, expected):
    reference = {"type": "digits", "part": "held_out", "classes": [6]}

    found = conditions(
        tmp_path, data={"type": "digits", "classes": [4]}, reference=reference, labels=labels
    )

    assert (found.choice, counted(found)) == (labels, expected)


def test_in_turn_keeps_the_order_of_the_classes(tmp_path):
    found = conditions(tmp_path, num=12, labels="in_turn")

    assert found.classes.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]


def test_a_reference_without_labels_cannot_be_chosen(tmp_path):
    with pytest.raises(
        InputError,
        match=(
            r"evaluation.labels: reference, but evaluation.reference has no labels. Write "
            r"evaluation.labels: training or in_turn, or leave it out"
        ),
    ):
        conditions(tmp_path, labels="reference", reference=grey_pictures(tmp_path / "pictures"))


def test_labels_have_no_effect_on_a_model_without_them(tmp_path):
    config = {key: value for key, value in UNET.items() if key != "num_class_embeds"}
    changes = {"model": {"type": "unet2d", "config": config}, "label_dropout": 0.0}
    assert plans(tmp_path, **changes, evaluation=SCORED).scoring.conditions(FINAL) is None

    with pytest.raises(InputError, match=r"evaluation.labels: uniform has no effect, since"):
        plans(tmp_path, **changes, evaluation={**SCORED, "labels": "uniform"})


def test_classes_of_a_folder_are_found_by_their_names(tmp_path):
    """The reference lacks the first class, so its class ids are others."""
    data = grey_pictures(tmp_path / "data", classes=3)
    reference = grey_pictures(tmp_path / "reference", classes=3)
    for file in (tmp_path / "reference" / "class0").iterdir():
        file.unlink()

    found = conditions(
        tmp_path,
        data={**data, "labels": "folders"},
        reference={**reference, "labels": "folders"},
    )

    assert counted(found) == {1: 20, 2: 20}


def test_a_class_that_the_model_lacks_is_named_before_training(tmp_path):
    reference = grey_pictures(tmp_path / "reference", classes=2)
    (tmp_path / "reference" / "class1").rename(tmp_path / "reference" / "owl")

    with pytest.raises(
        InputError,
        match=(
            r"evaluation.reference: it holds the class 'class0', but the model has the classes 0, "
            r"1, .* Correct the labels, or write evaluation.labels: training"
        ),
    ):
        conditions(tmp_path, reference={**reference, "labels": "folders"})


def test_labels_of_a_table_are_read_without_its_images(tmp_path, monkeypatch):
    def fail(*given):
        pytest.fail("an image was decoded")

    table = rows_of(parquet(tmp_path / "a.parquet", num=9), label_column="label")
    made = plans(tmp_path, data=table, model={"type": "unet2d", "config": UNET})
    monkeypatch.setattr("difftrain.data.datasets.columns.open_image", fail)

    assert made.data.data.label_counts() == {0: 3, 1: 3, 2: 3}


def test_scores_follow_the_choice_and_the_protocol_holds_it(tmp_path):
    """A stopped evaluation of one choice does not go on with the rows of another."""
    reference = {"type": "digits", "part": "held_out", "classes": [0, 1]}
    settings = {**SCORED, "reference": reference, "num_samples": 24}
    file = tiny(tmp_path, training__steps=1, evaluation=settings)
    command("train", file)
    run = tmp_path / "run"
    found = {"reference": json.loads((run / "evaluation.json").read_text())}
    for labels in ("in_turn", "reference"):
        command("evaluate", run, f"evaluation.labels={labels}")
        again = json.loads((run / "evaluation.json").read_text())
        found.setdefault(labels, again)
    reference, in_turn = found["reference"], found["in_turn"]

    assert again["scores"] == reference["scores"]
    assert reference["protocol"]["labels"]["choice"] == "reference"
    assert sum(reference["protocol"]["labels"]["counts"][:2]) == 24
    assert in_turn["protocol"]["labels"]["counts"] == [3, 3, 3, 3, 2, 2, 2, 2, 2, 2]
    assert in_turn["protocol_digest"] != reference["protocol_digest"]
    assert in_turn["generated"]["digest"] != reference["generated"]["digest"]


def test_a_model_without_labels_is_compared_with_any_other():
    shared = {"features": {}, "reference": {}, "num_samples": 1, "metrics": []}
    one, other = comparable_pair({**shared, "labels": {"choice": "reference"}}, shared)
    assert one == other

    labels = [{"choice": "reference"}, {"choice": "in_turn"}]
    one, other = comparable_pair(*({**shared, "labels": each} for each in labels))
    assert one != other


# Prompts


def text_plans(folder, base, captions="sidecar", shown=None, **evaluation):
    """What a text-to-image run builds whose reference holds 6 captioned photos."""
    held_out = folder / "held_out"
    if not held_out.exists():
        photos(held_out, num=6, size=(20, 20))
        for file in held_out.glob("*.txt"):
            file.write_text(f"held out {file.stem}")
    settings = {
        "features": "pixels",
        "metrics": ["frechet_distance"],
        "num_samples": 8,
        "reference": {"type": "image_folder", "path": str(held_out), "captions": captions},
        **evaluation,
    }
    file = recipe(folder, "stable_diffusion", base, evaluation=settings, captions=shown)
    return Plans(load(file), Launch())


def test_prompts_are_the_captions_of_the_reference_in_the_recipes_template(pipelines, tmp_path):
    made = text_plans(
        tmp_path, pipelines("stable_diffusion"), shown={"templates": ["a photo of {}, nice"]}
    )

    found = made.scoring.conditions(FINAL)

    shown = found.prompts_of(range(8))
    assert sorted(shown[:6]) == [f"a photo of held out {i}, nice" for i in range(6)]
    assert shown[6:] == shown[:2]
    assert found.compared()["num_captions"] == 6
    assert found.described()["prompts"]["rendering"]["templates"] == ["a photo of {}, nice"]


def test_without_captions_in_the_reference_those_of_the_training_data_are_taken(
    pipelines, tmp_path
):
    found = text_plans(tmp_path, pipelines("stable_diffusion"), captions="none")
    found = found.scoring.conditions(FINAL)

    assert found.choice == "training"
    assert sorted(found.prompts_of(range(8))) == [f"a photo of thing {i}" for i in range(8)]


def test_in_turn_takes_the_prompts_of_the_samples(pipelines, tmp_path):
    made = text_plans(tmp_path, pipelines("stable_diffusion"), labels="in_turn")

    found = made.scoring.conditions(FINAL)

    assert found.prompts_of(range(3)) == ["a photo of a cat", "a dog", "a photo of a cat"]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("uniform", "uniform gives all classes equal shares, but the model takes prompts"),
        ("reference", "reference, but evaluation.reference has no captions. Write"),
    ],
)
def test_a_choice_without_captions_is_refused(pipelines, tmp_path, labels, message):
    with pytest.raises(InputError, match=message):
        text_plans(tmp_path, pipelines("stable_diffusion"), captions="none", labels=labels)


def test_captions_of_scores_in_the_loop_need_no_text_encoder_once_they_are_remembered(
    pipelines, tmp_path, monkeypatch
):
    loop = {"every": 1, "num_samples": 6, "metrics": ["frechet_distance"]}
    reference = {"type": "image_folder", "path": str(tmp_path / "held_out"), "captions": "sidecar"}
    made = text_plans(
        tmp_path, pipelines("stable_diffusion"), in_loop={**loop, "reference": reference}
    )
    model, conditioning = made.model.model, made.model.conditioning
    scorer = made.scoring.in_loop_scorer(tmp_path, CPU)
    conditioning.remember()
    model.release_text()
    monkeypatch.setattr(model, "text_encoders", lambda: pytest.fail("text encoders were read"))

    cond = conditioning(scorer.conditions.labels(range(6), conditioning))

    assert len(cond["encoder_hidden_states"].unique(dim=0)) == 6


def test_grids_and_held_out_images_see_captions_in_the_template(pipelines, tmp_path):
    base = pipelines("stable_diffusion")
    sampling = {"sampler": {"type": "ddim", "steps": 2, "spacing": "leading"}}
    template = {"templates": ["a photo of {}, nice"]}
    held_out = photos(tmp_path / "held_out", num=2, size=(20, 20))
    validation = {
        "every": 1,
        "num": 2,
        "data": {"type": "image_folder", "path": str(held_out), "captions": "sidecar"},
    }
    file = recipe(
        tmp_path,
        "stable_diffusion",
        base,
        captions=template,
        sampling=sampling,
        validation=validation,
    )
    made = Plans(load(file), Launch())
    conditioning = made.model.conditioning

    held_out = HeldOut("validation.data", made.data.validation.data)
    subject = subject_of(made.model, None, 0, "", held_out, 2, CPU, ReadErrors(), training=None)

    grid = conditioning.captions_of(conditioning.labels_of(range(2)))
    assert grid == [f"a photo of a photo of thing {i}, nice" for i in range(2)]
    assert conditioning.captions_of(subject.held_out.labels) == grid


@pytest.fixture(scope="module")
def text_run(pipelines, tmp_path_factory):
    """The folder of a text-to-image run that is scored on the prompts of its samples."""
    folder = tmp_path_factory.mktemp("text")
    made = text_plans(folder, pipelines("stable_diffusion"), labels="in_turn")
    command("train", folder / "recipe.yaml")
    return made.recipe.output


def test_a_stopped_evaluation_does_not_keep_the_samples_of_other_prompts(text_run, monkeypatch):
    def stopped(*given):
        raise RuntimeError("stopped")

    with monkeypatch.context() as patched:
        patched.setattr("difftrain.evaluation.evaluator.compute_scores", stopped)
        with pytest.raises(RuntimeError, match="stopped"):
            command("evaluate", text_run, "sampling.prompts=[a red car]")
    command("evaluate", text_run, "sampling.prompts=[a blue bird]")
    after = evaluation_of(text_run)

    command("evaluate", text_run, "sampling.prompts=[a blue bird]")
    alone = evaluation_of(text_run)
    command("evaluate", text_run, "sampling.prompts=[a red car]")
    red = evaluation_of(text_run)

    assert after == alone
    assert red["generated"] != alone["generated"]
    assert red["protocol_digest"] != alone["protocol_digest"]
    sampling = alone["protocol"]["sampling"]
    assert sampling["prompts"]["num_different"] == 1
    assert sampling["max_tokens"] == {"text_encoder": 77}
    assert sampling["lora_scale"] == 1.0


def test_a_run_is_scored_and_diagnosed_at_another_scale_of_its_lora(text_run):
    command("evaluate", text_run)
    trained = evaluation_of(text_run)

    command("evaluate", text_run, "--lora-scale", "0")
    with open(f"{text_run}/scores.jsonl") as file:
        base = json.loads(file.readlines()[-1])
    command("diagnose", text_run, "--lora-scale", "0", "--which", "{type: denoising_error, num: 2}")

    assert evaluation_of(text_run) == trained  # the headline is that of the LoRA as it was trained
    assert base["generated"] != trained["generated"]
    assert base["protocol"]["sampling"]["lora_scale"] == 0.0
    with open(f"{text_run}/diagnostics.json") as file:
        found = json.load(file)["denoising_error"]["protocol"]
    assert found["lora_scale"] == 0.0
    assert "expected a finite number" in refused("evaluate", text_run, "--lora-scale", "nan")


def evaluation_of(run):
    with open(f"{run}/evaluation.json") as file:
        return json.load(file)
