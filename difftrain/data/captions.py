"""Captions as the network sees them: in a template, with their tags shuffled, or dropped.

Every choice belongs to the sample, so a caption does not depend on the process that reads it.
"""

import unicodedata
from dataclasses import dataclass, field
from typing import Any

import torch

from difftrain.core.errors import InputError
from difftrain.core.registry import NonNegativeInt, PositiveInt, UnitInterval, check_arguments
from difftrain.core.rng import Rng, key

SENTENCE_ENDS = ".!?…。！？"
# Categories of Unicode: controls, formats such as zero-width blanks, separators
INVISIBLE = ("Cc", "Cf", "Zs", "Zl", "Zp")
# Blanks that Unicode counts among letters, symbols and marks
BLANK = "\u115f\u1160\u2800\u3164\uffa0\u034f\ufe0e\ufe0f"


@dataclass(frozen=True)
class Captions:
    """How captions are shown to the network. The defaults leave them as they are.

    Args:
        dropout: Probability of the empty text, which classifier-free guidance needs.
        templates: Each sample gets one of them, at random; `{}` in it stands for the caption.
        shuffle_tags: Whether the parts between separators are put into a random order.
        separator: What stands between tags.
        keep_tags: How many tags at the beginning stay where they are.
        variants: With cached text, how many random renderings of each caption are cached. Each
            sample gets one of them, at random.

    Reference:
        Ho and Salimans 2022, "Classifier-Free Diffusion Guidance", arXiv:2207.12598.
    """

    dropout: UnitInterval = 0.0
    templates: list[str] = field(default_factory=lambda: ["{}"])
    shuffle_tags: bool = False
    separator: str = ","
    keep_tags: NonNegativeInt = 0
    variants: PositiveInt = 1

    def __post_init__(self) -> None:
        check_arguments(Captions, vars(self), "captions", directly=True)
        if not self.templates:
            raise InputError(
                'captions.templates: the list is empty. Write templates: ["a photo of {}"], or '
                "leave the key out."
            )
        for template in self.templates:
            if template.count("{}") != 1:
                raise InputError(
                    f"captions.templates: {template!r} holds {{}} {template.count('{}')} times, "
                    'expected once: it stands for the caption, as in "a photo of {}".'
                )
        if not self.separator:
            raise InputError(
                'captions.separator: expected what stands between tags, such as ",", got an empty '
                "text."
            )
        if not self.shuffle_tags and (self.keep_tags or self.separator != ","):
            raise InputError(
                "captions: keep_tags and separator have no effect without shuffle_tags: true. "
                "Write shuffle_tags: true, or leave them out."
            )
        if self.variants > 1 and not self.is_random:
            raise InputError(
                f"captions.variants: {self.variants} has no effect: with one template and "
                "shuffle_tags: false every rendering of a caption is the same. Leave the key out."
            )

    @property
    def is_random(self) -> bool:
        """Whether a caption that is not dropped looks different in different samples."""
        return len(set(self.templates)) > 1 or self.shuffle_tags

    def __call__(self, caption: str, rng: Rng) -> str:
        """Return the text that one sample is shown.

        Args:
            caption: The caption.
            rng: The `Rng` of the sample.
        """
        return "" if self.drops(rng) else self.rendered(caption, rng)

    def drops(self, rng: Rng) -> bool:
        """Return whether a sample is shown the empty text instead of its caption."""
        return self.dropout > 0 and rng.uniform("captions.dropout").item() < self.dropout

    def rendered(self, caption: str, rng: Rng) -> str:
        """Return the caption with its tags shuffled, in a template."""
        text = self._shuffled(caption, rng) if self.shuffle_tags else caption
        place = 0
        if len(self.templates) > 1:
            place = int(rng.uniform("captions.template").item() * len(self.templates))
        return self.templates[place].replace("{}", text)

    def variant(self, caption: str, v: int, seed: int = 0) -> str:
        """Return one rendering of a caption, a function of the arguments alone.

        Args:
            caption: The caption.
            v: The number of the rendering.
            seed: The seed of all renderings.
        """
        return self.rendered(caption, Rng(key(seed, 0, 0, caption), samples=[v]))

    def in_samples(self, caption: str) -> str:
        """Return the one rendering of a caption that generated samples and held-out images get."""
        return self.variant(caption, 0)

    def plain(self) -> "Captions":
        """Return what shows captions as they are, and drops as many of them."""
        return Captions(dropout=self.dropout)

    def described(self) -> dict[str, Any]:
        """Return what decides `in_samples`, as plain data."""
        found: dict[str, Any] = {"templates": list(self.templates), "variant": 0}
        if self.shuffle_tags:
            found |= {"shuffle_tags": True, "separator": self.separator}
            found["keep_tags"] = self.keep_tags
        return found

    def _shuffled(self, caption: str, rng: Rng) -> str:
        # A last full stop stays at the end.
        mark, text = self.separator.strip(), caption.rstrip()
        body = text.rstrip(f"{mark} ") if mark and mark in SENTENCE_ENDS else text
        end = text[len(body) :].strip()
        tags = [tag.strip() for tag in body.split(self.separator) if tag.strip()]
        kept, rest = tags[: self.keep_tags], tags[self.keep_tags :]
        order = torch.randperm(len(rest), generator=rng.generators("captions.tags")[0]).tolist()
        shuffled = [rest[place] for place in order]
        joint = self.separator if self.separator[-1].isspace() else f"{self.separator} "
        return joint.join([*kept, *shuffled]) + end


def is_blank(text: str) -> bool:
    """Return whether a text shows nothing: it holds blanks and invisible characters alone."""
    return all(char in BLANK or unicodedata.category(char) in INVISIBLE for char in text)


def described(caption: str | None, name: str) -> str:
    """Return the caption of an image that must have one.

    Args:
        caption: The caption, if there is one.
        name: What a message calls the image.

    Raises:
        InputError: If there is no caption, or an empty one.
    """
    if caption is None:
        raise InputError(
            f"{name} has no caption, and the model is trained on text. Say where captions are "
            "(captions: sidecar or metadata of an image_folder, caption_column of a huggingface "
            "table)."
        )
    if is_blank(caption):
        raise InputError(
            f"the caption of {name} is empty. Write one, or remove the image. To drop captions "
            "at random, write captions: {dropout: 0.1}."
        )
    return caption
