"""Latents and text states from a cache are equal to what is encoded in the training loop."""

from hashlib import blake2b
from itertools import islice

import numpy as np
import PIL.Image
import pytest
import torch
from helpers.cached import FIXED, PLAIN, Encoder, Made, Words, captioned
from helpers.support import assert_close

from difftrain.core.errors import InputError
from difftrain.core.files import records
from difftrain.core.rng import Rng
from difftrain.data.buckets import Buckets
from difftrain.data.cache import Cache, build_cache
from difftrain.data.captions import Captions
from difftrain.data.datasets.digit_clips import DigitClips
from difftrain.data.datasets.digits import Digits
from difftrain.data.items import StreamDataset
from difftrain.data.loader import Loader
from difftrain.data.transform import Transform, to_unit_range
from difftrain.data.unreadable import ReadErrors

RANDOM = Transform(8, crop="random", flip=True)


def batches(table, num=6, transform=FIXED, **options):
    settings = {
        "seed": 1,
        "batch_size": 4,
        "micro_batch_size": 2,
        "process_index": 0,
        "num_processes": 1,
        **options,
    }
    return list(islice(Loader(table, transform, **settings).batches(0), num))


# Equal to what is encoded in the loop


@pytest.mark.parametrize("num_workers", [0, 1])
def test_cached_batches_are_those_that_would_have_been_encoded(folder, place, num_workers):
    captions = Captions(dropout=0.3, templates=["a {}"])
    made = Made(folder, place, captions=captions)
    encoder, text = Encoder(), Words()

    for cached, plain in zip(
        batches(made.table, num_workers=num_workers),
        batches(captioned(folder), captions=captions),
        strict=True,
    ):
        assert (cached.step, cached.samples, cached.pixels, cached.captions) == (
            plain.step,
            plain.samples,
            None,
            None,
        )
        assert torch.equal(cached.geometry, plain.geometry)
        assert_close(cached.moments, encoder.moments(to_unit_range(plain.pixels)), absolute=1e-5)
        for name, states in text.encode(plain.captions).items():
            assert torch.equal(cached.cond[name], states)
    assert "" in text.prompts


def test_nothing_is_encoded_once_the_cache_is_there(folder, place):
    made = Made(folder, place)
    before = made.encoded

    batches(made.table, 20)

    assert made.encoded == before == (10, 11)  # ten captions and the empty one


def test_buckets_are_cached_in_their_own_sizes(tmp_path, place):
    rng = np.random.default_rng(0)
    for i, size in enumerate([(16, 16), (30, 10), (12, 33), (20, 21), (9, 18)]):
        PIL.Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(
            tmp_path / f"{i}.png"
        )
        (tmp_path / f"{i}.txt").write_text(str(i))
    plan = Buckets(step=4, max_ratio=3.0).plan(captioned(tmp_path), FIXED, seed=1, batch_size=4)
    made = Made(tmp_path, place, buckets=plan)

    for cached, plain in zip(
        batches(made.table, 12, buckets=plan),
        batches(captioned(tmp_path), 12, buckets=plan),
        strict=True,
    ):
        assert torch.equal(cached.geometry, plain.geometry)
        assert_close(cached.moments, Encoder().moments(to_unit_range(plain.pixels)), absolute=1e-5)


def test_random_crops_are_variants_of_which_a_sample_draws_one(folder, place):
    made = Made(folder, place, transform=RANDOM, variants=3)
    image, rows = (
        captioned(folder)[4],
        [made.table.sample(4, Rng(0, samples=[k])) for k in range(60)],
    )

    assert made.encoded == (30, 11)
    geometries = {row.geometry for row in rows}
    assert 1 < len({row.moments.sum().item() for row in rows}) <= 3
    sides = [
        side for top in range(3) for left in range(4) for side in crops(image.image, top, left)
    ]
    encoded = Encoder().moments(to_unit_range(torch.stack(sides)))
    for row in rows:
        assert ((encoded - row.moments).abs().amax((1, 2, 3)) < 1e-5).any()
    assert all(geometry[:2] == (10, 14) and geometry[4:] == (8, 8) for geometry in geometries)


def crops(image, top, left):
    """The 8 x 8 crop of the resized image, and its mirror image."""
    resized = torch.from_numpy(
        np.array(image.resize((11, 8), PIL.Image.Resampling.BICUBIC))
    ).permute(2, 0, 1)
    side = resized[:, :, left : left + 8]
    return side, side.flip(-1)


def test_renderings_are_variants_of_which_a_sample_draws_one(folder, place):
    captions = Captions(shuffle_tags=True, variants=4, dropout=0.2)
    made = Made(folder, place, captions=captions)
    allowed = {
        text: Words().encode([text])["encoder_hidden_states"][0]
        for text in ("", "photo, no 4", "no 4, photo")
    }

    found = [
        made.table.sample(4, Rng(0, samples=[k])).cond["encoder_hidden_states"] for k in range(60)
    ]

    which = [
        next(text for text, states in allowed.items() if torch.equal(states, row)) for row in found
    ]
    assert set(which) == set(allowed)


def test_latents_alone_leave_captions_as_text_and_text_alone_leaves_pixels(folder, place):
    captions = Captions(dropout=0.3)
    plain = batches(captioned(folder), captions=captions)
    latents = batches(Made(folder, place, captions=captions).table)
    only_latents = Cache(place, text=False)
    table = build_cache(captioned(folder), FIXED, Encoder(), None, captions, only_latents)

    assert [batch.captions for batch in batches(table)] == [batch.captions for batch in plain]
    assert all(batch.cond is None for batch in batches(table))
    assert all(batch.captions is None for batch in latents)
    only_text = build_cache(
        captioned(folder), FIXED, None, Words(), captions, Cache(place, latents=False)
    )
    for found, expected in zip(batches(only_text), plain, strict=True):
        assert torch.equal(found.pixels, expected.pixels)
        assert torch.equal(found.geometry, expected.geometry)
        assert found.cond is not None
        assert found.moments is None


def test_labelled_images_without_captions_are_cached_too(place):
    data = Digits("held_out")
    table = build_cache(data, Transform(8, channels=3), Encoder(), None, None, Cache(place))

    first = batches(table, 1)[0]

    assert first.moments.shape == (2, 8, 4, 4)
    assert first.labels.tolist() == batches(data, 1)[0].labels.tolist()
    assert len(table) == len(data)
    assert table.class_names == data.class_names
    assert table[3].name == data[3].name


# Errors


def test_an_unreadable_image_stops_or_is_left_out(folder, place, tmp_path):
    (folder / "004.png").write_bytes((folder / "004.png").read_bytes()[:90])

    with pytest.raises(InputError, match=r"004\.png cannot be read.*on_error: skip"):
        Made(folder, place)
    errors = ReadErrors("skip", tmp_path / "list")
    made = Made(folder, place, errors=errors)

    skipped = {
        record["name"]
        for batch in batches(made.table, 10, on_error="skip")
        for record in batch.skipped
    }
    assert skipped == {str(folder / "004.png")}
    listed = records(errors.file)
    content = blake2b((folder / "004.png").read_bytes(), digest_size=16).hexdigest()
    assert [(one["data"], one["name"], one["digest"]) for one in listed] == [
        ("data", str(folder / "004.png"), content)
    ]
    with pytest.raises(InputError, match=r"004\.png cannot be read"):
        batches(made.table, 10)


def test_latents_that_are_not_finite_are_named_before_training(folder, place):
    encoder = Encoder(dtype="float16")
    encoder.vae.encoder.conv_in.weight.data.fill_(60000)

    with pytest.raises(
        InputError,
        match=r"latents of .*000\.png.* are not finite with the VAE in float16.*"
        r"encoder: \{type: vae, path: ",
    ):
        Made(folder, place, encoder=encoder)


def test_an_empty_caption_is_an_error(folder, place):
    (folder / "004.txt").write_text("")

    with pytest.raises(InputError, match=r"the caption of .*004\.png is empty"):
        Made(folder, place)


class Stream(StreamDataset):
    def is_labelled(self): ...

    def rows(self, seed, process_index, num_processes): ...

    def item(self, key): ...


@pytest.mark.parametrize(
    ("settings", "given", "message"),
    [
        (
            {},
            {"transform": RANDOM},
            r"cache: with transform.crop: random and flip: true.*Write cache: \{variants: 4\}, "
            r"or crop: center",
        ),
        ({"variants": 2}, {}, r"cache.variants: 2 has no effect: with crop: center"),
        (
            {},
            {"captions": Captions(shuffle_tags=True)},
            r"Write captions: \{variants: 4\}, or cache: \{text: false\}",
        ),
        (
            {"text": False},
            {"captions": Captions(shuffle_tags=True, variants=2)},
            r"captions.variants: 2 has no effect without cached text",
        ),
        ({}, {"data": DigitClips()}, r"cache: clips cannot be cached.*Leave cache out"),
        ({}, {"data": Stream()}, r"cache: a stream cannot be cached.*streaming: false"),
        ({"latents": False}, {"has_text": False}, r"there is nothing to cache"),
    ],
)
def test_what_cannot_be_cached_is_an_error_with_a_remedy(settings, given, message):
    given = {
        "data": Digits("held_out"),
        "transform": FIXED,
        "captions": PLAIN,
        "has_text": True,
        **given,
    }

    with pytest.raises(InputError, match=message):
        Cache("nowhere", **settings).check(
            given["data"], given["transform"], given["captions"], True, given["has_text"]
        )


def test_settings_without_effect_are_errors():
    with pytest.raises(
        InputError, match=r"latents: false and text: false there is nothing to cache"
    ):
        Cache("nowhere", latents=False, text=False)
    with pytest.raises(InputError, match=r"cache.variants: 2 has no effect with latents: false"):
        Cache("nowhere", variants=2, latents=False)


def test_a_folder_that_cannot_be_written_is_named(folder, tmp_path):
    (tmp_path / "file").write_text("")

    with pytest.raises(InputError, match=r"cache.folder: .*cannot be written"):
        Made(folder, str(tmp_path / "file"))
