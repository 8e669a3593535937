"""scripts/cifar_text_to_image.py on small images of noise."""

import importlib.util
import io
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import StableDiffusionPipeline
from helpers.places import ROOT
from transformers import CLIPTokenizer

from difftrain.core.rng import Rng
from difftrain.data.items import Images
from difftrain.data.transform import to_unit_range
from difftrain.models.autoencoder import LatentEncoder

CAPTIONS = ["a photo of a truck", "a photo of an airplane", "a photo of a bird"]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location(
        "cifar_text_to_image", ROOT / "scripts" / "cifar_text_to_image.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def noise() -> torch.Tensor:
    return torch.randint(
        0, 256, (24, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )


@pytest.fixture(scope="module")
def pipeline(script, noise):
    return script.untrained_pipeline(noise, CAPTIONS, steps=2)


def photographs(file: Path, num: int) -> Path:
    """A parquet file of `num` images of noise, classes in turn."""
    rows = []
    for i in range(num):
        buffer = io.BytesIO()
        PIL.Image.fromarray(
            np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        ).save(buffer, "PNG")
        rows.append(
            {
                "image": {"bytes": buffer.getvalue(), "path": None},
                "label": i % 10,
                "caption": f"a photo of class {i % 10}",
            }
        )
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file


def test_parts_share_no_photograph_and_the_base_sees_no_truck(script, tmp_path, monkeypatch):
    most, one, rest = slice(0, 2), slice(2, 3), slice(3, None)
    rows = {
        "known": most,
        "known_held_out": one,
        "truck": most,
        "truck_held_out": one,
        "judge": rest,
    }
    monkeypatch.setattr(
        script, "PARTS", {name: (script.PARTS[name][0], rows[name]) for name in script.PARTS}
    )

    script.write_parts(photographs(tmp_path / "all.parquet", 40), tmp_path / "parts")

    parts = {name: script.images_of(tmp_path / "parts" / f"{name}.parquet") for name in rows}
    assert {name: len(part) for name, part in parts.items()} == {
        "known": 18,
        "known_held_out": 9,
        "truck": 2,
        "truck_held_out": 1,
        "judge": 10,
    }
    everything = torch.cat([part.pixels for part in parts.values()])
    assert len(everything.flatten(1).unique(dim=0)) == 40
    assert not (parts["known"].labels == script.NEW).any()
    assert (parts["truck"].labels == script.NEW).all()


def test_the_tokenizer_has_a_token_for_each_word_and_spells_others(script, tmp_path):
    script.tokenizer(CAPTIONS).save_pretrained(tmp_path)

    words = CLIPTokenizer.from_pretrained(tmp_path)
    assert [words.tokenize(caption) for caption in CAPTIONS] == [
        [f"{word}</w>" for word in caption.split()] for caption in CAPTIONS
    ]
    assert words.tokenize("zebu") == ["z", "e", "b", "u</w>"]
    ids = words("a photo of a bird", padding="max_length").input_ids
    assert (len(ids), ids[0], ids[6], ids[-1]) == (
        script.TOKENS,
        words.bos_token_id,
        words.eos_token_id,
        words.pad_token_id,
    )


def test_scaled_latents_have_unit_variance(pipeline, noise):
    latents = LatentEncoder("", vae=pipeline.vae).encode(
        to_unit_range(noise), Rng(0, samples=range(len(noise)))
    )
    assert latents.shape == (24, 4, 8, 8)
    assert float(latents.std()) == pytest.approx(
        1, abs=0.05
    )  # 6,144 latents of other draws: 1 % of standard error


def test_the_pipeline_is_the_same_again_and_diffusers_draws_with_it(
    script, pipeline, noise, tmp_path
):
    again = script.untrained_pipeline(noise, CAPTIONS, steps=2)
    for name in ("vae", "text_encoder", "unet"):
        first, second = (getattr(made, name).state_dict() for made in (pipeline, again))
        assert all(torch.equal(first[key], second[key]) for key in first)

    pipeline.save_pretrained(tmp_path)
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded("a photo of a bird", num_inference_steps=2).images[0].size == (32, 32)


def test_the_table_says_what_share_of_each_class_is_read_as_asked(script):
    class Reader:
        def extract(self, images, outputs):
            return {"logits": torch.nn.functional.one_hot(images[:, 0, 0, 0].long(), 10)}

    labels = torch.arange(20) % 10
    images = Images(
        labels.to(torch.uint8)[:, None, None, None].expand(-1, 3, 32, 32).clone(), labels
    )
    images.pixels[[9, 10]] = 5  # one of two trucks, and one of two airplanes

    shares = script.read_as_asked(Reader(), images)

    assert shares == [0.5, *[1.0] * 8, 0.5]
    assert script.table({"samples": shares}, CAPTIONS * 4).splitlines()[1].split() == [
        "samples",
        "50",
        *["100"] * 8,
        "50",
        "94.4",
        "50.0",
    ]


def test_images_apart_are_counted(script):
    one = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    other = one.clone()
    other[0, 0, 0] = torch.tensor([3, 250])
    assert script.difference(one, other) == "at most 250 grey levels apart, 17 % of values differ"
