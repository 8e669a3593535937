"""Videos that lost their end in a copy: what is left is used, and what is missing is said."""

import shutil

import numpy as np
import PIL.Image
import pytest
from helpers.commands import command, noise_frames, refused, video
from helpers.runs import CLIPS, lines, tiny

from difftrain.core.errors import InputError
from difftrain.data.datasets.video_ends import is_cut, stated_seconds
from difftrain.data.datasets.video_file import video_file
from difftrain.data.datasets.video_folder import VideoFolder

av = pytest.importorskip("av", reason="an extra: pip install .[video]")
FRAMES = noise_frames(40)


def with_its_table_first(folder, file, **more):
    """Write a video whose table of frames stands before them, as on the web."""
    whole = video(folder / f"plain{file.suffix}", FRAMES, **more)
    with av.open(str(whole)) as given:
        options = {"movflags": "faststart"} if file.suffix in (".mp4", ".mov") else {}
        with av.open(str(file), "w", options=options) as made:
            stream = made.add_stream_from_template(given.streams.video[0])
            for packet in given.demux(video=0):
                if packet.dts is not None:
                    packet.stream = stream
                    made.mux(packet)
    whole.unlink()
    return file


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """One file of each format by its ending, with 40 frames."""
    folder = tmp_path_factory.mktemp("clips")
    made = {
        ending: with_its_table_first(folder, folder / f"a{ending}") for ending in (".mp4", ".mov")
    }
    for ending in (".mkv", ".webm", ".avi"):
        made[ending] = video(folder / f"a{ending}", FRAMES)
    images = [PIL.Image.fromarray(frame) for frame in FRAMES]
    images[0].save(folder / "a.gif", save_all=True, append_images=images[1:], duration=40)
    return {**made, ".gif": folder / "a.gif"}


ENDINGS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif")
LOSSLESS = (".mp4", ".mov", ".mkv", ".avi")  # of any pixels


def cut(file, folder, share):
    """Write the first share of a file's bytes."""
    content = file.read_bytes()
    (folder / f"half{file.suffix}").write_bytes(content[: int(len(content) * share)])
    return folder / f"half{file.suffix}"


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_whole_video_has_lost_nothing(clips, ending):
    file = video_file(clips[ending])

    assert (len(file), file.cut_short, is_cut(clips[ending])) == (40, "", False)


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("share", [0.6, 0.8])
def test_half_a_video_says_how_many_frames_are_left_and_gives_all_of_them(
    clips, tmp_path, ending, share
):
    file = video_file(cut(clips[ending], tmp_path, share))

    num = len(file)
    rest = {
        ".mkv": "of about 40 frames",
        ".webm": "of about 40 frames",
        ".gif": "frames, and no end",
    }
    assert file.cut_short == f"{num} {rest.get(ending, 'of 40 frames')}"
    assert 8 < num < 36
    frames = np.stack([np.asarray(frame) for frame in file.frames(0, num, 1)])
    [last] = file.frames(num - 1, 1, 1)
    assert np.array_equal(np.asarray(last), frames[-1])
    if ending in LOSSLESS:
        assert np.array_equal(frames, FRAMES[:num])


def test_frames_that_are_stored_in_another_order_are_all_there(tmp_path):
    """The decoder holds frames back when the cut packet comes."""
    whole = with_its_table_first(
        tmp_path, tmp_path / "a.mp4", qp="1", bf="3", b_strategy="0", sc_threshold="0"
    )

    file = video_file(cut(whole, tmp_path, 0.7))

    assert file.cut_short == f"{len(file)} of 40 frames"
    assert len(file.frames(0, len(file), 1)) == len(file)


def test_a_file_that_lost_nothing_but_its_index_is_whole(clips, tmp_path):
    for ending in (".mkv", ".webm", ".avi"):
        content = clips[ending].read_bytes()
        (tmp_path / f"a{ending}").write_bytes(content[:-20])

        assert video_file(tmp_path / f"a{ending}").cut_short == ""


@pytest.mark.parametrize("more", [b"\0", b"\0" * 100, b"a comment behind the video"])
def test_bytes_behind_a_video_take_nothing_away(clips, tmp_path, more):
    for ending in ENDINGS:
        (tmp_path / f"a{ending}").write_bytes(clips[ending].read_bytes() + more)

        assert not is_cut(tmp_path / f"a{ending}")


def test_a_file_of_no_known_format_counts_as_whole(tmp_path):
    for content in (b"", b"GIF89a", b"RIFF", b"\x1a\x45\xdf\xa3", b"no video at all", b"\0" * 64):
        (tmp_path / "a").write_bytes(content)

        assert is_cut(tmp_path / "a") == (content == b"GIF89a")


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_set_of_one_half_video_is_an_error(clips, tmp_path, ending):
    half = cut(clips[ending], tmp_path, 0.6)

    with pytest.raises(InputError) as refusal:
        VideoFolder(str(tmp_path), num_frames=2)

    left = video_file(half).cut_short
    assert str(refusal.value) == (
        f"video_folder: {half}, the only video, is cut short: {left}. Copy it again from where it "
        "came from."
    )


def test_a_set_of_halves_alone_is_an_error(clips, tmp_path):
    for ending in (".mp4", ".mkv"):
        cut(clips[ending], tmp_path, 0.6)

    with pytest.raises(InputError, match=r"half\.mkv, like every video here, is cut short: "):
        VideoFolder(str(tmp_path), num_frames=2)


def test_half_a_video_beside_whole_ones_is_used_and_named(clips, tmp_path):
    half = cut(clips[".mp4"], tmp_path, 0.6)
    shutil.copy(clips[".mkv"], tmp_path / "whole.mkv")
    (tmp_path / "a.wmv").write_bytes(b"")
    num = len(video_file(half))

    data = VideoFolder(str(tmp_path), num_frames=4)

    assert len(data) == num // 4 + 10
    assert data.left_out() == [
        ("a.wmv", "ending .wmv is not read"),
        ("half.mp4", f"cut short, and used up to there: {num} of 40 frames"),
    ]


@pytest.fixture
def with_a_broken_one(clips, tmp_path):
    """A folder of two videos, of which one cannot be read."""
    folder = tmp_path / "videos"
    folder.mkdir()
    shutil.copy(clips[".mkv"], folder / "whole.mkv")
    (folder / "broken.mp4").write_bytes(b"no video")
    return folder


def test_a_video_that_cannot_be_read_ends_a_run_or_is_left_out(with_a_broken_one, tmp_path):
    data = {"type": "video_folder", "path": str(with_a_broken_one), "num_frames": 3}
    transform = {"resolution": 12, "channels": 1}
    file = tiny(tmp_path, **{**CLIPS, "data": data, "transform": transform, "training__steps": 2})
    name = str(with_a_broken_one / "broken.mp4")

    for verb in ("check", "train"):
        message = refused(verb, file)
        assert f"{name} cannot be read: " in message
        assert "write loader: {on_error: skip}" in message
    table = "13 items are read, 1 is left out"
    assert table in command("check", file, "loader.on_error=skip").out
    assert table in command("train", file, "loader.on_error=skip").out
    assert [line["name"] for line in lines(tmp_path / "run" / "skipped.jsonl")] == [name]


def test_videos_of_which_none_can_be_read_are_an_error(tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"no video")

    with pytest.raises(InputError, match=r"broken.mp4 cannot be read.*No video below .* can be"):
        VideoFolder(str(tmp_path), num_frames=2)


def test_half_a_video_that_is_too_short_says_why(clips, tmp_path):
    half = cut(clips[".mp4"], tmp_path, 0.6)
    shutil.copy(clips[".mkv"], tmp_path / "whole.mkv")
    num = len(video_file(half))

    with pytest.raises(InputError, match=rf"has {num} frames \(it is cut short: {num} of 40 fra"):
        VideoFolder(str(tmp_path), num_frames=40)


@pytest.mark.parametrize(
    ("text", "seconds"), [("00:01:02.500", 62.5), ("01:00:00", 3600.0), ("", None), ("2.5", None)]
)
def test_a_stated_duration_is_seconds(text, seconds):
    assert stated_seconds(text) == seconds
