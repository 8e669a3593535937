"""Registered parts: a slot is a registry, a part is a constructor, its signature is the schema.

Bounds stand on the constructor's annotations, and nothing repeats them. The same check serves a
block of a recipe, where errors carry the path of the key, and a direct call: `P2(gamma=-1)` raises.
This module alone imports pydantic. It defines the bounded types that constructors annotate with.
"""

import dataclasses
import functools
import importlib
import inspect
import pkgutil
import typing
from collections.abc import Callable, Sequence, Set
from typing import Annotated, Any, TypeVar

import pydantic
from pydantic import Field

from difftrain.core.errors import InputError, nearest

Constructor = Callable[..., Any]
C = TypeVar("C", bound=Constructor)


def bounded(low: float | None = None, high: float | None = None, *, open_low: bool = False) -> Any:
    """Return the type of a float in [low, high], or in (low, high] with `open_low`."""
    lower: dict[str, Any] = {"gt": low} if open_low else {"ge": low}
    return Annotated[float, Field(**lower, le=high, allow_inf_nan=False)]


NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
UnitInterval = Annotated[float, Field(ge=0, le=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveInt = Annotated[int, Field(ge=1)]


@dataclasses.dataclass(frozen=True)
class Marker:
    """A note on a parameter of a constructor, for the functions below."""

    name: str

    def __repr__(self) -> str:
        return self.name


GIVEN = Marker("GIVEN")
"""The program supplies the argument, so it is not a key of a recipe: `Annotated[Tensor, GIVEN]`."""
BESIDE_TRAINING = Marker("BESIDE_TRAINING")
"""The key does not change what is trained: `Annotated[PositiveInt, BESIDE_TRAINING]`."""
ALL_DEFAULTS: Any = Marker("ALL_DEFAULTS")
"""Default of a section's parameter: the section with all of its defaults."""


@dataclasses.dataclass(frozen=True)
class Part:
    """A constructor with checked arguments that is not called yet: the meaning of a block.

    Args:
        slot: The registry or section that holds the constructor.
        name: The registered name, or "" for a section.
        arguments: The arguments by name. Those of slots are parts, or lists of parts.
    """

    slot: "Registry | Section"
    name: str
    arguments: dict[str, Any]

    def build(self, **given: Any) -> Any:
        """Call the constructor.

        Args:
            given: Arguments that the program supplies. Those that the constructor does not take
                are ignored.

        Returns:
            What the constructor returns.
        """
        constructor = self.slot.constructors[self.name]
        takes = parameters(constructor)
        arguments = {name: value for name, value in given.items() if name in takes}
        for name, value in self.arguments.items():
            arguments[name] = value if keeps_part(takes[name]) else build(value)
        return constructor(**arguments)

    def dump(self) -> dict[str, Any]:
        """Return plain data from which `parse` makes this part again."""
        kind = {"type": self.name} if self.name else {}
        return {**kind, **{name: dump(value) for name, value in self.arguments.items()}}


def build(value: Any) -> Any:
    """Build the parts in an argument; return everything else unchanged."""
    if isinstance(value, Part):
        return value.build()
    if isinstance(value, list):
        return [build(item) for item in value]
    return value


def dump(value: Any) -> Any:
    """Return plain data: a block for a part or a registered instance, other values unchanged."""
    if isinstance(value, Part):
        return value.dump()
    if is_registered(value):
        return Part(*value.registered_as).dump()
    if isinstance(value, (list, tuple)):
        return [dump(item) for item in value]
    if isinstance(value, dict):
        return {key: dump(item) for key, item in value.items()}
    return value


def is_registered(value: Any) -> bool:
    """Return whether a value is an instance of a registered class, built as that class itself."""
    return hasattr(value, "registered_as")


def registered_name(value: Any) -> str:
    """Return the name under which an object's class is registered, else the name of its class."""
    if is_registered(value):
        return str(value.registered_as[1])
    return type(value).__name__


class Registry:
    """The parts of one slot by name.

    Args:
        slot: Name of the slot in messages and in `difftrain methods`.
        purpose: What a part of this slot does.
        homes: Modules and packages that hold the library's own parts of this slot. They are
            imported, packages with all their modules, the first time that a part is looked up.
    """

    def __init__(self, slot: str, purpose: str, homes: Sequence[str] = ()):
        self.slot, self.purpose, self.homes = slot, purpose, homes
        self._constructors: dict[str, Constructor] = {}
        self._imported_homes = False

    @property
    def constructors(self) -> dict[str, Constructor]:
        """The constructors by registered name."""
        if not self._imported_homes:
            self._imported_homes = True  # first, because a home may itself look up a part
            for home in self.homes:
                import_with_submodules(home)
        return self._constructors

    def register(self, name: str) -> Callable[[C], C]:
        """Make the decorated class or function available as `type: name`, and check its calls.

        Args:
            name: The name in recipes.

        Raises:
            InputError: If another class or function has the name.
        """

        def add(constructor: C) -> C:
            known = self._constructors.get(name)
            if known is not None and full_name(known) != full_name(constructor):
                raise InputError(
                    f"{self.slot} {name!r} is already registered by {full_name(known)}. "
                    "Choose a different name."
                )
            if inspect.isclass(constructor):
                self._check_construction(constructor, name)
                self._constructors[name] = constructor
                return constructor
            checked = checked_function(constructor, name)
            self._constructors[name] = checked
            return checked

        return add

    def parse(self, block: Any, path: str) -> Part:
        """Check a block of a recipe.

        Args:
            block: `{type: name, ...}`, a name alone, or a part, which is returned unchanged.
            path: Where the block stands in the recipe, for messages.

        Raises:
            InputError: If the block, its name or an argument is wrong.
        """
        if isinstance(block, Part):
            return block
        if isinstance(block, str):
            block = {"type": block}
        if not isinstance(block, dict) or not isinstance(block.get("type"), str):
            example = next(iter(self.constructors), "name")
            raise InputError(
                f"{path}: expected a block with a type, such as {{type: {example}}}, got {block!r}."
            )
        name = block["type"]
        if name not in self.constructors:
            raise InputError(
                f"{path}.type: unknown {self.slot} {name!r}{nearest(name, self.constructors)}."
            )
        arguments = {key: value for key, value in block.items() if key != "type"}
        return Part(self, name, check_arguments(self.constructors[name], arguments, path))

    def _check_construction(self, constructor: type, name: str) -> None:
        """Let a class check its arguments, and let its instances know the block they stand for.

        Instances of subclasses are left alone: their constructors have arguments of their own.
        """
        registry, original = self, constructor.__init__  # type: ignore[misc]

        @functools.wraps(original)
        def checked_init(self: Any, *args: Any, **kwargs: Any) -> None:
            if type(self) is not constructor:
                original(self, *args, **kwargs)
                return
            bound = inspect.signature(original).bind(self, *args, **kwargs)
            given = dict(list(bound.arguments.items())[1:])  # without self
            arguments = check_arguments(constructor, given, name, directly=True)
            original(self, **arguments)
            keys = recipe_keys(constructor)
            written = {key: value for key, value in arguments.items() if key in keys}
            object.__setattr__(self, "registered_as", (registry, name, written))

        constructor.__init__ = checked_init  # type: ignore[misc]


def checked_function(function: C, name: str) -> C:
    """Return a function that checks its arguments before each call."""

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(function).bind(*args, **kwargs).arguments
        return function(**check_arguments(function, dict(bound), name, directly=True))

    return typing.cast(C, checked)


def full_name(constructor: Constructor) -> str:
    """Return the module and name of a class or function."""
    return f"{constructor.__module__}.{constructor.__qualname__}"


def import_with_submodules(home: str) -> None:
    """Import a module, and all modules in it if it is a package."""
    package = importlib.import_module(home)
    for module in pkgutil.iter_modules(getattr(package, "__path__", ())):
        import_with_submodules(f"{home}.{module.name}")


class Section:
    """A block of a recipe without a type: the arguments of one constructor, such as `training:`.

    Args:
        constructor: The class or function.
    """

    def __init__(self, constructor: Constructor):
        self.constructors = {"": constructor}

    def parse(self, block: Any, path: str) -> Part:
        """Check a block of a recipe.

        Args:
            block: The arguments by name, or a part, which is returned unchanged.
            path: Where the block stands in the recipe, for messages.

        Raises:
            InputError: If the block or an argument is wrong.
        """
        if isinstance(block, Part):
            return block
        constructor = self.constructors[""]
        if not isinstance(block, dict):
            keys = ", ".join(recipe_keys(constructor))
            raise InputError(f"{path}: expected a block with the keys {keys}, got {block!r}.")
        return Part(self, "", check_arguments(constructor, block, path))


def parameters(constructor: Constructor) -> dict[str, inspect.Parameter]:
    """Return a constructor's parameters by name, with resolved annotations and without `self`."""
    function = inspect.unwrap(constructor.__init__ if inspect.isclass(constructor) else constructor)
    hints = typing.get_type_hints(function, include_extras=True)
    factories = default_factories(constructor)
    found = {}
    for name, parameter in inspect.signature(function).parameters.items():
        # A class without an __init__ takes *args and **kwargs, which are not arguments of its own.
        is_variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if name == "self" or is_variadic:
            continue
        if name in factories:
            parameter = parameter.replace(default=factories[name]())
        found[name] = parameter.replace(annotation=hints.get(name, Any))
    return found


def default_factories(constructor: Constructor) -> dict[str, Callable[[], Any]]:
    """Return the default factories of a dataclass by field; their signature hides the default."""
    if not dataclasses.is_dataclass(constructor):
        return {}
    factories = {}
    for field in dataclasses.fields(constructor):
        if field.default_factory is not dataclasses.MISSING:
            factories[field.name] = field.default_factory
    return factories


def recipe_keys(constructor: Constructor) -> dict[str, inspect.Parameter]:
    """Return the parameters that a recipe may write: all but those that the program supplies."""
    return {name: p for name, p in parameters(constructor).items() if not is_given(p)}


def stated_type(parameter: inspect.Parameter) -> Any:
    """Return an annotation's type without what stands beside it: bounds, slot and markers."""
    if typing.get_origin(parameter.annotation) is Annotated:
        return typing.get_args(parameter.annotation)[0]
    return parameter.annotation


def notes(parameter: inspect.Parameter) -> tuple[Any, ...]:
    """Return what stands beside an annotation's type: bounds, slot and markers."""
    if typing.get_origin(parameter.annotation) is Annotated:
        return typing.get_args(parameter.annotation)[1:]
    return ()


def bounded_type(parameter: inspect.Parameter) -> Any:
    """Return an annotation's type with its bounds and without slot and markers."""
    bounds = [
        note for note in notes(parameter) if not isinstance(note, (Marker, Registry, Section))
    ]
    plain = stated_type(parameter)
    return Annotated[(plain, *bounds)] if bounds else plain


def slot_of(parameter: inspect.Parameter) -> Registry | Section | None:
    """Return the registry or section whose parts fill a parameter.

    `weighting: Annotated[Weighting, WEIGHTINGS]` is filled by the parts of `WEIGHTINGS`.
    """
    for note in notes(parameter):
        if isinstance(note, (Registry, Section)):
            return note
    return None


def is_optional(parameter: inspect.Parameter) -> bool:
    """Return whether a slot may stay empty: `Annotated[Perturbation | None, PERTURBATIONS]`."""
    return type(None) in typing.get_args(stated_type(parameter))


def keeps_part(parameter: inspect.Parameter) -> bool:
    """Return whether the constructor takes the part unbuilt: `Annotated[Part, FEATURES]`."""
    return slot_of(parameter) is not None and stated_type(parameter) in (Part, Part | None)


def is_given(parameter: inspect.Parameter) -> bool:
    """Return whether the program supplies the argument, so that it is not a key of a recipe."""
    return GIVEN in notes(parameter)


def touches_training(parameter: inspect.Parameter) -> bool:
    """Return whether the key can change what is trained; see `BESIDE_TRAINING`."""
    return BESIDE_TRAINING not in notes(parameter)


@functools.cache
def schema(constructor: Constructor) -> type[pydantic.BaseModel]:
    """Return the pydantic model of a constructor; slots and supplied arguments take any value."""
    fields: dict[str, Any] = {}
    for name, parameter in parameters(constructor).items():
        takes_anything = slot_of(parameter) is not None or is_given(parameter)
        is_required = parameter.default is inspect.Parameter.empty
        kind = Any if takes_anything else bounded_type(parameter)
        fields[name] = (kind, ... if is_required else parameter.default)
    config = pydantic.ConfigDict(
        strict=True, extra="forbid", arbitrary_types_allowed=True, protected_namespaces=()
    )
    return pydantic.create_model(
        getattr(constructor, "__name__", "part"), __config__=config, **fields
    )


def check_arguments(
    constructor: Constructor,
    arguments: dict[str, Any],
    path: str,
    directly: bool = False,
    leave: Set[str] = frozenset(),
) -> dict[str, Any]:
    """Check arguments against a constructor's signature.

    Args:
        constructor: The class or function.
        arguments: The arguments by name.
        path: Where they stand in the recipe, for messages.
        directly: Whether this is a call from Python: slots then hold objects instead of blocks,
            and arguments that the program supplies are allowed.
        leave: Names of slot parameters whose blocks stay plain data, neither parsed nor checked.

    Returns:
        All arguments by name, with defaults, and with parts in place of blocks.

    Raises:
        InputError: With one line for each problem.
    """
    # Unknown keys.
    takes = parameters(constructor)
    known = takes if directly else recipe_keys(constructor)
    unknown = [key for key in arguments if key not in known]
    problems = [f"{join(path, key)}: unknown key{nearest(key, known)}." for key in unknown]
    values = {key: value for key, value in arguments.items() if key in known}

    # Blocks of slots become parts.
    slots = [name for name in known if not directly and slot_of(known[name]) is not None]
    for name in slots:
        if name not in values:
            values.update(default_block(known[name]))
        if name in values and name not in leave:
            try:
                values[name] = parse_slot(known[name], values[name], join(path, name))
            except InputError as error:
                problems.append(str(error))

    # Plain arguments: types, bounds and defaults.
    supplied = {name: None for name in takes if name not in known}
    try:
        model = schema(constructor)(**supplied, **values)
        checked = {name: getattr(model, name) for name in known}
    except pydantic.ValidationError as error:
        problems += [describe(each, path) for each in error.errors()]
    if problems:
        raise InputError("\n".join(problems))
    return checked


def default_block(parameter: inspect.Parameter) -> dict[str, Any]:
    """Return {name: block} for a slot whose default is written as a block, else {}."""
    if parameter.default is ALL_DEFAULTS:
        return {parameter.name: {}}
    if isinstance(parameter.default, str):
        return {parameter.name: parameter.default}
    return {}


def parse_slot(parameter: inspect.Parameter, value: Any, path: str) -> Any:
    """Check what a recipe writes for a slot: a block, a list of blocks, or null."""
    slot = slot_of(parameter)
    assert slot is not None
    if value is None and is_optional(parameter):
        return None
    if typing.get_origin(stated_type(parameter)) is not list:
        return slot.parse(value, path)
    if not isinstance(value, list):
        raise InputError(f"{path}: expected a list of blocks, got {value!r}.")
    return [slot.parse(item, f"{path}.{i}") for i, item in enumerate(value)]


def describe(error: Any, path: str) -> str:
    """Return one error of pydantic as "path: expected ..., got ...."."""
    where = ".".join([path, *map(str, error["loc"])]).strip(".")
    if error["type"] == "missing":
        return f"{where}: required, but not given."
    expected = error["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return f"{where}: expected {expected}, got {error['input']!r}."


def join(path: str, key: object) -> str:
    """Return the path of a key in the block at `path`."""
    return f"{path}.{key}" if path else str(key)
