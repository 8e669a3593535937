"""Parts by name: a slot is a registry, a part is a constructor, and its signature is the schema.

Bounds stand on the constructor's annotations. The same check serves a recipe's block (errors carry the path of the
key) and direct construction (`P2(gamma=-1)` raises), so nothing states a bound twice. This file alone knows pydantic
and hands on the constrained types that constructors annotate with.
"""

import dataclasses
import difflib
import functools
import inspect
import typing
from collections.abc import Callable
from typing import Annotated, Any

import pydantic
from pydantic import Field


class InputError(ValueError):
    """Something that a user wrote is wrong: the message says what was given, what is expected, what to write."""


def bounded(low: float | None = None, high: float | None = None, *, open_low: bool = False) -> Any:
    """A float within [low, high], or (low, high] with open_low."""
    lower: dict[str, Any] = {"gt": low} if open_low else {"ge": low}
    return Annotated[float, Field(**lower, le=high, allow_inf_nan=False)]


NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
UnitInterval = Annotated[float, Field(ge=0, le=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveInt = Annotated[int, Field(ge=1)]

ALL_DEFAULTS: Any = type("AllDefaults", (), {"__repr__": lambda self: "ALL_DEFAULTS"})()  # default of a section: {}
GIVEN = object()  # marks a parameter that the program supplies: Annotated[Tensor, GIVEN] is not a key of a recipe


@dataclasses.dataclass(frozen=True)
class Part:
    """A constructor with checked arguments, not yet called: what a recipe's block stands for. name is "" for a section."""

    slot: "Registry | Section"
    name: str
    arguments: dict[str, Any]

    def build(self, **given: Any) -> Any:
        """Call the constructor; `given` are the arguments that the program supplies (those it does not take are left out)."""
        constructor = self.slot.constructors[self.name]
        takes = parameters(constructor)
        wanted = {name: value for name, value in given.items() if name in takes}
        own = {name: value if keeps_part(takes[name]) else build(value) for name, value in self.arguments.items()}
        return constructor(**own, **wanted)

    def dump(self) -> dict[str, Any]:
        """Plain data that parses to this part again."""
        kind = {"type": self.name} if self.name else {}
        return {**kind, **{name: dump(value) for name, value in self.arguments.items()}}


def build(value: Any) -> Any:
    """Parts within `value` built, everything else as it is."""
    if isinstance(value, Part):
        return value.build()
    return [build(item) for item in value] if isinstance(value, list) else value


def dump(value: Any) -> Any:
    """Plain data for `value`: parts and registered instances as blocks, dataclass-free otherwise."""
    if isinstance(value, Part):
        return value.dump()
    if hasattr(value, "registered_as"):
        slot, name, arguments = value.registered_as
        return Part(slot, name, arguments).dump()
    if isinstance(value, (list, tuple)):
        return [dump(item) for item in value]
    if isinstance(value, dict):
        return {key: dump(item) for key, item in value.items()}
    return value


class Registry:
    """The parts of one slot by name."""

    def __init__(self, slot: str, purpose: str):
        self.slot, self.purpose = slot, purpose
        self.constructors: dict[str, Callable[..., Any]] = {}

    def register(self, name: str) -> Callable[[Any], Any]:
        """Class or function decorator: makes the constructor available as `type: name` and checks every call of it."""

        def add(constructor: Any) -> Any:
            known = self.constructors.get(name)
            if known is not None and (known.__module__, known.__qualname__) != (constructor.__module__, constructor.__qualname__):
                raise InputError(f"{self.slot} {name!r} is registered already, by {known.__module__}.{known.__qualname__}.")
            self.constructors[name] = checked = self._checked(constructor, name)
            return checked

        return add

    def parse(self, block: Any, path: str) -> Part:
        """A recipe's block, `{type: name, ...}` or just `name`, as a checked part."""
        if isinstance(block, Part):
            return block
        if isinstance(block, str):
            block = {"type": block}
        if not isinstance(block, dict) or not isinstance(block.get("type"), str):
            raise InputError(f"{path}: expected a block with a type, such as {{type: {next(iter(self.constructors))}}}, got {block!r}.")
        name, arguments = block["type"], {k: v for k, v in block.items() if k != "type"}
        if name not in self.constructors:
            raise InputError(f"{path}.type: unknown {self.slot} {name!r}{nearest(name, self.constructors)}.")
        return Part(self, name, check_arguments(self.constructors[name], arguments, path))

    def _checked(self, constructor: Any, name: str) -> Any:
        if inspect.isclass(constructor):
            original = constructor.__init__

            @functools.wraps(original)
            def checked_init(self: Any, *args: Any, **kwargs: Any) -> None:
                bound = inspect.signature(original).bind(self, *args, **kwargs).arguments
                arguments = dict(list(bound.items())[1:])
                if type(self) is constructor:
                    arguments = check_arguments(constructor, arguments, name, directly=True)
                original(self, **arguments)
                if type(self) is constructor:
                    keys = parameters(constructor)
                    shown = {k: v for k, v in arguments.items() if k in keys and not is_given(keys[k])}
                    object.__setattr__(self, "registered_as", (registry, name, shown))

            registry = self
            constructor.__init__ = checked_init  # type: ignore[method-assign]
            return constructor

        @functools.wraps(constructor)
        def checked_call(*args: Any, **kwargs: Any) -> Any:
            bound = inspect.signature(constructor).bind(*args, **kwargs).arguments
            return constructor(**check_arguments(constructor, dict(bound), name, directly=True))

        return checked_call


class Section:
    """A recipe's block without a type: the arguments of one constructor, such as `training:`."""

    def __init__(self, constructor: Callable[..., Any]):
        self.constructors = {"": constructor}

    def parse(self, block: Any, path: str) -> Part:
        if isinstance(block, Part):
            return block
        if not isinstance(block, dict):
            keys = ", ".join(name for name, p in parameters(self.constructors[""]).items() if not is_given(p))
            raise InputError(f"{path}: expected a block with the keys {keys}, got {block!r}.")
        return Part(self, "", check_arguments(self.constructors[""], block, path))


def parameters(constructor: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The constructor's parameters with annotations resolved, `self` left out."""
    function = inspect.unwrap(constructor.__init__ if inspect.isclass(constructor) else constructor)
    hints = typing.get_type_hints(function, include_extras=True)
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)  # of a class without an __init__ of its own
    found = {name: p for name, p in inspect.signature(function).parameters.items() if name != "self" and p.kind not in variadic}
    if dataclasses.is_dataclass(constructor):
        made = {f.name: f.default_factory for f in dataclasses.fields(constructor) if f.default_factory is not dataclasses.MISSING}
        found = {name: p.replace(default=made[name]()) if name in made else p for name, p in found.items()}
    return {name: p.replace(annotation=hints.get(name, Any)) for name, p in found.items()}


def slot_of(parameter: inspect.Parameter) -> Registry | Section | None:
    """The registry (or section) whose parts fill this parameter: `weighting: Annotated[Weighting, WEIGHTINGS]`."""
    return next((m for m in getattr(parameter.annotation, "__metadata__", ()) if isinstance(m, (Registry, Section))), None)


def is_optional(parameter: inspect.Parameter) -> bool:
    """Whether a slot may stay empty: `Annotated[Perturbation | None, PERTURBATIONS]`."""
    return type(None) in typing.get_args(typing.get_args(parameter.annotation)[0])


def keeps_part(parameter: inspect.Parameter) -> bool:
    """Whether the constructor wants the unbuilt part: `features: Annotated[Part, FEATURES]`."""
    return slot_of(parameter) is not None and typing.get_args(parameter.annotation)[0] in (Part, Part | None)


def is_given(parameter: inspect.Parameter) -> bool:
    return GIVEN in getattr(parameter.annotation, "__metadata__", ())


@functools.cache
def schema(constructor: Callable[..., Any]) -> type[pydantic.BaseModel]:
    """The pydantic model of the constructor's plain arguments; slots and supplied arguments are left open."""
    fields: dict[str, Any] = {}
    for name, parameter in parameters(constructor).items():
        open_type = slot_of(parameter) is not None or is_given(parameter)
        default = ... if parameter.default is inspect.Parameter.empty else parameter.default
        fields[name] = (Any if open_type else parameter.annotation, default)
    config = pydantic.ConfigDict(strict=True, extra="forbid", arbitrary_types_allowed=True, protected_namespaces=())
    return pydantic.create_model(getattr(constructor, "__name__", "part"), __config__=config, **fields)


def check_arguments(constructor: Callable[..., Any], arguments: dict[str, Any], path: str, directly: bool = False) -> dict[str, Any]:
    """Arguments checked against the signature, defaults filled in, nested blocks parsed into parts.

    directly: a call from Python, where slots hold objects and supplied arguments are allowed.
    """
    takes = parameters(constructor)
    known = {name: p for name, p in takes.items() if directly or not is_given(p)}
    problems = [
        f"{join(path, key)}: unknown key{nearest(key, known)}." for key in arguments if key not in known
    ]
    values = {key: value for key, value in arguments.items() if key in known}
    for name, parameter in known.items():
        slot = slot_of(parameter)
        if slot is None or directly:
            continue
        if name not in values and (parameter.default is ALL_DEFAULTS or isinstance(parameter.default, str)):
            values[name] = {} if parameter.default is ALL_DEFAULTS else parameter.default  # a default written as a block
        if name in values and not (values[name] is None and is_optional(parameter)):
            try:
                values[name] = parse_slot(slot, values[name], join(path, name), parameter)
            except InputError as error:
                problems.append(str(error))
    supplied = {name: None for name, p in takes.items() if is_given(p) and not directly}
    try:
        model = schema(constructor)(**{**supplied, **values})
        checked = {name: getattr(model, name) for name in known}
    except pydantic.ValidationError as error:
        problems += [describe(e, path) for e in error.errors()]
    if problems:
        raise InputError("\n".join(problems))
    return checked


def parse_slot(slot: Registry | Section, value: Any, path: str, parameter: inspect.Parameter) -> Any:
    many = typing.get_origin(typing.get_args(parameter.annotation)[0]) is list
    if not many:
        return slot.parse(value, path)
    if not isinstance(value, list):
        raise InputError(f"{path}: expected a list of blocks, got {value!r}.")
    return [slot.parse(item, f"{path}.{i}") for i, item in enumerate(value)]


def describe(error: Any, path: str) -> str:
    """One pydantic error as `path: what is expected, got what`."""
    where = ".".join([path, *map(str, error["loc"])]).strip(".")
    if error["type"] == "missing":
        return f"{where}: required, but not given."
    expected = error["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return f"{where}: expected {expected}, got {error['input']!r}."


def nearest(name: str, known: Any) -> str:
    """' (did you mean ...?) Known: ...' for an unknown name."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return f"{hint}; known: {', '.join(sorted(map(str, known))) or 'none'}"


def join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else str(key)


SCHEDULES = Registry("schedule", "which noise level belongs to which timestep")
TIMESTEPS = Registry("timesteps", "how t is drawn")
NOISES = Registry("noise", "the noise that is the target")
PERTURBATIONS = Registry("perturbation", "what the input sees beside the noise")
ERRORS = Registry("error", "distance of output and target, per sample")
VARIANCES = Registry("variance", "fixed or learned reverse variance")
WEIGHTINGS = Registry("weighting", "weight of a sample's error by noise level")
REGULARIZERS = Registry("regularizer", "an added loss term")
DENOISERS = Registry("model", "the network")
ADAPTERS = Registry("adapter", "which parameters train, and what is added to them")
ENCODERS = Registry("encoder", "pixels to latents and back")
DATASETS = Registry("data", "where images come from")
LEARNING_RATES = Registry("lr_schedule", "learning rate as a function of the step")
EMAS = Registry("ema", "decay of the weights' running average as a function of the step")
SAMPLERS = Registry("sampler", "the reverse process")
FEATURES = Registry("features", "images to feature vectors")
METRICS = Registry("metric", "scores of generated images")
DIAGNOSTICS = Registry("diagnostic", "what a trained network does along the noise levels")
