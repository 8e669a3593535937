"""Captions as the network is shown them: in a template, with their tags shuffled, or dropped.

A dropped caption is the empty text, which classifier-free guidance needs: Ho and Salimans 2022, arXiv:2207.12598. Every draw is keyed
by the sample, so a caption does not depend on who reads it.
"""

from dataclasses import dataclass, field

import torch

from difftrain.registry import InputError, NonNegativeInt, PositiveInt, UnitInterval, check_arguments
from difftrain.rng import Rng, key


@dataclass(frozen=True)
class Captions:
    """How captions are shown; the defaults leave them as they are.

    dropout: the probability of the empty text. templates: one is drawn for each sample; `{}` in it stands for the caption.
    shuffle_tags: what stands between separators is put into a random order, but for the first keep_tags of them.
    variants: with cached text states, how many random renderings of each caption are cached, of which a sample draws one.
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
            raise InputError('captions.templates: the list is empty. Write templates: ["a photo of {}"], or leave the key out.')
        for template in self.templates:
            if template.count("{}") != 1:
                raise InputError(f"captions.templates: {template!r} holds {{}} {template.count('{}')} times, expected once: it stands for "
                                 'the caption, as in "a photo of {}".')
        if not self.separator:
            raise InputError('captions.separator: expected what stands between tags, such as ",", got an empty text.')
        if not self.shuffle_tags and (self.keep_tags or self.separator != ","):
            raise InputError("captions: keep_tags and separator have no effect without shuffle_tags: true. Write it, or leave them out.")
        if self.variants > 1 and not self.is_random:
            raise InputError(f"captions.variants: {self.variants} has no effect: with one template and shuffle_tags: false every rendering "
                             "of a caption is the same. Leave the key out.")

    @property
    def is_random(self) -> bool:
        """Whether a caption that is not dropped looks different from sample to sample."""
        return len(set(self.templates)) > 1 or self.shuffle_tags

    def __call__(self, caption: str, rng: Rng) -> str:
        """The text that one sample is shown. rng: that of the sample."""
        return "" if self.drops(rng) else self.rendered(caption, rng)

    def drops(self, rng: Rng) -> bool:
        return self.dropout > 0 and rng.uniform("captions.dropout").item() < self.dropout

    def rendered(self, caption: str, rng: Rng) -> str:
        """The caption with its tags shuffled, in a template."""
        text = self._shuffled(caption, rng) if self.shuffle_tags else caption
        place = int(rng.uniform("captions.template").item() * len(self.templates)) if len(self.templates) > 1 else 0
        return self.templates[place].replace("{}", text)

    def variant(self, caption: str, v: int, seed: int = 0) -> str:
        """Rendering `v` of a caption: a function of the caption, v and the seed alone."""
        return self.rendered(caption, Rng(key(seed, 0, 0, caption), samples=[v]))

    def _shuffled(self, caption: str, rng: Rng) -> str:
        tags = [tag.strip() for tag in caption.split(self.separator) if tag.strip()]
        kept, rest = tags[: self.keep_tags], tags[self.keep_tags :]
        order = torch.randperm(len(rest), generator=rng.generators("captions.tags")[0]).tolist()
        return f"{self.separator} ".join([*kept, *(rest[place] for place in order)])


def described(caption: str | None, name: str) -> str:
    """The caption of an image, which must have one."""
    if caption is None:
        raise InputError(f"{name} has no caption, and the model is trained on text. Say where captions are (captions: sidecar or metadata "
                         "of an image_folder, caption_column of a huggingface table).")
    if not caption.strip():
        raise InputError(f"the caption of {name} is empty. Write one, or leave the image out; captions: {{dropout: 0.1}} is the way to "
                         "train without text now and then.")
    return caption
