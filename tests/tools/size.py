"""How large the project is: statements, long lines, lines that the formatter skips, README lines.

`python tests/tools/size.py [FOLDER]` counts the checkout that it lies in, or another one. What is
counted as a statement are the `ast.stmt` nodes of a file's syntax tree: each line that does
something, definitions, imports and docstrings too; expressions within a line and `except` and
`case` clauses are not.
"""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = 100
COUNTED = ("pipeline", "stages")  # whose statements are counted
READ = (*COUNTED, "tests")  # whose lines are


def sources(root: Path, *folders: str) -> list[str]:
    """The texts of the Python files in some folders of a checkout."""
    return [path.read_text() for folder in folders for path in (root / folder).rglob("*.py")]


def statements(text: str) -> int:
    """How many statements a Python source has."""
    return sum(isinstance(node, ast.stmt) for node in ast.walk(ast.parse(text)))


def sizes(root: Path) -> dict[str, int]:
    """All figures of a checkout, by name."""
    found = {folder: sum(map(statements, sources(root, folder))) for folder in COUNTED}
    lines = [line for text in sources(root, *READ) for line in text.splitlines()]
    return {
        **{f"statements in {folder}/": count for folder, count in found.items()},
        "statements": sum(found.values()),
        f"lines over {COLUMNS} columns": sum(len(line) > COLUMNS for line in lines),
        "lines that end with `# fmt: skip`": sum(line.endswith("# fmt: skip") for line in lines),
        "lines of README.md": len((root / "README.md").read_text().splitlines()),
    }


if __name__ == "__main__":
    for name, count in sizes(Path(sys.argv[1]) if sys.argv[1:] else ROOT).items():
        print(f"{count:6d}  {name}")
