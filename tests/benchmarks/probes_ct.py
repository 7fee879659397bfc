"""Probes on real CT, one patient left out at a time: `python tests/benchmarks/probes_ct.py FOLDER
OUT [--backbone FILE ...]`.

FOLDER holds series as subfolders of DICOM files and `NAME.nii.gz`, and `organ_ranges.csv` (series,
organ, first, last: the slices that show an organ, 0 the most superior, -1 none); `--labels` pairs a
series with a TotalSegmentator label map (NIfTI), whose organs become the competition's. The series
are brought into the layout of `unlabelled/` in OUT, through stages 01 and 02 of the demo, and to
`pipeline.ablation.probes`. What it prints is an observation on as many patients as there are.
"""

import argparse
import csv
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pydicom

from pipeline.ablation import probes
from pipeline.run import layout

ROOT = Path(__file__).resolve().parents[2]
# TotalSegmentator's numbers: liver, spleen, left and right kidney; small bowel, duodenum and colon
TOTAL = {5: 1, 1: 2, 3: 3, 2: 4, 18: 5, 19: 5, 20: 5}


def copy_dicom(folder: Path, data: Path) -> list[int]:
    """Copy a series into `unlabelled/`, named by its instance numbers; returns these, superior
    first.
    """
    target = data / "unlabelled" / folder.name / folder.name
    target.mkdir(parents=True)
    found = []
    for path in folder.glob("*.dcm"):
        header = pydicom.dcmread(path, stop_before_pixels=True)
        found.append((-float(header.ImagePositionPatient[2]), int(header.InstanceNumber)))
        shutil.copy(path, target / f"{header.InstanceNumber}.dcm")
    return [number for _, number in sorted(found)]


def write_masks(path: Path, target: Path) -> None:
    """A TotalSegmentator label map with the competition's numbers."""
    image = nibabel.load(path)
    table = np.zeros(256, np.uint8)
    table[list(TOTAL)] = list(TOTAL.values())
    target.parent.mkdir(exist_ok=True)
    labels = table[np.asarray(image.dataobj).astype(np.uint8)]
    nibabel.save(nibabel.Nifti1Image(labels, image.affine), target)


def make_data(folder: Path, labels: dict[str, str], data: Path) -> None:
    """The data set with its masks and its table of organs."""
    instances = {
        path.name: copy_dicom(path, data)
        for path in sorted(folder.iterdir())
        if path.is_dir() and any(path.glob("*.dcm"))
    }
    for path in folder.rglob("*.nii.gz"):
        if path.resolve() not in {Path(one).resolve() for one in labels.values()}:
            shutil.copy(path, data / "unlabelled" / path.name)
    for series, path in labels.items():
        name = series if series in instances else "nifti"  # how one file is called as a series
        write_masks(Path(path), data / "segmentations" / f"{name}.nii.gz")
    with open(data / "organs.csv", "w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["patient_id", "series_id", "instance_number", "organ"])
        for row in csv.DictReader((folder / "organ_ranges.csv").read_text().splitlines()):
            own = instances[row["series"]]
            shown = own[int(row["first"]) : int(row["last"]) + 1] if int(row["last"]) >= 0 else []
            ids = [f"unlabelled-{row['series']}", row["series"]]
            writer.writerows([*ids, number, row["organ"]] for number in shown)


def make_volumes(folder: Path, labels: list[str], out: Path) -> Path:
    """The data set below `out`, unless it is there, and its slices and volumes; returns the data
    set's folder. `labels`: SERIES=FILE.
    """
    data = out / "data"
    if not data.exists():
        make_data(folder, dict(pair.split("=") for pair in labels), data)
    for stage in ("01_convert_dicom", "02_build_volumes"):
        command = [sys.executable, str(ROOT / "stages" / f"{stage}.py")]
        subprocess.run([*command, "--data", str(data), "--out", str(out)], check=True)
    return data


def main() -> int:
    """Make what is missing, and probe."""
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("folder", type=Path)
    flags.add_argument("out", type=Path)
    flags.add_argument("--labels", nargs="*", default=[], metavar="SERIES=FILE")
    flags.add_argument("--backbone", nargs="*", default=[])
    options = flags.parse_args()
    data = make_volumes(options.folder, options.labels, options.out)
    given = [part for path in options.backbone for part in ("--backbone", path)]
    volumes = str(options.out / layout.VOLUMES)
    where = ["--data", str(data), "--volumes", volumes, "--organs", str(data / "organs.csv")]
    return probes.main([*where, *given])


if __name__ == "__main__":
    raise SystemExit(main())
