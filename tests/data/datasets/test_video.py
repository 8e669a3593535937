"""Video files and folders: frames of a clip, how few are decoded, the message for each mistake."""

import sys

import numpy as np
import PIL.Image
import PIL.ImageSequence
import pytest
import torch
from helpers.commands import LOSSLESS, noise_frames, video

from difftrain.core.errors import InputError
from difftrain.data.datasets.video_file import VideoFile, video_file, write_clip
from difftrain.data.datasets.video_folder import EXTENSIONS, VideoFolder
from difftrain.data.items import DATASETS
from difftrain.data.opening import UnreadableImage
from difftrain.data.transform import Transform

av = pytest.importorskip("av", reason="an extra: pip install .[video]")
FRAMES = noise_frames(35)
GREYS = [PIL.Image.new("L", (8, 6), 20 * i) for i in range(6)]


def array(frames):
    return np.stack([np.asarray(frame) for frame in frames])


def numbered(folder, name, num):
    """A video whose red channel says which frame it is."""
    frames = np.full((num, 16, 16, 3), 10, np.uint8)
    frames[..., 0] = np.arange(num)[:, None, None]
    return video(folder / name, frames)


def reds(clip):
    return [np.asarray(frame)[0, 0, 0].item() for frame in clip.frames]


# Files


@pytest.mark.parametrize("extension", LOSSLESS)
@pytest.mark.parametrize(
    ("first", "num", "step"),
    [(0, 35, 1), (0, 1, 1), (9, 3, 1), (10, 2, 1), (11, 4, 3), (23, 6, 2), (34, 1, 5)],
)
def test_frames_are_found_by_their_number(tmp_path, extension, first, num, step):
    file = video_file(video(tmp_path / f"a{extension}", FRAMES))

    assert len(file) == 35
    assert np.array_equal(array(file.frames(first, num, step)), FRAMES[first::step][:num])


def test_frames_that_are_stored_in_another_order_than_they_are_shown_in_are_found(tmp_path):
    """H.264 stores the frames that others are interpolated from first; it needs a little loss."""
    file = video_file(
        video(tmp_path / "a.mp4", FRAMES, qp="1", bf="3", b_strategy="0", sc_threshold="0")
    )
    with av.open(str(file.path)) as container:
        stored = [packet.pts for packet in container.demux(video=0) if packet.pts is not None]
    assert stored != sorted(stored)

    for first in range(32):
        assert np.abs(array(file.frames(first, 2, 3)).astype(int) - FRAMES[first::3][:2]).max() < 10


class Counted:
    """A container that counts decoded frames. Its first seek goes too far by `beyond`."""

    def __init__(self, container, beyond=0):
        self.container, self.streams, self.beyond, self.num_decoded = (
            container,
            container.streams,
            beyond,
            0,
        )

    def seek(self, time, **options):
        self.container.seek(time + self.beyond, **options)
        self.beyond = 0

    def decode(self, **options):
        for frame in self.container.decode(**options):
            self.num_decoded += 1
            yield frame


def found(file, first, beyond=0):
    with av.open(str(file.path)) as opened:
        container = Counted(opened, beyond)
        return next(file._decoded(container, first)).to_ndarray(
            format="rgb24"
        ), container.num_decoded


@pytest.mark.parametrize(("first", "most"), [(0, 1), (10, 1), (12, 3), (19, 10), (30, 1)])
def test_decoding_begins_at_the_key_frame_before(tmp_path, first, most):
    file = video_file(video(tmp_path / "a.mp4", FRAMES))

    frame, num_decoded = found(file, first)

    assert np.array_equal(frame, FRAMES[first])
    assert num_decoded <= most


def test_a_seek_that_lands_too_late_is_made_good_from_the_start(tmp_path):
    file = video_file(video(tmp_path / "a.mp4", FRAMES))

    frame, num_decoded = found(file, 15, beyond=file.times[25] - file.times[15])

    assert np.array_equal(frame, FRAMES[15])
    assert num_decoded == 1 + 16


def test_a_file_without_times_is_counted_from_its_start(tmp_path):
    untimed = VideoFile(video(tmp_path / "a.mp4", FRAMES), list(range(35)), seekable=False)

    assert np.array_equal(array(untimed.frames(12, 3, 4)), FRAMES[12:24:4])


def test_a_gif_is_read_from_its_start_since_its_frames_build_on_each_other(tmp_path):
    moving = [PIL.Image.new("L", (16, 16)) for _ in range(12)]
    for i, image in enumerate(moving):
        image.paste(255, (i, i, i + 4, i + 4))
    moving[0].save(tmp_path / "a.gif", save_all=True, append_images=moving[1:], duration=40)

    file = video_file(tmp_path / "a.gif")

    assert len(file) == 12
    assert np.array_equal(array(file.frames(7, 3, 2))[..., 0], array(moving)[7:12:2])


def test_what_shines_through_a_transparent_frame_is_white(tmp_path):
    frames = np.zeros((2, 8, 8, 4), np.uint8)
    frames[0, ..., 0] = 200  # red, and nothing of it to be seen
    frames[1, ..., 3] = 255
    with av.open(str(tmp_path / "a.mov"), "w") as container:
        stream = container.add_stream("qtrle", rate=25)
        stream.width, stream.height, stream.pix_fmt = 8, 8, "argb"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgba")))
        container.mux(stream.encode())

    pixels = VideoFolder(str(tmp_path), num_frames=2)[0].pixels(Transform(8))

    assert pixels[:, :, 0, 0].T.tolist() == [[255, 255, 255], [0, 0, 0]]


@pytest.mark.parametrize("degrees", [90, 180, -90])
def test_a_camera_that_was_turned_is_turned_back(tmp_path, degrees):
    frames = noise_frames(3, (16, 32))

    upright = video_file(video(tmp_path / "a.mp4", frames, rotation=degrees)).frames(1, 1, 1)[0]

    assert np.array_equal(
        np.asarray(upright), np.rot90(frames[1], degrees // 90)
    )  # counterclockwise, as PyAV states the angle


@pytest.mark.parametrize("size", [(16, 12), (15, 11), (3, 5)])
def test_a_written_clip_has_the_frames_that_were_given(tmp_path, size):
    """Flat colours, so that what H.264 loses is rounding; an odd side gets a black line."""
    given = [PIL.Image.new("RGB", size, (40 * i, 100, 250 - 40 * i)) for i in range(6)]

    file = write_clip(given, tmp_path / "000001")
    back = array(video_file(file).frames(0, 6, 1)).astype(int)

    width, height = (side // 2 * 2 for side in size)
    assert file == tmp_path / "000001.mp4"
    assert back.shape == (6, size[1] + size[1] % 2, size[0] + size[0] % 2, 3)
    assert np.abs(back - array(given)[:, :1, :1])[:, :height, :width].max() < 8


def test_a_written_clip_is_grey_if_its_frames_are(tmp_path):
    back = array(video_file(write_clip(GREYS, tmp_path / "a")).frames(0, 6, 1)).astype(int)

    assert np.abs(back - array(GREYS)[..., None]).max() < 4


def test_without_pyav_a_clip_is_a_gif_of_the_same_frames(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)

    file = write_clip(GREYS, tmp_path / "a")

    with PIL.Image.open(file) as gif:
        back = [np.asarray(frame.convert("L")) for frame in PIL.ImageSequence.Iterator(gif)]
    assert file == tmp_path / "a.gif"
    assert np.array_equal(back, array(GREYS))


# Folders


def test_an_index_means_one_clip_of_one_file(tmp_path):
    numbered(tmp_path, "b/long.mkv", 11)
    numbered(tmp_path, "a.mp4", 4)

    clips = DATASETS.parse(
        {"type": "video_folder", "path": str(tmp_path), "num_frames": 2, "frame_step": 2}, "data"
    ).build()

    assert len(clips) == 3
    assert [reds(clips[i]) for i in range(3)] == [
        [0, 2],
        [0, 2],
        [4, 6],
    ]  # windows of four; the last three frames of eleven are left over
    places = [("a.mp4", 0), ("b/long.mkv", 0), ("b/long.mkv", 4)]
    assert [clips[i].name for i in range(3)] == [
        f"{tmp_path / file}, frame {first}" for file, first in places
    ]
    assert [clips.name_of(i) for i in range(3)] == [clips[i].name for i in range(3)]
    assert (clips.num_frames, clips.class_names, clips[0].label) == (2, None, None)


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_every_extension_that_is_looked_for_can_be_read_in_any_case(tmp_path, extension):
    if extension == ".gif":
        GREYS[0].save(tmp_path / "a.gif", save_all=True, append_images=GREYS[1:])
        (tmp_path / "a.gif").rename(tmp_path / "a.GIF")
    else:
        video(tmp_path / f"a{extension}", FRAMES[:6]).rename(tmp_path / f"a{extension.upper()}")

    assert len(VideoFolder(str(tmp_path), num_frames=6)[0].frames) == 6


def test_the_first_folder_level_is_the_class_and_hidden_files_are_left_out(tmp_path):
    for name in ("walk/a.mp4", "run/deep/b.mp4", "walk/.hidden.mp4", ".cache/c.mp4"):
        numbered(tmp_path, name, 3)

    clips = VideoFolder(str(tmp_path), num_frames=3, labels="folders")

    assert clips.class_names == ["run", "walk"]
    assert [clips[i].label for i in range(len(clips))] == [0, 1]


# Errors


def test_a_folder_that_is_not_there_and_one_without_videos(tmp_path):
    with pytest.raises(
        InputError,
        match=r"video_folder: path 'nowhere' does not exist .* Write the folder that holds the "
        r"videos",
    ):
        VideoFolder("nowhere", num_frames=4)
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(
        InputError,
        match=r"video_folder: no video below .* Expected files ending in .avi, .gif, .mkv, .mov, "
        r".mp4, .webm",
    ):
        VideoFolder(str(tmp_path), num_frames=4)


def test_a_video_that_is_too_short_is_named(tmp_path):
    numbered(tmp_path, "long.mp4", 12)
    numbered(tmp_path, "short.mp4", 11)

    with pytest.raises(InputError) as error:
        VideoFolder(str(tmp_path), num_frames=4, frame_step=3)

    assert str(error.value) == (
        f"video_folder: {tmp_path / 'short.mp4'} has 11 frames, but a clip of num_frames 4 and "
        "frame_step 3 needs 12. "
        "Write smaller ones, or remove the file."
    )


def test_a_file_that_is_no_video_is_named(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"no video")

    with pytest.raises(
        InputError,
        match=r"video_folder: .*a.mp4 cannot be read: Invalid data found when .* Repair or remove "
        r"it",
    ):
        VideoFolder(str(tmp_path), num_frames=4)


def test_a_file_of_sound_alone_is_named(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100, layout="mono")
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
        )
        frame.sample_rate = 44100
        container.mux([*stream.encode(frame), *stream.encode()])

    with pytest.raises(
        InputError, match=r"a.mp4 cannot be read: it holds no video. Repair or remove it"
    ):
        VideoFolder(str(tmp_path), num_frames=4)


def test_frames_that_a_damaged_file_no_longer_has_are_unreadable(tmp_path):
    file = video(tmp_path / "a.mp4", FRAMES)
    promised = VideoFile(file, [*video_file(file).times, 10**9], seekable=False)

    with pytest.raises(
        UnreadableImage,
        match=r"a.mp4, frames 33 to 35 cannot be read: only 2 of 3 frames can be decoded",
    ):
        promised.frames(33, 3, 1)


def test_a_file_that_breaks_after_it_was_listed_is_unreadable(tmp_path):
    numbered(tmp_path, "a.mp4", 8)
    clips = VideoFolder(str(tmp_path), num_frames=4)
    (tmp_path / "a.mp4").write_bytes(b"no video any more")

    with pytest.raises(UnreadableImage, match=r"a.mp4, frames 4 to 7 cannot be read: Invalid data"):
        clips[1]


def test_without_pyav_there_is_one_sentence(tmp_path, monkeypatch):
    numbered(tmp_path, "a.mp4", 4)
    monkeypatch.setitem(sys.modules, "av", None)

    with pytest.raises(
        InputError,
        match=r"^videos are read with PyAV, which is not installed. Write: pip install "
        r"difftrain\[video\]$",
    ):
        VideoFolder(str(tmp_path), num_frames=4)


def test_the_frames_of_a_clip_become_its_pixels(tmp_path):
    video(tmp_path / "a.mkv", FRAMES)

    pixels = VideoFolder(str(tmp_path), num_frames=5, frame_step=3)[1].pixels(Transform(16))

    assert torch.equal(pixels, torch.from_numpy(FRAMES[15:30:3]).permute(3, 0, 1, 2))
