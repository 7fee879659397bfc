"""What a run says it needs before the first write, and where that is too little."""

import shutil
from collections import namedtuple

import pytest
from helpers_dataset import make_data

from pipeline import preflight
from pipeline.competition.targets import COLUMNS
from pipeline.learning.backbone import check_weights
from pipeline.run import layout, room
from pipeline.run.presets import load_config
from pipeline.run.stage import Options, Stage
from pipeline.slices.preview import BLOCK, ROW_BYTES, sizes
from pipeline.slices.sources import look_at
from pipeline.slices.stage import convert_dicom, tasks_of
from pipeline.system.errors import InputError
from pipeline.voco.stage import pretrain_voco2d
from pipeline.volumes.stage import build_volumes

Usage = namedtuple("Usage", "total used free")
CONFIG = load_config("smoke", ["phantom=null", "train.slice_loss=0"])


@pytest.fixture
def disk(monkeypatch):
    """Set the free bytes of the disk."""
    real = shutil.disk_usage

    def there(free: int) -> None:
        monkeypatch.setattr(
            room.shutil,
            "disk_usage",
            lambda path: real(path) if str(path) == "/dev/shm" else Usage(0, 0, free),
        )

    return there


def on_disk(folder) -> int:
    """Bytes of a folder's files, in whole blocks of the file system."""
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return sum(-(-size // BLOCK) * BLOCK for size in sizes)


@pytest.mark.slow
def test_the_disk_that_is_needed_is_told_within_15_percent(tmp_path):
    data = make_data(tmp_path / "data", patients=14, slices=12, unlabelled=3)
    stage = Stage(layout.SLICES, CONFIG, Options(data=data, out=tmp_path / "out", jobs=1))
    _, tasks = tasks_of(stage)
    series = list(zip(tasks, look_at(tasks, data), strict=True))
    told = sizes(series, data, CONFIG.convert)
    assert told.slices == 17 * 12
    slices = convert_dicom(CONFIG, data=data, out=tmp_path / "out", jobs=1)
    pictures = [path.stat().st_size for path in slices.rglob("*.png")]
    used = sum(-(-size // BLOCK) * BLOCK for size in pictures)
    assert told.png_bytes - ROW_BYTES * told.slices == pytest.approx(used, rel=0.15)
    volumes = build_volumes(CONFIG, data=data, out=tmp_path / "out", jobs=1)
    told = room.volume_bytes(CONFIG.volume, 17)
    assert told == pytest.approx(on_disk(volumes), rel=0.3)  # volumes of 27 KB: blocks count


@pytest.mark.parametrize(("stage", "what"), [("01", layout.SLICES), ("02", layout.VOLUMES)])
def test_too_little_disk_is_one_line_before_the_first_write(tmp_path, disk, stage, what):
    data, out = make_data(tmp_path / "data"), tmp_path / "out"
    where = {"data": data, "out": out, "jobs": 1}
    run = {"01": convert_dicom, "02": build_volumes}[stage]
    if stage == "02":
        convert_dicom(CONFIG, **where)
    disk(5000)
    with pytest.raises(InputError) as refusal:
        run(CONFIG, **where)
    text = str(refusal.value)
    assert text.startswith(f"{what} needs about 0.")
    assert " MB of disk, 0.0 MB are free, " in text
    assert text.endswith("make room or choose another --out, or try data.limit=10 first")
    assert not (out / what).exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "keys"),
    [(convert_dicom, []), (build_volumes, []), (build_volumes, ["convert.keep_png=false"])],
)
def test_too_little_disk_for_what_is_new_leaves_what_is_finished(tmp_path, disk, run, keys):
    config = load_config("smoke", ["phantom=null", *keys])
    data, out = make_data(tmp_path / "data"), tmp_path / "out"
    where = {"data": data, "out": out, "jobs": 1}
    convert_dicom(config, **where)
    folder = run(config, **where)
    make_data(data, patients=5)
    if run is build_volumes:
        convert_dicom(config, **where)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    disk(5000)
    with pytest.raises(InputError, match="MB of disk, 0.0 MB are free, "):
        run(config, **where)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_too_little_memory_is_one_line(tmp_path, monkeypatch):
    data = make_data(tmp_path / "data")
    monkeypatch.setattr(room.Room, "here", classmethod(lambda cls: cls(2, 400_000_000, None)))
    with pytest.raises(InputError, match="needs about 0.7 GB of memory, 0.4 GB are free.*--jobs"):
        convert_dicom(CONFIG, data=data, out=tmp_path / "out", jobs=2)


def test_what_is_there_already_needs_nothing(tmp_path, disk, capfd):
    data, out = make_data(tmp_path / "data"), tmp_path / "out"
    where = {"data": data, "out": out, "jobs": 1}
    convert_dicom(CONFIG, **where)
    disk(5000)
    (out / layout.SLICES / layout.INDEX).unlink()
    convert_dicom(CONFIG, **where)
    assert "of disk" not in capfd.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_checkpoints_need_what_they_take(smoke, tmp_path, disk):
    out = tmp_path / "run"
    shutil.copytree(smoke / layout.VOLUMES, out / layout.VOLUMES)
    disk(1_000_000)
    with pytest.raises(InputError, match="04_voco2d needs about .* MB of disk.*pretrain.keep"):
        pretrain_voco2d("smoke", out=out, device="cpu", jobs=2)
    one = (smoke / layout.VOCO / "last.ckpt").stat().st_size
    stage = Stage(layout.VOCO, load_config("smoke"), Options(out=out))
    assert preflight._checkpoints(stage.config) == pytest.approx(5 * one, rel=0.15)


def test_imagenet_weights_are_a_file_a_cache_or_the_hub(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="no such weights, model.weights=.*nowhere"):
        check_weights("resnet18", str(tmp_path / "nowhere"))
    (tmp_path / "w.safetensors").touch()
    check_weights("resnet18", str(tmp_path / "w.safetensors"))

    def out_of_reach(*_: object, **__: object) -> None:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", out_of_reach)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    with pytest.raises(InputError, match=r"ImageNet weights of resnet18 are out of reach \(Name"):
        check_weights("resnet18", None)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: "/a/file")
    check_weights("resnet18", None)
    monkeypatch.undo()
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda *_, **__: None)
    check_weights("resnet18", None)


def test_a_whole_run_is_looked_at_before_its_first_stage(tmp_path, disk, capfd, monkeypatch):
    data, out = make_data(tmp_path / "data"), tmp_path / "out"
    flags = ["--config", "smoke", "--data", str(data), "--out", str(out), "--jobs", "1"]
    flags.append("train.slice_loss=0")
    assert preflight.main(flags) == 0
    assert "this run: needs about " in capfd.readouterr().err
    monkeypatch.setattr("pipeline.learning.backbone.check_weights", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        preflight.main([*flags, "pretrain.init=imagenet"])
    disk(5000)
    assert preflight.main(flags) == 2
    assert "error: this run needs about " in capfd.readouterr().err
    assert preflight.main([*flags, "train.epoch=3"]) == 2
    assert not out.exists()


def test_slice_labels_that_are_missing_are_told_before_the_first_write(tmp_path):
    data, out = make_data(tmp_path / "data"), tmp_path / "out"
    (data / "image_level_labels.csv").unlink(missing_ok=True)
    config = load_config("smoke", ["phantom=null", "train.slice_loss=0.5"])
    with pytest.raises(InputError, match="train.slice_loss needs slice labels"):
        preflight.check(Stage(layout.SLICES, config, Options(data=data, out=out)))
    assert not out.exists()


@pytest.mark.parametrize(
    "key", ["train.regions=organs", "train.visible_loss=1", "train.dice_loss=1"]
)
def test_organ_masks_that_are_missing_are_told_before_the_first_write(tmp_path, key, caplog):
    data, out = make_data(tmp_path / "data"), tmp_path / "out"
    config = load_config("smoke", ["phantom=null", "train.slice_loss=0", key])
    stage = Stage(layout.SLICES, config, Options(data=data, out=out))
    with pytest.raises(InputError, match="need organ masks: there are none, .*segmentations"):
        preflight.check(stage)
    assert not out.exists()
    series = stage.series()["series_id"][0]
    (data / "segmentations").mkdir(exist_ok=True)
    (data / "segmentations" / f"{series}.nii.gz").touch()
    (data / "segmentations" / "999999.nii.gz").touch()
    with caplog.at_level("INFO", "voco2d"):
        preflight.check(stage)
    # stage 05 warns of the one that is of no series, once
    assert not any("warning" in line for line in caplog.messages)


def test_a_phantom_without_masks_is_told_before_it_is_drawn(tmp_path):
    config = load_config("smoke", ["phantom.masks=0", "train.visible_loss=1"])
    with pytest.raises(InputError, match="need organ masks: there are none, .*phantom.masks=0"):
        preflight.check(Stage(layout.SLICES, config, Options(out=tmp_path / "out")))


def add_test(data, old: str, new: str) -> None:
    """Tables of one test patient, with `new` in the place of `old`."""
    header, values = ",".join(["patient_id", *COLUMNS]), ",".join(["0.5"] * len(COLUMNS))
    for name, text in (
        ("sample_submission.csv", f"{header}\n201,{values}\n"),
        ("test_series_meta.csv", "patient_id,series_id\n201,301\n"),
    ):
        (data / name).write_text(text.replace(old, new, 1))


def change(data, name: str, old: str, new: str) -> None:
    text = (data / name).read_text()
    assert old in text
    (data / name).write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("fault", "keys", "message"),
    [
        (lambda data: (data / "train.csv").unlink(), [], "train.csv"),
        (
            lambda data: change(data, "train.csv", "liver_low", "liver_lo"),
            [],
            "column 'liver_low' is missing, .*train.csv row 1, rename 'liver_lo'",
        ),
        (
            lambda data: change(data, "train.csv", "101,1", "101,2"),
            [],
            "train.csv row 2 column bowel_healthy",
        ),
        (lambda data: None, ["folds.count=3"], "4 patients are too few for 3 folds"),
        (lambda data: None, ["folds.by=hospital"], "column 'hospital' is missing"),
        (
            lambda data: None,
            ["train.positive_slices=0.5"],
            "train.slice_loss needs slice labels, .*image_level_labels.csv",
        ),
        (
            lambda data: (data / "image_level_labels.csv").write_text(
                "patient_id,series_id,instance_number,injury_name\n101,901,1,xx\n"
            ),
            ["train.slice_loss=1"],
            "'xx' is no injury name.*row 2",
        ),
        (
            lambda data: add_test(data, "kidney_low", "kidney_lo"),
            [],
            "column 'kidney_low' is missing, .*sample_submission.csv row 1, rename 'kidney_lo'",
        ),
        (
            lambda data: add_test(data, "series_id", "series"),
            [],
            "column 'series_id' is missing, .*test_series_meta.csv row 1",
        ),
        (
            lambda data: None,
            ["pretrain.labelled=false"],
            "pretrain.labelled=false leaves unlabelled/ alone",
        ),
        (lambda data: None, ["model.backbone=resnt50"], "no such timm model, .*did you mean"),
        pytest.param(
            lambda data: None,
            ["model.backbone=vgg11", "pretrain.image_size=48"],
            r"takes no crops of 24 x 24 pixels, .*set pretrain.image_size to 64 \(crops of 32\)",
            marks=pytest.mark.slow,
        ),
        (
            lambda data: None,
            ["model.backbone=test_vit", "pretrain.image_size=64", "train.image_size=40"],
            r"test_vit takes no images of 40 x 40 pixels, .*, train.image_size=40, set it to 32 or",
        ),
        (
            lambda data: None,
            [
                "model.backbone=test_vit",
                "pretrain.image_size=64",
                "organs.enabled=true",
                "organs.image_size=40",
            ],
            r"test_vit takes no images of 40 x 40 pixels, .*, organs.image_size=40, set it to 32",
        ),
        (
            lambda data: None,
            ["model.backbone=resnt50", "pretrain.init=imagenet"],
            "no such timm model, model.backbone=resnt50, did you mean",
        ),
    ],
)
def test_what_a_later_stage_would_refuse_is_told_before_the_first_write(
    tmp_path, fault, keys, message
):
    data, out = make_data(tmp_path / "data"), tmp_path / "out"
    fault(data)
    config = load_config("smoke", ["phantom=null", "train.slice_loss=0", *keys])
    with pytest.raises(InputError, match=message):
        preflight.check(Stage(layout.SLICES, config, Options(data=data, out=out)))
    assert not out.exists()


def test_a_recipe_without_data_says_so_first(tmp_path):
    config = load_config("kaggle")
    with pytest.raises(InputError, match="no data, config 'kaggle' has no phantom, give --data"):
        preflight.check(Stage(layout.SLICES, config, Options(out=tmp_path / "out")))
