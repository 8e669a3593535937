"""Texts that are longer than text encoders read: counted by encoder, in one sentence."""

from typing import Any

import pytest
from helpers.fine_tuning import photos

from difftrain.data.captions import Captions
from difftrain.data.datasets.image_folder import ImageFolder
from difftrain.models.pipelines import truncation
from difftrain.models.pipelines.text_encoders import PromptTokenizer
from difftrain.models.pipelines.truncation import truncated, truncated_captions
from difftrain.models.slots import MODELS

BOTH = (
    "2 of 3 texts are longer than the 77 tokens that the text_encoder and the text_encoder_2 read"
)


def tokenizer_of(pipelines: Any, family: str, **arguments: Any) -> PromptTokenizer:
    """A tokenizer of single letters, two of whose tokens are marks of its own."""
    block = {"type": family, "path": str(pipelines(family)), **arguments}
    return MODELS.parse(block, "model").build().tokenizer


@pytest.mark.parametrize(
    ("family", "arguments", "expected"),
    [
        ("stable_diffusion_xl", {}, f"{BOTH}; the rest of them is not seen"),
        (
            "stable_diffusion_3",
            {"max_tokens": 256},
            f"{BOTH}; the text_encoder_3 reads up to 256 and cuts none",
        ),
        (
            "stable_diffusion_3",
            {"max_tokens": 110},
            f"{BOTH}, 1 of 3 texts is longer than the 110 tokens that the text_encoder_3 reads; "
            "what lies beyond all of these is not seen",
        ),
        ("flux", {"max_tokens": 256}, None),
        (
            "flux",
            {"max_tokens": 110},
            "1 of 3 texts is longer than the 110 tokens that the text_encoder_2 reads; the rest of "
            "them is not seen",
        ),
    ],
)
def test_a_sentence_says_what_each_encoder_cuts_and_which_one_reads_on(
    pipelines, family, arguments, expected
):
    """The network of FLUX attends to the T5's words alone."""
    tokenizer = tokenizer_of(pipelines, family, **arguments)

    assert truncated(["x" * 100, "x" * 120, "a cat"], tokenizer, "texts") == expected


def test_of_very_many_captions_some_evenly_spread_are_counted(pipelines, tmp_path, monkeypatch):
    data = photos(tmp_path / "photos", 9)
    for i in (0, 1, 6):
        (data / f"{i}.txt").write_text("x" * 70)
    monkeypatch.setattr(truncation, "MOST", 4)  # every third
    monkeypatch.setattr(truncation, "AT_ONCE", 2)
    tokenizer = tokenizer_of(pipelines, "stable_diffusion")
    folder = ImageFolder(str(data), captions="sidecar")

    in_template = truncated_captions(folder, Captions(templates=["a photo of {}"]), tokenizer)

    assert truncated_captions(folder, Captions(), tokenizer) is None
    assert in_template is not None
    assert in_template.startswith("2 of 3 captions looked at are longer than the 77 tokens")
