"""The command line and presets: flags, names, and which keys make a result another one."""

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_stages import ROOT
from pydantic import BaseModel, Field

from pipeline.phantom.stage import make_phantom
from pipeline.run import layout, presets
from pipeline.run.command import add_models, main, parser
from pipeline.run.config import (
    ADDED,
    HOW,
    AugmentConfig,
    Config,
    PhantomConfig,
    Section,
    TrainConfig,
    decisive,
    marked,
)
from pipeline.run.presets import load_config
from pipeline.run.stage import Options, Stage
from pipeline.system.errors import InputError


def stage(tmp_path, *overrides):
    return Stage(
        layout.CLASSIFIERS,
        load_config("smoke", overrides),
        Options(out=tmp_path),
    )


@pytest.mark.parametrize("section", ["pretrain", "train"])
def test_how_the_work_is_done_enters_no_fingerprint(tmp_path, section):
    before = stage(tmp_path).fingerprint_of({}, ["seed", section])
    how = [f"{section}.workers=3", f"{section}.compile=true"]
    assert stage(tmp_path, *how).fingerprint_of({}, ["seed", section]) == before
    assert stage(tmp_path, f"{section}.lr=0.3").fingerprint_of({}, ["seed", section]) != before


def test_decisive_keys_are_all_but_those_that_say_how():
    config = load_config("smoke")
    how = {
        "pretrain": {"workers", "compile", "activation_checkpointing"},
        "train": {"workers", "compile"},
        "volume": set(),
    }
    for name, keys in how.items():
        section = getattr(config, name)
        new = marked(type(section), ADDED)  # all at their defaults in this preset
        assert set(decisive(section)) == set(type(section).model_fields) - keys - new
    assert decisive(config.seed) == config.seed
    assert decisive(config.train)["augment"] == config.train.augment.model_dump(
        mode="json", exclude=marked(AugmentConfig, ADDED)
    )


class Grown(Section):
    """A section of which finished runs knew `old` alone."""

    old: int = 1
    new: int = Field(2, json_schema_extra=ADDED)


class Whole(Section):
    """Holds it, as `train` holds `augment`."""

    part: Grown = Grown()


def test_a_new_key_at_its_default_leaves_fingerprints_as_they_were():
    assert decisive(Grown(old=5)) == {"old": 5}
    assert decisive(Whole()) == {"part": {"old": 1}}
    assert decisive(Grown(new=3)) == {"old": 1, "new": 3}


def test_a_key_that_finished_runs_do_not_know_is_marked_as_added():
    """Without the mark every finished folder of every user would be made again."""
    known = json.loads((Path(__file__).parent / "keys_of_0.1.json").read_text())
    for name, field in Config.model_fields.items():
        section = getattr(Config(name="x", phantom=PhantomConfig()), name)
        if not isinstance(section, BaseModel) or name not in known:
            continue
        fresh = set(type(section).model_fields) - set(known[name])
        assert fresh <= marked(type(section), ADDED, HOW), (name, field)


@pytest.mark.parametrize("last", [[], ["--jobs", "1"]])
def test_overrides_may_follow_a_flag_of_several_values(monkeypatch, last):
    given = ["08", "seed=4", "--config", "smoke", "--models", "a", "./b=c", "/d=e", "train.lr=0.5"]
    monkeypatch.setattr("sys.argv", given + last)
    found = {}
    code = main("08", lambda config, **own: found.update(own, config=config), "", add_models)
    assert code == 0
    assert found["models"] == ["a", "./b=c", "/d=e"]
    assert (found["config"].seed, found["config"].train.lr) == (4, 0.5)


@pytest.mark.parametrize("jobs", ["-1", "0"])
def test_jobs_of_0_and_less_mean_all_cores(tmp_path, jobs):
    options = parser("01", "").parse_args(["--out", str(tmp_path), "--jobs", jobs])
    assert options.jobs == 0
    assert Stage(layout.SLICES, load_config("smoke"), Options(jobs=options.jobs)).jobs >= 1


def test_only_a_presets_own_path_falls_back_on_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config("pipeline/configs/paper.yaml").name == load_config("paper").name == "paper"
    with pytest.raises(InputError, match="no such config, elsewhere/paper.yaml"):
        load_config("elsewhere/paper.yaml")


@pytest.mark.parametrize(
    "override",
    ["phantom.noise_hu=2024-02-30", "seed=0b_", "train.lr=!!int x", "name=" + 5000 * "["],
)
def test_values_that_yaml_stumbles_over_are_one_line(override, tmp_path):
    with pytest.raises(InputError, match="not readable as YAML"):
        load_config("smoke", [override])
    (tmp_path / "own.yaml").write_text(override.replace("=", ": ").replace(".", "_"))
    with pytest.raises(InputError, match="not readable as YAML"):
        load_config(tmp_path / "own.yaml")


def test_a_preset_adds_to_and_replaces_the_keys_of_its_base(tmp_path):
    own, above = tmp_path / "own.yaml", tmp_path / "above.yaml"
    above.write_text("{base: demo, seed: 3, train: {epochs: 5, augment: {probability: 0.1}}}")
    own.write_text(f"{{base: {above}, train: {{epochs: 6}}}}")
    found, demo = load_config(own), load_config("demo")
    assert (found.name, found.seed, found.train.epochs) == ("own", 3, 6)
    assert found.train.slices == demo.train.slices
    assert found.train.augment.probability == 0.1
    assert found.train.augment.scale == TrainConfig().augment.scale, "replaced whole"
    assert found.pretrain == demo.pretrain
    above.write_text(f"{{base: {own}}}")
    with pytest.raises(InputError, match="its own base"):
        load_config(own)
    above.write_text("{base: nowhere}")
    with pytest.raises(InputError, match="no such config"):
        load_config(own)


def test_a_config_that_may_not_be_read_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "own.yaml").touch()

    def forbidden(*_: object, **__: object) -> str:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_text", forbidden)
    with pytest.raises(
        InputError,
        match=r"the config cannot be read \(Permission denied\), .*own.yaml, mend its permissions",
    ):
        load_config(tmp_path / "own.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.crop=0.497", "leaves nothing of volume.height"),
        ("train.crop_size=49", "train.crop_size=49 is more than the 48 pixels"),
        ("train.lr_final=0.1", "lr_final=0.1 is more than lr=0.0002"),
        ("predict.flips=[w]", "key 'predict.flips.0'"),
        ("train.channels=2", "channels=2 is even"),
        ("pretrain.compile=max", "or 'reduce-overhead', key 'pretrain.compile' of"),
        ("train={slice_loss: 0, slice_weight: 2}", "slice_weight=2.0 weights a loss that is off"),
        ("train={batch: 1, mixup: 0.4}", "mix the volumes of a batch: batch=1 has one"),
        ("train={batch: 1, cutmix: 1}", "mix the volumes of a batch: batch=1 has one"),
        ("predict.phases=4", "predict.phases=4 is more than 3, with which train.slices=4"),
        ("train.rarity=2", "key 'train.rarity'"),
        (
            "train={regions: organs, slices: 4, abdomen_slices: 99}",
            "train.abdomen_slices=99 is more than vol",
        ),
        ("predict.flips=[xx]", "key 'predict.flips.0'"),
        ("predict.flips=['']", "key 'predict.flips.0'"),
        ("pretrain={slices: 9, depth: 8}", "pretrain.slices=9 is more than pretrain.depth=8"),
        ("ablation.seeds=[1, 1]", "seeds must be distinct"),
        (
            "ablation={variants: {a: {}, b: {train: {init: scratch}}}, reference: a}",
            "'train' would set all keys of a section",
        ),
        (
            "ablation={variants: {a: {}, b: {train.augment: {flip_y: true}}}, reference: a}",
            "'train.augment' would set all keys",
        ),
    ],
)
def test_values_that_contradict_each_other_are_refused(override, message):
    with pytest.raises(InputError, match=message):
        load_config("smoke", [override])


@pytest.mark.parametrize("key", ["regions=organs", "visible_loss=1", "dice_loss=1"])
def test_what_needs_organs_is_refused_at_once_without_their_stage(key):
    with pytest.raises(InputError, match=r"need stage 05: set organs\.enabled=true"):
        load_config("smoke", ["organs.enabled=false", f"train.{key}"])


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan"])
@pytest.mark.parametrize("key", ["train.dice_loss", "pretrain.lr", "train.dropout"])
def test_no_key_is_infinite_or_nan(key, value):
    with pytest.raises(InputError, match=f"finite number, key .{key}."):
        load_config("smoke", [f"{key}={value}"])


@pytest.mark.parametrize("name", ["../x", "", ".hidden", "a b"])
def test_a_config_name_is_a_plain_folder_name(name):
    with pytest.raises(InputError, match="key 'name'"):
        load_config("smoke", [f"name='{name}'"])


def test_help_of_the_whole_run_installs_nothing():
    done = subprocess.run(
        [ROOT / "run_all.sh", "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": "/usr/bin:/bin"},
    )
    assert "--verify" in done.stdout
    assert not done.stderr


@pytest.mark.parametrize("script", ["run_all.sh", "tests/run.sh"])
def test_a_system_other_than_linux_is_refused_in_one_line(script, tmp_path):
    (tmp_path / "uname").write_text("#!/bin/sh\necho Darwin\n")
    (tmp_path / "uname").chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "PYTHON": sys.executable}
    done = subprocess.run([ROOT / script], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: VoCo2D runs on Linux and WSL, this is Darwin")


def test_every_key_is_listed_with_its_meaning_as_an_override_that_says_the_same(capsys):
    assert presets.main(["paper"]) == 0
    lines = capsys.readouterr().out.splitlines()
    given, meanings = zip(*(line.split("  ", 1) for line in lines), strict=True)
    assert all(meaning.strip() for meaning in meanings)
    assert load_config("demo", [one.strip() for one in given]) == load_config("paper")
    assert presets.main(["paper", "augment.flip"]) == 0
    assert [line.partition("=")[0] for line in capsys.readouterr().out.splitlines()] == [
        f"train.augment.flip_{axis}" for axis in "xyz"
    ]
    assert presets.main(["papre"]) == 2
    assert capsys.readouterr().err.startswith("error: no such config, papre")


def test_a_key_that_is_there_twice_is_refused(tmp_path):
    """YAML's own reader keeps the last, and drops the keys of the first without a word."""
    path = tmp_path / "own.yaml"
    path.write_text("base: smoke\ntrain: {epochs: 9}\ntrain: {batch: 2}\n")
    with pytest.raises(InputError, match=r"own.yaml: key 'train' is there twice.*line 3"):
        load_config(path)
    path.write_text("base: smoke\nx: &x {epochs: 9}\ntrain: {<<: *x, epochs: 3}\n")
    with pytest.raises(InputError, match="unknown config key 'x'"):
        load_config(path)  # a merge key is no second one


def test_a_base_that_is_not_there_names_who_wants_it(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("base: smok\n")
    with pytest.raises(InputError, match=r"no such config, smok, base of .*own.yaml, give"):
        load_config(path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ablation.seeds=3", r"the value is no list, key 'ablation.seeds' .* such as \[1, 2\]"),
        ("predict.flips=x", "the value is no list, key 'predict.flips'"),
        ("train=3", "the value is no section of keys, key 'train'"),
    ],
)
def test_a_value_of_another_shape_is_named_in_the_words_of_yaml(override, message):
    with pytest.raises(InputError, match=message):
        load_config("smoke", [override])


def test_a_lone_override_is_one():
    assert load_config("smoke", "train.epochs=1").train.epochs == 1


def test_a_word_that_is_in_no_key_is_answered_with_the_nearest(capsys):
    assert presets.main(["smoke", "train.epochz"]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err == "error: no key has 'train.epochz' in it, smoke, did you mean 'train.epochs'?\n"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"device": "gpu"}, "no such device, device='gpu', give one of auto, cpu, cuda"),
        ({"jobs": "2"}, "no whole number, jobs='2', give one, 0: all cores"),
        ({"config": {"train": {}}}, "a dict is no config, .* give a preset's name, a YAML file"),
    ],
)
def test_what_a_notebook_gives_is_checked_as_flags_are(tmp_path, given, message):
    with pytest.raises(InputError, match=message):
        make_phantom(**{"config": "smoke", "out": tmp_path / "out", **given})
    assert not (tmp_path / "out").exists()
