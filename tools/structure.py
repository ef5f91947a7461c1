"""Sizes of the package's files and functions: `python tools/structure.py`. Exits with 1 when a median is too large.

Imports that go up or in a ring are found by `tests/test_package.py`.
"""

import ast
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "refalign_adapter"
MOST_LINES, MOST_CODE_LINES = 150, 10
"""Medians: of a file's lines, of a function's lines of code without its docstring, comments and blank ones."""
SHOWN = 5


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> int:
    """Lines of a function's body that hold code."""
    first, *rest = function.body
    is_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    body = rest if is_docstring else function.body
    numbers = {number for part in body for number in range(part.lineno, (part.end_lineno or part.lineno) + 1)}
    return sum(bool(line := lines[number - 1].strip()) and not line.startswith("#") for number in numbers)


def functions(path: Path) -> Iterator[tuple[int, str]]:
    """(lines of code, where) of every function of a file that has any."""
    text = path.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (count := code_lines(node, text.splitlines())):
            yield count, f"{path.relative_to(PACKAGE.parent)}:{node.lineno} {node.name}"


def main() -> int:
    """Print medians and the largest; returns the exit code."""
    paths = [path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py" and "_recipes" not in path.parts]
    lengths = [len(path.read_text(encoding="utf-8").splitlines()) for path in paths]
    files = [(length, str(path.relative_to(PACKAGE.parent))) for length, path in zip(lengths, paths, strict=True)]
    found = {
        "files": (files, MOST_LINES, "lines"),
        "functions": ([item for path in paths for item in functions(path)], MOST_CODE_LINES, "lines of code"),
    }
    for name, (sizes, most, what) in found.items():
        median = statistics.median(size for size, _ in sizes)
        print(f"{len(sizes)} {name}, median {median:g} {what} (at most {most}); the largest:")
        for size, where in sorted(sizes, reverse=True)[:SHOWN]:
            print(f"  {size:4d}  {where}")
        if median > most:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
