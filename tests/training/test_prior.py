"""Prior preservation: what its samples count, how often they come, when they are generated."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from helpers.commands import command
from helpers.fine_tuning import recipe
from helpers.runs import saved, tiny, trainer
from helpers.support import assert_close, gradients, images, toy_network

from difftrain.core.rng import Rng
from difftrain.data.cache.contents import read_contents
from difftrain.data.captions import Captions
from difftrain.data.datasets.digits import Digits
from difftrain.data.items import Item, MapDataset
from difftrain.data.loader import Loader
from difftrain.data.transform import Transform
from difftrain.data.unreadable import ReadErrors
from difftrain.objective.objective import Objective
from difftrain.objective.regularizers import NoiseConstraint
from difftrain.objective.schedule import NoiseSchedule
from difftrain.objective.types import Batch
from difftrain.objective.weightings import P2
from difftrain.recipe.reading import load
from difftrain.run.session import Plans
from difftrain.run.training import Launch
from difftrain.training.prior import PriorImages, WithPrior

pytestmark = pytest.mark.usefixtures("without_report")

# What samples of the base model count


def objective() -> Objective:
    return Objective(NoiseSchedule.linear(), "epsilon", weighting=P2())


def losses_of(rows: list[int], weights: list[float] | None, network: Any = toy_network) -> Any:
    """Return the losses of these samples of a batch of six; each has its own noise and timestep."""
    batch = Batch(images(6)[rows], weights=None if weights is None else torch.tensor(weights))
    return objective()(network, batch, Rng(0, 3, rows, batch_size=6))


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0, 3.0])
def test_the_loss_is_the_mean_of_instance_errors_and_weighted_prior_errors(weight):
    instance, prior = losses_of([0, 2, 5], None).total, losses_of([1, 3, 4], None).total

    mixed = losses_of(list(range(6)), [1.0, weight, 1.0, weight, weight, 1.0])

    assert_close(mixed.total, (3 * instance + weight * 3 * prior) / 6, relative=1e-6)
    assert_close(mixed.terms["error"], mixed.total.detach(), relative=1e-12)


def test_a_weight_of_0_leaves_the_gradient_of_the_data_alone():
    layer = torch.nn.Conv2d(2, 2, 1).double()

    def network(x: Any, t: Any, cond: Any) -> Any:
        return layer(x)

    alone = gradients(losses_of([0, 2], None, network), layer)
    mixed = gradients(losses_of([0, 1, 2, 3], [1.0, 0.0, 1.0, 0.0], network), layer)

    assert_close(mixed, alone / 2, relative=1e-12)


def test_terms_by_sample_are_weighted_as_the_error_is():
    """A regularizer keeps its share of samples that count less."""
    parts = [
        Objective(NoiseSchedule.linear(), "epsilon", regularizers=[NoiseConstraint()])
        for _ in range(3)
    ]
    x0 = torch.randn(4, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))

    def term(part: Objective, rows: list[int], weights: list[float] | None) -> float:
        batch = Batch(x0[rows], weights=None if weights is None else torch.tensor(weights))
        losses = part(lambda x, t, cond: x * 0.5, batch, Rng(0, 0, rows, batch_size=4))
        return losses.terms["noise_constraint"].item()

    mixed = term(parts[0], [0, 1, 2, 3], [1.0, 2.0, 2.0, 1.0])

    once, twice = term(parts[1], [0, 3], None), term(parts[2], [1, 2], None)
    assert_close(mixed, (2 * once + 2 * 2 * twice) / 4, relative=1e-5)


# How often they come


@pytest.fixture
def beside_digits(tmp_path):
    """Return 30 digits with three samples of the base model, of which each comes ten times."""
    for i in range(3):
        PIL.Image.new("L", (8, 8), color=100 + i).save(tmp_path / f"{i:06d}.png")
    return WithPrior(First(Digits("train"), 30), PriorImages(tmp_path, [7, 8, 9], None, 3), 0.25)


class First(MapDataset):
    """The first items of a data set."""

    def __init__(self, data: MapDataset, num: int):
        self.data, self.num, self.class_names = data, num, data.class_names

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, i: int) -> Item:
        return self.data[i]


def test_half_of_the_samples_of_every_epoch_are_of_the_base_model_and_each_comes_as_often(
    beside_digits,
):
    loader = Loader(
        beside_digits,
        Transform(8, 1, "none"),
        seed=0,
        batch_size=12,
        micro_batch_size=4,
        process_index=0,
        num_processes=1,
    )
    micro_batches = loader.batches(0)
    epoch = [next(micro_batches) for _ in range(60 // 4)]

    weights = torch.cat([micro.weights for micro in epoch])
    pixels = torch.cat([micro.pixels.flatten(1) for micro in epoch])[weights == 0.25]
    labels = torch.cat([micro.labels for micro in epoch])[weights == 0.25]

    assert weights.tolist().count(1.0) == weights.tolist().count(0.25) == 30
    assert Counter(labels.tolist()) == {7: 10, 8: 10, 9: 10}
    assert torch.equal(pixels[:, 0].long() - 100, labels - 7)


def test_items_keep_their_place_their_label_and_their_weight(beside_digits):
    assert len(beside_digits) == 60
    assert beside_digits[3].name == beside_digits.data[3].name
    assert [beside_digits.weight(i) for i in (0, 29, 30, 59)] == [1.0, 1.0, 0.25, 0.25]
    assert [beside_digits[i].label for i in (30, 31, 32, 33)] == [7, 8, 9, 7]
    name = str(beside_digits.prior.files[1])
    assert beside_digits.original(34).name == beside_digits[34].name == name


# When they are generated


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Return the network of a digits model that was trained for one step."""
    folder = tmp_path_factory.mktemp("base")
    command("train", tiny(folder, training__steps=1))
    return folder / "run" / "pipeline" / "unet"


def with_prior(folder: Path, base: Path, **changes: Any) -> Path:
    given = {
        "model": {"type": "unet2d", "path": str(base)},
        "prior": {"num": 6, "weight": 0.5, "labels": [1, 2]},
        "training__steps": 2,
        "training__num_sampled": 1,
        "training__checkpoint_every": 1,
    }
    return tiny(folder, **{**given, **changes})


def stamps(folder: Path) -> dict[str, int]:
    """Return when each file of the prior was written last."""
    files = sorted((folder / "run" / "prior").iterdir())
    return {file.name: file.stat().st_mtime_ns for file in files}


def test_samples_are_those_of_the_untrained_network_with_their_labels(base, tmp_path):
    file = with_prior(tmp_path, base)
    model = Plans(load(file), Launch()).model
    generator, denoiser = model.generator.with_seed(2), model.denoiser().eval()
    labels, expected = torch.tensor([1, 2, 1, 2, 1, 2]), []
    for rows in ([0, 1, 2, 3], [4, 5]):
        expected.append(generator(denoiser, rows, torch.device("cpu"), labels[rows]))

    trainer(file)

    for i, image in enumerate(torch.cat(expected)):
        made = PIL.Image.open(tmp_path / "run" / "prior" / f"{i:06d}.png")
        assert np.array_equal(np.asarray(made), image[0])


def test_samples_are_generated_once_and_survive_a_resume(base, tmp_path):
    first = command("train", with_prior(tmp_path, base))
    before = stamps(tmp_path)

    second = command("train", with_prior(tmp_path, base, training__steps=4))
    straight = with_prior(tmp_path / "straight", base, training__steps=4)
    command("train", straight)

    prior = tmp_path / "run" / "prior"
    lines = [*first.out.splitlines(), *second.out.splitlines()]
    assert [line for line in lines if line.startswith("prior: ")] == [
        f"prior: generating 6 samples of the base model into {prior}",
        f"prior: using 6 samples of the base model from {prior}",
    ]
    assert stamps(tmp_path) == before
    assert sorted(before) == [*(f"{i:06d}.png" for i in range(6)), "made.json"]
    one, other = saved(tmp_path / "run")["model"], saved(tmp_path / "straight" / "run")["model"]
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "change", ["prior.labels=[3]", "sampling.seed=1", "sampling.sampler.steps=3", "model.path"]
)
def test_samples_of_another_base_or_of_other_settings_are_generated_again(base, tmp_path, change):
    file = with_prior(tmp_path, base)
    trainer(file)
    before = stamps(tmp_path)
    if change == "model.path":
        command("train", tiny(tmp_path / "other", training__steps=2))
        change = f"model.path={tmp_path / 'other' / 'run' / 'pipeline' / 'unet'}"

    trainer(file, "optimizer.lr=0.5", "prior.weight=0.25")
    assert stamps(tmp_path) == before
    trainer(file, change)
    assert all(stamps(tmp_path)[name] != stamp for name, stamp in before.items())


def test_another_adapter_over_the_same_base_takes_the_same_samples(base, tmp_path):
    file = with_prior(tmp_path, base)
    trainer(file)
    before = stamps(tmp_path)

    for adapter in ("{type: lora, rank: 2}", "{type: dora, rank: 3}"):
        trainer(file, f"adapter={adapter}")

    assert stamps(tmp_path) == before


def test_samples_that_were_not_finished_are_generated_again(base, tmp_path):
    file = with_prior(tmp_path, base)
    trainer(file)
    (tmp_path / "run" / "prior" / "made.json").unlink()
    (tmp_path / "run" / "prior" / "000004.png").unlink()

    trainer(file)

    assert len(stamps(tmp_path)) == 7
    assert json.loads((tmp_path / "run" / "prior" / "made.json").read_text())["num"] == 6


def test_samples_of_prompts_are_trained_on_under_their_prompts(pipelines, tmp_path):
    prior = {"num": 3, "weight": 0.5, "prompts": ["a dog", "a bird"]}
    blocks = {"prior": prior, "captions": None}
    file = recipe(tmp_path, "stable_diffusion", pipelines("stable_diffusion"), **blocks)
    batches = trainer(file).loader.batches(0)
    captions = {0.5: set(), 1.0: set()}
    for _ in range(4):
        micro = next(batches)
        for caption, weight in zip(micro.captions, micro.weights.tolist(), strict=True):
            captions[weight].add(caption)

    assert captions[0.5] == {"a dog", "a bird"}
    assert captions[1.0] == {f"a photo of thing {i}" for i in range(8)}


def test_base_samples_are_shown_under_their_own_prompts_and_not_in_the_subjects_template():
    """DreamBooth: "a photo of sks" belongs to the subject's captions alone."""
    captions = Captions(
        dropout=0.25, templates=["a photo of sks {}", "sks {}"], shuffle_tags=True, variants=3
    )
    data = WithPrior(Captioned(["dog, brown", "dog, black"]), Captioned(["a photo of a dog"]), 1.0)
    rngs = [Rng(0, samples=[k]) for k in range(200)]

    shown = [{data.shown(i, captions)(data[i].caption, rng) for rng in rngs} for i in range(4)]

    assert shown[2] == shown[3] == {"", "a photo of a dog"}
    assert {text for text in shown[0] if text} == {
        f"{start}sks dog, brown" for start in ("a photo of ", "")
    } | {f"{start}sks brown, dog" for start in ("a photo of ", "")}


def test_cached_text_of_base_samples_is_their_own_prompt(tmp_path):
    captions = Captions(templates=["a photo of sks {}", "sks {}"], variants=2)
    data = WithPrior(Captioned(["dog", "cat"]), Captioned(["a photo of a dog"]), 1.0)

    contents = read_contents(data, tmp_path, captions, False, ReadErrors(), "data")

    texts = [{contents.prompts[contents.prompt_key(i, v)] for v in range(2)} for i in range(4)]
    assert texts[2] == texts[3] == {"a photo of a dog"}
    assert all("sks" in text for text in texts[0] | texts[1])


class Captioned(MapDataset):
    """Grey pictures with captions."""

    def __init__(self, texts):
        self.texts = texts

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, i):
        return Item(PIL.Image.new("L", (2, 2)), caption=self.texts[i], name=f"picture {i}")
