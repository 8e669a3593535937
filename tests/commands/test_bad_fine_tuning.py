"""Wrong recipes of fine-tuning: one message, code 2, and nothing written.

Where it is possible, no weights are read for the message.
"""

import shutil
from typing import Any

import pytest
from helpers.commands import command, refused
from helpers.fine_tuning import photos, recipe
from helpers.runs import tiny

from difftrain.data.captions import Captions
from difftrain.data.datasets.image_folder import ImageFolder
from difftrain.models.pipelines import truncation
from difftrain.models.pipelines.pretrained import PretrainedPipeline
from difftrain.models.slots import MODELS

pytestmark = pytest.mark.usefixtures("without_report")

FLOW = "{type: flow_euler, steps: 2}"
CASES: list[tuple[list[str], list[str]]] = [
    # captions and prompts
    (
        ["data.captions=none"],
        [
            (
                "0.png has no caption, and the model is trained on text. Say where captions "
                "are (captions: sidecar or meta"
            )
        ],
    ),
    (
        ["label_dropout=0.1"],
        ["label_dropout: the model takes prompts, not classes. Write captions: {dropout: 0.1}."],
    ),
    (
        ["sampling.prompts=[]"],
        ["sampling.prompts: the list is empty. Write some prompts, or leave the key out"],
    ),
    # model
    (
        ["model.type=flux"],
        ["is a StableDiffusionPipeline, and model.type flux trains a FluxPipeline."],
    ),
    (
        ["model.path=./nowhere"],
        [
            (
                "model.path: there is no folder './nowhere'. Write a diffusers pipeline's "
                "folder, or a hub id such as"
            )
        ],
    ),
    (["model={type: stable_diffusion}"], ["model.path: required"]),
    (["schedule=linear"], ["schedule: the pretrained pipeline states its own. Leave the key out"]),
    (
        ["parameterization=sample"],
        ["parameterization: sample, but the pretrained pipeline states epsilon. Leave the"],
    ),
    (
        [f"sampling.sampler={FLOW}"],
        [
            (
                "sampling.sampler: flow_euler does not integrate a diffusion schedule. Write "
                "sampler: {type: ddim}"
            )
        ],
    ),
    (
        ["objective.variance=learned_range"],
        ["objective.variance: the pipelines' denoisers predict no variance. Write variance:"],
    ),
    # adapter
    (
        ["adapter.targets=[to_x]"],
        [
            (
                "adapter.targets: 'to_x' matches no layer of this UNet2DConditionModel. Its "
                "layers: to_q (8), to_k (8), to_v (8), to_out.0 (8), "
            )
        ],
    ),
    (
        ["adapter.targets=atention"],
        ["adapter.targets: unknown preset 'atention' (did you mean 'attention'?)"],
    ),
    (
        ["adapter.text_encoders=true", "adapter.text_targets=[to_q]"],
        ["adapter.text_targets: 'to_q' matches no layer of this CLIPText"],
    ),
    (
        ["adapter.text_targets=[q_proj]"],
        ["adapter.text_targets: has no effect without text_encoders: true. Add that, or leave"],
    ),
    (
        ["adapter.rank=9"],
        [
            "adapter.rank: 9 is above 8, the largest rank of layer down_blocks.0.attentions.0.",
            " of the unet. Write at most 8",
        ],
    ),
    (["adapter.rank=0"], ["adapter.rank: expected greater than or equal to 1, got 0"]),
    (
        ["adapter={type: named, patterns: []}"],
        ["adapter.patterns: an empty list trains nothing. Write patterns such as"],
    ),
    (
        ["adapter={type: named, patterns: ['*.attn9.*']}"],
        ["adapter.patterns: '*.attn9.*' matches none of the 208 weights. Their names"],
    ),
    # sizes
    (
        ["transform.resolution=17"],
        [
            (
                "transform.resolution: 17, but stable_diffusion takes multiples of 2 pixels. "
                "Write resolution: 16"
            )
        ],
    ),
    (
        ["transform.channels=1"],
        ["transform.channels: 1, but the pipeline's images have 3"],
    ),
    (
        ["buckets={step: 3}"],
        ["buckets.step: 3, but stable_diffusion takes multiples of 2 pixels. Write step: 4."],
    ),
    # prior and cache
    (
        ["prior={num: 2}"],
        ["prior: the model takes prompts. Write prompts: [a photo of a dog], and no labels."],
    ),
    (["prior={num: 2, prompts: []}"], ["prior: the model takes prompts."]),
    (
        ["prior={num: 2, prompts: [a dog], labels: [0]}"],
        ["prior: the model takes prompts. Write prompts: [a photo of a dog], and no"],
    ),
    (
        ["prior={num: 2, prompts: [a dog, ' ']}"],
        [
            (
                "prior.prompts: one of them is empty, and the samples are trained on under their "
                "prompts."
            )
        ],
    ),
    (
        ["prior={num: 0, prompts: [a dog]}"],
        ["prior.num: expected greater than or equal to 1, got 0"],
    ),
    (
        ["cache={folder: made}", "transform.crop=random"],
        [
            "cache: with transform.crop: random and flip: false every sample looks "
            "different, but one variant of each image is cached. Write "
            "cache: {variants: 4}, or crop: center and flip: false."
        ],
    ),
    (
        ["cache={folder: recipe.yaml}"],
        [
            "cache.folder: 'recipe.yaml' cannot be a folder, because ",
            "/recipe.yaml is a file. Write the path",
        ],
    ),
    (
        ["cache={folder: recipe.yaml/below}"],
        ["cache.folder: 'recipe.yaml/below' cannot be a folder, because "],
    ),
    (
        ["captions={shuffle_tags: true, variants: 4}"],
        ["captions.variants: 4 has no effect without cached text, because each sample"],
    ),
    (
        ["cache={folder: made, latents: false, text: false}"],
        ["cache: with latents: false and text: false there is nothing to cache."],
    ),
    (
        ["cache={folder: made, latents: false}", "adapter.text_encoders=true"],
        [
            (
                "cache: there is nothing to cache: no encoder makes latents, and no frozen "
                "text encoder reads captions. Leave cache out."
            )
        ],
    ),
]


@pytest.fixture
def no_weights(monkeypatch):
    """Make it an error to load the denoiser or a text encoder.

    Configs, tokenizers and the VAE may be read.
    """

    def load(self: PretrainedPipeline, component: str, *given: Any, **more: Any) -> Any:
        assert component == "vae", f"{component} was loaded"
        return real(self, component, *given, **more)

    real = PretrainedPipeline.load
    monkeypatch.setattr(PretrainedPipeline, "load", load)


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("overrides", "expected"),
    CASES,
    ids=lambda value: value[0][:60] if isinstance(value, list) else None,
)
def test_it_is_refused_before_weights_are_read(
    pipelines, tmp_path, monkeypatch, overrides, expected
):
    monkeypatch.chdir(tmp_path)

    message = refused(
        "train", recipe(tmp_path, "stable_diffusion", pipelines("stable_diffusion")), *overrides
    )

    assert refused("check", tmp_path / "recipe.yaml", *overrides) == message
    for part in expected:
        assert part in message
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "made").exists()


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            None,
            "1 of 8 images have no caption file; {photos}/3.png needs {photos}/3.txt. "
            "Write the missing ones, or move such images "
            "away. A model that takes no prompts needs no captions (captions: none).",
        ),
        (
            " \n",
            (
                "the caption of {photos}/3.png is empty. Write one, or remove the image. To "
                "drop captions at random, write captions: {{dropout: 0.1}}."
            ),
        ),
    ],
)
def test_captions_that_are_not_there_are_refused(pipelines, tmp_path, text, expected):
    file = photos(tmp_path / "photos") / "3.txt"
    file.unlink() if text is None else file.write_text(text)

    message = refused("train", recipe(tmp_path, "stable_diffusion", pipelines("stable_diffusion")))

    assert expected.format(photos=tmp_path / "photos") in message
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("text", "captions", "expected"),
    [
        (
            None,
            "sidecar",
            (
                "1 of 6 images have no caption file; {held_out}/3.png needs {held_out}/3.txt. "
                "Write the missing ones"
            ),
        ),
        (
            "\ufeff",
            "sidecar",
            (
                "the caption of {held_out}/3.png (validation.data) is empty. Write one, or "
                "remove the image"
            ),
        ),
        (
            "a cat",
            "none",
            "{held_out}/0.png (validation.data) has no caption, and the model is trained on text.",
        ),
    ],
)
@pytest.mark.parametrize("name", ["train", "check"])
def test_held_out_images_need_captions_too(pipelines, tmp_path, name, text, captions, expected):
    held_out = photos(tmp_path / "held_out", 6)
    (held_out / "3.txt").unlink() if text is None else (held_out / "3.txt").write_text(
        text, encoding="utf-8"
    )
    validation = {
        "data": {"type": "image_folder", "path": str(held_out), "captions": captions},
        "every": 1,
    }

    message = refused(
        name,
        recipe(tmp_path, "stable_diffusion", pipelines("stable_diffusion"), validation=validation),
    )

    assert expected.format(held_out=held_out) in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["train", "check"])
def test_held_out_images_that_are_not_there_are_refused(tmp_path, name):
    validation = {"data": {"type": "image_folder", "path": str(tmp_path / "nowhere")}, "every": 1}

    assert "nowhere' does not exist" in refused(name, tiny(tmp_path, validation=validation))


def test_a_folder_that_is_not_here_may_be_meant_where_a_hub_id_is_read(
    pipelines, tmp_path, monkeypatch
):
    def unreachable(*given: Any, **more: Any) -> str:
        raise OSError("no connection.")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)

    message = refused(
        "check",
        recipe(tmp_path, "stable_diffusion", pipelines("stable_diffusion")),
        "model.path=runs/cifar_start",
    )

    assert (
        "model.path: 'runs/cifar_start' is not a local folder, and model_index.json of this "
        "repository of the hub is neither in the local cache"
    ) in message
    assert "nor can it be downloaded: no connection." in message


@pytest.mark.usefixtures("no_weights")
def test_a_vae_of_another_kind_is_refused(pipelines, tmp_path):
    encoder = {"type": "vae", "path": str(pipelines("flux") / "vae")}

    message = refused(
        "train",
        recipe(tmp_path, "stable_diffusion", pipelines("stable_diffusion"), encoder=encoder),
    )

    assert (
        "encoder: it makes latents of 16x8x8, but the pipeline's denoiser takes 4x8x8. "
        "Leave encoder out, or write the path"
    ) in message


@pytest.mark.usefixtures("no_weights")
def test_weights_that_are_not_read_cannot_train_alone(pipelines, tmp_path):
    """Of the first text encoder of SDXL the last layer has no part in the conditioning."""
    adapter = {
        "type": "named",
        "patterns": ["text_encoder.*final_layer_norm.weight"],
        "text_encoders": True,
    }

    message = refused(
        "train",
        recipe(tmp_path, "stable_diffusion_xl", pipelines("stable_diffusion_xl"), adapter=adapter),
    )

    assert "adapter: the selected weights never receive a gradient" in message
    assert not (tmp_path / "run").exists()


def test_weights_of_a_file_that_is_cut_short_are_refused(pipelines, tmp_path):
    base = shutil.copytree(pipelines("stable_diffusion"), tmp_path / "base")
    weights = base / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])

    assert "is cut short or no .safetensors file" in refused(
        "train", recipe(tmp_path, "stable_diffusion", base)
    )


# Models of classes


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    """One step of a model of the digits' classes, and its network's folder."""
    folder = tmp_path_factory.mktemp("digits")
    command("train", tiny(folder, training__steps=1))
    return folder / "run"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["captions={dropout: 0.1}"],
            (
                "captions: the model unet2d takes no prompts, so this has no effect. Leave it "
                "out, or write model:"
            ),
        ),
        (
            ["sampling.prompts=[a dog]"],
            "sampling.prompts: the model unet2d takes no prompts, so this has no effect.",
        ),
        (
            ["buckets={step: 8}"],
            (
                "buckets: the model unet2d takes images of one size. Leave buckets out, or "
                "write a text-to-image model."
            ),
        ),
        (["cache={folder: made}"], "cache: there is nothing to cache: no encoder makes latents"),
        (
            ["prior={num: 2}"],
            (
                "prior: it trains on samples of a pretrained model, but this model is "
                "randomly initialized. Leave prior out"
            ),
        ),
        (
            ["adapter={type: lora, targets: attention}"],
            (
                "adapter: a LoRA file needs the model that it was trained on, but this model "
                "is randomly initialized. Leave adapter out, or"
            ),
        ),
        (
            ["model={type: unet2d, path: BASE}", "prior={num: 2, prompts: [a dog]}"],
            "prior.prompts: the model takes no prompts. Write",
        ),
        (
            ["model={type: unet2d, path: BASE}", "prior={num: 2, labels: [9, 10]}"],
            "prior.labels: 10 is not a class of the model. Write labels from 0 to",
        ),
        (
            ["model={type: unet2d, path: BASE}", "adapter={type: full, text_encoders: true}"],
            (
                "adapter.text_encoders: this UNet2DModel comes without text encoders to train. "
                "Leave it out."
            ),
        ),
    ],
    ids=lambda value: value[-1][:60] if isinstance(value, list) else None,
)
def test_settings_of_prompts_are_refused_by_a_model_of_classes(
    digits_run, tmp_path, overrides, expected
):
    overrides = [
        override.replace("BASE", str(digits_run / "pipeline" / "unet")) for override in overrides
    ]

    assert expected in refused("train", tiny(tmp_path), *overrides)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (
            ["--prompt", "a cat"],
            "--prompt 'a cat': the model unet2d takes no prompts. Leave --prompt out.",
        ),
        (
            ["--lora-scale", "0.5"],
            "--lora-scale 0.5: the run did not train a LoRA. Leave --lora-scale out.",
        ),
        (
            ["--lora", "no.safetensors:0.5"],
            "--lora no.safetensors:0.5: there is no file or folder 'no.safetensors'. Write FILE",
        ),
    ],
)
def test_prompts_and_loras_that_a_run_of_classes_has_not_are_refused(
    digits_run, tmp_path, asked, expected
):
    assert expected in refused(
        "sample", digits_run, "--num", "1", "--out", tmp_path / "out", *asked
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command_name", ["evaluate", "diagnose"])
def test_a_run_without_a_lora_has_no_scale_of_it(digits_run, command_name):
    expected = "--lora-scale 0.5: the run did not train a LoRA. Leave --lora-scale out."

    assert expected in refused(command_name, digits_run, "--lora-scale", "0.5")


# Finished runs


@pytest.fixture(scope="module")
def lora_run(pipelines, tmp_path_factory):
    """The recipe of a LoRA that has been trained for two steps."""
    file = recipe(
        tmp_path_factory.mktemp("lora"), "stable_diffusion", pipelines("stable_diffusion")
    )
    command("train", file)
    return file


def test_a_lora_of_another_model_is_refused(lora_run, pipelines, tmp_path):
    command("train", recipe(tmp_path, "flux", pipelines("flux")))
    other, broken = (
        tmp_path / "run" / "lora" / "pytorch_lora_weights.safetensors",
        tmp_path / "broken.safetensors",
    )
    broken.write_bytes(b"no tensors at all")
    given = ["sample", lora_run.parent / "run", "--num", "1", "--out", tmp_path / "out", "--lora"]

    assert (
        "but this UNet2DConditionModel comes with unet, text_encoder alone. Use a LoRA of this kind"
    ) in refused(*given, other)
    assert f"lora: '{broken}' is not a safetensors file" in refused(*given, broken)
    assert "--label 3: the model takes no class labels." in refused(*given[:-1], "--label", "3")


@pytest.mark.parametrize("change", ["adapter.rank=1", "adapter.targets=attention_mlp", "adapter="])
def test_another_adapter_cannot_go_on_with_the_weights_of_the_first(lora_run, change):
    run = lora_run.parent / "run"
    before = (run / "checkpoints" / "step-0000002" / "model.safetensors").read_bytes()

    assert "was trained with another recipe:" in refused("train", lora_run, change)
    message = refused("train", lora_run, change, "training.steps=3", "--accept-changes")

    assert "step-0000002 cannot be resumed: " in message
    assert "that it was trained with, start in a new folder (--fresh)" in message
    assert (run / "checkpoints" / "step-0000002" / "model.safetensors").read_bytes() == before
    (run / "recipe.yaml").write_text(
        (run / "checkpoints" / "step-0000002" / "recipe.yaml").read_text()
    )


# What is shown and no error


def about_text(output: str) -> list[str]:
    """Return the lines of a command that are about captions and prompts."""
    return [line for line in output.splitlines() if line.startswith("text: ")]


@pytest.mark.parametrize("text", ["encoded", "cached", "trained"])
@pytest.mark.parametrize("family", ["stable_diffusion", "flux"])
def test_captions_that_are_cut_off_are_counted_and_shown_once(pipelines, tmp_path, family, text):
    """A tokenizer of single letters reads 77 of them, two being marks of its own."""
    data = photos(tmp_path / "photos")
    for i in (2, 5):
        (data / f"{i}.txt").write_text("x" * 100)
    (data / "6.txt").write_text("y" * 75)
    model = {
        "type": family,
        "path": str(pipelines(family)),
        **({"max_tokens": 90} if family == "flux" else {}),
    }
    file = recipe(
        tmp_path,
        family,
        pipelines(family),
        model=model,
        adapter={"type": "lora", "rank": 2, "text_encoders": text == "trained"},
        captions={"dropout": 0.5},
        **({"cache": {"folder": str(tmp_path / "cache")}} if text == "cached" else {}),
    )

    said = about_text(command("train", file).out)

    reader = (
        "90 tokens that the text_encoder_2"
        if family == "flux"
        else "77 tokens that the text_encoder"
    )
    counted = (
        f"text: 2 of 8 captions are longer than the {reader} reads; the rest of them is not seen"
    )
    assert [line for line in said if "longer" in line] == [counted]


def test_captions_that_fit_are_not_mentioned(pipelines, tmp_path):
    file = recipe(
        tmp_path,
        "stable_diffusion",
        pipelines("stable_diffusion"),
        training={"steps": 1, "batch_size": 4, "num_sampled": 0},
    )

    assert about_text(command("train", file).out) == []


def test_of_very_many_captions_some_evenly_spread_are_looked_at(pipelines, tmp_path, monkeypatch):
    data = photos(tmp_path / "photos", 9)
    for i in (0, 1, 6):
        (data / f"{i}.txt").write_text("x" * 70)
    monkeypatch.setattr(truncation, "MOST", 4)  # every third
    monkeypatch.setattr(truncation, "AT_ONCE", 2)
    tokenize = tokenizer_of(pipelines, "stable_diffusion")
    folder = ImageFolder(str(data), captions="sidecar")

    assert truncation.truncated_captions(folder, Captions(), tokenize) is None
    in_template = truncation.truncated_captions(
        folder, Captions(templates=["a photo of {}"]), tokenize
    )
    assert in_template is not None
    assert in_template.startswith("2 of 3 captions looked at are longer than the 77 tokens")


def tokenizer_of(pipelines: Any, family: str, **arguments: Any) -> Any:
    return (
        MODELS.parse({"type": family, "path": str(pipelines(family)), **arguments}, "model")
        .build()
        .tokenizer
    )


@pytest.mark.parametrize(
    ("family", "max_tokens", "expected"),
    [
        (
            "stable_diffusion_xl",
            None,
            "2 of 3 texts are longer than the 77 tokens that the text_encoder and the "
            "text_encoder_2 read; the rest "
            "of them is not seen",
        ),
        (
            "stable_diffusion_3",
            256,
            "2 of 3 texts are longer than the 77 tokens that the text_encoder and the "
            "text_encoder_2 read; the "
            "text_encoder_3 reads up to 256 and cuts none",
        ),
        (
            "stable_diffusion_3",
            110,
            (
                "2 of 3 texts are longer than the 77 tokens that the text_encoder and the "
                "text_encoder_2 read, 1 of 3 "
                "texts is longer than the 110 tokens that the text_encoder_3 reads; what lies "
                "beyond all of these is not seen"
            ),
        ),
        ("flux", 256, None),
        (
            "flux",
            110,
            (
                "1 of 3 texts is longer than the 110 tokens that the text_encoder_2 reads; the "
                "rest of them is not seen"
            ),
        ),
    ],
)
def test_a_sentence_says_what_each_encoder_cuts_and_which_one_reads_on(
    pipelines, family, max_tokens, expected
):
    """A transformer of FLUX attends to T5's words alone."""
    tokenize = tokenizer_of(
        pipelines, family, **({} if max_tokens is None else {"max_tokens": max_tokens})
    )

    assert truncation.truncated(["x" * 100, "x" * 120, "a cat"], tokenize, "texts") == expected


def test_prompts_and_held_out_captions_that_are_cut_off_are_shown_by_their_key(pipelines, tmp_path):
    held_out = photos(tmp_path / "held_out", 6)
    (held_out / "3.txt").write_text("x" * 100)
    blocks = {
        "validation": {
            "data": {"type": "image_folder", "path": str(held_out), "captions": "sidecar"},
            "every": 1,
            "num_timesteps": 1,
        },
        "prior": {"num": 1, "prompts": ["y" * 80]},
        "training": {"steps": 1, "batch_size": 4, "num_sampled": 0},
        "sampling": {"sampler": {"type": "ddim", "steps": 1}, "prompts": ["a cat", "z" * 80]},
    }
    file = recipe(tmp_path, "stable_diffusion", pipelines("stable_diffusion"), **blocks)

    counted = [
        "1 of 2 sampling.prompts is",
        "1 of 1 prior.prompts is",
        "1 of 6 captions of validation.data is",
    ]
    assert [line.partition(" longer")[0] for line in about_text(command("train", file).out)] == [
        f"text: {what}" for what in counted
    ]
