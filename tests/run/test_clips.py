"""Runs on clips, from files to samples: training resumes, samples are clips, exports load."""

import sys
from pathlib import Path

import diffusers
import numpy as np
import PIL.Image
import PIL.ImageSequence
import pytest
import torch
from helpers.commands import command, noise_frames, refused, video
from helpers.runs import (
    CLIPS,
    UNET3D,
    assert_identical,
    launched,
    lines,
    output_of,
    saved,
    tiny,
    trained,
)
from helpers.tiny_networks import vae

from difftrain.core.rng import Rng
from difftrain.data.datasets.video_file import VideoFile
from difftrain.data.opening import UnreadableImage
from difftrain.data.transform import to_uint8
from difftrain.generation.pictures import contact_sheet
from difftrain.run.checking import hub_ids
from difftrain.run.trained import TrainedRun

pytestmark = pytest.mark.usefixtures("without_report")

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Train for two steps; returns the run folder."""
    folder = tmp_path_factory.mktemp("clips")
    command(
        "train",
        tiny(
            folder,
            **CLIPS,
            training__steps=2,
            training__sample_every=1,
            ema={"type": "decay", "decay": 0.9},
        ),
    )
    return folder / "run"


def samples_of(run: Path, num: int) -> torch.Tensor:
    """Return clips 0 to num - 1 [num, C, F, H, W] as the run's own sampler makes them."""
    opened = TrainedRun(run)
    return opened.model.generator(
        opened.denoiser(opened.chosen_step(None), True, CPU)[0], list(range(num)), CPU
    )


def picture(file: Path) -> np.ndarray:
    return np.asarray(PIL.Image.open(file))


def test_a_run_leaves_contact_sheets_of_its_samples(run):
    sheets = [
        picture(run / "samples" / name)
        for name in ("step-0000001.png", "step-0000002.png", "final.png")
    ]

    assert [line["step"] for line in lines(run / "log.jsonl")] == [1, 2]
    assert not np.array_equal(sheets[0], sheets[1])
    assert np.array_equal(sheets[2], contact_sheet(samples_of(run, 2))[0])


def test_a_resumed_run_equals_the_straight_one_bit_for_bit(tmp_path):
    changes = {**CLIPS, "ema": {"type": "decay", "decay": 0.9}}
    trained(tiny(tmp_path / "straight", **changes, training__steps=4))
    trained(tiny(tmp_path / "resumed", **changes, training__steps=2))
    trained(tiny(tmp_path / "resumed", **changes, training__steps=4))

    one, other = (saved(tmp_path / name / "run") for name in ("straight", "resumed"))
    assert_identical(one, other)
    assert_identical(
        *(lines(tmp_path / name / "run" / "log.jsonl") for name in ("straight", "resumed"))
    )


# Samples


def test_sample_writes_a_video_file_a_clip_and_a_contact_sheet(run, tmp_path):
    av = pytest.importorskip("av", reason="an extra: pip install .[video]")
    shown = command("sample", run, "--num", 5, "--out", tmp_path).out

    expected = samples_of(run, 5)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *(f"00000{i}.mp4" for i in range(5)),
        "grid.png",
        "samples.json",
    ]
    assert np.array_equal(picture(tmp_path / "grid.png"), contact_sheet(expected)[0])
    assert "the first 5" in shown
    for i, clip in enumerate(expected):
        with av.open(str(tmp_path / f"00000{i}.mp4")) as container:
            frames = np.stack(
                [frame.to_ndarray(format="gray") for frame in container.decode(video=0)]
            )
        assert frames.shape == (3, 12, 12)
        assert (
            np.abs(frames.astype(int) - clip[0].numpy()).mean() < 12
        )  # limited range and small losses


def test_without_pyav_samples_are_gifs_with_every_pixel(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)

    command("sample", run, "--num", 2, "--out", tmp_path)

    for i, clip in enumerate(samples_of(run, 2)):
        with PIL.Image.open(tmp_path / f"00000{i}.gif") as gif:
            frames = np.stack(
                [np.asarray(frame.convert("L")) for frame in PIL.ImageSequence.Iterator(gif)]
            )
        assert np.array_equal(frames, clip[0])


def test_the_contact_sheet_of_many_samples_shows_as_many_frames_as_a_grid_has_images(
    run, tmp_path, monkeypatch
):
    monkeypatch.setattr("difftrain.run.sampling.GRID", 7)

    assert "the first 2" in command("sample", run, "--num", 4, "--out", tmp_path).out

    assert np.array_equal(picture(tmp_path / "grid.png"), contact_sheet(samples_of(run, 2))[0])


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_write_one_s_clips_and_the_contact_sheet_of_all_of_them(run, tmp_path):
    command("sample", run, "--num", 3, "--out", tmp_path / "one", "sampling.block_size=1")
    arguments = [
        str(run),
        "sampling.block_size=1",
        "--num-samples",
        "3",
        "--out",
        str(tmp_path / "two"),
    ]
    process = launched(["-m", "difftrain.sample", *arguments], processes=2)
    _, error = output_of(process)

    assert process.returncode == 0, error
    assert sorted(file.name for file in (tmp_path / "two").iterdir()) == sorted(
        file.name for file in (tmp_path / "one").iterdir()
    )
    assert all(
        file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
        for file in (tmp_path / "one").iterdir()
    )


def test_a_label_is_refused_where_the_model_takes_none_though_the_data_have_them(run, tmp_path):
    assert "--label 3: the model takes no class labels" in refused(
        "sample", run, "--num", 1, "--out", tmp_path, "--label", 3
    )


# What others load


def test_the_exported_unet_and_scheduler_load_by_themselves_and_draw_our_clips(run):
    unet = diffusers.UNet3DConditionModel.from_pretrained(run / "pipeline" / "unet").eval()
    scheduler = diffusers.DDIMScheduler.from_pretrained(run / "pipeline" / "scheduler")
    scheduler.set_timesteps(2)

    x = Rng(0, 0, [0, 1, 2]).normal((1, 3, 12, 12), "initial")
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(unet(x, t, torch.zeros(3, 1, 4)).sample, t, x).prev_sample

    assert sorted(path.name for path in (run / "pipeline").iterdir()) == ["scheduler", "unet"]
    assert (to_uint8(x).int() - samples_of(run, 3).int()).abs().max() <= 1


def test_check_counts_clips(run):
    shown = command("check", run / "recipe.yaml").out

    assert "898 clips of 1x3x12x12, 10 classes" in shown
    assert "2 steps of 2 clips" in shown


def test_a_folder_of_videos_is_nothing_to_fetch():
    assert hub_ids(
        {"data": {"type": "video_folder", "path": "my/videos"}, "model": {"path": "org/name"}}
    ) == ["org/name"]


# Files and latents


def test_videos_are_trained_on_latents_and_come_out_in_colour(tmp_path):
    pytest.importorskip("av", reason="an extra: pip install .[video]")
    video(tmp_path / "videos" / "a.mp4", noise_frames(12, (20, 16)))
    changes = {
        **CLIPS,
        "model": {
            "type": "unet3d_condition",
            "config": {**UNET3D, "sample_size": 6, "in_channels": 4, "out_channels": 4},
        },
        "data": {
            "type": "video_folder",
            "path": str(tmp_path / "videos"),
            "num_frames": 3,
            "frame_step": 2,
        },
        "transform": {"resolution": 12, "channels": 3, "crop": "random", "flip": True},
        "encoder": {"type": "vae", "path": str(vae(tmp_path / "vae"))},
        "loader": {"num_workers": 1},
    }
    command("train", tiny(tmp_path, **changes, training__steps=2))
    command("sample", tmp_path / "run", "--num", 1, "--out", tmp_path / "samples")

    assert samples_of(tmp_path / "run", 1).shape == (1, 3, 3, 12, 12)
    assert sorted(path.name for path in (tmp_path / "run" / "pipeline").iterdir()) == [
        "scheduler",
        "unet",
        "vae",
    ]
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [
        "000000.mp4",
        "grid.png",
        "samples.json",
    ]


def test_an_unreadable_clip_is_replaced_and_recorded(tmp_path, monkeypatch):
    pytest.importorskip("av", reason="an extra: pip install .[video]")
    file = video(tmp_path / "videos" / "a.mp4", noise_frames(9, (12, 12)))
    frames = VideoFile.frames

    def damaged(self: VideoFile, first: int, num: int, step: int) -> list[PIL.Image.Image]:
        if first == 3:
            raise UnreadableImage(f"{self.path}, frames 3 to 5", "damaged")
        return frames(self, first, num, step)

    monkeypatch.setattr(VideoFile, "frames", damaged)
    data = {"type": "video_folder", "path": str(tmp_path / "videos"), "num_frames": 3}
    changes = {**CLIPS, "data": data, "training__steps": 2}

    assert f"{file}, frames 3 to 5 cannot be read: damaged. Repair or remove it" in refused(
        "train", tiny(tmp_path / "stop", **changes)
    )
    command("train", tiny(tmp_path / "skip", **changes), "loader.on_error=skip")

    assert [record["name"] for record in lines(tmp_path / "skip" / "run" / "skipped.jsonl")] == [
        f"{file}, frames 3 to 5"
    ]
