"""Decides what the samples of a score are asked to show: `evaluation.labels`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from difftrain.core.errors import InputError
from difftrain.data.items import MapDataset
from difftrain.data.metadata import every_caption
from difftrain.data.unreadable import ReadErrors
from difftrain.generation.conditions import (
    Choice,
    ClassConditions,
    Conditions,
    PromptConditions,
    class_conditions,
    prompt_conditions,
)
from difftrain.run.model import ModelPlan

KEY, DATA = "evaluation.labels", "data"  # keys of the recipe


@dataclass(frozen=True)
class ConditionsPlan:
    """What can decide the classes or prompts of a generated set.

    Args:
        model: The run's model.
        choice: What the recipe says; None takes the first of reference, training and in_turn that
            has labels or captions.
        key: What messages call the reference, such as "evaluation.reference".
        reference: What the samples are compared with.
        training: The training data; None of a stream, or where it is not there any more.
        missing: Why it is not there.
        seed: The evaluation's seed.
        errors: What becomes of items that cannot be read.
    """

    model: ModelPlan
    choice: Choice | None
    key: str
    reference: MapDataset
    training: MapDataset | None
    missing: str
    seed: int
    errors: ReadErrors

    def of(self, num: int) -> Conditions | None:
        """Return the class or prompt of each of `num` samples; None for a network without them.

        Raises:
            InputError: If the choice needs labels or captions that are not there, or if labels are
                not classes of the model.
        """
        conditioning = self.model.conditioning
        if self.model.model.takes_prompts:
            return self._prompts(num)
        if conditioning.conditions and conditioning.num_classes is not None:
            return self._classes(num, conditioning.num_classes)
        if self.choice is not None:
            raise InputError(
                f"{KEY}: {self.choice} has no effect, since the model takes neither labels nor "
                "prompts. Leave it out."
            )
        return None

    # Classes

    def _classes(self, num: int, num_classes: int) -> ClassConditions:
        choice, counts = self._class_counts(num_classes)
        return class_conditions(choice, counts, num_classes, num, self.seed)

    def _class_counts(self, num_classes: int) -> tuple[Choice, Mapping[int, int]]:
        """Return the choice that is taken, and how often each class counts."""
        if self.choice == "uniform":
            return self.choice, dict.fromkeys(range(num_classes), 1)
        for choice, key, data in self._sources():
            counts = None if data is None else data.label_counts()
            if data is not None and counts:
                return choice, self._by_class(counts, data.class_names, key, num_classes)
            if self.choice is not None:
                raise InputError(self._lacking(choice, key, data, "labels"))
        return "in_turn", {}

    def _by_class(
        self, counts: Mapping[int, int], names: list[str] | None, key: str, num_classes: int
    ) -> dict[int, int]:
        """Return counts by the class ids of the model.

        Where both data sets name their classes, a class is found by its name.
        """
        own = self.model.facts.class_names
        found = {}
        for label, count in counts.items():
            place, called = label, str(label)
            if names is not None and own is not None and label < len(names):
                called = repr(names[label])
                place = place_of(names[label], own)
            if not 0 <= place < num_classes:
                known = f"0 to {num_classes - 1}" if own is None else ", ".join(own)
                other = "in_turn" if key == DATA else "training"
                raise InputError(
                    f"{key}: it holds the class {called}, but the model has the classes {known}. "
                    f"Correct the labels, or write {KEY}: {other}."
                )
            found[place] = count
        return found

    # Prompts

    def _prompts(self, num: int) -> PromptConditions:
        if self.choice == "uniform":
            raise InputError(
                f"{KEY}: uniform gives all classes equal shares, but the model takes prompts. "
                "Write reference, training, or in_turn, which takes sampling.prompts."
            )
        for choice, key, data in self._sources():
            if data is not None and data.is_captioned():
                captions = every_caption(data, key, self.errors)
                return prompt_conditions(choice, captions, num, self.seed, self.model.captions)
            if self.choice is not None:
                raise InputError(self._lacking(choice, key, data, "captions"))
        return prompt_conditions("in_turn", self.model.prompts, num, self.seed)

    # Where they come from

    def _sources(self) -> list[tuple[Choice, str, MapDataset | None]]:
        """Return the data sets that may decide: choice, key in the recipe, and the data set."""
        sources: list[tuple[Choice, str, MapDataset | None]] = [
            ("reference", self.key, self.reference),
            ("training", DATA, self.training),
        ]
        if self.choice is None:
            return sources
        return [source for source in sources if source[0] == self.choice]

    def _lacking(self, choice: Choice, key: str, data: MapDataset | None, what: str) -> str:
        """Return the message of a choice that cannot be taken."""
        if data is not None:
            why = f"{key} has no {what}"
        elif self.missing:
            why = f"the training data cannot be opened ({self.missing.rstrip('.')})"
        else:
            why = f"data is a stream, whose {what} are not known before it ends"
        other = "training" if choice == "reference" else "reference"
        return f"{KEY}: {choice}, but {why}. Write {KEY}: {other} or in_turn, or leave it out."


def place_of(name: str, names: Sequence[str]) -> int:
    """Return the place of a name; -1 where it is not there."""
    return names.index(name) if name in names else -1
