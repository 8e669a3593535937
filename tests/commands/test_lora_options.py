"""Wrong --lora, --lora-scale and --prompt: one message, where possible before weights are read."""

import pytest
import torch
from helpers.commands import command, refused
from helpers.fine_tuning import pixels, recipe
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from difftrain.data.datasets.image_folder import ImageFolder
from difftrain.run.evaluating import Reading
from difftrain.run.trained import TrainedRun

pytestmark = pytest.mark.usefixtures("without_report")

LORA = "lora/pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def trained(pipelines, tmp_path_factory):
    """(The folder of a run that trained a LoRA, what the training said.)"""
    file = recipe(
        tmp_path_factory.mktemp("lora"), "stable_diffusion", pipelines("stable_diffusion")
    )
    return file.parent / "run", command("train", file).out


@pytest.fixture(params=["sample", "merge"])
def asking(request, trained, tmp_path):
    """A command that takes LoRAs, to which they are yet to be added."""
    return [
        request.param,
        trained[0],
        *(["--num", "1"] if request.param == "sample" else []),
        "--out",
        tmp_path / "out",
    ]


@pytest.fixture
def no_weights(monkeypatch):
    """Building the denoiser is an error here."""

    def denoiser(self: TrainedRun, *given: object) -> None:
        pytest.fail("weights were read")

    monkeypatch.setattr(TrainedRun, "denoiser", denoiser)


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--lora-scale", "nan"], "--lora-scale nan: expected a finite number, such as 0.8."),
        (["--lora-scale", "-inf"], "--lora-scale -inf: expected a finite number, such as 0.8."),
        (
            ["--lora", f"RUN/{LORA}:nan"],
            ":nan: the scale nan is not a finite number. Write "
            "RUN/lora/pytorch_lora_weights.safetensors:0.5.",
        ),
        (
            ["--lora", "RUN:inf"],
            "--lora RUN:inf: the scale inf is not a finite number. Write RUN:0.5.",
        ),
        (
            ["--lora", ""],
            "--lora '': there is no file or folder ''. Write FILE.safetensors, "
            "FILE.safetensors:0.5, or the folder of a run",
        ),
        (["--lora", ":0.5"], "--lora :0.5: there is no file or folder ''."),
        (
            ["--lora", "RUN/checkpoints"],
            "lora: there is no LoRA file at 'RUN/checkpoints'. Write the path of",
        ),
        (
            ["--lora", "RUN/loha.safetensors"],
            "lora: 'RUN/loha.safetensors' is a LoHa (it holds unet.x.hada_w1_a), and only LoRA and "
            "DoRA",
        ),
    ],
    ids=str,
)
def test_scales_and_files_are_refused_before_weights_are_read(trained, asking, given, expected):
    run = str(trained[0])
    save_file({"unet.x.hada_w1_a": torch.ones(1)}, trained[0] / "loha.safetensors")

    message = refused(*asking, *(text.replace("RUN", run) for text in given))

    assert expected.replace("RUN", run) in message


def test_files_of_which_a_part_is_missing_or_not_a_number_are_refused(trained, asking, tmp_path):
    tensors = load_file(trained[0] / LORA)
    with safe_open(trained[0] / LORA, "pt") as opened:
        header = opened.metadata()
    name = next(iter(tensors))
    nan, half = tmp_path / "nan.safetensors", tmp_path / "half.safetensors"
    save_file({**tensors, name: tensors[name] * torch.nan}, nan, header)
    save_file({key: value for key, value in tensors.items() if key != name}, half, header)

    assert f"lora: '{nan}' holds values that are not finite, first in {name}." in refused(
        *asking, "--lora", nan
    )
    assert f"it lacks 1 tensor(s), such as {name.removeprefix('unet.')}" in refused(
        *asking, "--lora", half
    )


def test_a_run_is_the_lora_that_it_trained(trained, tmp_path):
    """Taken off again by a negative scale, which leaves the base."""
    run = trained[0]
    sample = ["sample", run, "--num", "1", "--out"]
    command(*sample, tmp_path / "base", "--lora-scale", "0")
    command(*sample, tmp_path / "own")
    command(*sample, tmp_path / "off", "--lora", f"{run}:-1")

    base, own, off = (pixels(tmp_path / name / "000000.png") for name in ("base", "own", "off"))

    assert abs(own - base).max() > 1
    assert abs(off - base).max() <= 1


def test_a_prompt_that_is_cut_off_is_told_once(trained, tmp_path):
    sample = ["sample", trained[0], "--num", "4", "--out", tmp_path / "out", "--prompt", "a cat"]

    told = command(*sample, "--prompt", "a cat " * 50).out
    quiet = command(*sample, "--overwrite").out

    assert told.count("longer than") == 1
    assert (
        "text: 1 of 2 prompts is longer than the 77 tokens that the text_encoder reads; the rest "
        "of them is not seen" in told
    )
    assert "--prompt" not in quiet


def test_a_folder_of_samples_holds_their_prompts(trained, tmp_path):
    out = tmp_path / "out"
    command("sample", trained[0], "--num", "3", "--out", out, "--prompt", "a cat", "--prompt", "é")

    read = ImageFolder(str(out), captions="metadata")

    assert [caption for _, caption in read.captions()] == ["a cat", "é", "a cat"]
    assert Reading(None, "stop").images(str(out), "--generated").has_captions


def test_how_near_a_file_comes_to_the_run_is_told_in_words(trained):
    run, told = trained

    assert f"{run / 'lora'} gives the same outputs in a fresh StableDiffusionPipeline (" in told
