"""The phantom: anatomy, injuries, files, tables, and that nothing but the injury gives a label
away.
"""

import csv
import hashlib
import json
import os
import subprocess
import sys
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest
from scipy import ndimage

from pipeline.competition import tables
from pipeline.competition.targets import COLUMNS, TARGETS
from pipeline.phantom.anatomy import extent, make_scan
from pipeline.phantom.canvas import Canvas
from pipeline.phantom.dataset import FOLDERS, write_dataset
from pipeline.phantom.hospitals import HOSPITALS, noise, sub_planes
from pipeline.phantom.plan import (
    FAULTS,
    HEADERS,
    ODDS_RATIOS,
    PREVALENCE,
    STORAGE,
    SYNTAXES,
    draw_labels,
    joint_table,
    make_plan,
)
from pipeline.phantom.tissues import PHASES
from pipeline.run.config import PhantomConfig

ROOT = Path(__file__).resolve().parents[2]
SMALL = PhantomConfig(
    train_patients=24,
    test_patients=3,
    unlabelled_patients=5,
    image_size=64,
    slices_min=12,
    slices_max=15,
    masks=0.4,
)
SHARP = SMALL.model_copy(update={"image_size": 128, "noise_hu": 4.0})
HEALTHY = dict.fromkeys(("bowel", "extravasation", "kidney", "liver", "spleen"), 0)
SEED = 5


def silent(items, total):
    return items


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("phantom")
    counts, names = write_dataset(SMALL, SEED, root, 1, silent)
    return root, counts, names


@pytest.fixture(scope="module")
def series():
    """(patient, series number, plan of the series) of everything that is written as DICOM."""
    return [
        (p, n, s) for p in make_plan(SMALL, SEED) for n, s in enumerate(p.series) if not s.nifti
    ]


def scan(labels, index=0, phase="portal", config=SMALL, series=0):
    return make_scan(config, {**HEALTHY, **labels}, (SEED, 0, index), series, phase)


def drawn_for(patient, number, plan):
    key = (SEED, patient.split, patient.index)
    return make_scan(SMALL, patient.labels, key, number, plan.phase, patient.hospital)


def tree(root):
    return {
        str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(root.rglob("*"))
        if p.is_file()
    }


def tags(path):
    """All tags but the pixels; None where a deflated file is cut."""
    try:
        return pydicom.dcmread(path, stop_before_pixels=True)
    except zlib.error:
        return None


def read(path):
    """HU of a file in the standard orientation, by pydicom alone."""
    ds = pydicom.dcmread(path)
    if "BitsStored" not in ds:
        ds.BitsStored, ds.HighBit = 16, 15
    stored = ds.pixel_array.astype(np.float64)
    hu = stored * float(ds.RescaleSlope) + float(ds.RescaleIntercept)
    if ds.PhotometricInterpretation == "MONOCHROME1":
        hu = 2 * 50 - hu
    direction = [float(x) for x in ds.ImageOrientationPatient]
    return hu[:: int(direction[4]), :: int(direction[0])]


@pytest.mark.slow
def test_same_seed_same_bytes_whatever_the_number_of_processes(dataset, tmp_path):
    write_dataset(SMALL, SEED, tmp_path, 2, silent)
    assert tree(tmp_path) == tree(dataset[0])


def test_another_seed_is_another_data_set():
    assert not np.array_equal(
        scan({}).hu[:12], make_scan(SMALL, HEALTHY, (SEED + 1, 0, 0), 0, "portal").hu[:12]
    )


@pytest.mark.slow
def test_files_hold_the_drawn_hounsfield_units(dataset, series):
    for patient, number, plan in series:
        drawn = drawn_for(patient, number, plan)
        folder = dataset[0] / FOLDERS[patient.split] / patient.patient_id / plan.series_id
        instances = sorted(
            (int(p.stem) for p in folder.glob("*.dcm")), reverse=plan.header == "ascending"
        )
        assert len(instances) == len(drawn.hu)
        differ = 0
        for hu, instance in zip(drawn.hu, instances, strict=True):
            try:
                differ += not np.array_equal(read(folder / f"{instance}.dcm"), hu)
            except (AttributeError, RuntimeError, ValueError, NotImplementedError, zlib.error):
                differ += 1
        assert differ == {"none": 0, "duplicate": 0, "partial": 2}.get(plan.fault, 1), plan


def test_every_quirk_is_in_the_files(dataset, series):
    root, seen, per_series = dataset[0], Counter(), {}
    for patient, _, plan in series:
        folder = root / FOLDERS[patient.split] / patient.patient_id / plan.series_id
        heads = [
            head
            for p in sorted(folder.glob("*.dcm"), key=lambda p: int(p.stem))
            if (head := tags(p)) is not None
        ]
        ds = heads[0]
        names = {
            str(ds.file_meta.TransferSyntaxUID.name),
            f"intercept {int(float(ds.RescaleIntercept))}",
            ds.PhotometricInterpretation,
        }
        names |= {
            f"bits {ds.get('BitsStored', 'absent')} signed {ds.PixelRepresentation}",
            f"position {ds.get('PatientPosition', 'absent')}",
        }
        names |= {
            f"slope {float(ds.RescaleSlope)}",
            f"class {'SOPClassUID' in ds}",
            f"directions {[int(x) for x in ds.ImageOrientationPatient]}",
        }
        names |= {
            f"windows {ds['WindowCenter'].VM if 'WindowCenter' in ds else 'absent'}",
            f"first is 1: {int(ds.InstanceNumber) == 1}",
        }
        z = [
            float(head.ImagePositionPatient[2]) for head in heads if "ImagePositionPatient" in head
        ]
        names |= {("ascending" if z[-1] > z[0] else "descending") if z else "no position"}
        names |= {"duplicate"} if len(set(z)) < len(z) else set()
        sizes = {(head.Rows, head.Columns) for head in heads}
        names |= {"mixed sizes"} if any(64 < rows < 1000 for rows, _ in sizes) else set()
        names |= {"absurd rows"} if any(rows == 65535 for rows, _ in sizes) else set()
        seen.update(names)
        per_series[plan.series_id] = names
    expected = {
        *(
            "RLE Lossless",
            "JPEG 2000 Image Compression (Lossless Only)",
            "Deflated Explicit VR Little Endian",
        ),
        *("Explicit VR Little Endian", "Implicit VR Little Endian", "MONOCHROME1", "MONOCHROME2"),
        *(
            "intercept -1024",
            "intercept 0",
            "intercept -8192",
            "intercept -32768",
            "slope 0.5",
            "bits absent signed 1",
        ),
        *(
            "directions [-1, 0, 0, 0, 1, 0]",
            "directions [1, 0, 0, 0, -1, 0]",
            "directions [-1, 0, 0, 0, -1, 0]",
        ),
        *(
            "windows 2",
            "windows absent",
            "first is 1: False",
            "first is 1: True",
            "position absent",
            "position FFS",
        ),
        *(
            "class False",
            "no position",
            "ascending",
            "descending",
            "duplicate",
            "mixed sizes",
            "absurd rows",
        ),
    }
    expected |= {f"bits {bits} signed 1" for bits in (12, 13, 14, 15, 16)}
    assert expected <= set(seen), expected - set(seen)
    assert seen["RLE Lossless"] > 0.7 * len(per_series)
    assert {"partial", "truncated", "rle_header"} <= {plan.fault for _, _, plan in series}


def test_decks_reach_every_series_kind():
    plans = [s for p in make_plan(SMALL, SEED) for s in p.series]
    for name, deck in (
        ("encoding", SYNTAXES),
        ("storage", STORAGE),
        ("header", HEADERS),
        ("fault", FAULTS),
        ("phase", PHASES),
    ):
        assert {getattr(s, name) for s in plans} == set(deck)
    assert len({s.series_id for s in plans}) == len(plans)
    for patient in make_plan(SMALL, SEED):
        assert len({s.phase for s in patient.series}) == len(patient.series)


def test_files_carry_no_name_and_no_date(dataset):
    path = next(dataset[0].glob("train_images/*/*/*.dcm"))
    for element in pydicom.dcmread(path, stop_before_pixels=True):
        assert element.VR not in ("PN", "DA", "TM", "DT", "SH", "LO"), element


def test_tables_are_what_the_product_reads(dataset):
    root, counts, names = dataset
    labels, listed = tables.read_labels(root), tables.read_series(root, "train")
    assert set(labels["patient_id"]) == {p.name for p in (root / "train_images").iterdir()}
    assert {(p.parent.name, p.name) for p in root.glob("train_images/*/*")} == set(
        zip(listed["patient_id"], listed["series_id"], strict=True)
    )
    tests = tables.read_series(root, "test")
    assert {(p.parent.name, p.name) for p in root.glob("test_images/*/*")} == set(
        zip(tests["patient_id"], tests["series_id"], strict=True)
    )
    assert set(tables.read_sample_submission(root)["patient_id"]) == set(tests["patient_id"])
    assert names == sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())
    files = len(list(root.rglob("*.dcm")))
    assert counts["patients"] == 32
    assert counts["slices"] > files  # NIfTI slices too
    assert len(list((root / "unlabelled").glob("*.nii.gz"))) == 1


def test_truth_matches_the_plan_and_stays_out_of_the_official_tables(dataset):
    with open(dataset[0] / "phantom_truth.csv", encoding="utf-8") as handle:
        rows = {row["patient_id"]: row for row in csv.DictReader(handle)}
    for patient in make_plan(SMALL, SEED):
        if patient.split == 1:
            for target in TARGETS:
                assert rows[patient.patient_id][target.columns[patient.labels[target.name]]] == "1"
            assert sum(int(rows[patient.patient_id][column]) for column in COLUMNS) == len(TARGETS)
    assert not set(rows) & set(tables.read_labels(dataset[0])["patient_id"])


def test_slice_labels_name_existing_slices_of_injured_patients(dataset):
    root = dataset[0]
    patients = {p.patient_id: p for p in make_plan(SMALL, SEED)}
    frame = tables.read_slice_labels(root)
    with open(root / "image_level_labels.csv", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    assert frame is not None
    assert frame.height == len(rows) > 20
    for row in rows:
        target = {"Bowel": "bowel", "Active_Extravasation": "extravasation"}[row["injury_name"]]
        assert patients[row["patient_id"]].labels[target] == 1
        assert (
            root
            / "train_images"
            / row["patient_id"]
            / row["series_id"]
            / f"{row['instance_number']}.dcm"
        ).is_file()


def test_nifti_affine_puts_the_liver_on_the_patients_right(dataset):
    import nibabel

    path = next((dataset[0] / "unlabelled").glob("*.nii.gz"))
    image = nibabel.load(path)
    patient = next(p for p in make_plan(SMALL, SEED) if f"{p.patient_id}.nii.gz" == path.name)
    drawn = drawn_for(patient, 0, patient.series[0])
    # x to the right, y to the front, z up
    volume = np.asarray(nibabel.as_closest_canonical(image).dataobj)
    assert nibabel.aff2axcodes(image.affine) == ("L", "P", "S")
    assert np.array_equal(volume[::-1, ::-1, ::-1].transpose(2, 1, 0), drawn.hu)
    assert np.allclose(sorted(image.header.get_zooms()), sorted(drawn.spacing), rtol=1e-5)


def test_masks_lie_on_the_organs_where_the_affine_says(dataset, series):
    """Each labelled voxel, taken to the patient by the affine and from there to a pixel of the
    DICOM file, is the voxel of the drawn label map.
    """
    import nibabel

    chosen = [one for one in series if one[2].masks]
    files = {p.name.split(".")[0] for p in (dataset[0] / "segmentations").iterdir()}
    assert files == {plan.series_id for _, _, plan in chosen}
    assert len(chosen) > 5
    for patient, number, plan in chosen:
        image = nibabel.load(dataset[0] / "segmentations" / f"{plan.series_id}.nii.gz")
        assert nibabel.aff2axcodes(image.affine) == ("L", "A", "S")
        drawn = drawn_for(patient, number, plan)
        folder = dataset[0] / FOLDERS[0] / patient.patient_id / plan.series_id
        values = np.asarray(image.dataobj)
        assert np.bincount(values.ravel(), minlength=6)[[1, 5]].min() > 20
        if plan.header != "plain" or plan.fault != "none":
            continue
        depth, rows, columns = drawn.masks.shape
        first = pydicom.dcmread(min(folder.iterdir(), key=lambda p: int(p.stem)))
        origin = np.array([float(x) for x in first.ImagePositionPatient])
        at = np.argwhere(values >= 0)
        left, back, up = (image.affine @ np.c_[at, np.ones(len(at))].T)[:3] * [[-1], [-1], [1]]
        place = np.rint(
            [
                (origin[2] - up) / drawn.spacing[0],
                (back - origin[1]) / drawn.spacing[1],
                (left - origin[0]) / drawn.spacing[2],
            ]
        ).astype(int)
        assert np.array_equal(drawn.masks[tuple(place)], values[tuple(at.T)])


def test_hospitals_are_in_both_tables_and_differ_in_noise_and_edges(dataset):
    for name in ("train", "test"):
        with open(dataset[0] / f"{name}_series_meta.csv", encoding="utf-8") as handle:
            rows = list(csv.DictReader(handle))
        assert {row["hospital"] for row in rows} <= {h.name for h in HOSPITALS}
        assert name == "test" or len({row["hospital"] for row in rows}) == len(HOSPITALS) >= 4
    for hospital in HOSPITALS:
        drawn = noise((4, 128, 128), hospital, 1.0, np.random.default_rng(0))
        assert abs(drawn.std() - 1) < 1e-3
        power = np.mean(np.abs(np.fft.fft2(drawn)) ** 2, axis=0)
        f = np.hypot(*np.meshgrid(*[np.fft.fftfreq(128)] * 2))
        radial = [power[(f >= a) & (f < a + 0.03)].mean() for a in np.arange(0, 0.48, 0.03)]
        peak = 0.03 * np.argmax(radial) + 0.015
        assert abs(peak - min(hospital.peak, 0.35)) < 0.06


def test_a_thick_slice_is_the_mean_of_thin_ones():
    thick = replace(HOSPITALS[0], thickness_mm=5.0)
    assert sub_planes(thick, 5.0) == 2
    assert sub_planes(thick, 20.0) == 1
    fine = Canvas(10, 64, np.random.default_rng(0), (0.0, 0.18), thick)
    assert fine.thick == 2
    steps = np.diff(fine.tz) * fine.length
    assert np.allclose(steps[::2], 2.5, atol=1e-3), "two planes share out one thickness"
    assert fine.depth == 20


def test_the_abdomen_is_the_share_of_the_scan_that_coverage_asks_for():
    config = SMALL.model_copy(update={"coverage": 0.6})
    lengths = []
    for index in range(20):
        top, end = extent(config, np.random.default_rng(index))
        lengths.append(end - top)
        assert top < 0.03
        assert end > 0.98
    assert max(lengths) < 1.08 + 0.67
    assert max(lengths) > 1.3
    deep = make_scan(config, HEALTHY, (SEED, 0, 3), 0, "portal")
    assert deep.spacing[0] * len(deep.hu) > 1.02 * 250


def test_exact_prevalence_and_at_least_two_of_each_class():
    labels = draw_labels(PhantomConfig(), 200, np.random.default_rng(0))
    assert labels["bowel"].sum() == labels["extravasation"].sum() == 50
    for organ in ("kidney", "liver", "spleen"):
        assert np.bincount(labels[organ]).tolist() == [140, 30, 30]
    rare = draw_labels(
        PhantomConfig(organ_low=0.01, organ_high=0.01, bowel=0.01, extravasation=0.01),
        24,
        np.random.default_rng(0),
    )
    assert all(
        (values == k).sum() >= 2 for values in rare.values() for k in range(1, values.max() + 1)
    )
    assert rare["liver"].max() == 2


def test_injuries_go_together_as_in_the_competition():
    """Prevalences are met exactly, and so are on average the odds ratios of pairs given the rest,
    here of the two most and the least bound.
    """
    config = PhantomConfig(prevalence="real")
    drawn = [draw_labels(config, 3147, np.random.default_rng(seed)) for seed in range(12)]
    labels = {name: np.concatenate([d[name] for d in drawn]) for name in drawn[0]}
    for name, classes in PREVALENCE.items():
        for k, share in enumerate(classes, 1):
            assert abs((labels[name] == k).mean() - share) < 2e-4
    for pair in (("bowel", "extravasation"), ("kidney", "liver"), ("liver", "spleen")):
        one, two = (labels[name] > 0 for name in pair)
        rest = ~np.any([labels[name] > 0 for name in labels if name not in pair], axis=0)
        table = [
            [(rest & (one == a) & (two == b)).sum() for b in (False, True)] for a in (False, True)
        ]
        ratio = table[0][0] * table[1][1] / (table[0][1] * table[1][0])
        assert 0.65 < ratio / ODDS_RATIOS[pair] < 1.5


def test_the_joint_table_has_the_margins_and_the_odds_ratios():
    margins = np.array([0.02, 0.06, 0.06, 0.1, 0.11])
    table = joint_table(margins)
    for axis, share in enumerate(margins):
        assert np.isclose(table.take(1, axis).sum(), share)
    healthy = table[:, :, 0, 0, 0]
    assert np.isclose(healthy[1, 1] * healthy[0, 0] / healthy[0, 1] / healthy[1, 0], 5.2)


def test_anatomy_is_where_it_belongs():
    soft, bone, air = [], [], []
    for index in range(6):
        drawn = scan({}, index)
        hu = drawn.hu.astype(int)
        columns = [np.argwhere(drawn.masks == k)[:, 2].mean() / hu.shape[2] for k in (1, 4, 3, 2)]
        assert max(columns[:2]) < 0.5 < min(columns[2:]), "liver and right kidney at image left"
        upper = hu[len(hu) // 4]
        half = upper.shape[1] // 2
        soft.append(
            ((upper[:, :half] > 60) & (upper[:, :half] < 200)).sum()
            / ((upper[:, half:] > 60) & (upper[:, half:] < 200)).sum()
        )
        body = np.argwhere(upper > -200)
        bone.append(
            (np.argwhere(hu[:, :, half - 4 : half + 4] > 200)[:, 1].mean() - body[:, 0].min())
            / np.ptp(body[:, 0])
        )
        middle = hu[
            :,
            body[:, 0].min() + 8 : body[:, 0].max() - 8,
            body[:, 1].min() + 8 : body[:, 1].max() - 8,
        ]
        air.append([(plane < -700).mean() for plane in middle])
    assert np.median(soft) > 1.3, "the liver lies at image left"
    assert np.median(bone) > 0.55, "the spine lies at the back"
    assert all(planes[0] > 0.2 > 0.1 > np.mean(planes[6:]) for planes in air), (
        "lung bases in the top planes only"
    )


def test_phases_differ_and_a_second_series_shows_the_same_body():
    one, two = scan({}, phase="arterial"), scan({}, phase="delayed", series=1)
    assert one.aortic_hu > 160 > 140 > two.aortic_hu
    assert one.spacing[1:] == two.spacing[1:]
    outline = [(s.hu[len(s.hu) // 2] > -300) for s in (one, two)]
    assert (outline[0] & outline[1]).sum() / (outline[0] | outline[1]).sum() > 0.9
    assert not np.array_equal(one.hu[:12], two.hu[:12])


@pytest.mark.parametrize("target", ["liver", "spleen", "kidney"])
@pytest.mark.parametrize("grade", [1, 2])
def test_an_organ_injury_is_another_form_of_dark_tissue_that_the_healthy_have_too(target, grade):
    numbers = {"liver": (1,), "spleen": (2,), "kidney": (3, 4)}[target]
    same, dark = [], []
    for index in range(8):
        healthy, hurt = scan({}, index, "delayed"), scan({target: grade}, index, "delayed")
        organ = np.isin(healthy.masks, numbers)
        assert np.array_equal(organ, np.isin(hurt.masks, numbers))
        changed = (np.abs(hurt.hu.astype(int) - healthy.hu) > 25) & organ
        assert changed.sum() > 0.02 * organ.sum(), "the form is another one"
        level = np.median(healthy.hu[organ])
        dark.append([((s.hu < level - 35) & organ).sum() / organ.sum() for s in (healthy, hurt)])
        same.append(
            [np.histogram(s.hu[organ], 8, (-100, 300))[0] / organ.sum() for s in (healthy, hurt)]
        )
    amounts = np.mean(dark, axis=0)
    assert 0.2 < amounts[0] / amounts[1] < 1.2
    assert np.abs(np.diff(np.mean(same, axis=0), axis=0)).max() < 0.3, "their greys overlap"


def test_tears_branch_from_one_point_where_cysts_lie_apart():
    """Most of what is dark in an organ is one connected part in a high grade alone."""
    largest = []
    for index in range(8):
        for labels in ({}, {"liver": 2}):
            drawn = scan(labels, index, "delayed", SHARP)
            organ = drawn.masks == 1
            parts, _ = ndimage.label(organ & (drawn.hu < np.median(drawn.hu[organ]) - 35))
            largest.append(np.bincount(parts.ravel())[1:].max() / organ.sum())
    assert np.median(largest[1::2]) > 2 * np.median(largest[::2])


def test_blush_is_bright_on_the_labelled_slices_and_its_twin_comes_near():
    amounts = []
    for index, other in ((0, {}), (1, {"liver": 2}), (2, {"spleen": 1}), (3, {"kidney": 1})):
        without, with_blush = (
            scan(other, index, "arterial"),
            scan({**other, "extravasation": 1}, index, "arterial"),
        )
        bright = (with_blush.hu > without.hu + 60.0) & (with_blush.hu > with_blush.aortic_hu)
        assert 2 <= with_blush.shown["extravasation"].sum() <= 0.6 * len(bright)
        assert bright[with_blush.shown["extravasation"]].sum() > 0.8 * bright.sum() > 0
        assert not without.shown["extravasation"].any()
        amounts.append([(s.hu > 240).sum() for s in (without, with_blush)])
    assert np.abs(np.diff(amounts, axis=1)).max() < 0.8 * np.mean(amounts)


def test_bowel_injury_changes_one_loop_and_the_fat_about_it_on_the_labelled_slices():
    for index in range(6):
        healthy, hurt = scan({}, index), scan({"bowel": 1}, index)
        change = np.abs(hurt.hu.astype(int) - healthy.hu) > 25
        z, y, x = hurt.sites["bowel"]
        assert hurt.shown["bowel"][z]
        assert 0.05 < hurt.shown["bowel"].mean() < 0.75
        assert not healthy.shown["bowel"].any()
        lumen = (slice(z, z + 1), slice(y - 1, y + 2), slice(x - 1, x + 2))
        assert hurt.masks[lumen].max() == 5, "a loop lies at the site"
        grown = (hurt.hu > -20).sum() / (healthy.hu > -20).sum()
        assert 0.98 < grown < 1.05, "nodes and strands, thick and thin walls: little more tissue"
        assert change.mean() < 0.1


def test_difficulty_makes_injuries_smaller_and_fainter():
    strength = []
    for difficulty in (0.0, 0.35, 1.0):
        config, dark = SMALL.model_copy(update={"difficulty": difficulty}), 0.0
        for index in range(4):
            hurt = scan({"liver": 2}, index, config=config)
            liver = hurt.hu[hurt.masks == 1].astype(float)
            dark += np.clip(np.median(liver) - liver - 20, 0, None).sum()
        strength.append(dark)
    assert strength[0] > 1.2 * strength[1] > 1.5 * strength[2] > 0


def test_healthy_patients_have_distractors():
    volumes = [scan({}, index) for index in range(12)]
    assert all((v.hu[4:, 12:-12, 12:-12] < -700).sum() > 30 for v in volumes), "gas inside loops"
    assert all((v.hu[:, :, 16:-16] > 220).any(axis=(1, 2)).mean() > 0.4 for v in volumes), (
        "bone as bright as a blush"
    )
    assert max(scan({}, index, "delayed").hu[5:10, :, 20:44].max() for index in range(6)) > 230, (
        "contrast in the kidneys"
    )


def test_labels_change_nothing_but_the_picture_of_the_injury():
    everything = {"bowel": 1, "extravasation": 1, "kidney": 2, "liver": 1, "spleen": 2}
    for index in range(3):
        healthy, hurt = scan({}, index), scan(everything, index)
        assert (healthy.hu.shape, healthy.spacing, healthy.aortic_hu) == (
            hurt.hu.shape,
            hurt.spacing,
            hurt.aortic_hu,
        )
        skin = (healthy.hu > -300).any(axis=0)
        outside = ~(
            np.maximum.accumulate(skin, axis=0) & np.maximum.accumulate(skin[::-1], axis=0)[::-1]
        )
        assert np.array_equal(healthy.hu[:, outside], hurt.hu[:, outside]), (
            "noise, table and arms are the same"
        )
        assert (healthy.hu == hurt.hu).mean() > 0.7


def test_plan_does_not_depend_on_labels():
    one, other = (
        make_plan(SMALL, SEED),
        make_plan(
            SMALL.model_copy(update={"bowel": 0.9, "organ_high": 0.4, "extravasation": 0.7}), SEED
        ),
    )
    assert [(p.patient_id, p.series) for p in one] == [(p.patient_id, p.series) for p in other]
    assert [p.labels for p in one] != [p.labels for p in other]


def test_no_label_in_the_metadata():
    """A forest on ids, order, number of series and all quirks is at chance (what else files say is
    the same for all labels: above).
    """
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import cross_val_predict

    config, decks = PhantomConfig(train_patients=600), {}
    rows, labels = [], []
    for order, patient in enumerate(p for p in make_plan(config, 1) if p.split == 0):
        first = patient.series[0]
        quirks = [
            decks.setdefault((name, getattr(first, name)), len(decks))
            for name in ("phase", "encoding", "storage", "header", "fault")
        ]
        quirks.append(decks.setdefault(patient.hospital.name, len(decks)))
        rows.append(
            [int(patient.patient_id), int(first.series_id), order, len(patient.series), *quirks]
        )
        labels.append(any(patient.labels.values()))
    y = np.array(labels)
    forest = RandomForestClassifier(50, min_samples_leaf=5, random_state=0)
    guess = cross_val_predict(forest, np.array(rows), y, cv=5, method="predict_proba")[:, 1]
    assert abs(roc_auc_score(y, guess) - 0.5) < 0.08


def stage(*arguments):
    command = [sys.executable, str(ROOT / "stages" / "00_make_phantom.py"), *arguments]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd="/",
    )


@pytest.mark.slow
def test_stage_writes_skips_and_says_why(tmp_path):
    tiny = [
        "--config",
        "smoke",
        "--out",
        str(tmp_path / "run"),
        "--jobs",
        "1",
        "phantom.train_patients=10",
        "phantom.test_patients=1",
        "phantom.unlabelled_patients=0",
        "phantom.image_size=64",
    ]
    first = stage(*tiny)
    folder = tmp_path / "run" / "data" / "phantom"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert first.returncode == 0, first.stderr
    assert manifest["counts"]["patients"] == 11
    assert set(manifest["outputs"]) == {
        str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()
    } - {"manifest.json"}
    assert not [p for p in folder.parent.iterdir() if p.name != "phantom"], (
        "no temporary folder is left"
    )
    before = tree(folder)
    assert "up to date" in stage(*tiny).stderr
    assert tree(folder) == before
    assert "--data names" in stage(*tiny, "--data", str(folder)).stderr
    empty = stage("--config", "paper", "--out", str(tmp_path / "paper"))
    assert empty.returncode == 0
    assert "phantom: null" in empty.stderr
    assert not (tmp_path / "paper" / "data").exists()
