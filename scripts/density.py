"""Counts comprehensions and conditional expressions per thousand statements of Python code.

python scripts/density.py FOLDER ... [--functions N]
"""

import argparse
import ast
from collections.abc import Sequence
from pathlib import Path

COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
FEWEST = 8  # statements of a function that --functions lists


def count(trees: Sequence[ast.AST], kind: type[ast.AST] | tuple[type[ast.AST], ...]) -> int:
    """Count the nodes of a kind below `trees`; the trees themselves do not count."""
    below = 0
    for tree in trees:
        below += sum(isinstance(node, kind) for node in ast.walk(tree)) - isinstance(tree, kind)
    return below


def per_thousand(trees: Sequence[ast.AST]) -> tuple[int, float, float]:
    """Return (statements, comprehensions per 1000 of them, conditional expressions per 1000)."""
    statements = count(trees, ast.stmt)
    scale = 1000 / max(1, statements)
    return statements, scale * count(trees, COMPREHENSIONS), scale * count(trees, ast.IfExp)


def row(name: str, trees: Sequence[ast.AST]) -> str:
    """Format one line of the table."""
    statements, comprehensions, conditionals = per_thousand(trees)
    return f"{name:<60}{statements:>12,}{comprehensions:>16.1f}{conditionals:>14.1f}"


def densest(files: dict[str, ast.AST], num: int) -> list[tuple[str, ast.AST]]:
    """Return (place, function) of the `num` functions with the most such expressions."""
    found: list[tuple[str, ast.AST]] = []
    for file, tree in files.items():
        for node in ast.walk(tree):
            if isinstance(node, FUNCTIONS) and count([node], ast.stmt) >= FEWEST:
                found.append((f"{file}:{node.lineno} {node.name}", node))
    found.sort(key=lambda function: sum(per_thousand([function[1]])[1:]), reverse=True)
    return found[:num]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument(
        "--functions",
        type=int,
        default=0,
        metavar="N",
        help=f"list the N densest functions of at least {FEWEST} statements in each folder",
    )
    given = parser.parse_args()
    print(f"{'name':<60}{'statements':>12}{'comprehensions':>16}{'conditionals':>14}")
    for folder in given.folders:
        files: dict[str, ast.AST] = {}
        for file in sorted(folder.rglob("*.py")):
            files[str(file.relative_to(folder))] = ast.parse(file.read_text("utf-8"))
        print(row(str(folder), list(files.values())))
        for place, function in densest(files, given.functions):
            print(row(f"  {place}", [function]))


if __name__ == "__main__":
    main()
