"""Imports go only downward: a module knows those of lower floors and of its own, never a higher one."""

import ast
from pathlib import Path

import pytest

PIPELINE = Path(__file__).resolve().parents[1] / "pipeline"
FLOORS = (
    {"targets", "config", "presets", "runtime", "artifacts", "command", "verify"},
    {"dicom", "dicom_header", "series", "nifti", "parallel", "sources", "convert", "slice_store", "volume", "volume_store", "decode_ahead"}
    | {"folds", "tables", "metric", "metric_extra", "ablation_stats", "phantom_canvas", "phantom_injuries", "phantom", "phantom_dicom"},
    {"crops", "augment", "datasets", "fold_data", "voco_data"},
    {"weights", "layers", "backbone", "voco", "losses", "classifier"},
    {"checkpoint", "engine", "prediction", "training", "distributed", "pretrain", "side_by_side"},
    {"inference", "ablation", "probes", "calibration", "scoring", "figures", "submission", "voco_figures"}
    | {"report", "report_figures", "report_ablation"},
)
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}
MODULES = sorted(path.stem for path in PIPELINE.glob("*.py") if path.stem != "__init__")


def imported(name: str) -> set[str]:
    """Names of the project's modules that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse((PIPELINE / f"{name}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            found |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pipeline"):
            found |= {node.module.partition(".")[2].split(".")[0]} if "." in node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("pipeline.")}
    return found & set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_module_imports_only_downward(name):
    assert name in FLOOR, f"say in FLOORS where {name} belongs"
    above = [other for other in imported(name) if FLOOR[other] > FLOOR[name]]
    assert not above, f"{name} (floor {FLOOR[name]}) imports {above} from above"


@pytest.mark.parametrize("name", [name for name in MODULES if FLOOR.get(name, 9) <= 1])
def test_low_floors_know_no_torch_when_imported(name):
    tree = ast.parse((PIPELINE / f"{name}.py").read_text())
    top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in top if isinstance(node, ast.ImportFrom) and not node.level}
    assert not any(name and name.split(".")[0] in ("torch", "timm") for name in names)
