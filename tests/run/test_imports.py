"""The order of the subpackages: imports go only downward, what must start light knows no torch, a
wheel holds all of them.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PIPELINE = ROOT / "pipeline"
ORDER = (
    "system",
    "competition",
    "run",  # shared: the machine, the competition, what a run is
    "phantom",
    "slices",
    "volumes",
    "folds",  # stages 00 to 03
    "learning",  # shared by what trains
    "voco",
    "organs",
    "classifier",
    "evaluation",
    "submission",
    "ablation",
    "report",  # stages 04 to 10
    "metric",  # the command line of the score
    "preflight",  # what run_all.sh asks first
)
LIGHT = (
    "system",
    "competition",
    "run",
    "phantom",
    "slices",
    "volumes",
    "folds",
    "evaluation",
    "metric",
    "preflight",
)
MODULES = sorted(
    path.relative_to(PIPELINE) for path in PIPELINE.rglob("*.py") if path.name != "__init__.py"
)


def subpackage(module: Path) -> str:
    """`slices/dicom.py` -> `slices`, `folds.py` -> `folds`."""
    return module.parts[0].removesuffix(".py")


def imported(module: Path) -> set[str]:
    """Subpackages (and top-level modules) of the project that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse((PIPELINE / module).read_text())):
        if isinstance(node, ast.Import):
            found |= {
                alias.name.split(".")[1]
                for alias in node.names
                if alias.name.startswith("pipeline.")
            }
        elif isinstance(node, ast.ImportFrom):
            here = ["pipeline", *module.parts[:-1]]
            base = here[: len(here) - node.level + 1] if node.level else []
            path = [*base, *(node.module.split(".") if node.module else [])]
            if path[0] == "pipeline":
                found |= {path[1]} if len(path) > 1 else {alias.name for alias in node.names}
    return found & set(ORDER)


def test_every_subpackage_has_its_place():
    assert {subpackage(module) for module in MODULES} == set(ORDER)
    assert all(
        (PIPELINE / name / "__init__.py").read_text() == ""
        for name in ORDER
        if (PIPELINE / name).is_dir()
    )


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_go_only_downward(module):
    above = [
        other for other in imported(module) if ORDER.index(other) > ORDER.index(subpackage(module))
    ]
    assert not above, f"{module} imports {above}, which come after {subpackage(module)} in ORDER"


@pytest.mark.parametrize(
    "module", [module for module in MODULES if subpackage(module) in LIGHT], ids=str
)
def test_what_starts_light_imports_no_torch_at_the_top(module):
    top = [
        node
        for node in ast.parse((PIPELINE / module).read_text()).body
        if isinstance(node, (ast.Import, ast.ImportFrom))
    ]
    names = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
    names |= {
        node.module or "" for node in top if isinstance(node, ast.ImportFrom) and not node.level
    }
    assert not {name.split(".")[0] for name in names} & {"torch", "timm"}
