"""Take each guard out of the product, one at a time, and see its test fail.

    python tests/tools/mutate.py [WORD ...]        all guards, or those whose line has one of the
    words

The product is copied, each row of GUARDS is applied to the copy (the text must be there exactly
once), its test is run, and the text put back. Exit code 0 where every test failed; a row whose test
passed is a guard that nothing watches.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STOPS, DISK, STATE, HOSTILE, TABLES = (
    f"faults/test_{name}.py::test_"
    for name in ("stops", "disk", "state", "hostile", "wrong_tables")
)
VALUES = "run/test_command.py::test_values_that_contradict_each_other_are_refused"
LOOP = "voco/test_pretrain.py::test_"
DIALECTS = "slices/test_dialects.py::test_"
HEADER, READER = (f"pipeline/slices/{name}.py" for name in ("dicom_header", "dicom"))
ARTIFACTS, COMMAND, RUNTIME, PARALLEL = (
    f"pipeline/{name}.py" for name in ("run/stage", "run/command", "system/files", "system/pool")
)

# file, text of the guard, what stands there without it, the test that must fail (below tests/)
GUARDS = (
    (
        "pipeline/ablation/dense.py",
        "np.where(spread > 1e-10 * square, np.sqrt(np.maximum(spread, 0)), np.inf)",
        "np.sqrt(np.maximum(spread, 0)) + 1e-6",
        "ablation/test_probes.py::test_a_feature_that_never_changes",
    ),
    (
        "pipeline/ablation/probe_cases.py",
        '    except InputError as fault:\n        log(f"warning: {fault}")\n        return None\n',
        "    finally:\n        pass\n",
        "ablation/test_probes.py::test_masks_that_do_not_fit",
    ),
    (ARTIFACTS, "(layout.MANIFEST, *broken)", "broken", STATE + "a_killed_redo"),
    (ARTIFACTS, "            remove_temporaries(self.folder)\n", "", STATE + "a_killed_redo"),
    (
        ARTIFACTS,
        "            remove_temporaries(self.folder.parent, of=self.folder.name)\n",
        "",
        STATE + "a_rerun_removes",
    ),
    (ARTIFACTS, ' and manifest["fingerprint"] == fingerprint', "", STATE + "a_killed_redo"),
    (ARTIFACTS, "not broken and ", "", STATE + "an_artifact[02-"),
    (
        ARTIFACTS,
        "if broken := list(filter(needed, broken_outputs(folder, manifest))):",
        "if broken := []:",
        STATE + "an_artifact[08-07",
    ),
    (
        "pipeline/run/manifest.py",
        ' or manifest.get("schema") != SCHEMA',
        "",
        STATE + "a_manifest_that[changes0]",
    ),
    (
        "pipeline/run/manifest.py",
        "if not isinstance(fingerprint, str) or",
        "if",
        STATE + "a_manifest_that[changes2]",
    ),
    (
        "pipeline/run/manifest.py",
        " or not isinstance(outputs, dict)",
        "",
        STATE + "a_manifest_that[changes4]",
    ),
    (
        "pipeline/run/manifest.py",
        "    except ValueError:\n",
        "    except KeyError:\n",
        STATE + "a_half_written",
    ),
    (ARTIFACTS, "while not try_lock(handle, kind):", "while False:", STATE + "a_second_run"),
    (ARTIFACTS, "if folder.is_relative_to(self.out):", "if False:", STATE + "a_second_run"),
    (COMMAND, "if handler != signal.SIG_IGN:", "if True:", STOPS + "an_ignored"),
    (
        COMMAND,
        "= (signal.SIGINT, signal.SIGTERM), 2.0",
        "= (signal.SIGINT,), 2.0",
        STOPS + "a_stop[07",
    ),
    (COMMAND, "if code in (130, 143):", "if False:", STOPS + "a_stop[03"),
    (
        COMMAND,
        "if isinstance(fault, (InputError, TrainingStopped)):",
        "if isinstance(fault, InputError):",
        STATE + "training_that",
    ),
    (ARTIFACTS, "with disk_errors(stage.folder), stage", "with stage", DISK + "a_read_only"),
    (
        ARTIFACTS,
        "round(time.monotonic() - self.started",
        "round(time.time() - self.started",
        STATE + "a_clock",
    ),
    (
        PARALLEL,
        "        with interrupts_blocked():\n",
        "        if True:\n",
        STOPS + "workers_do",
    ),
    (
        PARALLEL,
        '    warnings.filterwarnings("ignore"',
        '    warnings.filterwarnings("default"',
        "slices/test_damage.py::test_a_pool",
    ),
    (
        PARALLEL,
        "        except lost:\n",
        "        except ZeroDivisionError:\n",
        STATE + "a_worker[01",
    ),
    (
        PARALLEL,
        '{"initializer": end_with, "initargs": (os.getpid(),)}',
        "{}",
        "slices/test_damage.py::test_workers_that_never",
    ),
    (
        PARALLEL,
        "sorted(begun & open_tasks.keys() or open_tasks.keys())",
        "sorted(open_tasks)",
        "slices/test_damage.py::test_a_killer",
    ),
    (
        "pipeline/system/contained.py",
        "            _die_with(parent)\n",
        "            pass\n",
        "slices/test_damage.py::test_an_orphaned",
    ),
    (
        RUNTIME,
        "                _probe(temporary)\n",
        "                pass\n",
        DISK + "a_failing_write[04",
    ),
    (RUNTIME, "    errno.EFBIG:", "    -1:", DISK + "a_failing_write[03"),
    (RUNTIME, "    errno.ENOSPC:", "    -1:", DISK + "a_full_device"),
    (RUNTIME, "    errno.EROFS:", "    -1:", DISK + "a_read_only"),
    (RUNTIME, "    errno.ENOTDIR:", "    -1:", DISK + "a_file_where"),
    (
        RUNTIME,
        "            temporary.unlink(missing_ok=True)\n",
        "            pass\n",
        DISK + "a_failing_write[03",
    ),
    (
        RUNTIME,
        (
            '.{path.name}{TEMPORARY}{os.getpid()}")\n        try:\n            yield temporary\n   '
            "         with"
        ),
        '{path.name}")\n        try:\n            yield temporary\n            with',
        STATE + "a_killed_redo",
    ),
    (
        RUNTIME,
        "            remove_folder(path)\n",
        "            shutil.rmtree(path, ignore_errors=True)\n",
        STATE + "a_folder",
    ),
    (
        RUNTIME,
        "path = Path(entry.path)\n",
        "path = Path(entry.path).resolve()\n",
        HOSTILE + "a_link",
    ),
    (
        "run_all.sh",
        "trap 'stop 143' TERM\n",
        "",
        STOPS + "run_all_hands_a_stop_on_to_its_stage[15]",
    ),
    ("run_all.sh", "trap 'stop 130' INT\n", "", STOPS + "run_all_hands_a_stop_on_to_its_stage[2]"),
    (
        "pipeline/learning/side_by_side.py",
        "            _end(running)\n",
        "            pass\n",
        "classifier/test_train_folds.py::test_folds_end",
    ),
    (
        "pipeline/learning/side_by_side.py",
        "    with interrupts_blocked():\n",
        "    if True:\n",
        "classifier/test_train_folds.py::test_folds_end[2",
    ),
    (
        COMMAND,
        "        end_with(",
        "        int(",
        "classifier/test_train_folds.py::test_folds_end[9",
    ),
    (
        "pipeline/folds.py",
        'if "hospital" not in table.frame.columns:',
        "if False:",
        "test_folds.py::test_stage_03_writes",
    ),
    (
        "pipeline/folds.py",
        "(cell != cell.first().over(KEY),",
        "(cell.is_null(),",
        "test_folds.py::test_wrong_hospitals",
    ),
    (
        "pipeline/folds.py",
        "(cell.is_null() | (cell == ",
        "(cell.is_null() & (cell == ",
        "test_folds.py::test_wrong_hospitals",
    ),
    (
        "pipeline/folds.py",
        'if (absent := found.filter(pl.col("hospital").is_null())).height:',
        'if (absent := found.filter(pl.col("hospital") == "")).height:',
        "test_folds.py::test_wrong_hospitals",
    ),
    ("pipeline/folds.py", "if len(names) != count:", "if False:", "test_folds.py::test_one_fold"),
    (
        "pipeline/evaluation/baselines.py",
        "        if isinstance(row, Failure):",
        "        if False:",
        "evaluation/test_baselines.py::test_a_volume_that",
    ),
    (
        "pipeline/learning/interrupt.py",
        "                if signal.getsignal(number) != signal.SIG_IGN\n",
        "",
        STOPS + "training_leaves",
    ),
    ("pipeline/voco/pretrain.py", "StopSignal(world.size > 1)", "StopSignal()", LOOP + "two_ranks"),
    ("pipeline/voco/pretrain.py", "keep=not fresh", "keep=False", LOOP + "checkpoints_of"),
    (
        "pipeline/voco/pretrain.py",
        "(1 if last else options.collapse_patience)",
        "options.collapse_patience",
        LOOP + "a_run_that_ends",
    ),
    (
        "pipeline/learning/side_by_side.py",
        "part.current(inputs, sections, whole=False)\n",
        "pass\n",
        "classifier/test_train_folds.py::test_forced",
    ),
    (
        "pipeline/organs/work.py",
        "        _start_anew(stage, folds, inputs)\n",
        "        pass\n",
        "organs/test_stage.py::test_forced",
    ),
    (
        "pipeline/classifier/stage.py",
        "    refuse_old_organs(stage)\n",
        "",
        "submission/test_regions.py::test_organs_of_another_run_are_refused[06",
    ),
    (
        "pipeline/classifier/stage.py",
        "if stage.config.train.dice_loss and read_manifest(masks) is None:",
        "if False:",
        "classifier/test_dice.py::test_stages_05_and_06",
    ),
    (
        "pipeline/submission/inference.py",
        "if known[layout.ORGANS] != run.inputs(layout.ORGANS)[layout.ORGANS]:",
        "if False:",
        "submission/test_regions.py::test_organs_of_another_run_are_refused[08",
    ),
    (
        "pipeline/system/files.py",
        ' and mark.read_text(encoding="utf-8") == identity',
        "",
        "classifier/test_second_level.py::test_a_stopped_extraction",
    ),
    (
        "pipeline/classifier/features.py",
        "if amp and not found.isfinite().all():",
        "if False:",
        "classifier/test_second_level.py::test_what_overflows",
    ),
    (
        "pipeline/classifier/second_level.py",
        "if read_metadata(path).get(CLASSIFIER) != weights_digest(classifier):",
        "if False:",
        "classifier/test_second_level.py::test_a_fold_predicts",
    ),
    (
        "pipeline/classifier/second_level.py",
        "one if one.any() else np.ones_like(one)",
        "one",
        "classifier/test_second_level.py::test_planes_count_alike",
    ),
    (
        "pipeline/classifier/second_fold.py",
        'if state is None or state["identity"] != identity:',
        "if state is None:",
        "classifier/test_second_level.py::test_a_stopped_training",
    ),
    (
        "pipeline/submission/inference.py",
        "gated = SECOND_LEVEL in inputs and layout.ORGANS in inputs",
        "gated = False",
        "submission/test_second_level.py::test_what_is_submitted",
    ),
    (
        "pipeline/run/config.py",
        'self.regions == "organs" and (self.crop or self.crop_size),',
        "False,",
        "classifier/test_regions.py::test_keys_that_contradict",
    ),
    (
        "pipeline/classifier/predict.py",
        "if amp and not all(value.isfinite().all() for value in answer.values()):",
        "if False:",
        "submission/test_inference.py::test_what_overflows",
    ),
    (
        "pipeline/learning/loaders.py",
        'if "DataLoader worker" not in text or ("(pid" not in text and not no_room):',
        "if True:",
        STATE + "a_killed_loader",
    ),
    (
        "pipeline/learning/loaders.py",
        "    queue._on_queue_feeder_error = hook  # type: ignore[attr-defined]\n",
        "",
        "learning/test_loaders.py::test_a_loader_that_fails",
    ),
    (
        "pipeline/learning/loaders.py",
        "                waiting()\n",
        "",
        "learning/test_loaders.py::test_a_stop",
    ),
    (
        "pipeline/run/room.py",
        "            wanted = min(wanted, number)\n",
        "",
        "run/test_room.py::test_loaders",
    ),
    (
        "pipeline/learning/optimise.py",
        "if not all(math.isfinite(value) for value in terms.values()):",
        "if False:",
        STATE + "training_that",
    ),
    (
        "pipeline/learning/optimise.py",
        '        vars(self.optimiser)["found_inf"] = self._broken\n',
        "",
        "learning/test_gpu_paths.py::test_from_a_non_finite",
    ),
    (
        "pipeline/learning/optimise.py",
        "broken if self._broken is None else torch.maximum(self._broken, broken)",
        "broken",
        "learning/test_gpu_paths.py::test_from_a_non_finite",
    ),
    (
        "pipeline/learning/distributed.py",
        'if not isinstance(fault, distributed.DistError) and "/gloo/" not in str(fault):',
        "if False:",
        "learning/test_gpu_paths.py::test_only_what",
    ),
    (
        "pipeline/classifier/sequence.py",
        "with torch.autocast(x.device.type, enabled=False):",
        "if True:",
        "learning/test_gpu_paths.py::test_recurrent",
    ),
    (
        "pipeline/classifier/batches.py",
        "        for _ in range(self._held_out_due):  # of an epoch whose score nobody asked for\n"
        "            next(stream)\n",
        "",
        "classifier/test_training.py::test_an_epoch_whose",
    ),
    (
        "pipeline/voco/pretrain.py",
        "if due or stopping or not self.late:",
        "if not self.late:",
        "learning/test_gpu_paths.py::test_a_loss_that",
    ),
    (
        "pipeline/classifier/train.py",
        "        if self.stop.signum:\n",
        "        if False:\n",
        "classifier/test_training.py::test_a_stop",
    ),
    (
        "pipeline/classifier/train.py",
        '"fingerprint": self.data.fingerprint',
        '"fingerprint": ""',
        "classifier/test_training.py::test_checkpoint_of_other",
    ),
    (
        "pipeline/slices/geometry.py",
        "unplaced = ~known",
        "unplaced = known & ~known",
        "slices/test_series.py::test_a_file_without",
    ),
    (
        "pipeline/slices/geometry.py",
        "z[k] = np.nan if lone or abs(z[k]) >= FARTHEST_MM else z[k]",
        "pass",
        "slices/test_series.py::test_two_strays",
    ),
    (
        "pipeline/slices/geometry.py",
        "if np.isfinite(z).sum() < len(z) / 2:",
        "if False:",
        "slices/test_series.py::test_one_position",
    ),
    (
        "pipeline/slices/geometry.py",
        "again[axial] = _repeated(z[axial])",
        "pass",
        "slices/test_series.py::test_of_two_passes",
    ),
    (
        "pipeline/slices/geometry.py",
        "again = np.repeat(lengths >= MANY, lengths)",
        "pass",
        "slices/test_series.py::test_bolus",
    ),
    (
        "pipeline/slices/geometry.py",
        "return between & (gap <= 1.5 * np.median(np.diff(kept)))",
        "return between",
        "slices/test_series.py::test_numbers_in_no_order",
    ),
    (
        "pipeline/slices/convert.py",
        "[] if any(picture.air for picture in pictures) else [NO_AIR]",
        "[]",
        "slices/test_series.py::test_a_series_without_air",
    ),
    (
        "pipeline/slices/sources.py",
        "ignored = {*maps, *foreign, *endless}",
        "ignored = {*foreign, *endless}",
        "slices/test_series.py::test_label_maps_stay_out",
    ),
    (
        "pipeline/slices/sources.py",
        "if real in above or len(above) > DEEPEST",
        "if len(above) > DEEPEST",
        "slices/test_series.py::test_links",
    ),
    (
        "pipeline/slices/nifti.py",
        'if not image.header["qform_code"] and not image.header["sform_code"]:',
        "if False:",
        "slices/test_series.py::test_a_nifti_without",
    ),
    (
        "pipeline/slices/nifti.py",
        "    hu[nothing] = AIR_HU\n",
        "",
        "slices/test_series.py::test_nan_around",
    ),
    (
        "pipeline/volumes/build.py",
        "    if not np.isfinite(spacing_mm).all():\n",
        "    if True:\n",
        "slices/test_series.py::test_two_pixel",
    ),
    (
        "pipeline/volumes/body.py",
        "_hull(outline) if cut[k] else outline",
        "outline",
        "volumes/test_body.py::test_a_ray",
    ),
    (
        "pipeline/volumes/body.py",
        "trunk[max(0, k - near) : k + near + 1].max(0)",
        "trunk[k]",
        "volumes/test_body.py::test_the_tip",
    ),
    (
        "pipeline/volumes/body.py",
        "areas >= np.where(cut, max(least, SMALL_CUT * plane), least)",
        "areas > 0",
        "volumes/test_body.py::test_an_implausibly",
    ),
    ("pipeline/slices/sources.py", "entry.stat().st_mtime_ns", "0", STATE + "a_clock"),
    (
        "pipeline/slices/sources.py",
        "if entry.is_symlink() and outside(os.fspath(entry)):",
        "if False:",
        HOSTILE + "hostile_files",
    ),
    (
        "pipeline/slices/sources.py",
        "[] if outside(folder) else list(entries)",
        "list(entries)",
        HOSTILE + "hostile_files",
    ),
    (
        "pipeline/slices/dicom_header.py",
        "            size > max_pixels,",
        "            False,",
        HOSTILE + "hostile_files",
    ),
    (
        "pipeline/slices/dicom_header.py",
        "inflate.decompress(data[at:], max_bytes)",
        "inflate.decompress(data[at:])",
        HOSTILE + "hostile_files",
    ),
    (
        "pipeline/slices/presence.py",
        "        if out_of_reach(len(left), len(before)):",
        "        if False:",
        "slices/test_presence.py::test_nearly_all_gone",
    ),
    (
        "pipeline/slices/presence.py",
        "    if len(empty) == len(listed):",
        "    if False:",
        "slices/test_presence.py::test_none_of",
    ),
    (
        "pipeline/slices/presence.py",
        "    if slices.get(wanted):",
        "    if True:",
        "slices/test_presence.py::test_files_of_which",
    ),
    (
        "pipeline/volumes/store.py",
        "    if not any(rows):",
        "    if False:",
        "slices/test_presence.py::test_slices_of_which",
    ),
    (
        "pipeline/competition/strict_table.py",
        "floats.all() & cell.is_not_null()",
        "floats.all() & False",
        "competition/test_tables.py::test_ids_that_pandas",
    ),
    (
        "pipeline/system/console.py",
        "    except BrokenPipeError:",
        "    except ZeroDivisionError:",
        "faults/test_paths.py::test_a_reader",
    ),
    (
        ARTIFACTS,
        '        _in_utf8(self.out, "--out")\n',
        "",
        "faults/test_paths.py::test_a_folder[--out",
    ),
    (
        "pipeline/system/frames.py",
        "pl.read_parquet(handle,",
        "pl.read_parquet(path,",
        "faults/test_paths.py::test_patterns",
    ),
    (
        HEADER,
        "        (foreign, foreign),\n",
        "",
        DIALECTS + "what_is_no_ct",
    ),
    (
        HEADER,
        '    PER_FRAME: ("", "SQ"),\n',
        "",
        DIALECTS + "an_enhanced_ct",
    ),
    (
        HEADER,
        "        (h.frame_groups > 1, ",
        "        (False, ",
        DIALECTS + "several_frames",
    ),
    (HEADER, "        (h.modality_lut, ", "        (False, ", DIALECTS + "a_modality_lut"),
    (
        HEADER,
        "syntax != IMPLICIT or _looks_explicit(data, at, order)",
        "syntax != IMPLICIT",
        DIALECTS + "what_pydicom_reads",
    ),
    (
        HEADER,
        '(vr != b"UN" or _looks_explicit(data, at, order))',
        'vr != b"UN"',
        DIALECTS + "what_pydicom_reads",
    ),
    (
        HEADER,
        "        if any(map(THOUSANDS, parts)):\n            raise\n",
        "",
        DIALECTS + "a_rescaling_that",
    ),
    (
        READER,
        "stored, bits, name\n\n\ndef picture",
        "stored, depth, name\n\n\ndef picture",
        DIALECTS + "the_sign_is",
    ),
    (READER, "    if depth <= bits:\n", "    if True:\n", DIALECTS + "the_sign_is"),
    (
        READER,
        "    return frame[: at + 7] + b",
        "    return frame or frame[: at + 7] + b",
        DIALECTS + "a_lossy_jpeg",
    ),
    (
        READER,
        "    if not (whole or len(parts) > 1 and ended):\n",
        "    if not (whole or len(parts) > 1):\n",
        DIALECTS + "a_stream_that",
    ),
    (
        READER,
        " or header.length != UNDEFINED\n",
        "\n",
        DIALECTS + "fragments_may",
    ),
    (READER, "        header.slope or 1.0,", "        header.slope,", DIALECTS + "a_slope_that"),
    (
        READER,
        " if spacing and min(spacing) > 0)",
        " if spacing)",
        DIALECTS + "a_spacing",
    ),
    (
        "pipeline/slices/window.py",
        "    if pixels.padding:\n",
        "    if False:\n",
        DIALECTS + "padding_is",
    ),
    (
        "pipeline/slices/window.py",
        "    if LOW_HU < hu(value) < HIGH_HU:\n",
        "    if False:\n",
        DIALECTS + "padding_that_is_also",
    ),
    (
        "pipeline/slices/window.py",
        "        limit = value\n",
        "        pass\n",
        DIALECTS + "a_limit_that",
    ),
    (
        "pipeline/slices/geometry.py",
        "full.max() <= len(sample) / 20",
        "not enough",
        DIALECTS + "specks",
    ),
    (
        "pipeline/system/processes.py",
        'not in ("Z", "X")',
        '!= ""',
        "slices/test_damage.py::test_a_worker_that_starts",
    ),
    (
        "pipeline/system/processes.py",
        "while os.getppid() == parent if child else _is_alive(parent):",
        "while os.getppid() == parent:",
        "slices/test_damage.py::test_where_joblib",
    ),
    (
        PARALLEL,
        "    except OSError as fault:  # a task's own",
        "    except ZeroDivisionError as fault:  # a task's own",
        "slices/test_damage.py::test_a_full_dev_shm",
    ),
    (
        "pipeline/voco/pretrain.py",
        "(*run.identity, *known)",
        "run.identity",
        "voco/test_places.py::test_a_key_set_back",
    ),
    (
        "pipeline/voco/pretrain.py",
        "> max(run.best, run.floor) and",
        "> run.best and",
        "voco/test_places.py::test_the_backbone_is_one",
    ),
    (
        "pipeline/voco/pretrain.py",
        " if run.best > run.floor else None",
        "",
        "voco/test_places.py::test_a_best_that_is_none",
    ),
    (
        "pipeline/voco/data.py",
        "index.filter(kept) if excluded else index",
        "index",
        "voco/test_places.py::test_patients_of_the_fold",
    ),
    (
        "pipeline/voco/stage.py",
        ", *([layout.FOLDS] if left_out else [])",
        "",
        "voco/test_places.py::test_patients_of_the_fold",
    ),
    (
        "pipeline/run/room.py",
        "        if needed[what] > free:",
        "        if False:",
        "run/test_preflight.py::test_too_little_disk",
    ),
    (
        "pipeline/voco/pretrain.py",
        "by_time = 0 < options.checkpoint_minutes <= minutes",
        "by_time = False",
        "voco/test_pretrain.py::test_checkpoints_come_by_minutes",
    ),
    (
        "pipeline/volumes/direct.py",
        '            or (sidecar["row"] and path.stat().st_size != sidecar["bytes"])\n',
        "",
        "volumes/test_direct.py::test_only_what",
    ),
    (
        "pipeline/volumes/direct.py",
        '            found["fingerprint"] != series_fingerprint(files, convert)\n            or ',
        "            ",
        "volumes/test_direct.py::test_only_what",
    ),
    ("pipeline/report/page.py", "autoescape=True", "autoescape=False", HOSTILE + "hostile_files"),
    (
        "pipeline/learning/checkpoint.py",
        "weights_only=True",
        "weights_only=False",
        HOSTILE + "code_in",
    ),
    (
        "pipeline/learning/weights.py",
        'map_location="cpu", weights_only=True',
        'map_location="cpu", weights_only=False',
        HOSTILE + "code_in",
    ),
    (
        "pipeline/learning/weights.py",
        '"not finite": not_finite(',
        '"not finite": [] and not_finite(',
        HOSTILE + "weights_that[06",
    ),
    (
        "pipeline/learning/weights.py",
        "if state[name].shape != own[name].shape]",
        "if False]",
        HOSTILE + "weights_that[08",
    ),
    (
        "pipeline/volumes/store.py",
        '    path.with_suffix(".json").unlink(missing_ok=True)\n    cv2',
        "    cv2",
        STATE + "a_volume",
    ),
    (
        "pipeline/volumes/store.py",
        "            source.joinpath(*ids, layout.SIDECAR).unlink()",
        "            pass",
        STATE + "a_slice",
    ),
    ("pipeline/volumes/store.py", "    if image is None:\n", "    if False:\n", STATE + "a_slice"),
    (
        "pipeline/run/verify.py",
        'if digest(path) == entry["digest"] else',
        "if True else",
        STATE + "verify_names",
    ),
    (
        "pipeline/run/verify.py",
        "if isal_zlib.crc32(image) == crc32 else",
        "if True else",
        STATE + "verify_sees",
    ),
    (
        "pipeline/run/verify.py",
        'digest(made["outputs"]) != inputs[source]',
        "False",
        STATE + "verify_sees",
    ),
    (
        "pipeline/run/verify.py",
        "and name not in manifests\n",
        "and False\n",
        STATE + "verify_names",
    ),
    ("pipeline/run/config.py", 'extra="forbid"', 'extra="ignore"', TABLES + "a_mistyped"),
    (
        "pipeline/run/config.py",
        "self.channels % 2 == 0,",
        "False,",
        VALUES + "[train.channels",
    ),
    (
        "pipeline/run/config.py",
        "self.slice_weight > 1 and not self.slice_loss,",
        "False,",
        VALUES + "[train={slice_loss",
    ),
    (
        "pipeline/run/config.py",
        "(self.mixup or self.cutmix) and self.batch == 1,",
        "False,",
        VALUES + "[train={batch",
    ),
    (
        "pipeline/run/config.py",
        "self.predict.phases > most,",
        "False,",
        VALUES + "[predict.phases",
    ),
    (
        "pipeline/competition/strict_table.py",
        """"has path parts": cell.str.contains(r"[/\\\\]|\\.\\.|^\\."),""",
        "",
        HOSTILE + "ids",
    ),
    (
        "pipeline/competition/strict_table.py",
        "(~value.is_finite(), column,",
        "(pl.lit(False), column,",
        TABLES + "any_wrong_cell[oof",
    ),
    (
        "pipeline/competition/strict_table.py",
        "    table.refuse((again, columns[-1],",
        "    table.refuse((again & False, columns[-1],",
        TABLES + "a_missing",
    ),
    (
        "pipeline/competition/tables.py",
        "            (total > 1,",
        "            (total > 9,",
        TABLES + "the_stage[train.csv",
    ),
    (
        "pipeline/competition/tables.py",
        "                wrong,\n                KEY,",
        "                wrong & False,\n                KEY,",
        TABLES + "the_stage[train_series",
    ),
    (
        "pipeline/organs/masks.py",
        "if labels.shape[1:] != size:",
        "if False:",
        "organs/test_masks.py::test_masks_that_do_not_fit",
    ),
    (
        "pipeline/organs/masks.py",
        "if planes is None:",
        "if False:",
        "organs/test_masks.py::test_masks_that_do_not_fit",
    ),
    (
        "pipeline/organs/files.py",
        "if series in found:",
        "if False:",
        "organs/test_masks.py::test_two_files",
    ),
    (
        "pipeline/slices/nifti.py",
        " or found.max() > labels",
        "",
        "organs/test_masks.py::test_files_that_are_no_masks",
    ),
    (
        "pipeline/organs/train.py",
        'if state["identity"] != self._identity():',
        "if False:",
        "organs/test_training.py::test_a_checkpoint_of_another_config",
    ),
    (
        "pipeline/organs/work.py",
        "one.patient_id not in held_out",
        "True",
        "organs/test_stage.py::test_the_held_out",
    ),
    (
        ARTIFACTS,
        "layout.former(self.name)",
        "self.name",
        "run/test_former.py::test_fingerprints",
    ),
    (
        "pipeline/run/manifest.py",
        " if before.is_dir() and not (run / name).exists() else run / name",
        " if False else run / name",
        "run/test_former.py::test_models_of",
    ),
    (
        "pipeline/evaluation/calibration.py",
        "if sorted(made.get(MODELS) or [made.get(layout.CLASSIFIERS)]) != list(trained):",
        "if False:",
        "submission/test_inference.py::test_a_calibration_from",
    ),
    (
        "pipeline/run/runs.py",
        "if key in found:",
        "if False:",
        "submission/test_runs.py::test_names_of_runs",
    ),
    (
        "pipeline/run/runs.py",
        "dict(sorted(found.items()))",
        "found",
        "submission/test_runs.py::test_names_of_runs",
    ),
    (
        "pipeline/submission/inference.py",
        "if self.blend.found_no_organ():",
        "if False:",
        "submission/test_kaggle.py::test_a_series_in_which",
    ),
    (
        "pipeline/submission/inference.py",
        " and config.volume == first.volume",
        "",
        "classifier/test_train_folds.py::test_the_ensemble",
    ),
)


def apply(path: Path, guard: str, without: str) -> str:
    """Take a guard out of a file; returns the file's text before. ValueError where the guard is not
    there exactly once.
    """
    text = path.read_text()
    if text.count(guard) != 1:
        raise ValueError(f"{path}: {text.count(guard)} times {guard!r}")
    path.write_text(text.replace(guard, without))
    return text


def fails(copy: Path, test: str, smoke: Path) -> bool:
    """True where the test, named by the start of its id, runs on the copy and fails."""
    file, _, name = test.partition("::")
    name, _, case = name.partition("[")
    environment = {
        **os.environ,
        "PYTHONPATH": str(copy),
        "VOCO2D_SMOKE": str(smoke),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    pick = [sys.executable, "-m", "pytest", "--collect-only", f"tests/{file}"]
    listed = subprocess.run(
        pick, cwd=copy, env=environment, capture_output=True, text=True, check=False
    ).stdout.splitlines()
    nodes = [
        line
        for line in listed
        if line.startswith(f"tests/{file}::{name}") and f"[{case}" in line + "["
    ]
    if not nodes:
        raise ValueError(f"no test {test}: {listed[-3:]}")
    run = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *nodes]
    return (
        subprocess.run(
            run, cwd=copy, env=environment, capture_output=True, text=True, check=False, timeout=900
        ).returncode
        == 1
    )


def main() -> int:
    """Command line; returns the exit code."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument(
        "words", nargs="*", help="only guards whose file, text or test has one of these"
    )
    flags.add_argument(
        "--smoke", type=Path, help="a finished run of the smoke preset (default: one is made)"
    )
    options = flags.parse_args()
    rows = [
        row
        for row in GUARDS
        if not options.words or any(word in part for part in row for word in options.words)
    ]
    unwatched = 0
    with tempfile.TemporaryDirectory() as folder:
        copy, smoke = Path(folder) / "copy", options.smoke or Path(folder) / "smoke"
        shutil.copytree(
            ROOT,
            copy,
            ignore=shutil.ignore_patterns(".git", ".venv", "__pycache__", "outputs", "*.egg-info"),
        )
        if not options.smoke:
            command = [
                str(ROOT / "run_all.sh"),
                "--config",
                "smoke",
                "--out",
                str(smoke),
                "--jobs",
                "2",
            ]
            subprocess.run(
                command,
                env={**os.environ, "PYTHON": sys.executable},
                check=True,
                capture_output=True,
            )
        for file, guard, without, test in rows:
            before = apply(copy / file, guard, without)
            if file.endswith(".py"):  # a test that fails over broken syntax would prove nothing
                compile((copy / file).read_text(), file, "exec")
            watched = fails(copy, test, smoke)
            (copy / file).write_text(before)
            unwatched += not watched
            print(
                f"{'ok  ' if watched else 'UNWATCHED'} {file}: {' '.join(guard.split())[:70]} ->"
                f" {test}",
                flush=True,
            )
    print(
        f"{len(rows) - unwatched} of {len(rows)} guards are watched: their tests fail without them"
    )
    return 1 if unwatched else 0


if __name__ == "__main__":
    raise SystemExit(main())
