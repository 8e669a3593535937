"""Fast start of a command: libraries that a run does not need are not imported.

diffusers imports transformers and peft with every model class where they are installed, which takes
longer than sampling a small network. A process that samples a network without text and without LoRA
does without.
"""

import contextlib
import importlib
import sys
from collections.abc import Iterator

from difftrain.core.launch import owns_process
from difftrain.core.registry import Part
from difftrain.recipe.schema import Recipe

SPARED = ("transformers", "peft")


def needs_text_or_lora(recipe: Recipe) -> bool:
    """Return whether a run's model reads text, or carries a LoRA."""
    model = recipe.model
    constructor = model.slot.constructors[model.name]
    takes_prompts = getattr(constructor, "takes_prompts", False)
    adapter = recipe.adapter
    return takes_prompts or isinstance(adapter, Part)


def import_diffusers_alone() -> None:
    """Import diffusers' networks without transformers and peft, for the rest of this process.

    This changes nothing where diffusers is imported already, or where the process is not a command
    of its
    own: a notebook, for example, may need the other libraries later.
    """
    if not owns_process() or "diffusers" in sys.modules:
        return
    with hidden(SPARED):
        importlib.import_module("diffusers.models.unets")


@contextlib.contextmanager
def hidden(packages: tuple[str, ...]) -> Iterator[None]:
    """Let packages that are not imported yet seem not to be installed, within the context."""
    absent = [package for package in packages if package not in sys.modules]
    for package in absent:
        sys.modules[package] = None  # type: ignore[assignment]  # what Python takes for "not there"
    try:
        yield
    finally:
        for package in absent:
            del sys.modules[package]
