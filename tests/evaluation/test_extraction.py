"""Rows from images: the same from any stop and in any order; what is wrong names its image."""

import pytest
import torch
from helpers.images import Held, random_images

from difftrain.core.errors import InputError
from difftrain.evaluation import store as store_module
from difftrain.evaluation.distances.nearest import NearestTraining
from difftrain.evaluation.evidence import NEAREST
from difftrain.evaluation.extraction import Extraction
from difftrain.evaluation.slots import FeatureExtractor

IMAGES, LABELS = random_images(45, 1), torch.arange(45) % 3


class Halves(FeatureExtractor):
    """The two halves of an image: the first as features, the other as logits.

    broken: the image whose features are NaN.
    """

    name, gives = "halves", frozenset({"logits"})

    def __init__(self, broken: torch.Tensor | None = None):
        self.broken, self.seen = broken, 0

    @property
    def widths(self):
        return {"features": 32, "logits": 32}

    def protocol(self):
        return {"type": "halves"}

    def extract(self, images, outputs=("features",)):
        self.seen += len(images)
        first, second = images.flatten(1).float().split(32, dim=1)
        if self.broken is not None:
            first[(images == self.broken).flatten(1).all(dim=1)] = torch.nan
        return {name: {"features": first, "logits": second}[name] for name in outputs}


@pytest.fixture(params=[False, True], autouse=True)
def works_ahead(request, monkeypatch):
    monkeypatch.setattr(Held, "works_ahead", request.param)


def extraction(
    folder, source=None, extractor=None, outputs=("features", "logits"), **options
) -> Extraction:
    return Extraction(
        source or Held(IMAGES, LABELS),
        extractor or Halves(),
        outputs,
        folder,
        "generated",
        **options,
    )


def test_every_image_has_its_rows_and_its_label(tmp_path):
    found = extraction(tmp_path)()

    assert len(found) == 45
    assert torch.equal(found.outputs["features"].whole(), IMAGES.flatten(1)[:, :32].float())
    assert torch.equal(found.outputs["logits"].whole(), IMAGES.flatten(1)[:, 32:].float())
    assert torch.equal(found.labels, LABELS)


def test_only_the_outputs_that_are_wanted_are_kept(tmp_path):
    assert set(extraction(tmp_path, outputs=("features",))().outputs) == {"features"}


def test_distances_to_the_training_images_are_rows_too(tmp_path):
    training = random_images(30, 2)
    found = extraction(tmp_path, nearest=NearestTraining([training]))()

    assert torch.equal(found.outputs[NEAREST].whole(), NearestTraining([training])(IMAGES))


def test_what_was_stopped_goes_on_with_the_blocks_that_are_missing(tmp_path):
    class Stopped(Halves):
        def extract(self, images, outputs=("features",)):
            if self.seen >= 24:
                raise KeyboardInterrupt
            return super().extract(images, outputs)

    with pytest.raises(KeyboardInterrupt):
        extraction(tmp_path, extractor=Stopped())()
    source, extractor = Held(IMAGES, LABELS), Halves()
    again = extraction(tmp_path, source, extractor)
    found = again()

    assert source.asked == [list(range(24, 32)), list(range(32, 40)), list(range(40, 45))]
    assert extractor.seen == 21
    assert torch.equal(found.outputs["features"].whole(), IMAGES.flatten(1)[:, :32].float())
    straight = extraction(tmp_path / "other")
    straight()
    assert again.content() == straight.content()


def test_other_images_features_or_keys_start_anew(tmp_path):
    extraction(tmp_path)()
    for changed in (
        {"source": Held(IMAGES.flip(0), LABELS)},
        {"key": {"step": 3}},
        {"source": Held(IMAGES, None)},
    ):
        source = changed.get("source") or Held(IMAGES, LABELS)
        extraction(tmp_path, **({**changed, "source": source}))()
        assert len(source.asked) == 6


def test_the_content_tells_one_pixel_or_label_from_another(tmp_path):
    def content(images, labels, name):
        made = extraction(tmp_path / name, Held(images, labels))
        made()
        return made.content()

    pixel, label = IMAGES.clone(), LABELS.clone()
    pixel[44, 0, 7, 7] ^= 1
    label[3] += 1
    found = [
        content(*given, str(i))
        for i, given in enumerate(
            [(IMAGES, LABELS), (pixel, LABELS), (IMAGES, label), (IMAGES, LABELS)]
        )
    ]

    assert found[0] == found[3]
    assert len({each["digest"] for each in found}) == 3
    assert found[0]["count"] == 45


def test_features_that_are_not_finite_name_their_image(tmp_path):
    with pytest.raises(
        InputError,
        match=r"generated images: the features of image 19 are not finite \(1 of a block of 8\)",
    ):
        extraction(tmp_path, extractor=Halves(broken=IMAGES[19]))()


def test_labels_on_some_images_alone_are_refused(tmp_path):
    class Some(Held):
        def blocks(self, wanted):
            for number, block in enumerate(super().blocks(wanted)):
                yield block._replace(labels=None) if number == 4 else block

    with pytest.raises(
        InputError,
        match=r"samples from image 32 on have no label, but the first sample has one\. Label all",
    ):
        extraction(tmp_path, Some(IMAGES, LABELS))()


def test_a_problem_of_another_process_ends_the_work(tmp_path, monkeypatch):
    class Ringing:
        def is_ringing(self):
            return len(source.asked) == 3

    monkeypatch.setattr(store_module, "PATIENCE", 0.0)
    source = Held(IMAGES, LABELS)
    work = extraction(tmp_path, source)
    work.alarm = Ringing()
    with pytest.raises(InputError, match="which other processes wrote, are not here"):
        work()
    assert len(source.asked) == 3


def test_an_error_of_the_source_ends_the_work_and_what_was_done_stays(tmp_path):
    class Broken(Held):
        def blocks(self, wanted):
            for number, block in enumerate(super().blocks(wanted)):
                if number == 3:
                    raise InputError("image 24 cannot be read.")
                yield block

    with pytest.raises(InputError, match="image 24 cannot be read"):
        extraction(tmp_path, Broken(IMAGES, LABELS))()
    source = Held(IMAGES, LABELS)
    extraction(tmp_path, source)()
    assert source.asked == [list(range(24, 32)), list(range(32, 40)), list(range(40, 45))]


def test_damaged_rows_are_extracted_again_and_said(tmp_path, caplog):
    caplog.set_level("INFO")
    first = extraction(tmp_path)
    expected = first().outputs["features"].whole()
    file = first.store.folder / "000002.safetensors"
    content = bytearray(file.read_bytes())
    content[-100:] = bytes(100)
    file.write_bytes(content)

    source = Held(IMAGES, LABELS)
    again = extraction(tmp_path, source)()
    assert source.asked == [list(range(16, 24))]
    assert torch.equal(again.outputs["features"].whole(), expected)
    assert "1 of 6 blocks in" in caplog.text
    assert "do not hold what was written; they are extracted again" in caplog.text


def test_a_block_that_somebody_else_made_meanwhile_is_passed_over(tmp_path):
    class Beside(Held):
        def blocks(self, wanted):
            for number, block in enumerate(super().blocks(wanted)):
                if number == 1:
                    extraction(tmp_path, Held(IMAGES, LABELS))()
                yield block

    source = Beside(IMAGES, LABELS)
    found = extraction(tmp_path, source)()
    assert len(source.asked) < 6
    assert torch.equal(found.outputs["features"].whole(), IMAGES.flatten(1)[:, :32].float())


def test_rows_that_somebody_else_removes_are_made_again(tmp_path):
    class Removing(Halves):
        def extract(self, images, outputs=("features",)):
            if self.seen == 24:
                extraction(tmp_path).store.remove()
            return super().extract(images, outputs)

    source, extractor = Held(IMAGES, LABELS), Removing()
    found = extraction(tmp_path, source, extractor)()
    assert extractor.seen == 45 + 24
    assert torch.equal(found.outputs["features"].whole(), IMAGES.flatten(1)[:, :32].float())
