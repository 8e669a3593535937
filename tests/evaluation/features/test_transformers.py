"""DINOv2 and CLIP of random weights against transformers' models, processors and tokenizer."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from helpers.support import assert_close
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
)
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from difftrain.core.errors import InputError
from difftrain.evaluation.features.preprocessing import pillow_resize, preprocessing_of
from difftrain.evaluation.features.transformers import CLIP, Dinov2
from difftrain.evaluation.slots import FEATURES

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
PROCESSOR = {
    "do_resize": True,
    "size": {"shortest_edge": 64},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 56, "width": 56},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    **IMAGENET,
}
SAME = 2e-5  # float32 features of about 1; prepared images are equal
CAPTIONS = ["a cat", "a low cat at a table, a cat, a cat, a cat", ""]


def images(num: int, channels: int, height: int, width: int) -> torch.Tensor:
    return torch.randint(
        0,
        256,
        (num, channels, height, width),
        generator=torch.Generator().manual_seed(0),
        dtype=torch.uint8,
    )


def pillow(batch: torch.Tensor) -> list[Image.Image]:
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in batch]


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dinov2")
    torch.manual_seed(0)
    config = Dinov2Config(**SMALL | {"mlp_ratio": 2}, image_size=70, patch_size=14)
    model = Dinov2Model(config)
    torch.nn.init.normal_(model.embeddings.cls_token)
    torch.nn.init.normal_(model.embeddings.position_embeddings)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return str(folder)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + [","]
    tokens = [
        *letters,
        *(letter + "</w>" for letter in letters),
        "ca",
        "cat</w>",
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    text = SMALL | {
        "vocab_size": len(tokens),
        "max_position_embeddings": 12,
        "eos_token_id": vocabulary["<|endoftext|>"],
    }
    text |= {
        "bos_token_id": vocabulary["<|startoftext|>"],
        "pad_token_id": vocabulary["<|endoftext|>"],
    }
    config = CLIPConfig(
        text_config=text,
        vision_config=SMALL | {"image_size": 56, "patch_size": 14},
        projection_dim=8,
    )
    CLIPModel(config).save_pretrained(folder)
    # as the file of openai/clip-vit-large-patch14: sizes as plain numbers, no do_rescale
    old = {
        key: PROCESSOR[key]
        for key in ("do_resize", "resample", "do_center_crop", "do_normalize", *IMAGENET)
    }
    (folder / "preprocessor_config.json").write_text(
        json.dumps(old | {"size": 56, "crop_size": 56})
    )
    return str(folder)


@pytest.mark.parametrize("size", [(20, 31), (64, 64), (90, 71), (150, 64), (33, 33)])
@pytest.mark.parametrize(
    ("mode", "number"),
    [("bicubic", Image.Resampling.BICUBIC), ("bilinear", Image.Resampling.BILINEAR)],
)
def test_the_resize_is_pillows_of_uint8_images(size, mode, number):
    batch = images(2, 3, *size)
    for target in [(56, 56), (70, 41), (64, 64)]:
        # One pass at a time: Pillow 13 chooses their order by the shape, earlier versions go
        # across first.
        expected = [
            image.resize((target[1], size[0]), number).resize(target[::-1], number)
            for image in pillow(batch)
        ]
        expected = torch.stack(
            [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in expected]
        )
        assert torch.equal(pillow_resize(batch, target, mode), expected.float())


@pytest.mark.parametrize("size", [(20, 31), (64, 64), (71, 90)])
def test_dinov2_gives_the_class_token_of_transformers_with_its_processor(dinov2, size):
    batch = images(3, 3, *size)
    pixels = BitImageProcessorPil(**PROCESSOR)(pillow(batch), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = AutoModel.from_pretrained(dinov2).eval()(pixel_values=pixels).pooler_output
    made = Dinov2(dinov2, fit="processor", batch_size=2)

    assert_close(made.prepare(batch), pixels, absolute=1e-6)
    assert_close(made.extract(batch)["features"], expected, absolute=SAME)
    assert made.widths == {"features": 16}


@pytest.mark.parametrize("size", [(20, 31), (56, 56), (71, 90)])
def test_the_square_fit_resizes_the_whole_image(dinov2, size):
    batch = images(2, 3, *size)
    whole = PROCESSOR | {"size": {"height": 56, "width": 56}, "do_center_crop": False}
    expected = BitImageProcessorPil(**whole)(pillow(batch), return_tensors="pt")["pixel_values"]

    assert_close(Dinov2(dinov2).prepare(batch), expected, absolute=1e-6)


def test_the_plain_square_fit_neither_rounds_nor_averages(dinov2):
    batch = images(1, 3, 80, 90)
    expected = torch.nn.functional.interpolate(batch.double(), (56, 56), mode="bicubic")
    mean, std = (
        torch.tensor(IMAGENET[key], dtype=torch.float64)[:, None, None]
        for key in ("image_mean", "image_std")
    )

    assert_close(
        Dinov2(dinov2, fit="square_plain").prepare(batch),
        (expected / 255 - mean) / std,
        absolute=1e-4,
    )


def test_grey_images_are_repeated(dinov2):
    grey = images(2, 1, 30, 30)

    assert_close(
        Dinov2(dinov2).extract(grey)["features"],
        Dinov2(dinov2).extract(grey.repeat(1, 3, 1, 1))["features"],
        absolute=SAME,
    )


def test_rows_do_not_depend_on_the_batch(dinov2, clip):
    batch = images(5, 3, 30, 40)
    for build, folder in ((Dinov2, dinov2), (CLIP, clip)):
        together, apart = (
            build(folder, batch_size=n).extract(x)["features"]
            for n, x in ((5, batch), (2, batch.flip(0)))
        )
        assert_close(apart.flip(0), together, absolute=SAME)
        assert build(folder).extract(batch[:0])["features"].shape == (0, together.shape[1])


@pytest.mark.parametrize("size", [(20, 31), (56, 56), (71, 90)])
def test_clip_gives_the_image_features_of_transformers_with_its_processor(clip, size):
    batch = images(3, 3, *size)
    pixels = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size=56, **IMAGENET)(
        pillow(batch), return_tensors="pt"
    )["pixel_values"]
    model = CLIPModel.from_pretrained(clip).eval()
    with torch.no_grad():
        expected = model.get_image_features(pixel_values=pixels)
    expected = getattr(expected, "pooler_output", expected)  # a tensor before transformers 5
    made = CLIP(clip)

    assert_close(made.prepare(batch), pixels, absolute=1e-6)
    assert_close(made.extract(batch)["features"], expected, absolute=SAME)
    assert made.widths == {"features": 8}


def test_clip_text_is_that_of_transformers_for_each_caption_alone(clip):
    model, tokenizer = CLIPModel.from_pretrained(clip).eval(), CLIPTokenizer.from_pretrained(clip)
    made = CLIP(clip, batch_size=2).text(CAPTIONS)

    assert made.shape == (3, 8)
    for caption, row in zip(CAPTIONS, made, strict=True):
        with torch.no_grad():
            expected = model.get_text_features(
                **tokenizer([caption], truncation=True, max_length=12, return_tensors="pt")
            )
        assert_close(row, getattr(expected, "pooler_output", expected)[0], absolute=SAME)
    assert (made[0] - made[1]).abs().max() > 1e-3
    assert CLIP(clip).text([]).shape == (0, 8)


def test_image_and_text_share_the_space_that_the_models_logits_compare(clip):
    batch = images(2, 3, 56, 56)
    made = CLIP(clip)
    image, text = (
        torch.nn.functional.normalize(rows, dim=1)
        for rows in (made.extract(batch)["features"], made.text(CAPTIONS))
    )
    tokens = CLIPTokenizer.from_pretrained(clip)(
        CAPTIONS, padding="max_length", truncation=True, max_length=12, return_tensors="pt"
    )
    model = CLIPModel.from_pretrained(clip).eval()
    with torch.no_grad():
        logits = model(pixel_values=made.prepare(batch), **tokens).logits_per_image

    assert_close(image @ text.T * model.logit_scale.exp(), logits, absolute=1e-3)


def test_the_protocol_is_json_and_tells_weights_and_fits_apart(dinov2, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(dinov2, other)
    torch.manual_seed(1)
    Dinov2Model(
        Dinov2Config(**SMALL | {"mlp_ratio": 2}, image_size=70, patch_size=14)
    ).save_pretrained(other)
    made = [
        Dinov2(dinov2, fit=fit).protocol() for fit in ("processor", "square", "square_plain")
    ] + [Dinov2(str(other)).protocol()]

    assert json.loads(json.dumps(made)) == made
    assert len({json.dumps(protocol) for protocol in made}) == 4
    assert dinov2 not in json.dumps(made)
    assert made[0]["prepared"]["mean"] == IMAGENET["image_mean"]
    assert made[0]["prepared"]["short"] == 64
    assert made[0]["prepared"]["size"] == [56, 56]


def test_recipes_build_them(dinov2, clip):
    for name, folder in (("dinov2", dinov2), ("clip", clip)):
        part = FEATURES.parse({"type": name, "model": folder, "batch_size": 3}, "features")
        built = part.build(device=torch.device("cpu"), shape=(3, 8, 8))
        assert built.gives == ({"text"} if name == "clip" else set())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", "has no config.json; it has"),
        ("model.safetensors", "has no model.safetensors or .*pytorch_model.bin"),
        ("preprocessor_config.json", "has no preprocessor_config.json or"),
    ],
)
def test_a_folder_that_lacks_a_file_is_named(dinov2, tmp_path, name, message):
    folder = tmp_path / "model"
    shutil.copytree(dinov2, folder)
    (folder / name).unlink()

    with pytest.raises(InputError, match=rf"features 'dinov2': {re.escape(str(folder))} {message}"):
        Dinov2(str(folder))


def test_a_path_that_is_no_folder_is_named(tmp_path):
    with pytest.raises(
        InputError,
        match=rf"{re.escape(str(tmp_path / 'none'))} is not a folder. Give the folder of a saved",
    ):
        Dinov2(str(tmp_path / "none"))


def test_a_name_that_cannot_be_fetched_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr("transformers.utils.hub.is_offline_mode", lambda: True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    with pytest.raises(
        InputError,
        match=r"'clip': nobody/nothing: neither a folder here nor .*hf download nobody/nothing",
    ):
        CLIP("nobody/nothing")


def test_another_model_is_refused(dinov2):
    with pytest.raises(InputError, match=r"config.json says model_type 'dinov2', expected 'clip'"):
        CLIP(dinov2)


def test_damaged_weights_are_named(dinov2, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(dinov2, folder)
    (folder / "model.safetensors").write_bytes(b"damaged")

    with pytest.raises(InputError, match=rf"{re.escape(str(folder))}: transformers cannot load it"):
        Dinov2(str(folder))


def test_weights_that_lack_a_tensor_are_named(dinov2, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(dinov2, folder)
    state = load_file(folder / "model.safetensors")
    save_file(
        {name: value for name, value in state.items() if name != "layernorm.weight"},
        folder / "model.safetensors",
        {"format": "pt"},
    )

    with pytest.raises(
        InputError, match=r"its weights lack 1 tensors of the network, such as layernorm.weight"
    ):
        Dinov2(str(folder))


def test_a_folder_without_a_tokenizer_is_named_when_text_is_asked_for(clip, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(clip, folder)
    for name in (
        "tokenizer.json",
        "vocab.json",
        "merges.txt",
        "tokenizer_config.json",
        "special_tokens_map.json",
    ):
        (folder / name).unlink(missing_ok=True)

    assert CLIP(str(folder)).extract(images(1, 3, 56, 56))["features"].shape == (1, 8)
    with pytest.raises(
        InputError,
        match=rf"{re.escape(str(folder))} has no tokenizer. Copy there the published token",
    ):
        CLIP(str(folder)).text(["a cat"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_mean": None}, "lacks image_mean"),
        ({"do_normalize": False}, "do_normalize: false"),
        ({"resample": 1}, "resample: 1"),
        ({"size": {"longest_edge": 3}}, "size of"),
        ({"size": {"shortest_edge": 40}}, "shorter side to 40"),
        ({"do_center_crop": False}, "does not crop"),
        ({"size": {"height": 64, "width": 64}}, "resizes to"),
    ],
)
def test_processors_that_are_not_known_are_refused(change, message):
    config = {key: value for key, value in (PROCESSOR | change).items() if value is not None}

    with pytest.raises(InputError, match=f"here: .*{message}"):
        preprocessing_of(config, "processor", "here")


def test_a_processors_file_of_a_whole_processor_is_read():
    assert preprocessing_of({"image_processor": PROCESSOR}, "square", "here") == preprocessing_of(
        PROCESSOR, "square", "here"
    )
