"""The command line and presets: flags, names, and which keys make a result another one."""

import subprocess

import pytest
from helpers_stages import ROOT

from pipeline.artifacts import Stage
from pipeline.command import parser
from pipeline.config import LABOUR, decisive
from pipeline.presets import load_config
from pipeline.runtime import InputError


def stage(tmp_path, *overrides):
    return Stage("05_folds", load_config("smoke", overrides), parser("05", "").parse_args(["--out", str(tmp_path)]))


@pytest.mark.parametrize("section", sorted(LABOUR))
def test_how_the_work_is_done_enters_no_fingerprint(tmp_path, section):
    before = stage(tmp_path).fingerprint_of({}, ["seed", section])
    assert stage(tmp_path, f"{section}.workers=3", f"{section}.compile=true").fingerprint_of({}, ["seed", section]) == before
    assert stage(tmp_path, f"{section}.lr=0.3").fingerprint_of({}, ["seed", section]) != before


def test_decisive_keys_are_all_but_those_of_labour():
    config = load_config("smoke")
    for name, keys in LABOUR.items():
        section = getattr(config, name)
        assert set(decisive(name, section)) == set(type(section).model_fields) - set(keys)
    assert decisive("seed", config.seed) == config.seed


@pytest.mark.parametrize("jobs", ["-1", "0"])
def test_jobs_of_0_and_less_mean_all_cores(tmp_path, jobs):
    options = parser("01", "").parse_args(["--out", str(tmp_path), "--jobs", jobs])
    assert Stage("01_slices", load_config("smoke"), options).jobs >= 1
    assert options.jobs == 0


def test_only_a_presets_own_path_falls_back_on_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config("pipeline/configs/paper.yaml").name == load_config("paper").name == "paper"
    with pytest.raises(InputError, match="no such config, elsewhere/paper.yaml"):
        load_config("elsewhere/paper.yaml")


@pytest.mark.parametrize("name", ["../x", "", ".hidden", "a b"])
def test_a_config_name_is_a_plain_folder_name(name):
    with pytest.raises(InputError, match="key 'name'"):
        load_config("smoke", [f"name='{name}'"])


def test_help_of_the_whole_run_installs_nothing():
    done = subprocess.run([ROOT / "run_all.sh", "--help"], capture_output=True, text=True, check=True, env={"PATH": "/usr/bin:/bin"})
    assert "--verify" in done.stdout
    assert not done.stderr
