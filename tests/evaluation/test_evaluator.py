"""The evaluator: any order of blocks, any number of processes, the same scores; and what it refuses."""

import json
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from torch import Tensor

from difftrain.data.items import Images
from difftrain.evaluation import FeatureStatistics
from difftrain.evaluation.classifier import train_classifier
from difftrain.evaluation.evaluator import Evaluation, Generated, evaluate
from difftrain.evaluation.features import Pixels
from difftrain.evaluation.metrics import ClassAgreement, FrechetDistance, KernelDistance, NearestNeighbourRatio, PrecisionRecall
from difftrain.evaluation.storage import digest
from difftrain.evaluation.weights import shared_classifier
from difftrain.registry import InputError

NUM = 45


def images(num: int, seed: int) -> Tensor:
    return torch.randint(0, 256, (num, 1, 8, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


GENERATED, LABELS = images(NUM, seed=1), torch.arange(NUM) % 3
REFERENCE, TRAINING = Images(images(40, seed=2), torch.arange(40) % 3), Images(images(60, seed=3), torch.arange(60) % 3)
METRICS = [FrechetDistance(), KernelDistance(), PrecisionRecall(), NearestNeighbourRatio(), ClassAgreement()]


class Named(Pixels):
    """Pixels that also name a class: how bright an image is."""

    def classify(self, images: Tensor) -> Tensor:
        return images.float().mean(dim=(1, 2, 3)).long() % 3


FEATURES = Named((1, 8, 8))


def block(*indices: int, labelled: bool = True) -> Generated:
    return Generated(list(indices), GENERATED[list(indices)], LABELS[list(indices)] if labelled else None)


def blocks_of(size: int) -> list[Generated]:
    return [block(*rows.tolist()) for rows in torch.arange(NUM).split(size)]


def scored(blocks, metrics=METRICS, **changes) -> Evaluation:
    given = {"num_samples": NUM, "reference": REFERENCE, "training": TRAINING, "features": FEATURES, "seed": 0}
    return evaluate(blocks, metrics=metrics, **(given | changes))


def test_blocks_may_come_in_any_order_and_size():
    whole = scored([block(*range(NUM))])

    assert scored(reversed(blocks_of(7))) == whole
    assert set(whole.scores) == {
        "frechet_distance", "kernel_distance", "precision", "recall", "nearest_neighbour_ratio", "class_agreement",
    }  # fmt: skip
    assert whole.scores["class_agreement"]["value"] == float((FEATURES.classify(GENERATED) == LABELS).double().mean())


def test_labels_belong_to_their_indices():
    agreeing = [Generated(b.indices, b.images, FEATURES.classify(b.images)) for b in reversed(blocks_of(4))]

    assert scored(agreeing, [ClassAgreement()]).scores["class_agreement"]["value"] == 1


def test_the_evaluation_is_json_with_all_that_fixes_it():
    found = scored(blocks_of(8), sampling={"type": "ddim", "steps": 20}).to_json(step=120)

    assert json.loads(json.dumps(found)) == found
    assert (found["step"], found["num_samples"]) == (120, NUM)
    assert found["protocol"] == {
        "num_samples": NUM,
        "seed": 0,
        "features": FEATURES.protocol(),
        "reference": {"count": 40, "digest": digest(REFERENCE.pixels, REFERENCE.labels)},
        "training": {"count": 60, "digest": digest(TRAINING.pixels, TRAINING.labels)},
        "metrics": [
            {"type": "frechet_distance", "splits": 10},
            {"type": "kernel_distance", "degree": 3},
            {"type": "precision_recall", "neighbours": 3},
            {"type": "nearest_neighbour_ratio"},
            {"type": "class_agreement"},
        ],
        "sampling": {"type": "ddim", "steps": 20},
    }


def test_another_reference_is_another_protocol():
    changed = REFERENCE.pixels.clone()
    changed[3, 0, 2, 5] ^= 1

    other = scored(blocks_of(8), reference=Images(changed, REFERENCE.labels))

    assert other.protocol["reference"]["digest"] != scored(blocks_of(8)).protocol["reference"]["digest"]


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (blocks_of(10)[:-1], r"5 missing \[40, 41, 42, 43, 44\], 0 more than once \[\], 0 out of range"),
        ([*blocks_of(10), block(3, 7)], r"0 missing \[\], 2 more than once \[3, 7\], 0 out of range"),
        ([Generated([*range(1, NUM + 1)], GENERATED, LABELS)], r"1 missing \[0\], 0 more than once \[\], 1 out of range"),
        ([Generated([*range(-1, NUM - 1)], GENERATED, LABELS)], r"1 missing \[44\], 0 more than once \[\], 1 out of range"),
        ([*blocks_of(10), Generated([99], GENERATED[:1], None)], r"0 missing \[\], 0 more than once \[\], 1 out of range"),
        ([*blocks_of(40)[:1], block(*range(40, NUM), labelled=False)], "5 of 45 generated images have no label"),
        ([Generated([*range(NUM)], GENERATED[:-1], None)], "45 indices and 44 images"),
        ([Generated([*range(NUM)], GENERATED.float(), None)], r"must be uint8 \[b, 1, 8, 8\] .* got torch.float32"),
        ([Generated([*range(NUM)], GENERATED[:, :, 1:], None)], r"must be uint8 \[b, 1, 8, 8\]"),
    ],
)
def test_a_generated_set_with_gaps_or_of_another_kind_is_refused(blocks, message):
    with pytest.raises(InputError, match=message):
        scored(blocks, [FrechetDistance()])


def test_what_a_metric_lacks_is_said_before_anything_is_generated():
    def never():
        pytest.fail("a block was asked for")
        yield

    with pytest.raises(InputError, match="'nearest_neighbour_ratio' needs training"):
        scored(never(), [NearestNeighbourRatio()], training=None)
    with pytest.raises(InputError, match="'class_agreement' needs classifier: use features that come from a classifier"):
        scored(never(), [ClassAgreement()], features=Pixels((1, 8, 8)))


def test_class_agreement_without_labels_is_refused():
    with pytest.raises(InputError, match="'class_agreement' needs labels"):
        scored([block(*range(NUM), labelled=False)], [ClassAgreement()])


def test_a_metric_listed_twice_is_refused():
    with pytest.raises(InputError, match="'kernel_distance': the score 'kernel_distance' is there already"):
        scored(blocks_of(9), [KernelDistance(), KernelDistance(degree=2)])


def on_one_process(rank: int, folder: str) -> None:
    """What each of two processes does; its findings are left in `folder` for the test to compare."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.set_num_threads(1)
    try:
        blocks = blocks_of(8)  # six blocks, the last one of five images
        uneven = scored([blocks[0], blocks[5], blocks[3], blocks[4]] if rank == 0 else [blocks[2], blocks[1]])
        one_idle = scored([] if rank == 0 else blocks)
        messages = []
        for mine in (blocks[:5] if rank == 0 else [], blocks if rank == 0 else blocks[:1]):
            with pytest.raises(InputError) as error:
                scored(mine, [FrechetDistance()])
            messages.append(str(error.value))
        statistics = FeatureStatistics(64)
        statistics.update(FEATURES(GENERATED[:10] if rank == 0 else GENERATED[10:]))
        cache = Path(folder) / f"cache{rank}"
        network = shared_classifier(TRAINING, 3, seed=0, steps=2, cache=cache, name="test")
        found = {
            "uneven": uneven, "one_idle": one_idle, "messages": messages, "moments": statistics.compute(),
            "weights": digest(*network.state_dict().values()), "cached": cache.exists(),
        }  # fmt: skip
        torch.save(found, f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.distributed
def test_two_processes_find_what_one_finds(tmp_path):
    torch.multiprocessing.spawn(on_one_process, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2))
    alone = scored(blocks_of(8))
    whole = FeatureStatistics(64)
    whole.update(FEATURES(GENERATED))

    for found in (first["uneven"], first["one_idle"], second["one_idle"]):
        assert found == second["uneven"]  # bit for bit
    assert first["uneven"].protocol == alone.protocol
    for name, score in alone.scores.items():
        assert first["uneven"].scores[name]["value"] == pytest.approx(score["value"], abs=1e-9)  # threads may sum in another order
    assert first["messages"] == second["messages"]
    assert "5 missing [40, 41, 42, 43, 44]" in first["messages"][0]
    assert "8 more than once [0, 1, 2, 3, 4]" in first["messages"][1]
    for found in (first, second):
        torch.testing.assert_close(found["moments"], (whole.mean, whole.cov), rtol=0, atol=1e-14)
        assert found["weights"] == digest(*train_classifier(TRAINING, 3, seed=0, steps=2).state_dict().values())
    assert (first["cached"], second["cached"]) == (True, False)
