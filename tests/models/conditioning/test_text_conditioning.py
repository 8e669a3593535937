"""Prompts as conditioning: numbers, the empty prompt, sizes, guidance, and kept states."""

from collections.abc import Sequence

import diffusers
import pytest
import torch
from torch import Tensor, nn

from difftrain.core.rng import Rng
from difftrain.data.batch import MicroBatch
from difftrain.models.conditioning import prompts as text_conditioning
from difftrain.models.conditioning.prompts import TextConditioning
from difftrain.models.slots import MODELS

CAT, DOG = "a cat", "a dog"


class Words(nn.Module):
    """A text encoder of one table, by bytes, which keeps the prompts that it encodes."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(256, 4)
        self.prompts: list[str] = []

    @staticmethod
    def tokenize(prompts: Sequence[str]) -> dict[str, Tensor]:
        rows = [list(prompt.encode().ljust(20)[:20]) for prompt in prompts]
        return {"ids.text_encoder": torch.tensor(rows)}

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        self.prompts += prompts
        words = self.table(self.tokenize(prompts)["ids.text_encoder"])
        return {"encoder_hidden_states": words, "text_embeds": words.mean(1)}


class Counted:
    """A model that takes prompts, whose one text encoder counts."""

    def __init__(self):
        self.text = Words()
        self.tokenizer = Words.tokenize
        self.released = 0

    def release_text(self):
        self.released += 1


def conditioning(**more):
    return TextConditioning(Counted(), [CAT, DOG, CAT], (16, 24), **more)


def micro(captions=None, **more):
    num = len(captions or more["samples"])
    given = {"samples": list(range(num)), **more}
    return MicroBatch(step=0, pixels=None, labels=None, captions=captions, skipped=[], **given)


def opened(folder, family):
    return MODELS.parse({"type": family, "path": str(folder)}, "model").build()


def test_generated_samples_take_the_prompts_in_turn_whatever_else_was_asked():
    made = conditioning()
    before = made.labels_of(range(4))

    assert made.ids_of(["a bird", DOG, "a bird"]).tolist() == [3, 1, 3]
    assert made.labels_of(range(4)).tolist() == before.tolist() == [0, 1, 2, 0]
    assert made.captions_of(before) == [CAT, DOG, CAT, CAT]
    assert made.captions_of(made.ids_of(["a bird", CAT])) == ["a bird", CAT]


def test_a_number_brings_the_states_of_its_prompt():
    made = conditioning()
    expected = made.model.text.encode([DOG, CAT, DOG])

    found = made(torch.tensor([1, 2, 1]))

    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("family", ["stable_diffusion", "stable_diffusion_xl"])
def test_no_prompt_is_what_diffusers_takes_for_it(pipelines, family):
    """The states of the empty prompt, and zeros for SDXL."""
    folder = pipelines(family)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    with torch.no_grad():
        if family == "stable_diffusion":
            expected = {
                "encoder_hidden_states": pipeline.encode_prompt([CAT] * 2, "cpu", 1, True)[1]
            }
        else:
            _, words, _, pooled = pipeline.encode_prompt(
                [CAT] * 2, do_classifier_free_guidance=True
            )
            expected = {"encoder_hidden_states": words, "text_embeds": pooled}

    found = TextConditioning(opened(folder, family), [CAT], (16, 16)).null(2)

    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def test_sizes_are_those_of_the_crop_in_training_and_of_the_whole_image_in_sampling():
    made, geometry = conditioning(size_conditioning=True), torch.arange(12.0).reshape(2, 6)

    assert torch.equal(made.of(micro([CAT, DOG], geometry=geometry), Rng(0))["sizes"], geometry)
    assert made(torch.tensor([0]))["sizes"].tolist() == [[16, 24, 0, 0, 16, 24]]
    assert torch.equal(made.null(2)["sizes"], made(torch.tensor([0, 1]))["sizes"])
    assert "sizes" not in conditioning().of(micro([CAT], geometry=geometry), Rng(0))


def test_the_guidance_input_of_training_is_not_that_of_sampling():
    made = conditioning(guidance_input=(1.0, 3.5))

    assert made.of(micro([CAT, DOG]), Rng(0))["guidance"].tolist() == [1.0, 1.0]
    assert (
        made(torch.tensor([0, 1]))["guidance"].tolist()
        == made.null(2)["guidance"].tolist()
        == [3.5, 3.5]
    )


def test_text_encoders_that_train_get_token_ids_everywhere():
    made = conditioning(trains_text=True)
    expected = made.model.tokenizer([DOG])

    for found in (made.of(micro([DOG]), Rng(0)), made(torch.tensor([1]))):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
    assert made.null(1).keys() == expected.keys()
    assert made.model.text.prompts == []


def test_cached_states_are_taken_as_they_are():
    made, states = conditioning(), {"encoder_hidden_states": torch.ones(2, 3, 4)}

    assert made.of(micro(samples=[0, 1], cond=states), Rng(0)) == states
    assert made.model.text.prompts == []


def test_remembered_prompts_need_no_text_encoder_any_more():
    made = conditioning()
    made.ids_of(["a bird"])
    made.remember()
    assert sorted(made.model.text.prompts) == ["", "a bird", CAT, DOG]
    del made.model.text

    assert made(torch.tensor([3, 0]))["text_embeds"].shape == (2, 4)
    assert made.null(1)["text_embeds"].shape == (1, 4)


def test_what_does_not_fit_into_memory_is_encoded_again_and_the_encoders_are_freed(monkeypatch):
    made = conditioning()
    size = sum(value.nbytes for value in made.model.text.encode([CAT]).values())
    monkeypatch.setattr(text_conditioning, "MOST_BYTES", 2 * size)
    made.ids_of(["a bird"])
    expected = made(torch.tensor([0, 1, 3]))
    made.remember()
    made.release()
    before = len(made.model.text.prompts)

    again = made(torch.tensor([0, 1, 3]))

    assert made.model.text.prompts[before:] == [DOG, "a bird"]
    assert all(torch.equal(again[name], expected[name]) for name in expected)
    assert made.model.released == 1


def test_text_encoders_that_nothing_remembers_are_not_freed():
    made = conditioning()
    made.release()

    assert made.model.released == 0


def test_as_many_states_are_kept_as_fit_and_the_oldest_go(monkeypatch):
    monkeypatch.setattr(text_conditioning, "MOST_KEPT", 2)
    made = conditioning()
    first = made(made.ids_of([CAT, DOG]))
    made(made.ids_of([DOG, CAT, DOG]))
    assert made.model.text.prompts == [CAT, DOG]

    made(made.ids_of(["a bird"]))
    again = made(made.ids_of([DOG, CAT]))

    assert made.model.text.prompts == [CAT, DOG, "a bird", CAT]
    assert torch.equal(again["text_embeds"], first["text_embeds"].flip(0))
