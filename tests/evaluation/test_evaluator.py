"""The evaluator: any number of processes, any stop, the same scores; and what it refuses."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers.images import Held, random_images, written
from helpers.several import on_processes

from difftrain.core.digests import digest
from difftrain.core.errors import InputError
from difftrain.data.datasets.image_folder import ImageFolder
from difftrain.evaluation import FeatureStatistics, frechet_distance
from difftrain.evaluation.evaluator import Evaluator
from difftrain.evaluation.features.classifier_network import (
    shared_classifier,
    train_classifier,
)
from difftrain.evaluation.features.raw import Pixels
from difftrain.evaluation.metrics import frechet
from difftrain.evaluation.metrics.frechet import FrechetDistance
from difftrain.evaluation.metrics.kernel import KernelDistance
from difftrain.evaluation.metrics.memorization import NearestNeighbourRatio
from difftrain.evaluation.metrics.neighbours import PrecisionRecall
from difftrain.evaluation.metrics.predictions import ClassAgreement
from difftrain.evaluation.reference import ReferenceStatistics
from difftrain.evaluation.results import Evaluation, comparable
from difftrain.evaluation.sources import DatasetImages
from difftrain.generation.pictures import to_pil

NUM = 45
GENERATED, LABELS = random_images(NUM, 1), torch.arange(NUM) % 3
OTHERS = random_images(NUM, 4)
REFERENCE = random_images(40, 2), torch.arange(40) % 3
TRAINING = random_images(60, 3), torch.arange(60) % 3
METRICS = [
    FrechetDistance(),
    KernelDistance(subsets=3, subset_size=20),
    PrecisionRecall(),
    NearestNeighbourRatio(),
    ClassAgreement(),
]


class Named(Pixels):
    """Pixels that also name a class: how bright an image is."""

    gives = frozenset({"logits", "classes"})

    def __init__(self) -> None:
        super().__init__((1, 8, 8))

    @property
    def widths(self):
        return {"features": 64, "logits": 3}

    def extract(self, images, outputs=("features",)):
        rows = super().extract(images)
        rows["logits"] = torch.nn.functional.one_hot(classes(images), 3).float()
        return {name: rows[name] for name in outputs}


def classes(images: torch.Tensor) -> torch.Tensor:
    return images.float().mean(dim=(1, 2, 3)).long() % 3


def scored(folder, generated=None, sampling=None, **changes) -> Evaluation:
    given = {
        "reference": Held(*REFERENCE),
        "training": Held(*TRAINING),
        "features": Named(),
        "metrics": METRICS,
        "seed": 0,
    }
    samples = generated or Held(GENERATED, LABELS)
    samples.is_generated = True
    places = {"folder": Path(folder) / "samples", "store": Path(folder) / "store"}
    return Evaluator(**(places | given | changes))(samples, sampling)


def test_scores_do_not_depend_on_the_blocks(tmp_path):
    whole = scored(tmp_path, Held(GENERATED, LABELS, block_size=NUM))

    assert scored(tmp_path, Held(GENERATED, LABELS, block_size=7)).scores == whole.scores
    assert {
        "frechet_distance",
        "kernel_distance",
        "precision",
        "recall",
        "nearest_neighbour_ratio",
        "class_agreement",
    } <= set(whole.scores)
    assert whole.scores["class_agreement"]["value"] == float(
        (classes(GENERATED) == LABELS).double().mean()
    )


def test_nothing_of_the_generated_rows_is_left_and_the_reference_is_looked_at_once(tmp_path):
    reference = Held(*REFERENCE)
    first = scored(tmp_path, reference=reference)

    assert not list((tmp_path / "samples").iterdir())
    again = Held(*REFERENCE)
    assert scored(tmp_path, reference=again) == first
    # Once for the features, once for the nearest training images
    assert (len(reference.asked), len(again.asked)) == (10, 0)


def test_floors_are_measured_once_for_each_number_of_samples(tmp_path, monkeypatch):
    taken = []

    def counted(a, b):
        taken.append(1)
        return frechet_distance(a, b)

    monkeypatch.setattr(frechet, "frechet_distance", counted)
    metrics = [FrechetDistance(splits=3), KernelDistance(splits=2)]

    def evaluator(folder):
        return Evaluator(Held(*REFERENCE), Held(*TRAINING), Named(), metrics, folder, seed=0)

    kept = evaluator(tmp_path / "kept")
    sets = [Held(GENERATED[:30]), Held(GENERATED[15:]), Held(GENERATED[:20]), Held(GENERATED[25:])]
    found = []
    calls = []
    for generated in sets:
        taken.clear()
        found.append(kept(generated).scores)
        calls.append(len(taken))

    assert calls == [1 + 3, 1, 1 + 3, 1]
    assert found == [evaluator(tmp_path / "fresh")(generated).scores for generated in sets]


class Brightness(Pixels):
    """The mean of each channel, of images of any size."""

    takes_any_size = True

    @property
    def widths(self):
        return {"features": 3}

    def extract(self, images, outputs=("features",)):
        return {"features": images.float().mean(dim=(2, 3))}


def test_images_of_several_sizes_are_for_features_that_take_any(tmp_path):
    images = random_images(12, 4, (3, 9, 7))
    mixed, plain = written(images, tmp_path / "mixed"), written(images[:6], tmp_path / "plain")
    to_pil(images[0, :, :5]).save(mixed / "0004.png")
    given = {"training": None, "metrics": [FrechetDistance()], "features": Pixels((3, 9, 7))}
    source, other = (DatasetImages(ImageFolder(str(folder))) for folder in (mixed, plain))

    where = "0004.png is 7x5, but .*0000.png is 7x9: "
    with pytest.raises(InputError, match=where + "features 'pixels' expect images of one size"):
        scored(tmp_path / "rows", source, reference=other, **given)
    with pytest.raises(InputError, match=where + "features 'pixels' expect images of one size"):
        scored(tmp_path / "rows", other, reference=source, **given)
    given["features"] = Brightness((3, 9, 7))
    compared = given | {"training": source, "metrics": [NearestNeighbourRatio()]}
    with pytest.raises(InputError, match=where + ".*cannot be compared in pixels"):
        scored(tmp_path / "rows", other, **compared)
    score = scored(tmp_path / "rows", source, reference=other, **given).scores["frechet_distance"]
    rows = images.float().mean(dim=(2, 3))
    rows[4] = images[0, :, :5].float().mean(dim=(1, 2))
    assert score["value"] == frechet_distance(rows, images[:6].float().mean(dim=(2, 3)))


def test_evaluations_at_once_score_as_each_of_them_alone(tmp_path):
    """Of the same samples twice, and of others, with one folder and one store."""

    class Slow(Held):
        def blocks(self, wanted):
            for block in super().blocks(wanted):
                time.sleep(0.002)
                yield block

    alone = [scored(tmp_path / "first"), scored(tmp_path / "other", Held(OTHERS, LABELS))]
    for number in range(5):
        sets = [GENERATED, GENERATED, OTHERS, OTHERS]
        with ThreadPoolExecutor(len(sets)) as pool:
            given = [Slow(images, LABELS) for images in sets]
            folder = tmp_path / str(number)
            found = list(pool.map(lambda one, folder=folder: scored(folder, one), given))
        assert found == [alone[0], alone[0], alone[1], alone[1]]
        assert not list((folder / "samples").iterdir())


def test_an_evaluation_that_was_stopped_goes_on(tmp_path):
    class Stopped(Held):
        def blocks(self, wanted):
            for number, block in enumerate(super().blocks(wanted)):
                if number == 4:
                    raise KeyboardInterrupt
                yield block

    with pytest.raises(KeyboardInterrupt):
        scored(tmp_path, Stopped(GENERATED, LABELS))
    rest = Held(GENERATED, LABELS)
    found = scored(tmp_path, rest)

    assert rest.asked == [list(range(32, 40)), list(range(40, 45))]
    assert found == scored(tmp_path / "other")


def test_the_evaluation_is_json_with_all_that_fixes_it(tmp_path):
    found = scored(tmp_path, sampling={"type": "ddim", "steps": 20}).to_json(step=120)

    assert json.loads(json.dumps(found)) == found
    assert (found["step"], found["num_samples"]) == (120, NUM)
    assert found["protocol"]["features"] == Named().protocol()
    assert found["protocol"]["sampling"] == {"type": "ddim", "steps": 20}
    assert [found["protocol"][name]["count"] for name in ("reference", "training")] == [40, 48]
    assert found["generated"]["count"] == NUM
    assert [metric["type"] for metric in found["protocol"]["metrics"]] == [
        "frechet_distance",
        "kernel_distance",
        "precision_recall",
        "nearest_neighbour_ratio",
        "class_agreement",
    ]


def test_another_reference_is_another_protocol_and_other_samples_are_not(tmp_path):
    changed = REFERENCE[0].clone()
    changed[3, 0, 2, 5] ^= 1
    changes = (
        {},
        {"reference": Held(changed, REFERENCE[1])},
        {"generated": Held(GENERATED.flip(0), LABELS)},
    )
    plain, other, samples = (scored(tmp_path, **given) for given in changes)

    assert other.to_json(None)["protocol_digest"] != plain.to_json(None)["protocol_digest"]
    assert comparable(samples.protocol) == comparable(plain.protocol)
    assert samples.to_json(None)["protocol_digest"] == plain.to_json(None)["protocol_digest"]


def test_statistics_serve_as_reference_for_the_distance_alone(tmp_path):
    statistics = FeatureStatistics(64)
    statistics.update(Named().extract(REFERENCE[0])["features"])
    reference = ReferenceStatistics({"features": statistics}, {"file": "x"})
    found = scored(tmp_path, reference=reference, metrics=[FrechetDistance()])

    assert found.scores["frechet_distance"]["value"] == pytest.approx(
        scored(tmp_path).scores["frechet_distance"]["value"], rel=1e-9
    )
    assert found.protocol["reference"] == {"file": "x"}
    with pytest.raises(
        InputError,
        match="'kernel_distance' needs reference images: give the reference samples themselves",
    ):
        scored(tmp_path, reference=reference, metrics=[KernelDistance()])


def test_what_a_metric_lacks_is_said_before_anything_is_generated(tmp_path):
    class Never(Held):
        def blocks(self, wanted):
            pytest.fail("a block was asked for")
            yield

    never = Never(GENERATED, LABELS)
    with pytest.raises(
        InputError, match="'nearest_neighbour_ratio' needs nearest: give training images"
    ):
        scored(tmp_path, never, metrics=[NearestNeighbourRatio()], training=None)
    with pytest.raises(
        InputError,
        match="'class_agreement' needs classes: use features that come from a classifier",
    ):
        scored(tmp_path, never, metrics=[ClassAgreement()], features=Pixels((1, 8, 8)))
    with pytest.raises(
        InputError, match="'class_agreement' needs labels: generate with class labels"
    ):
        scored(tmp_path, Never(GENERATED), metrics=[ClassAgreement()])


def test_distances_to_another_training_set_are_taken_anew(tmp_path):
    other = random_images(60, 9)
    first = scored(tmp_path, metrics=[NearestNeighbourRatio()])
    second = scored(tmp_path, metrics=[NearestNeighbourRatio()], training=Held(other, TRAINING[1]))

    assert second == scored(
        tmp_path / "fresh", metrics=[NearestNeighbourRatio()], training=Held(other, TRAINING[1])
    )
    assert second.scores != first.scores


def test_too_few_images_are_refused_before_anything_is_generated(tmp_path):
    generated = Held(GENERATED, LABELS)
    for metric, message in (
        (
            KernelDistance(subsets=2, subset_size=46),
            "'kernel_distance' needs at least 46 generated samples, and there are 45",
        ),
        (
            PrecisionRecall(neighbours=40),
            "'precision_recall' needs at least 41 reference samples, and there are 40",
        ),
        (FrechetDistance(subsets=23), "'frechet_distance' needs at least 46 generated samples"),
    ):
        with pytest.raises(InputError, match=message):
            scored(tmp_path, generated, metrics=[metric])
    assert generated.asked == []


def test_a_metric_listed_twice_is_refused(tmp_path):
    with pytest.raises(
        InputError, match="'kernel_distance': the score 'kernel_distance' is there already"
    ):
        scored(
            tmp_path,
            metrics=[
                KernelDistance(subsets=2, subset_size=9),
                KernelDistance(subsets=3, subset_size=9),
            ],
        )


def on_one_process(rank: int, folder: str) -> None:
    """What each of three processes does; its findings are left in `folder`."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=3
    )
    torch.set_num_threads(1)

    class BrokenForOne(Named):
        def extract(self, images, outputs=("features",)):
            if rank == 1:
                raise InputError("the second process has met something.")
            return super().extract(images, outputs)

    try:
        generated = Held(GENERATED, LABELS)
        found = scored(f"{folder}/rows", generated)
        one_block = scored(f"{folder}/one", Held(GENERATED, LABELS, block_size=NUM))
        with pytest.raises(InputError) as error:
            scored(f"{folder}/broken", features=BrokenForOne())
        statistics = FeatureStatistics(64)
        statistics.update(Named().extract(GENERATED[rank * 15 : rank * 15 + 15])["features"])
        cache = Path(folder) / f"cache{rank}"
        network = shared_classifier(
            images_of(TRAINING), 3, seed=0, steps=2, cache=cache, name="test"
        )
        found = {
            "found": found,
            "one_block": one_block,
            "message": str(error.value),
            "moments": statistics.compute(),
            "weights": digest(*network.state_dict().values()),
            "cached": cache.exists(),
            "asked": [own[0] for own in generated.asked],
        }
        torch.save(found, f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def images_of(pair):
    from difftrain.data.items import Images

    return Images(*pair)


@pytest.mark.distributed
def test_three_processes_find_what_one_finds(tmp_path):
    on_processes(on_one_process, 3, str(tmp_path))
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(3)]
    alone = scored(tmp_path / "alone")
    whole = FeatureStatistics(64)
    whole.update(Named().extract(GENERATED)["features"])

    for own in found:
        assert own["found"] == found[0]["found"]  # bit for bit
        assert own["found"].protocol == alone.protocol
        assert own["message"] == "the second process has met something."
        torch.testing.assert_close(own["moments"], (whole.mean, whole.cov), rtol=0, atol=1e-14)
        assert own["weights"] == digest(
            *train_classifier(images_of(TRAINING), 3, seed=0, steps=2).state_dict().values()
        )
        for name, score in alone.scores.items():
            assert own["found"].scores[name]["value"] == pytest.approx(score["value"], abs=1e-9)
            assert own["one_block"].scores[name]["value"] == pytest.approx(score["value"], abs=1e-9)
    assert [own["cached"] for own in found] == [True, False, False]
    assert [own["asked"] for own in found] == [
        [0, 24],
        [8, 32],
        [16, 40],
    ]  # first indices of each process's blocks


@pytest.mark.parametrize("most_kept", [2**20, 10])
def test_the_worst_cases_are_drawn_above_their_neighbours(tmp_path, monkeypatch, most_kept):
    monkeypatch.setattr("difftrain.evaluation.sample_rows.MOST_KEPT", most_kept)
    copied = GENERATED.clone()
    copied[37], copied[5] = TRAINING[0][11], TRAINING[0][59]
    copied[5, 0, 0, 0] ^= 1

    found = scored(
        tmp_path, Held(copied, LABELS), metrics=[NearestNeighbourRatio()], shows_worst=True
    )

    cases = found.scores["nearest_neighbour_ratio"]["worst"]
    assert [(case["index"], case["training"]) for case in cases[:2]] == [(37, 11), (5, 59)]
    tiles = [
        found.worst[:, 1 + 9 * row : 9 + 9 * row, 1 + 9 * column : 9 + 9 * column]
        for row in range(2)
        for column in range(2)
    ]
    assert [
        torch.equal(tile, image)
        for tile, image in zip(
            tiles, [copied[37], copied[5], TRAINING[0][11], TRAINING[0][59]], strict=True
        )
    ]
    assert torch.equal(tiles[0], tiles[2])
    assert int((tiles[1] != tiles[3]).sum()) == 1


def test_a_reference_of_training_images_is_refused_before_anything_is_generated(tmp_path):
    source = Held(GENERATED, LABELS)

    with pytest.raises(
        InputError, match=r"every reference image is a training image. Give held-out images"
    ):
        scored(tmp_path, source, reference=Held(TRAINING[0][:20], TRAINING[1][:20]))
    assert source.asked == []
