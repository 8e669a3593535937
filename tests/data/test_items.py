"""Reading whole data sets, and what an unreadable image is called."""

import pickle
from io import BytesIO

import numpy as np
import PIL.features
import PIL.Image
import pytest
import torch
from helpers.reds import picture

from difftrain.core.errors import InputError
from difftrain.core.rng import Rng
from difftrain.data.datasets.digit_clips import DigitClips
from difftrain.data.datasets.image_folder import ImageFolder
from difftrain.data.images import open_image
from difftrain.data.items import Clip, Item, MapDataset, load_images
from difftrain.data.opening import UnreadableImage
from difftrain.data.transform import Transform

GREY = Transform(4, channels=1, resize="none")


class Numbered(MapDataset):
    """Grey images whose pixels and label are their index."""

    def __init__(self, size, labelled=True):
        self.num, self.labelled = size, labelled

    def __len__(self):
        return self.num

    def __getitem__(self, i):
        return Item(PIL.Image.new("L", (4, 4), i), i if self.labelled else None, name=f"item {i}")


def test_a_data_set_is_read_whole_and_in_order():
    images = load_images(Numbered(5), GREY)

    assert len(images) == 5
    assert images.pixels.shape == (5, 1, 4, 4)
    assert images.pixels.dtype == torch.uint8
    assert images.pixels[:, 0, 0, 0].tolist() == images.labels.tolist() == [0, 1, 2, 3, 4]
    assert images.labels.dtype == torch.long


def test_a_limit_takes_images_from_the_whole_data_set():
    assert load_images(Numbered(10), GREY, limit=4).labels.tolist() == [0, 2, 5, 7]
    assert len(load_images(Numbered(3), GREY, limit=4)) == 3


def test_without_labels_there_is_no_tensor_of_them():
    assert load_images(Numbered(3, labelled=False), GREY).labels is None


def test_images_are_read_without_random_crop_and_flip():
    images = load_images(Numbered(3), Transform(2, channels=1, crop="random", flip=True))

    assert images.pixels[:, 0, 0, 0].tolist() == [0, 1, 2]


# Clips

NOISE = np.random.default_rng(0).integers(0, 256, (5, 9, 9, 3), dtype=np.uint8)
MOVED = Transform(4, resize="none", crop="random", flip=True)


@pytest.mark.parametrize("k", range(6))
def test_all_frames_of_a_clip_get_the_crop_and_flip_of_its_sample(k):
    """The frames are the same picture but for a number in its red channel; so are the crops."""
    frames = np.repeat(NOISE[:1], 5, axis=0)
    frames[..., 0] = np.arange(5)[:, None, None]

    pixels = Clip([PIL.Image.fromarray(frame) for frame in frames]).pixels(
        MOVED, Rng(0, samples=[k])
    )

    alone = MOVED(PIL.Image.fromarray(NOISE[0]), Rng(0, samples=[k]))
    assert pixels.shape == (3, 5, 4, 4)
    assert torch.equal(pixels[1:], alone[1:, None].expand(-1, 5, -1, -1))
    assert torch.equal(pixels[0], torch.arange(5, dtype=torch.uint8)[:, None, None].expand(5, 4, 4))


def test_clips_of_other_samples_are_cropped_and_flipped_otherwise():
    clip = Clip([PIL.Image.fromarray(frame) for frame in NOISE])

    assert (
        len({tuple(clip.pixels(MOVED, Rng(0, samples=[k])).flatten().tolist()) for k in range(20)})
        > 10
    )


def test_an_item_is_its_image_through_the_transform():
    image = PIL.Image.fromarray(NOISE[0])

    assert torch.equal(
        Item(image).pixels(MOVED, Rng(0, samples=[3])), MOVED(image, Rng(0, samples=[3]))
    )


def test_a_frame_that_is_too_small_is_named_by_its_clip():
    with pytest.raises(InputError, match=r"^a.mp4, frame 8 is 9x9, smaller than resolution 10"):
        Clip([PIL.Image.fromarray(NOISE[0])], name="a.mp4, frame 8").pixels(
            Transform(10, resize="none")
        )


def test_a_data_set_of_clips_says_how_many_frames_they_have():
    assert (DigitClips(num_frames=6).num_frames, DigitClips().items_are) == (6, "clips")
    assert (Numbered(3).num_frames, Numbered(3).items_are) == (None, "images")


def test_clips_are_not_read_as_images():
    with pytest.raises(
        InputError,
        match=r"data: the data set yields clips, but images are needed here. Write a data set of "
        r"images",
    ):
        load_images(DigitClips(), GREY)


# Damaged files


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not in an image format that Pillow knows"),
        (b"no picture", "not in an image format that Pillow knows"),
        (None, "truncated"),
    ],
)
def test_a_damaged_file_is_named_with_the_reason(save, content, reason):
    path = save("a.png")
    path.write_bytes(path.read_bytes()[:-30] if content is None else content)

    with pytest.raises(UnreadableImage, match=f"a.png cannot be read: .*{reason}"):
        open_image(path, "a.png")


@pytest.mark.skipif(not PIL.features.check("avif"), reason="this Pillow reads no AVIF")
def test_a_decoder_that_fails_in_its_own_way_is_a_damaged_file_too():
    stored = BytesIO()
    picture().save(stored, "AVIF")
    header, _, _ = stored.getvalue().partition(b"mdat")
    damaged = header + b"mdat" + bytes(len(stored.getvalue()) - len(header) - 4)

    with pytest.raises(UnreadableImage, match=r"a\.avif cannot be read: Failed to decode") as error:
        open_image(BytesIO(damaged), "a.avif")

    assert (error.value.__cause__, error.value.__context__) == (
        None,
        None,
    )  # they would keep the decoder, and its threads, alive


def test_loading_stops_at_an_unreadable_file_and_names_it(save, tmp_path):
    save("a.png")
    (tmp_path / "b.png").write_bytes(b"no picture")

    with pytest.raises(
        InputError, match=r"b\.png cannot be read: not in an image format.*Repair or remove it"
    ):
        load_images(ImageFolder(str(tmp_path)), Transform(4))


def test_an_unreadable_image_survives_the_way_between_processes():
    error = pickle.loads(pickle.dumps(UnreadableImage("a.png", "truncated")))

    assert (error.name, error.reason) == ("a.png", "truncated")


def test_the_first_frame_of_an_animation_is_taken(tmp_path):
    picture(10).save(tmp_path / "a.gif", save_all=True, append_images=[picture(200)])

    assert open_image(tmp_path / "a.gif", "a.gif").convert("RGB").getpixel((0, 0))[0] == 10
