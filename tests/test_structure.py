"""The wings of the package: who may import whom, and what each may lean on."""

import ast
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import difftrain

PACKAGE = Path(difftrain.__file__).parent
# From the ground up: a wing imports from wings before it, never from those behind it.
WINGS = [
    ["core"],
    ["objective"],
    ["data"],
    ["models"],
    ["generation"],
    ["evaluation"],
    ["diagnostics"],
    ["training"],
    ["report", "recipe"],
    ["run"],
    ["commands"],
]
FLOOR = {wing: floor for floor, wings in enumerate(WINGS) for wing in wings}
ENTRY_POINTS = {"__main__", "train", "sample", "evaluate", "diagnose", "compare"}
FILES = sorted(PACKAGE.rglob("*.py"))


def name_of(file: Path) -> str:
    dotted = ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)
    return dotted.removesuffix(".__init__")


MODULES = {name_of(file): file for file in FILES}


@cache
def imported(module: str) -> frozenset[str]:
    """Every module that this one imports anywhere in its text.

    Own modules have their full name, others their first. Imports for types alone do not count.
    """
    tree = ast.parse(MODULES[module].read_text())
    for_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            own = {name for name in inner if name in MODULES}
            found |= own or {str(node.module)}
    return frozenset(name if name in MODULES else name.split(".")[0] for name in found)


def wing(module: str) -> str:
    """The wing of a module; "" for the package itself and its entry points."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] not in ENTRY_POINTS else ""


def own(module: str) -> set[str]:
    return {name for name in imported(module) if name in MODULES}


def others(module: str) -> set[str]:
    return set(imported(module)) - set(MODULES) - {"difftrain"}


INNER = [module for module in MODULES if wing(module)]


def test_every_module_stands_in_a_wing():
    assert {wing(module) for module in INNER} == set(FLOOR)


@pytest.mark.parametrize("module", INNER)
def test_a_module_imports_from_its_own_wing_or_from_those_before_it(module):
    mine = wing(module)
    wrong = [
        name
        for name in own(module)
        if wing(name) not in (mine, "") and FLOOR[wing(name)] >= FLOOR[mine]
    ]

    assert not wrong, f"{mine} imports from {wrong}"


def test_imports_have_no_circle():
    try:
        graph = {module: own(module) - {module} for module in MODULES}
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("module", [m for m in INNER if wing(m) in ("core", "objective")])
def test_the_mathematics_needs_torch_alone(module):
    allowed = {"torch", *sys.stdlib_module_names}
    allowed |= {"pydantic"} if module == "difftrain.core.registry" else set()
    # Joining processes is accelerate's work, and progress bars are tqdm's.
    allowed |= {"accelerate"} if module == "difftrain.core.launch" else set()
    allowed |= {"tqdm"} if module == "difftrain.core.console" else set()

    assert others(module) <= allowed


def test_the_registry_alone_knows_pydantic():
    assert [m for m in MODULES if "pydantic" in others(m)] == ["difftrain.core.registry"]


def test_the_evaluation_alone_imports_torchmetrics():
    assert {wing(m) for m in MODULES if "torchmetrics" in others(m)} == {"evaluation"}


@pytest.mark.parametrize("package", ["torchvision", "torch_fidelity", "sklearn"])
def test_nothing_imports_what_the_core_must_not_need(package):
    by_name = [m for m, file in MODULES.items() if f'import_module("{package}' in file.read_text()]

    assert [m for m in MODULES if package in others(m)] + by_name == []


def test_the_report_needs_no_torch():
    seen: set[str] = set()
    waiting = [m for m in MODULES if wing(m) == "report"]
    while waiting:
        module = waiting.pop()
        seen.add(module)
        waiting += [name for name in own(module) if name not in seen]

    assert not {m for m in seen if "torch" in others(m)}


def loaded_by(program: str) -> set[str]:
    """The modules that a fresh interpreter holds after a program."""
    ending = "; import sys; print(' '.join(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", program + ending], capture_output=True, text=True, check=True
    )
    return set(result.stdout.split("\n")[-2].split(" "))


def test_importing_the_package_loads_the_standard_library_alone():
    before = {name.split(".")[0] for name in loaded_by("pass")}
    after = {name.split(".")[0] for name in loaded_by("import difftrain")}

    assert after - before - {"difftrain"} <= set(sys.stdlib_module_names)


def test_the_help_of_the_command_line_loads_nothing_heavy():
    program = "import sys; sys.argv = ['difftrain', '--help']; import difftrain.commands.entry as a"
    program += "\ntry: a.main()\nexcept SystemExit: pass\npass"
    loaded = loaded_by(program)

    assert not {"torch", "diffusers", "pydantic", "yaml", "numpy"} & loaded


def test_every_public_name_loads():
    for name in difftrain.__all__:
        assert getattr(difftrain, name) is not None


def test_modules_have_docstrings():
    without = [
        m for m, file in MODULES.items() if not ast.get_docstring(ast.parse(file.read_text()))
    ]

    assert not without


def test_public_definitions_have_docstrings():
    without = []
    for module, file in MODULES.items():
        tree = ast.parse(file.read_text())
        for scope in [tree, *(n for n in tree.body if isinstance(n, ast.ClassDef))]:
            for node in scope.body:
                is_definition = isinstance(node, (ast.FunctionDef, ast.ClassDef))
                is_public = is_definition and not node.name.startswith("_")
                if is_public and not is_overload(node) and not ast.get_docstring(node):
                    without.append(f"{module}.{node.name}")

    assert not without


def is_overload(node: ast.AST) -> bool:
    return any("overload" in ast.unparse(one) for one in getattr(node, "decorator_list", []))
