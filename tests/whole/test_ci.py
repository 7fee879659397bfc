"""Continuous integration: its files parse, and it runs the Python versions that are supported."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
GITHUB = ROOT / ".github"
WORKFLOW = yaml.safe_load((GITHUB / "workflows" / "ci.yml").read_text())
PYPROJECT = (ROOT / "pyproject.toml").read_text()


def supported() -> set[str]:
    """The Python versions of pyproject.toml, `3.10` and so on."""
    low, high = re.search(r'^requires-python = ">=3\.(\d+),<3\.(\d+)"', PYPROJECT, re.M).groups()
    return {f"3.{minor}" for minor in range(int(low), int(high))}


def steps(job: dict, action: str) -> list[dict]:
    """The steps of a job that use an action."""
    return [step for step in job["steps"] if step.get("uses", "").startswith(f"{action}@")]


def test_the_workflow_runs_every_supported_python():
    run = set()
    for job in WORKFLOW["jobs"].values():
        (setup,) = steps(job, "actions/setup-python")
        version = setup["with"]["python-version"]
        run |= set(job["strategy"]["matrix"]["python"]) if "matrix" in version else {version}
    assert run == supported()


def test_the_environment_takes_every_supported_python_and_no_other():
    text = (ROOT / ".ci" / "environment.sh").read_text()
    assert set(re.findall(r"python(3\.\d+)\b", text)) == supported()
    low, high = re.search(r"\(3, (\d+)\) <= sys.version_info\[:2\] <= \(3, (\d+)\)", text).groups()
    assert {f"3.{minor}" for minor in range(int(low), int(high) + 1)} == supported()


def test_the_workflow_may_only_read_and_ends_by_itself():
    assert WORKFLOW["permissions"] == {"contents": "read"}
    assert WORKFLOW["concurrency"]["cancel-in-progress"] is True
    for job in WORKFLOW["jobs"].values():
        assert job["timeout-minutes"] <= 90
        actions = [step["uses"] for step in job["steps"] if "uses" in step]
        assert all(re.fullmatch(r"actions/[\w-]+@v\d+", action) for action in actions)


def test_what_the_workflow_calls_is_there_and_executable():
    commands = [step["run"] for job in WORKFLOW["jobs"].values() for step in job["steps"][2:]]
    scripts = {name for text in commands for name in re.findall(r"[\w./]*(?:\.sh|\.ci/run)", text)}
    assert len(scripts) == 4
    assert all((ROOT / name).is_file() for name in scripts)
    assert all((ROOT / name).stat().st_mode & 0o100 for name in scripts if name.startswith("./"))


def test_dependabot_looks_after_both_lists():
    updates = yaml.safe_load((GITHUB / "dependabot.yml").read_text())["updates"]
    assert {one["package-ecosystem"] for one in updates} == {"pip", "github-actions"}
    assert all(one["schedule"]["interval"] == "weekly" for one in updates)


@pytest.mark.parametrize("path", sorted((GITHUB / "ISSUE_TEMPLATE").glob("*.yml")), ids=str)
def test_issue_forms_have_what_they_need(path):
    form = yaml.safe_load(path.read_text())
    if path.name == "config.yml":
        return
    assert form["name"]
    assert form["description"]
    ids = [part["id"] for part in form["body"] if part["type"] != "markdown"]
    assert len(ids) == len(set(ids)) > 0
    assert all(part["attributes"].get("label", part["type"] == "markdown") for part in form["body"])


def test_the_hooks_before_a_commit_use_the_versions_of_the_tests():
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    (rev,) = [one["rev"] for one in repos if one["repo"].endswith("ruff-pre-commit")]
    assert f'"ruff>={rev.lstrip("v").rpartition(".")[0]},<' in PYPROJECT
