"""Folders that others have touched: artifacts gone, cut or altered, manifests of another version,
second runs, dead workers, clocks.
"""

import fcntl
import json
import os
import signal
import socket
import time
from pathlib import Path

import polars as pl
import pytest
from helpers_faults import (
    FOLDERS,
    PATIENCE_S,
    alive,
    copy,
    end,
    go_on,
    plain_lines,
    products,
    refused,
    run,
    run_here,
    start,
    temporaries,
    wait_for,
)
from helpers_stages import content

from pipeline.learning.optimise import check_finite
from pipeline.run import layout, verify
from pipeline.run.command import main
from pipeline.run.manifest import digest, read_manifest
from pipeline.run.presets import load_config
from pipeline.run.stage import Options, Stage, stage_function
from pipeline.system.errors import InputError
from pipeline.system.files import atomic_folder
from pipeline.system.machine import peak_mb


@pytest.fixture
def out(smoke, tmp_path) -> Path:
    """A copy of the finished run that a test may damage."""
    return copy(smoke, tmp_path / "run")


def first(folder: Path, pattern: str) -> Path:
    return sorted(folder.glob(pattern))[0]


def rewrite(path: Path, **changes: object) -> None:
    """Change keys of a manifest; None removes the key."""
    tree = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in tree.items() if value is not None}))


@pytest.mark.parametrize(
    ("stage", "pattern", "maker"),
    [
        ("02", "01_slices/index.parquet", "01_convert_dicom"),
        ("04", "02_volumes/*.npy", "02_build_volumes"),
        ("06", "04_voco2d/backbone.safetensors", "04_pretrain_voco2d"),
        ("08", "07_oof/calibration.json", "07_score_oof"),
    ],
)
def test_an_artifact_of_an_earlier_stage_that_is_gone_or_cut_is_refused_by_name(
    out, stage, pattern, maker
):
    path = first(out, pattern)
    whole = path.read_bytes()
    for damage in (lambda: path.unlink(), lambda: path.write_bytes(whole[:-7])):
        damage()
        refused(
            *run_here(stage, out),
            "is missing or has another size",
            str(path),
            f"run stages/{maker}.py again",
        )
    # the sums of the smoke run's two threads
    more = ("--jobs", "2") if maker == "04_pretrain_voco2d" else ()
    assert run_here(maker[:2], out, *more)[0] == 0
    assert path.read_bytes() == whole, "the stage that makes it mends it"


@pytest.mark.parametrize("stage", ["06", "09"])
def test_a_table_that_is_refused_leaves_what_is_finished(out, stage):
    table = out / layout.PHANTOM / "image_level_labels.csv"
    table.write_text(table.read_text().replace("Bowel", "Bowle", 1))
    folder = out / FOLDERS[stage]
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    more = ("train.slice_loss=0.5", "train.epochs=3") if stage == "06" else ()
    refused(*run_here(stage, out, *more), "'Bowle' is no injury name", "image_level_labels.csv row")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_slice_that_is_gone_or_cut_is_refused_by_name(out):
    index = pl.read_parquet(out / layout.SLICES / "index.parquet")
    path = out / layout.SLICES / index.filter(pl.col("flags") == "")["png"][0]
    whole, picture = path.read_bytes(), content(path)
    (out / layout.VOLUMES / "index.parquet").unlink()
    for volume in (out / layout.VOLUMES).glob(f"{path.parent.parent.name}_*.npy"):
        volume.unlink()
    path.write_bytes(whole[: len(whole) // 2])
    for _ in range(2):
        refused(
            *run_here("02", out),
            "slice missing or damaged",
            str(path),
            "run stages/01_convert_dicom.py again",
        )
    assert run_here("01", out)[0] == 0
    assert (
        read_manifest(out / layout.SLICES)["counts"]["converted_now"]
        == index.filter(pl.col("series_id") == path.parent.name).height
    )
    assert content(path) == picture, "the stage that makes it mends it, and nothing else"
    assert run_here("02", out)[0] == 0


@pytest.mark.parametrize(
    "changes",
    [{"schema": 0}, {"schema": 99}, {"fingerprint": None}, {"outputs": None}, {"outputs": []}],
)
def test_a_manifest_that_is_not_ours_counts_as_none(smoke, tmp_path, changes, capfd):
    path = tmp_path / "manifest.json"
    path.write_text((smoke / layout.FOLDS / "manifest.json").read_text())
    assert read_manifest(tmp_path)
    rewrite(path, **changes)
    assert read_manifest(tmp_path) is None
    assert str(path) in capfd.readouterr().err


def test_a_stage_with_a_manifest_of_another_version_runs_again(out):
    path = out / layout.FOLDS / "manifest.json"
    rewrite(path, schema=0)
    code, text = run_here("07", out)
    refused(code, text, "03_folds is missing or unfinished", "run stages/03_make_folds.py first")
    assert str(path) in text
    code, text = run_here("03", out)
    assert code == 0, text
    assert "up to date" not in text
    assert read_manifest(path.parent)


def test_a_half_written_manifest_counts_as_none(tmp_path):
    (tmp_path / "manifest.json").write_text('{"schema": 1, "fingerp')
    assert read_manifest(tmp_path) is None


def test_a_killed_redo_leaves_nothing_that_looks_finished(smoke, out, tmp_path):
    process = start("03", out, "folds.count=3", fault=f"pause:{tmp_path / 'mark'}:folds.csv.tmp-")
    wait_for(tmp_path / "mark", process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=PATIENCE_S)
    assert temporaries(out), "the kill was inside a write"
    refused(*run_here("07", out), "03_folds is missing or unfinished")
    assert run_here("03", out)[0] == 0
    assert products(out) == products(smoke)


def test_a_rerun_removes_what_a_killed_run_left(smoke, tmp_path):
    """Also beside the folder: the phantom is made as a whole folder under a temporary name."""
    out = tmp_path / "run"
    process = start("00", out, fault=f"pause:{tmp_path / 'mark'}:.dcm")
    wait_for(tmp_path / "mark", process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=PATIENCE_S)
    assert temporaries(out)
    assert run_here("00", out)[0] == 0
    assert not temporaries(out)
    made = products(out)
    assert made == {name: one for name, one in products(smoke).items() if name in made}


def test_a_volume_does_not_vouch_for_another_config(smoke, tmp_path, monkeypatch):
    """Killed between a volume and its sidecar: the sidecar of the volume before must be gone."""
    from pipeline.volumes import store as volume_store

    config, target = load_config("smoke").volume, tmp_path / "volumes"
    source = smoke / layout.SLICES
    build = lambda options: volume_store.build_all(source, target, options, 1)[1]  # noqa: E731
    before = build(config)
    monkeypatch.setattr(
        volume_store, "write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        build(config.model_copy(update={"aspect": "letterbox"}))
    monkeypatch.undo()
    assert build(config) == before
    assert {path.name: digest(path) for path in target.glob("*.npy")} == before


def test_a_folder_is_replaced_whole(tmp_path, monkeypatch):
    with atomic_folder(tmp_path / "series") as folder:
        (folder / "1.png").touch()
        (folder / "2.png").touch()

    def killed(path: Path, **_: object) -> None:
        if Path(path).exists():
            first(Path(path), "*").unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "series") as folder:
        (folder / "3.png").touch()
    assert not (tmp_path / "series").exists() or len(list((tmp_path / "series").iterdir())) == 2


def test_a_second_run_on_the_folder_is_refused_and_names_the_holder(out, tmp_path):
    """While a stage is made nobody else makes it, and while it is read nobody changes it."""
    process = start("07", out, "--force", fault=f"pause:{tmp_path / 'mark'}:scores.json.tmp-")
    wait_for(tmp_path / "mark", process)
    for stage, held in (("07", layout.SCORES), ("03", layout.FOLDS)):
        refused(
            *run_here(stage, out, "--force"),
            f"another run holds {held}",
            f"process {process.pid} on ",
            "choose another --out",
        )
    assert run_here("09", out, "--force")[0] == 0, "what nobody holds goes on"
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=PATIENCE_S)
    assert run_here("03", out, "--force")[0] == 0, "a killed run holds nothing"


@pytest.mark.parametrize(("stage", "part"), [("00", ".dcm"), ("01", "series.json")])
def test_a_worker_killed_by_hand_changes_nothing(smoke, tmp_path, stage, part):
    out = copy(
        smoke, tmp_path / "run", *([] if stage != "00" else [path.name for path in smoke.iterdir()])
    )
    process = start(stage, out, "--force", fault=f"pause:{tmp_path / 'mark'}:{part}")
    worker = int(wait_for(tmp_path / "mark", process))
    assert worker != process.pid
    os.kill(worker, signal.SIGKILL)
    go_on(tmp_path / "mark")
    code, text = end(process)
    assert code == 0, text
    assert "a worker process was killed" in text
    made = products(out)
    assert made == {
        name: made_before for name, made_before in products(smoke).items() if name in made
    }
    assert made


def same_command(one: int, other: int) -> bool:
    commands = [Path(f"/proc/{pid}/cmdline") for pid in (one, other)]
    return (
        all(path.exists() for path in commands)
        and commands[0].read_bytes() == commands[1].read_bytes()
    )


def test_a_killed_loader_is_one_line(out):
    """Processes that load training data are forked, so they bear the command line of their
    parent, and for longer than one that is about to become another program.
    """
    process = start("04", out, "pretrain.workers=1", "pretrain.steps=100000")

    def forked() -> set[int]:
        found = set(alive(process.pid)) - {process.pid}
        return {pid for pid in found if same_command(pid, process.pid)}

    deadline, loaders = time.monotonic() + PATIENCE_S, set()
    while not loaders and process.poll() is None and time.monotonic() < deadline:
        before = forked()
        time.sleep(0.3)
        loaders = before & forked()
    for loader in loaders:
        os.kill(loader, signal.SIGKILL)
    code, text = end(process)
    assert code == 1, text
    (line,) = plain_lines(text)
    assert line.startswith("error: a process that loads data was killed")


def test_training_that_went_wrong_is_one_line(tmp_path, monkeypatch, capfd):
    def run_stage(stage: Stage) -> None:
        check_finite(12, {"liver": float("nan"), "kidney": 0.5}, ["10004/21057"])

    monkeypatch.setattr(
        "sys.argv", ["06_train_folds.py", "--config", "smoke", "--out", str(tmp_path)]
    )
    assert main("06_train_folds.py", stage_function(layout.CLASSIFIERS)(run_stage), "") == 1
    (line,) = plain_lines(capfd.readouterr().err)
    assert line.startswith(
        "error: non-finite loss at step 12: liver nan, kidney 0.5; batch 10004/21057; the last"
        " checkpoint is kept"
    )


def test_a_clock_that_jumps_back_changes_nothing(smoke, tmp_path):
    out = copy(smoke, tmp_path / "run", layout.FOLDS)
    code, text = run("03", out, fault="clock:86400")
    assert code == 0, text
    assert products(out) == products(smoke)
    assert 0 <= read_manifest(out / layout.FOLDS)["seconds"] < 3600
    assert run_here("01", out)[0] == 0
    path = first(out, "data/phantom/train_images/*/*/*.dcm")
    os.utime(path, (0, 0))
    code, text = run_here("01", out)
    assert code == 0, text
    assert "up to date" not in text, "an older file is a change too"


def verified(out: Path, capsys: pytest.CaptureFixture) -> tuple[int, str]:
    code = verify.main(["--out", str(out)])
    return code, capsys.readouterr().out


def test_verify_names_what_differs(out, capsys):
    assert verified(out, capsys) == (0, f"{out}: whole\n")
    volume, cut, gone = (
        first(out, "02_volumes/*.npy"),
        out / layout.SCORES / "scores.json",
        out / layout.FOLDS / "folds.csv",
    )
    data = bytearray(volume.read_bytes())
    data[-1] ^= 1
    volume.write_bytes(data)
    cut.write_bytes(cut.read_bytes()[:-1])
    gone.unlink()
    rewrite(out / layout.REPORT / "manifest.json", schema=0)
    (out / layout.SUBMISSION / "manifest.json").unlink()
    code, text = verified(out, capsys)
    assert code == 1
    for path, what in (
        (volume, "same size, other contents"),
        (cut, "bytes, not"),
        (gone, "missing"),
        (out / layout.REPORT / "manifest.json", "of version"),
        (out / layout.SUBMISSION, "unfinished"),
    ):
        assert any(line.startswith(f"{path}: ") and what in line for line in text.splitlines()), (
            path,
            text,
        )
    assert "5 differences" in text


def test_verify_sees_altered_slices_and_chains(out, capsys):
    path, other = sorted((out / layout.SLICES).glob("*/*/*.png"))[:2]
    path.write_bytes(other.read_bytes())
    code, text = verified(out, capsys)
    assert code == 1
    assert f"{path}: other pixels" in text
    rewrite(out / layout.FOLDS / "manifest.json", outputs={})
    assert f"{out / '07_oof'}: made from another 03_folds" in verified(out, capsys)[1]


def test_verify_looks_at_slices_whatever_else_differs(out, capsys):
    path, other = sorted((out / layout.SLICES).glob("*/*/*.png"))[:2]
    path.write_bytes(other.read_bytes())
    (out / layout.FOLDS / "folds.csv").unlink()
    assert f"{path}: other pixels" in verified(out, capsys)[1]


def test_verify_goes_on_where_the_slice_index_is_damaged(out, capsys, monkeypatch):
    monkeypatch.setattr(verify, "SLICES_AT_ONCE", 7)
    paths = sorted((out / layout.SLICES).glob("*/*/*.png"))
    for path in (paths[0], paths[-1]):
        path.write_bytes(b"")
    text = verified(out, capsys)[1]
    assert all(f"{path}: not readable" in text for path in (paths[0], paths[-1])), (
        "in whichever part they are"
    )
    index = out / layout.SLICES / "index.parquet"
    index.write_bytes(bytes(index.stat().st_size))
    code, text = verified(out, capsys)
    assert (code, text.count(str(index))) == (1, 1)
    assert f"{index}: same size, other contents" in text


def test_the_holder_of_a_lock_is_one_that_lives(tmp_path):
    """Readers share a lock: the last of them to come may have ended long before the others."""
    stage = Stage(
        layout.CLASSIFIERS,
        load_config("smoke"),
        Options(out=tmp_path),
    )
    path = stage._lock_file(stage.name)
    path.write_text(
        f"process {os.getpid()} on elsewhere\nnonsense\nprocess 4194999 on {socket.gethostname()}\n"
    )
    with stage._held(path, fcntl.LOCK_SH), pytest.raises(InputError) as fault, stage.lock():
        pass
    assert (
        f"process {os.getpid()} on elsewhere and nonsense and process {os.getpid()} on"
        f" {socket.gethostname()}, wait" in str(fault.value)
    )
    with stage.lock():
        assert path.read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"


def test_the_peak_is_told_though_threads_end(monkeypatch):
    monkeypatch.setattr(
        Path,
        "glob",
        lambda *_: [Path("/proc/self/task/0/children"), Path("/proc/self/task/none/children")],
    )
    assert peak_mb() > 10


def test_a_phantom_that_lost_a_file_is_refused_and_names_its_maker(out):
    path = first(out, "data/phantom/train_images/*/*/*.dcm")
    path.unlink()
    code, text = run_here("01", out)
    assert code == 2
    (line,) = plain_lines(text)
    assert line.startswith("error: a file of data/phantom is missing")
    assert str(path) in line
    assert "00_make_phantom" in line


def test_run_all_verifies(out, tmp_path):
    from helpers_stages import run_all

    done = run_all(out, "--verify")
    assert (done.returncode, done.stdout) == (0, f"{out}: whole\n"), done.stderr
    done = run_all(tmp_path / "nothing", "--verify", cwd=tmp_path)
    refused(done.returncode, done.stderr, "no stage has finished here")
