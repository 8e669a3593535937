"""The arrows of the design: a file imports from its own layer or from those above it, and the mathematics needs torch alone."""

import ast
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import difftrain

ROOT = Path(difftrain.__file__).parent
LAYERS = {
    0: ["rng", "distributed", "registry"],
    1: ["schedule", "parameterization", "transitions", "batch"],
    2: ["timesteps", "noise", "errors", "variance", "weightings", "regularizers"],
    3: ["objective"],
    4: ["progress", "presets", "storage", "pipelines", "denoisers", "adapters", "targets", "lora", "latents", "captions", "conditioning",
        "preparation", "optimizers", "data", "cache", "ema", "lr"],
    5: ["sampling", "evaluation", "diagnostics"],
    6: ["checkpoint", "runlog", "trainer", "visits", "prior", "export"],
    7: ["recipe", "rules", "stated", "plan", "feeding", "results", "runfolder", "report", "weights", "entry", "check", "methods", "train",
        "evaluate", "diagnose", "sample", "merge", "compare", "cli"],
}
LAYER = {room: layer for layer, rooms in LAYERS.items() for room in rooms}
FILES = sorted(ROOT.rglob("*.py"))
MODULES = {".".join(file.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): file for file in FILES}


@cache
def imported(module: str) -> frozenset[str]:
    """Every module that this one imports anywhere in its text: own ones with their full name, others by their first."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            own = {name for name in inner if name in MODULES}
            found |= own or {str(node.module)}
    return frozenset(name if name in MODULES else name.split(".")[0] for name in found)


def room(module: str) -> str:
    """The room of a module: its first name below difftrain, "" for the package itself."""
    return ".".join(module.split(".")[1:2])


def own(module: str) -> set[str]:
    return {name for name in imported(module) if name in MODULES}


def others(module: str) -> set[str]:
    return imported(module) - set(MODULES) - {"difftrain"}


INNER = [module for module in MODULES if room(module)]


def test_every_room_is_in_the_table_once():
    assert {room(module) for module in INNER} == set(LAYER)
    assert sum(len(rooms) for rooms in LAYERS.values()) == len(LAYER)


@pytest.mark.parametrize("module", INNER)
def test_a_module_imports_from_its_own_layer_or_from_above(module):
    below = {name for name in own(module) if room(name) and LAYER[room(name)] > LAYER[room(module)]}

    assert not below, f"layer {LAYER[room(module)]} imports from below: {below}"


def test_no_module_leans_on_itself_by_a_detour():
    try:
        list(TopologicalSorter({module: own(module) - {module} for module in MODULES}).static_order())
    except CycleError as error:
        pytest.fail(f"a cycle of imports: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("module", [module for module in INNER if LAYER[room(module)] <= 3])
def test_the_mathematics_needs_torch_alone(module):
    allowed = {"torch", *sys.stdlib_module_names} | ({"pydantic"} if module == "difftrain.registry" else set())

    assert others(module) <= allowed


def test_the_registry_alone_knows_pydantic():
    assert [module for module in MODULES if "pydantic" in others(module)] == ["difftrain.registry"]


@pytest.mark.parametrize("package", ["torchvision", "torch_fidelity"])
def test_nothing_imports_what_a_cpu_build_of_torch_breaks(package):
    by_name = [module for module, file in MODULES.items() if f'import_module("{package}' in file.read_text()]

    assert [module for module in MODULES if package in others(module)] + by_name == []


@pytest.mark.parametrize("package", ["torch", "difftrain.train", "difftrain.plan", "difftrain.recipe"])
def test_the_command_line_imports_nothing_heavy_on_its_own_account(package):
    """At the top of the file, that is: each command imports what it needs when it runs."""
    top = [node for node in ast.parse(MODULES["difftrain.cli"].read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in top if isinstance(node, ast.ImportFrom)}

    assert package not in names
    assert "torch" not in others("difftrain")


def test_the_report_needs_no_torch():
    seen: set[str] = set()
    waiting = [module for module in MODULES if room(module) == "report"]
    while waiting:
        module = waiting.pop()
        seen.add(module)
        waiting += [name for name in own(module) if name not in seen]

    assert not {module for module in seen if "torch" in others(module)}
