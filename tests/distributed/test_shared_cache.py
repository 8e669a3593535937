"""A cache that two processes build, against the one of a single process."""

import pytest
import torch
from helpers.cached import Encoder, Words, captioned, photos
from helpers.places import PROGRAMS
from helpers.several import run_program

from difftrain.core.rng import Rng
from difftrain.data.buckets import Buckets
from difftrain.data.cache import Cache, build_cache
from difftrain.data.captions import Captions
from difftrain.data.transform import Transform

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Built by two processes."""
    folder = tmp_path_factory.mktemp("caching")
    photos(folder / "photos", 11)
    run_program(PROGRAMS / "caching.py", folder, num=2)
    return folder


@pytest.fixture(scope="module")
def made(folder):
    return [torch.load(folder / f"made-{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_each_of_two_processes_encodes_its_share(made):
    images, prompts = zip(*(part["first"]["encoded"] for part in made), strict=True)

    assert sorted(images) == [5, 6]
    assert sorted(prompts) in ([5, 7], [6, 6])
    assert [part["again"]["encoded"] for part in made] == [(0, 0), (0, 0)]


def test_two_processes_build_the_cache_of_one(made, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("difftrain.data.cache.encoding.PIXELS_AT_ONCE", 128)
    alone = build_cache(
        captioned(folder / "photos"),
        Transform(8),
        Encoder(),
        Words(),
        Captions(),
        Cache(str(tmp_path)),
    )

    for part in made:
        for i in range(len(alone)):
            sample = alone.sample(i, Rng(0))
            assert torch.equal(
                part["first"]["moments"][i], sample.moments
            )  # the blocks that go through the VAE are the same
            assert torch.equal(part["first"]["words"][i], sample.cond["text_embeds"])


def test_what_one_process_meets_ends_the_work_of_both_and_what_was_encoded_stays(made):
    assert [part["refused"] for part in made] == ["the latents of a.png are not finite"] * 2
    assert 0 < sum(part["after"]["encoded"][0] for part in made) < 11
    assert torch.equal(made[0]["after"]["moments"], made[0]["first"]["moments"])


def test_headers_are_read_in_shares_and_give_the_same_buckets(made, folder):
    alone = Buckets(step=4).plan(captioned(folder / "photos"), Transform(8), 0, 4)

    assert [part["table"] for part in made] == [alone.table()] * 2
